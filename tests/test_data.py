"""data.py: frames in and out, damaged files, pictures, and the cache of prepared clips."""
import ctypes
import os
import resource
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT

from pretrained import encoders
import model
import tiny_weights
import trajectories
from pretrained import vae
from data.cameras import source_cameras
from data.clips import ClipCache, INDEX, NEGATIVE, load_clip, read_index
from data.draw import draw_paths, grid, text_mask, upscale
from data.prepare import find_caption, main, prepare, read_captions
from data.video import (
    FOLDER_FPS, open_video, read_frames, read_video, resize_to_cover, rgb, to_float,
    to_uint8, write_video)
from data.world import open_policy
from plumbing.files import write_file
from pretrained.weights import IMAGE_FILE, TEXT_FILE, VAE_FILE

SOLID = [(200, 30, 40), (20, 180, 60), (40, 60, 220), (230, 220, 30)]


def clip(frames=20, height=48, width=64):
    """A grey ramp in time with a white square in the top left corner: every frame is recognisable."""
    grey = 10 * np.arange(1, frames + 1, dtype=np.uint8)
    video = np.tile(grey[:, None, None, None], (1, height, width, 3))
    video[:, :height // 4, :width // 4] = 255
    return video


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
    video, fps = read_video(tmp_path / f"a.{suffix}", frames=5, stride=3, start=4)
    assert brightness(video) == [4, 7, 10, 13, 16] and abs(fps - 10) < 1e-6


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


@pytest.mark.parametrize("degrees, corner", [(90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_rotation_metadata(tmp_path, degrees, corner):
    write_video(tmp_path / "a.mp4", clip(3), 24)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.find(b"tkhd") + 44  # the track's display matrix (version 0 header), 16.16 fixed point
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]  # clockwise
    a, b, c, d = (65536 * x for x in matrix)
    content[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "r.mp4").write_bytes(content)
    video, _ = read_video(tmp_path / "r.mp4")
    assert video.shape == ((3, 48, 64, 3) if degrees == 180 else (3, 64, 48, 3))
    bright = [(y, x) for y in (0, -1) for x in (0, -1) if video[0, y, x].min() > 200]
    assert bright == [corner]  # the white corner, from the top left, turned clockwise


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
    write_video(folder / "short.mp4", noise[:8], 24)
    audio_only(folder / "sound.mp4")
    for name in ("whole.mp4", "index_first.mp4", "whole.mkv"):
        (folder / name).unlink()
    return {"truncated.mp4": "unreadable or truncated", "cut.mp4": "truncated", "cut.mkv": "truncated",
            "empty.mp4": "empty file", "text.mp4": "unreadable", "sound.mp4": "no video stream, only audio",
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
    monkeypatch.setattr(data, "rgb", lambda frame, rgb=rgb: shown.append(frame.time) or rgb(frame))
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


# --- pictures


def test_glyphs_differ():
    glyphs = {text_mask(chr(c)).tobytes() for c in range(32, 127)}
    assert len(glyphs) == 95 and not text_mask(" ").any()
    assert (text_mask("é") == text_mask("?")).all()
    assert text_mask("ab", 2).shape == (16, 24)


def test_grid():
    a, b = clip(5), clip(3)
    out = grid([a, b], ["left", "a caption that is much too long for one line"], scale=2)
    strip = out.shape[1] - 96
    assert out.shape == (5, strip + 96, 2 * 128 + 4, 3) and strip >= 20
    assert (out[:, strip:, :128] == upscale(a, 2)).all()
    right = out[:, strip:, 132:]
    assert (right[:3] == upscale(b, 2)).all() and (right[3:] == right[2]).all()
    assert (out[:, :strip].max() == 235) and (out[0, :strip] == out[4, :strip]).all()
    with pytest.raises(ValueError, match="2 videos, 1 labels"):
        grid([a, b], ["left"])


def test_paths_are_drawn_where_the_cameras_are():
    c2w = np.tile(np.eye(4), (9, 1, 1))
    c2w[:, 0, 3] = np.linspace(0, 1, 9)  # one metre to the right
    video = np.zeros((9, 150, 200, 3), np.uint8)
    out = draw_paths(video, [c2w])
    assert out.shape == video.shape and not video.any()
    assert not out[:, :100].any() and not out[:, :, :150].any()  # only the lower right third is drawn on
    rows = out[:, -25:-15, -50:].sum((1, 3)).astype(float) ** 4  # (9, 50)
    x = [np.average(np.arange(50), weights=row) for row in rows]
    assert (np.diff(x) > 1).all()  # moves to the right
    up = draw_paths(video, [np.tile(np.eye(4), (9, 1, 1))])[0, -50:, -50:].astype(int).sum(-1)
    assert up[:24, 24:26].sum() > 2 * up[27:40, 24:26].sum()  # looks forward: upwards


# --- prepared clips: the whole of `prepare` on tiny random weights in the official layout

SETTINGS = dict(frames=9, height=32, width=48)
PREPARE = [sys.executable, str(ROOT / "data.py"), "prepare", "--frames=9", "--height=32", "--width=48"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four videos below one folder, captions and cameras (with intrinsics in pixels) for each."""
    folder = tmp_path_factory.mktemp("source")
    names = ["a", "b", "street/a", "street/night 1"]
    for i, name in enumerate(names):
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cameras" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / "videos" / f"{name}.mp4", np.roll(clip(12), i, 0), 24)
        np.savez(folder / "cameras" / f"{name}.npz", c2w=path_of(12, i), intrinsics=[50.0, 60.0, 32.0, 24.0])
    rows = [f"{name}.mp4,a caption for clip {i}" for i, name in enumerate(names)]
    (folder / "captions.csv").write_text("\n".join(["file_name,text", *rows]))
    return folder


def path_of(frames, i):
    return trajectories.resample(trajectories.recammaster(i + 7, 81), frames)


def prepare(source, weights, out, **options):
    return prepare(source / "videos", out, weights, source / "captions.csv",
                        cameras=str(source / "cameras"), **SETTINGS | options)


def arguments(source, weights, out):
    return ["--videos", str(source / "videos"), "--captions", str(source / "captions.csv"), "--out", str(out),
            "--weights", str(weights), "--cameras", str(source / "cameras")]


@pytest.fixture(scope="module")
def cache(source, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "new"
    prepare(source, weights, out)
    return out


def clips(folder):
    """Bytes of each clip of a cache."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.safetensors")}


def test_clips_hold_what_the_models_say(source, weights, cache):
    clips = ClipCache(cache, **SETTINGS)
    assert clips.names == ["a.mp4", "b.mp4", "street/a.mp4", "street/night 1.mp4"] and len(clips) == 4
    one = clips[3]
    assert one.name == "street/night 1.mp4" and one.caption == "a caption for clip 3" and one.fps == 24
    video, _ = read_video(one.video, 9, 1, (32, 48))
    x = to_float(video)[None]
    codec = vae.load_vae(weights / VAE_FILE)
    text = encoders.load_text_encoder(weights / TEXT_FILE)
    image = encoders.load_image_encoder(weights / IMAGE_FILE)
    assert torch.equal(one.latents, codec.encode(x)[0].bfloat16()) and one.latents.shape == (16, 3, 4, 6)
    assert torch.equal(one.text, text.embed([one.caption])[0].bfloat16()) and one.text.shape[0] == 512
    assert torch.equal(one.image, image(x[:, :, 0])[0].bfloat16()) and one.image.shape[0] == 257
    assert torch.equal(clips.negative, text.embed([encoders.NEGATIVE_PROMPT])[0].bfloat16())
    assert one.c2w.dtype == torch.float64
    assert np.allclose(one.c2w, trajectories.relative(path_of(12, 3)[:9]), atol=1e-12)
    # 64x48 to 48x36 to 48x32: the width is kept, of the height 32 of 36 rows
    assert torch.allclose(one.intrinsics, torch.tensor([50 / 64, 60 / 48 * 36 / 32, 0.5, 0.5]))
    assert (cache / "a.mp4.safetensors").stat().st_size < 150_000  # the text's zeros are not stored


def test_the_policy_takes_a_clip(weights, cache):
    clip = ClipCache(cache)[0]
    dit = model.load_dit(weights / tiny_weights.DIT, weights / tiny_weights.REDIRECTOR)
    maps = trajectories.camera_maps(clip.c2w[None], clip.intrinsics[None], 32, 48)
    condition = model.Condition(*(x[None].float() for x in (clip.text, clip.image, clip.latents)), maps, maps)
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    v = dit(noise, torch.tensor(0.5), condition)
    assert v.shape == (1, 16, 3, 4, 6) and v.isfinite().all() and 0.05 < v.std() < 20


def test_what_was_trained_is_opened_as_it_was_trained(weights):
    """In float32 beside bfloat16, which would round a small change of a norm's gain, about 1, away."""
    dit = open_policy(weights, None, torch.device("meta"))  # no CPU, so as on a GPU
    assert {p.dtype for name, p in dit.named_parameters() if ".self_attn." in name} == {torch.float32}
    assert {p.dtype for name, p in dit.named_parameters() if ".self_attn." not in name} == {torch.bfloat16}


def test_an_estimator_gives_the_cameras():
    video, world = torch.zeros(9, 32, 48, 3, dtype=torch.uint8), torch.from_numpy(path_of(9, 3))[None]
    estimator = lambda videos: (world, torch.tensor([[0.7, 0.8, 0.4, 0.4]]))
    c2w, intrinsics = source_cameras(video, None, (48, 64), "a", estimator)
    assert np.allclose(c2w, trajectories.relative(world[0]))
    assert intrinsics.tolist() == pytest.approx([0.7, 0.8, 0.5, 0.5])
    with pytest.raises(ValueError, match="failed"):
        source_cameras(video, None, (48, 64), "a", lambda videos: (world * float("nan"), None))


def test_cameras_follow_the_frames_taken(tmp_path):
    np.savez(tmp_path / "a.npz", c2w=path_of(20, 2))
    video, numbers = torch.zeros(9, 32, 48, 3, dtype=torch.uint8), np.arange(3, 20, 2)
    # a 90 degree view of 64x48 has a focal length of half its width: 32 pixels, or 24 at 48x36
    c2w, intrinsics = source_cameras(video, numbers, (48, 64), "a.mp4", tmp_path, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(20, 2)[3::2]))
    assert intrinsics.tolist() == pytest.approx([24 / 48, 24 / 32, 0.5, 0.5])
    with pytest.raises(ValueError, match="--fov"):
        source_cameras(video, numbers, (48, 64), "a.mp4", tmp_path)
    with pytest.raises(ValueError, match="a.npz: 20 cameras, but the clip's last frame is 20"):
        source_cameras(video, numbers + 1, (48, 64), "a.mp4", tmp_path, fov=60)
    for folder, array in (("pose", path_of(9, 1)), ("intrinsics", np.tile([32.0, 32, 32, 24], (9, 1)))):
        (tmp_path / folder).mkdir()  # as ViPE writes them
        np.savez(tmp_path / folder / "v.npz", data=array, inds=np.arange(9))
    c2w, intrinsics = source_cameras(video, np.arange(9), (48, 64), "clips/v.mp4", tmp_path)
    assert np.allclose(c2w, trajectories.relative(path_of(9, 1)))
    assert intrinsics.tolist() == pytest.approx([0.5, 0.75, 0.5, 0.5])
    c2w, intrinsics = source_cameras(video, np.arange(9), (48, 64), "any.mp4", tmp_path / "pose/v.npz")
    assert np.allclose(c2w, trajectories.relative(path_of(9, 1))) and intrinsics[0] == 0.5
    np.save(tmp_path / "a.npy", path_of(9, 3))  # a file is taken as it is named, whatever lies beside it
    c2w, _ = source_cameras(video, np.arange(9), (48, 64), "b.mp4", tmp_path / "a.npy", fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(9, 3)))
    for name, seed in (("walk_0.5", 0), ("walk_0.6", 1)):  # folders of images: .5 is no suffix
        np.save(tmp_path / f"{name}.npy", path_of(9, seed))
    c2w, _ = source_cameras(video, np.arange(9), (48, 64), "walk_0.6", tmp_path, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(9, 1)))


def test_bad_clips_are_skipped_with_the_reason(source, weights, tmp_path):
    shutil.copytree(source, tmp_path / "s")
    videos = tmp_path / "s/videos"
    reasons = bad_videos(videos)
    for name in reasons:
        shutil.copy(source / "cameras/a.npz", (tmp_path / "s/cameras" / name).with_suffix(".npz"))
    rows = ["file_name,text", *(f"{name},text" for name in (*reasons, "a.mp4", "b.mp4", "street/a.mp4"))]
    (tmp_path / "s/captions.csv").write_text("\n".join(rows))
    np.save(tmp_path / "s/cameras/b.npy", path_of(5, 1))
    (tmp_path / "s/cameras/b.npz").unlink()
    (tmp_path / "s/cameras/street/a.npz").unlink()
    reasons |= {"street/night 1.mp4": "no caption", "b.mp4": "b.npy: 5 cameras",
                "street/a.mp4": "no camera file", "short.mp4": "too short, 8 frames, 9 needed"}
    del reasons["cut.mp4"], reasons["cut.mkv"]  # their first 9 frames are whole
    index = prepare(tmp_path / "s", weights, tmp_path / "out")
    assert set(index["skipped"]) >= set(reasons)
    for name, reason in reasons.items():
        assert reason in index["skipped"][name] and "\n" not in index["skipped"][name]
    assert "a.mp4" in index["clips"] and not set(index["clips"]) & set(reasons)
    assert read_index(tmp_path / "out") == index


def test_other_settings_are_refused(source, weights, cache):
    before = clips(cache)
    with pytest.raises(ValueError, match="width = 48, wanted 64"):
        prepare(source, weights, cache, width=64)
    with pytest.raises(ValueError, match="cameras = files of .*/cameras, wanted files of .*/a.npz"):
        prepare(source / "videos", cache, weights, cameras=str(source / "cameras/a.npz"), **SETTINGS)
    with pytest.raises(ValueError, match="frames = 9, wanted 81"):
        ClipCache(cache, frames=81)
    with pytest.raises(ValueError, match="4k.1 frames"):
        prepare(source, weights, cache, frames=10)
    with pytest.raises(FileNotFoundError, match="nowhere: expected mapanything, a camera file or a folder"):
        prepare(source / "videos", cache, weights, cameras="nowhere", **SETTINGS)
    with pytest.raises(FileNotFoundError, match="index.json"):
        ClipCache(source)
    assert clips(cache) == before


def test_captions_file(tmp_path):
    file = tmp_path / "metadata.csv"
    file.write_text('\ufeffvideoFile,caption\nx/a.mp4,"one, two"\nb.mp4,\nc.webm, three \n', encoding="utf-8")
    captions = read_captions(file)
    assert captions == {"x/a": "one, two", "c": "three"}
    assert find_caption("x/a.mov", captions) == "one, two"
    assert find_caption("b.mp4", captions) is None
    assert find_caption("deep/down/c.webm", captions) == "three"
    assert find_caption("v0.6", {"v0.6": "six", "v0": "none"}) == "six"  # a folder of images
    for text, message in (("", "has none"), ("video,words\na,b\n", "has video, words"),
                          ("file_name,text\n", "no row"),
                          ("file_name,text\na.mp4,x\na.mp4,y\n", "line 3: another caption for a.mp4")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_captions(file)


def test_changed_captions_are_encoded_again(source, weights, cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "out")
    before, captions = clips(out), (source / "captions.csv").read_text()
    for name in ("videos", "cameras"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "captions.csv").write_text(captions.replace("for clip 1", "of another kind"))
    prepare(tmp_path, weights, out)
    after = clips(out)
    assert [name for name in after if after[name] != before[name]] == ["b.mp4.safetensors"]


def test_captioner_sees_the_middle_frame(source, weights, tmp_path, monkeypatch):
    seen = lambda frame, *_: f"brightness {frame[-8:, -8:].float().mean() / 10 - 1:.0f}"
    monkeypatch.setattr(encoders, "caption", seen)
    options = dict(captioner="blip2", cameras=str(source / "cameras"), **SETTINGS)
    prepare(source / "videos", tmp_path / "out", weights, source / "captions.csv", **options)
    assert ClipCache(tmp_path / "out")[0].caption == "a caption for clip 0"  # its row
    prepare(source / "videos", tmp_path / "no_file", weights, **options)
    assert ClipCache(tmp_path / "no_file")[0].caption == "brightness 4"  # of 0 to 8


def test_damaged_clip(cache, tmp_path):
    content = (cache / "a.mp4.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match="cut.safetensors: truncated"):
        load_clip(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="no prepared clip, lacks name"):
        load_clip(cache / NEGATIVE)


def test_killed_and_resumed(source, weights, cache, tmp_path):
    # killed at the very worst moment, the second clip's bytes written but not yet in place
    program = f"""
import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import data
fsync, calls = os.fsync, []
def kill(file):
    name = os.readlink(f"/proc/self/fd/{{file}}")
    if "b.mp4" in name: os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = kill
sys.argv = {["data.py", *PREPARE[2:], *arguments(source, weights, tmp_path / "out")]!r}
data.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    out = tmp_path / "out"
    assert {f.suffix for f in out.iterdir()} == {".json", ".safetensors", ".tmp"}
    with pytest.raises(ValueError, match="not finished"):
        ClipCache(out)
    first = (out / "a.mp4.safetensors").stat()
    index = prepare(source, weights, out)
    assert len(index["clips"]) == 4 and clips(out) == clips(cache) and not list(out.rglob("*.tmp"))
    assert (out / "a.mp4.safetensors").stat().st_mtime_ns == first.st_mtime_ns  # not made again


def test_full_disk_stops_with_one_line(source, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", *PREPARE[2:], *arguments(source, weights, tmp_path / "out")])
    with full_disk(40_000), pytest.raises(SystemExit, match="data.py: .*too large.*a.mp4.safe") as stop:
        main()  # index and negative prompt fit, no clip does
    assert "\n" not in stop.value.code
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [INDEX, NEGATIVE]


def test_two_ranks_make_what_one_makes(source, weights, cache, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               *PREPARE[1:], *arguments(source, weights, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert clips(tmp_path / "out") == clips(cache)
    assert read_index(tmp_path / "out") == read_index(cache)
    assert done.stdout.count("4 clips made, 0 were there, 0 skipped") == 1
