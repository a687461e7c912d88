"""Advantages and objective: closed forms, the policy's gradient, invariances, and that it learns."""
import copy
import math

import pytest
import torch
from conftest import Labels, close, cure, gaussian, normal, setting
from torch import nn

from grpo import advantages, group_std, micro_batches, policy_loss, summary
from sampler import rollout, schedule, window

NAN, INF = float("nan"), float("inf")


A, B = [[1.0, 3.0], [0.0, 0.4]], [[5.0, 5.0], [2.0, 8.0]]  # deviations in a group: 1 and 0.2; 0 and 3
EQUAL = [[0.1] * 7, [-1e6 / 3] * 7]  # numbers that no binary fraction holds
BY_HAND = {  # rewards, their weights, how to normalise -> advantages
    "max": ([A, B], (1, 0.5), "max", [[-1, 1], [-0.7, 0.7]]),
    "group": ([A, B], (1, 0.5), "group", [[-1, 1], [-1.5, 1.5]]),
    "weight 0 counts for nothing": ([A, [[NAN, 1.0], [2.0, 2.0]]], (1, 0), "max", [[-1, 1], [-0.2, 0.2]]),
    "all the same": ([EQUAL], (1,), "max", [[0] * 7] * 2),
    "below the floor": ([[[0.1, 0.1 + 1e-8, 0.1 - 1e-8]]], (1,), "group", [[0, 0, 0]]),
    "at most 5": ([[[1.0] + [0.0] * 99]], (1,), "max", [[5] + [-0.01 / math.sqrt(0.0099)] * 99]),
    "one failed": ([[[1.0, NAN, 3.0], [0, 3, 6]], [[9.0, 0, 9], [9, 9, 9]]], (1, 1), "max",
                   [[-1 / 6 ** 0.5, 0, 1 / 6 ** 0.5], [-1.5 ** 0.5, 0, 1.5 ** 0.5]]),  # of 1 and 6 ** 0.5
    "a group failed": ([A, [[5.0, 5.0], [-INF, NAN]]], (1, 1), "max", [[-1, 1], [0, 0]]),
    "one left": ([[[1.0, NAN]]], (1,), "max", [[0, 0]])}


@pytest.mark.parametrize("case", BY_HAND)
def test_advantages_by_hand(case):
    """Eq. 5-6; a failed member counts for nothing, in any reward, and its advantage is exactly 0."""
    rewards, weights, normalise, expected = BY_HAND[case]
    rewards = {str(i): torch.tensor(reward, dtype=torch.float64) for i, reward in enumerate(rewards)}
    weights = dict(zip(rewards, map(float, weights)))
    got, expected = advantages(rewards, weights, normalise), torch.tensor(expected).float()
    close(got, expected, 1e-6)
    assert got.dtype == torch.float32 and not got[expected == 0].any()
    if case == "max":
        assert {name: std.tolist() for name, std in group_std(rewards, weights).items()} == {
            "0": pytest.approx([1, 0.2]), "1": pytest.approx([0, 3])}


def gradient(policy, out, a, rows=None, **options):
    """Gradient of L and the statistics, as a training loop collects them."""
    policy.zero_grad()
    stats = []
    for k in range(len(out.x)):
        for conditions, members in micro_batches(out, k, rows):
            loss, s = policy_loss(policy, out, k, a, conditions=conditions, members=members, **options)
            loss.backward()
            stats.append(s)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), summary(stats)


def eq_7(policy, reference, out, a, clip, kl, reweight):
    """L written out member by member in float64, guided, nothing shared -> L, and what of it was clipped."""
    terms, clipped = [], []
    for k, i in enumerate(out.steps):
        t, t_next = out.t[k].double(), out.t_next[k].double()
        dt = t - t_next
        sigma = torch.sqrt(t / (1 - (out.t_max if out.t_max and i == 0 else t)))
        sigma = sigma if out.tau is None else min(sigma, out.tau / dt.sqrt())
        weight = sigma / dt.sqrt() if reweight else 1.0
        for c, g in torch.cartesian_prod(*map(torch.arange, a.shape)).tolist():
            x = out.x[k][c, g % out.x[k].shape[1]].double()[None]

            def transition(policy):
                v_neg, v_pos = (policy(x, t, Labels(labels.y[c:c + 1].double()))
                                for labels in (out.negative, out.condition))
                v = v_neg + out.guidance * (v_pos - v_neg)
                mean = x - dt * (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v))
                return torch.distributions.Normal(mean, sigma * dt.sqrt())

            new, old = transition(policy), transition(reference)
            r = torch.exp(new.log_prob(out.x_next[k][c, g].double()).mean() - out.log_prob[k, c, g].double())
            gain = torch.minimum(r * a[c, g], r.clamp(1 - clip, 1 + clip) * a[c, g])
            divergence = torch.distributions.kl_divergence(new, old).mean()
            terms.append(-weight * gain + kl * weight ** 2 * divergence)
            clipped.append(abs(float(r.detach()) - 1) > clip)
    return sum(terms) / len(terms), sum(clipped) / len(clipped)


@pytest.mark.parametrize("C, G, steps, name, kl, reweight", [
    (2, 4, (0, 1, 2), "tau", 0.0, True), (1, 6, (3, 4), "t_max", 0.2, True),
    (2, 3, (0,), "t_max", 0.2, False)])
def test_objective_is_eq_7(C, G, steps, name, kl, reweight):
    """Value and gradient of the shared, guided objective, off policy, some ratios clipped."""
    policy, condition, given = setting(C=C)
    out = rollout(policy, condition, G, steps, negative=Labels(normal(C, 3, seed=8)), guidance=2.5,
                  **given, **cure(name, given["sigmas"]))
    a, reference = normal(C, G, seed=1), copy.deepcopy(policy)
    with torch.no_grad():
        policy.b += 0.1 * normal(*policy.b.shape, seed=4)
    moved = (policy_loss(policy, out, 0, a)[1]["ratio"] - 1).abs().sort().values
    clip = float(moved[len(moved) // 2 - 1:len(moved) // 2 + 1].mean())  # between two: no gradient on one
    got, stats = gradient(policy, out, a, 3, clip=clip, kl=kl, reference=reference, reweight=reweight)
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    loss, clipped = eq_7(exact, copy.deepcopy(reference).double(), out, a.double(), clip, kl, reweight)
    loss.backward()
    assert 0 < clipped < 1 and float(stats["clip_fraction"]) == pytest.approx(clipped)
    close(stats["loss"].double(), loss.detach(), 1e-5)
    close(got.double(), torch.cat([p.grad.flatten() for p in exact.parameters()]), 2e-5)
    if kl:
        assert stats["kl"] > 0 and reference.b.grad is None
        assert gradient(policy, out, a, kl=kl, reference=policy)[1]["kl"] == 0  # of a policy to itself


@pytest.mark.parametrize("steps, options", [
    ((2, 3, 4), {"tail": 0.4}), ((0,), {"guidance": 3.0, "tau": 0.45, "t_max": None}),
    ([(2, 3), (0, 1), (2, 3)], {"guidance": 3.0}), ([(2, 3), (0, 1), (2, 3)], {"share_prefix": False})])
def test_an_update_is_a_sum_over_micro_batches_conditions_and_ranks(steps, options):
    """On policy, r = 1 whatever the micro-batches; loss and gradient are those of the conditions, each alone,
    whose windows may differ; with the prefix shared, the network sees one row per group at the first step."""
    policy, condition, given = setting()
    given |= {"negative": Labels(-condition.y)} | cure("t_max", given["sigmas"]) | options
    whole = rollout(policy, condition, 4, steps, **given)
    a = normal(3, 4)
    a[1, :2] = 0  # failed members are counted in the total all the same
    total_gradient, expected = gradient(policy, whole, a)
    for rows in None, 1, 2, 3, 9:
        policy.rows = 0
        got, stats = gradient(policy, whole, a, rows)
        assert stats["ratio_error"] < 1e-6 and stats["clip_fraction"] == 0
        assert policy.rows == whole.branches * sum(x.shape[:2].numel() for x in whole.x)
        close(got, total_gradient)
        close(stats["loss"], expected["loss"])
    assert whole.x[0].shape[1] == (4 if "share_prefix" in options else 1)
    parts = []
    for j in range(3):
        mine = given | {"condition_ids": [10 + j], "negative": given["negative"][j:j + 1]}
        part = rollout(policy, condition[j:j + 1], 4, steps[j] if isinstance(steps, list) else steps, **mine)
        parts.append(gradient(policy, part, a[j:j + 1], total=3 * 4 * len(whole.x)))
    close(sum(grad for grad, _ in parts), total_gradient)
    close(sum(stats["loss"] for _, stats in parts), expected["loss"])
    halves = [gradient(policy, whole.part(slice(i, i + 2)), a[:, i:i + 2]) for i in (0, 2)]
    close((halves[0][0] + halves[1][0]) / 2, total_gradient)


class GaussianPolicy(nn.Module):
    """The exact velocity for data N(mean, 0.5^2) in 2-D, a trainable mean per condition."""
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x, t, condition):
        a, b = gaussian(t, self.mean[condition.repeat_interleave(len(x) // len(condition))], 0.5)
        return a * x + b


def test_policy_improvement():
    """The reward -|x - target|^2 draws each of four conditions to its target, in 100 iterations."""
    policy, targets = GaussianPolicy(), 2 * normal(4, 1, 2)
    for i in range(100):
        out = rollout(policy, torch.arange(4), 8, window(i, 10, 2), sigmas=schedule(10, 3), shape=(2,),
                      seed=0, condition_ids=range(4), iteration=i)
        reward = -(out.latents - targets).square().sum(-1)
        g, _ = gradient(policy, out, advantages({"r": reward}, {"r": 1.0}))
        policy.mean.data -= 0.1 * g.sign().view(4, 2)
    assert (policy.mean - targets[:, 0]).norm(dim=1).max() < 0.5 < targets.norm(dim=2).min()


@pytest.mark.parametrize("message, call", [
    ("weights", lambda: advantages({"a": torch.zeros(2, 2)}, {"b": 1.0})),
    ("shape", lambda: advantages({"a": normal(2, 3), "b": normal(3, 2)}, {"a": 1.0, "b": 1.0})),
    ("normalise", lambda: advantages({"a": torch.zeros(2, 2)}, {"a": 1.0}, normalise="batch")),
    ("reference", lambda: policy_loss(None, None, 0, None, kl=0.1))])
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call()
