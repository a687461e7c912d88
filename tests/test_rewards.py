"""Rewards: scoring rules, geometry on planted errors, model-free closed forms, the models' golden numbers."""
import math

import pytest
import torch

import rewards
from rewards import Scene


def scene(n, frames=5, height=16, width=24, source=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4).repeat(n, frames, 1, 1)
    c2w[:, :, 2, 3] = torch.arange(frames) * 0.1
    video = torch.randint(0, 256, (n, frames, height, width, 3), generator=generator, dtype=torch.uint8)
    return video, Scene(c2w, torch.tensor([[1.0, 1.0, 0.5, 0.5]]).repeat(n, 1), [f"clip {i}" for i in range(n)], 16.0,
                        video if source else None)


# ---- the interface ----

def test_scene_rows():
    _, s = scene(3)
    assert s[1:3].prompt == ["clip 1", "clip 2"] and s[1:3].c2w.shape == (2, 5, 4, 4)
    twice = s[[0, 0, 2]]
    assert twice.prompt == ["clip 0", "clip 0", "clip 2"] and torch.equal(twice.source[1], s.source[0])
    assert twice.source_c2w is None and twice.fps == 16.0


def test_micro_batches_agree_with_one_batch():
    video, s = scene(5)
    shifted = video.roll(1, 0)
    loaded, weights = rewards.load("sharpness=1,flicker=0.5,exposure=0,colour=2")
    assert weights == {"sharpness": 1, "flicker": 0.5, "exposure": 0, "colour": 2}
    whole, _ = rewards.score(loaded, shifted, s)
    for step in (1, 2, 3):
        parts, failures = rewards.score(loaded, shifted, s, micro_batch=step)
        assert not any(failures.values())
        for name in weights:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-7)


def test_one_failing_video_costs_one_member():
    video, s = scene(5)
    video[3] = 0

    def picky(videos, condition):
        if (videos.flatten(1).max(1).values == 0).any():
            raise RuntimeError("nothing to see")
        return {"picky": videos.float().mean((1, 2, 3, 4))}

    def quiet(videos, condition):
        return {"quiet": torch.where(videos.flatten(1).max(1).values == 0, math.nan, 1.0)}

    for step in (None, 1, 2, 4):
        scores, failures = rewards.score([picky, quiet], video, s, micro_batch=step)
        for name, why in (("picky", "nothing to see"), ("quiet", "NaN")):
            assert torch.isnan(scores[name]).tolist() == [False, False, False, True, False]
            assert list(failures[name]) == [3] and why in failures[name][3]


@pytest.mark.parametrize("bad, message", [
    (lambda videos, s: {"other": torch.zeros(len(videos))}, "expected scores named"),
    (lambda videos, s: {"f": torch.zeros(len(videos), 1)}, r"float tensor \(2,\)"),
    (lambda videos, s: {"f": torch.zeros(len(videos), dtype=torch.long)}, "int64"),
    (lambda videos, s: {"f": 1.0}, "found float"),
    (lambda videos, s: None, "found NoneType"),
    (lambda videos, s: {"f": torch.full((len(videos),), math.inf)}, "finite"),
    (lambda videos, s: undefined, "NameError"),
])
def test_a_wrong_reward_is_an_error_not_a_score(bad, message):
    video, s = scene(2)
    bad.names = ("f",)
    with pytest.raises(ValueError, match=message):
        rewards.score([bad], video, s)


def test_videos_must_be_uint8_rows_of_the_scene():
    video, s = scene(2)
    for wrong in (video.float(), video[:1], video[..., :2]):
        with pytest.raises(ValueError, match="expected uint8"):
            rewards.score([rewards.exposure], wrong, s)


def test_a_reward_of_ones_own(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("def bright(videos, scene):\n    return videos.float().mean((1, 2, 3, 4))\n"
                    "def named(videos, scene):\n    return {'named': videos.float().mean((1, 2, 3, 4))}\n"
                    "def short(videos):\n    return 1\n")
    video, s = scene(3)
    loaded, weights = rewards.load(f"exposure=1, {file}:bright=0.5, {file}:named=2")
    assert weights == {"exposure": 1, "bright": 0.5, "named": 2}
    scores, _ = rewards.score(loaded, video, s)
    assert torch.equal(scores["bright"], scores["named"]) and set(scores) == set(weights)
    for spec, error, message in ((f"{file}:missing=1", ValueError, "missing"), (f"{file}:short=1", ValueError, "short"),
                                 (f"{tmp_path}/none.py:f=1", FileNotFoundError, "none.py")):
        with pytest.raises(error, match=message):
            rewards.load(spec)


@pytest.mark.parametrize("spec, message", [
    ("", "at least one"), ("sharpnes=1", "did you mean sharpness"), ("sharpness", "name=weight"),
    ("sharpness=much", "number"), ("sharpness=nan", "number"), ("flicker=1,flicker=2", "once"),
    ("my.py:flicker=1", "another"),
])
def test_a_bad_choice_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(spec)


# ---- model-free rewards: closed forms ----

def test_the_source_itself_loses_nothing():
    video, s = scene(2)
    scores, _ = rewards.score(rewards.MODEL_FREE, video, s)
    assert all((scores[name] == 0).all() for name in ("sharpness", "flicker", "colour"))


def test_model_free_closed_forms():
    video, s = scene(2, frames=6)
    s.source = torch.full_like(video, 100)
    bright = torch.full_like(video, 100)
    bright[:, 1::2] += 51  # +-0.2 of full scale, frame by frame: second difference 0.4
    scores, _ = rewards.score(rewards.MODEL_FREE, bright, s)
    torch.testing.assert_close(scores["flicker"], torch.full((2,), -0.4), rtol=0, atol=1e-6)
    # mean 0.1 higher in three channels, deviation about 0.1 (unbiased) instead of 0
    count = 6 * 16 * 24
    expected = -math.sqrt(3 * 0.1 ** 2 + 3 * 0.1 ** 2 * count / (count - 1))
    torch.testing.assert_close(scores["colour"], torch.full((2,), expected), rtol=1e-5, atol=0)
    assert (scores["sharpness"] == 0).all()
    bright[:, :, :4] = 255
    bright[:, :, 4:8, :6] = 0
    scores, _ = rewards.score([rewards.exposure], bright, s)
    torch.testing.assert_close(scores["exposure"], torch.full((2,), -(0.25 + 0.25 * 0.25)))


def test_blur_and_grain_both_lose_sharpness():
    video, s = scene(1, height=32, width=32)
    smooth = torch.nn.functional.avg_pool2d(video[0].permute(0, 3, 1, 2).float(), 5, 1, 2).permute(0, 2, 3, 1)
    s.source = smooth[None].byte()
    blurred = torch.nn.functional.avg_pool2d(smooth.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)[None].byte()
    for worse in (blurred, video):
        assert rewards.sharpness(worse, s)["sharpness"] < -1


def test_no_source_is_an_error():
    video, s = scene(2, source=False)
    for reward in (rewards.sharpness, rewards.flicker, rewards.colour):
        with pytest.raises(ValueError, match="source"):
            rewards.score([reward], video, s)
