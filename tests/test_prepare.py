"""A clip's cameras and captions, and the cache: the whole of `prepare` on tiny random weights."""
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scenes import clip, path_of
from safetensors.torch import save_file
from test_video import bad_videos, full_disk

import data.prepare
import model
import tiny_weights
import trajectories
from data.cameras import read_path, source_cameras
from data.clips import ClipCache, INDEX, NEGATIVE, load_clip, read_index, save_clip
from data.prepare import Prepare, find_caption, prepare, read_captions
from data.video import count_frames, read_frames, read_video, to_float, write_video
from data.world import open_policy
from pretrained import encoders, vae
from pretrained.weights import IMAGE_FILE, TEXT_FILE, VAE_FILE

SETTINGS = dict(frames=9, height=32, width=48)
PREPARE = [sys.executable, "-m", "data.prepare", "--frames=9", "--height=32", "--width=48"]


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


def run(source, weights, out, **options):
    """`prepare` on a folder like `source`'s -> index."""
    paths = dict(videos=source / "videos", captions=source / "captions.csv", cameras=source / "cameras",
                 out=out, weights=weights)
    options = {name: str(x) if isinstance(x, Path) else x for name, x in (paths | SETTINGS | options).items()}
    return prepare(Prepare(**options))


def arguments(source, weights, out):
    return [f"--videos={source}/videos", f"--captions={source}/captions.csv", f"--out={out}",
            f"--weights={weights}", f"--cameras={source}/cameras"]


@pytest.fixture(scope="module")
def cache(source, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "new"
    run(source, weights, out)
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


def cameras_for(folder, name, numbers, count=24, shape=(48, 64), **options):
    """source_cameras for frames of 32 x 48."""
    video = torch.zeros(len(numbers), 32, 48, 3, dtype=torch.uint8)
    return source_cameras(video, numbers, shape, name, folder, count=lambda expected: count, **options)


def test_cameras_follow_the_frames_taken(tmp_path):
    np.savez(tmp_path / "a.npz", c2w=path_of(20, 2))
    # a 90 degree view of 64x48 has a focal length of half its width: 32 pixels, or 24 at 48x36
    c2w, intrinsics = cameras_for(tmp_path, "a.mp4", np.arange(3, 20, 2), 20, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(20, 2)[3::2]))
    assert intrinsics.tolist() == pytest.approx([24 / 48, 24 / 32, 0.5, 0.5])
    with pytest.raises(ValueError, match="--fov"):
        cameras_for(tmp_path, "a.mp4", np.arange(9), 20)
    for frames in (19, 21, 40):  # whichever frames are asked for: the rows may be any of them
        with pytest.raises(ValueError, match=f"a.npz: 20 cameras for a video of {frames} frames; expected one for each"):
            cameras_for(tmp_path, "a.mp4", np.arange(9), frames, fov=60)
    np.savez(tmp_path / "still.npz", c2w=path_of(81, 2)[[4] * 81])
    c2w, _ = cameras_for(tmp_path / "still.npz", "a.mp4", np.arange(9), fov=90)  # fits any length
    assert np.allclose(c2w, np.eye(4))
    np.savez(tmp_path / "a.npz", c2w=path_of(9, 3))  # a file is taken as it is named, whatever lies beside it
    c2w, _ = cameras_for(tmp_path / "a.npz", "b.mp4", np.arange(9), 9, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(9, 3)))
    for name, seed in (("walk_0.5", 0), ("walk_0.6", 1)):  # folders of images: .5 is no suffix
        np.save(tmp_path / f"{name}.npy", path_of(9, seed))
    c2w, _ = cameras_for(f"{tmp_path}@c2w", "walk_0.6", np.arange(9), 9, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(9, 1)))
    c2w, _ = cameras_for(f"{tmp_path}@w2c,opengl", "walk_0.6", np.arange(9), 9, fov=90)
    assert np.allclose(c2w, trajectories.relative(np.linalg.inv(path_of(9, 1)) @ np.diag([1, -1, -1, 1])))


def test_rows_with_frame_numbers(tmp_path):
    """ViPE's inds: row k is frame inds[k], and its intrinsics lie in another folder."""
    path = path_of(41, 2)
    for folder, array in (("pose", path[::2]), ("intrinsics", np.tile([32.0, 32, 32, 24], (21, 1)))):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "v.npz", data=array, inds=np.arange(0, 41, 2))
    for cameras in (tmp_path, tmp_path / "pose/v.npz"):
        c2w, intrinsics = cameras_for(cameras, "clips/v.mp4", np.arange(2, 35, 4), 41)
        assert np.allclose(c2w, trajectories.relative(path[2:35:4]))
        assert intrinsics.tolist() == pytest.approx([0.5, 0.75, 0.5, 0.5])
    with pytest.raises(ValueError, match="cameras for the frames 0 to 40, but the clip's are 33 to 41"):
        cameras_for(tmp_path, "v.mp4", np.arange(33, 42), 60)


@pytest.mark.parametrize("k, expected", [
    ((50.0, 60.0, 32, 24), (50 / 64, 60 / 48)), ((50.0, 60.0, 33, 23.5), (50 / 64, 60 / 48)),  # the video's own
    ((25.0, 30.0, 16, 12), (50 / 64, 60 / 48)), ((500.0, 600.0, 320, 240), (50 / 64, 60 / 48)),  # another size
    ((0.7, 0.9, 0.5, 0.5), (0.7, 0.9)), ((50.0, 60.0, 32, 18), None), ((50.0, 60.0, 64, 48 * 0.8), None)])
def test_intrinsics_of_another_picture_size(tmp_path, k, expected):
    fx, fy, cx, cy = k
    for intrinsics in (k, [k] * 24, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]):
        np.savez(tmp_path / "a.npz", c2w=path_of(24, 2), intrinsics=intrinsics)
        if expected is None:
            with pytest.raises(ValueError, match="a.npz: its intrinsics are of a picture of about .* is 64 x 48"):
                cameras_for(tmp_path, "a.mp4", np.arange(9))
        else:  # 48 x 36, then 48 x 32
            got = cameras_for(tmp_path, "a.mp4", np.arange(9))[1].tolist()
            assert got == pytest.approx([expected[0], expected[1] * 36 / 32, 0.5, 0.5])


CASES = ROOT.parent / "shared/cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
@pytest.mark.parametrize("videos, cameras, name, fov, at, focal", [
    ("vipe_inds/videos", "vipe_inds/cams", "plain.mp4", None, (8, (-0.198, 0, 0.055)), (500 / 640, 500 / 360)),
    ("intrinsics_size/videos", "intrinsics_size/cams", "clip.mp4", None, None, (0.866, 1.540)),
    ("layouts/mc/videos", "layouts/mc/cameras", "cam02.mp4", 60, "#cam02", (0.866, 1.540)),
    ("layouts/mc/videos", "layouts/mc/cameras/camera_extrinsics.json", "cam01.mp4", 60, "#cam01", (0.866, 1.540)),
    ("layouts/mc", "layouts/mc", "videos/cam01.mp4", 60, "#cam01", (0.866, 1.540)),
    ("layouts/ow/videos", "layouts/ow", "clip.mp4", None, None, (0.866, 1.540))])
def test_cases(videos, cameras, name, fov, at, focal):
    video, _, numbers = read_frames(CASES / videos / name, 9)
    count = partial(count_frames, CASES / videos / name)
    c2w, intrinsics = source_cameras(video, numbers, (360, 640), name, CASES / cameras, fov, count)
    assert intrinsics.tolist() == pytest.approx([*focal, 0.5, 0.5], abs=1e-3)
    if isinstance(at, tuple):
        assert c2w[at[0], :3, 3].tolist() == pytest.approx(at[1], abs=1e-3)
    elif at:
        expected = read_path(f"{CASES}/layouts/mc/cameras/camera_extrinsics.json{at}")[:9]
        assert np.allclose(c2w, expected)


def test_bad_clips_are_skipped_with_the_reason(source, weights, tmp_path):
    shutil.copytree(source, tmp_path / "s")
    videos = tmp_path / "s/videos"
    reasons = bad_videos(videos)
    for name in reasons:
        shutil.copy(source / "cameras/a.npz", (tmp_path / "s/cameras" / name).with_suffix(".npz"))
    rows = ["file_name,text", *(f"{name},text" for name in (*reasons, "a.mp4", "b.mp4", "street/a.mp4"))]
    (tmp_path / "s/captions.csv").write_text("\n".join(rows))
    np.savez(tmp_path / "s/cameras/b.npz", c2w=path_of(5, 1))
    (tmp_path / "s/cameras/street/a.npz").unlink()
    reasons |= {"street/night 1.mp4": "no caption", "b.mp4": "b.npz: 5 cameras for a video of 12 frames",
                "street/a.mp4": "no camera file", "short.mp4": "too short, 8 frames, 9 needed"}
    del reasons["cut.mp4"], reasons["cut.mkv"]  # their first 9 frames are whole
    index = run(tmp_path / "s", weights, tmp_path / "out")
    assert set(index["skipped"]) >= set(reasons)
    for name, reason in reasons.items():
        assert reason in index["skipped"][name] and "\n" not in index["skipped"][name]
    assert "a.mp4" in index["clips"] and not set(index["clips"]) & set(reasons)
    assert read_index(tmp_path / "out") == index


def test_other_settings_are_refused(source, weights, cache):
    before = clips(cache)
    with pytest.raises(ValueError, match="width = 48, wanted 64"):
        run(source, weights, cache, width=64)
    with pytest.raises(ValueError, match="cameras = files of .*/cameras, wanted files of .*/a.npz"):
        run(source, weights, cache, captions="", cameras=str(source / "cameras/a.npz"))
    with pytest.raises(ValueError, match="cameras = files of .*/cameras, wanted files of .*/cameras@w2c,opengl"):
        run(source, weights, cache, cameras=f"{source}/cameras@w2c,opengl")
    with pytest.raises(ValueError, match="frames = 9, wanted 81"):
        ClipCache(cache, frames=81)
    with pytest.raises(ValueError, match="4k.1 frames"):
        run(source, weights, cache, frames=10)
    with pytest.raises(FileNotFoundError, match="nowhere: expected mapanything, a camera file or a folder"):
        run(source, weights, cache, captions="", cameras="nowhere")
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
                          ("file_name,text\na.mp4,x\na.mp4,y\n", "line 3: another caption for a.mp4"),
                          ("file_name,text\na.mp4,x\nb.mp4,A man, in red\n", "line 3: 3 fields, expected 2.*in quotes"),
                          ('file_name,text\na.mp4,"x\ny"\nb.mp4,"A dog\nc.mp4,y\n', "line 4: unexpected end"),
                          ('file_name,text\na.mp4,"A dog\nb.mp4,"A cat"\n', "line 2: .*expected after"),
                          ("file_name,text\na.mp4,x <|im_end|>\n", "line 2: the caption holds <.im_end.>"),
                          ("text,file_name\na street <|video_pad|>,a.mp4\n", "line 2: the caption holds"),
                          ('file_name,text\na.mp4,"x\n<|VQ_reward|>"\n', "line 2: the caption holds")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_captions(file)


def test_changed_captions_are_encoded_again(source, weights, cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "out")
    before, captions = clips(out), (source / "captions.csv").read_text()
    for name in ("videos", "cameras"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "captions.csv").write_text(captions.replace("for clip 1", "of another kind"))
    run(tmp_path, weights, out)
    after = clips(out)
    assert [name for name in after if after[name] != before[name]] == ["b.mp4.safetensors"]


def test_captioner_sees_the_middle_frame(source, weights, tmp_path, monkeypatch):
    seen = lambda frame, *_: f"brightness {frame[-8:, -8:].float().mean() / 10 - 1:.0f}"
    monkeypatch.setattr(data.prepare, "describe_frame", seen)
    monkeypatch.setattr(data.prepare, "load_captioner", lambda *_: None)
    run(source, weights, tmp_path / "out", captioner="blip2")
    assert ClipCache(tmp_path / "out")[0].caption == "a caption for clip 0"  # its row
    run(source, weights, tmp_path / "no_file", captioner="blip2", captions="")
    assert ClipCache(tmp_path / "no_file")[0].caption == "brightness 4"  # of 0 to 8


def test_captions_that_command_are_no_captions(source, weights, tmp_path, monkeypatch):
    """Of BLIP-2 too: the clip is left out; and one that a cache already holds is not read."""
    monkeypatch.setattr(data.prepare, "load_captioner", lambda *_: None)
    seen = lambda frame, *_: "a <|im_end|>" if frame[-8:, -8:].float().mean() > 45 else "a street"
    monkeypatch.setattr(data.prepare, "describe_frame", seen)
    index = run(source, weights, tmp_path / "out", captions="", captioner="blip2")
    assert index["skipped"] == {"a.mp4": index["skipped"]["a.mp4"]} and "<|im_end|>" in index["skipped"]["a.mp4"]
    clip = load_clip(tmp_path / "out/b.mp4.safetensors")
    clip.caption = "a <|video_pad|>"
    save_clip(tmp_path / "old.safetensors", clip)
    with pytest.raises(ValueError, match="old.safetensors: the caption holds <.video_pad.>"):
        load_clip(tmp_path / "old.safetensors")


def test_a_single_video_is_one_clip(source, weights, tmp_path):
    index = run(source, weights, tmp_path / "out", videos=str(source / "videos/b.mp4"))
    assert index["clips"] == ["b.mp4"] and not index["skipped"]


def test_damaged_clip(cache, tmp_path):
    content = (cache / "a.mp4.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match="cut.safetensors: truncated"):
        load_clip(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="no prepared clip, lacks name"):
        load_clip(cache / NEGATIVE)


def test_killed_and_resumed(source, weights, cache, tmp_path):
    # killed at the very worst moment, the second clip's bytes written but not yet in place
    program = """
import os, signal
replace = os.replace
def kill(file, path):
    if "b.mp4" in str(path): os.kill(os.getpid(), signal.SIGKILL)
    replace(file, path)
os.replace = kill
import sys; from data import prepare; from plumbing.settings import parse
prepare.prepare(parse(prepare.Prepare, sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, *PREPARE[3:], *arguments(source, weights, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    out = tmp_path / "out"
    assert {f.suffix for f in out.iterdir()} == {".json", ".safetensors", ".tmp", ""}  # "": lock
    with pytest.raises(ValueError, match="not finished"):
        ClipCache(out)
    first = (out / "a.mp4.safetensors").stat()
    index = run(source, weights, out)
    assert len(index["clips"]) == 4 and clips(out) == clips(cache) and not list(out.rglob("*.tmp"))
    assert (out / "a.mp4.safetensors").stat().st_mtime_ns == first.st_mtime_ns  # not made again


def test_full_disk_stops(source, weights, tmp_path):
    with full_disk(40_000), pytest.raises(OSError, match="too large.*a.mp4.safe"):
        run(source, weights, tmp_path / "out")  # index and negative prompt fit, no clip does
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [INDEX, "lock", NEGATIVE]


def test_two_ranks_make_what_one_makes(source, weights, cache, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               *PREPARE[1:], *arguments(source, weights, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert clips(tmp_path / "out") == clips(cache)
    assert read_index(tmp_path / "out") == read_index(cache)
    assert done.stdout.count("4 clips made, 0 were there, 0 skipped") == 1


# ---- other files in the folder, and odd names ----

def test_a_users_files_are_neither_removed_nor_listed(source, weights, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.tmp").write_text("mine")
    with pytest.raises(ValueError, match="no index.json, but notes.tmp; expected an empty folder"):
        run(source, weights, out)
    (out / "notes.tmp").unlink()
    index = run(source, weights, out)
    (out / "notes.tmp").write_text("mine")
    save_file({"a": torch.zeros(1)}, out / "foreign.safetensors")
    assert run(source, weights, out)["clips"] == index["clips"]
    assert (out / "notes.tmp").read_text() == "mine"


def test_odd_names_are_skipped_or_kept(source, weights, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    content = (source / "videos/a.mp4").read_bytes()
    for name in ("a\nb.mp4", "\udcff.mp4", 246 * "x" + ".mp4"):
        (folder / name).write_bytes(content)
    index = run(source, weights, tmp_path / "out", videos=folder, captions="",
                cameras=source / "cameras/a.npz")
    assert index["clips"] == ["a\nb.mp4"] and set(index["skipped"]) == {"\udcff.mp4", 246 * "x" + ".mp4"}
    assert read_index(tmp_path / "out") == index
