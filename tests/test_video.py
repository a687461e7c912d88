"""Videos in and out: containers, clocks, presentation beside the pixels, damaged files."""
import ctypes
import os
import resource
import struct
import zlib
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from conftest import ROOT
from scenes import clip

import data.video
from data.video import (
    FOLDER_FPS, open_video, read_frames, read_video, resize_to_cover, rgb, to_float, to_uint8, write_video)
from plumbing.files import write_file

SOLID = [(200, 30, 40), (20, 180, 60), (40, 60, 220), (230, 220, 30)]


def write_at(path, video, times, codec="libx264", rate=1000):
    """Write frames with the given time stamps (whole ticks of 1/rate s)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame, time in zip(video, times):
            frame = av.VideoFrame.from_ndarray(frame, "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def brightness(video):
    """Which frame of clip() each frame is."""
    return np.rint(video[:, -8:, -8:].mean((1, 2, 3)) / 10 - 1).astype(int).tolist()


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mov", "libx264"), ("mkv", "libx264"),
                                           ("webm", "libvpx-vp9")])
def test_containers(tmp_path, suffix, codec):
    write_at(tmp_path / f"a.{suffix}", clip(), range(20), codec, rate=30)
    video, fps = read_video(tmp_path / f"a.{suffix}")
    assert video.shape == (20, 48, 64, 3) and abs(fps - 30) < 1e-6 and brightness(video) == list(range(20))
    video, fps = read_video(tmp_path / f"a.{suffix}", frames=5, stride=3)
    assert brightness(video) == [0, 3, 6, 9, 12] and abs(fps - 10) < 1e-6


def test_round_trip_keeps_colours_and_rate(tmp_path):
    bars = np.array(SOLID, np.uint8)[None, None].repeat(12, 2)  # (1, 1, 48, 3)
    video = np.tile(bars, (9, 32, 1, 1))
    write_video(tmp_path / "a.mp4", video, 23.976)
    back, fps = read_video(tmp_path / "a.mp4")
    assert abs(fps - 24000 / 1001) < 1e-3 and back.shape == video.shape
    centres = np.arange(4) * 12 + 6
    assert np.abs(back[:, 16, centres].astype(int) - video[:, 16, centres]).max() <= 4


def test_odd_sizes_are_padded(tmp_path):
    video = clip(5, 33, 47)
    write_video(tmp_path / "a.mp4", video, 24)
    back, _ = read_video(tmp_path / "a.mp4")
    assert back.shape == (5, 34, 48, 3)
    assert np.abs(back[:, :33, :47].astype(int) - video).mean() < 3


@pytest.mark.parametrize("size", [(24, 40), (33, 47), (50, 70), (100, 150)])
def test_same_frames_give_the_same_bytes(tmp_path, size):
    video = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc's
    written = set()
    for garbage in range(0, 260, 13):  # what new memory holds (M_PERTURB, -6), as another past would leave it
        mallopt(-6, garbage)
        write_video(tmp_path / "a.mp4", video, 24)
        written.add((tmp_path / "a.mp4").read_bytes())
    mallopt(-6, 0)
    assert len(written) == 1


# --- presentation beside the pixels. A picture's corners, from the top left: red, green, blue, grey

CASES = ROOT.parent / "shared/cases"
CORNERS = "RGBx"
SHOWN = {(1, 0, 0, 1): "RGBx", (-1, 0, 0, 1): "GRxB", (-1, 0, 0, -1): "xBGR", (1, 0, 0, -1): "BxRG",  # in the
         (0, 1, 1, 0): "RBGx", (0, 1, -1, 0): "BRxG", (0, -1, -1, 0): "xGBR", (0, -1, 1, 0): "GxRB"}  # EXIF's order


def picture(height=48, width=64):
    """Four coloured corners and a white disc in the middle: uint8 (height, width, 3)."""
    x = np.zeros((height, width, 3), np.uint8) + 90
    x[:height // 2, :width // 2] = 200, 20, 20
    x[:height // 2, width // 2:] = 20, 200, 20
    x[height // 2:, :width // 2] = 20, 20, 200
    y, z = np.indices((height, width))
    x[(y - height / 2 + 0.5) ** 2 + (z - width / 2 + 0.5) ** 2 < 144] = 255
    return x


def corners(image):
    """"RGBx" for picture(), by the colour of each corner."""
    found = [image[y, x].astype(int) for y in (3, -4) for x in (3, -4)]
    return "".join("x" if np.ptp(p) < 50 else "RGB"[p.argmax()] for p in found)


def encode(path, video, change=lambda stream: None, codec="libx264", **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"qp": "10"} | options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        change(stream)
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def with_matrix(path, matrix):
    """Write a display matrix (a, b, c, d) into an mp4 file: into its track's header, 16.16 fixed point."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 44
    a, b, c, d = (round(65536 * x) for x in matrix)
    content[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("matrix", SHOWN)
def test_display_matrices(tmp_path, matrix):
    write_video(tmp_path / "a.mp4", picture()[None].repeat(3, 0), 24)
    with_matrix(tmp_path / "a.mp4", matrix)
    video, _ = read_video(tmp_path / "a.mp4")
    assert video.shape == ((3, 48, 64, 3) if matrix[0] else (3, 64, 48, 3))
    assert corners(video[0]) == SHOWN[matrix]


def test_a_turn_by_other_angles_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", picture()[None], 24)
    with_matrix(tmp_path / "a.mp4", (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(ValueError, match="a.mp4: is shown turned by 30 degrees; expected quarter turns"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_image_orientations(tmp_path, kind, order):
    with av.open(str(tmp_path / "plain"), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream({"jpg": "mjpeg", "png": "png"}[kind], rate=1)
        stream.height, stream.width, stream.pix_fmt = 48, 64, {"jpg": "yuvj420p", "png": "rgb24"}[kind]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), "rgb24")))
        container.mux(stream.encode())
    plain = (tmp_path / "plain").read_bytes()
    for orientation, shown in enumerate(SHOWN.values(), 1):
        tiff = {">": b"MM", "<": b"II"}[order] + struct.pack(
            f"{order}HIHHHIHHHHIHHI", 42, 8, 2, 0x010F, 3, 1, 0, 0, 0x0112, 3, 1, orientation, 0, 0)
        if kind == "jpg":
            exif, at = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff, 2
        else:
            chunk = b"eXIf" + tiff
            exif, at = struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk)), 33
        folder = tmp_path / str(orientation)
        folder.mkdir()
        (folder / f"a.{kind}").write_bytes(plain[:at] + exif + plain[at:])
        assert corners(read_video(folder)[0][0]) == shown


@pytest.mark.parametrize("aspect, width", [((5, 4), 80), ((8, 9), 57), ((1, 2), 32), ((2, 1), 128)])
def test_pixels_are_made_square(tmp_path, aspect, width):
    def squeeze(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
    encode(tmp_path / "a.mp4", picture()[None].repeat(2, 0), squeeze)
    video, _ = read_video(tmp_path / "a.mp4")
    assert video.shape == (2, 48, width, 3) and corners(video[0]) == CORNERS
    with_matrix(tmp_path / "a.mp4", (0, 1, -1, 0))  # widened as stored, then turned
    assert read_video(tmp_path / "a.mp4")[0].shape == (2, width, 48, 3)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG"), (8, "linear")])
def test_hdr_is_refused_by_name(tmp_path, transfer, name):
    def tag(stream):
        stream.codec_context.color_trc = transfer
        stream.codec_context.color_primaries = 9
    encode(tmp_path / "a.mp4", picture()[None].repeat(2, 0), tag)
    with pytest.raises(ValueError, match=f"a.mp4: its transfer is {name}.*expected SDR"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_interlaced_frames_are_straightened(tmp_path, first):
    """A bar that moves 4 columns a field; progressive frames at the start pass through as they are."""
    video = np.zeros((8, 48, 160, 3), np.uint8) + 40
    for k in range(8):
        for field in range(2):
            left = 16 + 4 * (2 * k + field)
            video[k, field if first == "tff" else 1 - field::2, left:left + 24] = 220
    encode(tmp_path / "a.mp4", video, **{"x264-params": f"{first}=1"})
    shown, _ = read_video(tmp_path / "a.mp4")
    assert len(shown) == 8
    edges = (shown[..., 1] > 128).argmax(2)  # (8, 48): per row
    assert (np.ptp(edges[1:, 8:-8], 1) <= 1).all()
    assert (np.diff(edges[1:, 24]) == 8).all()  # one field of each frame is kept: the speed is


@pytest.mark.parametrize("order", ["cover first", "cover last"])
@pytest.mark.parametrize("disposition", ["attached_pic", "default"])
def test_the_video_not_its_cover(tmp_path, order, disposition):
    still = np.zeros((96, 128, 3), np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        streams = {}
        for name in ("cover", "video") if order == "cover first" else ("video", "cover"):
            stream = container.add_stream("mjpeg" if name == "cover" else "libx264", rate=24)
            stream.height, stream.width = (96, 128) if name == "cover" else (48, 64)
            stream.pix_fmt = "yuvj420p" if name == "cover" else "yuv420p"
            streams[name] = stream
        streams["cover"].disposition = getattr(Disposition, disposition)
        for name, frames in (("cover", [still]), ("video", clip(9))):
            for frame in frames:
                container.mux(streams[name].encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(streams[name].encode())
    assert brightness(read_video(tmp_path / "a.mp4")[0]) == list(range(9))


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
@pytest.mark.parametrize("name, shape, shown", [
    ("sar/sar.mp4", (24, 360, 640, 3), "RGBx"), ("mirror/hflip.mp4", (24, 360, 640, 3), "GRxB"),
    ("mirror/vflip.mp4", (24, 360, 640, 3), "BxRG"), ("cover/thumbfirst.mp4", (24, 360, 640, 3), "RGBx"),
    ("interlaced/inter.mp4", (12, 360, 640, 3), "RGBx"), ("hdr/hlg2.mp4", None, "HLG")])
def test_cases(name, shape, shown):
    if shape is None:
        with pytest.raises(ValueError, match=shown):
            read_video(CASES / name)
        return
    video, _ = read_video(CASES / name)
    assert video.shape == shape and corners(video[0]) == shown
    if "inter" in name:  # the dark bar's edge, before: 48 and 56 in turn
        assert np.ptp((video[4, 176:184, 20:120, 1] < 60).argmax(1)) == 0
    else:
        disc = (video[0] > 240).all(2)
        assert abs(np.ptp(disc.nonzero()[0]) - np.ptp(disc.nonzero()[1])) <= 2  # round


def test_variable_rate_keeps_speed(tmp_path):
    # 10 frames 33 ms apart, then 10 frames 100 ms apart: the second half must take 3 times as long
    times = [33 * k for k in range(10)] + [297 + 100 * k for k in range(1, 11)]
    write_at(tmp_path / "a.mkv", clip(), times)
    video, fps, numbers = read_frames(tmp_path / "a.mkv")
    seen = np.array(brightness(video))
    assert (seen == numbers).all()  # what is said to be shown is shown
    shown_at = np.array(times)[seen] / 1000
    late = np.abs(shown_at - np.arange(len(seen)) / fps)
    assert late.max() < 0.1 + 0.5 / fps  # by one long frame at most
    assert abs(len(seen) / fps - 1.33) < 2 / fps  # lasts as long


def test_image_folder(tmp_path):
    folder = tmp_path / "100%d frames"
    folder.mkdir()
    for k in range(12):  # frame2 must come before frame10
        image = av.VideoFrame.from_ndarray(clip(12)[k], "rgb24")
        with av.open(str(folder / "tmp.png"), "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
            container.mux(stream.encode(image))
        os.rename(folder / "tmp.png", folder / f"frame{k}.png")
    video, fps = read_video(folder)
    assert (video == clip(12)).all() and fps == FOLDER_FPS
    (folder / "frame3.png").write_bytes(b"no image")
    assert len(read_video(folder, frames=3)[0]) == 3  # what is not needed is not read
    with pytest.raises(ValueError, match="frame3.png: unreadable"):
        read_video(folder)
    with pytest.raises(ValueError, match="without images"):
        (tmp_path / "empty").mkdir()
        read_video(tmp_path / "empty")


def test_resize_covers_and_crops_the_centre():
    ramp = np.linspace(0, 255, 128)[None, :, None].repeat(40, 0).repeat(3, 2).round().astype(np.uint8)
    out = resize_to_cover(ramp, (20, 20))  # scaled by 1/2 to (20, 64), then columns 22..41
    expected = np.linspace(0, 255, 128).reshape(64, 2).mean(1)[22:42]
    assert out.shape == (20, 20, 3) and np.abs(out[10, :, 0] - expected).max() <= 1.5
    assert resize_to_cover(ramp, (80, 60)).shape == (80, 60, 3)
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    small = resize_to_cover(checks, (16, 16)).astype(int)
    assert np.abs(small - 127).max() <= 2  # antialiased: no moire


def test_resize_agrees_with_pillow():
    image = pytest.importorskip("PIL.Image", reason="Pillow, which ReDirector resizes with, is not installed")
    frame = np.random.default_rng(0).integers(0, 256, (90, 161, 3), dtype=np.uint8)
    out = resize_to_cover(frame, (60, 96)).astype(int)
    pillow = np.asarray(image.fromarray(frame).resize((107, 60), image.BILINEAR))[:, 6:102]  # round(5.5) is 6
    assert np.abs(out - pillow).max() <= 1


def test_float_and_back():
    video = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3).repeat(5, 0)
    x = to_float(video)
    assert x.shape == (3, 5, 16, 16) and x.min() == -1 and x.max() == 1
    assert (to_uint8(x).numpy() == video).all()
    assert to_uint8(torch.full((2, 3, 5, 4, 6), 7.0)).shape == (2, 5, 4, 6, 3)


# --- bad input: one line naming the file


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def bad_videos(folder):
    """name -> what is wrong with the file of that name, all written to folder."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    write_video(folder / "whole.mp4", noise, 24)
    content = (folder / "whole.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(content[:-600])  # the index, at the end, is gone
    with av.open(str(folder / "index_first.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    content = (folder / "index_first.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[:int(0.6 * len(content))])  # index there, frames missing
    write_at(folder / "whole.mkv", noise, range(40), rate=24)
    content = (folder / "whole.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(content[:len(content) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile 'short.mp4'\n")
    write_video(folder / "short.mp4", noise[:8], 24)
    audio_only(folder / "sound.mp4")
    for name in ("whole.mp4", "index_first.mp4", "whole.mkv"):
        (folder / name).unlink()
    return {"truncated.mp4": "unreadable or truncated", "cut.mp4": "truncated", "cut.mkv": "truncated",
            "empty.mp4": "empty file", "text.mp4": "unreadable", "list.mp4": "a list of other files", "sound.mp4": "no video stream, only audio",
            "short.mp4": "too short, 8 frames, 33 needed"}


def test_bad_videos(tmp_path):
    for name, reason in bad_videos(tmp_path).items():
        with pytest.raises(ValueError, match=reason) as error:
            read_video(tmp_path / name, frames=33)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    for name in ("cut.mp4", "cut.mkv"):  # also when all frames are asked for ...
        with pytest.raises(ValueError, match="truncated"):
            read_video(tmp_path / name)
        assert len(read_video(tmp_path / name, frames=3)[0]) == 3  # ... not if the damage lies beyond
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        read_video(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "out.mp4", np.zeros((3, 8, 8, 3)), 24)


def test_decoding_stops_early(tmp_path, monkeypatch):
    write_at(tmp_path / "a.mp4", clip().repeat(20, 0), range(400), rate=24)
    shown = []
    monkeypatch.setattr(data.video, "rgb", lambda frame, *args: shown.append(frame.time) or rgb(frame, *args))
    read_video(tmp_path / "a.mp4", frames=4, stride=2)
    assert np.allclose(np.array(shown) * 24, [0, 2, 4, 6])  # frames between are not converted
    fps, ticks = open_video(tmp_path / "a.mp4")
    next(ticks)
    ticks.close()  # closes the file: no decoder is left behind
    assert list(ticks) == []


@contextmanager
def full_disk(room):
    """A limit on the size of a file stands in for the full disk: a write fails part way, as it does there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_failed_write_keeps_the_old_file(tmp_path):
    write_file(tmp_path / "a.bin", b"old")
    with full_disk(100_000), pytest.raises(OSError, match="500000 bytes.*a.bin"):
        write_file(tmp_path / "a.bin", b"x" * 500_000)
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile 'secret.mp4'\n",
                                  "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"])
def test_a_playlist_under_a_videos_name_is_refused(tmp_path, text):
    write_video(tmp_path / "secret.mp4", clip(5), 24)
    (tmp_path / "x.mp4").write_text(text)
    with pytest.raises(ValueError, match="x.mp4: a list of other files"):
        read_video(tmp_path / "x.mp4")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/1.png").write_text(text)
    with pytest.raises(ValueError, match="1.png: unreadable"):
        read_video(tmp_path / "frames")
