"""
Video in and out, and the cache of conditioning clips that training reads.

    from data import read_video, write_video
    video, fps = read_video("clip.mp4", frames=81, size=(480, 832))  # uint8 (81, 480, 832, 3)
    write_video("copy.mp4", video, fps)

Videos are uint8 (T, H, W, 3) RGB here and wherever a reward or a file sees them; the codec takes float
(B, 3, T, H, W) in [-1, 1] (to_float, to_uint8).
"""
import argparse
import base64
import csv
import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
import uuid
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
import torch.distributed as dist
from av.video.reformatter import ColorRange, Colorspace
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

import trajectories
from cameras import read_path, split_name
from distributed import connect, lost_contact

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".m4v", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
INDEX, NEGATIVE = "index.json", "negative_prompt.safetensors"  # a cache's, beside its clips
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"  # as published
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
FOLDER_FPS = 24.0  # a folder of images has no rate of its own; DAVIS, the evaluation's data, runs at 24


# ---- reading ----

def resize_to_cover(frame, size):
    """uint8 (h, w, 3) -> (H, W, 3), size = (H, W): scaled to cover, then centre-cropped (as ReDirector does).
    Bilinear and antialiased, in fixed point: within one grey level of Pillow's, and so of torchvision's."""
    (h, w), (height, width) = frame.shape[:2], size
    scale = max(height / h, width / w)
    h, w = round(h * scale), round(w * scale)
    if (h, w) != frame.shape[:2]:
        x = torch.from_numpy(frame).permute(2, 0, 1)[None]
        frame = F.interpolate(x, (h, w), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    top, left = round((h - height) / 2), round((w - width) / 2)
    return frame[top:top + height, left:left + width]


def natural(path):
    """Sort key under which frame2 comes before frame10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(path))]


def rgb(frame):
    """av.VideoFrame -> uint8 (H, W, 3), by the frame's colour tags, turned as its rotation metadata says."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def open_video(path):
    """A video file or a folder of images -> (fps, iterator over (decoded frame's number, av.VideoFrame)).
    The iterator runs on a constant clock of the file's average rate, starting at its first frame: a tick
    shows the frame whose time rounds to it, or else the one before. At a constant rate this is every decoded
    frame once; at a variable rate frames are held or dropped so that motion keeps its speed, as a camera path
    in metres per frame must."""
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGES), key=natural)
        if not files:
            raise ValueError(f"{path}: a folder without images ({' '.join(IMAGES)})")
        return FOLDER_FPS, ((n, open_image(f)) for n, f in enumerate(files))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty file (0 bytes)")
    container = av.open(f"file:{path}")  # "file:", or a colon in the name would be taken for a protocol
    if not container.streams.video:
        kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
        container.close()
        raise ValueError(f"{path}: no video stream, only {kinds}")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rates = [float(rate or 0) for rate in (stream.average_rate, stream.guessed_rate)]
    fps = next((rate for rate in rates if 0 < rate < 1000), None)  # 1000 is a millisecond clock, not a rate
    if fps is None:
        container.close()
        raise ValueError(f"{path}: no usable frame rate (the file says {stream.average_rate})")

    def ticks():
        last, first, held, end = -1, None, None, 0.0
        with container:
            for n, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise ValueError(f"{path}: damaged at frame {n}")
                time = frame.time if frame.time is not None else (first or 0.0) + (last + 1) / fps
                first = time if first is None else first
                end = time + float(frame.duration * frame.time_base or 1 / fps)
                tick = round((time - first) * fps)
                for _ in range(last + 1, tick):
                    yield held
                held = n, frame
                if tick > last:
                    yield held
                last = max(tick, last)
            # a file cut short may simply end; its header still says how long it was (Matroska: a tag h:m:s)
            tag = re.match(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
            duration = sum(float(x) * unit for x, unit in zip(tag.groups(), (3600, 60, 1))) if tag else 0.0
            duration = float(stream.duration * stream.time_base) if stream.duration else duration
            if end + 2 / fps < duration:
                raise ValueError(f"{path}: truncated, ends at {end:.2f} s of {duration:.2f} s")

    return fps, ticks()


def open_image(path):
    """An image file -> av.VideoFrame. Opened as a stream: % in a name would be taken for a pattern."""
    try:
        with open(path, "rb") as file, av.open(file) as container:
            return next(container.decode(video=0))
    except (av.error.FFmpegError, StopIteration, IndexError) as error:
        raise ValueError(f"{path}: unreadable image ({one_line(error)})") from None


def one_line(error):
    """An exception in a few words: ffmpeg's own message without its number and the call's name."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def read_frames(path, frames=None, stride=1, size=None, start=0):
    """read_video, and also the number of the decoded frame behind each one, int (T,): the row of its camera.
    Returns (uint8 (T, H, W, 3), fps, numbers); the rest is read_video's."""
    path = Path(path)
    video, numbers, seen = [], [], 0
    try:
        fps, ticks = open_video(path)
        for tick, (number, frame) in enumerate(ticks):
            seen = tick + 1
            if tick < start or (tick - start) % stride:
                continue
            image = rgb(frame)
            video.append(image if size is None else resize_to_cover(image, size))
            numbers.append(number)
            if video[0].shape != image.shape and size is None:
                raise ValueError(f"{path}: frame {number} is {image.shape}, the first was {video[0].shape}")
            if len(video) == frames:
                ticks.close()  # nothing after the last frame needed is decoded
                break
    except av.error.FFmpegError as error:
        where = f" after frame {seen}" if seen else ""
        raise ValueError(f"{path}: unreadable or truncated{where} ({one_line(error)})") from None
    if not video or frames is not None and len(video) < frames:
        needed = start + ((frames or 1) - 1) * stride + 1
        raise ValueError(f"{path}: too short, {seen} frames, {needed} needed "
                         f"({frames or 'any'} at stride {stride} from frame {start})")
    return np.stack(video), fps / stride, np.array(numbers)


def read_video(path, frames=None, stride=1, size=None, start=0):
    """Frames start, start + stride, ... of a video file (mp4, mov, webm, mkv) or of a folder of images.
    path: a file, or a folder whose images are taken in natural order (frame2 before frame10) at 24 a second
    frames: how many are returned; None: all that there are
    size: (H, W) to scale to cover and centre-crop to, bilinear; None: as stored (rotation metadata applied)
    start, stride: counted on the video's constant clock (see open_video)
    Returns (uint8 (T, H, W, 3) RGB, fps); fps is that of the frames returned: the file's divided by stride.
    Raises FileNotFoundError, or ValueError naming the file if it is empty, unreadable, damaged before the
    last frame needed, too short, or holds no video."""
    return read_frames(path, frames, stride, size, start)[:2]


def to_float(video):
    """uint8 (T, H, W, 3), array or tensor -> float32 (3, T, H, W) in [-1, 1]."""
    return torch.as_tensor(video).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video):
    """float (..., 3, T, H, W) in [-1, 1] (clamped) -> uint8 (..., T, H, W, 3), on the same device."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-4, -1)


# ---- writing ----

def write_file(path, content):
    """Write bytes so that `path` is either what it was or complete, whatever happens in between.
    A killed process leaves at most a .tmp file, which nothing reads; a full disk raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, {len(content)} bytes", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_video(path, video, fps):
    """uint8 (T, H, W, 3) -> H.264 mp4 (yuv420p, BT.709), the same frames always as the same bytes.
    An odd size gets its last row or column twice."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
        raise ValueError(f"{path}: a video is uint8 (T, H, W, 3), this is {video.dtype} {video.shape}")
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # x264's macroblock tree reads memory that it never wrote, and its threads' number shows in the bits
        options = {"crf": "15", "mbtree": "0", "threads": "1"}
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        context = stream.codec_context
        # 1 is BT.709, and limited range; untagged, players guess by the size
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        for frame in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_file(path, file.getvalue())


# ---- pictures for people: captions, grids, camera paths ----

# 95 glyphs from space to ~, each 8 rows of 5 pixels, one bit a pixel
FONT = (
    "AAAAAAAhCEIAgFKAAAAAUr6vqUAj6OL4gM5ERE5gZKiKyaAhAAAAABEQhBBAQQQhEQABKuqQAAEJ8hAAAAAAEIgAAfAAAAAAAACA"
    "AEREQAB0Z1zFwCMIQhHAdEIiI+D4iCDFwBGVL4hA/DwQxcAyIejFwPhERCEAdGLoxcB0YvCJgAAIAACAAAgAEIgREQQQQAA+D4AA"
    "QQQREQB0QiIAgHRvW8HgdGP4xiD0Y+jHwHRhCEXA9GMYx8D8IehD4Pwh6EIAdGF4xeCMY/jGIHEIQhHAOIQhSYCMqYpKIIQhCEPg"
    "jutYxiCMc1nGIHRjGMXA9GPoQgB0YxrJoPRj6kogfCDgh8D5CEIQgIxjGMXAjGMYqICMY1rVQIxURUYgjFRCEID4RERD4HIQhCHA"
    "BBBBBABwhCEJwCKiAAAAAAAAAB9BAAAAAAAcF8XghD0Yx8AAHwhB4AhfGMXgAB0fwcAyPIQhAAAfGLwuhD0YxiAgGEIRwBAMIQpM"
    "hCVMUkBhCEIRwAA1WtagAD0YxiAAHRjFwAA9GPoQAB8YvCEALYhCAAAfBwfAQjyEIMAAIxjF4AAjGKiAACMa1UAAIqIqIAAjGLwu"
    "AD4iI+ARCIIQQCEIQhCAQQgiEQAAEVEAAA==")
GLYPHS = np.unpackbits(np.frombuffer(base64.b64decode(FONT), np.uint8)).reshape(95, 8, 5)


def text_mask(text, scale=1):
    """A line of text -> bool (8 scale, 6 scale len(text)); what is not printable ASCII shows as ?."""
    codes = [ord(c) - 32 if " " <= c <= "~" else ord("?") - 32 for c in text]
    mask = np.pad(GLYPHS[codes], ((0, 0), (0, 0), (0, 1))).transpose(1, 0, 2).reshape(8, -1)
    return mask.repeat(scale, 0).repeat(scale, 1).astype(bool)


def upscale(video, factor):
    """uint8 (T, H, W, 3) -> (T, factor H, factor W, 3), bicubic: for the toy's tiny videos."""
    x = torch.from_numpy(np.asarray(video)).movedim(-1, 1).float()
    x = F.interpolate(x, scale_factor=factor, mode="bicubic") if factor > 1 else x
    return x.round().clamp(0, 255).byte().movedim(1, -1).numpy()


def grid(videos, labels, scale=1):
    """Videos side by side, each under its caption.
    videos: list of uint8 (T_i, H, W, 3); a shorter one holds its last frame
    labels: as many strings, broken into lines where they are too long
    scale: whole number that the pixels are enlarged by first
    Returns uint8 (max T_i, strip + H, sum of widths and 4-pixel gaps, 3)."""
    if len(videos) != len(labels):
        raise ValueError(f"{len(videos)} videos, {len(labels)} labels")
    videos = [upscale(video, scale) for video in videos]
    length = max(len(video) for video in videos)
    size = max(1, videos[0].shape[1] // 240)  # of the font: twice its pixels at 480 lines
    lines = [textwrap.wrap(label, max(1, v.shape[2] // (6 * size) - 1)) for v, label in zip(videos, labels)]
    strip = size * (10 * max(map(len, lines)) + 4)
    columns = []
    for video, rows in zip(videos, lines):
        column = np.full((length, strip + video.shape[1], video.shape[2] + 4, 3), 20, np.uint8)
        for row, text in enumerate(rows):
            mask, top = text_mask(text, size), size * (10 * row + 2)
            column[:, top:top + len(mask), 2 * size:2 * size + mask.shape[1]][:, mask] = 235
        column[:, strip:, :-4] = video[np.minimum(np.arange(length), len(video) - 1)]
        columns.append(column)
    return np.concatenate(columns, 2)[:, :, :-4]


def line_alpha(points, start, end, width):
    """Opacity (P,) in [0, 1] at points (P, 2) of the lines from start (S, 2) to end (S, 2), anti-aliased."""
    along = end - start  # (S, 2)
    offset = points[:, None] - start  # (P, S, 2)
    u = ((offset * along).sum(-1) / np.maximum((along ** 2).sum(-1), 1e-12)).clip(0, 1)
    distance = np.linalg.norm(offset - u[..., None] * along, axis=-1).min(1)
    return (width / 2 + 0.5 - distance).clip(0, 1)


PATH_COLORS = ((255, 255, 255), (255, 150, 30), (60, 200, 255), (120, 230, 90))  # white, orange, blue, green


def draw_paths(video, paths, colors=PATH_COLORS):
    """A map of camera paths, seen from above, in the lower right corner of every frame.
    video: uint8 (T, H, W, 3); paths: list of c2w (T_i, 4, 4), all relative to the same frame
    The map shows x to the right and z (forward) upwards, fitted to all paths, its width written in metres;
    each camera stands where it is at that frame and points where it looks.
    Returns a new uint8 (T, H, W, 3)."""
    video = np.array(video)
    paths = [np.asarray(path, dtype=np.float64) for path in paths]
    side = min(video.shape[1:3]) // 3
    ground = np.concatenate([path[:, [0, 2], 3] for path in paths])  # x, z
    middle = (ground.max(0) + ground.min(0)) / 2
    extent = max(1.4 * np.ptp(ground, axis=0).max(), 0.2)  # metres

    def pixel(xz):
        return ((xz - middle) / extent * [1, -1] + 0.5) * side

    points = np.stack(np.meshgrid(*2 * [np.arange(side)]), -1).reshape(-1, 2) + 0.5  # (side^2, 2) x, y
    width = max(1.0, side / 60)
    routes = [line_alpha(points, corners[:-1], corners[1:], width)
              for corners in (pixel(path[[*range(len(path)), -1]][:, [0, 2], 3]) for path in paths)]
    for t, frame in enumerate(video):
        corner = frame[-side:, -side:]
        inset = 0.35 * corner.reshape(-1, 3)
        for path, route, color in zip(paths, routes, colors):
            c2w = path[min(t, len(path) - 1)]
            here = pixel(c2w[[0, 2], 3])
            look = c2w[[0, 2], 2] * [1, -1] * side / 6
            alpha = np.maximum(0.6 * route, line_alpha(points, here[None], (here + look)[None], width))
            alpha = np.maximum(alpha, line_alpha(points, here[None], here[None], 4 * width))[:, None]
            inset = inset * (1 - alpha) + np.array(color) * alpha
        corner[:] = inset.reshape(side, side, 3).round()
    if side >= 48:
        mask = text_mask(f"{extent:.2g} m", max(1, side // 80))[:, :side - 2]
        video[:, -side:, -side:][:, -len(mask) - 1:-1, 2:2 + mask.shape[1]][:, mask] = 200
    return video


# ---- prepared clips ----

@dataclass
class Clip:
    """A conditioning clip, encoded: all that training needs of it."""
    name: str                 # its video's path below the videos folder
    video: str                # that video's full path, its first frame being frame 0 here
    caption: str
    fps: float                # frames per second
    latents: torch.Tensor     # (16, F, h, w) normalised latents
    image: torch.Tensor       # (257, 1280) CLIP tokens of the first frame
    text: torch.Tensor        # (512, 4096) caption's embedding, zero beyond its length
    c2w: torch.Tensor         # (T, 4, 4) float64 source path, metres, relative to its first camera
    intrinsics: torch.Tensor  # (4,) fx/W, fy/H of the first frame; cx/W = cy/H = 0.5, as ReDirector has them


TENSORS = ("latents", "image", "text", "c2w", "intrinsics")
FACTS = ("name", "video", "caption", "fps")


def save_clip(path, clip):
    """Clip -> one safetensors file; the text embedding's zeros, most of it, are left out."""
    tensors = {key: getattr(clip, key).detach().cpu() for key in TENSORS}
    used = tensors["text"].any(1).nonzero().flatten().tolist()
    tensors["text"] = tensors["text"][:max(used, default=0) + 1]
    facts = {key: getattr(clip, key) for key in FACTS} | {"text_length": len(clip.text)}
    write_file(path, save({key: x.contiguous() for key, x in tensors.items()}, {"clip": json.dumps(facts)}))


def load_clip(path):
    """File written by save_clip -> Clip on the CPU. ValueError naming the file and what is wrong with it."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("clip", "{}"))
            missing = [key for key in (*FACTS, "text_length") if key not in facts]
            missing += [key for key in TENSORS if key not in file.keys()]
            if missing:
                raise ValueError(f"{path}: no prepared clip, lacks {', '.join(missing)}")
            tensors = {key: file.get_tensor(key) for key in TENSORS}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or no safetensors file ({one_line(error)})") from None
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)})") from None
    facts = {key: facts[key] for key in (*FACTS, "text_length")}
    length, text = facts.pop("text_length"), tensors["text"]
    if type(length) is not int or not len(text) <= length <= 1 << 16 or text.ndim != 2:
        raise ValueError(f"{path}: damaged (text_length {length!r} of {tuple(text.shape)})")
    tensors["text"] = F.pad(text, (0, 0, 0, length - len(text)))
    return Clip(**facts, **tensors)


class ClipCache:
    """What `python data.py prepare` wrote: cache[i] reads clip i as a Clip.
    names: the clips' names; settings: what they were made with; negative: (512, 4096), the negative prompt's
    embedding. expected: settings that must agree, as in ClipCache(folder, frames=81, height=480, width=832).
    FileNotFoundError where there is none; ValueError where it is empty, damaged or made with other settings.
    """

    def __init__(self, folder, **expected):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise FileNotFoundError(f"{folder}: no {INDEX}: expected clips made by python data.py prepare")
        self.settings, self.names = index["settings"], index["clips"]
        check_settings(folder, self.settings, expected)
        if not self.names:
            raise ValueError(f"{folder}: {INDEX} lists no clip: prepare has not finished, run it again")
        try:
            self.negative = load_file(self.folder / NEGATIVE)["text"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.folder / NEGATIVE}: no embedding ({one_line(error)})") from None

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return load_clip(self.folder / (self.names[i] + ".safetensors"))


def read_index(folder):
    """A cache's index: {"settings": {..}, "clips": [names], "skipped": {name: why}}, or None without one."""
    if not (folder / INDEX).is_file():
        return None
    try:
        index = json.loads((folder / INDEX).read_text())
        kinds = {"settings": dict, "clips": list, "skipped": dict}
        index = {key: kind(index[key]) for key, kind in kinds.items()}
        for name in index["clips"]:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"clips: expected names below this folder, found {name!r}")
        return index
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX}: no index of prepared clips ({one_line(error)})") from None


def check_settings(folder, made, wanted):
    """ValueError naming every setting in which a cache differs from what is wanted."""
    differ = [key for key in wanted if key not in made or made[key] != wanted[key]]
    if differ:
        what = "; ".join(f"{key} = {made.get(key, 'unknown')}, wanted {wanted[key]}" for key in differ)
        raise ValueError(f"{folder}: its clips were made with {what}")


# ---- preparing: captions, cameras, one pass over the videos ----

def find_videos(folder):
    """Names below a folder, in natural order, of its videos: video files, and folders that hold images."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of videos")
    files = [f for f in folder.rglob("*") if f.is_file()]
    names = {f for f in files if f.suffix.lower() in VIDEOS}
    names |= {f.parent for f in files if f.suffix.lower() in IMAGES and f.parent != folder}
    if not names:
        raise ValueError(f"{folder}: no videos ({' '.join(VIDEOS)}) and no folders of images in it")
    return sorted((f.relative_to(folder).as_posix() for f in names), key=natural)


def without_suffix(name):
    """A video's name without a video file's suffix; dots in the name of a folder of images are no suffix."""
    return re.sub(rf"({'|'.join(map(re.escape, VIDEOS))})$", "", name, flags=re.I)


def read_captions(path):
    """CSV with a header -> {file name without its suffix: caption}; rows without a caption are left out.
    Columns: file_name or videoFile, and text or caption (MultiCamVideo's and Sekai's names)."""
    try:
        rows = csv.DictReader(io.StringIO(Path(path).read_bytes().decode("utf-8-sig"), newline=""))
        columns, rows = rows.fieldnames or [], [(rows.line_num, row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected UTF-8 csv ({one_line(error)})") from None
    name = next((c for c in columns if c in ("file_name", "videoFile")), None)
    text = next((c for c in columns if c in ("text", "caption")), None)
    if name is None or text is None:
        raise ValueError(f"{path}: needs columns file_name and text (or videoFile and caption), "
                         f"has {', '.join(columns) or 'none'}")
    captions = {}
    for line, row in rows:
        key, caption = without_suffix(row[name] or ""), (row[text] or "").strip()
        if caption and captions.setdefault(key, caption) != caption:
            raise ValueError(f"{path}: line {line}: another caption for {row[name]}")
    if not captions:
        raise ValueError(f"{path}: no row with a caption")
    return captions


def find_caption(name, captions):
    """A clip's caption by its name below the videos folder or by its file name alone, None without a row."""
    key = without_suffix(name)
    return captions.get(key, captions.get(key.rpartition("/")[2]))


def read_focal(file, shape):
    """(fx/W, fy/H) of the first frame from an .npz's intrinsics, intrinsic or data (ViPE's); None without.
    (4,) or (T, 4) fx fy cx cy, or matrices (3, 3) or (T, 3, 3); in pixels of the stored video, whose shape is
    (H, W), or normalised, which is told by fx below 10."""
    if file.suffix != ".npz" or not file.is_file():
        return None
    with np.load(file) as arrays:
        key = next((key for key in ("intrinsics", "intrinsic", "data") if key in arrays), None)
        if key is None or key == "data" and file.parent.name != "intrinsics":
            return None
        k = np.asarray(arrays[key], dtype=np.float64)
    fx, fy = k.reshape(-1, 9)[0, [0, 4]] if k.shape[-2:] == (3, 3) else k.reshape(-1, 4)[0, :2]
    if not (np.isfinite([fx, fy]).all() and min(fx, fy) > 0):
        raise ValueError(f"{file}: focal lengths {fx:.4g} and {fy:.4g} must be positive")
    return (fx, fy) if fx < 10 else (fx / shape[1], fy / shape[0])


def check_fov(fov):
    """ValueError unless a field of view, in degrees, is one."""
    if not 0 < fov < 180:
        raise ValueError(f"fov: expected degrees between 0 and 180, found {fov:g}")


def source_cameras(video, numbers, shape, name, cameras, fov=None):
    """A clip's cameras -> c2w (T, 4, 4), metres, relative to its first, and normalised intrinsics (4,).
    video: uint8 (T, H, W, 3), scaled and cropped; numbers (T,): its frames as rows of a camera file
    shape: (H, W) of the stored video; fov: its horizontal view in degrees, for files without intrinsics
    cameras: an estimator, videos (1, T, H, W, 3) -> metric c2w (1, T, 4, 4) and intrinsics (1, 4), or a
        file that cameras.read_path reads (an .npz may hold intrinsics too: read_focal), or a folder that
        for a clip a/b.mp4 holds a/b.npz, .npy or .json, or ViPE's pose/b.npz and intrinsics/b.npz
    ValueError with the reason where there are none, too few, or the estimator failed."""
    if callable(cameras):
        c2w, intrinsics = cameras(video[None])
        if not c2w.isfinite().all():
            raise ValueError("the pose estimator failed on it")
        c2w, focal = trajectories.check(c2w[0].double().cpu().numpy(), "estimate"), intrinsics[0, :2].tolist()
    else:
        stem = Path(cameras) / without_suffix(name)
        vipe = Path(cameras) / "pose" / f"{stem.name}.npz"
        files = Path(cameras), Path(f"{stem}.npz"), Path(f"{stem}.npy"), Path(f"{stem}.json"), vipe
        file = next((f for f in files if split_name(f)[0].is_file()), None)
        if file is None:
            raise ValueError(f"no camera file {stem}.npz, .npy or .json, nor {vipe}")
        c2w = read_path(file)
        if len(c2w) <= numbers[-1]:
            raise ValueError(f"{file}: {len(c2w)} cameras, but the clip's last frame is {numbers[-1]}")
        c2w, (h, w), (height, width) = c2w[numbers], shape, video.shape[1:3]
        focal = read_focal(file, shape)
        if focal is None and file.parent.name == "pose":  # ViPE's
            focal = read_focal(file.parent.parent / "intrinsics" / file.name, shape)
        if focal is None and fov is None:
            raise ValueError(f"{file}: no intrinsics; give --fov, the horizontal field of view in degrees")
        fx, fy = focal or (0.5 / math.tan(math.radians(fov) / 2) * np.array([1, w / h]))  # square pixels
        scale = max(height / h, width / w)  # as in resize_to_cover
        focal = fx * w * scale / width, fy * h * scale / height
    return torch.from_numpy(trajectories.relative(c2w)), torch.tensor([*focal, 0.5, 0.5], dtype=torch.float32)


def encode_clip(video, caption, vae, text_encoder, image_encoder):
    """uint8 (T, H, W, 3) and a caption -> bf16 latents (16, F, h, w), CLIP tokens (257, d), text (512, D)."""
    x = to_float(video)[None]
    parts = vae.encode(x), image_encoder(x[:, :, 0]), text_encoder.embed([caption])
    return [part[0].bfloat16() for part in parts]


def up_to_date(path, caption):
    """Whether a clip was prepared before, with this caption (None: with any)."""
    try:
        with safe_open(path, "pt") as file:  # reads the header, which must fit the file's length
            facts = json.loads((file.metadata() or {})["clip"])
        return caption in (None, facts["caption"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return False


def write_index(out, settings, skipped):
    clips = [f.relative_to(out).as_posix().removesuffix(".safetensors") for f in out.rglob("*.safetensors")]
    clips = sorted((name for name in clips if name != Path(NEGATIVE).stem), key=natural)
    index = {"settings": settings, "clips": clips, "skipped": skipped}
    write_file(out / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
    return index


def prepare(videos, out, weights, captions=None, captioner=None, cameras="mapanything", fov=None,
            estimator_stride=1, frames=81, height=480, width=832, stride=1, negative_prompt=None):
    """Encode every video below a folder into a cache that ClipCache reads; returns its index (on rank 0).
    The arguments are the command's. Under torchrun the clips are shared out over the ranks. A clip that is
    itself at fault is skipped with the reason; ValueError or OSError for what concerns all, or with no clip.
    """
    import encoders  # slow, and only needed here
    from vae import load_vae

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if world > 1:  # only to share out the clips and to collect what was skipped, which may be days later
        connect("gloo", timeout=30 * 24 * 3600)
    videos, out, weights = Path(videos), Path(out), Path(weights)
    names, texts = find_videos(videos), read_captions(captions) if captions else {}
    nothing = None if captions or captioner else ""  # with neither, every caption is empty
    wanted = {name: find_caption(name, texts) or nothing for name in names}
    if cameras != "mapanything" and not split_name(cameras)[0].exists():
        raise FileNotFoundError(f"{cameras}: expected mapanything, a camera file or a folder of them")
    if fov is not None:
        check_fov(fov)
    if min(stride, estimator_stride) < 1:
        raise ValueError(f"stride: expected at least 1, found {min(stride, estimator_stride)}")
    vae = load_vae(weights / VAE_FILE, device, dtype)
    if (min(frames, height, width) < 1 or (frames - 1) % vae.time
            or height % (2 * vae.space) or width % (2 * vae.space)):
        raise ValueError(f"{frames} frames of {height}x{width}: expected {vae.time}k+1 frames, "
                         f"height and width divisible by {2 * vae.space}")
    negative_prompt = encoders.NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    settings = dict(frames=frames, height=height, width=width, stride=stride, fov=fov,
                    cameras=cameras if cameras == "mapanything" else f"files of {Path(cameras).resolve()}",
                    estimator_stride=estimator_stride, negative_prompt=negative_prompt)
    for file in (VAE_FILE, TEXT_FILE, IMAGE_FILE):  # tells one set of weights from another
        settings[f"bytes of {file}"] = (weights / file).stat().st_size
    if index := read_index(out):
        check_settings(out, index["settings"], settings)
    text_encoder = encoders.load_text_encoder(weights / TEXT_FILE, weights / TOKENIZER, device, dtype)
    image_encoder = encoders.load_image_encoder(weights / IMAGE_FILE, device, dtype)
    if cameras == "mapanything":
        import rewards
        cameras = rewards.mapanything(weights / "map-anything", device, estimator_stride).cameras
    box, skipped = [None], {}
    if rank == 0:
        for leftover in out.rglob("*.tmp"):  # of a killed run
            leftover.unlink()
        write_index(out, settings, {})
        box = [[name for name in names if not up_to_date(out / f"{name}.safetensors", wanted[name])]]
        latents = vae.z * (1 + (frames - 1) // vae.time) * (height // vae.space) * (width // vae.space)
        size = 2 * (latents + 257 * 1280 + 512 * 4096) + 128 * frames
        print(f"{len(names)} videos, {len(box[0])} to do{'' if nothing is None else ', without captions'}: "
              f"{frames} frames of {height}x{width}, at most {size / 1e6:.1f} MB each, "
              f"{len(box[0]) * size / 1e9:.2f} GB together, {shutil.disk_usage(out).free / 1e9:.1f} GB free",
              flush=True)
    if world > 1:
        dist.broadcast_object_list(box)
    todo = box[0]
    if rank == 0:
        write_file(out / NEGATIVE, save({"text": text_encoder.embed([negative_prompt])[0].bfloat16().cpu()}))
    for name in tqdm(todo[rank::world], desc="prepare", unit="clip", disable=rank > 0):
        path = videos / name
        try:
            text = wanted[name]
            if text is None and not captioner:
                raise ValueError(f"no caption in {captions}")
            video, fps, numbers = read_frames(path, frames, stride, (height, width))
            stored = read_video(path, frames=1)[0].shape[1:3]
            video = torch.from_numpy(video).to(device)
            c2w, intrinsics = source_cameras(video, numbers, stored, name, cameras, fov)
        except (ValueError, FileNotFoundError) as error:
            skipped[name] = str(error).removeprefix(f"{path}: ")
            tqdm.write(f"skipped {name}: {skipped[name]}")
            continue
        if text is None:
            text = encoders.caption(video[frames // 2], captioner, device, dtype)
        encoded = encode_clip(video, text, vae, text_encoder, image_encoder)
        clip = Clip(name, str(path.resolve()), text, fps, *encoded, c2w, intrinsics)
        save_clip(out / f"{name}.safetensors", clip)
    if world > 1:
        dist.gather_object(skipped, parts := [None] * world if rank == 0 else None)
        skipped = {name: why for part in parts or () for name, why in part.items()}
        dist.destroy_process_group()
    if rank == 0:
        index = write_index(out, settings, skipped)
        print(f"{len(todo) - len(skipped)} clips made, {len(names) - len(todo)} were there, "
              f"{len(skipped)} skipped; {out} holds {len(index['clips'])}")
        kinds = {name: re.sub(r"\d[\d.]*", "N", why) for name, why in skipped.items()}  # whatever the numbers
        for kind, count in Counter(kinds.values()).most_common(10):
            first = next(name for name in kinds if kinds[name] == kind)
            print(f"  {count} like {first}: {skipped[first]}")
        if not index["clips"]:
            raise ValueError(f"{videos}: no usable clip")
        return index


def main():
    parser = argparse.ArgumentParser(
        prog="data.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    command = parser.add_subparsers(dest="command", metavar="prepare").add_parser(
        "prepare", help="encode a folder of videos for training", description=prepare.__doc__.split("\n")[0])
    add = command.add_argument
    add("--videos", required=True, help="folder of video files, or of folders of images")
    add("--out", required=True, help="folder for the clips; an interrupted run goes on there")
    add("--weights", required=True, help="folder of the published Wan2.1-Fun-V1.1-1.3B-Control-Camera files")
    add("--captions", help="csv with columns file_name, text (or videoFile, caption)")
    add("--captioner", help="BLIP-2 by folder or hub id, for clips without a caption (their middle frame)")
    add("--cameras", default="mapanything",
        help="mapanything (default; in the weights' map-anything), a folder with a/b.npz for a/b.mp4, "
             "or one file for all")
    add("--fov", type=float, help="horizontal field of view in degrees, for camera files without intrinsics")
    add("--estimator-stride", type=int, default=1, help="estimate every n-th camera, interpolate the others")
    add("--frames", type=int, default=81, help="4k+1 (default 81)")
    add("--height", type=int, default=480, help="pixels (default 480)")
    add("--width", type=int, default=832, help="pixels (default 832)")
    add("--stride", type=int, default=1, help="take every n-th frame")
    add("--negative-prompt", help="for classifier-free guidance (default: Wan's)")
    for each in (parser, command):
        each.error = lambda message: sys.exit(f"data.py: {message}")  # one line, without the usage
    options = vars(parser.parse_args())
    if options.pop("command") is None:
        print(parser.format_help() + "\n" + command.format_help())
        return
    try:
        prepare(**options)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        sys.exit(f"data.py: another rank ended: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
