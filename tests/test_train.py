"""The loop: two ranks equal one process, exact resume, interruption, what is no number."""
import json
import os
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from scenes import as_ranks

import model
import train
from data.world import clip_numbers
from grpo import policy_loss
from plumbing import checkpoint, ranks
from plumbing.settings import parse
from toy import world as toy_world

SMALL = ["--conditions=2", "--members=2", "--size=1", "--sample_every=1000", "--save_every=1", "--rooms=0",
         "--validate=0", "--keep=9", "--rewards=trans=1,rot=1,sharpness=0.1",
         f"--weights={ROOT / 'toy/weights'}"]


def main(out, *args, program=train.main):
    """train.main in a small world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_world, "TRAIN_ROOMS", 4)
        program([*SMALL, f"--out={out}", *args])


def log_of(out, loss="loss"):
    """Lines of log.jsonl without seconds; those of iterations, not the notes on the weights."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if "seconds" not in name} for line in lines if loss in line]


def state_of(out, iteration=3):
    """A checkpoint's weights and moments, bytes."""
    folder = out / f"iteration_{iteration:06d}"
    return [(folder / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Three iterations, undisturbed."""
    out = tmp_path_factory.mktemp("straight")
    main(out, "--iterations=3")
    return out


# ---- the method ----

def one_by_one(out, *args):
    """`main`, whose every condition is prepared alone."""
    prepare = model.DiT.prepare

    def each(self, condition):
        parts = [prepare(self, condition[i:i + 1]) for i in range(len(condition))]
        return parts[0].cat(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.DiT, "prepare", each)
        main(out, *args)


def test_two_ranks_equal_one_process(tmp_path, capsys):
    """The largest group deviation (Eq. 5) included, and windows that differ within a rank. Every call is
    of one condition, the reward goes in steps: batches of another size round otherwise."""
    (tmp_path / "reward.py").write_text("def steps(videos, scene):\n"
                                        "    return (videos.long().sum((1, 2, 3, 4)) // 300).float()\n")
    args = ["--iterations=1", "--micro_batch=2", "--reward_batch=2", "--share_prefix=False", "--conditions=4",
            "--seed=3", f"--rewards={tmp_path}/reward.py:steps=1", "--window_per_condition", "--first=4"]
    one_by_one(tmp_path / "one", *args)
    said = as_ranks(partial(one_by_one, tmp_path / "two", *args), tmp_path / "said")
    for text in capsys.readouterr().out, said:
        assert text.count("on-policy ratio 1 + 0e+00, as it should be") == 1
    logs, gradients = [], []
    for out in tmp_path / "one", tmp_path / "two":
        moments = load_file(out / f"iteration_000001/{checkpoint.MOMENTS}")
        gradients.append(torch.cat([x.flatten() for name, x in moments.items() if "exp_avg." in name]))
        logs += log_of(out)
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()
    assert logs[0]["window"] == logs[1]["window"] and len(set(map(tuple, logs[0]["window"]))) > 1
    assert logs[1] == {name: pytest.approx(x, rel=1e-6, abs=1e-9) if isinstance(x, float) else x
                       for name, x in logs[0].items()}


def test_every_clip_once_an_epoch():
    numbers = [n for iteration in range(7) for n in clip_numbers(iteration, 4, 14, 0)]
    assert sorted(numbers[:14]) == sorted(numbers[14:]) == list(range(14)) and numbers[:14] != numbers[14:]
    assert clip_numbers(3, 4, 14, 0) == numbers[12:16] != clip_numbers(3, 4, 14, 1)


@pytest.mark.parametrize("eps, same", [(1e-15, True), (1e-8, False)])
def test_the_objectives_scale_does_not_matter(tmp_path, monkeypatch, capsys, eps, same):
    """Log-probs are means over latent elements: a large video's gradient is a million times smaller."""
    base = load_file(ROOT / "toy/weights/toy_base.safetensors")
    steps = []
    logs = []
    for scale in (1.0, 1e-6):
        out = tmp_path / str(scale)

        def scaled(*args, scale=scale, **options):
            loss, stats = policy_loss(*args, **options)
            return loss * scale, stats
        monkeypatch.setattr(train, "policy_loss", scaled)
        main(out, "--iterations=3", f"--eps={eps}", "--weight_decay=0")
        weights = load_file(out / "iteration_000003" / checkpoint.WEIGHTS)
        steps.append(torch.cat([(x - base[name].float()).flatten() for name, x in weights.items()]))
        logs.append(log_of(out)[0])
    off = float((steps[1] - steps[0]).norm() / steps[0].norm())  # of elements whose gradient is next to nothing
    assert off < 0.03 if same else off > 0.3
    assert logs[0]["update_rms"] == pytest.approx(1, abs=0.02) and (logs[1]["update_rms"] > 0.9) == same
    assert logs[1]["grad_rms"] == pytest.approx(1e-6 * logs[0]["grad_rms"], rel=1e-4)
    assert capsys.readouterr().err.count("below 10 times eps") == (0 if same else 1)


def test_an_outlier_is_cut_to_a_multiple_of_the_median_at_any_scale():
    for scale in 1.0, 1e-9:
        p, norms = torch.nn.Parameter(torch.zeros(2)), []
        for norm in (1, 2, 3, 2, 2, 100, 7):
            p.grad = torch.tensor([0.6, 0.8]) * norm * scale
            assert float(train.clip_gradient([p], norms, 3.0)) == pytest.approx(norm * scale, rel=1e-5)
            assert float(p.grad.norm()) == pytest.approx(min(norm, 6) * scale, rel=1e-5)


def test_validation_is_of_fixed_conditions_and_kl_against_the_base(tmp_path):
    """Both tell whether the weights move: validation at the same iterations, and after the last."""
    log = {}
    for lr in "1e-3", "1e-12":
        main(tmp_path / lr, "--iterations=3", "--validate=3", "--sample_every=2", f"--lr={lr}", "--kl=1e-4")
        log[lr] = [{r["iteration"]: r[name] for r in log_of(tmp_path / lr, name)}
                   for name in ("valid/trans", "kl")]
    moves, kl = log["1e-3"]
    assert list(moves) == [0, 2, 3] and moves[3] != moves[0] and kl[0] == 0 < 1e-9 < kl[1] < kl[2]
    still, kl = log["1e-12"]
    assert list(still.values()) == pytest.approx([moves[0]] * 3, rel=1e-3) and kl[2] < 1e-9


# ---- a run goes on as if nothing had happened ----

@pytest.mark.parametrize("how", ["killed", "damaged"])
def test_resume_is_bitwise(straight, tmp_path, capsys, monkeypatch, how):
    """From the last whole checkpoint, after a kill and after damage; a complete run says so, makes the
    sample that a kill may have cost it, and is judged."""
    out = shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(out / "iteration_000003")
    if how == "killed":
        shutil.rmtree(out / "iteration_000002")
    else:
        (out / "iteration_000002" / checkpoint.WEIGHTS).write_bytes(b"half")
    main(out, "--iterations=3")
    said = capsys.readouterr()
    assert state_of(out) == state_of(straight) and log_of(out) == log_of(straight)
    assert "1 of 3 iterations done" in said.out
    assert ("going on from iteration_000001" in said.err) == (how == "damaged")
    sample = out / "samples/iteration_000003.mp4"
    sample.unlink()
    judged = []
    monkeypatch.setattr(train, "evaluate_toy", judged.append)
    main(out, "--iterations=3", "--rooms=1")
    assert "3 of 3 iterations done" in capsys.readouterr().out and sample.exists()
    assert log_of(out) == log_of(straight) and [toy.ckpt for toy in judged] == [str(out)]


def test_a_signal_never_saves_half_an_update(straight, tmp_path, monkeypatch, capsys):
    """SIGTERM amid the second step: its line is written, it is saved, exit code 75; then the run goes on."""
    step, count, codes = torch.optim.AdamW.step, [], []

    def interrupted(self, *args):
        count.append(1)
        step(self, *args)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    for stream in ("stdout", "stderr"):  # run_to_end puts its own in their place
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    rest = "--iterations=3", "--save_every=100"
    main(tmp_path, *rest, program=lambda argv: ranks.run_to_end(train.main, argv))
    assert codes == [75] and "stopped after 2 iterations, saved;" in capsys.readouterr().err
    assert [f.name for f in tmp_path.glob("iteration_*")] == ["iteration_000002"]
    main(tmp_path, *rest)
    assert log_of(tmp_path) == log_of(straight)
    moments, wanted = (load_file(out / f"iteration_000003/{checkpoint.MOMENTS}")
                       for out in (tmp_path, straight))
    assert all(torch.equal(moments[k], wanted[k]) for k in wanted)


# ---- what is no number ----

REWARD = """
import itertools
turns = itertools.count()

def grumpy(videos, scene):
    turn = next(turns) % 4 if len(videos) == 1 else 0  # of four videos, one raises and one gets no score
    if turn == 0:
        raise ValueError("I do not like it")
    return videos.float().mean((1, 2, 3, 4)) * (float("nan") if turn == 1 else 1)

def never(videos, scene):
    raise ValueError
"""


def test_failed_rewards_are_masked_and_counted_or_stop_the_run(tmp_path, capsys):
    """A failed video is no video with score 0. A reward of weight 0 may fail for all: its mean is null."""
    file = tmp_path / "mine.py"
    file.write_text(REWARD)
    main(tmp_path / "a", "--iterations=2", f"--rewards={file}:grumpy=1,{file}:never=0", "--max_failures=0.95",
         "--members=4", "--updates=2", "--lr=1e-3")
    for record in log_of(tmp_path / "a"):
        assert record["ratio_error"] < 1e-5  # of the first update: after it, r is no longer 1
        assert record["failed"] == record["failed/grumpy"] == 4 and record["grad_norm"] > 0
        assert 0 < record["spread/grumpy"] < record["reward/grumpy"] / 4
        assert (record["failed/never"], record["reward/never"]) == (8, None)
    assert capsys.readouterr().err.count("reward grumpy failed for 4 of 8 videos, ValueError: I do") == 1
    with pytest.raises(RuntimeError, match=r"rewards failed for \d of 4 videos \(grumpy: .*(like it|NaN)"):
        main(tmp_path / "b", "--iterations=2", f"--rewards={file}:grumpy=1", "--max_failures=0.1")
    assert not list((tmp_path / "b").glob("iteration_*"))


def test_non_finite_gradients_change_nothing_and_stop_in_a_row(tmp_path, monkeypatch):
    calls, bad, right = [0], {1}, train.policy_loss  # with one step in the window, one call an iteration

    def wrong(*args, **options):
        loss, stats = right(*args, **options)
        calls[0] += 1
        return loss * (float("nan") if calls[0] - 1 in bad else 1), stats
    monkeypatch.setattr(train, "policy_loss", wrong)
    main(tmp_path, "--iterations=3")
    assert [record["skipped"] for record in log_of(tmp_path)] == [0, 1, 0]
    assert not (tmp_path / "iteration_000002").exists()  # nothing is saved while updates are skipped
    three = state_of(tmp_path)
    assert state_of(tmp_path, 1) != three
    for bad, args, message in (
            ({3}, ["--iterations=4"], "the last 1 updates were skipped.*3 of 4 iterations are saved"),
            (range(99), ["--iterations=9", "--max_skips=2"], "iteration 4: .* nan, 2 updates skipped")):
        with pytest.raises(RuntimeError, match=message):
            main(tmp_path, *args)
    assert state_of(tmp_path) == three and not (tmp_path / "iteration_000004").exists()


def test_file_then_flags(tmp_path, capsys):
    """Later wins; conditions divide over the ranks; --help names the settings."""
    train.main(["--help"])
    assert "    lr: " in capsys.readouterr().out
    (tmp_path / "mine.py").write_text('"""A run."""\nlr = 1e-3  # high\nseed = 3\nv = (1.0, 2.0)\n')
    config = parse(train.Config, [str(tmp_path / "mine.py"), "--seed=4", "--out=x=y", "--compile"])
    assert (config.lr, config.seed, config.v, config.compile) == (1e-3, 4, (1.0, 2.0), True)
    with pytest.raises(ValueError, match="conditions: 3 do not divide over 2 ranks"):
        train.Config(conditions=3).check(2)
