"""Rewards (paper section 3.2): what the policy is told about its videos.

A reward is any callable `f(videos, scene) -> dict name -> (n,) float tensor`: videos uint8 (n, T, H, W, 3) RGB on the
device, scene a `Scene` with one row per video; higher is better, NaN where it failed for that video.

| name      | unit                 | what                                                                       |
|-----------|----------------------|----------------------------------------------------------------------------|
| trans     | metres               | minus the weighted position error of the estimated cameras (Eq. 3)         |
| rot       | radians              | minus their weighted rotation error (Eq. 4)                                |
| sharpness | log ratio            | minus the distance of the video's detail from the source's (no model)      |
| flicker   | share of full scale  | minus the brightness flicker beyond the source's (no model)                |
| exposure  | share of pixels      | minus the share of blown-out or black pixels (no model)                    |
| colour    | share of full scale  | minus the shift of colour mean and contrast from the source's (no model)   |

The last four know nothing of the scene: blurred, blinking, over-exposed or recoloured videos lose, but a video that
wins them is not therefore good. They are meant as small weights, and (weight 0) as alarms for reward hacking.
"""
import difflib
import importlib.util
import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F


@dataclass
class Scene:
    """What n videos should show. scene[i:j] or scene[[0, 0, 1]] takes rows.

    c2w (n,T,4,4): target path, metres, relative to the source's first camera; intrinsics (n,4): fx/W, fy/H, cx/W,
    cy/H; prompt: n strings; fps: float; source uint8 (n,T,H,W,3) or None; source_c2w (n,T,4,4) or None.
    """
    c2w: torch.Tensor
    intrinsics: torch.Tensor
    prompt: list
    fps: float
    source: torch.Tensor = None
    source_c2w: torch.Tensor = None

    def __getitem__(self, rows):
        index = range(len(self.prompt))[rows] if isinstance(rows, slice) else rows
        take = lambda x: None if x is None else x[rows]
        return Scene(take(self.c2w), take(self.intrinsics), [self.prompt[i] for i in index], self.fps,
                     take(self.source), take(self.source_c2w))


# ---- scoring: in micro-batches, one failure costs one member ----

@contextmanager
def on_device(module, device):
    """Frozen weights that live elsewhere visit the device: only the copy there is paid, none is copied back."""
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    home = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, data in home:
            tensor.data = data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data


def _names(reward):
    return getattr(reward, "names", None) or (reward.__name__,)


def _attempt(reward, videos, scene):
    """Scores of these videos, and member -> reason; a batch that fails is repeated one video at a time."""
    n, names = len(videos), _names(reward)
    try:
        scores = reward(videos, scene)
    except (TypeError, NameError, AttributeError, ImportError, OSError) as error:  # the code is wrong, not a video
        raise ValueError(f"reward {', '.join(names)}: {type(error).__name__}: {error}") from error
    except Exception as error:
        if n > 1:
            parts = [_attempt(reward, videos[i:i + 1], scene[i:i + 1]) for i in range(n)]
            return ({name: torch.cat([scores[name] for scores, _ in parts]) for name in names},
                    {name: {i: why[name][0] for i, (_, why) in enumerate(parts) if why[name]} for name in names})
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {error}"
        return ({name: torch.full((1,), math.nan, device=videos.device) for name in names},
                {name: {0: reason} for name in names})
    if torch.is_tensor(scores) and len(names) == 1:
        scores = {names[0]: scores}
    if not isinstance(scores, dict) or set(scores) != set(names):
        found = sorted(scores) if isinstance(scores, dict) else type(scores).__name__
        raise ValueError(f"reward {', '.join(names)}: expected scores named {sorted(names)}, found {found}")
    checked, failed = {}, {}
    for name, x in scores.items():
        if not torch.is_tensor(x) or x.shape != (n,) or not x.is_floating_point():
            found = f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"reward {name}: expected a float tensor ({n},), one score per video, found {found}")
        if torch.isinf(x).any():
            raise ValueError(f"reward {name}: expected finite scores (NaN where it failed), found {x.tolist()}")
        checked[name] = x.detach().to(videos.device, torch.float32)
        failed[name] = {i: "no score (NaN)" for i in torch.isnan(x).nonzero().flatten().tolist()}
    return checked, failed


@torch.no_grad()
def score(rewards, videos, scene, micro_batch=None):
    """All rewards of n videos -> (name -> (n,) float32, name -> {member: why it failed}).

    videos uint8 (n, T, H, W, 3), scene: one row per video; micro_batch: how many videos at a time (None: all).
    A reward that raises for one video gives NaN for that video only. A reward that is itself wrong (returns other
    names or shapes, infinities, or raises TypeError, NameError, AttributeError, ImportError or OSError) raises
    ValueError: that is no property of a video.
    """
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or len(videos) != len(scene.prompt):
        raise ValueError(f"videos: expected uint8 ({len(scene.prompt)}, T, H, W, 3) as the scene has rows, "
                         f"found {videos.dtype} {tuple(videos.shape)}")
    n, step = len(videos), micro_batch or len(videos)
    scores, failures = {}, {}
    for reward in rewards:
        with on_device(getattr(reward, "module", None), videos.device):
            parts = [_attempt(reward, videos[i:i + step], scene[i:i + step]) for i in range(0, n, step)]
        for name in _names(reward):
            scores[name] = torch.cat([part[name] for part, _ in parts])
            failures[name] = {k * step + i: why for k, (_, part) in enumerate(parts) for i, why in part[name].items()}
    return scores, failures


# ---- geometry (Eq. 3-4) ----

def geometry(estimator, names=("trans", "rot"), schedule="linear"):
    """Reward of the cameras seen in the video. Metric: a path of the right shape and half the size is penalised.

    estimator(videos, scene) -> c2w (n, T, 4, 4), metres, any world frame, a NaN row where it failed: both paths are
    made relative to their first frame. Frame weights grow with time, since drift accumulates (trajectories).
    """
    import trajectories

    def reward(videos, scene):
        pred = estimator(videos, scene)
        if not torch.is_tensor(pred) or pred.shape != scene.c2w.shape:
            found = tuple(pred.shape) if torch.is_tensor(pred) else type(pred).__name__
            raise TypeError(f"estimator: expected c2w {tuple(scene.c2w.shape)}, found {found}")
        pred, target = pred.double(), scene.c2w.double().to(pred.device)
        failed = ~torch.isfinite(pred).flatten(1).all(1)
        pred = torch.where(failed[:, None, None, None], target, pred)
        weights = trajectories.frame_weights(pred.shape[1], schedule)
        trans, rot = trajectories.pose_errors(pred, target, weights)
        return {name: (-error).masked_fill(failed, math.nan).float()
                for name, error in (("trans", trans), ("rot", rot)) if name in names}

    reward.names, reward.module = names, getattr(estimator, "module", None)
    return reward


# ---- rewards without a model ----

def _luma(videos):
    """uint8 (n, T, H, W, 3) -> brightness (n, T, H, W) in [0, 1] (Rec. 601)."""
    return videos.float() @ (torch.tensor([0.299, 0.587, 0.114], device=videos.device) / 255)


def _source(videos, scene, name):
    if scene.source is None or scene.source.shape[2:] != videos.shape[2:]:
        found = "none" if scene.source is None else tuple(scene.source.shape[2:4])
        raise TypeError(f"{name} compares with the source video: expected one of {tuple(videos.shape[2:4])}, "
                        f"found {found}")
    return scene.source


def sharpness(videos, scene):
    """-|log(detail / source's detail)|, detail = mean squared Laplacian of brightness; blur and grain both lose.

    Another view of the scene may honestly hold more or less detail: compare within a group, not across scenes.
    """
    def detail(x):
        x = _luma(x)
        edges = 4 * x[..., 1:-1, 1:-1] - x[..., :-2, 1:-1] - x[..., 2:, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
        return edges.square().mean((1, 2, 3)) + 1 / 255 ** 2  # one grey level: no logarithm of 0 on a flat frame
    return {"sharpness": -(detail(videos) / detail(_source(videos, scene, "sharpness"))).log().abs()}


def flicker(videos, scene):
    """-(flicker beyond the source's), in shares of full scale; not flickering at all earns no more than the source.

    Flicker: mean |second difference in time| of brightness averaged over an 8 x 8 grid, where motion nearly cancels.
    """
    def amount(x):
        cells = F.adaptive_avg_pool2d(_luma(x), (8, 8))
        return (cells[:, 2:] - 2 * cells[:, 1:-1] + cells[:, :-2]).abs().mean((1, 2, 3))
    return {"flicker": -(amount(videos) - amount(_source(videos, scene, "flicker"))).clamp(min=0)}


def exposure(videos, scene):
    """-(share of pixels all of whose channels are above 250 or below 5): blown out or black. Needs no source."""
    clipped = (videos > 250).all(-1) | (videos < 5).all(-1)
    return {"exposure": -clipped.float().mean((1, 2, 3))}


def colour(videos, scene):
    """-(distance of the RGB means and deviations from the source's), in shares of full scale."""
    moments = lambda x: torch.cat(torch.std_mean(x.float() / 255, (1, 2, 3)), -1)
    return {"colour": -(moments(videos) - moments(_source(videos, scene, "colour"))).norm(dim=-1)}


# ---- choosing ----

MODEL_FREE = (sharpness, flicker, exposure, colour)
NAMES = ("trans", "rot", *(f.__name__ for f in MODEL_FREE))


def _from_file(path, function):
    """A user's reward `function` in the python file `path`: called with (videos, scene)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; a reward of your own is my_file.py:my_function=weight")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, function, None)
    if not callable(reward):
        raise ValueError(f"{path}: expected a function {function}(videos, scene), found none")
    try:
        inspect.signature(reward).bind(None, None)
    except TypeError:
        raise ValueError(f"{path}: expected {function}(videos, scene), "
                         f"found {function}{inspect.signature(reward)}") from None

    def named(videos, scene):
        return reward(videos, scene)

    named.names = (function,)
    return named


def load(spec, estimator=None, schedule="linear"):
    """"trans=1,rot=1,my.py:f=0.5" -> (reward callables, name -> weight). Weight 0: computed and logged, not trained on.

    my.py:f is a function `f(videos, scene)` in a file of one's own; it returns (n,) or {"f": (n,)}.
    estimator(videos, scene) -> c2w (n, T, 4, 4) serves trans and rot; schedule: their frame weights.
    Raises ValueError for an unknown name or a bad weight, FileNotFoundError for a missing file.
    """
    weights, files = {}, {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        key, _, weight = item.rpartition("=")
        path, _, name = key.rpartition(":")
        if path:
            files[name] = path
        if bool(path) == (name in NAMES):
            near = difflib.get_close_matches(name, NAMES, 1)
            raise ValueError(f"rewards: expected name=weight with a name of {', '.join(NAMES)} or another as my_file.py:name, "
                             f"found {item!r}" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or name in weights:
            raise ValueError(f"rewards: expected each name once with a number, found {item!r}")
        weights[name] = value
    if not weights:
        raise ValueError("rewards: expected at least one name=weight, found none")
    rewards = []
    poses = tuple(name for name in ("trans", "rot") if name in weights)
    if poses:
        rewards.append(geometry(estimator, poses, schedule))
    rewards += [f for f in MODEL_FREE if f.__name__ in weights]
    rewards += [_from_file(path, name) for name, path in files.items()]
    return rewards, weights
