"""Rewards (paper section 3.2): what the policy is told about its videos.

A reward is any callable `f(videos, scene) -> dict name -> (n,) float tensor`: videos uint8 (n, T, H, W, 3)
RGB on the device, scene a `Scene` with one row per video; higher is better, NaN where it failed.

| name      | unit                | what                                                                  |
|-----------|---------------------|-----------------------------------------------------------------------|
| trans     | metres              | minus the weighted position error of the estimated cameras (Eq. 3)    |
| rot       | radians             | minus their weighted rotation error (Eq. 4)                           |
| vq mq ta  | standard deviations | VideoAlign: visual quality, motion quality, text alignment            |
| hpsv3     | HPSv3's own         | human preference for single frames, mean over the frames              |
| sharpness | log ratio           | minus the distance of the video's detail from the source's            |
| flicker   | share of full scale | minus the brightness flicker beyond the source's                      |
| exposure  | share of pixels     | minus the share of blown-out or black pixels                          |
| colour    | share of full scale | minus the shift of colour mean and contrast from the source's         |

The last four need no model and know nothing of the scene: blurred, blinking, over-exposed or recoloured
videos lose, but a video that wins them is not therefore good. Use them with small weights or, weight 0, as
alarms for reward hacking.

The others ask published models (pretrained/reward_models.py), whose files are looked for in one folder, `weights`, each
only if its reward is named:
  trans, rot   map-anything/{config.json, model.safetensors}, and the mapanything package
  vq, mq, ta   VideoReward/{model_config.json, checkpoint-<step>/model.pth}, or in the place of model.pth
               adapter_model.safetensors and non_lora_state_dict.pth;
               Qwen2-VL-2B-Instruct/{config.json, tokenizer.json, tokenizer_config.json} (with
               adapters its *.safetensors too)
  hpsv3        HPSv3/HPSv3.safetensors; Qwen2-VL-7B-Instruct/{config.json, tokenizer.json, ...}, as above
"""
import difflib
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
from pretrained.reward_models import hpsv3, luma, mapanything, on_device, videoalign


class Cameras(NamedTuple):
    """Where n videos were taken from, as the geometry reward's estimator sees it."""
    c2w: torch.Tensor         # (n, T, 4, 4) metres, relative to each video's first camera; NaN where it failed
    intrinsics: torch.Tensor  # (n, 4) fx/W, fy/H, cx/W, cy/H


@dataclass
class Scene:
    """What n videos should show. scene[i:j] or scene[[0, 0, 1]] takes rows.

    c2w (n,T,4,4): target path, metres, relative to the source's first camera; intrinsics (n,4): fx/W, fy/H,
    cx/W, cy/H; prompt: n strings; fps (n,): frames per second, of each; source uint8 (n,T,H,W,3); source_c2w
    (n,T,4,4). What a world does not have is None: all but prompt and fps in a world of captions.
    """
    c2w: torch.Tensor | None
    intrinsics: torch.Tensor | None
    prompt: list
    fps: torch.Tensor  # or a number, the same for all
    source: torch.Tensor = None
    source_c2w: torch.Tensor = None
    look: object = None  # () -> the cameras of the videos being scored; see `cameras`

    def __post_init__(self):
        self.fps = torch.as_tensor(self.fps, dtype=torch.float32).expand(len(self.prompt)).clone()

    def __getitem__(self, rows):
        take = lambda x: np.array(x, object)[rows].tolist() if isinstance(x, list) else x[rows]
        mine = {name: take(x) for name, x in vars(self).items() if x is not None and name != "look"}
        if self.look:
            mine["look"] = lambda: tuple(x[rows] for x in self.look())
        return replace(self, **mine)

    @property
    def cameras(self):
        """The estimated Cameras of the videos being scored: asked for when first needed, then shared by all
        rewards. TypeError outside of `score`."""
        if self.look is None:
            raise TypeError("scene.cameras: there is none, as score was given no reward of `load`'s")
        c2w, intrinsics = self.look()
        return Cameras(trajectories.relative(c2w), intrinsics.clone())


# ---- scoring: in micro-batches, one failure costs one member ----

@torch.no_grad()
def score(rewards, videos, scene, micro_batch=None):
    """All rewards of n videos -> (name -> (n,) float32, name -> {member: why it failed}).

    videos uint8 (n, T, H, W, 3), scene: one row per video; micro_batch: how many videos at a time (None:
    all). A reward that raises for one video gives NaN for that video only. ValueError for a reward that is
    itself wrong, which is no property of a video: guard.call says what that is.
    """
    n = len(videos)
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or n != len(scene.prompt):
        raise ValueError(f"videos: expected uint8 ({len(scene.prompt)}, T, H, W, 3) as the scene has rows, "
                         f"found {videos.dtype} {tuple(videos.shape)}")
    scores = {}
    failures = {}
    estimate = estimator_of(rewards)
    scenes = {}  # of each micro-batch: one for all rewards, so that its cameras are estimated once

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
        step = micro_batch or n
        batches = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        with as_it_was(f"reward {', '.join(names)}"), on_device(getattr(reward, "module", None), videos.device):
            for rows in batches:
                count = rows.stop - rows.start
                try:
                    got = call(reward, names, videos[rows], scene_of(rows))
                except Failed as failure:
                    reasons[rows.start] = failure.reason
                    if count > 1:  # its videos once more, one by one, at the end
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
    """The pose estimator that rewards of `load` share: a function (videos, scene) -> (c2w, intrinsics), rows
    as videos; None where they have none."""
    return next((reward.estimate for reward in rewards if hasattr(reward, "estimate")), None)


# ---- geometry (Eq. 3-4) ----

def geometry(estimator, names=("trans", "rot"), schedule="linear"):
    """Reward of the cameras seen in the video. Metric: a path of the right shape but half the size loses.

    estimator(videos, scene) -> c2w (n, T, 4, 4), metres, any world frame, a NaN row where it failed: both
    paths are made relative to their first frame. Frame weights grow with time, since drift accumulates.
    """
    def reward(videos, scene):
        pred = estimator(videos, scene)
        if not torch.is_tensor(pred) or pred.shape != scene.c2w.shape:
            found = tuple(pred.shape) if torch.is_tensor(pred) else type(pred).__name__
            raise TypeError(f"estimator: expected c2w {tuple(scene.c2w.shape)}, found {found}")
        pred = pred.masked_fill(~pred.isfinite(), math.nan)
        trans, rot = trajectories.pose_errors(pred, scene.c2w, schedule)
        return {name: -error for name, error in (("trans", trans), ("rot", rot)) if name in names}

    trajectories.frame_weights(2, schedule)  # refuses an unknown schedule now rather than at the first video
    reward.names, reward.module = names, getattr(estimator, "module", None)
    return reward


# ---- rewards without a model ----

def _source(videos, scene, name):
    if scene.source is None or scene.source.shape[2:] != videos.shape[2:]:
        found = "none" if scene.source is None else tuple(scene.source.shape[2:4])
        raise TypeError(f"{name} compares with the source video: expected one of {tuple(videos.shape[2:4])}, "
                        f"found {found}")
    return scene.source


def sharpness(videos, scene):
    """-|log(detail / source's detail)|, detail: mean squared Laplacian of brightness. Blur and grain lose.

    Another view of a scene may honestly hold more or less detail: compare within a group, not across scenes.
    """
    def detail(x):
        x = luma(x)
        edges = 2 * x[..., 1:-1] - x[..., :-2] - x[..., 2:]
        edges = edges[..., 1:-1, :] + (2 * x[..., 1:-1, :] - x[..., :-2, :] - x[..., 2:, :])[..., 1:-1]
        return edges.square().mean((1, 2, 3)) + 1 / 255 ** 2  # one grey level: no log of 0 on flat frames
    return {"sharpness": -(detail(videos) / detail(_source(videos, scene, "sharpness"))).log().abs()}


def flicker(videos, scene):
    """-(flicker beyond the source's), in shares of full scale; flickering less earns no more than the source.

    Flicker: mean |second difference in time| of brightness in 8 x 8 cells, where motion averages out.
    """
    def amount(x):
        cells = F.adaptive_avg_pool2d(luma(x), (8, 8))
        return (cells[:, 2:] - 2 * cells[:, 1:-1] + cells[:, :-2]).abs().mean((1, 2, 3))
    return {"flicker": -(amount(videos) - amount(_source(videos, scene, "flicker"))).clamp(min=0)}


def exposure(videos, scene):
    """-(share of pixels with all channels above 250, or all below 5): blown out or black. Needs no source."""
    clipped = (videos > 250).all(-1) | (videos < 5).all(-1)
    return {"exposure": -clipped.float().mean((1, 2, 3))}


def colour(videos, scene):
    """-(distance of the RGB means and deviations from the source's), in shares of full scale."""
    moments = lambda x: torch.cat(torch.std_mean(x.float() / 255, (1, 2, 3)), -1)
    return {"colour": -(moments(videos) - moments(_source(videos, scene, "colour"))).norm(dim=-1)}


# ---- choosing ----

MODEL_FREE = (sharpness, flicker, exposure, colour)
POSES, GRADES = ("trans", "rot"), ("vq", "mq", "ta")
NAMES = (*POSES, *GRADES, "hpsv3", *(f.__name__ for f in MODEL_FREE))


def model_files(names, weights):
    """The files in the folder `weights` that rewards of these names read: what a run's scores depend on."""
    folders = []
    if not {*names}.isdisjoint(POSES):
        folders += ["map-anything"]
    if not {*names}.isdisjoint(GRADES):
        folders += ["VideoReward", "Qwen2-VL-2B-Instruct"]
    if "hpsv3" in names:
        folders += ["HPSv3", "Qwen2-VL-7B-Instruct"]  # whose own weights, 15 GB, are not read
    files = [file for folder in folders for file in sorted((Path(weights) / folder).rglob("*")) if file.is_file()]
    return [file for file in files if not ("7B" in file.parent.name and file.suffix == ".safetensors")]


def load(spec, weights="toy/weights", device="cpu", dtype=None, park=False, estimator=None, schedule="linear",
         stride=1, grey_mq=False, hpsv3_prompt=None, hpsv3_stride=1):
    """"trans=1,rot=1,my.py:f=0.5" -> (reward callables, name -> weight); weight 0: logged, not trained on.

    my.py:f is a function `f(videos, scene)` in a file of one's own; it returns (n,) or {"f": (n,)}. A model
    is loaded once, and only if one of its rewards is named; weights: the folder of their files (top of this
    page). device, dtype: where and in what the models run (None: bfloat16 on a GPU, else float32); park: they
    live on the CPU and visit the videos' device when used. estimator(videos, scene) -> c2w (n, T, 4, 4) takes
    MapAnything's place; schedule, stride: geometry's frame weights and estimated frames; the rest: see
    videoalign and hpsv3. Raises ValueError for an unknown name or a bad weight, FileNotFoundError for a
    missing file.
    """
    chosen, files = {}, {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        key, _, weight = item.rpartition("=")
        path, _, name = key.rpartition(":")
        if path:
            files[name] = path
        if bool(path) == (name in NAMES):
            near = difflib.get_close_matches(name, NAMES, 1)
            raise ValueError(f"rewards: expected name=weight with a name of {', '.join(NAMES)} or another as "
                             f"my.py:name, found {item!r}" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or name in chosen:
            raise ValueError(f"rewards: expected each name once with a number, found {item!r}")
        chosen[name] = value
    if not chosen:
        raise ValueError("rewards: expected at least one name=weight, found none")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder, home = Path(weights), "cpu" if park else device
    poses, grades = (tuple(name for name in names if name in chosen) for names in (POSES, GRADES))
    opened = functools.cache(lambda: estimator or mapanything(folder / "map-anything", home, stride))

    def estimate(videos, scene):
        """What scene.cameras is asked of: one estimator for all rewards, opened when first needed."""
        if hasattr(opened(), "cameras"):
            return opened().cameras(videos)
        return opened()(videos, scene), scene.intrinsics

    def seen(videos, scene):
        return (scene.look() if scene.look else estimate(videos, scene))[0]

    rewards = []
    if poses:
        seen.module = getattr(opened(), "module", None)
        rewards.append(geometry(seen, poses, schedule))
        rewards[0].estimate = estimate
    if grades:
        base = folder / "Qwen2-VL-2B-Instruct"
        rewards.append(videoalign(folder / "VideoReward", base, grades, grey_mq, home, dtype))
    if "hpsv3" in chosen:
        file, base = folder / "HPSv3/HPSv3.safetensors", folder / "Qwen2-VL-7B-Instruct"
        rewards.append(hpsv3(file, base, hpsv3_prompt, hpsv3_stride, home, dtype))
    rewards += [f for f in MODEL_FREE if f.__name__ in chosen]
    for name, path in files.items():
        function, code = load_function(path, name)
        reward = functools.partial(function)  # takes attributes whatever it is
        reward.names = (name,)
        reward.code = code
        reward.estimate = estimate
        rewards.append(reward)
    return rewards, chosen
