"""The sampler against golden numbers, closed forms for Gaussian data, and itself (shared = unshared, ...)."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, Labels, close, cure, gaussian, setting
from safetensors.torch import load_file

import sampler
from sampler import compress, dpm_step, ode_step, rollout, sample, schedule, sde_step, window

GOLDEN = ROOT / "tests/golden"


def test_schedule_golden():
    """The levels and timesteps of Wan's own scheduler, and 0 after them."""
    golden = json.loads((GOLDEN / "flow_match_schedules.json").read_text())
    del golden["training_weights_shift5"]
    for name, record in golden.items():
        steps, shift = map(int, name.split("_"))
        sigmas = schedule(steps, shift)
        expected = torch.tensor([*record["sigmas"], 0])
        assert sigmas.dtype == torch.float32 and torch.allclose(sigmas, expected, rtol=1e-6, atol=0)
        assert torch.allclose(1000 * sigmas[:-1], torch.tensor(record["timesteps"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps, shift, start", [(25, 5, 4), (16, 1, 7), (1, 5, 0)])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_compressed_tail(steps, shift, start, fraction):
    """Evenly spaced before the shift, from the window's end to 0."""
    levels, keep = compress(schedule(steps, shift), start, fraction), max(1, int(fraction * (steps - start)))
    u = (1 - start / steps) * (1 - torch.arange(keep + 1, dtype=torch.float64) / keep)
    assert torch.allclose(levels.double(), shift * u / (1 + (shift - 1) * u), atol=2e-6)
    assert levels[0] == schedule(steps, shift)[start] and levels[-1] == 0


def test_steps_golden():
    """Flow-GRPO's and diffusers' steps, as their code does them."""
    golden = load_file(GOLDEN / "sde_steps.safetensors")
    sigmas = schedule(16, 5)
    x_dpm, x0_before = golden["dpm_x"], None
    for i, (t, t_next) in enumerate(zip(sigmas, sigmas[1:])):
        x, v, x_next = (golden[name][i:i + 1] for name in ("x", "velocity", "next"))
        close(ode_step(x, v, t, t_next)[0], golden["ode_next"][i])
        close(ode_step(x, v, t, 0)[0], golden["x0"][i])
        _, log_prob, mean, std = sde_step(x, v, t, t_next, eta=0.7, tau=None, t_max=sigmas[1], x_next=x_next)
        close(mean[0], golden["flow_grpo_mean"][i])
        close(std, golden["flow_grpo_std"][i])
        close(log_prob[0], golden["flow_grpo_log_prob"][i])
        x0 = x_dpm - t * (x_dpm @ golden["dpm_A"].T + golden["dpm_b"] * t)
        x_dpm = dpm_step(x_dpm, x0, t, t_next, x0_before if 0 < i < 15 else None, sigmas[i - 1])
        x0_before = x0
        close(x_dpm, golden["dpm2m_trajectory"][i + 1])


def test_window_golden():
    """MixGRPO's progressive schedules, up to the first window that has lost width: ours restarts there."""
    golden = json.loads((GOLDEN / "mixgrpo_windows.json").read_text())
    for name, stride in ("progressive_stride1", 1), ("progressive_nooverlap", 4):
        windows = golden[name]["windows"]
        full = next(i for i, w in enumerate(windows) if len(w) < 4)
        ours = [window(i, 24, 4, "progressive", stride, iters_per_window=5) for i in range(full + 1)]
        assert full >= 25 and list(map(list, ours)) == [*windows[:full], [0, 1, 2, 3]]


@pytest.mark.parametrize("steps, size, first, skip", [(25, 4, None, 2), (16, 1, 6, 1)])
def test_random_windows(steps, size, first, skip):
    """Of consecutive usable steps, uniform over all starts, anew for each seed and condition."""
    end = min(steps - 1, first or steps)
    find = lambda seed=3, condition=None, strategy="random": [
        window(i, steps, size, strategy, 2, 5, first, seed, condition, skip) for i in range(3000)]
    there, starts = find(), range(skip, end - size + 1)
    assert set(there) == {tuple(range(start, start + size)) for start in starts}
    counts = [*map(there.count, set(there)), *(sum(map(tuple.__eq__, there, other)) for other in (
        find(seed=4), find(condition=0)))]
    share = 3000 / len(starts)
    assert max(abs(n - share) for n in counts) <= 5 * math.sqrt(share * (1 - 1 / len(starts)))
    assert set(find(strategy="all")) == {tuple(range(skip, end))}
    assert [w[0] for w in find(strategy="progressive")] == [*np.resize(np.repeat(starts[::2], 5), 3000)]


def flow(steps, n=50, count=80, mean=1.0, std=0.5, **options):
    """n samples of data N(mean, std^2) under its exact velocity, as two members of one condition."""
    def policy(x, t, condition):
        a, b = gaussian(t, mean, std)
        return a * x + b
    return rollout(policy, torch.zeros(1), 2, steps, sigmas=schedule(count, 3), shape=(n // 2, 1), seed=0,
                   condition_ids=[0], share_noise=False, **options)


@pytest.mark.parametrize("name, eta", [("tau", 0.5), ("t_max", 1.0)])
def test_the_sde_keeps_the_odes_marginals_and_forgets_as_it_should(name, eta):
    """With the last three quarters of the steps stochastic, mean and variance at t = 0 are the data's, and of
    where the ODE ends from the same start there remains the correlation exp(-int sigma_t^2 / (2 var_t) dt).
    In the first few steps it is not so: sigma_t^2 dt is of order 1 there however fine the schedule is.
    """
    sigmas, n = schedule(200, 3), 50_000
    ode, sde = (flow(steps, n, 200, eta=eta, **cure(name, sigmas)).latents
                for steps in ((), tuple(range(50, 199))))
    for x in ode, sde:
        assert abs(x.mean() - 1.0) < 0.01 and abs(x.var() / 0.5 ** 2 - 1) < 0.05
    t = torch.linspace(sigmas[199], sigmas[50], 10_000, dtype=torch.float64)
    rate = eta ** 2 * t / (1 - t) / (2 * ((1 - t) ** 2 * 0.5 ** 2 + t ** 2))
    found = torch.corrcoef(torch.cat([ode, sde]).flatten(0, 1).flatten(1))  # of members 0, 1, and 0, 1
    expected = float(torch.exp(-torch.trapezoid(rate, t)))
    assert [found[0, 2], found[1, 3]] == pytest.approx([expected] * 2, abs=0.02)
    assert abs(found[2, 3]) < 5 / math.sqrt(n / 2)  # members have noise of their own


def test_the_fast_tail_is_nearer_the_exact_flow():
    """With 2 in 5 of the steps, DPM-Solver++(2M) is nearer than Euler with all of them."""
    euler, fast, whole = (flow((2,), tail=tail) for tail in (None, 0.4, 1.0))
    x, t = euler.x_next[-1].double(), euler.t_next[-1].double()  # exact from the window's end
    exact = 1 + (x - (1 - t)) * 0.5 / torch.sqrt((1 - t) ** 2 * 0.5 ** 2 + t ** 2)
    errors = [float((out.latents - exact).abs().max()) for out in (euler, fast, whole)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.25 * errors[0]


def same(a, b, tolerance=0.0):
    """Two rollouts agree; a step stored once per group counts as stored for each member."""
    assert a.steps == b.steps and torch.equal(a.t, b.t) and torch.equal(a.t_next, b.t_next)
    pairs = [(a.latents, b.latents), (a.log_prob, b.log_prob), *zip(a.x_next, b.x_next)]
    pairs += [torch.broadcast_tensors(x, y) for x, y in zip(a.x, b.x)]
    for x, y in pairs:
        close(x, y, tolerance)


@pytest.mark.parametrize("steps, tail, guidance, share_noise", [
    ((0, 1), None, 1, True), ((2,), 0.4, 4, True), ((), None, 1, True), ((2, 3), None, 3, False)])
def test_how_it_is_computed_does_not_matter(steps, tail, guidance, share_noise):
    """What a group shares is computed once, bitwise as if it were not; nor matter micro-batches, nor the
    other conditions and members on a rank. Network rows are counted."""
    policy, condition, given = setting(C=4, seed=2)
    given |= {"tail": tail, "guidance": guidance, "share_noise": share_noise}
    given |= {"negative": Labels(-condition.y)}
    whole = rollout(policy, condition, 6, steps, **given)
    branches = 1 + (guidance != 1)
    once = (steps[0] + 1 if steps else 8) if share_noise else 0
    after = (8 if tail is None else steps[-1] + 1 + int(tail * (7 - steps[-1]))) - once
    assert policy.rows == whole.evaluations == branches * 4 * (once + 6 * after)
    shared, each = (rollout(policy, condition, 6, steps, share_prefix=share, micro_batch=1, **given)
                    for share in (True, False))
    same(shared, each)
    assert each.evaluations == branches * 4 * 6 * (once + after)
    assert steps or torch.equal(sample(policy, condition, **given), whole.latents[:, 0])
    for rows in 4, 5, 13, 1000:
        policy.largest = 0
        same(rollout(policy, condition, 6, steps, micro_batch=rows, **given), whole, 1e-5)
        assert min(rows, 24 if steps else 4) / 2 < policy.largest <= rows
    given |= {"condition_ids": given["condition_ids"][2:3], "negative": given["negative"][2:3]}
    alone = rollout(policy, condition[2:3], 4, steps, **given)
    close(alone.latents[0], whole.latents[2, :4])
    close(alone.log_prob[:, 0], whole.log_prob[:, 2, :4])


def test_noise_belongs_to_seed_iteration_condition_and_member():
    """And to nothing else: not to the global generator. Draws of different keys are independent."""
    policy, condition, given = setting(C=2)
    find = lambda **change: rollout(policy, condition, 3, (0, 1), **(given | change))
    base = find()
    torch.manual_seed(5)
    same(find(), base)
    for change in {"seed": 1}, {"iteration": 1}, {"condition_ids": ["clip_b/traj_1", 8]}:
        assert not any(torch.equal(find(**change).x[0][c], base.x[0][c]) for c in range(2))
    draws = torch.stack([sampler.normal((1000,), 0, i, c, g, what) for i in range(4) for c in range(4)
                         for g in range(4) for what in ("start", "steps")])
    assert (torch.corrcoef(draws) - torch.eye(128)).abs().max() < 6 / math.sqrt(1000)


def roll(window):
    policy, condition, given = setting()
    rollout(policy, condition, 2, window, **given)


@pytest.mark.parametrize("message, call", [
    ("tau or t_max", lambda: sde_step(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, 0.9, tau=None)),
    ("eta: expected > 0", lambda: sde_step(torch.zeros(1, 2), torch.zeros(1, 2), 0.5, 0.4, eta=0.0)),
    ("window size", lambda: window(0, 10, 1, first=2, skip=2)), ("consecutive", lambda: roll((-1, 0))),
    ("consecutive", lambda: roll((7,))), ("consecutive", lambda: roll((1, 3))),
    ("at least 1 step", lambda: schedule(5, 0)), ("one for each of 3", lambda: roll([(2,), (1,)]))])
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call()
