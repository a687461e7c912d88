"""Pretraining: `python -m toy.pretrain` makes the shipped weights.

A base policy (model.py's DiT) learns from footage of scripted paths through procedural rooms. Every operator
falls short of the script by a share of their own, and tires, so that the shortfall grows within a take;
nothing in the picture tells who filmed it. So the base goes the right way but not as far as asked, and falls
behind: the paper's fault. The same command trains the codec and the depth network of a small pose estimator
(MapAnything's part). `judge`, the referee, registers a video to the true scene; no training ever sees it.
`python -m toy.pretrain describe` prints what decides whether RL can mend that fault.
"""
import plumbing.early  # noqa: F401, first of all: a signal while the rest is imported ends this quietly

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from scipy.stats import spearmanr
from tqdm import tqdm

import model
import trajectories
from data.video import to_uint8
from grpo import advantages, policy_loss
from plumbing.files import write_file
from plumbing.settings import run_command
from pretrained.weights import read_weights
from sampler import rollout, schedule
from toy.poses import Estimator, blur, half, judge
from toy.rooms import (
    BASE_SPEED, BASE_TURN, Codec, FRAMES, HEADS, SPEED, TEXT, TURN, by_fours, integrate,
    render, render_video, rooms, to_patches, walks)
from toy.world import condition_and_scene, filled, open_weights, plucker_maps, sources

# what the base learns from: scripted paths, filmed by operators who do not go as far as the script says
TAKES = 4      # videos of each room, besides its source
SHORT = 0.75   # an operator falls short by a share of their own, 0 to this, mostly near either end, ...
TIRES = 0.4    # ... and at the end of a take does up to this share less still
RESHOOT = 32   # steps between new footage
KEPT = 96      # batches of footage that are learnt from at a time


def footage(n, seed, draw=render):
    """n rooms: source videos (n, 3, T, H, W), filmed from an almost steady hand, and their c2w (n, T, 4, 4);
    others (n, TAKES, 3, T, H, W), and the c2w (n, TAKES, T, 4, 4) that their operators were asked for."""
    g = torch.Generator().manual_seed(seed)
    room = rooms(n, seed)
    paths = 1 + TAKES
    step, turn = (x.unflatten(0, (n, paths)) for x in walks(n * paths, g))  # (n, paths, T-1, 3)

    def pace():  # (n, paths, 1, 1): a source's; a take's own, or 0, so that some only turn or only move
        fast, moves = (torch.rand(n, TAKES, 1, 1, generator=g) for _ in range(2))
        return torch.cat([torch.full((n, 1, 1, 1), 0.1), (0.2 + 0.8 * fast) * (moves > 0.25)], 1)
    step = step * BASE_SPEED * pace()
    turn = turn * BASE_TURN * pace()
    script = integrate(step.flatten(0, 1), turn.flatten(0, 1))

    # the share of every step and turn that is done, (n, paths, T-1, 1); of the source all is
    short, tired = (torch.rand(n, paths, 1, 1, generator=g) for _ in range(2))
    late = torch.linspace(0, 1, FRAMES - 1)[:, None]
    short = SHORT * torch.sin(math.pi / 2 * short).square()  # the arcsine distribution
    done = (1 - short) * (1 - TIRES * tired * late)
    done = torch.where(torch.arange(paths).view(-1, 1, 1) > 0, done, 1.0)
    true = integrate((step * done).flatten(0, 1), (turn * done).flatten(0, 1))

    room = room[torch.arange(n).repeat_interleave(paths)]
    parts = [slice(i, i + 64) for i in range(0, n * paths, 64)]
    video = torch.cat([draw(room[part], true[part])[0] for part in parts]).unflatten(0, (n, paths))
    script = script.unflatten(0, (n, paths))
    return video[:, 0], script[:, 0], video[:, 1:], script[:, 1:]


def fit_codec(video):
    """Principal components of video's patches (B, 3, 1 + 4k, H, W) -> Codec, whose convolutions do nothing."""
    codec = Codec()
    for name, x in (("first", video[:, :, :1]), ("rest", by_fours(video))):
        x = to_patches(x).flatten(0, 2)
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())  # ascending
        std = values[-16:].flip(0).sqrt()
        vectors = vectors[:, -16:].flip(1)
        scale = std.sqrt() * std.mean().sqrt()  # unit power on average, half-way to white
        codec.get_buffer(f"{name}_mean").copy_(mean)
        codec.get_buffer(f"{name}_down").copy_(vectors / scale)
        codec.get_buffer(f"{name}_up").copy_((vectors * scale).T)
    return codec


def write_weights(path, state):
    """Half precision is enough to start from, and half the download."""
    write_file(path, save({k: v.half().contiguous() for k, v in state.items()}))


def train_codec(out, codec, steps=4000, rows=12):
    """The decoder's convolutions, on footage with a little noise in its latents."""
    names, parameters = zip(*codec.named_parameters())
    draw = torch.compile(render)

    @lru_cache(64)
    def filmed(number):
        return footage(16, 60_000_000 + number, draw)[2].flatten(0, 1)

    def loss_at(step):
        g = torch.Generator().manual_seed(70_000_000 + step)
        newest = step // RESHOOT
        filmed(newest)
        stock = filmed(int(torch.randint(max(0, newest - 63), newest + 1, (1,), generator=g)))
        video = stock[torch.randperm(len(stock), generator=g)[:rows]]
        latents = codec.encode(video)
        latents = latents + 0.05 * torch.randn(latents.shape, generator=g)
        return (codec.decode(latents) - video).square().mean()

    def export(average):
        write_weights(out / "toy_codec.safetensors", codec.state_dict() | dict(zip(names, average)))

    optimise(parameters, steps, loss_at, out, "toy_codec", export, "squared_error")
    if not (out / "toy_codec.safetensors").exists():  # no step was asked for
        export([p.detach() for p in parameters])
    filled(codec, out / "toy_codec.safetensors")


def optimise(parameters, steps, loss_at, out, name, export, label="loss", matrices=()):
    """AdamW, and Muon for those parameters that are `matrices`; with a moving average of the weights. The
    rate warms up, stays, and falls over the last 30 %.

    loss_at(step) -> loss, logged as `label`; export(averaged parameters) saves what is shipped. Resumes from
    its own file, also to more steps than it was made for.
    """
    file = out / f"{name}.pretraining.pt"
    log = open(out / f"{name}.log.jsonl", "a")
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    rates = [1e-3]
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)]
    if matrices:  # orthogonal updates: a lower loss after as many steps (README.md here)
        rates.append(3e-3)
        optimizers.append(torch.optim.Muon(matrices, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"))
    average = [p.detach().clone() for p in parameters]
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        start = state["step"]
        average = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for p, saved in zip(parameters, state["parameters"]):
            p.data.copy_(saved)
    losses = []
    began = time.time()
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name):
        pace = min(1, (step + 1) / 200) * min(1, (steps - step) / (0.3 * steps))
        for rate, optimizer in zip(rates, optimizers):
            for group in optimizer.param_groups:
                group["lr"] = rate * pace + 1e-6
        loss = loss_at(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        keep = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 - keep)
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            record = {"step": step + 1, label: round(float(np.mean(losses)), 4), "seconds": round(time.time() - began)}
            print(json.dumps(record), file=log, flush=True)
            losses = []
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"step": step + 1, "parameters": [p.data for p in parameters], "average": average,
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(state, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
            export(average)


def pretrain_base(out, codec, steps=18000, rows=64, start=""):
    """Flow matching on footage of rooms, given a steady source video and the script, levels shifted to noise.

    The camera adapter's first layer sees 8 x 8 pixels of a map through one weight each; here it is trained
    with the 64 weights tied, on maps 64 times smaller, and untied when saved: the same function, at a
    hundredth of the cost. start: a folder of weights to start from.
    """
    torch.manual_seed(0)
    config = model.Config(dim=128, num_heads=HEADS, num_layers=4, ffn_dim=512, text_dim=TEXT, camera_dim=24,
                          roce=True)
    dit = model.DiT(config)
    tied, adapter = torch.nn.Conv2d(24, config.dim, 2, stride=2), dit.control_adapter
    with torch.no_grad():
        for block in adapter.residual_blocks:
            block.conv2.weight.mul_(0.1)
        if start:
            weights = read_weights(Path(start) / "toy_base.safetensors")
            dit.load_state_dict({name: x.float() for name, x in weights.items()})
            tied.weight.copy_(adapter.conv.weight.unflatten(1, (24, 64)).sum(2))
            tied.bias.copy_(adapter.conv.bias)
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

    @lru_cache(KEPT)
    def filmed(number):  # rooms for RESHOOT steps, kept in a file
        file = out / f"footage/{number}.safetensors"
        if not file.exists():
            source, path, takes, scripts = footage(rows, number, draw)
            takes = codec.encode(takes.flatten(0, 1)).unflatten(0, (rows, TAKES))
            shot = {"source": codec.encode(source).half(), "path": path, "takes": takes.half(),
                    "scripts": scripts}
            write_file(file, save({name: x.contiguous() for name, x in shot.items()}))
        return load_file(file)

    def loss_at(step):
        # a take of each of 64 rooms, of the newest or of older footage
        pick = np.random.default_rng((7, step))
        newest = step // RESHOOT
        filmed(newest)
        shot = filmed(int(pick.integers(max(0, newest - KEPT + 1), newest + 1)))
        take = (torch.arange(rows), pick.integers(TAKES, size=rows))
        x0 = shot["takes"][take].float()
        source = shot["source"].float()
        source_maps = plucker_maps(shot["path"])
        maps = plucker_maps(shot["scripts"][take])
        g = torch.Generator().manual_seed(10_000_000 + step)
        u = torch.rand(rows, generator=g)
        t = 4 * u / (1 + 3 * u)
        eps = torch.randn(x0.shape, generator=g)
        x = torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1))
        v = dit(x, t, prepare(source, maps, source_maps))
        return (v - (eps - x0)).square().mean()

    def export(average):
        state = {k: v.detach().clone() for k, v in dit.state_dict().items()} | dict(zip(names, average))
        weight, bias = average[-2:]
        weight = (weight[:, :, None] / 64).expand(-1, -1, 64, -1, -1).flatten(1, 2)
        state |= {"control_adapter.conv.weight": weight, "control_adapter.conv.bias": bias}
        write_weights(out / "toy_base.safetensors", state)

    matrices = [p for p in dit.blocks.parameters() if p.ndim == 2]
    optimise(parameters, steps, loss_at, out, "toy_base", export, matrices=matrices)


def photographed(n, seed, codec, draw=render):
    """What the depth network learns from: first frames (n, 3, H/2, W/2) of random rooms as the codec shows
    them, most with noise in their latents, half of them somewhat blurred; log-depth (n, H/2, W/2)."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda: torch.rand(n, 1, 1, 1, 1, generator=g)
    image, depth = draw(rooms(n, seed), torch.eye(4).repeat(n, 1, 1, 1))
    kind = rand()
    image = torch.lerp(image, blur(image, 0.6), rand() * (kind < 0.5))
    latents, grain = codec.encode(image), 0.25 * rand() * (kind > 0.3)
    latents = latents + grain * torch.randn(latents.shape, generator=g)
    return half(codec.decode(latents))[:, :, 0], F.avg_pool2d(depth.log(), 2)[:, 0]


def train_estimator(out, codec, steps=6000, rows=64, start=""):
    """The estimator's depth network; the rest of it has nothing to learn. start: see pretrain_base."""
    torch.manual_seed(0)
    net = Estimator()
    if start:
        net.load_state_dict(read_weights(Path(start) / "toy_estimator.safetensors"))
    draw = torch.compile(render)
    names, parameters = zip(*net.named_parameters())

    def loss_at(step):
        image, log_depth = photographed(rows, 50_000_000 + step, codec, draw)
        return (net.depth(image) - log_depth).abs().mean()

    export = lambda average: write_weights(out / "toy_estimator.safetensors", dict(zip(names, average)))
    optimise(parameters, steps, loss_at, out, "toy_estimator", export, "log_depth_error")


# ---- can RL work on it? ----

@dataclass
class Describe:
    """`python -m toy.pretrain describe`"""
    weights: str = "toy/weights"      # folder of the toy's weights
    conditions: int = 24              # groups of videos to look into
    members: int = 10                 # of each


def describe(config):
    """Print how good codec, estimator and base are on rooms never trained on, and how much the videos of one
    condition differ: what RL has to choose from."""
    dit, codec, estimator = open_weights(config.weights)
    video = footage(8, 30_000_000)[2].flatten(0, 1)
    print(f"codec: {psnr(codec.decode(codec.encode(video)), video):.1f} dB on footage of unseen rooms")
    describe_estimator(codec, estimator)

    # groups along random paths at the test paths' speed
    C = config.conditions
    G = config.members
    room, *source = sources(C, 40_000_000, codec)
    step, turn = walks(C, torch.Generator().manual_seed(40_000_000))
    target = integrate(step * SPEED, turn * TURN)
    condition, _ = condition_and_scene(target, *source)
    rows = torch.arange(C).repeat_interleave(G)
    asked = target[rows]
    truth = render_video(room, target)[rows]
    with torch.no_grad():
        prepared = dit.prepare(condition)

    def scale(path):  # (C G, T, 4, 4) -> how far it goes, of what was asked, (C, G)
        a = path[..., :3, 3]
        b = asked[..., :3, 3]
        return ((a * b).sum((1, 2)) / b.square().sum((1, 2))).view(C, G)

    for name, options in NOISES.items():
        sampled = rollout(dit, prepared, G, sigmas=schedule(6, 5.0), shape=condition.source.shape[1:], seed=0,
                          condition_ids=list(range(C)), **options)
        with torch.no_grad():
            video = codec.decode(sampled.latents.flatten(0, 1))
            estimated = estimator(to_uint8(video))
            judged = trajectories.relative(judge(video, room[rows], asked, codec)[0])
        errors = [trajectories.pose_errors(path, asked)[0].view(C, G) for path in (estimated, judged)]
        agreement = np.mean([spearmanr(*pair).statistic for pair in zip(*errors)])
        print(f"groups of {G} by {name}:\n"
              f"  scale {scale(judged).mean():.2f} by the judge, +- {scale(judged).std(1).mean():.3f} in a group "
              f"(by the estimator +- {scale(estimated).std(1).mean():.3f})\n"
              f"  position error {errors[1].mean():.3f} m, +- {errors[1].std(1).mean():.3f} in a group; there "
              f"estimator and judge agree with rank correlation {agreement:.2f}\n"
              f"  {psnr(video, truth):.1f} dB to the true view")
        if options["window"]:
            cosine = halves(dit, prepared, sampled, estimated, asked)
            print(f"  cosine of the gradients of two halves of the groups: {cosine:.3f}")
    a = judged[:, 1:, :3, 3]
    b = asked[:, 1:, :3, 3]
    shares = (a * b).sum((0, 2)) / b.square().sum((0, 2))
    print("share of the way gone, by frame: " + " ".join(f"{x:.2f}" for x in shares.tolist()))


NOISES = {"the recipe's noise (steps 1 and 2, tau 0.6)": {"window": (1, 2), "tau": 0.6},
          "the noise of step 1 (tau 0.9)": {"window": (1,), "tau": 0.9},
          "start noise of their own": {"window": (), "share_noise": False}}


def psnr(a, b):
    """Of videos in [-1, 1], dB."""
    return 10 * math.log10(4 / float((a - b).square().mean()))


def describe_estimator(codec, estimator, videos=48):
    """Print how far off the estimator is on decoded videos of unseen rooms."""
    room = rooms(videos, 30_000_000)
    step, turn = walks(videos, torch.Generator().manual_seed(30_000_000))
    for speed in (1.0, 2.0):
        c2w = integrate(step * SPEED * speed, turn * TURN * speed)
        motion = c2w[:, :, :3, 3].norm(dim=-1).mean()
        with torch.no_grad():
            seen = codec.decode(codec.encode(render_video(room, c2w)))
        position, rotation = trajectories.pose_errors(estimator(to_uint8(seen)), c2w, "uniform")
        print(f"estimator, decoded videos at speed {speed:g}: median error {position.median():.3f} m, "
              f"{torch.rad2deg(rotation.median()):.2f} degrees (mean motion {motion:.3f} m)")


def halves(dit, prepared, sampled, found, asked):
    """Cosine of the policy gradients (Eq. 7, camera rewards only) of the even and the odd conditions."""
    C, G = sampled.latents.shape[:2]
    parameters = model.trainable(dit)
    trans, rot = trajectories.pose_errors(found, asked)
    scores = {"trans": -trans.float().view(C, G), "rot": -rot.float().view(C, G)}
    A = advantages(scores, {"trans": 1.0, "rot": 1.0})
    gradients = []
    for first in (0, 1):
        dit.zero_grad()
        for k in range(len(sampled.x)):  # the window's steps
            for c in range(first, C, 2):
                loss, _ = policy_loss(dit, sampled, k, A, conditions=slice(c, c + 1))
                loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    dit.zero_grad()
    return float(F.cosine_similarity(*gradients, dim=0))


@dataclass
class Pretrain:
    """`python -m toy.pretrain`"""
    out: str = "out/pretraining"      # folder for the weights and what is needed to resume
    codec_steps: int = 4000           # of the decoder's convolutions
    estimator_steps: int = 6000       # of the depth network
    base_steps: int = 18000           # of the base; more than it has goes on from where it is
    start: str = ""                   # folder of weights to start from, where `out` has none


def pretrain(config):
    """Make the codec, the estimator's depth network and the base policy in config.out; resumes."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    axes = folder / "axes.safetensors"  # the codec footage is kept in, so it stays
    codec = Codec()
    if axes.exists():
        codec.load_state_dict(load_file(axes))
    elif config.start:
        codec.load_state_dict(read_weights(Path(config.start) / "toy_codec.safetensors"))
    else:
        codec = fit_codec(footage(64, 1_000_000)[2].flatten(0, 1))
    write_file(axes, save(codec.state_dict()))
    train_codec(folder, codec, config.codec_steps)
    train_estimator(folder, codec, config.estimator_steps, start=config.start)
    pretrain_base(folder, codec, config.base_steps, start=config.start)
    describe(Describe(weights=str(folder)))


if __name__ == "__main__":
    commands = {"pretrain": (Pretrain, pretrain, None), "describe": (Describe, describe, None)}
    run_command("toy.pretrain", __doc__, commands, sys.argv[1:])
