"""A clip's cameras and captions, and the cache: the whole of `prepare` on tiny random weights."""
import os
import shutil
import signal

import numpy as np
import pytest
import tiny_weights
import torch
from safetensors.torch import save_file
from scenes import clip, as_ranks, path_of, put

import data.prepare
import trajectories
from functools import partial
from data.cameras import source_cameras
from data.clips import ClipCache, NEGATIVE, load_clip, read_index, save_clip
from data.prepare import Prepare, find_caption, prepare, read_captions
from data.video import read_video, to_float, write_video
from data.world import open_policy
from pretrained import encoders, vae
from pretrained.weights import IMAGE_FILE, TEXT_FILE, VAE_FILE

SETTINGS = dict(frames=9, height=32, width=48)
NAMES = ["a.mp4", "b.mp4", "street/a.mp4", "street/night 1.mp4"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four videos below one folder, captions and cameras (with intrinsics in pixels) for each."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "videos/street").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        write_video(folder / "videos" / name, np.roll(clip(12), i, 0), 24)
        camera = {"c2w": path_of(12, i), "intrinsics": [50.0, 60.0, 32.0, 24.0]}
        put((folder / "cameras" / name).with_suffix(".npz"), camera)
    rows = [f"{name},a caption for clip {i}" for i, name in enumerate(NAMES)]
    put(folder / "captions.csv", "\n".join(["file_name,text", *rows]))
    return folder


def run(source, weights, out, **more):
    """`prepare` of a folder like `source`'s."""
    paths = {"videos": source / "videos", "captions": source / "captions.csv", "out": out,
             "cameras": source / "cameras", "weights": weights} | more
    return prepare(Prepare(**{name: str(path) for name, path in paths.items()}, **SETTINGS))


@pytest.fixture(scope="module")
def cache(source, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "new"
    run(source, weights, out)
    return out


def clips(folder):
    """Bytes of each clip of a cache."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.safetensors")}


# ---- what a clip holds ----

def test_clips_hold_what_the_models_say(source, weights, cache):
    """Each part is what its model says of the video."""
    made = ClipCache(cache, **SETTINGS)
    assert made.names == NAMES and len(made) == 4
    one = made[3]
    assert (one.name, one.caption, one.fps) == (NAMES[3], "a caption for clip 3", 24)
    x = to_float(read_video(one.video, 9, 1, (32, 48))[0])[None]
    text = encoders.load_text_encoder(weights / TEXT_FILE)
    image = encoders.load_image_encoder(weights / IMAGE_FILE)
    for found, expected in (
            (one.latents, vae.load_vae(weights / VAE_FILE).encode(x)[0]),
            (one.text, text.embed([one.caption])[0]), (one.image, image(x[:, :, 0])[0]),
            (made.negative, text.embed([encoders.NEGATIVE_PROMPT])[0])):
        assert torch.equal(found, expected.bfloat16())
    assert one.c2w.dtype == torch.float64
    assert np.allclose(one.c2w, trajectories.relative(path_of(12, 3)[:9]), atol=1e-12)
    # 64x48 to 48x36 to 48x32: the width is kept, of the height 32 of 36 rows
    assert torch.allclose(one.intrinsics, torch.tensor([50 / 64, 60 / 48 * 36 / 32, 0.5, 0.5]))
    assert (cache / "a.mp4.safetensors").stat().st_size < 150_000  # the text's zeros are not stored


def test_what_was_trained_is_opened_as_it_was_trained(weights):
    """In float32 beside bfloat16, which would round a small change of a norm's gain away."""
    dit = open_policy(weights, None, torch.device("meta"))  # no CPU, so as on a GPU
    for name, p in dit.named_parameters():
        assert p.dtype == (torch.float32 if ".self_attn." in name else torch.bfloat16)


# ---- a clip's cameras ----

def cameras_for(folder, name, numbers=range(9), count=24, **options):
    """source_cameras for frames of 32 x 48 of a video of 48 x 64 with `count` frames."""
    video = torch.zeros(len(numbers), 32, 48, 3, dtype=torch.uint8)
    options |= {"count": lambda expected: count}
    return source_cameras(video, np.array(numbers), (48, 64), name, folder, **options)


def test_an_estimator_gives_the_cameras():
    world = torch.from_numpy(path_of(9, 3))[None]
    guess = lambda videos: (world, torch.tensor([[0.7, 0.8, 0.4, 0.4]]))
    c2w, intrinsics = cameras_for(guess, "a")
    assert np.allclose(c2w, trajectories.relative(world[0]))
    assert intrinsics.tolist() == pytest.approx([0.7, 0.8, 0.5, 0.5])
    with pytest.raises(ValueError, match="failed"):
        cameras_for(lambda videos: (world * float("nan"), None), "a")


def test_cameras_follow_the_frames_taken(tmp_path):
    put(tmp_path / "a.npz", {"c2w": path_of(20)})
    # a 90 degree view of 64x48 has a focal length of half its width: 32 pixels, or 24 at 48x36
    c2w, intrinsics = cameras_for(tmp_path, "a.mp4", range(3, 20, 2), 20, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(20)[3::2]))
    assert intrinsics.tolist() == pytest.approx([24 / 48, 24 / 32, 0.5, 0.5])
    # whichever frames are asked for: the rows may be any of them
    for frames, why in ((20, "give --fov"), (19, "for a video of 19 frames")):
        with pytest.raises(ValueError, match=f"a.npz: .*{why}"):
            cameras_for(tmp_path, "a.mp4", count=frames)
    put(tmp_path / "pose/v.npz", {"data": path_of(20), "inds": np.arange(20)})  # ViPE's
    with pytest.raises(ValueError, match="frames 0 to 19, but the clip's are 13 to 21"):
        cameras_for(tmp_path, "v.mp4", range(13, 22), 60)
    with pytest.raises(ValueError, match="no camera file .*none.npz"):
        cameras_for(tmp_path, "none.mp4")
    still = put(tmp_path / "still.npz", {"c2w": path_of(81)[[4] * 81]})  # fits any length
    assert np.allclose(cameras_for(still, "a.mp4", fov=90)[0], np.eye(4))
    put(tmp_path / "walk_0.1.npy", path_of(9, 1))  # of a folder of images: .1 is no suffix
    c2w, _ = cameras_for(f"{tmp_path}@c2w", "walk_0.1", count=9, fov=90)
    assert np.allclose(c2w, trajectories.relative(path_of(9, 1)))


@pytest.mark.parametrize("k, expected", [
    ((50.0, 60.0, 33, 23.5), (50 / 64, 60 / 48)), ((25.0, 30.0, 16, 12), (50 / 64, 60 / 48)),
    ((0.7, 0.9, 0.5, 0.5), (0.7, 0.9)), ((50.0, 60.0, 32, 18), "of a picture of about 64 x 36"),
    ((-5.0, 60.0, 32, 24), "must be positive")])
def test_intrinsics_of_another_picture_size(tmp_path, k, expected):
    put(tmp_path / "a.npz", {"c2w": path_of(24), "intrinsics": k})
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"a.npz: .*{expected}"):
            cameras_for(tmp_path, "a.mp4")
    else:  # 48 x 36, then 48 x 32
        found = cameras_for(tmp_path, "a.mp4")[1].tolist()
        assert found == pytest.approx([expected[0], expected[1] * 36 / 32, 0.5, 0.5])


# ---- captions ----

def test_captions_file(tmp_path):
    text = '\ufeffvideoFile,caption\nx/a.mp4,"one, two"\nb.mp4,\nc.webm, three \n'
    captions = read_captions(put(tmp_path / "metadata.csv", text.encode()))
    assert captions == {"x/a": "one, two", "c": "three"}
    found = [find_caption(name, captions) for name in ("x/a.mov", "b.mp4", "deep/down/c.webm")]
    assert found == ["one, two", None, "three"]
    assert find_caption("v0.6", {"v0.6": "six", "v0": "none"}) == "six"  # a folder of images


@pytest.mark.parametrize("text, message", [
    ("video,words\na,b\n", "has video, words"), ("file_name,text\n", "no row"),
    ("file_name,text\na.mp4,x\na.mp4,y\n", "line 3: another caption for a.mp4"),
    ("file_name,text\na.mp4,x\nb.mp4,A man, in red\n", "line 3: 3 fields, expected 2.*in quotes"),
    ('file_name,text\na.mp4,"x\ny"\nb.mp4,"A dog\nc.mp4,y\n', "line 4: unexpected end"),
    ("file_name,text\na.mp4,x <|im_end|>\n", "line 2: the caption holds <.im_end.>")])
def test_captions_that_are_none(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_captions(put(tmp_path / "a.csv", text))


def test_a_captioner_describes_the_middle_frame(source, weights, tmp_path, monkeypatch):
    """Where there is no row; what commands the reward models is no caption, here or in a cache."""
    def describe(frame, *rest):  # stands in for BLIP-2: says which frame of clip() it sees
        return f"brightness {frame[-8:, -8:].float().mean() / 10 - 1:.0f}".replace("ess 4", "<|im_end|>")
    monkeypatch.setattr(data.prepare, "load_captioner", lambda *_: None)
    monkeypatch.setattr(data.prepare, "describe_frame", describe)
    put(tmp_path / "one.csv", "file_name,text\nstreet/night 1.mp4,its row\n")
    index = run(source, weights, tmp_path / "out", captions=tmp_path / "one.csv", captioner="blip2")
    assert list(index["skipped"]) == ["a.mp4"] and "<|im_end|>" in index["skipped"]["a.mp4"]
    made = ClipCache(tmp_path / "out")
    assert [one.caption for one in made] == ["brightness 3", "brightness 2", "its row"]  # of 0 to 8
    bad = made[0]
    bad.caption = "a <|video_pad|>"
    save_clip(tmp_path / "old.safetensors", bad)
    with pytest.raises(ValueError, match="old.safetensors: the caption holds <.video_pad.>"):
        load_clip(tmp_path / "old.safetensors")


# ---- the cache ----

def test_bad_clips_are_skipped_with_the_reason(source, weights, tmp_path):
    s = shutil.copytree(source, tmp_path / "s")
    good = (s / "videos/a.mp4").read_bytes()
    put(s / "videos/street/a.mp4", good[:len(good) // 2])
    long = 246 * "x" + ".mp4"
    for name in (long, "\udcff.mp4", "a\nb.mp4"):
        put(s / "videos" / name, good)
    shutil.copy(s / "cameras/a.npz", s / "cameras/a\nb.npz")
    rows = [f'"{name}",text' for name in ("a\nb.mp4", "a.mp4", "b.mp4", "street/a.mp4")]
    put(s / "captions.csv", "\n".join(["file_name,text", *rows]))
    put(s / "cameras/b.npz", {"c2w": path_of(5)})
    reasons = {"street/night 1.mp4": "no caption", "b.mp4": "b.npz: 5 cameras for a video of 12",
               "street/a.mp4": "unreadable or truncated", "\udcff.mp4": "no UTF-8", long: "too long"}
    index = run(s, weights, tmp_path / "out")
    assert set(index["skipped"]) == set(reasons) and index["clips"] == ["a\nb.mp4", "a.mp4"]
    for name, reason in reasons.items():
        assert reason in index["skipped"][name] and "\n" not in index["skipped"][name]
    assert read_index(tmp_path / "out") == index


def test_other_settings_and_damaged_clips_are_refused(source, weights, cache, tmp_path):
    before = clips(cache)
    with pytest.raises(ValueError, match="wanted files of .*/cameras@w2c"):
        run(source, weights, cache, cameras=f"{source}/cameras@w2c")
    with pytest.raises(ValueError, match="no prepared clip, lacks name"):
        load_clip(cache / NEGATIVE)
    assert clips(cache) == before


def test_changed_captions_are_encoded_again(source, weights, cache, tmp_path):
    """Here a single video's; a user's file in the folder is neither removed nor listed."""
    out = shutil.copytree(cache, tmp_path / "out")
    before, captions = clips(out), (source / "captions.csv").read_text()
    put(tmp_path / "captions.csv", captions.replace("for clip 1", "of another kind"))
    save_file({"a": torch.zeros(1)}, out / "foreign.safetensors")
    changed = {"captions": tmp_path / "captions.csv", "videos": source / "videos/b.mp4"}
    index = run(source, weights, out, **changed)
    after = clips(out)
    assert [name for name in before if after[name] != before[name]] == ["b.mp4.safetensors"]
    assert index["clips"] == NAMES and (out / "foreign.safetensors").exists()
    put(tmp_path / "new/notes.tmp", "mine")
    with pytest.raises(ValueError, match="no index.json, but notes.tmp; expected an empty folder"):
        run(source, weights, tmp_path / "new")


def killed(source, weights, out):
    """`run`, ended where the second clip's bytes are written, but not yet in place."""
    replace = os.replace

    def kill(file, path):
        if "b.mp4" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(file, path)
    os.replace = kill
    run(source, weights, out)


def test_killed_and_resumed(source, weights, cache, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AssertionError):
        as_ranks(partial(killed, source, weights, out), put(tmp_path / "said", ""), 1)
    assert {f.suffix for f in out.iterdir()} == {".json", ".safetensors", ".tmp", ""}  # "": lock
    with pytest.raises(ValueError, match="not finished"):
        ClipCache(out)
    first = (out / "a.mp4.safetensors").stat()
    index = run(source, weights, out)
    assert index["clips"] == NAMES and clips(out) == clips(cache) and not list(out.rglob("*.tmp"))
    assert (out / "a.mp4.safetensors").stat().st_mtime_ns == first.st_mtime_ns  # not made again


def test_two_ranks_make_what_one_makes(source, weights, cache, tmp_path):
    out = tmp_path / "out"
    said = as_ranks(partial(run, source, weights, out), tmp_path / "said")
    assert clips(out) == clips(cache) and read_index(out) == read_index(cache)
    assert said.count("4 clips made, 0 were there, 0 skipped") == 1
