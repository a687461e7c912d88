"""Rewards: geometry on planted errors, model-free closed forms, scoring, a reward of one's own."""
import math
import os

import pytest
import rewards
import torch
from scenes import camera_path, put, scene

from plumbing import guard

close = torch.testing.assert_close


@pytest.mark.parametrize("step, asked", [(None, [4, 1, 1, 1, 1]), (3, [3, 1, 1, 1, 1]), (1, [1, 1, 1, 1])])
def test_an_estimator_is_asked_once_and_a_failing_video_costs_one_member(step, asked):
    """Cameras that end 0.3 m and 0.2 rad off, which counts 8 of 36; a video with nothing to see."""
    calls, (video, s) = [], scene(4, frames=9)
    video[1] = 0

    def off(videos, condition):
        c2w = condition.c2w.clone()
        c2w[:, -1] = c2w[:, -1] @ camera_path(2, 0.3, 0.2)[0, 1].float()
        return c2w

    def raises(videos, condition):
        calls.append(len(videos))
        if any(v.float().std() == 0 for v in videos):
            raise ValueError("no features")
        return off(videos, condition)

    def not_finite(videos, condition):
        c2w = off(videos, condition)
        c2w[videos.flatten(1).float().std(1) == 0, 3] = math.inf
        return c2w

    for estimator, why in ((raises, "no features"), (not_finite, "NaN")):
        loaded, weights = rewards.load("rot=2,trans=1", estimator=estimator)
        assert weights == {"rot": 2, "trans": 1}
        scores, failures = rewards.score(loaded, video, s, micro_batch=step)
        for name, error in ("trans", 0.3), ("rot", 0.2):
            assert torch.isnan(scores[name]).tolist() == [False, True, False, False]
            close(scores[name][[0, 2, 3]], torch.full((3,), -error * 8 / 36))
            assert list(failures[name]) == [1] and why in failures[name][1]
    assert calls == asked  # for both errors; of the failed batch, each alone
    loaded, _ = rewards.load("trans=1", estimator=off, schedule="uniform")
    close(rewards.score(loaded, video, s)[0]["trans"], torch.full((4,), -0.3 / 9))
    with pytest.raises(ValueError, match="estimator: expected c2w"):
        rewards.score([rewards.geometry(lambda videos, s: s.c2w[:, :5])], video, s)


def test_model_free_closed_forms():
    video, s = scene(2, frames=6)
    same, _ = rewards.score(rewards.MODEL_FREE, video, s)
    assert all((same[name] == 0).all() for name in ("sharpness", "flicker", "colour"))
    s.source = torch.full_like(video, 100)
    bright = torch.full_like(video, 100)
    bright[:, 1::2] += 51  # +-0.2 of full scale, frame by frame: second difference 0.4
    scores, _ = rewards.score(rewards.MODEL_FREE, bright, s)
    close(scores["flicker"], torch.full((2,), -0.4), rtol=0, atol=1e-6)
    # mean 0.1 higher in three channels, deviation about 0.1 (unbiased) instead of 0
    expected = -math.sqrt(3 * 0.1 ** 2 * (1 + 2304 / 2303))
    close(scores["colour"], torch.full((2,), expected), rtol=1e-5, atol=0)
    s.source, calm = bright, s.source
    assert (rewards.flicker(calm, s)["flicker"] == 0).all()  # less than the source's earns nothing
    bright[:, :, :4] = 255
    bright[:, :, 4:8, :6] = 0
    bright[:, :, 8:] = torch.tensor([255, 0, 100], dtype=torch.uint8)  # a colour is neither
    close(rewards.exposure(bright, s)["exposure"], torch.full((2,), -(0.25 + 0.25 * 0.25)))


def test_blur_and_grain_both_lose_sharpness():
    def blur(x):
        return torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)
    grain, s = scene(1, height=32, width=32)
    s.source = blur(grain[0].float())[None].byte()
    for worse in (blur(s.source[0].float())[None].byte(), grain):
        assert rewards.sharpness(worse, s)["sharpness"] < -1


def test_micro_batches_agree_with_one_batch():
    video, s = scene(5)
    loaded, weights = rewards.load("sharpness=1,flicker=0.5,exposure=0,colour=2")
    assert weights == {"sharpness": 1, "flicker": 0.5, "exposure": 0, "colour": 2}
    whole, _ = rewards.score(loaded, video.roll(1, 0), s)
    parts, failures = rewards.score(loaded, video.roll(1, 0), s, micro_batch=2)
    for name in weights:
        close(parts[name], whole[name], rtol=1e-6, atol=1e-7)
        assert not failures[name]
    twice = s[[0, 0, 2]]
    assert twice.prompt == ["clip 0", "clip 0", "clip 2"] and s[1:3].prompt == ["clip 1", "clip 2"]
    assert torch.equal(twice.source, video[[0, 0, 2]]) and twice.source_c2w is None


def own(tmp_path, code, spec="f=1"):
    """The rewards of a file, which needs no suffix."""
    file = put(tmp_path / "own.txt", "import os, random, sys, numpy as np, torch\n" + code)
    return rewards.load(f"{file}:{spec}")


def test_a_reward_of_ones_own(tmp_path):
    code = ("def f(videos, scene):\n    return videos.float().mean((1, 2, 3, 4))\n"
            "def g(videos, scene):\n    luck = random.random() + np.random.rand()\n"
            "    return {'g': torch.rand(len(videos)) + luck}\n")
    loaded, weights = own(tmp_path, code, f"f=0.5, {tmp_path}/own.txt:g=2, exposure=1")
    assert weights == {"exposure": 1, "f": 0.5, "g": 2}
    (video, s), draws = scene(3), []
    for key in ((0, 1), (0, 1), (0, 2)):
        guard.seed_everything(*key)
        scores, _ = rewards.score(loaded, video, s)
        draws.append(scores["g"].tolist())
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(scores["f"], video.float().mean((1, 2, 3, 4)))


CHANGED = "changed its videos or scene in place"


@pytest.mark.parametrize("line, message", [
    ("return {'other': torch.zeros(2)}", "expected a tensor, or tensors named"),
    ("return {'f': torch.zeros(2, 1)}", "float scores"), ("return torch.zeros(2).long()", "int64"),
    ("return torch.full((2,), 1e300, dtype=torch.float64)", "finite"), ("undefined", "NameError"),
    ("sys.exit(0)", "SystemExit: 0"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("videos.numpy()[:] = 0", CHANGED), ("scene.source.numpy()[0] = 0", CHANGED)])
def test_a_wrong_reward_is_an_error_not_a_score(tmp_path, line, message):
    """Whatever it does to the copies that it gets, the videos and the scene stay as they are."""
    video, s = scene(2)
    before = video.clone(), s.source.clone(), s.c2w.clone()
    loaded, _ = own(tmp_path, f"def f(videos, scene):\n    {line}\n    return torch.zeros(2)\n")
    with pytest.raises(ValueError, match=f"reward f: .*{message}"):
        rewards.score(loaded, video, s)
    assert all(torch.equal(a, b) for a, b in zip(before, (video, s.source, s.c2w)))


@pytest.mark.parametrize("call, arguments, message", [
    *((rewards.load, (spec,), message) for spec, message in (
        ("", "at least one"), ("sharpnes=1", "mean sharpness"), ("flicker=1,flicker=2", "once"),
        ("my.py:flicker=1", "another"), ("none.py:f=1", "none.py: no such file"),
        (f"{os.__file__}:missing=1", "function missing.* found none"),
        (f"{os.__file__}:fsencode=1", r"found fsencode\(filename\)"))),
    (rewards.score, ([rewards.exposure], scene(3)[0], scene(2)[1]), "expected uint8"),
    (rewards.score, ([rewards.flicker], *scene(2, source=False)), "source")])
def test_what_cannot_be_scored_is_refused(call, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(*arguments)


def test_global_switches_are_set_back_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded, _ = own(tmp_path, """
torch.set_default_dtype(torch.float64)
def f(videos, scene):
    torch.set_default_device("meta"); os.chdir("/"); os.environ["ADDED"] = "1"
    return torch.zeros(len(videos), device="cpu", dtype=torch.float32)
""")
    rewards.score(loaded, *scene(2))
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
    assert os.getcwd() == str(tmp_path) and "ADDED" not in os.environ
    said = capsys.readouterr().err
    for what in "torch's default dtype", "torch's default device", "the working directory", "the environment":
        assert said.count(f"changed {what}; set back") == 1


def test_what_a_file_imports_belongs_to_its_code(tmp_path, monkeypatch):
    """Dataclasses work; a helper's helper counts; python's own modules do not."""
    monkeypatch.syspath_prepend(tmp_path)
    put(tmp_path / "helper_a.py", "import helper_b\nimport math\n")
    put(tmp_path / "helper_b.py", "SCALE = 2.0\n")
    put(tmp_path / "own.txt", """from __future__ import annotations
import dataclasses, torch
from helper_a import helper_b
@dataclasses.dataclass
class Options:
    scale: float = helper_b.SCALE
def f(videos, scene):
    return torch.full((len(videos),), Options().scale)
""")
    load = lambda: rewards.load(f"{tmp_path}/own.txt:f=1")[0][0]
    first = load()
    assert rewards.score([first], *scene(2))[0]["f"].tolist() == [2, 2]
    again = load()
    put(tmp_path / "helper_b.py", "SCALE = 3.0\n")
    assert first.code == again.code != load().code and len(first.code) < 1000
