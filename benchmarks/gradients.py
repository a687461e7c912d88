"""How small gradients are: `python -m benchmarks.gradients`, a table that tells what AdamW's eps must be.

Log-probs are means over latent elements, so a gradient shrinks with a video's size; conditions average it
further. Measured here: the real architecture narrowed, random weights, random advantages of deviation 1.
Read off the slope, and extrapolate to 2.1 million elements (81 frames of 480 x 832) and 64 conditions.
"""
import sys
from dataclasses import dataclass

import numpy as np
import torch

from grpo import advantages, policy_loss
from model import Condition, Config, DiT, trainable
from plumbing.settings import run_command
from sampler import rollout, schedule

PUBLISHED = 16 * 21 * 60 * 104  # latent elements of 81 frames of 480 x 832


@dataclass
class Gradients:
    """`python -m benchmarks.gradients`"""
    dim: int = 256                     # the network's width (published: 1536)
    layers: int = 4                    # its blocks (published: 30)
    members: int = 8                   # G
    seeds: int = 3                     # of weights, noise and advantages; the table gives the geometric mean
    sizes: tuple = (2048, 6912, 20480, 82944)  # latent elements
    conditions: tuple = (1, 2, 4, 8)   # at the second size


def gradient_rms(config, elements, conditions, seed):
    """(RMS over all trained parameters, median over them of |gradient|) of one update on random data."""
    torch.manual_seed(seed)
    frames = {2048: 2, 6912: 3, 20480: 5, 82944: 9}.get(elements, 3)
    side = round((elements / 16 / frames) ** 0.5 / 2) * 2
    shape = (16, frames, side, side)
    dit = DiT(Config(dim=config.dim, num_heads=config.dim // 128, num_layers=config.layers,
                     ffn_dim=4 * config.dim, text_dim=64, camera_dim=24, roce=True))
    for name, p in dit.named_parameters():  # zero-initialised parts would hide gradients
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p.data, std=0.02)
    maps = [torch.randn(conditions, 24, frames, 8 * side, 8 * side) for _ in range(2)]
    condition = Condition(torch.randn(conditions, 16, 64), None, torch.randn(conditions, *shape), *maps)
    with torch.no_grad():
        prepared = dit.prepare(condition)
    sampled = rollout(dit, prepared, config.members, (3,), sigmas=schedule(25, 5.0), shape=shape, seed=seed,
                      condition_ids=range(conditions), tail=0.1)
    A = advantages({"r": torch.randn(conditions, config.members)}, {"r": 1.0})
    policy_loss(dit, sampled, 0, A)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in trainable(dit)])
    return float(gradient.square().mean().sqrt()), float(gradient.abs().median())


def measure(config):
    """Print gradients against latent elements and against conditions, and the slopes."""
    def row(elements, conditions):
        found = [gradient_rms(config, elements, conditions, seed) for seed in range(config.seeds)]
        rms, median = np.exp(np.log(found).mean(0))
        print(f"{elements:>10,} {conditions:>11} {rms:>10.1e} {median:>10.1e}", flush=True)
        return rms

    print(f"width {config.dim}, {config.layers} blocks, G {config.members}, {config.seeds} seeds")
    print(f"{'elements':>10} {'conditions':>11} {'RMS':>10} {'median':>10}")
    sizes = [int(n) for n in config.sizes]
    by_size = [row(n, 1) for n in sizes]
    counts = [int(n) for n in config.conditions]
    by_count = [row(sizes[min(1, len(sizes) - 1)], n) for n in counts]
    slope = np.polyfit(np.log(sizes), np.log(by_size), 1)[0]
    fall = np.polyfit(np.log(counts), np.log(by_count), 1)[0]
    far = by_size[-1] * (PUBLISHED / sizes[-1]) ** slope * 64 ** fall
    print(f"RMS ~ elements^{slope:.2f} conditions^{fall:.2f}; extrapolated to {PUBLISHED:,} elements and 64 "
          f"conditions: {far:.0e}")


if __name__ == "__main__":
    run_command("benchmarks.gradients", __doc__, {"measure": (Gradients, measure, None)}, sys.argv[1:])
