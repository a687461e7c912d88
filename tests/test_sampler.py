"""The sampler against golden numbers, closed forms for Gaussian data, and itself (shared = unshared, ...)."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sampler
from sampler import (
    compress, dpm_step, ode_step, rollout, sample, schedule, sde_step, velocity, window)

GOLDEN = Path(__file__).parent / "golden"
CURES = {"tau": {"tau": 0.45}, "t_max": {"tau": None, "t_max": "second"}}  # the second value of the schedule


def cure(name, sigmas):
    return {k: float(sigmas[1]) if v == "second" else v for k, v in CURES[name].items()}


class Labels:
    """A condition as the sampler knows it: it slices and concatenates, here a label of 3 numbers per row."""
    def __init__(self, y):
        self.y = y

    def __getitem__(self, rows):
        return Labels(self.y[rows])

    @staticmethod
    def cat(conditions):
        return Labels(torch.cat([condition.y for condition in conditions]))


class Net(nn.Module):
    """A small nonlinear policy on latents of a given shape; counts the rows it sees and its largest call."""
    def __init__(self, shape, seed=0, width=32, scale=1.0):
        super().__init__()
        size = math.prod(shape)
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(size + 4, width, generator=generator) / (size + 4) ** 0.5)
        self.b = nn.Parameter(scale * torch.randn(width, size, generator=generator) / width ** 0.5)
        self.rows = self.largest = 0

    def forward(self, x, t, condition):
        self.rows, self.largest = self.rows + len(x), max(self.largest, len(x))
        y = condition.y.repeat_interleave(len(x) // len(condition.y), 0)
        h = torch.cat([x.flatten(1), y, t.reshape(-1, 1).expand(len(x), 1)], 1).to(self.a.dtype)
        return (torch.tanh(h @ self.a) @ self.b).view(x.shape)


SHAPE = 4, 2, 3, 2


def setting(C=3, steps=8, shift=5.0, shape=SHAPE, seed=0):
    """Policy, condition and the arguments every rollout needs."""
    condition = Labels(torch.randn(C, 3, generator=torch.Generator().manual_seed(100 + seed)))
    return Net(shape, seed), condition, {"sigmas": schedule(steps, shift), "shape": shape, "seed": seed,
                                         "condition_ids": list(range(10, 10 + C))}


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert not a.numel() or (a - b).abs().max() <= tolerance * b.abs().max()


# ---- schedule ----

def test_schedule_golden():
    golden = json.loads((GOLDEN / "flow_match_schedules.json").read_text())
    for name, record in golden.items():
        if name != "training_weights_shift5":
            steps, shift = map(int, name.split("_"))
            sigmas = schedule(steps, shift)
            assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,) and sigmas[-1] == 0
            assert torch.allclose(sigmas[:-1], torch.tensor(record["sigmas"]), rtol=1e-6, atol=0)
            assert torch.allclose(1000 * sigmas[:-1], torch.tensor(record["timesteps"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps, shift", [(1, 5), (2, 1), (7, 2.5), (50, 8)])
def test_schedule_ends_and_decreases(steps, shift):
    sigmas = schedule(steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps, shift, start", [
    (25, 5, 4), (25, 5, 23), (16, 1, 7), (9, 3, 0), (1, 5, 0), (2, 5, 1)])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_compressed_tail(steps, shift, start, fraction):
    sigmas = schedule(steps, shift)
    levels = compress(sigmas, start, fraction)
    keep = max(1, int(fraction * (steps - start)))
    assert len(levels) == keep + 1 and levels[0] == sigmas[start] and levels[-1] == 0
    u = (1 - start / steps) * (1 - torch.arange(keep + 1, dtype=torch.float64) / keep)
    assert torch.allclose(levels.double(), shift * u / (1 + (shift - 1) * u), atol=2e-6)
    if fraction == 1:
        assert torch.allclose(levels, sigmas[start:], atol=2e-6)


# ---- steps ----

def test_steps_golden():
    golden = load_file(GOLDEN / "sde_steps.safetensors")
    sigmas = schedule(16, 5)
    assert torch.allclose(sigmas, golden["sigmas"], rtol=1e-6, atol=0)
    for i in range(16):
        x, v, x_next = (golden[name][i:i + 1] for name in ("x", "velocity", "next"))
        t, t_next = sigmas[i], sigmas[i + 1]
        close(ode_step(x, v, t, t_next)[0], golden["ode_next"][i])
        close(ode_step(x, v, t, 0)[0], golden["x0"][i])
        _, log_prob, mean, std = sde_step(x, v, t, t_next, eta=0.7, tau=None, t_max=sigmas[1], x_next=x_next)
        close(mean[0], golden["flow_grpo_mean"][i])
        close(std, golden["flow_grpo_std"][i])
        close(log_prob[0], golden["flow_grpo_log_prob"][i])


def test_dpm_golden():
    golden = load_file(GOLDEN / "sde_steps.safetensors")
    x, sigmas, x0_before = golden["dpm_x"], schedule(16, 5), None
    for i in range(16):
        x0 = x - sigmas[i] * (x @ golden["dpm_A"].T + golden["dpm_b"] * sigmas[i])
        x = dpm_step(x, x0, sigmas[i], sigmas[i + 1], x0_before if 0 < i < 15 else None, sigmas[i - 1])
        x0_before = x0
        close(x, golden["dpm2m_trajectory"][i + 1])


@pytest.mark.parametrize("t, t_next, eta", [(0.97, 0.9, 1.0), (0.5, 0.43, 0.7), (0.2, 0.0, 0.3)])
def test_sde_step_closed_form(t, t_next, eta):
    t, t_next = torch.tensor([t, t_next]).tolist()  # as float32: 1 - t loses digits near 1
    x, v, noise = torch.randn(3, 3, 5, 2, generator=torch.Generator().manual_seed(0)).unbind()
    for tau in None, 0.05:
        x_next, log_prob, mean, std = sde_step(x, v, t, t_next, eta, tau, noise=noise)
        sigma = eta * math.sqrt(t / (1 - t))
        if tau is not None:
            sigma = min(sigma, tau / math.sqrt(t - t_next))
        drift = v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)
        assert torch.allclose(mean, x - (t - t_next) * drift, atol=1e-6)
        assert math.isclose(std, sigma * math.sqrt(t - t_next), rel_tol=1e-5)
        assert torch.allclose(x_next, mean + std * noise)
        density = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
        assert log_prob.shape == (3,) and torch.allclose(log_prob, density, atol=1e-6)
        scored = sde_step(x, v, t, t_next, eta, tau, x_next=x_next)
        assert all(torch.equal(a, b) for a, b in zip(scored, (x_next, log_prob, mean, std)))


def sde_step_inputs(seed=1):
    return torch.randn(3, 4, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind()


def test_steps_take_one_level_per_row():
    x, v, noise = sde_step_inputs()
    t, t_next = torch.tensor([1.0, 0.8, 0.5, 0.1]), torch.tensor([0.9, 0.6, 0.45, 0.0])
    x_next, log_prob, mean, std = sde_step(x, v, t, t_next, noise=noise)
    assert std.shape == (4, 1, 1, 1, 1)
    for i in range(4):
        row = sde_step(x[i:i + 1], v[i:i + 1], t[i], float(t_next[i]), noise=noise[i:i + 1])
        for a, b in zip((x_next, log_prob, mean, std.flatten()), row):
            close(a[i:i + 1], b.view(a[i:i + 1].shape), 1e-6)
        close(ode_step(x, v, t, t_next)[i], ode_step(x[i], v[i], t[i], t_next[i]), 1e-6)


def test_steps_are_float32_whatever_comes_in():
    x, v, noise = (a.bfloat16() for a in sde_step_inputs())
    assert {a.dtype for a in sde_step(x, v, 0.5, 0.4, noise=noise)} == {torch.float32}
    assert ode_step(x, v, 0.5, 0.4).dtype == torch.float32


def test_one_of_two_cures_is_needed_at_t_1():
    x, v, noise = sde_step_inputs()
    with pytest.raises(ValueError, match="tau or t_max"):
        sde_step(x, v, 1.0, 0.9, tau=None, noise=noise)
    with pytest.raises(ValueError, match="eta"):
        sde_step(x, v, 0.5, 0.4, eta=0.0, noise=noise)
    sigmas = schedule(10, 5)
    for name in CURES:
        out = sde_step(x, v, sigmas[0], sigmas[1], noise=noise, **cure(name, sigmas))
        assert all(torch.isfinite(a).all() for a in out)


# ---- window ----

def test_window_golden():
    """MixGRPO's progressive schedules, up to the first window that has lost width."""
    golden = json.loads((GOLDEN / "mixgrpo_windows.json").read_text())
    for name, stride in ("progressive_stride1", 1), ("progressive_nooverlap", 4):
        windows = golden[name]["windows"]
        full = next(i for i, w in enumerate(windows) if len(w) < 4)
        assert full >= 25
        for i in range(full):
            assert list(window(i, 24, 4, "progressive", stride, iters_per_window=5)) == windows[i]
        assert window(full, 24, 4, "progressive", stride, iters_per_window=5) == (0, 1, 2, 3)  # ours restarts


@pytest.mark.parametrize("strategy", ["progressive", "random", "all"])
@pytest.mark.parametrize("steps, size, stride, iters, first, skip", [
    (25, 4, 1, 1, None, 0), (25, 4, 3, 5, None, 2), (24, 4, 4, 2, None, 0), (16, 1, 1, 1, 6, 1),
    (9, 8, 2, 3, None, 0), (16, 5, 7, 1, 11, 6), (2, 1, 1, 1, None, 0), (6, 2, 1, 1, 6, 1)])
def test_window_is_always_full_width(strategy, steps, size, stride, iters, first, skip):
    usable = min(steps - 1, first or steps)
    size = usable - skip if strategy == "all" else size
    seen = set()
    for i in range(10_000):
        w = window(i, steps, size, strategy, stride, iters, first, seed=3, skip=skip)
        assert w == tuple(range(w[0], w[0] + size)) and w[0] >= skip and w[-1] < usable
        seen.add(w[0])
    expected = range(skip, usable - size + 1, stride if strategy == "progressive" else 1)
    assert seen == set(expected)


def test_window_is_a_function_of_the_iteration():
    for strategy in "progressive", "random":
        there = [window(i, 25, 4, strategy, 2, 3, seed=5) for i in range(300)]
        back = [window(i, 25, 4, strategy, 2, 3, seed=5) for i in reversed(range(300))]
        assert there == back[::-1]
    assert [window(i, 25, strategy="random", seed=0) for i in range(20)] != [
        window(i, 25, strategy="random", seed=1) for i in range(20)]
    progressive = [window(i, 25, 4, "progressive", 2, 3)[0] for i in range(40)]
    assert progressive == [i // 3 % 11 * 2 for i in range(40)]  # starts 0, 2, ..., 20: 24 usable steps


def test_random_windows_are_uniform():
    counts = torch.bincount(torch.tensor([window(i, 16, 1, "random", first=6)[0] for i in range(6000)]))
    assert len(counts) == 6 and (counts - 1000).abs().max() < 5 * math.sqrt(1000 * 5 / 6)


def test_window_refusals():
    for size, steps, first, skip in (4, 4, None, 0), (0, 10, None, 0), (3, 10, 2, 0), (1, 10, 2, 2):
        with pytest.raises(ValueError, match="window size"):
            window(0, steps, size, "progressive", first=first, skip=skip)
    with pytest.raises(ValueError, match="strategy"):
        window(0, 10, 2, "decay")
    policy, condition, given = setting()
    for bad in (7,), (1, 3), (2, 1), (-1, 0):  # the last step; gaps; backwards
        with pytest.raises(ValueError, match="consecutive"):
            rollout(policy, condition, 2, bad, **given)


# ---- Gaussian data: every sampler is an affine recursion in mean and variance ----

def gaussian(t, mean, std):
    """For data N(mean, std^2) per element: a, b of the exact velocity v = E[eps - x_0 | x_t] = a x + b."""
    a = (t - (1 - t) * std ** 2) / ((1 - t) ** 2 * std ** 2 + t ** 2)
    return a, -mean - a * (1 - t) * mean


def recursion(sigmas, steps, mean, std, eta=1.0, tau=0.45, t_max=None):
    """Mean and variance at t = 0 in exact arithmetic; `steps` are stochastic."""
    m, var = 0.0, 1.0
    sigmas = sigmas.double().tolist()
    for i, (t, t_next) in enumerate(zip(sigmas, sigmas[1:])):
        (a, b), dt = gaussian(t, mean, std), t - t_next
        sigma2 = 0.0
        if i in steps:
            capped = t if t_max is None else min(t, t_max)
            sigma2 = eta ** 2 * t / (1 - capped) if capped < 1 else math.inf
            sigma2 = sigma2 if tau is None else min(sigma2, tau ** 2 / dt)
        gain = 1 - dt * (a + sigma2 / (2 * t) * (1 + (1 - t) * a))
        m = gain * m - dt * b * (1 + sigma2 / (2 * t) * (1 - t))
        var = gain ** 2 * var + sigma2 * dt
    return m, var


def gaussian_policy(mean, std):
    def policy(x, t, condition):
        a, b = gaussian(t, mean, std)
        return a * x + b
    return policy


@pytest.mark.parametrize("name", CURES)
@pytest.mark.parametrize("steps", [(), range(9), range(3), range(2, 6), range(8, 9)])
@pytest.mark.parametrize("mean, std, shift, eta", [(1.5, 0.5, 5, 1.0), (-0.3, 2.0, 1, 0.7)])
def test_gaussian_monte_carlo(name, steps, mean, std, shift, eta):
    sigmas = schedule(10, shift)
    n, options = 200_000, cure(name, sigmas)
    latents = rollout(gaussian_policy(mean, std), torch.zeros(1), 2, tuple(steps), sigmas=sigmas, seed=4,
                      shape=(n // 2, 1), condition_ids=[0], eta=eta, share_noise=False, **options).latents
    m, var = recursion(sigmas, steps, mean, std, eta, **options)
    assert abs(latents.mean() - m) < 5 * math.sqrt(var / n)
    assert abs(latents.var() - var) < 5 * var * math.sqrt(2 / n)


def variance_errors(steps_at, name, std, counts=(25, 100, 400, 1600)):
    out = []
    for n in counts:
        sigmas = schedule(n, 3)
        _, var = recursion(sigmas, steps_at(sigmas), 1.0, std, **cure(name, sigmas))
        out.append(abs(var - std ** 2) / std ** 2)
    return out


@pytest.mark.parametrize("name", CURES)
@pytest.mark.parametrize("std", [0.5, 1.5])
def test_gaussian_convergence(name, std):
    """The samplers converge to the data's variance: ODE, all steps, and a window at a fixed noise level.

    A window of fixed *indices* does not where t is near 1: sigma_t^2 dt = t dt / (1 - t) is of order 1 in the
    schedule's first steps however fine it is, so the Euler-Maruyama error there never shrinks. That is a
    property of the method (of Flow-GRPO's and LongCat's cures alike), not of this code.
    """
    middle = lambda sigmas: range(i := int((sigmas > 0.5).sum()), i + 4)  # noqa: E731
    for steps_at in (lambda sigmas: ()), (lambda sigmas: range(len(sigmas) - 2)), middle:
        errors = variance_errors(steps_at, name, std)
        assert errors[-1] < 0.005 and errors[-1] < 0.1 * errors[0]
    first = variance_errors(lambda sigmas: range(4), name, std)
    assert first[-1] > 0.01 and first[-1] > 0.5 * first[-2]


def test_gaussian_convergence_of_the_tail():
    """With 2 in 5 of the steps, DPM-Solver++(2M) is nearer the exact flow than Euler with all of them."""
    mean, std = 1.0, 0.5

    def end(tail, steps):
        return rollout(gaussian_policy(mean, std), torch.zeros(1), 1, (2,), sigmas=schedule(steps, 3),
                       shape=(50, 1), seed=0, condition_ids=[0], tail=tail)

    for steps in 80, 160:
        fine = end(None, steps)  # same latents up to and including the window, then the exact flow to t = 0
        x, t = fine.x_next[-1].double(), fine.t_next[-1].double()
        exact = mean + (x - (1 - t) * mean) * std / torch.sqrt((1 - t) ** 2 * std ** 2 + t ** 2)
        euler = (fine.latents - exact).abs().max()
        fast = end(0.4, steps)
        assert torch.equal(fast.x_next[-1], fine.x_next[-1])
        assert fast.evaluations == 3 + int(0.4 * (steps - 3))
        assert (fast.latents - exact).abs().max() < 0.5 * euler
        assert (end(1.0, steps).latents - exact).abs().max() < 0.25 * euler


# ---- rollout ----

@pytest.mark.parametrize("steps, shift, seed", [(8, 5.0, 0), (3, 1.0, 1)])
def test_empty_window_is_the_ode_bitwise(steps, shift, seed):
    policy, condition, given = setting(steps=steps, shift=shift, seed=seed)
    out = rollout(policy, condition, 4, (), **given)
    assert out.latents.shape == (3, 4, *SHAPE) and out.log_prob.shape == (0, 3, 4)
    assert out.evaluations == 3 * steps
    x = torch.stack([sampler.normal(SHAPE, seed, 0, i, 0, "start") for i in given["condition_ids"]])
    with torch.no_grad():
        for t, t_next in zip(given["sigmas"], given["sigmas"][1:]):
            x = x + (t_next - t) * policy(x, t, condition)
    assert all(torch.equal(out.latents[:, g], x) for g in range(4))
    assert torch.equal(sample(policy, condition, **given), x)


@pytest.mark.parametrize("name", CURES)
@pytest.mark.parametrize("eta, seed", [(1.0, 0), (0.7, 3)])
def test_window_all_is_stepwise_flow_grpo(name, eta, seed):
    """Every step but the last stochastic, written out with the equations; the recorded steps are the path."""
    policy, condition, given = setting(C=1, steps=6, seed=seed)
    sigmas, G, steps = given["sigmas"], 3, window(0, 6, strategy="all")
    assert steps == (0, 1, 2, 3, 4)
    out = rollout(policy, condition, G, steps, eta=eta, **cure(name, sigmas), **given)
    x = out.x[0].expand(1, G, *SHAPE)[0]
    noise = torch.stack([sampler.normal((5, *SHAPE), seed, 0, 10, g, "steps") for g in range(G)])
    with torch.no_grad():
        for i, (t, t_next) in enumerate(zip(sigmas, sigmas[1:])):
            v, dt = policy(x, t, condition), t - t_next
            if i == 5:
                close(out.latents[0], x - dt * v)
                break
            close(out.x[i].expand(1, G, *SHAPE)[0], x)
            s = eta * torch.sqrt(t / (1 - (sigmas[1] if name == "t_max" and i == 0 else t)))
            s = min(s, 0.45 / dt.sqrt()) if name == "tau" else s
            mean = x - dt * (v + s ** 2 / (2 * t) * (x + (1 - t) * v))
            x = mean + s * dt.sqrt() * noise[:, i]
            close(out.x_next[i][0], x)
            density = torch.distributions.Normal(mean, s * dt.sqrt()).log_prob(x).flatten(1).mean(1)
            close(out.log_prob[i, 0], density)
    assert torch.equal(out.t, sigmas[:5]) and torch.equal(out.t_next, sigmas[1:6]) and out.steps == steps


def same(a, b, tolerance=0.0):
    """Two rollouts agree; a step stored once per group counts as stored for each member."""
    assert a.steps == b.steps and torch.equal(a.t, b.t) and torch.equal(a.t_next, b.t_next)
    pairs = [(a.latents, b.latents), (a.log_prob, b.log_prob), *zip(a.x_next, b.x_next)]
    pairs += [torch.broadcast_tensors(x, y) for x, y in zip(a.x, b.x)]
    for x, y in pairs:
        close(x, y, tolerance)


@pytest.mark.parametrize("steps, tail, guidance", [
    ((0, 1), None, 1), ((3, 4, 5), None, 3), ((2,), 0.4, 1), ((), None, 1)])
@pytest.mark.parametrize("C, G, seed", [(1, 5, 0), (4, 3, 7)])
def test_shared_prefix_is_exact(steps, tail, guidance, C, G, seed):
    policy, condition, given = setting(C=C, seed=seed)
    given |= {"tail": tail, "negative": Labels(-condition.y), "guidance": guidance, "iteration": 2}
    branches = 2 if guidance != 1 else 1
    shared, unshared = (rollout(policy, condition, G, steps, share_prefix=share, micro_batch=1, **given)
                        for share in (True, False))
    same(shared, unshared)
    once = steps[0] + 1 if steps else 8
    per_member = (8 if tail is None else 3 + int(0.4 * 5)) - once
    assert shared.evaluations == branches * C * (once + G * per_member)
    assert unshared.evaluations == branches * C * G * (once + per_member)
    assert not steps or shared.x[0].shape[1] == 1 and unshared.x[0].shape[1] == G
    same(rollout(policy, condition, G, steps, **given), unshared, 1e-5)
    same(rollout(policy, condition, G, steps, share_prefix=False, **given), unshared, 1e-5)


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_micro_batch_and_company_do_not_matter(share_noise, guidance):
    """Nor does it matter which other conditions a rank has."""
    policy, condition, given = setting(C=4, seed=2)
    given |= {"share_noise": share_noise, "negative": Labels(-condition.y), "guidance": guidance}
    whole = rollout(policy, condition, 6, (2, 3), **given)
    assert policy.largest == 4 * 6 * (1 + (guidance != 1))
    assert whole.evaluations == policy.rows
    for rows in 1, 2, 4, 5, 6, 13, 24, 1000:
        policy.largest = 0
        same(rollout(policy, condition, 6, (2, 3), micro_batch=rows, **given), whole, 1e-5)
        assert policy.largest <= max(rows, 1 + (guidance != 1))
    ids = given.pop("condition_ids")
    given["negative"] = given["negative"][2:3]
    alone = rollout(policy, condition[2:3], 4, (2, 3), condition_ids=ids[2:3], **given)
    close(alone.latents[0], whole.latents[2, :4])
    close(alone.log_prob[:, 0], whole.log_prob[:, 2, :4])


def test_chunks_cover_in_order():
    for C, G, rows in (1, 8, 3), (4, 6, 6), (4, 6, 13), (5, 1, 2), (3, 4, None), (2, 3, 1):
        calls = [[(c, m) for c in range(C)[i] for m in range(G)[j]] for i, j in sampler.chunks(C, G, rows)]
        assert sum(calls, []) == [(c, m) for c in range(C) for m in range(G)]
        assert all(len(call) <= (rows or C * G) for call in calls)
    assert len(sampler.chunks(4, 6, 13)) == 2 and len(sampler.chunks(4, 6, 13, branches=2)) == 4


def test_noise_belongs_to_seed_iteration_condition_and_member():
    policy, condition, given = setting(C=2)
    given["condition_ids"] = ["clip_a/traj_1", 7]

    def run(members=3, **change):
        return rollout(policy, condition, members, (0, 1), **(given | change))

    base = run()
    same(run(), base)
    torch.manual_seed(5)
    torch.rand(3)
    same(run(), base)  # the global generator plays no part
    close(run(members=5).latents[:, :3], base.latents)  # nor does the number of members
    for change in {"seed": 1}, {"iteration": 1}, {"condition_ids": ["clip_b/traj_1", 8]}:
        other = run(**change)
        assert not any(torch.equal(other.x[0][c], base.x[0][c]) for c in range(2))
        assert (other.latents - base.latents).abs().amin((2, 3, 4, 5)).max() > 0
    unshared = run(share_noise=False)
    assert unshared.x[0].shape[1] == 3 and torch.equal(unshared.x[0][:, :1], base.x[0])
    draws = torch.stack([sampler.normal((1000,), 0, i, c, g, what) for i in range(4) for c in range(4)
                         for g in range(4) for what in ("start", "steps")])
    assert (torch.corrcoef(draws) - torch.eye(128)).abs().max() < 6 / math.sqrt(1000)
    assert abs(draws.mean()) < 5 / math.sqrt(128_000) and abs(draws.var() - 1) < 5 * math.sqrt(2 / 128_000)


def test_guidance_is_one_batch_negative_first():
    policy, condition, _ = setting(C=2)
    negative, calls = Labels(torch.full((2, 3), 0.3)), []

    def spy(x, t, c):
        calls.append((len(x), c.y))
        return policy(x, t, c)

    x, t = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4)
    v = velocity(spy, x, t, condition, negative, 3.0)
    assert len(calls) == 1 and calls[0][0] == 12
    assert torch.equal(calls[0][1], torch.cat([negative.y, condition.y]))
    v_neg, v_pos = policy(x, t, negative), policy(x, t, condition)
    close(v, v_neg + 3 * (v_pos - v_neg))
    assert torch.equal(velocity(spy, x, t, condition, negative, 1.0), v_pos) and calls[-1][0] == 6
    assert torch.equal(velocity(spy, x, t, condition), v_pos)


def test_state_is_float32_under_a_bf16_policy():
    policy, condition, given = setting()
    out = rollout(policy.bfloat16(), condition, 2, (1, 2), **given)
    for x in (out.latents, out.log_prob, *out.x, *out.x_next):
        assert x.dtype == torch.float32 and not x.requires_grad and not torch.equal(x, x.bfloat16().float())


# ---- the real policy ----

def test_wan_sampling_golden():
    """Guided Euler sampling of a small ReDirector, as its own code does it: 6 steps, shift 5, guidance 5."""
    model = pytest.importorskip("model")
    io = load_file(GOLDEN / "redirector_io.safetensors")
    dit = model.load_dit(GOLDEN / "redirector_weights.safetensors", num_heads=2)
    rest = io["clip_feature"], io["y"], io["camera_target"], io["camera_cond"]
    sigmas, x = schedule(6, 5), io["x"]
    with torch.no_grad():
        negative, condition = (dit.prepare(model.Condition(io[name], *rest))
                               for name in ("negative_context", "context"))
        for t, t_next in zip(sigmas, sigmas[1:]):
            x = ode_step(x, velocity(dit, x, t, condition, negative, 5.0), t, t_next)
    assert (x - io["euler6_cfg5"]).abs().max() < 1e-3
    given = {"sigmas": sigmas, "shape": io["x"].shape[1:], "seed": 0, "condition_ids": [0],
             "negative": negative, "guidance": 5.0}
    whole = rollout(dit, condition, 3, (1, 2), **given)
    same(rollout(dit, condition, 3, (1, 2), micro_batch=2, **given), whole, 1e-4)
    same(rollout(dit, condition, 3, (1, 2), share_prefix=False, **given), whole, 1e-4)
