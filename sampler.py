"""The mixed ODE-SDE sampler: schedule, steps, window, rollout (paper Sec. 3.2, after MixGRPO).

Flow matching: x_t = (1-t) x_0 + t eps, t = 1 is noise; a policy predicts v = eps - x_0. Inside a sliding
window of steps the sampler is stochastic, so that transitions have a density to do policy gradients with;
everywhere else it is the deterministic ODE. The equations are those of Flow-GRPO (SDE), MixGRPO (window, fast
tail) and LongCat-Video (capped std, shared initial noise).

A `policy` is any callable policy(x, t, condition) -> velocity: x (B, ...), t 0-dim in [0, 1], and a condition
of b rows, b dividing B, where row r of x belongs to condition r // (B // b). A condition can be sliced
([i:j]) and concatenated (.cat([a, b])); nothing else is known of it here. All state is float32, whatever the
policy's dtype.
"""
import dataclasses
import hashlib
import math
from dataclasses import dataclass

import torch


def schedule(steps, shift):
    """Noise levels for `steps` denoising steps, (steps+1,) float32 from 1 to 0; shift > 1 pushes to noise."""
    if steps < 1 or not shift > 0:
        raise ValueError(f"schedule: expected at least 1 step and a shift > 0, found {steps} and {shift}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def compress(sigmas, start, fraction):
    """Levels from sigmas[start] to 0 in max(1, int(fraction * m)) steps instead of m, even before the shift.

    MixGRPO's fast tail. sigmas is a `schedule`: its shift is read off its middle.
    """
    steps = len(sigmas) - 1
    keep = max(1, int(fraction * (steps - start)))
    u, t = 1 - (steps // 2) / steps, float(sigmas[steps // 2])
    shift = t * (1 - u) / (u * (1 - t)) if steps > 1 else 1.0
    u = torch.linspace(1 - start / steps, 0, keep + 1, dtype=torch.float64)
    levels = (shift * u / (1 + (shift - 1) * u)).float()
    levels[0] = sigmas[start]
    return levels


def _level(t, x):
    """A noise level as float32, 0-dim or (B, 1, ..., 1) to broadcast against x."""
    t = torch.as_tensor(t, dtype=torch.float32)
    return t.to(x.device).view(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def ode_step(x, v, t, t_next):
    """One Euler step of dx/dt = v from level t down to t_next; x, v (B, ...), t 0-dim or (B,). Float32."""
    x, v = x.float(), v.float()
    return x + (_level(t_next, x) - _level(t, x)) * v


def sde_step(x, v, t, t_next, eta=1.0, tau=0.45, t_max=None, noise=None, x_next=None):
    """An Euler-Maruyama step of an SDE with the ODE's marginals, sigma_t = eta sqrt(t / (1 - t)) (Flow-GRPO).

    x, v (B, ...); t > t_next noise levels, 0-dim or (B,). Give `noise` (B, ...) to sample (absent: drawn from
    torch's global generator) or `x_next` (B, ...) to score a step already taken.
    sigma_t is infinite at t = 1. Two cures: `tau` caps the step's std, in the drift too (LongCat-Video, the
    default); `t_max`, the schedule's second value, replaces a larger t in 1 - t (Flow-GRPO, MixGRPO; then
    tau=None). With neither, t = 1 raises ValueError.
    Returns x_next (B, ...), log_prob (B,), mean (B, ...), std (0-dim; (B, 1, ..., 1) if t is (B,)), float32.
    log_prob is the mean over elements, not the sum: ratios stay readable at any latent size.
    """
    if eta <= 0:
        raise ValueError(f"eta: expected > 0, found {eta}; without noise there is no density, use ode_step")
    if tau is None and t_max is None and bool((torch.as_tensor(t) >= 1).any()):
        raise ValueError("sde_step at t = 1 needs tau or t_max: sigma_t is infinite there")
    x, v = x.float(), v.float()
    t, t_next = _level(t, x), _level(t_next, x)
    dt = t - t_next
    sigma = eta * torch.sqrt(t / (1 - (t if t_max is None else t.clamp(max=float(t_max)))))
    std = sigma * dt.sqrt()
    if tau is not None:
        std = std.clamp(max=tau)
    mean = x - dt * v - std.square() / (2 * t) * (x + (1 - t) * v)  # sigma_t^2 dt = std^2, capped or not
    if x_next is None:
        x_next = mean + std * (torch.randn_like(x) if noise is None else noise.float())
    z = (x_next.float() - mean) / std  # not `noise`: scoring later repeats these very sums, so r is exactly 1
    log_prob = -0.5 * z.square().flatten(1).mean(1) - std.log().flatten() - math.log(2 * math.pi) / 2
    return x_next.float(), log_prob, mean, std


def dpm_step(x, x0, t, t_next, x0_before=None, t_before=None):
    """One step of DPM-Solver++(2M), data prediction, midpoint; first order without the one before."""
    def log_snr(t):
        return torch.log((1 - t) / t)  # infinite at t = 0 and 1: the expressions below have limits there
    x, x0, t, t_next = x.float(), x0.float(), _level(t, x), _level(t_next, x)
    h = log_snr(t_next) - log_snr(t)
    if x0_before is not None:
        x0 = x0 + (x0 - x0_before.float()) * h / (2 * (log_snr(t) - log_snr(_level(t_before, x))))
    return t_next / t * x - (1 - t_next) * torch.expm1(-h) * x0


def window(iteration, steps, size=4, strategy="progressive", stride=1, iters_per_window=1, first=None,
           seed=0):
    """The consecutive steps that are stochastic and trained on at an iteration (from 0): a tuple of indices.

    A function of the iteration alone, so that it is right after a resume. Always `size` wide, never the last
    step (t -> 0), and within the first `first` steps if given; ValueError where that cannot be.
    progressive: advance by `stride` every `iters_per_window` iterations; back to 0 before width would be lost
    random: uniform start, drawn anew every iteration (LongCat-Video: size 1, first 6 of 16)
    all: every usable step (Flow-GRPO); `size` is not used
    """
    usable = steps - 1 if first is None else min(first, steps - 1)
    if strategy == "all":
        size = usable
    if not 1 <= size <= usable:
        raise ValueError(f"window size: expected 1 to {usable} (steps {steps}, first {first}), found {size}")
    starts = range(usable - size + 1)
    if strategy == "progressive":
        starts = starts[::stride]
        start = starts[iteration // iters_per_window % len(starts)]
    elif strategy == "random":
        start = starts[_hash(seed, iteration, "window") % len(starts)]
    elif strategy == "all":
        start = 0
    else:
        raise ValueError(f"window strategy: expected progressive, random or all, found {strategy!r}")
    return tuple(range(start, start + size))


def _hash(*key):
    """A 63-bit integer from a key, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _noise(shape, *key, generator=torch.Generator()):
    """Normal noise that depends on the key alone; drawn on the CPU, so that the device does not matter."""
    return torch.randn(shape, generator=generator.manual_seed(_hash(*key)))


def velocity(policy, x, t, condition, negative=None, guidance=1.0):
    """The policy's velocity (B, ...) float32 at x (B, ...), guided if there is a negative and guidance not 1.

    v = v_neg + guidance (v_pos - v_neg), both branches from one batch [negative; positive].
    """
    if negative is None or guidance == 1:
        return policy(x, t, condition).float()
    v_neg, v_pos = policy(torch.cat([x, x]), t, condition.cat([negative, condition])).float().chunk(2)
    return v_neg + guidance * (v_pos - v_neg)


def chunks(conditions, members, rows=None, branches=1):
    """Slices (of conditions, of members) that cover conditions x members in order, each one network call.

    A call has at most `rows` rows (None: no limit), `branches` of them for each member.
    """
    rows = conditions * members if rows is None else max(1, rows // branches)
    c, m = max(1, rows // members), min(members, rows)
    return [(slice(i, min(i + c, conditions)), slice(j, min(j + m, members)))
            for i in range(0, conditions, c) for j in range(0, members, m)]


@dataclass
class Rollout:
    """Samples, and what a policy update needs. C conditions, G members, n window steps, latents (...)."""
    latents: torch.Tensor   # (C, G, ...) at t = 0
    steps: tuple            # n indices into the schedule
    t: torch.Tensor         # (n,)
    t_next: torch.Tensor    # (n,)
    x: list                 # n of (C, G, ...) before the step; the first (C, 1, ...) where groups share it
    x_next: list            # n of (C, G, ...) after the step (x_next[k] is x[k + 1], not a copy)
    log_prob: torch.Tensor  # (n, C, G)
    condition: object       # from here on: what it was sampled with; an update must repeat it for r to be 1
    negative: object
    guidance: float
    eta: float
    tau: float | None
    t_max: float | None
    evaluations: int        # rows the network has seen

    def part(self, members):
        """The same rollout, of a slice of its members only: for several updates on one rollout."""
        x = [x if x.shape[1] == 1 else x[:, members] for x in self.x]
        return dataclasses.replace(self, latents=self.latents[:, members], x=x,
                                   log_prob=self.log_prob[:, :, members],
                                   x_next=[x[:, members] for x in self.x_next])

    @property
    def branches(self):
        """Network rows per member: guidance needs two."""
        return 1 if self.negative is None or self.guidance == 1 else 2


@torch.no_grad()
def rollout(policy, condition, members, window, *, sigmas, shape, seed, condition_ids, iteration=0, eta=1.0,
            tau=0.45, t_max=None, negative=None, guidance=1.0, micro_batch=None, share_noise=True,
            share_prefix=True, tail=None, device="cpu"):
    """Sample `members` latents for each of C conditions, stochastic in the window's steps only -> Rollout.

    condition, negative: C rows each; condition_ids: C numbers or strings naming them; shape: of one latent.
    sigmas: a `schedule`; window: consecutive steps, may be empty, without the last.
    Noise depends on (seed, iteration, condition id, member) alone: not on ranks, device or micro-batch.
    micro_batch: rows per network call at most, both branches of guidance counted (None: all at once).
    share_noise: groups start from one noise (LongCat-Video, MixGRPO). share_prefix: then it is one latent up
      to the first window step, and needs one velocity there too. Exact; False computes all G, for comparison.
    tail: fraction of the steps after the window to keep, by DPM-Solver++(2M) (MixGRPO-Flash: 0.4); None: ODE.
    """
    steps, n, window = len(sigmas) - 1, len(window), tuple(window)
    if n and (window != tuple(range(window[0], window[0] + n)) or window[0] < 0 or window[-1] > steps - 2):
        raise ValueError(f"window: expected consecutive steps within 0..{steps - 2}, found {window}")
    C, G, stop = len(condition_ids), members, window[-1] + 1 if n else 0
    levels = None if tail is None else compress(sigmas, stop, tail).to(device)
    sigmas = sigmas.to(device)
    at = torch.tensor(window, dtype=torch.long, device=device)
    out = Rollout(None, window, sigmas[at], sigmas[at + 1], [], [], torch.zeros(n, C, G, device=device),
                  condition, negative, guidance, eta, tau, t_max, 0)

    def draw(count, what, *shape):
        return torch.stack([torch.stack([_noise(shape, seed, iteration, i, g, what) for g in range(count)])
                            for i in condition_ids])

    def evaluate(x, t):  # (C, M, ...) -> velocity (C, M, ...)
        v = torch.empty_like(x, memory_format=torch.contiguous_format)
        for c, m in chunks(*x.shape[:2], micro_batch, out.branches):
            guide = condition[c], None if negative is None else negative[c], guidance
            v[c, m] = velocity(policy, x[c, m].flatten(0, 1), t, *guide).unflatten(0, x[c, m].shape[:2])
        out.evaluations += out.branches * x.shape[0] * x.shape[1]
        return v

    x = draw(1 if share_noise else G, "start", *shape).to(device)  # (C, M, ...): M latents that differ so far
    if not share_prefix:
        x = x.expand(C, G, *shape)
    noise = draw(G, "steps", n, *shape) if n else None  # (C, G, n, ...), on the CPU
    for i in range(steps if tail is None else stop):
        v = evaluate(x, sigmas[i])
        if i not in window:
            x = ode_step(x, v, sigmas[i], sigmas[i + 1])
            continue
        k = i - window[0]
        eps = noise[:, :, k].to(device)
        out.x.append(x)
        x, v = x.expand_as(eps).flatten(0, 1), v.expand_as(eps).flatten(0, 1)  # here a group's members part
        x, log_prob, _, _ = sde_step(x, v, sigmas[i], sigmas[i + 1], eta, tau, t_max, noise=eps.flatten(0, 1))
        x = x.view(eps.shape)
        out.x_next.append(x)
        out.log_prob[k] = log_prob.view(C, G)
    if tail is not None:
        x0_before = None
        for i in range(len(levels) - 1):
            x0 = x - levels[i] * evaluate(x, levels[i])
            second = 0 < i < len(levels) - 2  # first order at both ends
            x = dpm_step(x, x0, levels[i], levels[i + 1], x0_before if second else None, levels[i - 1])
            x0_before = x0
    out.latents = x.expand(C, G, *shape)
    return out


def sample(policy, condition, *, sigmas, shape, seed, condition_ids, **options):
    """One sample per condition by the plain ODE, (C, ...): a `rollout` with an empty window; same options."""
    return rollout(policy, condition, 1, (), sigmas=sigmas, shape=shape, seed=seed,
                   condition_ids=condition_ids, **options).latents[:, 0]
