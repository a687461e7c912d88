"""Videos in and out.

    from data.video import read_video, write_video
    video, fps = read_video("clip.mp4", frames=81, size=(480, 832))  # uint8 (81, 480, 832, 3)
    write_video("copy.mp4", video, fps)

Videos are uint8 (T, H, W, 3) RGB here and wherever a reward or a file sees them. The codec takes float
(B, 3, T, H, W) in [-1, 1] (to_float, to_uint8).
"""
import io
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace

from plumbing.files import one_line, write_file

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".m4v", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
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


def to_float(video):
    """uint8 (T, H, W, 3), array or tensor -> float32 (3, T, H, W) in [-1, 1]."""
    return torch.as_tensor(video).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video):
    """float (..., 3, T, H, W) in [-1, 1] (clamped) -> uint8 (..., T, H, W, 3), on the same device."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-4, -1)


@torch.no_grad()
def decode(codec, latents, rows=0):
    """Latents (B, 16, F, h, w) -> uint8 videos (B, T, H, W, 3), `rows` at a time (0: all)."""
    return torch.cat([to_uint8(codec.decode(x)) for x in latents.split(rows or len(latents))])


# ---- writing ----

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
