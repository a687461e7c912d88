"""The mixed ODE-SDE sampler: schedule, steps, window, rollout (paper Sec. 3.3, after MixGRPO).

Flow matching: x_t = (1-t) x_0 + t eps, t = 1 is noise; a policy predicts v = eps - x_0. Inside a
sliding window of steps the sampler is stochastic, so that transitions have a density to do policy
gradients with. Everywhere else it is the deterministic ODE. The equations are those of Flow-GRPO
(SDE), MixGRPO (window, fast tail) and LongCat-Video (capped std, shared initial noise).

A policy is any callable policy(x, t, condition) -> velocity: x (B, ...), t 0-dim or (B,), and a
condition of b rows, b dividing B: row r of x belongs to condition r // (B // b). A condition can be
indexed ([i:j] or [[0, 2]]) and concatenated (.cat([a, b])); nothing else is known of it here. All
state is float32, whatever the policy's dtype.
"""
import dataclasses
import hashlib
import math
from dataclasses import dataclass

import torch


# ---- schedule and steps ----

def schedule(steps, shift):
    """Noise levels (steps+1,) float32, from 1 to 0; a shift above 1 pushes them to noise."""
    check_schedule(steps, shift)
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def compress(sigmas, start, fraction):
    """Levels from sigmas[start] to 0 in a fraction of the steps, evenly spaced before the shift.

    MixGRPO's fast tail: of m steps max(1, int(fraction * m)) are kept. sigmas is a `schedule`: its
    shift is read off its middle.
    """
    steps = len(sigmas) - 1
    keep = max(1, int(fraction * (steps - start)))
    middle = steps // 2
    u = 1 - middle / steps
    t = float(sigmas[middle])
    shift = t * (1 - u) / (u * (1 - t)) if steps > 1 else 1.0
    u = torch.linspace(1 - start / steps, 0, keep + 1, dtype=torch.float64)
    levels = (shift * u / (1 + (shift - 1) * u)).float()
    levels[0] = sigmas[start]
    return levels


def as_level(t, x):
    """A noise level as float32, 0-dim or (B, 1, ..., 1) to broadcast against x."""
    t = torch.as_tensor(t, dtype=torch.float32)
    return t.to(x.device).view(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def ode_step(x, v, t, t_next):
    """One Euler step of dx/dt = v, from t down to t_next; x, v (B, ...), levels 0-dim or (B,)."""
    x = x.float()
    return x + (as_level(t_next, x) - as_level(t, x)) * v.float()


def sde_step(x, v, t, t_next, eta=1.0, tau=0.45, t_max=None, noise=None, x_next=None):
    """An Euler-Maruyama step of the SDE with the ODE's marginals (Flow-GRPO).

    Its diffusion is sigma_t = eta sqrt(t / (1 - t)), infinite at t = 1. Two cures: tau caps the
    step's std, in the drift too (LongCat-Video, the default); t_max, the schedule's second value,
    is the largest t that 1 - t is taken of (Flow-GRPO, MixGRPO; then tau=None). With neither, t = 1
    raises.
    x, v (B, ...); t > t_next: noise levels, 0-dim or (B,).
    noise (B, ...) samples a step (None: torch's global generator); x_next (B, ...) scores one.
    Returns x_next (B, ...), log_prob (B,), mean (B, ...), std (0-dim, or (B, 1, ..., 1)), float32.
    log_prob is the mean over elements, not the sum: ratios stay readable at any latent size.
    """
    check_noise(t, eta, tau, t_max)
    x = x.float()
    v = v.float()
    t = as_level(t, x)
    dt = t - as_level(t_next, x)
    below_1 = t if t_max is None else t.clamp(max=float(t_max))
    sigma = eta * torch.sqrt(t / (1 - below_1))
    std = sigma * dt.sqrt()
    if tau is not None:
        std = std.clamp(max=tau)
    # The drift has std^2 for sigma_t^2 dt, so that a cap holds in it too.
    mean = x - dt * v - std.square() / (2 * t) * (x + (1 - t) * v)
    if x_next is None:
        x_next = mean + std * (torch.randn_like(x) if noise is None else noise.float())
    x_next = x_next.float()
    # Not `noise`: scoring later repeats these very sums, so that the ratio is exactly 1.
    z = (x_next - mean) / std
    log_prob = -0.5 * z.square().flatten(1).mean(1)
    log_prob = log_prob - std.log().flatten() - math.log(2 * math.pi) / 2
    return x_next, log_prob, mean, std


def dpm_step(x, x0, t, t_next, x0_before=None, t_before=None):
    """A step of DPM-Solver++(2M), data prediction, midpoint; of first order without x0_before."""
    def log_snr(t):  # infinite at t = 0 and 1, where the expressions below have limits
        return torch.log((1 - t) / t)
    x = x.float()
    x0 = x0.float()
    t = as_level(t, x)
    t_next = as_level(t_next, x)
    h = log_snr(t_next) - log_snr(t)
    if x0_before is not None:
        h_before = log_snr(t) - log_snr(as_level(t_before, x))
        x0 = x0 + (x0 - x0_before.float()) * h / (2 * h_before)
    return t_next / t * x - (1 - t_next) * torch.expm1(-h) * x0


# ---- window ----

def window(iteration, steps, size=4, strategy="progressive", stride=1, iters_per_window=1,
           first=None, seed=0, condition=None, skip=0):
    """The steps that are stochastic and trained on at an iteration (from 0): consecutive indices.

    A function of its arguments alone, so that a resumed run draws the same. Always `size` wide,
    never the last step (t -> 0), among the first `first` if given, without the first `skip`;
    ValueError where that cannot be.
    progressive: moves by stride every iters_per_window iterations; starts again where the next
      would not fit
    random: starts anywhere, anew every iteration (LongCat-Video: size 1, first 6 of 16), and for
      each condition where its number is given (Flash-GRPO)
    all: every usable step (Flow-GRPO); size is not used
    """
    end = steps - 1 if first is None else min(first, steps - 1)
    if strategy == "all":
        size = end - skip
    check_window(steps, size, first, skip, end - skip, strategy)
    starts = range(skip, end - size + 1)
    start = skip
    if strategy == "progressive":
        starts = starts[::stride]
        start = starts[iteration // iters_per_window % len(starts)]
    elif strategy == "random":
        key = [seed, iteration, "window"]
        if condition is not None:
            key.append(condition)
        start = starts[hash_of(*key) % len(starts)]
    return tuple(range(start, start + size))


def hash_of(*key):
    """A 63-bit integer from a key, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(shape, *key):
    """Normal noise of a key; drawn on the CPU, so that the device does not matter."""
    generator = torch.Generator().manual_seed(hash_of(*key))
    return torch.randn(shape, generator=generator)


# ---- velocity ----

def velocity(policy, x, t, condition, negative=None, guidance=1.0):
    """The policy's velocity (B, ...) float32 at x (B, ...), guided where there is a negative.

    v = v_neg + guidance (v_pos - v_neg), both branches from one batch [negative; positive].
    """
    if negative is None or guidance == 1:
        return policy(x, t, condition).float()
    t = torch.as_tensor(t)
    both = torch.cat([t, t]) if t.ndim else t
    v = policy(torch.cat([x, x]), both, condition.cat([negative, condition])).float()
    v_neg, v_pos = v.chunk(2)
    return v_neg + guidance * (v_pos - v_neg)


def chunks(conditions, members, rows=None, branches=1):
    """Slices (of conditions, of members), each one network call, that cover all in order.

    A call has at most `rows` rows (None: no limit), `branches` of them for each member.
    """
    rows = conditions * members if rows is None else max(1, rows // branches)
    c = max(1, rows // members)
    m = min(members, rows)
    return [(slice(i, min(i + c, conditions)), slice(j, min(j + m, members)))
            for i in range(0, conditions, c) for j in range(0, members, m)]


# ---- rollout ----

@dataclass
class Rollout:
    """Samples of C conditions, G members each, and what an update of n window steps needs."""
    latents: torch.Tensor   # (C, G, ...) at t = 0
    steps: tuple            # n indices into the schedule; C such tuples where windows differ
    t: torch.Tensor         # (n,) noise levels of the window's steps; (n, C) where windows differ
    t_next: torch.Tensor    # likewise
    x: list                 # n of (C, G, ...) before the step; first (C, 1, ...) where shared
    x_next: list            # n of (C, G, ...) after the step; x[k + 1] where all share a window
    log_prob: torch.Tensor  # (n, C, G)
    condition: object       # from here on: what an update must repeat for r to be 1
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

    def levels(self, k, conditions):
        """t and t_next of window step k: 0-dim, or (c,) where a slice's windows differ."""
        if self.t.ndim == 1:
            return self.t[k], self.t_next[k]
        if len(set(self.steps[conditions])) == 1:  # the same for all: 0-dim, as in the rollout
            conditions = range(len(self.steps))[conditions][0]
        return self.t[k, conditions], self.t_next[k, conditions]

    @property
    def branches(self):
        """Network rows per member: guidance needs two."""
        return 1 if self.negative is None or self.guidance == 1 else 2


def rollout(policy, condition, members, window, *, condition_ids, negative=None, **options):
    """Sample `members` latents of each of C conditions, stochastic in the window only -> Rollout.

    condition, negative: C rows each; condition_ids: C numbers or strings naming them.
    window: consecutive steps, without the last; may be empty. Or C such tuples of one length:
      members of a group share their window, conditions may differ (Flash-GRPO).
    options: see rollout_together.
    """
    if not window or not isinstance(window[0], (tuple, list, range)):
        return rollout_together(policy, condition, members, window, condition_ids=condition_ids,
                                negative=negative, **options)
    windows = [tuple(steps) for steps in window]
    check_windows(windows, condition_ids)
    if len(set(windows)) == 1:
        return rollout(policy, condition, members, windows[0], condition_ids=condition_ids,
                       negative=negative, **options)
    # Conditions of one window are sampled together, then all put back in order.
    parts = []
    order = []
    for steps in sorted(set(windows)):
        rows = [j for j, other in enumerate(windows) if other == steps]
        order += rows
        parts.append(rollout_together(
            policy, condition[rows], members, steps, condition_ids=[condition_ids[j] for j in rows],
            negative=None if negative is None else negative[rows], **options))
    back = torch.tensor(order).argsort().tolist()
    n = len(windows[0])
    levels = [torch.stack([getattr(part, name) for part in parts for _ in part.latents], 1)[:, back]
              for name in ("t", "t_next")]
    return dataclasses.replace(
        parts[0], latents=torch.cat([part.latents for part in parts])[back], steps=windows,
        t=levels[0], t_next=levels[1], condition=condition, negative=negative,
        x=[torch.cat([part.x[k] for part in parts])[back] for k in range(n)],
        x_next=[torch.cat([part.x_next[k] for part in parts])[back] for k in range(n)],
        log_prob=torch.cat([part.log_prob for part in parts], 1)[:, back],
        evaluations=sum(part.evaluations for part in parts))


@torch.no_grad()
def rollout_together(policy, condition, members, window, *, sigmas, shape, seed, condition_ids,
                     iteration=0, eta=1.0, tau=0.45, t_max=None, negative=None, guidance=1.0,
                     micro_batch=None, share_noise=True, share_prefix=True, tail=None,
                     device="cpu"):
    """A `rollout` of C conditions with one window.

    sigmas: a `schedule`; shape: of one latent; eta, tau, t_max: see sde_step.
    Noise depends on (seed, iteration, condition id, member) alone: not on ranks, device or
      micro-batch.
    micro_batch: rows per network call at most, both branches of guidance counted (None: all).
    share_noise: groups start from one noise (LongCat-Video, MixGRPO).
    share_prefix: then a group is one latent with one velocity, through the first window step.
      Exact; False computes all G, for comparison.
    tail: share of the steps after the window to keep, by DPM-Solver++(2M) (MixGRPO-Flash: 0.4).
    """
    window = tuple(window)
    check_steps(window, len(sigmas) - 1)
    C = len(condition_ids)
    G = members
    n = len(window)
    stop = window[-1] + 1 if n else 0  # the first step after the window
    levels = None if tail is None else compress(sigmas, stop, tail).to(device)
    sigmas = sigmas.to(device)
    at = torch.tensor(window, dtype=torch.long, device=device)
    out = Rollout(latents=None, steps=window, t=sigmas[at], t_next=sigmas[at + 1], x=[], x_next=[],
                  log_prob=torch.zeros(n, C, G, device=device), condition=condition,
                  negative=negative, guidance=guidance, eta=eta, tau=tau, t_max=t_max,
                  evaluations=0)

    def draw(count, what, *shape):  # (C, count, *shape), on the CPU
        return torch.stack([
            torch.stack([normal(shape, seed, iteration, i, g, what) for g in range(count)])
            for i in condition_ids])

    def evaluate(x, t):  # (C, M, ...) -> velocity (C, M, ...)
        v = torch.empty_like(x, memory_format=torch.contiguous_format)
        for c, m in chunks(*x.shape[:2], micro_batch, out.branches):
            rows = x[c, m]
            against = None if negative is None else negative[c]
            found = velocity(policy, rows.flatten(0, 1), t, condition[c], against, guidance)
            v[c, m] = found.view(rows.shape)
        out.evaluations += out.branches * x.shape[0] * x.shape[1]
        return v

    # x is (C, M, ...): M latents of a group that differ so far, 1 or G.
    x = draw(1 if share_noise else G, "start", *shape).to(device)
    if not share_prefix:
        x = x.expand(C, G, *shape)
    noise = draw(G, "steps", n, *shape) if n else None  # (C, G, n, ...)
    one_by_one = len(sigmas) - 1 if tail is None else stop  # steps before the fast tail
    for i in range(one_by_one):
        v = evaluate(x, sigmas[i])
        if i not in window:
            x = ode_step(x, v, sigmas[i], sigmas[i + 1])
            continue
        # Here a group's members part: one x and one velocity, but noise of their own.
        k = i - window[0]
        eps = noise[:, :, k].to(device)  # (C, G, ...)
        out.x.append(x)
        x_next, log_prob, _, _ = sde_step(
            x.expand_as(eps).flatten(0, 1), v.expand_as(eps).flatten(0, 1), sigmas[i],
            sigmas[i + 1], eta, tau, t_max, noise=eps.flatten(0, 1))
        x = x_next.view(eps.shape)
        out.x_next.append(x)
        out.log_prob[k] = log_prob.view(C, G)
    if tail is not None:  # the rest in fewer, faster steps
        x0_before = None
        for i in range(len(levels) - 1):
            x0 = x - levels[i] * evaluate(x, levels[i])
            is_inner = 0 < i < len(levels) - 2  # first order at both ends
            x = dpm_step(x, x0, levels[i], levels[i + 1], x0_before if is_inner else None,
                         levels[i - 1])
            x0_before = x0
    out.latents = x.expand(C, G, *shape)
    return out


def sample(policy, condition, *, sigmas, shape, seed, condition_ids, **options):
    """One sample per condition, (C, ...), by the plain ODE: a `rollout` with an empty window."""
    return rollout(policy, condition, 1, (), sigmas=sigmas, shape=shape, seed=seed,
                   condition_ids=condition_ids, **options).latents[:, 0]


# ---- refusals ----

def check_schedule(steps, shift):
    if steps < 1 or not shift > 0:
        raise ValueError("schedule: expected at least 1 step and a shift > 0, "
                         f"found {steps} and {shift}")


def check_noise(t, eta, tau, t_max):
    if eta <= 0:
        raise ValueError(f"eta: expected > 0, found {eta}; without noise there is no density")
    if tau is None and t_max is None and bool((torch.as_tensor(t) >= 1).any()):
        raise ValueError("sde_step at t = 1 needs tau or t_max: sigma_t is infinite there")


def check_window(steps, size, first, skip, usable, strategy):
    if strategy not in ("progressive", "random", "all"):
        raise ValueError("window strategy: expected progressive, random or all, "
                         f"found {strategy!r}")
    if not 1 <= size <= usable:
        raise ValueError(f"window size: expected 1 to {usable} (steps {steps}, first {first}, "
                         f"skip {skip}), found {size}")


def check_steps(window, steps):
    consecutive = not window or window == tuple(range(window[0], window[0] + len(window)))
    if not consecutive or (window and (window[0] < 0 or window[-1] > steps - 2)):
        raise ValueError(f"window: expected consecutive steps within 0..{steps - 2}, "
                         f"found {window}")


def check_windows(windows, condition_ids):
    if len(windows) != len(condition_ids) or len({len(steps) for steps in windows}) != 1:
        raise ValueError(f"window: expected one for each of {len(condition_ids)} conditions, "
                         f"all of one length, found {windows}")
