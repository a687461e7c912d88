"""scene.cameras, `evaluate.py try`, and the samples of a run: what authors of rewards and watchers get."""
import json
import math

import numpy as np
import pytest
import torch

import evaluate
import rewards
import trajectories
from data.video import read_video
from data.world import World
from evaluation.generate import demonstration
from evaluation.trial import spread_and_correlation, with_others
from plumbing.settings import choose_command
from rewards import Scene

T = 5


def scene(n, **more):
    return Scene(torch.eye(4).repeat(n, T, 1, 1), torch.ones(n, 4), ["a room"] * n, 4.0, **more)


def looking(asked):
    """An estimator that says of every video how bright it is: metres to the right at every frame."""
    def cameras(videos):
        asked.append(len(videos))
        c2w = torch.eye(4).repeat(len(videos), T, 1, 1)
        c2w[:, :, 0, 3] = videos.float().mean((1, 2, 3, 4))[:, None] * torch.arange(T) + 7
        return c2w, torch.arange(len(videos))[:, None].expand(-1, 4) + 0.5

    def estimator(videos, scene=None):
        return cameras(videos)[0]
    estimator.cameras = cameras
    return estimator


def own_file(tmp_path, body="return scene.cameras.c2w[:, -1, 0, 3]"):
    (tmp_path / "own.py").write_text(f"def own(videos, scene):\n    {body}\n")
    return tmp_path / "own.py"


# ---- scene.cameras ----

def test_cameras_are_estimated_once_for_all_rewards(tmp_path):
    asked = []
    loaded, _ = rewards.load(f"trans=1,{own_file(tmp_path)}:own=1,exposure=0", estimator=looking(asked))
    videos = torch.arange(4).view(4, 1, 1, 1, 1).expand(-1, T, 8, 8, 3).byte()
    scores, failures = rewards.score(loaded, videos, scene(4), 3)
    assert asked == [3, 1]  # a micro-batch of three and one of one, not twice each
    assert scores["own"].tolist() == [0, 4, 8, 12]  # relative to the first frame, which stands at 7
    weights = trajectories.frame_weights(T, "linear")
    wanted = [-brightness * float((torch.as_tensor(weights) * torch.arange(T)).sum()) for brightness in range(4)]
    assert scores["trans"].tolist() == pytest.approx(wanted, rel=1e-5) and not failures["own"]


def test_cameras_are_asked_for_by_those_who_need_them_only(tmp_path):
    asked = []
    loaded, _ = rewards.load(f"{own_file(tmp_path, 'return videos.float().mean((1, 2, 3, 4))')}:own=1",
                             estimator=looking(asked))
    rewards.score(loaded, torch.zeros(2, T, 8, 8, 3, dtype=torch.uint8), scene(2))
    assert asked == []
    loaded, _ = rewards.load(f"{own_file(tmp_path)}:own=1", tmp_path)  # MapAnything, whose files are not there
    with pytest.raises(ValueError, match="reward own: FileNotFoundError: .*map-anything"):
        rewards.score(loaded, torch.zeros(2, T, 8, 8, 3, dtype=torch.uint8), scene(2))
    with pytest.raises(TypeError, match="scene.cameras"):
        scene(2).cameras


def test_rows_of_a_scene_have_rows_of_its_cameras(tmp_path):
    body = "c2w, lens = scene[[1, 0]].cameras; assert c2w.shape[0] == 2; c2w.zero_(); return lens[:, 0].float()"
    loaded, _ = rewards.load(f"{own_file(tmp_path, body)}:own=1,trans=0", estimator=looking([]))
    scores, _ = rewards.score(loaded, torch.full((2, T, 8, 8, 3), 5, dtype=torch.uint8), scene(2))
    assert scores["own"].tolist() == [1.5, 0.5]
    assert (scores["trans"] < 0).all()  # what one reward does to its cameras is not another's


def test_an_estimator_without_a_lens_has_the_scenes(tmp_path):
    loaded, _ = rewards.load(f"{own_file(tmp_path, 'return scene.cameras.intrinsics[:, 0]')}:own=1",
                             estimator=lambda videos, scene: scene.c2w)
    assert rewards.score(loaded, torch.zeros(2, T, 8, 8, 3, dtype=torch.uint8), scene(2))[0]["own"].tolist() == [1, 1]


# ---- try ----

def test_statistics_of_a_reward_by_hand():
    """Two groups of two: deviations inside 1 and 1, means 2 apart; another reward is twice it, one minus it."""
    x = torch.tensor([[0.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    offset = torch.tensor([[5.0], [-9.0]])  # what differs between groups only is no correlation inside them
    found = spread_and_correlation({"x": x, "twice": 2 * x + offset, "minus": -x, "none": 0 * x}, "x")
    assert (found["mean"], found["inside"], found["between"], found["failed"]) == (2, 1, 1, 0)
    assert found["correlation"] == {"twice": pytest.approx(1), "minus": pytest.approx(-1),
                                    "none": pytest.approx(math.nan, nan_ok=True)}
    x[0, 0] = math.nan
    found = spread_and_correlation({"x": x, "y": x.nan_to_num()}, "x")
    assert found["failed"] == 1 and found["inside"] == pytest.approx((2 / 3) ** 0.5)


def test_the_reward_on_trial_joins_the_others():
    assert with_others("trans=1,sharpness=0.01", "my.py:f", "f") == (
        "trans=1,sharpness=0.01,flicker=0,exposure=0,colour=0,my.py:f=0")
    assert with_others("trans=1,my.py:f=2", "my.py:f", "f").count("my.py") == 1


def run(*argv):
    settings, function = choose_command(evaluate.COMMANDS, ["try", *argv])
    return function(settings)


SMALL = ("--conditions=2", "--members=3", "--steps=2", "--first=1", "--batches=1")


def test_try_in_the_toy(tmp_path, capsys):
    found = run(f"{own_file(tmp_path)}:own", *SMALL)
    printed = capsys.readouterr().out
    assert set(found["correlation"]) == {"trans", "rot", *(f.__name__ for f in rewards.MODEL_FREE)}
    assert found["failed"] == 0 and found["inside"] > 0 and "spread inside a group" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("body, words", [
    ("return videos.new_zeros(len(videos)).float()", "nothing can be learnt from it"),
    ("raise ValueError('too dark')", "6 of 6 videos\n    ValueError: too dark")])
def test_try_says_what_is_wrong_with_a_reward(tmp_path, capsys, body, words):
    run(f"{own_file(tmp_path, body)}:own", *SMALL)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("argv, why", [
    ((), "expected a reward"), (("none.py:f",), "none.py: no such file"), (("brightness",), "expected name=weight"),
    (("exposure", "--batches=0"), "batches"), (("exposure", "--conditons=2"), "did you mean conditions")])
def test_trials_that_cannot_be(argv, why):
    with pytest.raises((ValueError, OSError), match=why):
        run(*argv)


# ---- samples of a run ----

@pytest.mark.parametrize("knows", [True, False])
def test_samples_show_the_true_view_and_both_paths(tmp_path, monkeypatch, knows):
    """source | true view | base | now, where the world knows the true view; base and now with two paths."""
    def generated(*args, **more):
        return torch.full((1, T, 192, 192, 3), 60, dtype=torch.uint8)

    def draw(numbers, rngs):
        return None, scene(len(numbers), source=torch.full((len(numbers), T, 192, 192, 3), 30).byte())

    def true_view(numbers, c2w):
        return torch.full((len(numbers), T, 192, 192, 3), 120).byte()

    monkeypatch.setattr("evaluation.generate.generate", generated)
    loaded, weights = rewards.load("trans=1", estimator=looking([]))
    world = World(None, None, None, 1, draw, None, loaded, weights, {}, true_view if knows else None)
    config, _ = choose_command(evaluate.COMMANDS, ["try", "--world=clips"])
    show = demonstration(world, config)
    show(tmp_path / "samples/iteration_000010.mp4")
    names = json.loads((tmp_path / "samples/panels.json").read_text())
    assert names == ["source", *["true view"] * knows, "base", "now"]
    video, fps = read_video(tmp_path / "samples/iteration_000010.mp4")
    assert fps == 4 and video.shape[2] == len(names) * 196 - 4
    levels = video[2, 60, 40::196].mean(-1)
    assert np.abs(levels - [30, *[120] * knows, 60, 60]).max() < 4
    inset = video[-1, -62:, -62:].astype(int)
    assert (inset.min(-1) > 180).any() and (inset[..., 0] - inset[..., 2] > 60).any()  # white, and orange
