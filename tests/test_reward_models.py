"""The published reward models: pixels as Pillow has them, golden numbers, foreign files."""
import functools
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scenes import camera_path, scene

from pretrained import reward_models
import rewards
from conftest import ROOT
from rewards import Scene

SHARED = ROOT.parent / "shared" / "golden"
VLM, VIDEO, IMAGE = SHARED / "vlm", SHARED / "vlm/videoreward_tiny", SHARED / "vlm/hpsv3_tiny"
ABSENT = "golden numbers not beside the checkout (../shared/golden)"
golden_vlm = pytest.mark.skipif(not VLM.is_dir(), reason=ABSENT)


# ---- pixels and frames ----

def test_stride_interpolates_skipped_frames():
    path = camera_path(13, yaw=0.05)  # straight, turning evenly: interpolation is exact
    for stride in (1, 2, 3, 5, 20):
        kept = reward_models.spread(math.ceil(12 / stride) + 1, 13)
        assert kept[0] == 0 and kept[-1] == 12 and kept.diff().max() <= stride + 0.5
        broken = torch.full_like(path[:, kept], math.nan)
        out = reward_models.fill_in(torch.cat([path[:, kept], broken]), kept.numpy(), 13)
        torch.testing.assert_close(out[:1], path, rtol=0, atol=1e-12)
        assert torch.isnan(out[1]).all()


@pytest.mark.parametrize("kernel", ["bicubic", "lanczos"])
@pytest.mark.parametrize("size, new", [((48, 83), (29, 52)), ((40, 30), (77, 90)), ((64, 64), (64, 32))])
def test_resize_is_pillows(kernel, size, new):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, *size, 3), generator=generator, dtype=torch.uint8)
    x[1] = (x[1] > 127).byte() * 255  # overshoots are clipped between the two passes
    ours = reward_models.resize(x, *new, kernel)
    for frame, mine in zip(x, ours):
        theirs = Image.fromarray(frame.numpy()).resize(new[::-1], getattr(Image.Resampling, kernel.upper()))
        assert np.array_equal(np.asarray(theirs), mine.numpy())


def test_sizes():
    video = functools.partial(reward_models.smart_size, least=128 * 28 * 28, most=448 * 448)
    image = functools.partial(reward_models.smart_size, least=448 * 448, most=448 * 448)
    assert video(480, 832) == image(480, 832) == (336, 588) and video(64, 96) == (280, 392)
    assert image(600, 338) == (616, 364) and image(100, 1000) == (168, 1428)
    assert reward_models.mapanything_size(480, 832) == ((294, 518), (298, 518))
    assert reward_models.mapanything_size(500, 304)[0] == (518, 294)  # a tie: the smaller aspect ratio
    one = reward_models.fill_in(camera_path(1, yaw=0.1)[:, :1], np.array([0]), 1)  # a video of one frame
    assert one.shape == (1, 1, 4, 4) and one.isfinite().all()
    for n, seen in ((81, [0, 16, 32, 48, 64, 80]), (5, [0, 1, 3, 4]), (3, [0, 2])):
        assert reward_models.spread(reward_models.frame_count(n, 24, 2.0), n).tolist() == seen


def test_prompts_are_the_models_own():
    """Trailing blanks count: any change of these texts changes every score."""
    digests = {"videoalign.txt": "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
               "hpsv3.txt": "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"}
    for name, digest in digests.items():
        assert hashlib.sha256((ROOT / "pretrained/prompts" / name).read_bytes()).hexdigest() == digest, name


# ---- VideoAlign and HPSv3 ----

@functools.cache
def golden(name):
    facts = json.loads((VLM / f"golden_{name}.json").read_text(encoding="utf-8"))
    return facts, load_file(VLM / f"golden_{name}.safetensors")


@functools.cache
def videoalign(layout):
    return reward_models.videoalign(VIDEO / layout, VIDEO / "base", ("vq", "mq", "ta"))


@functools.cache
def hpsv3():
    return reward_models.hpsv3(IMAGE / "HPSv3.safetensors", IMAGE / "base")


def golden_video(i):
    """The i-th recorded video (T, H, W, 3); frames that were not recorded are black, and never looked at."""
    facts, tensors = golden("videoreward")
    case, frames = facts["cases"][i], tensors[f"case{i}.frames_u8"].permute(0, 2, 3, 1)
    if len(frames) == case["total_frames"]:
        return frames
    video = torch.zeros(case["total_frames"], *frames.shape[1:], dtype=torch.uint8)
    video[case["frame_indices"]] = frames
    return video


def scene_of(prompts, fps, frames):
    return Scene(torch.eye(4).repeat(len(prompts), frames, 1, 1), torch.ones(len(prompts), 4), prompts, fps)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=1e-4)


@golden_vlm
def test_videoaligns_frames_follow_each_videos_own_rate():
    """Clips of 24 and 60 frames per second in one batch score as each does alone."""
    reward = videoalign("ckpt_full")
    videos = torch.randint(0, 256, (2, 81, 40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    both = reward(videos, scene_of(["a", "b"], torch.tensor([24.0, 60.0]), 81))
    for i, fps in enumerate((24.0, 60.0)):
        alone = reward(videos[i:i + 1], scene_of([["a", "b"][i]], fps, 81))
        other = reward(videos[i:i + 1], scene_of([["a", "b"][i]], 84 - fps, 81))
        close(both["vq"][i:i + 1], alone["vq"])
        assert abs(alone["vq"] - other["vq"]) > 1e-3


@golden_vlm
@pytest.mark.parametrize("layout", ["ckpt_full", "ckpt_lora"])
def test_videoalign_agrees_with_the_official_code(layout):
    facts, tensors = golden("videoreward")
    reward, clips, prompts = videoalign(layout), [], []
    for i, case in enumerate(facts["cases"]):
        clip = reward_models.videoalign_frames(golden_video(i), case["mp4_fps"])
        patches, grid = reward_models.patchify(clip)
        same = tensors[f"case{i}.pixel_values_videos_u8"]  # CPUs without vectors round a few the other way
        off = (patches.int() - same.int()).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-3
        seen = tensors[f"case{i}.pixel_values_videos_rows"]
        assert torch.equal(reward_models.normalise(same)[::16], seen)
        ids, mask = reward.read.tokenize([case["prompt"]], [grid])
        assert torch.equal(ids, tensors[f"case{i}.input_ids"]) and mask.all()
        close(reward.read([clip], [case["prompt"]])[..., 0], tensors[f"case{i}.logits"])
        scores, _ = rewards.score([reward], golden_video(i)[None],
                                  scene_of([case["prompt"]], case["mp4_fps"], case["total_frames"]))
        for name in ("vq", "mq", "ta"):
            close(scores[name], [case["rewards_use_norm_true"][name.upper()]])
        clips.append(clip)
        prompts.append(case["prompt"])
    ids, mask = reward.read.tokenize(prompts, [reward_models.patchify(clip)[1] for clip in clips])
    assert torch.equal(ids, tensors["batch.input_ids"]) and torch.equal(mask, tensors["batch.attention_mask"])
    close(reward.read(clips, prompts)[..., 0], tensors["batch.logits"])  # three sizes, padded texts
    close(reward.read(clips, prompts, batch=2)[..., 0], tensors["batch.logits"])


@golden_vlm
def test_videoalign_other_recorded_runs():
    facts, tensors = golden("videoreward")
    # 8 frames of the first video are what 4 frames a second give
    for name, i, options in (("num_frames_8", 0, {"rate": 4.0}), ("fps_4", 1, {"rate": 4.0}),
                             ("max_pixels_100352", 2, {"most": 100352})):
        case = facts["cases"][i]
        clip = reward_models.videoalign_frames(golden_video(i), case["mp4_fps"], **options)
        close(videoalign("ckpt_full").read([clip], [case["prompt"]])[..., 0], tensors[f"extra.{name}.logits"])
    for row in facts["frame_sampling_table"]:
        if row["ele"] == {"fps": 2.0} and row["total_frames"] > 1:
            n = row["total_frames"]
            count = reward_models.frame_count(n, row["video_fps"], 2.0)
            assert reward_models.spread(count, n).tolist() == row["indices"]
    for row in facts["video_smart_resize_table"]:
        assert list(reward_models.smart_size(*row["hw"], 128 * 28 * 28, 448 * 448)) == row["resized"]
    for row in golden("hpsv3")[0]["image_smart_resize_table"]:
        assert list(reward_models.smart_size(*row["hw"], 448 * 448, 448 * 448)) == row["resized"]


@golden_vlm
def test_videoalign_three_outputs_and_no_normalisation():
    facts, tensors = golden("videoreward")
    for i, case in enumerate(facts["cases"]):
        scores, _ = rewards.score([videoalign("ckpt_full_dim3")], golden_video(i)[None],
                                  scene_of([case["prompt"]], case["mp4_fps"], case["total_frames"]))
        close(torch.stack([scores[name] for name in ("vq", "mq", "ta")], 1), tensors["dim3.logits"][i:i + 1])


def png(name):
    with av.open(str(VLM / "inputs" / name)) as file:
        return torch.from_numpy(next(file.decode(video=0)).to_ndarray(format="rgb24"))


@golden_vlm
def test_hpsv3_agrees_with_the_official_code():
    facts, tensors = golden("hpsv3")
    images, prompts = [], []
    for i, case in enumerate(facts["cases"]):
        image = png(Path(case["png"]).name)
        size = reward_models.smart_size(*image.shape[:2], 448 * 448, 448 * 448)
        pixels = reward_models.resize(image[None], *size, "bicubic")
        patches, grid = reward_models.patchify(pixels)
        assert torch.equal(patches, tensors[f"case{i}.pixel_values_u8"])
        assert torch.equal(reward_models.normalise(patches)[::16], tensors[f"case{i}.pixel_values_rows"])
        assert torch.equal(hpsv3().read.tokenize([case["prompt"]], [grid])[0], tensors[f"case{i}.input_ids"])
        close(hpsv3().read([pixels], [case["prompt"]])[:, 0], tensors[f"case{i}.logits"])
        scores, _ = rewards.score([hpsv3()], image[None, None], scene_of([case["prompt"]], 16.0, 1))
        close(scores["hpsv3"], [case["mu"]])
        images.append(pixels)
        prompts.append(case["prompt"])
    close(hpsv3().read(images, prompts)[:, 0], tensors["batch.logits"])


@golden_vlm
def test_hpsv3_averages_frames_and_takes_a_fixed_prompt():
    video, s = scene(2, frames=3, height=64, width=96)
    single = [hpsv3()(video[:, i:i + 1], s)["hpsv3"] for i in range(3)]
    close(hpsv3()(video, s)["hpsv3"], sum(single) / 3)
    fixed = "A high-quality image"
    reward = reward_models.hpsv3(IMAGE / "HPSv3.safetensors", IMAGE / "base", prompt=fixed)
    s.prompt = ["something", "else"]
    scores = reward(video, s)["hpsv3"]
    s.prompt = [fixed, fixed]
    close(scores, hpsv3()(video, s)["hpsv3"])


@pytest.fixture
def folder(tmp_path):
    """The golden models where load() looks for the released ones."""
    if not VLM.is_dir():
        pytest.skip(ABSENT)
    for name, target in (("VideoReward", VIDEO / "ckpt_full"), ("Qwen2-VL-2B-Instruct", VIDEO / "base"),
                         ("HPSv3", IMAGE), ("Qwen2-VL-7B-Instruct", IMAGE / "base")):
        (tmp_path / name).symlink_to(target)
    return tmp_path


def test_grey_motion_quality(folder):
    video, s = scene(2, frames=6, height=56, width=84)
    grey = (video.float() @ torch.tensor([0.299, 0.587, 0.114])).round().byte()[..., None].expand(video.shape)
    plain, _ = rewards.load("vq=1,mq=1,ta=0", folder)
    spared, _ = rewards.load("vq=1,mq=1,ta=0", folder, grey_mq=True, park=True)
    of_colour, of_grey = rewards.score(plain, video, s)[0], rewards.score(plain, grey.contiguous(), s)[0]
    found, _ = rewards.score(spared, video, s)
    assert (of_colour["mq"] - of_grey["mq"]).abs().max() > 1e-3
    for name, expected in (("vq", of_colour), ("mq", of_grey), ("ta", of_colour)):
        close(found[name], expected[name])


def test_a_reward_token_in_a_caption_costs_that_member(folder):
    video, s = scene(3, frames=4, height=56, width=56)
    s.prompt[1] = "a <|VQ_reward|> for free"
    scores, failures = rewards.score(rewards.load("vq=1", folder)[0], video, s)
    assert torch.isnan(scores["vq"]).tolist() == [False, True, False] and "special token" in failures["vq"][1]


def test_two_processes_agree_with_one(folder, tmp_path):
    spec = "vq=1,mq=1,hpsv3=1,sharpness=1"
    script = tmp_path / "half.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import rewards, scenes
from safetensors.torch import save_file
part = slice(*map(int, sys.argv[1:3]))
video, s = scenes.scene(4, frames=4, height=56, width=84)
loaded, _ = rewards.load({spec!r}, {str(folder)!r})
save_file(rewards.score(loaded, video[part].roll(1, 1), s[part])[0], sys.argv[3])
""")
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    jobs = [subprocess.Popen([sys.executable, script, str(2 * i), str(2 * i + 2), file])
            for i, file in enumerate(files)]
    video, s = scene(4, frames=4, height=56, width=84)
    whole, _ = rewards.score(rewards.load(spec, folder)[0], video.roll(1, 1), s)
    assert [job.wait(120) for job in jobs] == [0, 0]
    first, second = map(load_file, files)
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected, rtol=0, atol=1e-5)


# ---- bad files ----

def test_missing_files_say_what_was_expected_where(tmp_path):
    for spec, path in (("trans=1", "map-anything/config.json"), ("vq=1", "VideoReward/model_config.json"),
                       ("hpsv3=1", "HPSv3/HPSv3.safetensors")):
        with pytest.raises(FileNotFoundError, match=path):
            rewards.load(spec, tmp_path)


def test_mapanything_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mapanything", None)
    (tmp_path / "map-anything").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "map-anything" / name).touch()
    with pytest.raises(ValueError, match="pip install git"):
        rewards.load("trans=1", tmp_path)


def opened(link):
    """Turns a linked folder into one of our own, its entries linked, so that they can be replaced."""
    entries = list(link.resolve().iterdir())
    link.unlink()
    link.mkdir()
    for path in entries:
        (link / path.name).symlink_to(path)
    return link


def test_incomplete_or_foreign_videoalign(folder):
    reward, base = opened(folder / "VideoReward"), opened(folder / "Qwen2-VL-2B-Instruct")
    (base / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="Qwen2-VL-2B-Instruct/tokenizer.json"):
        rewards.load("vq=1", folder)
    config = json.loads((reward / "model_config.json").read_text())
    frames = config["data_config"] | {"num_frames": 8}
    middle = config["data_config"] | {"sample_type": "multi_pts"}
    rank = config["peft_lora_config"] | {"use_rslora": True}
    (reward / "model_config.json").unlink()
    for wrong, message in (("{", "JSONDecodeError"), ("{}", "data_config"),
                           (json.dumps(config | {"inference_config": {"VQ_mean": 1}}), "MQ_mean"),
                           (json.dumps(config | {"data_config": frames}), "found .'detailed_special', 8"),
                           (json.dumps(config | {"data_config": middle}), "sample_type.*multi_pts"),
                           (json.dumps(config | {"peft_lora_config": rank}), "use_rslora.* True, 'uniform'")):
        (reward / "model_config.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            rewards.load("vq=1", folder)
    (reward / "model_config.json").write_text(json.dumps(config))
    (reward / "checkpoint-11352").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-<step>"):
        rewards.load("vq=1", folder)
    (reward / "checkpoint-7").mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint-7/adapter_model.safetensors.*model.pth"):
        rewards.load("vq=1", folder)
    whole = (VIDEO / "ckpt_full/checkpoint-11352/model.pth").read_bytes()
    (reward / "checkpoint-7/model.pth").write_bytes(whole[:9999])
    with pytest.raises(ValueError, match="checkpoint-7/model.pth: truncated"):
        rewards.load("vq=1", folder)


def test_a_checkpoint_of_another_layout(folder):
    state = load_file(IMAGE / "HPSv3.safetensors")
    (folder / "HPSv3").unlink()
    (folder / "HPSv3").mkdir()
    head = {key: x for key, x in state.items() if key.startswith("rm_head")}
    body = {key: x for key, x in state.items() if key not in head}
    renamed = {key.replace("self_attn", "attention"): x for key, x in state.items()}
    half = {key: x for key, x in state.items() if "layers.1." not in key}
    for wrong, message in ((body, "found 0 head layers"), (head, "0 embeddings"),
                           (renamed, "attention.k_pro"), (half, "missing language_model.layers.1")):
        save_file(wrong, folder / "HPSv3/HPSv3.safetensors")
        with pytest.raises(ValueError, match=f"HPSv3.safetensors: .*{message}"):
            rewards.load("hpsv3=1", folder)


# ---- MapAnything, with its real package (python -m pytest in an environment that has it) ----

@pytest.fixture(scope="module")
def mapanything_golden():
    pytest.importorskip("mapanything", reason="the mapanything package is not installed")
    if not (SHARED / "mapanything").is_dir():
        pytest.skip(ABSENT)
    return load_file(SHARED / "mapanything/golden.safetensors")


def test_mapanything_agrees_with_the_official_code(mapanything_golden):
    frames = mapanything_golden["frames_uint8"]
    assert torch.equal(reward_models.mapanything_views(frames)[0], mapanything_golden["preprocessed_view0"])
    estimator = reward_models.mapanything(SHARED / "mapanything/mapanything_tiny")
    videos = torch.stack([frames.flip(0), frames, frames.flip(2)])
    c2w, intrinsics = estimator.cameras(videos)  # one pass over three videos
    close(c2w[1], mapanything_golden["camera_poses"])
    close(c2w, torch.cat([estimator(video[None]) for video in videos]))
    fx, fy = mapanything_golden["intrinsics"][0].diagonal()[:2]
    close(intrinsics[1], [fx / 518, fy / 298, 0.5, 0.5])
    skipped = reward_models.mapanything(SHARED / "mapanything/mapanything_tiny", stride=3)(videos[1:2])
    assert skipped.shape == (1, 4, 4, 4)
    start, end = skipped[0, 0, :3, 3], skipped[0, 3, :3, 3]
    torch.testing.assert_close(skipped[0, 1:3, :3, 3], torch.stack([start.lerp(end, i / 3) for i in (1, 2)]))


def test_mapanything_preprocessing_is_the_official_one(mapanything_golden):
    from mapanything.utils.image import preprocess_inputs
    for height, width in ((480, 832), (832, 480), (600, 600), (320, 1100), (100, 130), (294, 518)):
        frames = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
        theirs = preprocess_inputs([{"img": frames[0].numpy()}])[0]["img"]
        assert torch.equal(reward_models.mapanything_views(frames), theirs)


def test_mapanything_refuses_a_foreign_checkpoint(mapanything_golden, tmp_path):
    (tmp_path / "config.json").symlink_to(SHARED / "mapanything/mapanything_tiny/config.json")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no MapAnything checkpoint"):
        reward_models.mapanything(tmp_path)
