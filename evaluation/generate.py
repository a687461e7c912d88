"""From a condition to videos, by the plain ODE: for evaluations, for `retake`, and the samples of a
run."""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import rewards
from data.clips import NEGATIVE, load_clip
from data.draw import PATH_COLORS, draw_paths, grid, upscale
from data.video import decode, write_video
from data.world import condition_of, load_policy
from evaluation.cases import split_case
from plumbing.files import write_json
from plumbing.ranks import gather
from plumbing.guard import seed_everything
from pretrained.vae import load_vae
from pretrained.weights import VAE_FILE
from sampler import sample, schedule
from trajectories import recammaster, relative


@torch.no_grad()
def prepare(dit, condition, negative, guidance):
    """The parts of a forward pass that depend on neither x nor t, of a Condition and of its
    negative.

    negative: the negative prompt's embedding (1, L, D), which takes the caption's place; without
    guidance (guidance 1) the second is None. ValueError where guidance is asked for and there is no
    negative prompt.
    """
    prepared = dit.prepare(condition)
    if guidance == 1:
        return prepared, None
    if negative is None:
        raise ValueError("guidance: this world has no negative prompt, expected 1")
    text = negative.to(condition.text.device).expand(len(condition), -1, -1)
    return prepared, dit.prepare(dataclasses.replace(condition, text=text))


@torch.no_grad()
def generate(dit, codec, condition, ids, negative=None, *, steps, shift, guidance=1.0, seed=0,
             tail=None, rows=1, shape=None):
    """Condition of C rows -> uint8 videos (C, T, H, W, 3), by the plain ODE.

    The noise depends on seed and ids (C names) alone, so two models get the same. negative: the
    negative prompt's embedding (1, L, D), for guidance other than 1; steps, shift, tail:
    sampler.schedule's and rollout's; rows: decode's; shape: of a latent, where there is no source
    to have it from.
    """
    prepared, negative = prepare(dit, condition, negative, guidance)
    latents = sample(dit, prepared, sigmas=schedule(steps, shift), seed=seed, tail=tail,
                     shape=shape or tuple(condition.source.shape[1:]), condition_ids=list(ids),
                     guidance=guidance, negative=negative, device=condition.text.device)
    if not latents.isfinite().all():  # it would decode to black
        raise ValueError(f"the model makes NaN or infinity of {', '.join(map(str, ids)):.100}")
    return decode(codec, latents, rows)


# ---- a clip along another path ----

@dataclass
class Generating:
    """Settings of all that generates videos with the published weights."""
    weights: str = ""           # folder of the published weights
    ckpt: str = ""              # laid over that policy: files, checkpoints' or runs' folders
    cameras: str = ""           # source cameras: a file, or a folder of one for each video; empty:
                                # estimated where the policy takes them (ReCamMaster does not).
                                # NAME@w2c tells a convention that files do not say
                                # (data/camera_files.py)
    fov: float = 0.0            # horizontal field of view, degrees, of files without intrinsics
    blip: str = "Salesforce/blip2-opt-2.7b"  # BLIP-2, a folder or hub id; captions not given
    vipe: str = "vipe"          # ViPE's program
    vipe_pipeline: str = "default"  # its preset; only_pose where ReDirector's fork is installed
    height: int = 480           # pixels, a multiple of 16 (ReDirector)
    width: int = 832            # pixels, a multiple of 16 (ReDirector)
    steps: int = 50             # denoising steps (ReDirector)
    shift: float = 5.0          # of the schedule (Wan)
    guidance: float = 5.0       # classifier-free guidance (ReDirector); 1: off
    seed: int = 0               # of the noise


def rerender(dit, codec, clip, target, name, negative, sampling, device):
    """A data.Clip re-rendered along a target path (T, 4, 4) -> uint8 (T, H, W, 3); its noise is
    named `name`; sampling: generate's steps, shift, guidance and seed."""
    condition = condition_of(dit, [clip], target[None], device)
    return generate(dit, codec, condition, [name], negative, **sampling)[0].cpu().numpy()


def generate_videos(method, model, videos, sampling, device, quiet):
    """Make those of {case: video} that are not there yet, by a cases.Model. The noise depends on
    seed and case alone. sampling: generate's steps, shift, guidance and seed."""
    todo = [case for case, video in videos.items() if not video.exists()
            and (model.conditions / f"{split_case(case)[0]}.safetensors").exists()]
    if not todo:
        return
    dit = load_policy(model.policy.files, model.checkpoint, device)
    codec = load_vae(Path(model.weights) / VAE_FILE, device, dit.patch_embedding.weight.dtype)
    negative = load_file(model.conditions / NEGATIVE)["text"][None]
    for case in tqdm(todo, method, unit="video", disable=quiet):
        name, number, speed = split_case(case)
        clip = load_clip(model.conditions / f"{name}.safetensors")
        target = recammaster(number, 4 * clip.latents.shape[1] - 3, speed)
        video = rerender(dit, codec, clip, target, case, negative, sampling, device)
        write_video(videos[case], video, clip.fps)


# ---- what a run shows ----

def demonstration(world, config):
    """What is shown while training: a function (path) that writes an mp4 of a few conditions, in
    the panels source | true view | base | now; the true view where the world knows it.

    Two paths are drawn into base and now: white the one asked for, in colour the one that the
    rewards' estimator sees. A world of captions has neither source nor paths. The base's videos are
    sampled here, before any update. Beside the mp4, panels.json names the panels, for the report.
    """
    numbers = list(range(3 if config.world == "toy" else 1))
    rngs = [np.random.default_rng((config.seed, 1 << 32, j)) for j in numbers]
    condition, scene = world.draw(numbers, rngs)
    now = partial(generate, world.dit, world.codec, condition, [f"show {j}" for j in numbers],
                  world.negative, steps=config.steps, shift=config.shift, guidance=config.guidance,
                  seed=config.seed, rows=config.reward_batch, shape=world.shape)
    geometry = [reward for reward in world.rewards
                if set(getattr(reward, "names", ())) & set(rewards.POSES)]
    estimate = rewards.estimator_of(geometry)  # of a run without these rewards, none is loaded

    def with_paths(videos, colour):
        """uint8 (n, T, H, W, 3) -> n arrays, the paths drawn in, if there are any."""
        if scene.c2w is None:
            return [large(video) for video in videos]
        seen = relative(estimate(videos, scene)[0]) if estimate else [None] * len(videos)
        drawn = []
        for video, target, found in zip(videos, scene.c2w, seen):
            paths = [target.cpu().numpy()]
            if found is not None and found.isfinite().all():
                paths.append(found.cpu().numpy())
            drawn.append(draw_paths(large(video), paths, (PATH_COLORS[0], colour)))
        return drawn

    source = scene.source
    if source is None and condition.source is not None:
        source = decode(world.codec, condition.source, config.reward_batch)
    panels = {} if source is None else {"source": [large(video) for video in source]}
    if world.true_view:
        panels["true view"] = [large(video) for video in world.true_view(numbers, scene.c2w)]
    panels["base"] = with_paths(now(), PATH_COLORS[2])
    fps = float(torch.as_tensor(scene.fps).flatten()[0])

    def show(path):
        shown = panels | {"now": with_paths(now(), PATH_COLORS[1])}
        rows = [grid(videos, list(shown)) for videos in zip(*shown.values())]
        write_video(path, np.concatenate(rows, 1), fps)
        write_json(path.with_name("panels.json"), list(shown))
    return show


def large(video):
    """uint8 (T, H, W, 3), a tensor -> an array, enlarged to about 192 lines where it is a toy's."""
    return upscale(video.cpu().numpy(), max(1, 192 // video.shape[1]))


def validation(world, config, rank, ranks):
    """A function without arguments -> {"valid/NAME": mean reward} of a few fixed conditions and
    paths.

    config.validate of them, shared out over the ranks, sampled by the plain ODE from fixed noise
    and scored by the run's own rewards. {} where config.validate is 0.
    """
    mine = range(config.validate)[rank::ranks]
    most = math.ceil(config.validate / ranks)  # on one rank
    part = config.micro_batch or max(1, len(mine))

    def measure():
        device = next(world.dit.parameters()).device
        seed_everything(config.seed, "validation", rank)  # the same luck for rewards that draw
        scores = {name: torch.full((most,), math.nan, device=device)
                  for name in world.reward_weights}
        for at in range(0, len(mine), part):
            numbers = mine[at:at + part]
            rngs = [np.random.default_rng((config.seed, 1 << 33, j)) for j in numbers]
            condition, scene = world.draw([j % world.size for j in numbers], rngs)
            videos = generate(world.dit, world.codec, condition, [f"valid {j}" for j in numbers],
                              world.negative, steps=config.steps, shift=config.shift,
                              guidance=config.guidance, seed=config.seed, rows=config.reward_batch,
                              shape=world.shape)
            found, _ = rewards.score(world.rewards, videos, scene, config.reward_batch or None)
            for name, x in found.items():
                scores[name][at:at + len(numbers)] = x
        record = {}
        for name, x in scores.items():
            x = gather(x)
            ok = x[x.isfinite()]
            if len(ok):
                record[f"valid/{name}"] = float(ok.mean())
        return record

    return measure if config.validate else dict
