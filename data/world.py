"""What a run trains on: a World, and the one of real clips under the published policy. The other is
toy/world.py."""
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import rewards
import trajectories
from data.cameras import PathFolder, split_name, suffix_of
from data.clips import ClipCache
from data.video import read_video
from model import Condition, load_dit
from pretrained.reward_models import model_files
from pretrained.vae import load_vae
from pretrained.weights import VAE_FILE, find_policy


@dataclass
class World:
    """What the loop needs of a world; shapes are those of one sample."""
    dit: torch.nn.Module     # the policy
    codec: object            # .decode(latents (B, 16, F, h, w)) -> video (B, 3, T, H, W) in [-1, 1]
    shape: tuple             # of a latent: (16, F, h, w)
    size: int                # number of clips
    draw: object             # (clip numbers, numpy generators) -> (Condition, Scene), a row a clip
    negative: object         # (1, L, D) negative prompt's embedding, or None
    rewards: list
    reward_weights: dict     # name -> weight
    inputs: dict             # setting -> files it names, whose contents may not change during a run
    true_view: object = None  # (clip numbers, c2w (n, T, 4, 4)) -> uint8 (n, T, H, W, 3), if known


def clip_numbers(iteration, count, size, seed):
    """`count` clip numbers of an iteration: without replacement until all `size` were used, then
    anew."""
    at = range(iteration * count, (iteration + 1) * count)
    epochs = {i // size for i in at}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(size) for epoch in epochs}
    return [int(orders[i // size][i % size]) for i in at]


# ---- real clips under the published policy ----

def open_policy(weights, checkpoint, device):
    """The published policy in a folder of weights and, if any, a checkpoint laid over it -> DiT."""
    return load_policy(find_policy(weights).files, checkpoint, device)


def load_policy(files, checkpoint, device):
    """A published policy's files and, if any, a checkpoint laid over them -> DiT."""
    files = [*files, *([checkpoint] if checkpoint else [])]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; pretrained/README.md lists what this "
                                    "folder holds")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # what is trained, as it was trained
    return load_dit(*files, device=device, dtype=dtype, trained_dtype=torch.float32)


def stacked(clips, name):
    """A tensor of several clips, batch first; None where one of them lacks it."""
    parts = [getattr(clip, name) for clip in clips]
    return None if any(part is None for part in parts) else torch.stack(parts)


def condition_of(dit, clips, target, device):
    """Clips and their target paths (C, T, 4, 4) -> what the policy takes of them: Condition, a row
    per clip."""
    take = lambda name: stacked(clips, name).to(device)
    target = torch.as_tensor(target).to(device)
    if dit.takes_poses:  # ReCamMaster: neither the source's path nor intrinsics
        return Condition(take("text"), source=take("latents"), camera=trajectories.poses(target))
    height, width = (8 * side for side in take("latents").shape[3:])  # pixels
    maps = [trajectories.camera_maps(c2w, take("intrinsics"), height, width)
            for c2w in (target, take("c2w"))]
    return Condition(take("text"), take("image"), take("latents"), *maps)


def open_clips(config, device):
    """World of prepared clips; target paths are drawn from a folder and rescaled (Sec. 3.4)."""
    policy = find_policy(config.weights)
    if not policy.source:
        raise ValueError(f"{config.weights}: {policy.name} takes no source video: expected world = "
                         "captions")
    clips = ClipCache(config.clips, policy.parts, frames=config.frames, height=config.height,
                      width=config.width)
    paths = PathFolder(config.trajectories, config.frames)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{config.trajectories}: {paths.summary()}")
    dit = open_policy(config.weights, None, device)
    codec = load_vae(Path(config.weights) / VAE_FILE, device, dit.patch_embedding.weight.dtype)
    omega = tuple(np.radians(config.omega))

    def draw(numbers, rngs):
        rows = [clips[i] for i in numbers]
        target = []
        for rng in rngs:
            path = paths.draw(rng)
            speeds = trajectories.draw_speeds(rng, config.v, omega)
            target.append(trajectories.rescale(path, *speeds))
        target = torch.from_numpy(np.stack(target)).to(device)
        condition = condition_of(dit, rows, target, device)
        on_device = lambda x: None if x is None else x.to(device)
        videos = [read_source(clip, config, clips.settings) for clip in rows]
        videos = None if any(x is None for x in videos) else torch.stack(videos).to(device)
        fps = torch.tensor([clip.fps for clip in rows], device=device)
        captions = [clip.caption for clip in rows]
        scene = rewards.Scene(target, on_device(stacked(rows, "intrinsics")), captions, fps, videos,
                              on_device(stacked(rows, "c2w")))
        return condition, scene

    rewarded, weights = rewards.load(
        config.rewards, config.weights, device, park=config.park, schedule=config.frame_weights,
        stride=config.estimator_stride, grey_mq=config.grey_mq,
        hpsv3_prompt=config.hpsv3_prompt or None)
    shape = tuple(clips[0].latents.shape)
    negative = clips.negative[None].to(device)
    published = [*policy.files, Path(config.weights) / VAE_FILE]
    files = sorted({split_name(name)[0] for name in paths.names})
    inputs = {"weights": published + model_files(weights, config.weights), "clips": clips.files(),
              f"trajectories{suffix_of(config.trajectories)}": files}
    return World(dit, codec, shape, len(clips), draw, negative, rewarded, weights, inputs)


def read_source(clip, config, settings):
    """The clip's frames uint8 (T, H, W, 3), for rewards that compare with them; None where it has
    moved."""
    if not Path(clip.video).exists():
        return None
    size = (config.height, config.width)
    stride = settings.get("stride", 1)
    return torch.from_numpy(read_video(clip.video, config.frames, stride, size)[0])
