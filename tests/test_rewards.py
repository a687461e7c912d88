"""Rewards: scoring rules, geometry on planted errors, model-free closed forms."""
import math
import os

import numpy as np
import pytest
import torch
from scenes import camera_path, scene

import rewards
from plumbing import guard
from rewards import Scene


# ---- the interface ----

def test_scene_rows():
    _, s = scene(3)
    assert s[1:3].prompt == ["clip 1", "clip 2"] and s[1:3].c2w.shape == (2, 5, 4, 4)
    twice = s[[0, 0, 2]]
    assert twice.prompt == ["clip 0", "clip 0", "clip 2"] and torch.equal(twice.source[1], s.source[0])
    assert twice.source_c2w is None and twice.fps.tolist() == [16.0] * 3


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
    (lambda videos, s: {"other": torch.zeros(len(videos))}, "expected a tensor, or tensors named"),
    (lambda videos, s: {"f": torch.zeros(len(videos), 1)}, r"float scores \(2,\)"),
    (lambda videos, s: {"f": torch.zeros(len(videos), dtype=torch.long)}, "int64"),
    (lambda videos, s: {"f": 1.0}, "found float"),
    (lambda videos, s: None, "found NoneType"),
    (lambda videos, s: {"f": torch.full((len(videos),), math.inf)}, "finite"),
    (lambda videos, s: {"f": torch.full((len(videos),), 1e300, dtype=torch.float64)}, "finite"),
    (lambda videos, s: undefined, "NameError"),
    (lambda videos, s: videos.zero_().float().mean((1, 2, 3, 4)), "changed its videos or scene in place"),
    (lambda videos, s: s.c2w.mul_(2).mean((1, 2, 3)), "changed its videos or scene in place"),
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
    for spec, error, message in ((f"{file}:missing=1", ValueError, "function missing.* found none"),
                                 (f"{file}:short=1", ValueError, r"found short\(videos\)"),
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
    def blur(x):
        return torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)

    grain, s = scene(1, height=32, width=32)
    smooth = blur(grain[0].float())
    s.source = smooth[None].byte()
    for worse in (blur(smooth)[None].byte(), grain):
        assert rewards.sharpness(worse, s)["sharpness"] < -1


def test_no_source_is_an_error():
    video, s = scene(2, source=False)
    for reward in (rewards.sharpness, rewards.flicker, rewards.colour):
        with pytest.raises(ValueError, match="source"):
            rewards.score([reward], video, s)


# ---- geometry: planted errors ----

def geometry_of(pred, target, **options):
    n, frames = target.shape[:2]
    videos = torch.zeros(n, frames, 4, 4, 3, dtype=torch.uint8)
    s = Scene(target, torch.ones(n, 4), [""] * n, 16.0)
    return rewards.score([rewards.geometry(lambda videos, scene: pred, **options)], videos, s)[0]


def test_no_error_costs_nothing_in_any_world_frame():
    target = camera_path()
    scores = geometry_of(target.clone(), target)
    assert scores["trans"] == 0 and scores["rot"] == 0
    world = camera_path(2, 3.0, 1.0)[:, 1:]
    scores = geometry_of(world @ target, target)
    assert scores["trans"].abs() < 1e-7 and scores["rot"].abs() < 1e-7


def test_half_the_size_is_penalised():
    target = camera_path(yaw=0)
    pred = target.clone()
    pred[..., :3, 3] /= 2
    weights = torch.arange(9) / torch.arange(9).sum()
    expected = -(weights * 0.05 * torch.arange(9)).sum()  # half of 0.1 m a frame is missing
    scores = geometry_of(pred, target)
    torch.testing.assert_close(scores["trans"], expected[None], rtol=1e-6, atol=0)
    assert scores["rot"] == 0


def test_late_drift_costs_more_than_early():
    target = camera_path()

    def drift(frame):
        pred = target.clone()
        pred[:, frame, 1, 3] += 0.3
        pred[:, frame, :3, :3] = pred[:, frame, :3, :3] @ camera_path(2, 0, 0.2)[0, 1, :3, :3]
        return geometry_of(pred, target)
    for name, error in (("trans", 0.3), ("rot", 0.2)):
        costs = [drift(frame)[name].item() for frame in range(1, 9)]
        np.testing.assert_allclose(costs, [-error * i / 36 for i in range(1, 9)], rtol=1e-5)
    pred = target.clone()
    pred[:, 1, 1, 3] += 0.3
    uniform = geometry_of(pred, target, schedule="uniform")
    torch.testing.assert_close(uniform["trans"], torch.tensor([-0.3 / 9]))


def test_an_estimator_that_fails_is_reported_not_scored():
    video, s = scene(4, frames=9)
    s.c2w = camera_path().repeat(4, 1, 1, 1)
    video[1] = 0  # nothing to see

    def raises(videos, condition):
        if any(v.float().std() == 0 for v in videos):
            raise ValueError("no features")
        return condition.c2w

    def not_finite(videos, condition):
        c2w = condition.c2w.clone()
        c2w[videos.flatten(1).float().std(1) == 0, 3] = math.inf
        return c2w

    for estimator in (raises, not_finite):
        loaded, _ = rewards.load("trans=1,rot=1", estimator=estimator)
        scores, failures = rewards.score(loaded, video, s, micro_batch=3)
        for name in ("trans", "rot"):
            assert torch.isnan(scores[name]).tolist() == [False, True, False, False]
            assert (scores[name][[0, 2, 3]] == 0).all() and list(failures[name]) == [1]
    with pytest.raises(ValueError, match="estimator: expected c2w"):
        rewards.score([rewards.geometry(lambda videos, condition: condition.c2w[:, :5])], video, s)
    with pytest.raises(ValueError, match="weights"):
        rewards.load("trans=1", estimator=raises, schedule="sideways")


def test_one_pass_serves_both_errors():
    calls = []

    def estimator(videos, condition):
        calls.append(len(videos))
        return condition.c2w

    video, s = scene(3)
    loaded, weights = rewards.load("rot=2,trans=1", estimator=estimator)
    rewards.score(loaded, video, s)
    assert calls == [3] and weights == {"rot": 2, "trans": 1}
    loaded, _ = rewards.load("rot=2", estimator=estimator)
    assert set(rewards.score(loaded, video, s)[0]) == {"rot"}


# ---- a reward of a user's own changes nothing outside ----

def own(tmp_path, code):
    (tmp_path / "own.py").write_text("import os, sys, numpy as np, torch\n" + code)
    return rewards.load(f"{tmp_path}/own.py:f=1")[0]


@pytest.mark.parametrize("line, message", [
    ("videos.numpy()[:] = 0", "changed its videos or scene in place"),
    ("videos.data.zero_()", "changed its videos or scene in place"),
    ("scene.source.numpy()[0] = 0", "changed its videos or scene in place"),
    ("sys.exit(0)", "SystemExit: 0"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise GeneratorExit", "GeneratorExit"), ("os.no_such_name", "AttributeError"),
    ("return {1: 2, 'x': 3}", r"found \['1', 'x'\]"),
    ("return torch.zeros(2, device='meta')", "expected float scores"),
])
def test_a_reward_that_does_harm_is_an_error(tmp_path, line, message):
    video, s = scene(2)
    before = video.clone(), s.source.clone(), s.c2w.clone()
    loaded = own(tmp_path, f"def f(videos, scene):\n    {line}\n    return torch.zeros(len(videos))\n")
    with pytest.raises(ValueError, match=f"reward f: .*{message}"):
        rewards.score(loaded, video, s)
    assert all(torch.equal(a, b) for a, b in zip(before, (video, s.source, s.c2w)))


def test_global_switches_are_set_back_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.chdir(tmp_path)
    code = """
torch.set_default_dtype(torch.float64)
def f(videos, scene):
    torch.set_default_device("meta"); torch.set_grad_enabled(True); np.seterr(all="raise")
    os.chdir("/"); os.environ["ADDED"] = "1"; del os.environ["KEPT"]
    return torch.zeros(len(videos), device="cpu", dtype=torch.float32)
"""
    video, s = scene(2)
    threads, errors = torch.get_num_threads(), np.geterr()
    with torch.no_grad():
        rewards.score(own(tmp_path, code), video, s)
        assert not torch.is_grad_enabled()
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
    assert os.getcwd() == str(tmp_path) and np.geterr() == errors and torch.get_num_threads() == threads
    assert os.environ["KEPT"] == "1" and "ADDED" not in os.environ
    said = capsys.readouterr().err
    assert "own.py changed torch's default dtype; set back" in said
    for switch in ("torch's default device", "torch's grad mode", "numpy's error handling",
                   "the working directory", "the environment"):
        assert said.count(f"warning: reward f changed {switch}; set back") == 1


def test_what_a_file_imports_belongs_to_its_code(tmp_path, monkeypatch):
    """Postponed annotations and dataclasses work; a helper's helper counts; python's own modules do not."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_a.py").write_text("import helper_b\nfrom os import path\nimport math\n")
    (tmp_path / "helper_b.py").write_text("SCALE = 2.0\n")
    code = """from __future__ import annotations
import dataclasses, torch
from helper_a import helper_b
@dataclasses.dataclass
class Options:
    scale: float = helper_b.SCALE
def f(videos, scene):
    return torch.full((len(videos),), Options().scale)
"""
    (tmp_path / "own.txt").write_text(code)  # whatever it is called
    first, = rewards.load(f"{tmp_path}/own.txt:f=1")[0]
    video, s = scene(2)
    assert rewards.score([first], video, s)[0]["f"].tolist() == [2, 2]
    again, = rewards.load(f"{tmp_path}/own.txt:f=1")[0]
    (tmp_path / "helper_b.py").write_text("SCALE = 3.0\n")
    changed, = rewards.load(f"{tmp_path}/own.txt:f=1")[0]
    assert first.code == again.code != changed.code and len(first.code) < 1000


def test_the_same_luck_for_a_reward_that_draws(tmp_path):
    code = "import random\ndef f(videos, scene):\n" \
           "    return torch.rand(len(videos)) + random.random() + np.random.rand()\n"
    loaded, (video, s) = own(tmp_path, code), scene(2)
    draws = []
    for key in ((0, 1), (0, 1), (0, 2), (1, 1)):
        guard.seed_everything(*key)
        draws.append(rewards.score(loaded, video, s)[0]["f"].tolist())
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0] != draws[3]
