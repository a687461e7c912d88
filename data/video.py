"""Videos in and out.

    from data.video import read_video, write_video
    video, fps = read_video("clip.mp4", frames=81, size=(480, 832))  # uint8 (81, 480, 832, 3)
    write_video("copy.mp4", video, fps)

Videos are uint8 (T, H, W, 3) RGB here and wherever a reward or a file sees them. The codec takes
float (B, 3, T, H, W) in [-1, 1] (to_float, to_uint8).
"""
import io
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import av.filter
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from plumbing.files import one_line, write_file

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".m4v", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ONE_FILE = {  # for ffmpeg: whatever a file holds, no playlist of other files or of the network
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,png_pipe,jpeg_pipe,"
                        "webp_pipe,bmp_pipe,tiff_pipe", "protocol_whitelist": "file"}
FOLDER_FPS = 24.0  # a folder of images has no rate; DAVIS, the evaluation's data, runs at 24


# ---- reading ----

def resize_to_cover(frame, size):
    """uint8 (h, w, 3) -> (H, W, 3), size = (H, W): scaled to cover, then centre-cropped (as
    ReDirector does). Bilinear and antialiased, in fixed point: within one grey level of Pillow's,
    and so of torchvision's."""
    h, w = frame.shape[:2]
    height, width = size
    scale = max(height / h, width / w)
    h = round(h * scale)
    w = round(w * scale)
    if (h, w) != frame.shape[:2]:
        x = torch.from_numpy(frame).permute(2, 0, 1)[None]
        x = F.interpolate(x, (h, w), mode="bilinear", antialias=True)
        frame = x[0].permute(1, 2, 0).numpy()
    top = round((h - height) / 2)
    left = round((w - width) / 2)
    return frame[top:top + height, left:left + width]


def natural(path):
    """Sort key under which frame2 comes before frame10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(path))]


# ---- presentation: what a file says beside its pixels ----

# Transfers that are no SDR picture without tone mapping (ITU-T H.273)
TRANSFERS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 16: "PQ (HDR10, SMPTE 2084)",
             17: "SMPTE 428", 18: "HLG (ARIB STD-B67)"}

# EXIF orientation -> display matrix (a, b, c, d): what is stored at (x, y) is shown at (a x + c y,
# b x + d y)
ORIENTATIONS = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
                5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}


def exif_matrix(content):
    """The display matrix of an image file's EXIF orientation (JPEG, PNG, WebP, TIFF), from its
    bytes."""
    found = re.search(rb"(?:Exif\0\0|eXIf|EXIF....|^)(?=II\*\0|MM\0\*)", content, re.S)
    if not found:
        return ORIENTATIONS[1]
    tiff = content[found.end():]
    order = "little" if tiff[:2] == b"II" else "big"
    number = lambda at, size: int.from_bytes(tiff[at:at + size], order)
    first = number(4, 4)  # of the first directory, whose entries are tag, type, count, value
    for at in range(first + 2, first + 2 + 12 * number(first, 2), 12):
        if number(at, 2) == 0x0112:
            return ORIENTATIONS.get(number(at + 8, 2), ORIENTATIONS[1])
    return ORIENTATIONS[1]


def display_matrix(frame):
    """A decoded frame's display matrix (a, b, c, d), as in ORIENTATIONS."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV does not know: only a rotation can be had
        turns = round(frame.rotation / 90) % 4  # anticlockwise
        return [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
    if data is None:
        return ORIENTATIONS[1]
    return tuple(np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]] / 65536)


def turn(image, matrix):
    """uint8 (H, W, 3), turned and mirrored as ffmpeg's autorotate does. ValueError unless by
    quarter turns."""
    a, b, c, d = matrix
    straight = max(abs(a), abs(d))
    crossed = max(abs(b), abs(c))
    if min(straight, crossed) > 0.02 * max(straight, crossed):
        angle = math.degrees(math.atan2(b, a))
        raise ValueError(f"is shown turned by {angle:.0f} degrees; expected quarter turns: write "
                         "it upright, as with ffmpeg -i IN OUT.mp4")
    if crossed > straight:
        image = image.swapaxes(0, 1)
        a = c
        d = b
    return np.ascontiguousarray(image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1])


def rgb(frame, aspect=1, matrix=None):
    """av.VideoFrame -> uint8 (H, W, 3) as it is shown: by its colour tags, its pixels made square,
    turned.

    aspect: width of a pixel over its height, by which the picture is widened; matrix: the display
    matrix, if not the frame's own. ValueError for HDR, which would need tone mapping.
    """
    if frame.color_trc in TRANSFERS:
        raise ValueError(f"its transfer is {TRANSFERS[frame.color_trc]}, expected SDR: tone-map it "
                         "first, as with ffmpeg -i IN -vf zscale=t=linear,tonemap=hable,"
                         "zscale=t=bt709:m=bt709:p=bt709 OUT.mp4")
    width = round(frame.width * aspect)
    image = frame.to_ndarray(format="rgb24", width=width, height=frame.height)
    return turn(image, matrix or display_matrix(frame))


def deinterlaced(frames, stream):
    """Decoded frames, from the first interlaced one on through ffmpeg's bwdif: one frame for
    each."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
            source = graph.add_buffer(template=stream)
            graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from pull(graph)
    if graph is not None:
        graph.push(None)  # the end
        yield from pull(graph)


def pull(graph):
    """What a filter graph has ready."""
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def film_stream(container):
    """The video stream that ffmpeg calls best, if it is no cover or thumbnail; None where all
    are."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [stream for stream in container.streams.video if not stream.disposition & still]
    moving = [stream for stream in films if stream.frames != 1]  # 0: not known
    films = moving or films
    best = container.streams.best("video")
    return best if best in films else max(films, key=lambda s: s.width * s.height, default=None)


# ---- files ----

def open_video(path):
    """A video file or a folder of images -> (fps, iterator over (decoded frame's number, function
    -> picture)). The iterator runs on a constant clock of the file's average rate, starting at its
    first frame: a tick shows the frame whose time rounds to it, or else the one before. At a
    constant rate this is every decoded frame once; at a variable rate frames are held or dropped so
    that motion keeps its speed, as a camera path in metres per frame must. A picture is uint8 (H,
    W, 3), see rgb, made only when its function is called."""
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGES), key=natural)
        if not files:
            raise ValueError(f"{path}: a folder without images ({' '.join(IMAGES)})")
        return FOLDER_FPS, ((n, open_image(f)) for n, f in enumerate(files))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty file (0 bytes)")
    with open(path, "rb") as file:
        if file.read(64).lstrip().startswith((b"ffconcat", b"#EXTM3U", b"<?xml", b"<MPD")):
            raise ValueError(f"{path}: a list of other files, expected a video")
    # "file:", or a colon in the name would be taken for a protocol
    container = av.open(f"file:{path}", options=ONE_FILE)
    stream = film_stream(container)
    if stream is None:
        kinds = ", ".join("a still picture" if stream.type == "video" else stream.type
                          for stream in container.streams) or "nothing"
        container.close()
        raise ValueError(f"{path}: no video stream, only {kinds}")
    stream.thread_type = "AUTO"
    rates = [float(rate or 0) for rate in (stream.average_rate, stream.guessed_rate)]
    # 1000 is a millisecond clock, not a rate
    fps = next((rate for rate in rates if 0 < rate < 1000), None)
    if fps is None:
        container.close()
        raise ValueError(f"{path}: no usable frame rate (the file says {stream.average_rate}); "
                         "is it damaged, or cut short?")

    def ticks():
        last = -1
        first = None
        held = None
        end = 0.0
        with container:
            for n, frame in enumerate(deinterlaced(container.decode(stream), stream)):
                if frame.is_corrupt:
                    raise ValueError(f"{path}: damaged at frame {n}")
                time = frame.time if frame.time is not None else (first or 0.0) + (last + 1) / fps
                first = time if first is None else first
                end = time + float(frame.duration * frame.time_base or 1 / fps)
                tick = round((time - first) * fps)
                for _ in range(last + 1, tick):
                    yield held
                held = n, partial(rgb, frame, stream.sample_aspect_ratio or 1)
                if tick > last:
                    yield held
                last = max(tick, last)
            # a file cut short may simply end; its header still says how long it was (Matroska: a
            # tag h:m:s)
            tag = re.match(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
            duration = 0.0
            if stream.duration:
                duration = float(stream.duration * stream.time_base)
            elif tag:
                duration = sum(float(x) * unit for x, unit in zip(tag.groups(), (3600, 60, 1)))
            if end + 2 / fps < duration:
                raise ValueError(f"{path}: truncated, ends at {end:.2f} s of {duration:.2f} s")

    return fps, ticks()


def open_image(path):
    """An image file -> function that gives its picture. Opened as a stream: % in a name would be
    taken for a pattern. Its pixels count as square: resolutions in image files are for printing."""
    content = path.read_bytes()
    try:
        with av.open(io.BytesIO(content), options=ONE_FILE) as container:
            return partial(rgb, next(container.decode(video=0)), matrix=exif_matrix(content))
    except (av.error.FFmpegError, StopIteration, IndexError) as error:
        raise ValueError(f"{path}: unreadable image ({one_line(error)})") from None


def read_frames(path, frames=None, stride=1, size=None):
    """read_video, and also the number of the decoded frame behind each one, int (T,): the row of
    its camera. Returns (uint8 (T, H, W, 3), fps, numbers); the rest is read_video's."""
    path = Path(path)
    video = []
    numbers = []
    seen = 0
    try:
        fps, ticks = open_video(path)
        for tick, (number, picture) in enumerate(ticks):
            seen = tick + 1
            if tick % stride:
                continue
            image = show(path, number, picture)
            video.append(image if size is None else resize_to_cover(image, size))
            numbers.append(number)
            if video[0].shape != image.shape and size is None:
                raise ValueError(f"{path}: frame {number} is {image.shape}, the first was "
                                 f"{video[0].shape}")
            if len(video) == frames:
                ticks.close()  # nothing after the last frame needed is decoded
                break
    except av.error.FFmpegError as error:
        where = f" after frame {seen}" if seen else ""
        raise ValueError(f"{path}: unreadable or truncated{where} ({one_line(error)})") from None
    if not video or frames is not None and len(video) < frames:
        needed = ((frames or 1) - 1) * stride + 1
        raise ValueError(f"{path}: too short, {seen} frames, {needed} needed "
                         f"({frames or 'any'} at stride {stride})")
    return np.stack(video), fps / stride, np.array(numbers)


def show(path, number, picture):
    """A frame's picture; where it cannot be had, ValueError that names the file."""
    try:
        return picture()
    except ValueError as error:
        raise ValueError(f"{path}: {f'frame {number} ' if number else ''}{error}") from None


def read_video(path, frames=None, stride=1, size=None):
    """Frames 0, stride, 2 stride, ... of a video file (mp4, mov, webm, mkv) or of a folder of
    images.
    path: a file, or a folder whose images are taken in natural order (frame2 before frame10) at 24
        a second
    frames: how many are returned; None: all that there are
    stride: counted on the video's constant clock (see open_video)
    size: (H, W) to scale to cover and centre-crop to, bilinear; None: as shown (see rgb)
    Returns (uint8 (T, H, W, 3) RGB, fps); fps is that of the frames returned: the file's divided by
    stride. Raises FileNotFoundError, or ValueError naming the file if it is empty, unreadable,
    damaged before the last frame needed, too short, HDR, or holds no video."""
    return read_frames(path, frames, stride, size)[:2]


def count_frames(path, expected=None):
    """How many frames a video has; where its header says `expected`, that is believed, else they
    are decoded."""
    path = Path(path)
    if path.is_dir():
        return sum(f.suffix.lower() in IMAGES for f in path.iterdir())
    try:
        with av.open(f"file:{path}", options=ONE_FILE) as container:
            stream = film_stream(container)
            if stream.frames and stream.frames == expected:
                return expected
            stream.thread_type = "AUTO"
            return sum(1 for _ in container.decode(stream))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: its frames cannot be counted ({one_line(error)})") from None


def find_videos(folder):
    """Names below a folder, in natural order, of its videos: video files, and folders that hold
    images."""
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
    """A video's name without a video file's suffix; dots in the name of a folder of images are no
    suffix."""
    return re.sub(rf"({'|'.join(map(re.escape, VIDEOS))})$", "", name, flags=re.I)


def to_float(video):
    """uint8 (T, H, W, 3), array or tensor -> float32 (3, T, H, W) in [-1, 1]."""
    return torch.as_tensor(video).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video):
    """float (..., 3, T, H, W) in [-1, 1] (clamped) -> uint8 (..., T, H, W, 3), on the same
    device."""
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
        raise ValueError(f"{path}: a video is uint8 (T, H, W, 3), this is {video.dtype} "
                         f"{video.shape}")
    odd = video.shape[1] % 2, video.shape[2] % 2
    video = np.pad(video, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # x264's macroblock tree reads memory that it never wrote, and its threads' number shows in
        # the bits
        options = {"crf": "15", "mbtree": "0", "threads": "1"}
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate, options=options)
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
