"""Plan: rows against the real rollout's, memory told and measured, and what the command says."""
import re

import pytest
import torch
from conftest import ROOT, refused

import train
from benchmarks import plan
from grpo import micro_batches, policy_loss
from plumbing.settings import parse, run_command
from scenes import put
from sampler import rollout, schedule
from toy.rooms import FRAMES, HEIGHT, WIDTH

WEIGHTS = ROOT / "toy/weights"


@pytest.mark.parametrize("share, tail", [(True, None), (True, 0.4), (False, None), (False, 0.4)])
@pytest.mark.parametrize("steps, at, members, micro_batch", [
    (25, (0,), 8, None), (25, (23,), 8, 3), (25, (5,), 1, None), (16, (3, 4, 5, 6), 4, 1)])
def test_evaluations_are_the_rollouts(share, tail, steps, at, members, micro_batch):
    """Rows of the rollout and of the update's forward, as the real functions call a network."""
    class Anything:  # a condition
        def __getitem__(self, rows):
            return self
    scale, calls = torch.ones((), requires_grad=True), []

    def policy(x, t, condition):
        calls.append(len(x))
        return x * scale if torch.is_grad_enabled() else torch.zeros_like(x)
    sampled = rollout(policy, Anything(), members, at, sigmas=schedule(steps, 3.0), shape=(2,), seed=0,
                      condition_ids=[0, 1], share_prefix=share, tail=tail, micro_batch=micro_batch)
    counts = plan.evaluations(at, steps, members, share, tail)
    assert sampled.evaluations == sum(calls) == 2 * counts[0]
    calls.clear()
    for k in range(len(at)):
        for c, m in micro_batches(sampled, k, micro_batch):
            policy_loss(policy, sampled, k, torch.ones(2, members), conditions=c, members=m)
    assert sum(calls) == 2 * counts[1]


def test_savings_on_paper():
    """8 members, 25 steps, backward 2 and recomputation 1; and what the fast recipe's comments say."""
    assert plan.cost(plan.evaluations((0,), 25, 8, False)) == 200 + 8 * 4
    assert plan.cost(plan.evaluations((0,), 25, 8)) == 1 + 24 * 8 + 4
    fast = parse(plan.Plan, [str(ROOT / "config/geo_align_fast.py")])
    assert len(plan.windows(fast)) == 140 * 64
    assert plan.cost(plan.mean_evaluations(fast, True, fast.tail)) == pytest.approx(85, abs=1)


# ---- memory ----

@pytest.mark.parametrize("settings", [
    dict(size=1, micro_batch=1, guidance=2.0, kl=0.1),
    dict(size=2, share_noise=False, micro_batch=3, checkpointing=False)])
def test_two_and_three_tell_of_all(settings):
    """Four blocks and five conditions, measured, are what a line through two and three says."""
    config = train.Config(**{"frames": 9, "height": HEIGHT, "width": WIDTH, "conditions": 5, "members": 4,
                             "reward_batch": 5, "weights": str(WEIGHTS)} | settings)
    told = tuple((name, x) for name, x in vars(config).items() if name not in plan.ELSEWHERE)
    measured, layers = plan.measure(told, 5, 1, plan.measure(told, 1, 1, 2, None, None)[1], None, None)
    for found, wanted in zip(plan.memory(config), measured):
        assert found == pytest.approx(wanted, rel=0.05)


def test_reward_models_are_in_the_sum(monkeypatch):
    """Side by side they add up; parked, the largest counts while it judges, and only then."""
    found = {"rewards": 2e9, "update": 3e9}
    monkeypatch.setattr(plan, "memory", lambda config, ranks: ({"weights": 1e9}, dict(found)))
    config = plan.Plan(world="clips", rewards="trans=1,hpsv3=1,sharpness=1", reward_batch=1)
    mapanything, hpsv3 = 4.92e9, 15.5e9
    assert plan.needs(config, 1)[1]["update"] == pytest.approx(3e9 + mapanything + hpsv3)
    config.park = True
    assert plan.needs(config, 1)[1] == {"rewards": pytest.approx(2e9 + hpsv3 + 1e9), "update": 3e9}
    config.rewards = "sharpness=1"
    assert plan.needs(config, 1)[1] == found


@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("at, limit", [(0, 700), (20, 700), (20, 50), (90, 1), (3, 1e9)])
def test_the_last_that_fits(power, at, limit):
    """Found from few values, whether memory is linear or bends; one short at most where it bends up."""
    peaks = lambda i: {"rollout": 10 + i ** power, "update": 5 + 3 * i ** power}
    last = max((i for i in range(100) if max(peaks(i).values()) <= limit), default=-1)
    assert last - plan.last_that_fits(peaks, at, 100, limit) in ((0, 1) if power == 2 else (0,))


# ---- the command ----

def run_plan(capsys, *argv):
    """(what the command prints, its exit code)"""
    try:
        run_command("plan", "", {"plan": (plan.Plan, plan.plan, None)}, [str(x) for x in argv])
    except SystemExit as end:
        return capsys.readouterr().out, end.code
    return capsys.readouterr().out, 0


@pytest.mark.parametrize("recipe", ["one_card_24gb", "one_card_48gb", "one_card_80gb", "eight_cards_80gb"])
def test_recipes_are_what_they_say(capsys, recipe):
    """Each tells a command, and what that prints; without data, weights or a card."""
    text = " ".join((ROOT / f"config/{recipe}.py").read_text().split())
    told = r"benchmarks.plan (\S+) ([^`]*)` says: (\S+ GB) at the update .* ([\d.]+ h) an iteration"
    file, flags, memory, hours = re.search(told, text).groups()
    out, code = run_plan(capsys, ROOT / file, "--weights=nowhere", *flags.split())
    assert code == 0 and "verdict     fits" in out and "of which 329,840,640 train" in out
    assert f"update      {memory} at its peak" in out and f"together {hours} an iteration" in out


def test_what_does_not_fit_ends_with_1(capsys, monkeypatch):
    toy = (ROOT / "config/toy.py", f"--weights={WEIGHTS}", "--conditions=2", "--members=2",
           "--reward_batch=1")
    out, code = run_plan(capsys, *toy, "--card=0.5")
    assert code == 0 and "verdict     fits" in out and "NOT" not in out and "largest" not in out
    monkeypatch.setattr(plan, "needs", lambda config, ranks: ({}, {"rollout": 1e6 * config.frames}))
    out, code = run_plan(capsys, *toy, "--card=0.001")
    excess = FRAMES - 0.9 * 2 ** 30 / 1e9
    assert code == 1 and f"does NOT fit, {excess:.1f} MB too much" in out
    assert "verdict     does not fit" in out and "no single setting makes it fit" in out
    assert "largest     --frames=193\n" in run_plan(capsys, *toy, "--card=0.2", "--largest")[0]


def test_time_is_arithmetic_over_the_rate(tmp_path):
    config = plan.Plan(world="clips", weights="", frames=9, height=64, width=112, conditions=4, rate=100.0,
                       rewards="sharpness=1", strategy="all", steps=6)
    by_phase = {phase: time for phase, (time, _) in plan.hours(config, 2).items()}
    rolled, updated = plan.mean_evaluations(config, True, None)
    hour = plan.flops(plan.FUN_CAMERA, 2 * 3 * 4 * 7) / 1e14 / 3600  # of one row
    wanted = {"rollout": 2 * rolled * hour, "update": 2 * updated * 4 * hour, "rewards": 0,
              "validation": 8 / 10 / 2 * 6 * hour}
    assert {phase: by_phase[phase] for phase in wanted} == pytest.approx(wanted)
    rates = {"forward": 2e14, "update": 1e14, "decode": 1e14}
    config.measured = str(put(tmp_path / "card.json", {"rates": rates}))
    assert plan.hours(config, 2)["rollout"][0] == pytest.approx(by_phase["rollout"] / 2)
    put(tmp_path / "card.json", {})
    refused(lambda: plan.hours(config, 2), "card.json: expected the json file")
