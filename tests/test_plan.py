"""Plan: rows against the real rollout's count, memory against the real loop's, and what the command says."""
import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import model
from benchmarks import plan
import train
from grpo import micro_batches, policy_loss
from data.video import decode
from plumbing.settings import parse, run_command
from sampler import rollout, schedule
from toy.rooms import Codec, HEADS, TEXT


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tail", [None, 0.4])
@pytest.mark.parametrize("steps, at, members, micro_batch", [
    (25, (0,), 8, None), (25, (23,), 8, 3), (25, (5,), 1, None), (16, (3, 4, 5, 6), 4, 1),
    (6, (0, 1, 2, 3, 4), 3, None)])
def test_evaluations_are_the_rollouts(share, tail, steps, at, members, micro_batch):
    class Anything:  # a condition
        def __getitem__(self, rows):
            return self
    calls = []

    def policy(x, t, condition):
        calls.append(len(x))
        return torch.zeros_like(x) if not grad else x * scale
    scale, grad = torch.ones((), requires_grad=True), False
    sampled = rollout(policy, Anything(), members, at, sigmas=schedule(steps, 3.0), shape=(2,), seed=0,
                      condition_ids=[0, 1], share_prefix=share, tail=tail, micro_batch=micro_batch)
    counts = plan.evaluations(at, steps, members, share, tail)
    assert sampled.evaluations == sum(calls) == 2 * counts[0]
    grad = True
    calls.clear()
    for k in range(len(at)):
        for c, m in micro_batches(sampled, k, micro_batch):
            policy_loss(policy, sampled, k, torch.ones(2, members), conditions=c, members=m)
    assert sum(calls) == 2 * counts[1]


def test_savings_on_paper():
    """8 members, 25 steps, backward 2 and recomputation 1: a mean over where the window may be."""
    def factor(starts, size, tail):
        windows = [tuple(range(w, w + size)) for w in starts]
        paper = sum(plan.cost(plan.evaluations(w, 25, 8, False)) for w in windows)
        return paper / sum(plan.cost(plan.evaluations(w, 25, 8, True, tail)) for w in windows)
    assert plan.cost(plan.evaluations((0,), 25, 8, False)) == 200 + 8 * 4
    assert plan.cost(plan.evaluations((0,), 25, 8)) == 1 + 24 * 8 + 4
    assert factor(range(24), 1, None) > 1.9 and factor(range(24), 1, 0.4) > 4.2
    assert factor(range(6), 1, None) > 1.25 and factor(range(6), 1, 0.4) > 3.1
    assert factor(range(21), 4, None) > 1.4 and factor(range(21), 4, 0.4) > 1.9


def test_the_fast_recipe():
    """What its config says: rows of a condition, a mean over windows drawn for every condition."""
    fast = parse(plan.Plan, [str(ROOT / "config/geo_align_fast.py")])
    assert len(plan.windows(fast)) == 140 * 64
    assert plan.cost(plan.mean_evaluations(fast, True, 0.4)) == pytest.approx(73, abs=1)
    fast.window_per_condition = False
    assert len(plan.windows(fast)) == 140


def test_live_bytes():
    kept = torch.zeros(100)
    with plan.Live() as live:
        live.add(kept)
        a = torch.ones(1000)  # 4000 bytes
        b = a.view(10, 100)  # shares its storage
        assert live.now == 4400
        total, rise = live.extra(lambda: (a * 2 + 1).sum())
        assert rise == 8000  # two temporaries at once
        del total
        del a
        assert live.now == 4400
        del b
    assert live.now == 400 and live.peak == 4400 + 8000


@pytest.mark.parametrize("settings", [
    dict(size=1), dict(size=3, micro_batch=8), dict(size=2, checkpointing=False, members=4, conditions=3),
    dict(size=1, conditions=6, micro_batch=1),
    dict(size=2, members=4, share_noise=False, micro_batch=3, guidance=2.0)])
def test_memory_against_the_loop(settings):
    """Peaks of the real functions on real tensors, counted live, are within 15 % of the estimate."""
    config = train.Config(frames=9, height=24, width=40, conditions=2, members=8, reward_batch=5,
                          weights=str(ROOT / "toy/weights"))
    for name, value in settings.items():
        setattr(config, name, value)
    stay, peaks = plan.memory(config)
    C, G, rows = config.conditions, config.members, config.micro_batch or None
    shape = (16, 3, 6, 10)
    measured = {}
    with plan.Live() as live:
        dit = model.load_dit(ROOT / "toy/weights/toy_base.safetensors", num_heads=HEADS)
        codec = Codec(load_file(ROOT / "toy/weights/toy_codec.safetensors"))
        dit.checkpoint = config.checkpointing
        parameters = model.trainable(dit)
        live.add(*dit.parameters(), *codec.state.values())
        assert live.now == pytest.approx(stay["frozen weights"] + stay["masters"], rel=0.01)
        optimizer = torch.optim.AdamW(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        assert live.now == pytest.approx(sum(stay.values()), rel=0.01)
        for iteration in range(2):  # the second is the steady state
            live.peak = live.now
            maps = (C, 24, 3, 48, 80)
            condition = model.Condition(torch.zeros(C, 1, TEXT), None, torch.randn(C, *shape),
                                        torch.randn(maps), torch.randn(maps))
            with torch.no_grad():
                prepared = dit.prepare(condition)
                negative = dit.prepare(condition) if config.guidance != 1 else None
            del condition
            sources = torch.zeros(C, config.frames, config.height, config.width, 3, dtype=torch.uint8)
            measured["conditions"], live.peak = live.peak, live.now
            sampled = rollout(dit, prepared, G, range(config.size), sigmas=schedule(config.size + 2, 5.0),
                              shape=shape, seed=0, condition_ids=range(C), share_noise=config.share_noise,
                              micro_batch=rows, negative=negative,
                              guidance=config.guidance)
            measured["rollout"], live.peak = live.peak, live.now
            videos = decode(codec, sampled.latents.flatten(0, 1), config.reward_batch)
            measured["decode"], live.peak = live.peak, live.now
            measured["rewards"] = live.now
            for k in range(config.size):
                for c, m in micro_batches(sampled, k, rows):
                    policy_loss(dit, sampled, k, torch.randn(C, G), None, c, m)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            measured["update"] = live.peak
            del prepared, negative, sampled, videos, sources
    for phase in measured:
        assert peaks[phase] == pytest.approx(measured[phase], rel=0.15), phase


def test_all_steps_are_kept_whatever_the_size():
    small = dict(frames=5, height=24, width=40, steps=9, conditions=1, members=512, micro_batch=64)
    every, eight = (plan.memory(train.Config(**small, **kind, weights=str(ROOT / "toy/weights")))[1]["rollout"]
                    for kind in (dict(strategy="all", size=1), dict(size=8)))
    assert every == pytest.approx(eight, rel=0.02)


# ---- does it fit ----

def test_reward_models_are_in_the_sum(monkeypatch):
    found = {"rewards": 2e9, "update": 3e9}
    monkeypatch.setattr(plan, "memory", lambda config, ranks: ({"weights": 1e9}, dict(found)))
    config = plan.Plan(world="clips", rewards="trans=1,hpsv3=1,sharpness=1", reward_batch=1)
    _, together = plan.needs(config, 1)
    assert together["update"] == pytest.approx(3e9 + 4.92e9 + 15.5e9)  # MapAnything and HPSv3
    config.park = True
    _, parked = plan.needs(config, 1)
    assert parked == {"rewards": pytest.approx(2e9 + 15.5e9 + 1e9), "update": 3e9}
    config.rewards = "sharpness=1"
    assert plan.needs(config, 1)[1] == found


@pytest.mark.parametrize("recipe, ranks, card", [
    ("one_card_24gb", 1, 24), ("one_card_48gb", 1, 48), ("one_card_80gb", 1, 80), ("eight_cards_80gb", 8, 80)])
def test_recipes_fit_their_cards(recipe, ranks, card):
    config = parse(plan.Plan, [str(ROOT / f"config/{recipe}.py"), "--weights=nowhere"])
    config.check(ranks, folders=False)
    assert plan.fits(config, ranks, card)


# ---- the command ----

def run_plan(capsys, *argv):
    """(what the command prints, its exit code)"""
    code = 0
    try:
        run_command("plan", "", {"plan": (plan.Plan, plan.plan, None)}, [str(x) for x in argv])
    except SystemExit as end:
        code = end.code
    return capsys.readouterr().out, code


def test_plan_needs_nothing(tmp_path, capsys):
    out, code = run_plan(capsys, ROOT / "config/geo_align.py", "--weights=nowhere", "--conditions=1",
                         f"--out={tmp_path / 'o'}")
    for fact in ("of which 329,840,640 train", "65,520 a network row", "4.0 GB a checkpoint",
                 "+ 25.0 update x 4 = 276.8", "971 TFLOP at 150 TFLOP/s", "HPSv3 15.5 GB"):
        assert fact in out
    assert code == 0 and "verdict" not in out and not (tmp_path / "o").exists()


def test_what_does_not_fit_ends_with_1(capsys, monkeypatch):
    toy = (ROOT / "config/toy.py", f"--weights={ROOT / 'toy/weights'}", "--conditions=2", "--members=2",
           "--reward_batch=1")
    out, code = run_plan(capsys, *toy, "--card=0.2")
    assert code == 0 and "verdict     fits" in out and "NOT" not in out and "largest" not in out
    monkeypatch.setattr(plan, "needs", lambda config, ranks: ({}, {"rollout": 1e6 * config.frames}))
    out, code = run_plan(capsys, *toy, "--card=0.001")
    assert code == 1 and "does NOT fit, 4.0 MB too much" in out and "verdict     does not fit" in out
    assert "no single setting makes it fit" in out
    assert "largest     --frames=193\n" in run_plan(capsys, *toy, "--card=0.2", "--largest")[0]


@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("at, limit", [(0, 700), (20, 700), (20, 50), (90, 1), (3, 1e9)])
def test_the_last_that_fits(power, at, limit):
    peaks = lambda i: {"rollout": 10 + i ** power, "update": 5 + 3 * i ** power}
    fitting = [i for i in range(100) if max(peaks(i).values()) <= limit]
    found = plan.last_that_fits(peaks, at, 100, limit)
    last = max(fitting, default=-1)
    assert found == last or power == 2 and found == last - 1  # where a line falls short


def test_time_is_arithmetic_over_the_rate(tmp_path):
    config = plan.Plan(world="clips", weights="", frames=9, height=64, width=112, conditions=4, rate=100.0,
                       rewards="sharpness=1", strategy="all", steps=6)
    by_phase = plan.hours(config, 2)
    rolled, updated = plan.mean_evaluations(config, True, None)
    row = plan.flops(plan.FUN_CAMERA, 2 * 3 * 4 * 7)
    assert by_phase["rollout"][0] == pytest.approx(2 * rolled * row / 1e14 / 3600)
    assert by_phase["update"][0] == pytest.approx(2 * updated * 4 * row / 1e14 / 3600)
    assert by_phase["rewards"][0] == 0
    assert by_phase["validation"][0] == pytest.approx(8 / 10 / 2 * 6 * row / 1e14 / 3600)
    rates = {"forward": 2e14, "update": 1e14, "decode": 1e14}
    (tmp_path / "card.json").write_text(json.dumps({"rates": rates}))
    config.measured = str(tmp_path / "card.json")
    measured = plan.hours(config, 2)
    assert measured["rollout"][0] == pytest.approx(by_phase["rollout"][0] / 2)
    assert measured["decode"][0] == pytest.approx(by_phase["decode"][0] / 2)  # not at half the rate
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="card.json: expected the json file"):
        plan.hours(config, 2)
