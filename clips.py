"""Real clips and the published weights, as train.py and evaluate.py use them; the other world is toy.py."""
from pathlib import Path

import numpy as np
import torch

import data
import rewards
import trajectories
from cameras import PathFolder
from model import Condition, load_dit
from vae import load_vae

DIT, REDIRECTOR = "diffusion_pytorch_model.safetensors", "step20000.safetensors"  # as published


# ---- the published weights ----

def open_policy(weights, checkpoint, device):
    """The published DiT with ReDirector's weights and, if any, a checkpoint laid over them."""
    files = [Path(weights) / DIT, Path(weights) / REDIRECTOR, *([checkpoint] if checkpoint else [])]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; README.md lists what this folder holds")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return load_dit(*files, device=device, dtype=dtype, trained_dtype=torch.float32)  # as it was trained


def weights_sizes(weights):
    """{file: bytes} of the published files; FileNotFoundError for one that is missing."""
    names = DIT, REDIRECTOR, data.VAE_FILE, data.TEXT_FILE, data.IMAGE_FILE
    files = [Path(weights) / name for name in names]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file, expected the published weights")
    return {f"bytes of {file.name}": file.stat().st_size for file in files}


def open_encoders(weights, device):
    """VAE, text and image encoder from the folder of the published weights."""
    from encoders import load_image_encoder, load_text_encoder
    dtype, folder = torch.float32 if device.type == "cpu" else torch.bfloat16, Path(weights)
    return (load_vae(folder / data.VAE_FILE, device, dtype),
            load_text_encoder(folder / data.TEXT_FILE, folder / data.TOKENIZER, device, dtype),
            load_image_encoder(folder / data.IMAGE_FILE, device, dtype))


# ---- prepared clips ----

def condition_of(clips, target, config, device):
    """data.Clips and their target paths (C, T, 4, 4) -> Condition, a row per clip."""
    stack = lambda name: torch.stack([getattr(clip, name) for clip in clips]).to(device)
    maps = [trajectories.camera_maps(torch.as_tensor(c2w).to(device), stack("intrinsics"), config.height,
                                     config.width) for c2w in (target, stack("c2w"))]
    return Condition(stack("text"), stack("image"), stack("latents"), *maps)


def open_world(config, device, World):
    """train.World of prepared clips; target paths are drawn from a folder and rescaled (paper Sec. 3.4)."""
    clips = data.ClipCache(config.clips, frames=config.frames, height=config.height, width=config.width)
    paths = PathFolder(config.trajectories, config.frames)
    dit = open_policy(config.weights, None, device)
    codec = load_vae(Path(config.weights) / data.VAE_FILE, device, dit.patch_embedding.weight.dtype)
    omega = tuple(np.radians(config.omega))

    def draw(numbers, rngs):
        rows = [clips[i] for i in numbers]
        target = [trajectories.rescale(paths.draw(rng), *trajectories.draw_speeds(rng, config.v, omega))
                  for rng in rngs]
        target, source = torch.from_numpy(np.stack(target)), torch.stack([clip.c2w for clip in rows])
        intrinsics = torch.stack([clip.intrinsics for clip in rows])
        condition = condition_of(rows, target, config, device)
        videos = [read_source(clip, config, clips.settings) for clip in rows]
        videos = None if any(x is None for x in videos) else torch.stack(videos).to(device)
        scene = rewards.Scene(target.to(device), intrinsics.to(device), [clip.caption for clip in rows],
                              rows[0].fps, videos, source.to(device))
        return condition, scene

    rewarded, weights = rewards.load(config.rewards, config.weights, device, park=config.park,
                                     schedule=config.frame_weights, stride=config.estimator_stride,
                                     grey_mq=config.grey_mq, hpsv3_prompt=config.hpsv3_prompt or None)
    shape, negative = tuple(clips[0].latents.shape), clips.negative[None].to(device)
    return World(dit, codec, shape, len(clips), draw, negative, rewarded, weights)


def read_source(clip, config, settings):
    """The clip's frames uint8 (T, H, W, 3), for rewards that compare with them; None where it has moved."""
    if not Path(clip.video).exists():
        return None
    size, stride = (config.height, config.width), settings.get("stride", 1)
    return torch.from_numpy(data.read_video(clip.video, config.frames, stride, size)[0])
