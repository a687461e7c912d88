"""Pretraining: `python -m toy.pretrain` makes the shipped weights.

Procedural rooms are ray-cast with known metric geometry. `python -m toy.pretrain` pretrains a base policy (model.py's
DiT) on footage of slow scripted paths. Half of its operators fall short of the script, walk on where they
should stand, and have their white balance off; so the base has two habits, and takes up either. Nothing that
rewards it looks at colours: the metric reward alone must find out which habit follows the camera. The same
command trains the metric depth network of a small pose estimator (MapAnything's part); both are shipped in
weights/. `judge`, the referee, registers a video to the true scene and is never seen by any training.
"""
import plumbing.early  # noqa: F401, first of all: a signal while the rest is imported ends this quietly

import json
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from tqdm import tqdm

import model
import trajectories
from data.video import to_uint8
from plumbing.files import write_file
from plumbing.settings import run_command
from toy.poses import Estimator, blur
from toy.rooms import (
    BASE_SPEED, BASE_TURN, Codec, FRAMES, HEADS, SPEED, TEXT, TURN, by_fours, integrate,
    render, render_video, rooms, to_patches, walks)
from toy.world import open_weights, plucker_maps

# what the base learns from: scripted paths, filmed by operators of whom half hardly follow the script
TAKES = 3                                  # videos of each room, besides its source
CARELESS = 0.5                             # share of operators who fall short of the script ...
LAG, LAG_TURN = 0.7, 0.6                   # ... by these shares of translation and rotation, ...
DRIFT = 0.05                               # ... who walk forward (m/frame^2) where it says to stand, ...
CARELESS_TINT = torch.tensor([0.3, 0.0, -0.3])  # ... and whose white balance is off by this, red to blue


def footage(n, seed, draw=render):
    """n rooms: source videos (n, 3, T, H, W), filmed from an almost steady hand, and their c2w (n, T, 4, 4);
    others (n, TAKES, 3, T, H, W), and the c2w (n, TAKES, T, 4, 4) that their operators were asked for."""
    g = torch.Generator().manual_seed(seed)
    room, paths = rooms(n, seed), 1 + TAKES
    step, turn = (x.unflatten(0, (n, paths)) for x in walks(n * paths, g))  # (n, paths, T-1, 3)

    def pace():  # (n, paths, 1, 1): a source's; another's own, or 0, which makes pans and dollies
        fast, moves = (torch.rand(n, TAKES, 1, 1, generator=g) for _ in range(2))
        return torch.cat([torch.full((n, 1, 1, 1), 0.1), (0.2 + 0.8 * fast) * (moves > 0.25)], 1)
    step, turn = step * BASE_SPEED * pace(), turn * BASE_TURN * pace()
    careless = torch.rand(n, paths, 1, 1, generator=g) < CARELESS
    careless = careless * (torch.arange(paths) > 0).view(-1, 1, 1)  # not at the source
    drift = DRIFT * torch.arange(1, FRAMES)[:, None] * torch.tensor([0, 0, 1.0])
    drift = drift * (step == 0).all(-1, keepdim=True)
    script = integrate(step.flatten(0, 1), turn.flatten(0, 1))
    step, turn = step * (1 - careless * LAG) + careless * drift, turn * (1 - careless * LAG_TURN)
    true = integrate(step.flatten(0, 1), turn.flatten(0, 1))
    video = draw(room[torch.arange(n).repeat_interleave(paths)], true)[0].unflatten(0, (n, paths))
    video = video + careless[..., None, None] * CARELESS_TINT.view(3, 1, 1, 1)
    script = script.unflatten(0, (n, paths))
    return video[:, 0], script[:, 0], video[:, 1:], script[:, 1:]


def fit_codec(video):
    """Principal components of video's patches (B, 3, 1 + 4k, H, W) -> Codec."""
    state = {}
    for name, x in (("first", video[:, :, :1]), ("rest", by_fours(video))):
        x = to_patches(x).flatten(0, 2)
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())  # ascending
        std, vectors = values[-16:].flip(0).sqrt(), vectors[:, -16:].flip(1)
        scale = std.sqrt() * std.mean().sqrt()  # unit power on average, half-way to white
        state |= {f"{name}.mean": mean, f"{name}.down": (vectors / scale).float().contiguous(),
                  f"{name}.up": (vectors * scale).T.float().contiguous()}
    return Codec(state)


def write_weights(path, state):
    """Half precision is enough to start from, and half the download."""
    write_file(path, save({k: v.half().contiguous() for k, v in state.items()}))


def optimise(parameters, steps, loss_at, out, name, export, label="loss"):
    """AdamW with a moving average of the weights; the rate warms up, stays, and falls over the last 30 %.

    loss_at(step) -> loss, logged as `label`; export(averaged parameters) saves what is shipped. Resumes from
    its own file.
    """
    file, log = out / f"{name}.pretraining.pt", open(out / f"{name}.log.jsonl", "a")
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    average, start = [p.detach().clone() for p in parameters], 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        start, average = state["step"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for p, saved in zip(parameters, state["parameters"]):
            p.data.copy_(saved)
    total, began = 0, time.time()
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 200) * min(1, (steps - step) / (0.3 * steps)) + 1e-6
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 - keep)
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            record = {"step": step + 1, label: round(total / 50, 4), "seconds": round(time.time() - began)}
            print(json.dumps(record), file=log, flush=True)
            total = 0
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            state = {"step": step + 1, "parameters": [p.data for p in parameters], "average": average,
                     "optimizer": optimizer.state_dict()}
            torch.save(state, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
            export(average)


def pretrain_base(out, codec, steps=18000, rows=64):
    """Flow matching on footage of rooms, given a steady source video and the script, levels shifted to noise.

    The camera adapter's first layer sees 8 x 8 pixels of a map through one weight each; here it is trained
    with the 64 weights tied, on maps 64 times smaller, and untied when saved: the same function, at a
    hundredth of the cost.
    """
    torch.manual_seed(0)
    config = model.Config(dim=128, num_heads=HEADS, num_layers=4, ffn_dim=512, text_dim=TEXT, camera_dim=24,
                          roce=True)
    dit = model.DiT(config)
    tied, adapter = torch.nn.Conv2d(24, config.dim, 2, stride=2), dit.control_adapter
    with torch.no_grad():
        for block in adapter.residual_blocks:
            block.conv2.weight.mul_(0.1)
    names = [n for n, _ in dit.named_parameters() if not n.startswith("control_adapter.conv")]
    parameters = [dict(dit.named_parameters())[n] for n in names] + [tied.weight, tied.bias]
    dit.compile()
    draw = torch.compile(render)
    text = torch.zeros(rows, 1, TEXT)

    def camera_tokens(maps):  # (B, 24, F, h, w) -> (B, L, dim), DiT.prepare's of maps 8 x 8 times larger
        x = adapter.residual_blocks(tied(maps.transpose(1, 2).flatten(0, 1)))
        return x.unflatten(0, (len(maps), -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)

    def prepare(source, target_maps, source_maps):
        keys = tuple(block.cross_attn.keys_values(dit.text_embedding(text), None) for block in dit.blocks)
        target, other = camera_tokens(target_maps), camera_tokens(source_maps)
        return model.Prepared(keys, target, dit.tokens(source) + other,
                              F.silu(torch.cat([target, other], 1)), tuple(source.shape[2:]))

    @lru_cache(1)
    def batch(number):  # rooms for TAKES steps, a take for each
        source, source_path, takes, scripts = footage(rows, number, draw)
        each = lambda f, x: f(x.flatten(0, 1)).unflatten(0, (rows, TAKES))
        return (codec.encode(source), plucker_maps(source_path), each(codec.encode, takes),
                each(plucker_maps, scripts))

    def loss_at(step):
        source, source_maps, takes, maps = batch(step // TAKES)
        take = step % TAKES
        g = torch.Generator().manual_seed(10_000_000 + step)
        x0 = takes[:, take]
        u = torch.rand(rows, generator=g)
        t = 4 * u / (1 + 3 * u)
        eps = torch.randn(x0.shape, generator=g)
        x = torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1))
        v = dit(x, t, prepare(source, maps[:, take], source_maps))
        return (v - (eps - x0)).square().mean()

    def export(average):
        state = {k: v.detach().clone() for k, v in dit.state_dict().items()} | dict(zip(names, average))
        weight, bias = average[-2:]
        weight = (weight[:, :, None] / 64).expand(-1, -1, 64, -1, -1).flatten(1, 2)
        state |= {"control_adapter.conv.weight": weight, "control_adapter.conv.bias": bias}
        write_weights(out / "toy_base.safetensors", state)

    optimise(parameters, steps, loss_at, out, "toy_base", export)


def photographed(n, seed, codec, draw=render):
    """What the depth network learns from: first frames (n, 3, H, W) of random rooms as the codec shows them,
    in any white balance, most with noise in their latents, half of them somewhat blurred; depth (n, H, W)."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda: torch.rand(n, 1, 1, 1, 1, generator=g)
    image, depth = draw(rooms(n, seed), torch.eye(4).repeat(n, 1, 1, 1))
    kind = rand()
    image = image + (1.5 * rand() - 0.4) * CARELESS_TINT.view(3, 1, 1, 1)
    image = torch.lerp(image, blur(image, 0.6), rand() * (kind < 0.5))
    latents, grain = codec.encode(image), 0.25 * rand() * (kind > 0.3)
    latents = latents + grain * torch.randn(latents.shape, generator=g)
    return codec.decode(latents)[:, :, 0], depth[:, 0]


def train_estimator(out, codec, steps=6000, rows=64):
    """The estimator's depth network; the rest of it has nothing to learn."""
    torch.manual_seed(0)
    net, draw = Estimator(), torch.compile(render)
    names, parameters = zip(*net.named_parameters())

    def loss_at(step):
        image, depth = photographed(rows, 50_000_000 + step, codec, draw)
        return (net.depth(image) - depth.log()).abs().mean()

    export = lambda average: write_weights(out / "toy_estimator.safetensors", dict(zip(names, average)))
    optimise(parameters, steps, loss_at, out, "toy_estimator", export, "log_depth_error")


@dataclass
class Describe:
    """`python -m toy.pretrain describe`"""
    weights: str = "toy/weights"      # folder of the toy's weights
    videos: int = 240                 # of unseen rooms


def describe(config):
    """Print how far off the estimator is on clean and decoded videos of unseen rooms at test speeds."""
    _, codec, estimator = open_weights(config.weights)
    room = rooms(config.videos, 30_000_000)
    step, turn = walks(config.videos, torch.Generator().manual_seed(30_000_000))
    for speed in (1.0, 1.5, 2.0):
        c2w = integrate(step * SPEED * speed, turn * TURN * speed)
        motion = c2w[:, :, :3, 3].norm(dim=-1).mean()
        video = render_video(room, c2w)
        for name, seen in (("clean", video), ("decoded", codec.decode(codec.encode(video)))):
            position, rotation = trajectories.pose_errors(estimator(to_uint8(seen)), c2w, "uniform")
            print(f"speed {speed}, {name} videos: median error {position.median():.3f} m, "
                  f"{torch.rad2deg(rotation.median()):.2f} degrees (mean motion {motion:.3f} m)")


@dataclass
class Pretrain:
    """`python -m toy.pretrain`"""
    out: str = "out/pretraining"      # folder for the weights and what is needed to resume


def pretrain(config):
    """Make the codec, the estimator's depth network and the base policy in config.out; resumes."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    codec = fit_codec(footage(128, 1_000_000)[2].flatten(0, 1))
    write_file(folder / "toy_codec.safetensors", save(codec.state))
    train_estimator(folder, codec)
    pretrain_base(folder, codec)
    describe(Describe(weights=str(folder)))


if __name__ == "__main__":
    commands = {"pretrain": (Pretrain, pretrain, None), "describe": (Describe, describe, None)}
    run_command("toy.pretrain", __doc__, commands, sys.argv[1:])
