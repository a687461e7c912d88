"""Rewards (paper section 3.2): what the policy is told about its videos.

A reward is any callable `f(videos, scene) -> dict name -> (n,) float tensor`: videos uint8
(n, T, H, W, 3) RGB on the device, scene a `Scene` with one row per video; higher is better, NaN
where it failed.

| name      | unit                | what                                                          |
|-----------|---------------------|---------------------------------------------------------------|
| trans     | metres              | minus the weighted position error of the cameras seen (Eq. 3) |
| rot       | radians             | minus their weighted rotation error (Eq. 4)                   |
| vq mq ta  | standard deviations | VideoAlign: visual quality, motion quality, text alignment    |
| hpsv3     | HPSv3's own         | human preference for single frames, mean over the frames      |
| sharpness | log ratio           | minus the distance of the video's detail from the source's    |
| flicker   | share of full scale | minus the brightness flicker beyond the source's              |
| exposure  | share of pixels     | minus the share of blown-out or black pixels                  |
| colour    | share of full scale | minus the shift of colour mean and contrast from the source's |

The first six ask published models (pretrained/reward_models.py lists their files). The last four
need none and know nothing of the scene: blurred, blinking, over-exposed or recoloured videos lose,
but a video that wins them is not therefore good. Use them with small weights or, weight 0, as
alarms for reward hacking.
"""
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import trajectories
from plumbing.guard import Failed, as_it_was, call, load_function
from plumbing.settings import read_rewards
from pretrained.reward_models import hpsv3, luma, mapanything, on_device, videoalign


class Cameras(NamedTuple):
    """Where n videos were taken from, as the geometry reward's estimator sees it."""
    c2w: torch.Tensor         # (n, T, 4, 4) metres, relative to the first; NaN where it failed
    intrinsics: torch.Tensor  # (n, 4) fx/W, fy/H, cx/W, cy/H


@dataclass
class Scene:
    """What n videos should show. scene[i:j] or scene[[0, 0, 1]] takes rows.

    What a world does not have is None: all but prompt and fps in a world of captions.
    """
    c2w: torch.Tensor | None         # (n, T, 4, 4) target path, metres, source's first camera = I
    intrinsics: torch.Tensor | None  # (n, 4) fx/W, fy/H, cx/W, cy/H
    prompt: list                     # n strings
    fps: torch.Tensor                # (n,) frames per second; or a number, the same for all
    source: torch.Tensor = None      # uint8 (n, T, H, W, 3)
    source_c2w: torch.Tensor = None  # (n, T, 4, 4)
    look: object = None              # () -> the cameras of the videos being scored; see `cameras`

    def __post_init__(self):
        fps = torch.as_tensor(self.fps, dtype=torch.float32)
        self.fps = fps.expand(len(self.prompt)).clone()

    def __getitem__(self, rows):
        mine = {}
        for name, x in vars(self).items():
            if isinstance(x, list):
                mine[name] = np.array(x, object)[rows].tolist()
            elif x is not None and name != "look":
                mine[name] = x[rows]
        if self.look:
            mine["look"] = lambda: tuple(x[rows] for x in self.look())
        return replace(self, **mine)

    @property
    def cameras(self):
        """The Cameras that the run's estimator sees in the videos being scored: asked for when
        first needed, then shared by all rewards. TypeError outside of `score`."""
        if self.look is None:
            raise TypeError("scene.cameras: none, as score was given no reward of `load`'s")
        c2w, intrinsics = self.look()
        return Cameras(trajectories.relative(c2w), intrinsics.clone())


# ---- scoring: in micro-batches, one failure costs one member ----

@torch.no_grad()
def score(rewards, videos, scene, micro_batch=None):
    """All rewards of n videos -> (name -> (n,) float32, name -> {member: why it failed}).

    videos uint8 (n, T, H, W, 3), scene: one row per video; micro_batch: how many videos at a time
    (None: all). A reward that raises for one video gives NaN for that video only. ValueError for a
    reward that is itself wrong, which is no property of a video: guard.call says what that is.
    """
    check_videos(videos, scene)
    n = len(videos)
    step = micro_batch or n
    scores = {}
    failures = {}
    estimate = estimator_of(rewards)
    scenes = {}  # of each micro-batch: one for all rewards, so that cameras are estimated once

    def scene_of(rows):
        key = (rows.start, rows.stop)
        if key not in scenes:
            scenes[key] = scene[rows]
            if estimate:
                look = functools.partial(estimate, videos[rows], scene[rows])
                scenes[key].look = functools.cache(look)
        return scenes[key]

    for reward in rewards:
        names = getattr(reward, "names", None) or (reward.__name__,)
        found = {name: torch.full((n,), math.nan, device=videos.device) for name in names}
        reasons = {}  # first member of a micro-batch -> why the reward failed for it
        batches = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        module = getattr(reward, "module", None)  # moved to the videos' device while in use
        with as_it_was(f"reward {', '.join(names)}"), on_device(module, videos.device):
            for rows in batches:
                try:
                    got = call(reward, names, videos[rows], scene_of(rows))
                except Failed as failure:
                    reasons[rows.start] = failure.reason
                    if rows.stop - rows.start > 1:  # its videos once more, one by one, at the end
                        batches += [slice(i, i + 1) for i in range(rows.start, rows.stop)]
                    elif failure.out_of_memory:
                        raise failure.out_of_memory
                    continue
                for name in names:
                    found[name][rows] = got[name].to(videos.device, torch.float32)
        for name in names:
            failed = found[name].isnan().nonzero().flatten().tolist()
            failures[name] = {i: reasons.get(i, "no score (NaN)") for i in failed}
        scores |= found
    return scores, failures


def estimator_of(rewards):
    """What rewards of `load` ask for cameras: (videos, scene) -> (c2w, intrinsics); or None."""
    return next((reward.estimate for reward in rewards if hasattr(reward, "estimate")), None)


def check_videos(videos, scene):
    n = len(scene.prompt)
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or len(videos) != n:
        raise ValueError(f"videos: expected uint8 ({n}, T, H, W, 3) as the scene has rows, "
                         f"found {videos.dtype} {tuple(videos.shape)}")


# ---- geometry (Eq. 3-4) ----

def geometry(estimator, names=("trans", "rot"), schedule="linear"):
    """Reward of the cameras seen in the video. Metric: the right shape at half the size loses.

    estimator(videos, scene) -> c2w (n, T, 4, 4), metres, any world frame, a NaN row where it
    failed: both paths are made relative to their first frame. Frame weights grow with time, since
    drift accumulates.
    """
    trajectories.frame_weights(2, schedule)  # refuses an unknown schedule now

    def reward(videos, scene):
        pred = estimator(videos, scene)
        if not torch.is_tensor(pred) or pred.shape != scene.c2w.shape:
            found = tuple(pred.shape) if torch.is_tensor(pred) else type(pred).__name__
            raise TypeError(f"estimator: expected c2w {tuple(scene.c2w.shape)}, found {found}")
        pred = pred.masked_fill(~pred.isfinite(), math.nan)
        trans, rot = trajectories.pose_errors(pred, scene.c2w, schedule)
        both = {"trans": -trans, "rot": -rot}
        return {name: both[name] for name in names}

    reward.names = names
    reward.module = getattr(estimator, "module", None)
    return reward


# ---- rewards without a model ----

def source_of(videos, scene, name):
    """The source video that reward `name` compares with; TypeError where there is none like it."""
    size = tuple(videos.shape[2:4])
    if scene.source is None or scene.source.shape[2:] != videos.shape[2:]:
        found = "none" if scene.source is None else tuple(scene.source.shape[2:4])
        raise TypeError(f"{name} compares with the source video: expected one of {size}, "
                        f"found {found}")
    return scene.source


def sharpness(videos, scene):
    """-|log(detail / source's)|, detail: mean squared Laplacian of brightness. Blur, grain lose.

    Another view may honestly hold more or less of it: compare within a group, not across scenes.
    """
    def detail(video):
        x = luma(video)
        across = 2 * x[..., 1:-1] - x[..., :-2] - x[..., 2:]
        down = 2 * x[..., 1:-1, :] - x[..., :-2, :] - x[..., 2:, :]
        edges = across[..., 1:-1, :] + down[..., 1:-1]
        return edges.square().mean((1, 2, 3)) + 1 / 255 ** 2  # a grey level: no log of 0 if flat

    source = source_of(videos, scene, "sharpness")
    return {"sharpness": -(detail(videos) / detail(source)).log().abs()}


def flicker(videos, scene):
    """-(flicker beyond the source's), in shares of full scale; less flicker earns nothing more.

    Flicker: mean |second difference in time| of brightness in 8 x 8 cells: motion averages out.
    """
    def amount(video):
        cells = F.adaptive_avg_pool2d(luma(video), (8, 8))
        return (cells[:, 2:] - 2 * cells[:, 1:-1] + cells[:, :-2]).abs().mean((1, 2, 3))

    source = source_of(videos, scene, "flicker")
    return {"flicker": -(amount(videos) - amount(source)).clamp(min=0)}


def exposure(videos, scene):
    """-(share of pixels with all channels above 250, or all below 5): blown out or black."""
    clipped = (videos > 250).all(-1) | (videos < 5).all(-1)
    return {"exposure": -clipped.float().mean((1, 2, 3))}


def colour(videos, scene):
    """-(distance of RGB means and deviations from the source's), in shares of full scale."""
    def moments(video):
        return torch.cat(torch.std_mean(video.float() / 255, (1, 2, 3)), -1)

    source = source_of(videos, scene, "colour")
    return {"colour": -(moments(videos) - moments(source)).norm(dim=-1)}


# ---- choosing ----

MODEL_FREE = (sharpness, flicker, exposure, colour)
POSES = ("trans", "rot")
GRADES = ("vq", "mq", "ta")
NAMES = (*POSES, *GRADES, "hpsv3", *(f.__name__ for f in MODEL_FREE))


def load(spec, weights="toy/weights", device="cpu", dtype=None, park=False, estimator=None,
         schedule="linear", stride=1, grey_mq=False, hpsv3_prompt=None):
    """"trans=1,rot=1,my.py:f=0.5" -> (reward callables, name -> weight).

    Weight 0: logged, not trained on. my.py:f is a function `f(videos, scene)` in a file of one's
    own; it returns (n,) or {"f": (n,)}. A model is loaded once, and only if one of its rewards is
    named; weights: the folder of their files. device, dtype: where and in what the models run
    (None: bfloat16 on a GPU, else float32); park: they live on the CPU and visit the videos' device
    when used. estimator(videos, scene) -> c2w (n, T, 4, 4) takes MapAnything's place; schedule,
    stride: geometry's frame weights and estimated frames; the rest: see videoalign and hpsv3.
    ValueError for an unknown name or a bad weight, FileNotFoundError for a missing file.
    """
    chosen, files = read_rewards(spec, NAMES)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder = Path(weights)
    home = "cpu" if park else device
    poses = tuple(name for name in POSES if name in chosen)
    grades = tuple(name for name in GRADES if name in chosen)

    @functools.cache
    def opened():  # one pose estimator for all rewards, opened when first needed
        return estimator or mapanything(folder / "map-anything", home, stride)

    def estimate(videos, scene):
        """c2w (n, T, 4, 4) and intrinsics (n, 4), the scene's where the estimator finds none."""
        if hasattr(opened(), "cameras"):
            return opened().cameras(videos)
        return opened()(videos, scene), scene.intrinsics

    def seen(videos, scene):
        c2w, _ = scene.look() if scene.look else estimate(videos, scene)
        return c2w

    rewards = []
    if poses:
        seen.module = getattr(opened(), "module", None)
        rewards.append(geometry(seen, poses, schedule))
        rewards[0].estimate = estimate
    if grades:
        base = folder / "Qwen2-VL-2B-Instruct"
        rewards.append(videoalign(folder / "VideoReward", base, grades, grey_mq, home, dtype))
    if "hpsv3" in chosen:
        file = folder / "HPSv3/HPSv3.safetensors"
        base = folder / "Qwen2-VL-7B-Instruct"
        rewards.append(hpsv3(file, base, hpsv3_prompt, home, dtype))
    rewards += [f for f in MODEL_FREE if f.__name__ in chosen]
    for name, path in files.items():
        function, code = load_function(path, name)
        reward = functools.partial(function)  # can hold attributes, whatever it wraps
        reward.names = (name,)
        reward.code = code
        reward.estimate = estimate
        rewards.append(reward)
    return rewards, chosen
