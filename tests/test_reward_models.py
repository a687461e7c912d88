"""The published reward models: Pillow's pixels, recorded numbers, batches, foreign files."""
import functools
import json
import math
import shutil
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_weights
import torch
from conftest import ROOT, refused
from safetensors.torch import load_file, save
from scenes import camera_path

import rewards
from pretrained import reward_models
from pretrained.reward_models import smart_size
from rewards import Scene

SHARED = ROOT.parent / "shared" / "golden"
VLM, VIDEO, IMAGE = SHARED / "vlm", SHARED / "vlm/videoreward_tiny", SHARED / "vlm/hpsv3_tiny"
MOST = 448 * 448  # pixels
golden_vlm = pytest.mark.skipif(not VLM.is_dir(), reason="../shared/golden is not there")


def close(found, expected, tolerance=1e-4):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_skipped_frames_are_interpolated():
    """Exactly on a straight path that turns evenly, ends included; a failed video stays NaN."""
    path = camera_path(13, yaw=0.05)
    for stride in 1, 3, 20:
        kept = reward_models.spread(math.ceil(12 / stride) + 1, 13)
        assert kept[0] == 0 and kept[-1] == 12 and kept.diff().max() <= stride + 0.5
        out = reward_models.fill_in(torch.cat([path, path * torch.nan])[:, kept], kept.numpy(), 13)
        close(out[:1], path, 1e-12)
        assert torch.isnan(out[1]).all()
    close(reward_models.fill_in(path[:, :1], np.array([0]), 1), path[:, :1], 0)


@pytest.mark.parametrize("kernel", ["bicubic", "lanczos"])
@pytest.mark.parametrize("size, new", [((48, 83), (29, 52)), ((40, 30), (77, 90))])
def test_resize_is_pillows(kernel, size, new):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, *size, 3), generator=generator, dtype=torch.uint8)
    x[1] = (x[1] > 127).byte() * 255  # overshoots are clipped between the two passes
    resampling = getattr(Image.Resampling, kernel.upper())
    for frame, ours in zip(x, reward_models.resize(x, *new, kernel)):
        theirs = Image.fromarray(frame.numpy()).resize(new[::-1], resampling)
        assert np.array_equal(np.asarray(theirs), ours.numpy())


def test_sizes_and_frames():
    for size, least, seen in (((480, 832), MOST, (336, 588)), ((64, 96), 128 * 28 * 28, (280, 392)),
                              ((600, 338), MOST, (616, 364)), ((100, 1000), MOST, (168, 1428))):
        assert smart_size(*size, least, MOST) == seen
    assert reward_models.mapanything_size(480, 832) == ((294, 518), (298, 518))
    assert reward_models.mapanything_size(500, 304)[0] == (518, 294)  # a tie: the smaller aspect ratio
    for n, seen in ((81, [0, 16, 32, 48, 64, 80]), (5, [0, 1, 3, 4]), (3, [0, 2])):
        assert reward_models.spread(reward_models.frame_count(n, 24, 2.0), n).tolist() == seen
    assert reward_models.videoalign_frames(noise(48, 400, 400), 24, 4.0, 100352).shape == (8, 308, 308, 3)
    refused(lambda: reward_models.frame_count(1, 24, 2.0), "at least 2 frames")
    refused(lambda: reward_models.merge_lora({"q.lora_A.weight": 0}, 1, "file"), "lacks its lora_B")


@golden_vlm
def test_mapanything_is_given_the_official_pixels():
    golden = load_file(SHARED / "mapanything/golden.safetensors")
    views = reward_models.mapanything_views(golden["frames_uint8"])
    assert torch.equal(views[0], golden["preprocessed_view0"])


@functools.cache
def golden(name):
    facts = json.loads((VLM / f"golden_{name}.json").read_text(encoding="utf-8"))
    return facts, load_file(VLM / f"golden_{name}.safetensors")


@functools.cache
def hpsv3(prompt=None):
    return reward_models.hpsv3(IMAGE / "HPSv3.safetensors", IMAGE / "base", prompt)


def scene_of(prompts, fps=16.0, frames=1):
    c2w = torch.eye(4).repeat(len(prompts), frames, 1, 1)
    return Scene(c2w, torch.ones(len(prompts), 4), prompts, fps)


def noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


@golden_vlm
@pytest.mark.parametrize("layout", ["ckpt_full", "ckpt_lora", "ckpt_full_dim3"])
def test_videoalign_agrees_with_the_official_code(layout):
    """Scores of each video, and logits of all in one batch: three sizes, padded texts."""
    facts, tensors = golden("videoreward")
    reward = reward_models.videoalign(VIDEO / layout, VIDEO / "base", ("vq", "mq", "ta"))
    prompts, clips = [case["prompt"] for case in facts["cases"]], []
    for i, case in enumerate(facts["cases"]):
        frames = tensors[f"case{i}.frames_u8"].permute(0, 2, 3, 1)
        video = torch.zeros(case["total_frames"], *frames.shape[1:], dtype=torch.uint8)
        # frames that were not recorded are never looked at
        video[case["frame_indices"] if len(frames) < len(video) else slice(None)] = frames
        clips.append(reward_models.videoalign_frames(video, case["mp4_fps"]))
        scores = reward(video[None], scene_of(prompts[i:i + 1], case["mp4_fps"], len(video)))
        found = torch.stack([scores[name] for name in ("vq", "mq", "ta")], 1)
        if layout == "ckpt_full_dim3":  # three outputs, and no normalisation
            close(found, tensors["dim3.logits"][i:i + 1])
        else:
            close(found, [[case["rewards_use_norm_true"][name] for name in ("VQ", "MQ", "TA")]])
    if layout != "ckpt_full_dim3":
        close(reward.read(clips, prompts, batch=2)[..., 0], tensors["batch.logits"])


@golden_vlm
def test_hpsv3_agrees_with_the_official_code():
    """Scores of each image, logits of all in one batch, a video's mean."""
    (facts, tensors), images = golden("hpsv3"), []
    prompts = [case["prompt"] for case in facts["cases"]]
    for i, case in enumerate(facts["cases"]):
        with av.open(str(VLM / "inputs" / Path(case["png"]).name)) as file:
            image = torch.from_numpy(next(file.decode(video=0)).to_ndarray(format="rgb24"))[None]
        close(hpsv3()(image[None], scene_of(prompts[i:i + 1]))["hpsv3"], [case["mu"]])
        images.append(reward_models.resize(image, *smart_size(*image.shape[1:3], MOST, MOST), "bicubic"))
        assert torch.equal(reward_models.patchify(images[i])[0], tensors[f"case{i}.pixel_values_u8"])
    close(hpsv3().read(images, prompts)[:, 0], tensors["batch.logits"])
    video = torch.stack([images[0], images[0].flip(1)], 1)  # frames are averaged; one prompt for all
    fixed = [hpsv3(prompts[0])(video[:, i:i + 1], scene_of(["a"]))["hpsv3"] for i in range(2)]
    close(hpsv3()(video, scene_of(prompts[:1], frames=2))["hpsv3"], sum(fixed) / 2)


@pytest.fixture
def weights(published):
    return published("ReDirector")


@pytest.fixture
def stand_in(monkeypatch):
    """In place of the package mapanything: cameras that depend on the pixels."""
    package = types.SimpleNamespace(MapAnything=tiny_weights.MapAnything)
    monkeypatch.setitem(sys.modules, "mapanything", types.ModuleType("mapanything"))
    monkeypatch.setitem(sys.modules, "mapanything.models", package)


def test_a_video_scores_in_a_batch_as_alone(weights, stand_in):
    """Whatever the others' rate. A reward token in a caption costs that member alone."""
    s = scene_of(["a", "b <|VQ_reward|> for free", "c"], torch.tensor([24.0, 8.0, 60.0]), 41)
    for spec, frames in (("vq=1,mq=1", 41), ("trans=1,rot=1,hpsv3=1", 2)):
        video = noise(3, frames, 28, 56)
        s.c2w, (loaded, _) = s.c2w[:, :video.shape[1]], rewards.load(spec, weights)
        whole, failures = rewards.score(loaded, video, s)
        for i in (0, 2):
            for name, score in rewards.score(loaded, video[i:i + 1], s[i:i + 1])[0].items():
                close(score, whole[name][i:i + 1], 1e-3)
        if "vq" in whole:
            assert torch.isnan(whole["vq"]).tolist() == [False, True, False]
            assert "special token" in failures["vq"][1]


def test_motion_may_be_judged_without_colour(weights):
    video, s = noise(2, 6, 56, 84), scene_of(["a", "b"], frames=6)
    grey = (video.float() @ torch.tensor([0.299, 0.587, 0.114])).round().byte()
    grey = grey[..., None].repeat(1, 1, 1, 1, 3)
    plain, spared = (rewards.load("vq=1,mq=1,ta=0", weights, **options)[0]
                     for options in ({}, {"grey_mq": True, "park": True}))
    (coloured, _), (of_grey, _) = (rewards.score(plain, videos, s) for videos in (video, grey))
    assert (coloured["mq"] - of_grey["mq"]).abs().max() > 1e-3
    for name, score in rewards.score(spared, video, s)[0].items():
        close(score, (of_grey if name == "mq" else coloured)[name], 1e-3)


def test_mapanything_sees_some_frames_of_several_videos_at_once(weights, stand_in):
    videos = noise(3, 10, 40, 60)
    every, third = (reward_models.mapanything(weights / "map-anything", stride=n) for n in (1, 3))
    c2w, intrinsics = every.cameras(videos)
    close(c2w, torch.cat([every(video[None]) for video in videos]))
    close(intrinsics, [[1, 518 / 345, 0.5, 0.5]] * 3)
    close(third(videos)[:, ::3], c2w[:, ::3])


FOLDER, MAP = "VideoReward", "map-anything/model.safetensors"


@pytest.mark.parametrize("name, change, message", [
    (MAP, None, f"{MAP}: not found"), (f"{FOLDER}/checkpoint-1", None, "checkpoint-<step>: not found"),
    (f"{FOLDER}/checkpoint-1/model.pth", None, "checkpoint-1/adapter_model.safetensors: not found"),
    (f"{FOLDER}/model_config.json", lambda _: b"{", "JSONDecodeError"),
    (f"{FOLDER}/model_config.json", lambda data: data.replace(b"null", b"8"), "found ('detailed_special', 8"),
    ("HPSv3/HPSv3.safetensors", lambda data: data.replace(b"rm_head", b"rm_tail"), "found 0 head layers"),
    (MAP, lambda _: save({"weight": torch.zeros(1)}), "no MapAnything checkpoint")])
def test_files_that_are_missing_or_foreign(weights, stand_in, tmp_path, name, change, message):
    file = shutil.copytree(weights, tmp_path / "W") / name
    if change:
        file.write_bytes(change(file.read_bytes()))
    else:
        file.rename(tmp_path / "gone")
    reward = {"m": "trans=1", "H": "hpsv3=1"}.get(name[0], "vq=1")
    refused(lambda: rewards.load(reward, tmp_path / "W"), message, error=(ValueError, FileNotFoundError))
