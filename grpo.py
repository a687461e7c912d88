"""GRPO: from rewards to advantages (paper Eq. 5-6), and the objective (Eq. 7).

No KL term by default, as in the paper; max-std normalisation and per-step reweighting are LongCat-Video's.
"""
import torch

from sampler import chunks, sde_step, velocity


def succeeded(rewards, weights):
    """(C, G) bool: members all of whose rewards are finite. Rewards of weight 0 do not count.

    rewards: name -> (C, G); weights: name -> float, the same names. The training loop logs how many failed.
    """
    if set(rewards) != set(weights):
        raise ValueError(f"weights: expected one for each of {sorted(rewards)}, found {sorted(weights)}")
    shapes = {name: tuple(reward.shape) for name, reward in rewards.items()}
    if not shapes or len(set(shapes.values())) > 1:
        raise ValueError(f"rewards: expected one shape (conditions, members), found {shapes}")
    finite = [torch.isfinite(reward) | (weights[name] == 0) for name, reward in rewards.items()]
    return torch.stack(finite).all(0)


def _centred(reward, ok):
    """Deviation from the group's mean (C, G), 0 for failed members, and the group's population std (C,)."""
    count = ok.sum(1, keepdim=True).clamp(min=1)
    reward = torch.where(ok, reward.double(), 0)  # double: equal rewards give a std of exactly 0
    centred = torch.where(ok, reward - reward.sum(1, keepdim=True) / count, 0)
    return centred, (centred.square().sum(1, keepdim=True) / count).sqrt().squeeze(1)


def group_std(rewards, weights):
    """name -> (C,) std of each group's successful members; the maximum over groups and ranks is for Eq. 5."""
    ok = succeeded(rewards, weights)
    return {name: _centred(reward, ok)[1] for name, reward in rewards.items() if weights[name]}


def advantages(rewards, weights, max_std=None, normalise="max", bound=5.0, floor=1e-6):
    """Advantages (C, G) float32 of C groups of G members from named rewards (Eq. 5-6), clamped to +-bound.

    rewards: name -> (C, G), higher is better, NaN or inf where a member failed; weights: name -> float.
    max_std: name -> largest group std of all ranks (None: of these groups). A group whose rewards hardly
    differ stays small; where even the largest std is below `floor` (reward's units) it is 0, not noise.
    normalise="group" divides by each group's own std instead (the original GRPO, for ablation).
    A member with any failed reward counts for neither mean nor std, and its advantage is exactly 0.
    """
    if normalise not in ("max", "group"):
        raise ValueError(f"normalise: expected max or group, found {normalise!r}")
    ok = succeeded(rewards, weights)
    total = torch.zeros(ok.shape, dtype=torch.float64, device=ok.device)
    for name, reward in rewards.items():
        if weights[name]:
            centred, std = _centred(reward, ok)
            if normalise == "max":
                largest = std.max() if max_std is None else torch.as_tensor(max_std[name]).to(std)
                std = largest.expand_as(std)
            std = std.unsqueeze(1)
            total += weights[name] * torch.where(std > floor, centred / std.clamp(min=floor), 0)
    return total.clamp(-bound, bound).float()


def micro_batches(rollout, k, rows=None):
    """(conditions, members) slices for policy_loss at window step k, `rows` network rows at most in each.

    At a shared first step one row serves a whole group, whatever its size.
    """
    C, M = rollout.x[k].shape[:2]
    return [(c, slice(None) if M == 1 else m) for c, m in chunks(C, M, rows, rollout.branches)]


def policy_loss(policy, rollout, k, advantages, total=None, conditions=slice(None), members=slice(None),
                clip=1e-4, reweight=True, kl=0.0, reference=None):
    """The share of L (Eq. 7) of window step k and slices of conditions and members: (0-dim loss, statistics).

    L is the sum, over window steps, conditions and members, of
      -lambda_t min(r A, clip(r, 1 - clip, 1 + clip) A) / total
    with r = p_new / p_old and lambda_t = sigma_t / sqrt(dt).
    advantages: (C, G). total: conditions x members x window steps, failed ones too (None: this rollout's).
    Over ranks, gradients are summed if `total` counts the conditions of all, averaged (DDP) if its own.
    Where a group shares x the network runs once per condition and its velocity serves all members: the
    gradients of G losses add up at that one v, and one backward carries their sum.
    reweight=False leaves lambda_t out (ablation). kl > 0 adds kl lambda_t^2 KL(new || reference) per member
    (LongCat-Video; ablation), `reference` another policy.
    Statistics stay tensors, so nothing waits for the device: give the list of them to `summary`.
    """
    if kl and reference is None:
        raise ValueError("kl > 0 needs a reference policy")
    x, x_next = rollout.x[k][conditions], rollout.x_next[k][conditions, members]
    x = x if x.shape[1] == 1 else x[:, members]
    t, t_next, sde = rollout.t[k], rollout.t_next[k], (rollout.eta, rollout.tau, rollout.t_max)
    negative = None if rollout.negative is None else rollout.negative[conditions]
    old, advantage = rollout.log_prob[k][conditions, members], advantages[conditions, members]
    total = rollout.log_prob.numel() if total is None else total

    def score(policy):
        v = velocity(policy, x.flatten(0, 1), t, rollout.condition[conditions], negative, rollout.guidance)
        v = v.unflatten(0, x.shape[:2]).expand_as(x_next)  # (c, 1, ...) -> (c, G, ...) where x is shared
        _, log_prob, mean, std = sde_step(x.expand_as(x_next).flatten(0, 1), v.flatten(0, 1), t, t_next, *sde,
                                          x_next=x_next.flatten(0, 1))
        return log_prob.view(old.shape), mean, std

    log_prob, mean, std = score(policy)
    ratio = torch.exp(log_prob - old)
    weight = std / (t - t_next) if reweight else torch.ones_like(std)  # lambda_t, as std = sigma_t sqrt(dt)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    loss = -(weight * objective).sum() / total  # Eq. 7
    stats = {"step": k, "ratio": ratio.detach().flatten(), "advantage": advantage.flatten(),
             "clipped": ((ratio.detach() - 1).abs() > clip).flatten()}
    if kl:
        with torch.no_grad():
            _, mean_reference, _ = score(reference)
        divergence = ((mean - mean_reference) / std).square().flatten(1).mean(1) / 2  # a mean, like log_prob
        loss = loss + kl * (weight.square() * divergence).sum() / total
        stats["kl"] = divergence.detach()
    stats["loss"] = loss.detach()
    return loss, stats


def summary(stats):
    """From a list of policy_loss's statistics, one set: 0-dim tensors, and loss_per_step (n,).

    On the first pass ratio_error, max |r - 1|, must be well below the clip range: else the update's numerics
    are not the rollout's.
    """
    def every(name):
        return torch.cat([s[name] for s in stats])

    steps = sorted({s["step"] for s in stats})
    losses = torch.stack([sum(s["loss"] for s in stats if s["step"] == k) for k in steps])
    out = {"loss": losses.sum(), "loss_per_step": losses, "ratio_mean": every("ratio").mean(),
           "ratio_error": (every("ratio") - 1).abs().max(), "clip_fraction": every("clipped").float().mean(),
           "advantage_mean": every("advantage").mean(), "advantage_std": every("advantage").std(correction=0)}
    return {**out, "kl": every("kl").mean()} if "kl" in stats[0] else out
