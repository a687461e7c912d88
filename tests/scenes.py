"""Small videos, camera paths and scenes that several tests share; and two ranks."""
import json
import multiprocessing
import os
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import rewards
import torch
import trajectories
from scipy.spatial.transform import Rotation


def clip(frames=20, height=48, width=64):
    """A grey ramp in time with a white square in a corner: every frame is recognisable."""
    grey = 10 * np.arange(1, frames + 1, dtype=np.uint8)
    video = np.tile(grey[:, None, None, None], (1, height, width, 3))
    video[:, :height // 4, :width // 4] = 255
    return video


def pose(rng):
    """A random pose (4, 4), far from the origin."""
    out = np.eye(4)
    out[:3, :3] = Rotation.random(random_state=rng).as_matrix()
    out[:3, 3] = rng.normal(size=3) * 10
    return out


def walk(rng, frames, step=0.3, turn=0.1):
    """A random path (frames, 4, 4), first pose the identity, of bounded steps and turns."""
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    for i in range(1, frames):
        R = Rotation.from_rotvec(turn * rng.uniform(-1, 1, 3)).as_matrix()
        c2w[i, :3, :3] = c2w[i - 1, :3, :3] @ R
        c2w[i, :3, 3] = c2w[i - 1, :3, 3] + step * rng.uniform(-1, 1, 3)
    return c2w


def path_of(frames, i=2):
    """A whole evaluation path, 7 + i of the ten, in `frames` frames."""
    return trajectories.resample(trajectories.recammaster(i + 7), frames)


def yawed(angles):
    """A path (T, 4, 4) that turns about y by the given total angles."""
    c2w = np.tile(np.eye(4), (len(angles), 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(np.outer(angles, [0, 1, 0])).as_matrix()
    return c2w


def camera_path(frames=9, step=0.1, yaw=0.02):
    """Forward by `step` metres and turned by `yaw` a frame: c2w (1, frames, 4, 4) float64."""
    c2w = yawed(yaw * np.arange(frames))
    c2w[:, 2, 3] = step * np.arange(frames)
    return torch.from_numpy(c2w)[None]


def scene(n, frames=5, height=16, width=24, source=True, seed=0):
    """n videos of noise, uint8 (n, T, H, W, 3), and the Scene of which they are the source."""
    generator = torch.Generator().manual_seed(seed)
    c2w = camera_path(frames, yaw=0).float().repeat(n, 1, 1, 1)
    shape = (n, frames, height, width, 3)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    prompts = [f"clip {i}" for i in range(n)]
    intrinsics = torch.full((n, 4), 0.5)
    return video, rewards.Scene(c2w, intrinsics, prompts, 16.0, video if source else None)


def put(file, content):
    """Write text, bytes, an array (.npy), arrays by name (.npz), or JSON; None: a folder."""
    (file if content is None else file.parent).mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        file.write_text(content)
    elif file.suffix == ".npy":
        np.save(file, content)
    elif file.suffix == ".npz":
        np.savez(file, **content)
    elif content is not None:
        file.write_text(json.dumps(content))
    return file


# Processes that have imported what is slow, and nothing else: neither threads nor a video of this one's.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch.distributed", "transformers.models.umt5.modeling_umt5", "av", "scipy.stats",
                              "transformers.models.clip.modeling_clip", "tqdm", "torch._dynamo",
                              "transformers.models.qwen2_vl.modeling_qwen2_vl"])


def one_rank(act, said, folder, environment, paths):
    """What a process of as_ranks does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = paths
    torch.set_num_threads(1)
    with open(said, "a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            act()
        except BaseException:
            traceback.print_exc()
            raise


def as_ranks(act, said, ranks=2):
    """act() as so many ranks that torchrun starts, each a process of its own; it must be picklable.

    said: a file for what they print; returned is its text.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in map(str, range(ranks)):
        environment = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        children.append(CLEAN.Process(target=one_rank, args=(act, said, os.getcwd(), environment, sys.path)))
        children[-1].start()
    for child in children:
        child.join(600)
        child.kill()  # should the other rank be gone
    assert [child.exitcode for child in children] == [0] * ranks, said.read_text()
    return said.read_text()
