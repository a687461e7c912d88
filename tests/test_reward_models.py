"""The published reward models: Pillow's pixels, recorded numbers, batches, foreign files."""
import functools
import hashlib
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
VIDEO_LEAST, MOST = 128 * 28 * 28, 448 * 448  # pixels
golden_vlm = pytest.mark.skipif(not VLM.is_dir(), reason="../shared/golden is not there")


def close(found, expected, tolerance=1e-4):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ---- pixels and frames ----

@pytest.mark.parametrize("stride", [1, 2, 3, 5, 20])
def test_skipped_frames_are_interpolated(stride):
    """Exactly on a straight path that turns evenly, ends included; a failed video stays NaN."""
    path = camera_path(13, yaw=0.05)
    kept = reward_models.spread(math.ceil(12 / stride) + 1, 13)
    assert kept[0] == 0 and kept[-1] == 12 and kept.diff().max() <= stride + 0.5
    out = reward_models.fill_in(torch.cat([path, path * torch.nan])[:, kept], kept.numpy(), 13)
    close(out[:1], path, 1e-12)
    assert torch.isnan(out[1]).all()
    close(reward_models.fill_in(path[:, :1], np.array([0]), 1), path[:, :1], 0)


@pytest.mark.parametrize("kernel", ["bicubic", "lanczos"])
@pytest.mark.parametrize("size, new", [((48, 83), (29, 52)), ((40, 30), (77, 90)), ((64, 64), (64, 32))])
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
    for size, least, seen in (((480, 832), VIDEO_LEAST, (336, 588)), ((480, 832), MOST, (336, 588)),
                              ((64, 96), VIDEO_LEAST, (280, 392)), ((600, 338), MOST, (616, 364)),
                              ((100, 1000), MOST, (168, 1428))):
        assert smart_size(*size, least, MOST) == seen
    assert reward_models.mapanything_size(480, 832) == ((294, 518), (298, 518))
    assert reward_models.mapanything_size(500, 304)[0] == (518, 294)  # a tie: the smaller aspect ratio
    for n, seen in ((81, [0, 16, 32, 48, 64, 80]), (5, [0, 1, 3, 4]), (3, [0, 2])):
        assert reward_models.spread(reward_models.frame_count(n, 24, 2.0), n).tolist() == seen
    refused(lambda: reward_models.frame_count(1, 24, 2.0), "at least 2 frames")
    half = {"q.lora_A.weight": torch.ones(1, 1)}
    refused(lambda: reward_models.merge_lora(half, 1, "file"), "lacks its lora_B")


@pytest.mark.parametrize("name, digest", [
    ("videoalign.txt", "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"),
    ("hpsv3.txt", "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c")])
def test_prompts_are_the_models_own(name, digest):
    """Trailing blanks count: any change of these texts changes every score."""
    assert hashlib.sha256((ROOT / "pretrained/prompts" / name).read_bytes()).hexdigest() == digest


# ---- VideoAlign and HPSv3: recorded numbers ----

@functools.cache
def golden(name):
    facts = json.loads((VLM / f"golden_{name}.json").read_text(encoding="utf-8"))
    return facts, load_file(VLM / f"golden_{name}.safetensors")


@functools.cache
def videoalign(layout="ckpt_full"):
    return reward_models.videoalign(VIDEO / layout, VIDEO / "base", ("vq", "mq", "ta"))


@functools.cache
def hpsv3(prompt=None):
    return reward_models.hpsv3(IMAGE / "HPSv3.safetensors", IMAGE / "base", prompt)


def golden_video(i):
    """The i-th recorded video (T, H, W, 3); frames that were not recorded are never looked at."""
    facts, tensors = golden("videoreward")
    case, frames = facts["cases"][i], tensors[f"case{i}.frames_u8"]
    video = torch.zeros(case["total_frames"], *frames.shape[2:], 3, dtype=torch.uint8)
    video[case["frame_indices"] if len(frames) < len(video) else slice(None)] = frames.permute(0, 2, 3, 1)
    return video


def scene_of(prompts, fps=16.0, frames=1):
    c2w = torch.eye(4).repeat(len(prompts), frames, 1, 1)
    return Scene(c2w, torch.ones(len(prompts), 4), prompts, fps)


def noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


@golden_vlm
@pytest.mark.parametrize("layout", ["ckpt_full", "ckpt_lora", "ckpt_full_dim3"])
def test_videoalign_agrees_with_the_official_code(layout):
    """Pixels, logits and scores of each video, and of all in one batch: three sizes, padded texts."""
    (facts, tensors), reward, clips = golden("videoreward"), videoalign(layout), []
    prompts = [case["prompt"] for case in facts["cases"]]
    for i, case in enumerate(facts["cases"]):
        video = golden_video(i)
        clips.append(reward_models.videoalign_frames(video, case["mp4_fps"]))
        pixels, same = reward_models.patchify(clips[i])[0], tensors[f"case{i}.pixel_values_videos_u8"]
        off = (pixels.int() - same.int()).abs()  # CPUs without vectors round a few the other way
        assert off.max() <= 1 and off.float().mean() < 1e-3
        scores = reward(video[None], scene_of(prompts[i:i + 1], case["mp4_fps"], len(video)))
        found = torch.stack([scores[name] for name in ("vq", "mq", "ta")], 1)
        if layout == "ckpt_full_dim3":  # three outputs, and no normalisation
            close(found, tensors["dim3.logits"][i:i + 1])
        else:
            close(found, [[case["rewards_use_norm_true"][name] for name in ("VQ", "MQ", "TA")]])
            close(reward.read(clips[i:], prompts[i:i + 1])[..., 0], tensors[f"case{i}.logits"])
    if layout != "ckpt_full_dim3":
        close(reward.read(clips, prompts, batch=2)[..., 0], tensors["batch.logits"])


@golden_vlm
def test_videoalign_other_recorded_runs():
    """8 frames of the first video are what 4 frames a second give."""
    facts, tensors = golden("videoreward")
    for name, i, options in (("num_frames_8", 0, {"rate": 4.0}), ("fps_4", 1, {"rate": 4.0}),
                             ("max_pixels_100352", 2, {"most": 100352})):
        case = facts["cases"][i]
        clip = reward_models.videoalign_frames(golden_video(i), case["mp4_fps"], **options)
        close(videoalign().read([clip], [case["prompt"]])[..., 0], tensors[f"extra.{name}.logits"])


@golden_vlm
def test_hpsv3_agrees_with_the_official_code():
    """Pixels, token ids and scores of each image, logits of all in one batch, a video's mean."""
    (facts, tensors), images = golden("hpsv3"), []
    prompts = [case["prompt"] for case in facts["cases"]]
    for i, case in enumerate(facts["cases"]):
        with av.open(str(VLM / "inputs" / Path(case["png"]).name)) as file:
            image = torch.from_numpy(next(file.decode(video=0)).to_ndarray(format="rgb24"))[None]
        size = smart_size(*image.shape[1:3], MOST, MOST)
        images.append(reward_models.resize(image, *size, "bicubic"))
        patches, grid = reward_models.patchify(images[i])
        assert torch.equal(patches, tensors[f"case{i}.pixel_values_u8"])
        rows, ids = tensors[f"case{i}.pixel_values_rows"], tensors[f"case{i}.input_ids"]
        assert torch.equal(reward_models.normalise(patches)[::16], rows)
        assert torch.equal(hpsv3().read.tokenize(prompts[i:i + 1], [grid])[0], ids)
        close(hpsv3()(image[None], scene_of(prompts[i:i + 1]))["hpsv3"], [case["mu"]])
    close(hpsv3().read(images, prompts)[:, 0], tensors["batch.logits"])
    video = torch.stack([images[0], images[0].flip(1)], 1)  # frames are averaged; one prompt for all
    fixed = [hpsv3(prompts[0])(video[:, i:i + 1], scene_of(["a"]))["hpsv3"] for i in range(2)]
    close(hpsv3()(video, scene_of(prompts[:1], frames=2))["hpsv3"], sum(fixed) / 2)


# ---- as rewards, opened where load() looks for the released ones ----

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def stand_in(monkeypatch):
    """In place of the package mapanything: cameras that depend on the pixels."""
    package = types.SimpleNamespace(MapAnything=tiny_weights.MapAnything)
    monkeypatch.setitem(sys.modules, "mapanything", types.ModuleType("mapanything"))
    monkeypatch.setitem(sys.modules, "mapanything.models", package)


def test_a_video_scores_in_a_batch_as_alone(weights, stand_in):
    """However a batch is shared out among ranks, whatever the others' rate. A reward token in a
    caption costs that member alone."""
    s = scene_of(["a", "b <|VQ_reward|> for free", "c"], torch.tensor([24.0, 8.0, 60.0]), 81)
    for spec, frames in (("vq=1,mq=1", 81), ("trans=1,rot=1,hpsv3=1", 2)):
        video = noise(3, frames, 28, 56)
        s.c2w, (loaded, _) = s.c2w[:, :video.shape[1]], rewards.load(spec, weights)
        whole, failures = rewards.score(loaded, video, s)
        for i in (0, 2):
            alone = rewards.score(loaded, video[i:i + 1], s[i:i + 1])[0]
            assert alone.keys() == whole.keys()
            for name, score in alone.items():
                close(score, whole[name][i:i + 1], 1e-3)
        if "vq" in whole:
            assert torch.isnan(whole["vq"]).tolist() == [False, True, False]
            assert "special token" in failures["vq"][1]
            slower, _ = rewards.score(loaded, video[:1], scene_of(["a"], 60.0, 81))
            assert abs(slower["vq"] - whole["vq"][0]) > 1e-3


def test_motion_may_be_judged_without_colour(weights):
    video, s = noise(2, 6, 56, 84), scene_of(["a", "b"], frames=6)
    grey = (video.float() @ torch.tensor([0.299, 0.587, 0.114])).round().byte()
    grey = grey[..., None].expand(video.shape).contiguous()
    plain, spared = (rewards.load("vq=1,mq=1,ta=0", weights, **options)[0]
                     for options in ({}, {"grey_mq": True, "park": True}))
    of_colour, of_grey = (rewards.score(plain, videos, s)[0] for videos in (video, grey))
    found, _ = rewards.score(spared, video, s)
    assert (of_colour["mq"] - of_grey["mq"]).abs().max() > 1e-3
    for name, expected in (("vq", of_colour), ("mq", of_grey), ("ta", of_colour)):
        close(found[name], expected[name], 1e-3)


def test_mapanything_sees_some_frames_of_several_videos_at_once(weights, stand_in):
    videos = noise(3, 10, 40, 60)
    every, third = (reward_models.mapanything(weights / "map-anything", stride=n) for n in (1, 3))
    c2w, intrinsics = every.cameras(videos)
    close(c2w, torch.cat([every(video[None]) for video in videos]))
    close(intrinsics, [[1, 518 / 345, 0.5, 0.5]] * 3)
    skipped = third(videos)
    close(skipped[:, ::3], c2w[:, ::3])


def rewritten(keep):
    """HPSv3's file with only those keys for which keep(key) gives a name."""
    return lambda file: save({new: x for key, x in load_file(file).items() if (new := keep(key))})


def config(**changes):
    parts = tiny_weights.VIDEO_REWARD.items()
    changed = {name: part | changes.get(name, {}) for name, part in parts}
    return lambda _: json.dumps(changed).encode()


CONFIG, STEP = "VideoReward/model_config.json", "VideoReward/checkpoint-1"
HEAD, MAP = "HPSv3/HPSv3.safetensors", "map-anything/model.safetensors"
QWEN = "Qwen2-VL-2B-Instruct/tokenizer.json"


@pytest.mark.parametrize("name, change, message", [
    *((file, None, f"{file}: not found") for file in (MAP, CONFIG, HEAD, QWEN)),
    (STEP, None, "VideoReward/checkpoint-<step>: not found"),
    (f"{STEP}/model.pth", None, f"{STEP}/adapter_model.safetensors: not found"),
    (f"{STEP}/model.pth", lambda file: file.read_bytes()[:9999], f"{STEP}/model.pth: truncated"),
    (CONFIG, lambda _: b"{", "JSONDecodeError"),
    (CONFIG, config(data_config={"num_frames": 8}), "found ('detailed_special', 8"),
    (CONFIG, config(data_config={"sample_type": "multi_pts"}), "sample_type to be"),
    (CONFIG, config(peft_lora_config={"use_rslora": True}), "True, 'uniform'"),
    (CONFIG, config(peft_lora_config={"lora_r": None}), "not VideoAlign's (TypeError"),
    (HEAD, rewritten(lambda key: not key.startswith("rm_head") and key), "found 0 head layers"),
    (HEAD, rewritten(lambda key: "layers.1." not in key and key), "missing language_model.layers.1"),
    (MAP, lambda _: save({"weight": torch.zeros(1)}), "no MapAnything checkpoint")])
def test_files_that_are_missing_or_foreign(weights, stand_in, tmp_path, name, change, message):
    shutil.copytree(weights, tmp_path / "W")
    file = tmp_path / "W" / name
    content = change and change(file)
    file.rename(tmp_path / "gone")
    if change:
        file.write_bytes(content)
    reward = {"m": "trans=1", "H": "hpsv3=1"}.get(name[0], "vq=1")
    error = ValueError if change else FileNotFoundError
    refused(lambda: rewards.load(reward, tmp_path / "W"), message, error=error)


# ---- MapAnything, with its real package (python -m pytest in an environment that has it) ----

def test_mapanything_agrees_with_the_official_code():
    """Pixels and recorded cameras; its own preprocessing at sizes that shrink, grow and are cropped."""
    file = SHARED / "mapanything/golden.safetensors"
    if not file.is_file():
        pytest.skip("../shared/golden is not there")
    golden = load_file(file)
    views = reward_models.mapanything_views(golden["frames_uint8"])
    assert torch.equal(views[0], golden["preprocessed_view0"])
    image = pytest.importorskip("mapanything.utils.image", reason="mapanything is not installed")
    estimator = reward_models.mapanything(SHARED / "mapanything/mapanything_tiny")
    c2w, intrinsics = estimator.cameras(golden["frames_uint8"][None])
    close(c2w[0], golden["camera_poses"])
    fx, fy = golden["intrinsics"][0].diagonal()[:2]
    close(intrinsics[0], [fx / 518, fy / 298, 0.5, 0.5])
    for height, width in ((480, 832), (832, 480), (600, 600), (320, 1100), (100, 130), (294, 518)):
        frames = noise(1, height, width)
        theirs = image.preprocess_inputs([{"img": frames[0].numpy()}])[0]["img"]
        assert torch.equal(reward_models.mapanything_views(frames), theirs)
