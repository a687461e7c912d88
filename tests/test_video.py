"""Videos in and out: containers, clocks, presentation beside the pixels, damaged files."""
import os
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from scenes import clip

from data.video import (FOLDER_FPS, count_frames, read_frames, read_video,
                        resize_to_cover, to_float, to_uint8, write_video)

NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)


def brightness(video):
    """Which frame of clip() each frame is."""
    return np.rint(video[:, -8:, -8:].mean((1, 2, 3)) / 10 - 1).astype(int).tolist()


def encode(path, video, codec="libx264", times=None, muxer={}, pixels="yuv420p", rate=24, tags={}):
    """A file of one video stream -> its path. times: in ticks of the rate; tags: of its context."""
    with av.open(str(path), "w", **muxer) as container:
        stream = container.add_stream(codec, rate=rate, options={"qp": "10"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for time, frame in zip(times or range(len(video)), video):
            frame = av.VideoFrame.from_ndarray(frame, "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def image(folder, name, frame):
    """An image file -> its bytes. A % in a folder's name would be a pattern to ffmpeg's writer."""
    codec, pixels = ("png", "rgb24") if name.endswith("png") else ("mjpeg", "yuvj420p")
    muxer = {"format": "image2", "options": {"update": "1"}}
    os.rename(encode(folder / "tmp", frame[None], codec, muxer=muxer, pixels=pixels), folder / name)
    return (folder / name).read_bytes()


# ---- frames, clocks and colours ----

@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_containers(tmp_path, suffix, codec):
    file = encode(tmp_path / f"a.{suffix}", clip(), codec, rate=30)
    video, fps = read_video(file)
    assert brightness(video) == [*range(20)] and abs(fps - 30) < 1e-6
    video, fps = read_video(file, frames=5, stride=3)
    assert brightness(video) == [0, 3, 6, 9, 12] and abs(fps - 10) < 1e-6


def test_variable_rate_keeps_speed(tmp_path):
    """10 frames 33 ms apart, then 10 of 100 ms: the second half must last 3 times as long."""
    times = [33 * k for k in range(10)] + [297 + 100 * k for k in range(1, 11)]
    video, fps, numbers = read_frames(encode(tmp_path / "a.mkv", clip(), times=times, rate=1000))
    seen = np.array(brightness(video))
    assert (seen == numbers).all()  # what is said to be shown is shown
    late = np.abs(np.array(times)[seen] / 1000 - np.arange(len(seen)) / fps)
    assert late.max() < 0.1 + 0.5 / fps and abs(len(seen) / fps - 1.33) < 2 / fps


def test_round_trip_keeps_colours_and_rate(tmp_path):
    colours = np.array([(200, 30, 40), (20, 180, 60), (40, 60, 220), (230, 220, 30)], np.uint8)
    video = np.tile(colours.repeat(12, 0)[None, None, :47], (9, 33, 1, 1))  # odd: padded
    write_video(tmp_path / "a.mp4", video, 23.976)
    back, fps = read_video(tmp_path / "a.mp4")
    assert abs(fps - 24000 / 1001) < 1e-3 and back.shape == (9, 34, 48, 3)
    assert np.abs(back[:, 16, 6::12].astype(int) - video[:, 16, 6::12]).max() <= 4
    assert np.abs(back[:, :33, :47].astype(int) - video).mean() < 3


def test_resize_covers_and_crops_the_centre():
    ramp = np.tile(np.linspace(0, 255, 128).round().astype(np.uint8)[:, None], (40, 1, 3))
    out = resize_to_cover(ramp, (20, 20))  # scaled by 1/2 to (20, 64), then columns 22..41
    expected = np.linspace(0, 255, 128).reshape(64, 2).mean(1)[22:42]
    assert out.shape == (20, 20, 3) and np.abs(out[10, :, 0] - expected).max() <= 1.5
    assert resize_to_cover(ramp, (80, 60)).shape == (80, 60, 3)
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(resize_to_cover(checks, (16, 16)).astype(int) - 127).max() <= 2  # antialiased


def test_float_and_back():
    video = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3).repeat(5, 0)
    x = to_float(video)
    assert x.shape == (3, 5, 16, 16) and x.min() == -1 and x.max() == 1
    assert (to_uint8(x).numpy() == video).all()
    assert (to_uint8(torch.full((2, 3, 5, 4, 6), 7.0)) == torch.full((2, 5, 4, 6, 3), 255)).all()


# ---- presentation beside the pixels ----

SHOWN = {(1, 0, 0, 1): "RGBx", (-1, 0, 0, 1): "GRxB", (-1, 0, 0, -1): "xBGR", (1, 0, 0, -1): "BxRG",
         (0, 1, 1, 0): "RBGx", (0, 1, -1, 0): "BRxG", (0, -1, -1, 0): "xGBR", (0, -1, 1, 0): "GxRB"}
# display matrix, in EXIF's order -> corners, from the top left: red, green, blue, grey as stored
PICTURE = np.full((3, 48, 64, 3), 90, np.uint8)
PICTURE[:, :24, :32] = 200, 20, 20
PICTURE[:, :24, 32:] = 20, 200, 20
PICTURE[:, 24:, :32] = 20, 20, 200


def corners(image):
    """"RGBx" for PICTURE, by the colour of each corner."""
    found = [image[y, x].astype(int) for y in (3, -4) for x in (3, -4)]
    return "".join("x" if np.ptp(p) < 50 else "RGB"[p.argmax()] for p in found)


def with_matrix(path, matrix):
    """Write a display matrix into an mp4 file's track header, in 16.16 fixed point."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 44
    a, b, c, d = (round(65536 * x) for x in matrix)
    content[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("matrix", SHOWN)
def test_display_matrices_and_pixels_that_are_not_square(tmp_path, matrix):
    """Widened as stored, then turned."""
    tags = {"sample_aspect_ratio": Fraction(5, 4)}
    video, _ = read_video(with_matrix(encode(tmp_path / "a.mp4", PICTURE, tags=tags), matrix))
    assert video.shape == ((3, 48, 80, 3) if matrix[0] else (3, 80, 48, 3))
    assert corners(video[0]) == SHOWN[matrix]


@pytest.mark.parametrize("kind, order", [("jpg", ">"), ("png", "<")])
def test_image_orientations(tmp_path, kind, order):
    plain = image(tmp_path, f"plain.{kind}", PICTURE[0])
    for orientation, shown in enumerate(SHOWN.values(), 1):
        entries = (42, 8, 2, 0x010F, 3, 1, 0, 0, 0x0112, 3, 1, orientation, 0, 0)
        tiff = {">": b"MM", "<": b"II"}[order] + struct.pack(f"{order}HIHHHIHHHHIHHI", *entries)
        chunk = b"eXIf" + tiff
        exif, at = struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk)), 33
        if kind == "jpg":
            exif, at = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff, 2
        (tmp_path / str(orientation)).mkdir()
        (tmp_path / str(orientation) / f"a.{kind}").write_bytes(plain[:at] + exif + plain[at:])
        assert corners(read_video(tmp_path / str(orientation))[0][0]) == shown


def test_image_folder(tmp_path):
    folder = tmp_path / "100%d frames"
    folder.mkdir()
    for k in range(12):  # frame2 must come before frame10
        image(folder, f"frame{k}.png", clip(12)[k])
    video, fps = read_video(folder)
    assert (video == clip(12)).all() and fps == FOLDER_FPS
    (folder / "frame3.png").write_bytes(b"no image")
    assert len(read_video(folder, frames=3)[0]) == 3  # what is not needed is not read
    with pytest.raises(ValueError, match="frame3.png: unreadable"):
        read_video(folder)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "out.mp4", np.zeros((3, 8, 8, 3)), 24)


# ---- bad input: one line naming the file ----

def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])


def cut(path, share, **more):
    """A file of which the end is missing."""
    content = encode(path, NOISE, **more).read_bytes()
    path.write_bytes(content[:int(share * len(content))])


Y4M = b"YUV4MPEG2 W16 H16 F24:1 C420jpeg\n" + (b"FRAME\n" + bytes(384)) * 40
FASTSTART = {"options": {"movflags": "faststart"}}  # the index comes first
BAD = [  # name, how it is made, what is said, frames that can be read nevertheless
    ("a.mp4", lambda f: f.write_bytes(b""), "empty file", 0),
    ("a.mp4", lambda f: f.write_bytes(Y4M), "unreadable", 0),  # of a format that is not let in
    ("a.mp4", lambda f: cut(f, 0.99), "unreadable or truncated", 0),  # the index, at its end
    ("a.mp4", lambda f: cut(f, 0.6, muxer=FASTSTART), "truncated", 3),
    ("a.mkv", lambda f: cut(f, 0.5), "truncated", 3),
    ("a.mp4", lambda f: f.write_text("#EXTM3U\n#EXTINF:1,\ns.mp4\n"), "a list of other files", 0),
    ("a.mp4", audio_only, "no video stream, only audio", 0),
    ("a.mp4", lambda f: encode(f, NOISE[:8]), "too short, 8 frames, 33 needed", 8),
    ("a.mp4", lambda f: f, "no such video", 0),
    ("a.mp4", lambda f: with_matrix(encode(f, PICTURE), (0.866, 0.5, -0.5, 0.866)),
     "is shown turned by 30 degrees; expected quarter turns", 0),
    ("a.mp4", lambda f: encode(f, PICTURE, tags={"color_trc": 16}), "its transfer is PQ", 0),
    ("a", lambda f: f.mkdir(), "a folder without images", 0)]


@pytest.mark.parametrize("name, make, reason, whole", BAD, ids=[reason for *_, reason, _ in BAD])
def test_bad_videos(tmp_path, name, make, reason, whole):
    make(tmp_path / name)
    for frames in (33, None) if reason == "truncated" else (33,):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read_video(tmp_path / name, frames)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(error.value) and "\n" not in str(error.value)
    if reason == "unreadable":
        with pytest.raises(ValueError, match="a.mp4: its frames cannot be counted"):
            count_frames(tmp_path / name)
    if whole:  # damage beyond what is needed does not matter
        assert len(read_video(tmp_path / name, whole)[0]) == whole
