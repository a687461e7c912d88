"""On which steps do conditions agree? `python -m benchmarks.steps CONFIG`; nothing is trained.

For a window at each of some steps, one iteration's gradient is taken apart by conditions, to see
whether two halves of them point the same way. A guide, not a verdict: in the toy, windows at steps
with a cosine of 0.03 learnt no worse than at those with 0.2 (learning.md).

The cosine is computed for all halves at once, from the products of the conditions' gradients. With
s the mean product of two, n the mean square of one and h conditions in a half, it is
s / (n / h + s (h - 1) / h). Without signal it is 0 up to chance.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from data.video import decode
from data.world import clip_numbers
from evaluation.generate import prepare
from grpo import advantages, policy_loss
from model import trainable
from plumbing.settings import run_command
from sampler import rollout, schedule


@dataclass
class Steps(train.Config):
    """train.py's settings, of which size, tail, tau, conditions and members matter here; and:"""
    FILE = str(Path(__file__).parent.parent / "config/toy.py")  # where none is named
    at: tuple = (0, 1, 2, 4, 6, 8, 10)  # first steps of the windows to look at
    draws: int = 3                     # sets of conditions


def condition_gradients(dit, sampled, A):
    """Gradients of Eq. 7, a row for each condition, on the CPU: (C, trained parameters)."""
    rows = []
    for j in range(len(A)):
        dit.zero_grad(set_to_none=True)
        for k in range(len(sampled.x)):
            loss, _ = policy_loss(dit, sampled, k, A, total=A[j].numel(),
                                  conditions=slice(j, j + 1))
            loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in trainable(dit)]).cpu())
    return torch.stack(rows)


def cosine_of_halves(g):
    """Expected cosine of the gradients of two halves of the conditions; g (C, parameters)."""
    products = (g @ g.T).double()
    count = len(g)
    n = float(products.diagonal().mean())
    s = float(products.sum() - products.diagonal().sum()) / (count * (count - 1))
    half = count // 2
    return s / (n / half + s * (half - 1) / half)


def steps(config):
    """Print cosines of all steps asked for, draw by draw."""
    config.check(1)
    device = torch.device("cuda" if torch.cuda.is_available() and config.world != "toy" else "cpu")
    world = config.open_world(device)
    world.dit.checkpoint = config.checkpointing
    for p in trainable(world.dit):
        p.data = p.data.float()
    ids = range(config.conditions)
    windows = [tuple(range(int(k), int(k) + config.size)) for k in config.at]
    found = {window: [] for window in windows}
    levels = schedule(config.steps, config.shift)
    print(f"{'steps':<10} {'t':>6} {'spread of rewards in a group':<40} cosine of halves, by draw")
    for window in windows:
        spreads = []
        for draw in range(config.draws):
            rngs = [np.random.default_rng((config.seed, draw, j)) for j in ids]
            numbers = clip_numbers(draw, config.conditions, world.size, config.seed)
            condition, scene = world.draw(numbers, rngs)
            prepared, negative = prepare(world.dit, condition, world.negative, config.guidance)
            sampled = rollout(world.dit, prepared, config.members, window, iteration=draw,
                              condition_ids=ids, negative=negative,
                              **config.sampling(world.shape, device))
            videos = decode(world.codec, sampled.latents.flatten(0, 1), config.reward_batch)
            scores, _ = train.score(world, videos, scene, config, draw, set())
            A = advantages(scores, world.reward_weights, normalise=config.normalise)
            found[window].append(cosine_of_halves(condition_gradients(world.dit, sampled, A)))
            spreads.append(train.statistics(scores))
        spread = "  ".join(f"{name} {np.mean([one[f'spread/{name}'] for one in spreads]):.4f}"
                           for name in list(scores)[:2])
        cosines = "  ".join(f"{x:+.2f}" for x in found[window])
        t = float(levels[window[0]])
        print(f"{str(window):<10} {t:>6.3f} {spread:<40} {cosines}   mean "
              f"{np.mean(found[window]):+.3f}", flush=True)


if __name__ == "__main__":
    run_command("benchmarks.steps", __doc__, {"steps": (Steps, steps, None)}, sys.argv[1:])
