"""The toy as training and evaluation see it: its weights, conditions and scenes."""
from pathlib import Path

import numpy as np
import torch

import model
import rewards
import trajectories
from data.video import to_uint8
from data.world import World
from pretrained.weights import read_weights
from toy.poses import Estimator
from toy.rooms import (
    BASE_SPEED, BASE_TURN, Codec, FPS, FRAMES, HEADS, HEIGHT, INTRINSICS, PATCH, SPEED,
    TEST_ROOMS, TEXT, TRAIN_ROOMS, TURN, WIDTH, integrate, render_video, rooms, walks)

SIZE = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}  # of every video, as train.py's settings call them


def read_tensors(path, wanted):
    """A safetensors file's tensors; ValueError where they are not those `wanted`: name -> shape."""
    state = read_weights(path)
    for name in sorted({*state, *wanted}):
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != wanted.get(name):
            raise ValueError(f"{path}: {name}: expected {wanted.get(name, 'nothing')}, found {found}")
    return state


def open_weights(folder):
    """The shipped base policy, codec and estimator. FileNotFoundError, ValueError for files not theirs."""
    folder, net = Path(folder), Estimator().eval()
    dit = model.load_dit(folder / "toy_base.safetensors", num_heads=HEADS)
    wanted = {}
    for name, size in (("first", 3 * PATCH ** 2), ("rest", 4 * 3 * PATCH ** 2)):
        wanted |= {f"{name}.mean": (size,), f"{name}.down": (size, 16), f"{name}.up": (16, size)}
    codec = Codec(read_tensors(folder / "toy_codec.safetensors", wanted))
    wanted = {name: tuple(p.shape) for name, p in net.named_parameters()}
    net.load_state_dict(read_tensors(folder / "toy_estimator.safetensors", wanted), strict=False)

    @torch.no_grad()
    def estimator(videos, scene=None):
        """uint8 (n, T, H, W, 3) -> c2w (n, T, 4, 4), metres."""
        return net(videos.movedim(-1, 1).float() / 127.5 - 1)

    # as pretrained.reward_models.mapanything has it: the toy has one lens, which its estimator knows
    estimator.cameras = lambda videos: (estimator(videos), torch.tensor([INTRINSICS]).repeat(len(videos), 1))
    return dit, codec, estimator


def sources(n, seed, codec):
    """n rooms and their source videos, filmed from an almost steady hand: Room, c2w (n, T, 4, 4), metres,
    latents (n, 16, F, h, w), and what the codec shows of them, uint8 (n, T, H, W, 3)."""
    room = rooms(n, seed)
    # like the room, its source path depends on (seed, i) alone
    seeds = [int(np.random.default_rng((seed, i, 1)).integers(2 ** 62)) for i in range(n)]
    paths = [walks(1, torch.Generator().manual_seed(x)) for x in seeds]
    step = torch.cat([step for step, _ in paths])
    turn = torch.cat([turn for _, turn in paths])
    c2w = integrate(0.1 * BASE_SPEED * step, 0.1 * BASE_TURN * turn)
    latents = codec.encode(render_video(room, c2w))
    return room, c2w, latents, to_uint8(codec.decode(latents))


def plucker_maps(c2w, scale=1):
    """Packed Pluecker maps (n, 24, F, H, W) of paths (n, T, 4, 4), at `scale` times the latents' size."""
    intrinsics = torch.tensor([INTRINSICS]).expand(len(c2w), -1)
    return trajectories.camera_maps(c2w, intrinsics, scale * HEIGHT // PATCH, scale * WIDTH // PATCH)


def condition_and_scene(target, source, latents, videos):
    """Target paths c2w (n, T, 4, 4) and `sources` of as many rooms -> what the policy gets, model.Condition,
    and what rewards do, rewards.Scene."""
    n = len(target)
    condition = model.Condition(torch.zeros(n, 1, TEXT), None, latents, plucker_maps(target, 8),
                                plucker_maps(source, 8))
    intrinsics = torch.tensor([INTRINSICS]).expand(n, -1)
    return condition, rewards.Scene(target, intrinsics, ["a room"] * n, FPS, videos, source)


def open_toy(config, device):
    """data.world.World of the toy: TRAIN_ROOMS rooms that no pretraining has seen, filmed once; target paths are
    random walks of no scale, rescaled to metric speeds (Eq. 8-14)."""
    dit, codec, estimator = open_weights(config.weights)
    room, source, latents, videos = sources(TRAIN_ROOMS, 10_000_000, codec)
    omega = tuple(np.radians(config.omega))

    def draw(numbers, rngs):
        target = []
        for rng in rngs:
            g = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
            step, turn = walks(1, g)
            path = integrate(0.05 * step, 0.05 * turn)[0].double().numpy()
            target.append(trajectories.rescale(path, *trajectories.draw_speeds(rng, config.v, omega)))
        target = torch.from_numpy(np.stack(target)).float()
        return condition_and_scene(target, source[numbers], latents[numbers], videos[numbers])

    def true_view(numbers, c2w):
        return to_uint8(render_video(room[numbers], c2w))

    rewarded, weights = rewards.load(config.rewards, config.weights, estimator=estimator,
                                     schedule=config.frame_weights)
    files = [Path(config.weights) / f"toy_{name}.safetensors" for name in ("base", "codec", "estimator")]
    return World(dit, codec, tuple(latents.shape[1:]), TRAIN_ROOMS, draw, None, rewarded, weights,
                 {"weights": files}, true_view)


def held_out(count, codec, speed=1.0):
    """`count` test rooms along the ten evaluation paths each, at the toy's speeds: Room, model.Condition and
    rewards.Scene of 10 count rows, room by room; the true target videos uint8 (10 count, T, H, W, 3)."""
    paths = [trajectories.recammaster(number, FRAMES) for number in range(1, 11)]
    paths = [trajectories.rescale(path, SPEED * speed, TURN * speed) for path in paths]
    target = torch.from_numpy(np.stack(paths)).float().repeat(count, 1, 1, 1)
    rows = torch.arange(count).repeat_interleave(10)
    room, *source = (x[rows] for x in sources(count, TEST_ROOMS, codec))
    condition, scene = condition_and_scene(target, *source)
    return room, condition, scene, to_uint8(render_video(room, target))
