"""GRPO: from rewards to advantages (paper Eq. 5-6), and the objective (Eq. 7).

No KL term by default, as in the paper. The normalisation by the largest deviation and the weight of
each step are LongCat-Video's.

What is known of one update per iteration, where r = 1 throughout and the clip never acts: with
lambda_t the gradient of L in v is (1 + eta^2 / 2) A eps / D at any step, D latent elements; this
factor tends to 1 where the std is capped. Up to it this is GRPO-Guard's normalised ratio (arXiv
2510.22319) and Flash-GRPO's rectified loss (arXiv 2605.15980). lambda_t uses the capped sigma_t,
as LongCat's authors confirm (issue 80 of their repository). Because D divides, gradients are tiny
at video size, and AdamW needs an eps far below them: see train.Config.eps.
"""
import torch

from sampler import chunks, sde_step, velocity


# ---- advantages ----

def succeeded(rewards, weights):
    """(C, G) bool: members all of whose rewards are finite. Rewards of weight 0 do not count.

    rewards: name -> (C, G); weights: name -> float, the same names.
    """
    check_rewards(rewards, weights)
    finite = [torch.isfinite(reward) | (weights[name] == 0) for name, reward in rewards.items()]
    return torch.stack(finite).all(0)


def centre(reward, ok):
    """A reward's deviation from its group's mean (C, G), and the group's standard deviation (C,).

    ok (C, G): members that count; the others' deviation is 0. In double precision, so that equal
    rewards have a deviation of exactly 0.
    """
    count = ok.sum(1, keepdim=True).clamp(min=1)
    reward = torch.where(ok, reward.double(), 0)
    group_mean = reward.sum(1, keepdim=True) / count
    deviation = torch.where(ok, reward - group_mean, 0)
    std = (deviation.square().sum(1) / count[:, 0]).sqrt()
    return deviation, std


def group_std(rewards, weights):
    """name -> (C,) standard deviation of each group's successful members, for the log."""
    ok = succeeded(rewards, weights)
    return {name: centre(reward, ok)[1] for name, reward in rewards.items() if weights[name]}


def advantages(rewards, weights, normalise="max", bound=5.0, floor=1e-6):
    """Advantages (C, G) float32 of all ranks' C groups of G members, from named rewards (Eq. 5-6).

    rewards: name -> (C, G), higher is better, NaN or inf where a member failed; weights: name ->
      float.
    Each reward is divided by the largest group deviation, so that a group whose rewards hardly
    differ stays small. Where even the largest is below floor (in the reward's unit) the advantage
    is 0, not noise. normalise="group" divides by each group's own (original GRPO, for ablation).
    A member with any failed reward counts for neither mean nor deviation; its advantage is exactly
    0. The sum is clamped to +-bound.
    """
    check_normalise(normalise)
    ok = succeeded(rewards, weights)
    total = torch.zeros(ok.shape, dtype=torch.float64, device=ok.device)
    for name, reward in rewards.items():
        if weights[name] == 0:
            continue
        deviation, std = centre(reward, ok)
        if normalise == "max":
            std = std.max().expand_as(std)
        std = std[:, None]
        normalised = deviation / std.clamp(min=floor)                        # Eq. 5
        total += weights[name] * torch.where(std > floor, normalised, 0)     # Eq. 6
    return total.clamp(-bound, bound).float()


# ---- the objective ----

def micro_batches(rollout, k, rows=None):
    """(conditions, members) slices for policy_loss at window step k, at most `rows` rows in each.

    At a shared first step one row serves a whole group, whatever its size.
    """
    C, M = rollout.x[k].shape[:2]
    return [(c, slice(None) if M == 1 else m) for c, m in chunks(C, M, rows, rollout.branches)]


def policy_loss(policy, rollout, k, advantages, total=None, conditions=slice(None),
                members=slice(None), clip=1e-4, reweight=True, kl=0.0, reference=None):
    """The share of L (Eq. 7) of window step k and slices of conditions and members.

    L is the sum, over window steps, conditions and members, of
      -lambda_t min(r A, clip(r, 1 - clip, 1 + clip) A) / total
    with r = p_new / p_old and lambda_t = sigma_t / sqrt(dt).
    advantages: (C, G). total: conditions x members x window steps, failed ones too (None: this
      rollout's). Over ranks, gradients are summed if it counts all ranks' conditions, averaged
      (DDP) if its own.
    reweight=False leaves lambda_t out (ablation). kl > 0 adds kl lambda_t^2 KL(new || reference)
      per member (LongCat-Video; ablation), reference another policy: the base.
    Where a group shares x the network runs once per condition and its velocity serves all members:
    the gradients of G losses add up at that one v, and one backward carries their sum.
    Returns the 0-dim loss, and statistics for `summary`; they stay tensors, so nothing waits.
    """
    check_reference(kl, reference)
    total = rollout.log_prob.numel() if total is None else total
    x_next = rollout.x_next[k][conditions, members]                          # (c, m, ...)
    x = rollout.x[k][conditions]                                             # (c, 1 or G, ...)
    if x.shape[1] > 1:
        x = x[:, members]
    old = rollout.log_prob[k][conditions, members]                           # (c, m)
    A = advantages[conditions, members]
    negative = None if rollout.negative is None else rollout.negative[conditions]
    levels = rollout.levels(k, conditions)                                   # 0-dim or (c,)

    def score(policy):
        """log p (c, m), mean and std of the transitions that were taken, under a policy."""
        t, _ = rows_of(levels, x)
        v = velocity(policy, x.flatten(0, 1), t, rollout.condition[conditions], negative,
                     rollout.guidance)
        v = v.view(x.shape).expand_as(x_next)  # one velocity serves a group that shares x
        t, t_next = rows_of(levels, x_next)
        _, log_prob, mean, std = sde_step(
            x.expand_as(x_next).flatten(0, 1), v.flatten(0, 1), t, t_next, rollout.eta,
            rollout.tau, rollout.t_max, x_next=x_next.flatten(0, 1))
        return log_prob.view(old.shape), mean, std

    log_prob, mean, std = score(policy)
    t, t_next = rows_of(levels, x_next)
    lambda_t = std.flatten() / (t - t_next).flatten()  # sigma_t / sqrt(dt)
    if not reweight:
        lambda_t = torch.ones_like(lambda_t)
    if len(lambda_t) > 1:
        lambda_t = lambda_t.view(old.shape)  # conditions at different noise levels

    ratio = torch.exp(log_prob - old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -(lambda_t * torch.minimum(ratio * A, clipped * A)).sum() / total  # Eq. 7
    is_clipped = (ratio.detach() - 1).abs() > clip
    stats = {"ratio": ratio.detach().flatten(), "clipped": is_clipped.flatten()}
    if kl:
        with torch.no_grad():
            _, base_mean, _ = score(reference)
        # KL of two Gaussians of one std; averaged over elements, like log_prob.
        divergence = ((mean - base_mean) / std).square().flatten(1).mean(1).view(old.shape) / 2
        loss = loss + kl * (lambda_t.square() * divergence).sum() / total
        stats["kl"] = divergence.detach().flatten()
    stats["loss"] = loss.detach()
    return loss, stats


def rows_of(levels, x):
    """Noise levels, 0-dim or one per condition (c,) -> 0-dim, or one per row of x (c, m, ...)."""
    return [level.repeat_interleave(x.shape[1]) if level.ndim else level for level in levels]


def summary(stats):
    """policy_loss's statistics of all micro-batches as one set of 0-dim tensors.

    On the first pass ratio_error, max |r - 1|, must be well below the clip range: else the update's
    numerics are not the rollout's.
    """
    ratio = torch.cat([s["ratio"] for s in stats])
    out = {"loss": torch.stack([s["loss"] for s in stats]).sum(),
           "ratio_error": (ratio - 1).abs().max(),
           "clip_fraction": torch.cat([s["clipped"] for s in stats]).float().mean()}
    if "kl" in stats[0]:
        out["kl"] = torch.cat([s["kl"] for s in stats]).mean()
    return out


# ---- refusals ----

def check_rewards(rewards, weights):
    """ValueError unless rewards and weights have the same names, and all rewards one shape."""
    if set(rewards) != set(weights):
        raise ValueError(f"weights: expected one for each of {sorted(rewards)}, "
                         f"found {sorted(weights)}")
    shapes = {name: tuple(reward.shape) for name, reward in rewards.items()}
    if not shapes or len(set(shapes.values())) > 1:
        raise ValueError(f"rewards: expected one shape (conditions, members), found {shapes}")


def check_normalise(normalise):
    if normalise not in ("max", "group"):
        raise ValueError(f"normalise: expected max or group, found {normalise!r}")


def check_reference(kl, reference):
    if kl and reference is None:
        raise ValueError("kl > 0 needs a reference policy")
