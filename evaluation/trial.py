"""Is this reward any good? Scores a few batches of the base's rollouts; nothing is trained
(`evaluate.py try`)."""
import functools
import math
import time

import numpy as np
import torch
from tqdm import tqdm

import rewards
from data.captions import COMPARING
from data.video import decode
from data.world import clip_numbers
from evaluation.generate import prepare
from plumbing.ranks import launch
from sampler import rollout


def try_reward(config):
    """Print what one reward says of config.batches batches, drawn and sampled as training does: its
    spread inside groups (only that teaches), its correlation there with every other reward, and its
    seconds.

    config: train.Config with `reward` (my.py:function, or a name of rewards.py) and `batches`.
    Returns {"mean", "inside", "between", "failed", "correlation": {name: r}, "seconds"}.
    """
    spec = config.reward.rpartition("=")[0] or config.reward
    name = spec.rpartition(":")[2]
    if not name:
        raise ValueError("try: expected a reward, my.py:function or a name of rewards.py, found "
                         "none")
    if config.batches < 1:
        raise ValueError(f"batches: expected at least 1, found {config.batches}")
    config.check(1)
    config.rewards = with_others(config.rewards, spec, name, config.world)
    device = launch(config.world != "toy", config.threads, config.timeout)
    world = config.open_world(device)
    timed = [with_clock(reward, device) for reward in world.rewards]
    print(f"{name} on {config.batches} batches of {config.conditions} conditions x "
          f"{config.members} members")

    batches = []
    reasons = {}
    for iteration in tqdm(range(config.batches), "batches", unit="batch"):
        scores, failures = score_batch(world, timed, config, iteration, device)
        batches.append(scores)
        reasons |= failures[name]
    scores = {key: torch.cat([batch[key] for batch in batches]).double().cpu()
              for key in batches[0]}
    own = next(reward for reward in timed if name in reward.names)
    found = spread_and_correlation(scores, name) | {"seconds": own.seconds}
    say(name, found, scores[name].numel(), sum(reward.seconds for reward in timed), reasons)
    return found


def with_others(others, spec, name, world="toy"):
    """A run's list of rewards, the one on trial, and those that need no model, which cost nothing;
    the additional ones at weight 0."""
    listed = [item.strip() for item in others.split(",") if item.strip()]
    known = {item.rpartition("=")[0].rpartition(":")[2] for item in listed}
    out = {*known, name, *(COMPARING if world == "captions" else ())}
    free = [f.__name__ for f in rewards.MODEL_FREE if f.__name__ not in out]
    own = [] if name in known else [spec]
    return ",".join(listed + [f"{item}=0" for item in [*free, *own]])


def with_clock(reward, device):
    """The same reward; `seconds` counts the time spent in it. Cameras that rewards share count for
    the one that asks first."""
    @functools.wraps(reward)
    def timed(videos, scene):
        start = time.perf_counter()
        try:
            return reward(videos, scene)
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            timed.seconds += time.perf_counter() - start

    timed.names = getattr(reward, "names", None) or (reward.__name__,)
    timed.seconds = 0.0
    return timed


@torch.no_grad()
def score_batch(world, timed, config, iteration, device):
    """One batch as training makes it -> name -> (conditions, members), and what failed, as
    rewards.score."""
    numbers = clip_numbers(iteration, config.conditions, world.size, config.seed)
    rngs = [np.random.default_rng((config.seed, iteration, j)) for j in range(config.conditions)]
    condition, scene = world.draw(numbers, rngs)
    prepared, negative = prepare(world.dit, condition, world.negative, config.guidance)
    sampled = rollout(world.dit, prepared, config.members, config.window(iteration),
                      iteration=iteration, negative=negative,
                      condition_ids=range(config.conditions),
                      **config.sampling(world.shape, device))
    videos = decode(world.codec, sampled.latents.flatten(0, 1), config.reward_batch)
    rows = torch.arange(config.conditions).repeat_interleave(config.members).tolist()
    scores, failures = rewards.score(timed, videos, scene[rows], config.reward_batch or None)
    return {name: x.view(-1, config.members) for name, x in scores.items()}, failures


def spread_and_correlation(scores, name):
    """What name -> (groups, members), NaN where a score failed, says of one reward (see
    try_reward)."""
    x = scores[name]
    inside = {key: y - y.nanmean(1, keepdim=True) for key, y in scores.items()}
    correlation = {}
    for key, y in inside.items():
        both = inside[name].isfinite() & y.isfinite()
        a = inside[name][both]
        b = y[both]
        size = float((a.square().sum() * b.square().sum()).sqrt()) if len(a) else 0.0
        if key != name:
            correlation[key] = float((a * b).sum()) / size if size > 0 else math.nan
    group_means = x.nanmean(1)
    group_means = group_means[group_means.isfinite()]
    return {"mean": float(x.nanmean()), "inside": float(inside[name].square().nanmean().sqrt()),
            "between": float(group_means.std(correction=0)) if len(group_means) else math.nan,
            "failed": int(x.isnan().sum()), "correlation": correlation}


def say(name, found, count, seconds, reasons):
    """Prints what was found, in at most 80 columns. reasons: why videos have no score, {video:
    reason}."""
    print(f"mean                      {found['mean']:.4g}")
    print(f"spread inside a group     {found['inside']:.3g}  (what a group can learn from)")
    print(f"spread between groups     {found['between']:.3g}  (what its conditions differ by)")
    print(f"failed                    {found['failed']} of {count} videos")
    for reason in list(dict.fromkeys(reasons.values()))[:3]:
        print(f"    {reason[:76]}")
    print(f"seconds                   {found['seconds']:.2f} of {seconds:.2f} for all rewards")
    print("correlation inside groups (1: another name for the same; -1: they pull apart)")
    for other, r in found["correlation"].items():
        print(f"    {other[:40]:21} " + (f"{r:+.2f}" if math.isfinite(r) else "one is constant"))
    if found["inside"] < 1e-6 * max(1e-6, abs(found["mean"])):
        print(f"{name} does not tell the videos of a group apart: nothing can be learnt from it")
