"""A reward for the ablation: Eq. 3 without its metre. What the paper's "metric" is worth.

    python train.py --rewards=benchmarks/aligned.py:aligned=1,sharpness=0.01,flicker=0.03 --out=out/aligned
"""
import trajectories


def aligned(videos, scene):
    """Minus the weighted position error once the path seen is scaled to fit the asked one best, metres (n,).

    The right shape at half the size loses nothing. NaN for a video whose cameras were not found.
    """
    seen = trajectories.relative(scene.cameras.c2w.double())  # (n, T, 4, 4)
    asked = trajectories.relative(scene.c2w.double()).to(seen.device)
    went = seen[..., :3, 3]
    ought = asked[..., :3, 3]
    scale = (went * ought).sum((1, 2)) / went.square().sum((1, 2)).clamp_min(1e-12)  # least squares
    went *= scale.clamp_min(0)[:, None, None]  # in place: of `seen`, too
    return -trajectories.pose_errors(seen, asked)[0].float()
