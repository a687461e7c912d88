"""A reward for the ablation: Eq. 3 without its metre. What the paper's "metric" is worth.

    python train.py --rewards=benchmarks/aligned.py:aligned=1,sharpness=0.01,flicker=0.03 --out=out/aligned
"""
import torch

import trajectories


def aligned(videos, scene):
    """Minus the weighted position error once the path seen is scaled to fit the asked one best, metres (n,).

    The right shape at half the size loses nothing. NaN for a video whose cameras were not found.
    """
    seen = scene.cameras.c2w[..., :3, 3].double()                         # (n, T, 3)
    asked = trajectories.relative(scene.c2w.double())[..., :3, 3].to(seen)
    scale = (seen * asked).sum((1, 2)) / seen.square().sum((1, 2)).clamp_min(1e-12)
    off = scale.clamp_min(0)[:, None, None] * seen - asked
    w = torch.as_tensor(trajectories.frame_weights(seen.shape[1])).to(seen)
    return -(off.norm(dim=-1) * w).sum(-1).float()
