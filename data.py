"""
Video in and out, and the cache of conditioning clips that training reads.

    from data import read_video, write_video
    video, fps = read_video("clip.mp4", frames=81, size=(480, 832))  # uint8 (81, 480, 832, 3)
    write_video("copy.mp4", video, fps)

Videos are uint8 (T, H, W, 3) RGB here and wherever a reward or a file sees them; the codec takes float
(B, 3, T, H, W) in [-1, 1] (to_float, to_uint8).
"""
import base64
import io
import os
import re
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".m4v", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FOLDER_FPS = 24.0  # a folder of images has no rate of its own; DAVIS, the evaluation's data, runs at 24


# ------------------------------------------------------------------------------
# Reading


def resize_to_cover(frame, size):
    """uint8 (h, w, 3) -> (H, W, 3), size = (H, W): scaled to cover, then centre-cropped (as ReDirector does).

    Bilinear and antialiased, in fixed point: within one grey level of Pillow's, and so of torchvision's.
    """
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
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def open_video(path):
    """A video file or a folder of images -> (fps, iterator over (decoded frame's number, av.VideoFrame)).

    The iterator runs on a constant clock of the file's average rate, starting at its first frame: a tick
    shows the frame whose time rounds to it, or else the one before. At a constant rate this is every decoded
    frame once; at a variable rate frames are held or dropped so that motion keeps its speed, as a camera path
    in metres per frame must.
    """
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

    Returns (uint8 (T, H, W, 3), fps, numbers); the rest is read_video's.
    """
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
    last frame needed, too short, or holds no video.
    """
    return read_frames(path, frames, stride, size, start)[:2]


def to_float(video):
    """uint8 (T, H, W, 3), array or tensor -> float32 (3, T, H, W) in [-1, 1]."""
    return torch.as_tensor(video).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video):
    """float (..., 3, T, H, W) in [-1, 1] (clamped) -> uint8 (..., T, H, W, 3), on the same device."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-4, -1)


# ------------------------------------------------------------------------------
# Writing


def write_file(path, content):
    """Write bytes so that `path` is either what it was or complete, whatever happens in between.

    A killed process leaves at most a .tmp file, which nothing reads; a full disk raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror}, {len(content)} bytes", str(path)) from None
        raise


def write_video(path, video, fps):
    """uint8 (T, H, W, 3) -> H.264 mp4 (yuv420p, BT.709); an odd size gets its last row or column twice."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
        raise ValueError(f"{path}: a video is uint8 (T, H, W, 3), this is {video.dtype} {video.shape}")
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options={"crf": "16"})
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


# ------------------------------------------------------------------------------
# Pictures for people: captions, grids, camera paths

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
    """(T, H, W, 3) -> (T, factor H, factor W, 3), each pixel a square: for the toy's tiny videos."""
    return np.asarray(video).repeat(factor, 1).repeat(factor, 2)


def grid(videos, labels, scale=1):
    """Videos side by side, each under its caption.

    videos: list of uint8 (T_i, H, W, 3); a shorter one holds its last frame
    labels: as many strings, broken into lines where they are too long
    scale: whole number that the pixels are enlarged by first
    Returns uint8 (max T_i, strip + H, sum of widths and 4-pixel gaps, 3).
    """
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
            mask = text_mask(text, size)
            top = size * (10 * row + 2)
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
    Returns a new uint8 (T, H, W, 3).
    """
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
    scale = max(1, side // 80)
    extent_mask = text_mask(f"{extent:.2g} m", scale)[:, :side - 2]
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
            corner[-len(extent_mask) - 1:-1, 2:2 + extent_mask.shape[1]][extent_mask] = 200
    return video
