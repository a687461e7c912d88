"""What authors of rewards get: scene.cameras, and `evaluate.py try`."""
import math

import pytest
import torch

import evaluate
import rewards
import trajectories
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
    estimator = lambda videos, scene=None: cameras(videos)[0]
    estimator.cameras = cameras
    return estimator


def own_file(folder, body="return scene.cameras.c2w[:, -1, 0, 3]"):
    (folder / "own.py").write_text(f"def own(videos, scene):\n    {body}\n")
    return folder / "own.py"


def test_statistics_of_a_reward_by_hand():
    """Two groups of two: deviations inside 1 and 1, means 2 apart; others are twice it, and minus it."""
    x = torch.tensor([[0.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    offset = torch.tensor([[5.0], [-9.0]])  # between groups only: no correlation inside them
    found = spread_and_correlation({"x": x, "twice": 2 * x + offset, "minus": -x, "none": 0 * x}, "x")
    assert [found[key] for key in ("mean", "inside", "between", "failed")] == [2, 1, 1, 0]
    assert found["correlation"] == pytest.approx({"twice": 1, "minus": -1, "none": math.nan}, nan_ok=True)
    x[0, 0] = math.nan
    found = spread_and_correlation({"x": x, "y": x.nan_to_num()}, "x")
    assert found["failed"] == 1 and found["inside"] == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize("body, n, batch, asked, own, trans", [
    ("return scene.cameras.c2w[:, -1, 0, 3]", 4, 3, [3, 1], [0, 4, 8, 12], True),
    ("c2w, lens = scene[[1, 0]].cameras; c2w.zero_(); return lens[:, 0].float()", 2, None, [2],
     [1.5, 0.5], True),
    ("return videos.float().mean((1, 2, 3, 4))", 2, None, [], [0, 1], False)])
def test_cameras_are_estimated_once_for_all_who_ask(tmp_path, body, n, batch, asked, own, trans):
    """Once a micro-batch, relative to the first frame; each reward has its own; or not at all."""
    counted = []
    spec = f"{own_file(tmp_path, body)}:own=1,exposure=0" + ",trans=1" * trans
    loaded, _ = rewards.load(spec, estimator=looking(counted))
    videos = torch.arange(n).view(n, 1, 1, 1, 1).expand(-1, T, 8, 8, 3).byte()
    scores, failures = rewards.score(loaded, videos, scene(n), batch)
    assert counted == asked and scores["own"].tolist() == own and not failures["own"]
    if trans:
        one = float((torch.as_tensor(trajectories.frame_weights(T, "linear")) * torch.arange(T)).sum())
        assert scores["trans"].tolist() == pytest.approx([-x * one for x in range(n)], rel=1e-5)


@pytest.mark.parametrize("body, words", [
    ("return 0 * scene.cameras.c2w[:, -1, 0, 3]", "nothing can be learnt from it"),
    ("raise ValueError('too dark')", "6 of 6 videos\n    ValueError: too dark")])
def test_try_in_the_toy(tmp_path, capsys, body, words):
    """Beside the run's rewards and those that need no model; it says what is wrong with a reward."""
    small = "--conditions=2", "--members=3", "--steps=2", "--first=1", "--batches=1"
    argv = ["try", f"{own_file(tmp_path, body)}:own", *small]
    settings, function = choose_command(evaluate.COMMANDS, argv)
    found = function(settings)
    assert words in capsys.readouterr().out and ("cameras" in body) == (found["failed"] == 0)
    assert found["correlation"].keys() == {"trans", "rot", *(f.__name__ for f in rewards.MODEL_FREE)}
    assert with_others("trans=1,my.py:f=2", "my.py:f", "f").count("my.py") == 1
    # a world of captions has no source that a reward could compare with
    free = with_others("vq=1", "my.py:f", "f", "captions")
    assert "flicker" not in free and "flicker" in with_others("vq=1", "my.py:f", "f")
