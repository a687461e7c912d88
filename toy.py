"""The toy: a world small enough for two CPU cores in which the paper's problem is real.

Procedural rooms are ray-cast with known metric geometry. `python toy.py` pretrains a base policy (model.py's
DiT) on footage of slow scripted paths. Half of its operators fall short of the script, walk on where they
should stand, and have their white balance off; so the base has two habits, and takes up either. Nothing that
rewards it looks at colours: the metric reward alone must find out which habit follows the camera. The same
command trains the metric depth network of a small pose estimator (MapAnything's part); both are shipped in
weights/. `judge`, the referee, registers a video to the true scene and is never seen by any training.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from scipy.spatial.transform import Rotation
from tqdm import tqdm

import data
import model
import rewards
import trajectories
import vae

FRAMES, HEIGHT, WIDTH, FPS = 5, 24, 40, 4.0
FOCAL = 0.5 / math.tan(math.radians(40))  # of the width: the view is 80 degrees wide
INTRINSICS = (FOCAL, FOCAL * WIDTH / HEIGHT, 0.5, 0.5)  # fx/W, fy/H, cx/W, cy/H
EYE, PITCH = 1.4, math.radians(12)  # of the first camera: metres above the floor, radians down
CEILING, TILE, WAVES = 3.2, 0.5, 6  # metres, metres of the floor's checkerboard, waves of the texture
HEADS, TEXT, PATCH = 4, 8, 4        # the DiT's heads, width of its (empty) text; the codec's pixels
BASE_SPEED, BASE_TURN = 0.13, math.radians(2.75)  # fastest pretraining path: metres, radians per frame
SPEED, TURN = 0.10, math.radians(2.0)             # of the test paths at speed 1, likewise
TRAIN_ROOMS, TEST_ROOMS = 512, 20_000_001         # clips to train on; seed of the rooms to evaluate in


# ---- the world: rooms with two boxes and a moving ball ----

@dataclass
class Room:
    """n rooms as tensors, batch first. Room axes: x right, y down with the floor at 0, z forward, metres."""
    half: torch.Tensor      # (n, 2) half width and half depth
    pose: torch.Tensor      # (n, 4, 4) first camera -> room
    box: torch.Tensor       # (n, 2, 2, 3) two boxes: low and high corner
    ball: torch.Tensor      # (n, 7) centre at frame 0, velocity per frame, radius
    colour: torch.Tensor    # (n, 9, 3) floor, ceiling, 4 walls, 2 boxes, ball
    wave: torch.Tensor      # (n, WAVES, 4) solid texture: wave vectors (radians per metre) and phase
    tint: torch.Tensor      # (n, WAVES, 3) colour of each wave
    tile: torch.Tensor      # (n, 3) contrast colour of the tiles

    def __getitem__(self, rows):
        return Room(*(getattr(self, f.name)[rows] for f in fields(self)))


def rooms(n, seed):
    """n random rooms (Room), the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape, low=0.0, high=1.0: low + (high - low) * torch.rand(n, *shape, generator=g)
    randn = lambda *shape: torch.randn(n, *shape, generator=g)
    zero, one = torch.zeros(n), torch.ones(n)
    half = rand(2, low=2.8, high=4.2)

    # the first camera, at least 2 m from every wall
    yaw = rand(low=0, high=2 * math.pi)
    c, s = yaw.cos(), yaw.sin()
    heading = torch.stack([c, zero, s, zero, one, zero, -s, zero, c], -1).view(n, 3, 3)
    c, s = math.cos(PITCH), math.sin(PITCH)
    pitch = torch.tensor([[1, 0, 0], [0, c, s], [0, -s, c]])
    x, z = ((rand(2) - 0.5) * (2 * half - 4.0)).unbind(-1)
    eye = torch.stack([x, -EYE * one, z], -1)
    turned = lambda ahead: (heading @ ahead[..., None])[..., 0]  # right, down, forward -> room axes

    # in its view: a box to the left, one to the right, and the ball
    boxes = []
    for side in (-1, 1):
        ahead = torch.stack([side * rand(low=0.35, high=1.5), zero, rand(low=1.9, high=3.2)], -1)
        size = torch.stack([rand(low=lo, high=hi) for lo, hi in ((0.25, 0.5), (0.4, 1.5), (0.25, 0.5))], -1)
        low, high = turned(ahead) + eye - size, turned(ahead) + eye + size
        low[:, 1], high[:, 1] = -size[:, 1], 0  # it stands on the floor
        boxes.append(torch.stack([low, high], 1))
    ahead = torch.stack([rand(low=-1, high=1), -rand(low=0.3, high=1.2), rand(low=1.8, high=2.8)], -1)
    centre = turned(ahead) + eye * torch.tensor([1, 0, 1])
    velocity = 0.05 * randn(3) * torch.tensor([1, 0.3, 1])
    ball = torch.cat([centre, velocity, rand(1, low=0.15, high=0.3)], -1)

    # looks
    direction = F.normalize(randn(WAVES, 3), dim=-1)
    length = torch.exp(rand(WAVES, 1, low=math.log(0.9), high=math.log(3.0)))
    wave = torch.cat([direction * 2 * math.pi / length, rand(WAVES, 1, high=2 * math.pi)], -1)
    tint = 0.13 * (randn(WAVES, 1) + 0.4 * randn(WAVES, 3))
    colour = 0.9 * (rand(9, 1) - 0.5) + 0.5 * (rand(9, 3) - 0.5)
    tile = 0.35 * (1 + 0.3 * randn(3)) * torch.sign(randn(1))
    return Room(half, to_c2w(heading @ pitch, eye), torch.stack(boxes, 1), ball, colour, wave, tint, tile)


def to_c2w(R, t):
    """Rotations R (..., 3, 3) and positions t (..., 3) -> (..., 4, 4)."""
    c2w = torch.eye(4).repeat(*t.shape[:-1], 1, 1)
    c2w[..., :3, :3], c2w[..., :3, 3] = R, t
    return c2w


def rays(intrinsics, height, width):
    """Directions (H, W, 3) through pixel centres with z = 1."""
    fx, fy, cx, cy = intrinsics
    x = ((torch.arange(width) + 0.5) / width - cx) / fx
    y = ((torch.arange(height) + 0.5) / height - cy) / fy
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.ones(height, width)], -1)


def render(room, c2w, height=HEIGHT, width=WIDTH):
    """Rooms (n) seen from c2w (n, T, 4, 4), relative to the first camera -> video (n, 3, T, H, W) in [-1, 1]
    and depth along the optical axis (n, T, H, W), metres. The ball is where it is at frame 0 ... T-1."""
    n, frames = c2w.shape[:2]
    pose = room.pose[:, None] @ c2w.to(room.pose)
    o = pose[..., None, :3, 3]                                       # (n, T, 1, 3) origins of the rays
    d = torch.einsum("ntij,pj->ntpi", pose[..., :3, :3],             # (n, T, P, 3) directions, P = H W
                     rays(INTRINSICS, height, width).flatten(0, 1))
    inv = 1 / torch.where(d.abs() < 1e-6, torch.copysign(torch.tensor(1e-6), d), d)
    across = lambda axis: d.gather(-1, axis[..., None])[..., 0]      # (n, T, P) of d, each along its own axis

    # where a ray leaves the room: surface 0 is the floor, 1 the ceiling, 2 to 5 the walls
    x, z = room.half.unbind(-1)
    low = torch.stack([-x, torch.full_like(x, -CEILING), -z], -1)[:, None, None]
    high = torch.stack([x, torch.zeros_like(x), z], -1)[:, None, None]
    far = torch.where(inv > 0, high - o, low - o) * inv              # at d = 0 only inv has a sign
    depth, axis = far.min(-1)                                        # (n, T, P) both
    positive, facing = across(axis) > 0, across(axis).abs()
    surface = torch.where(axis == 1, torch.where(positive, 0, 1), 2 + axis + positive)

    # or hits a box before: slab test
    for k in range(2):
        a, b = ((corner[:, None, None] - o) * inv for corner in room.box[:, k].unbind(1))
        (near, axis), leave = torch.minimum(a, b).max(-1), torch.maximum(a, b).amin(-1)
        hit = (near < leave) & (near > 0.05) & (near < depth)
        depth, surface = torch.where(hit, near, depth), torch.where(hit, 6 + k, surface)
        facing = torch.where(hit, across(axis).abs(), facing)

    # or the ball: |o + s d - centre| = radius
    centre = room.ball[:, None, :3] + room.ball[:, None, 3:6] * torch.arange(frames)[:, None]
    centre = centre[:, :, None]                                      # (n, T, 1, 3)
    qa, qb = d.square().sum(-1), ((o - centre) * d).sum(-1)
    disc = qb.square() - qa * ((o - centre).square().sum(-1) - room.ball[:, None, None, 6].square())
    near = (-qb - disc.clamp_min(0).sqrt()) / qa
    hit = (disc > 0) & (near > 0.05) & (near < depth)
    depth, surface = torch.where(hit, near, depth), torch.where(hit, 8, surface)

    # colour of that point: the surface's, waves, tiles; each faded where finer than the pixels sampling it
    point = o + depth[..., None] * d
    point = torch.where((surface == 8)[..., None], point - centre, point)  # texture moves with the ball
    pixel = depth / (INTRINSICS[0] * width) / (facing / qa.sqrt()).clamp_min(0.05)  # metres on the surface
    fade = lambda k: torch.exp(-0.18 * (pixel[..., None] * k).square())
    wave, phase = room.wave.split((3, 1), -1)
    phase = torch.einsum("ntpi,nwi->ntpw", point, wave) + phase[:, None, None, :, 0]
    rgb = torch.einsum("ntpw,nwc->ntpc", phase.sin() * fade(wave[:, None, None].norm(dim=-1)), room.tint)
    rgb = rgb + room.colour.gather(1, surface.flatten(1)[..., None].expand(-1, -1, 3)).view_as(rgb)
    tile = torch.sin(point[..., 0] * math.pi / TILE) * torch.sin(point[..., 2] * math.pi / TILE)
    tile = torch.tanh(3 * tile) * fade(torch.tensor([math.pi / TILE]))[..., 0] * (surface == 0)
    rgb = torch.tanh(rgb + tile[..., None] * room.tile[:, None, None])
    shape = (n, frames, height, width)
    return rgb.view(*shape, 3).permute(0, 4, 1, 2, 3).contiguous(), depth.view(shape)


def film(room, c2w):
    """Rooms (n) along paths c2w (n, T, 4, 4) -> videos (n, 3, T, H, W) in [-1, 1], 32 at a time."""
    return torch.cat([render(room[i:i + 32], c2w[i:i + 32])[0] for i in range(0, len(c2w), 32)])


# ---- paths: smooth random walks ----

def exp_so3(vector):
    """Rotation vectors (..., 3) in radians -> matrices (..., 3, 3). Rodrigues."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    K = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    square = vector.square().sum(-1)[..., None, None].clamp(min=1e-12)
    angle = square.sqrt()
    return torch.eye(3).to(K) + angle.sin() / angle * K + (1 - angle.cos()) / square * (K @ K)


def integrate(step, turn):
    """Per-frame steps (n, T-1, 3) in world axes, metres, and turns (n, T-1, 3), rotation vectors in the
    camera's axes, radians -> c2w (n, T, 4, 4) starting at the identity."""
    n, frames = step.shape[0], step.shape[1] + 1
    c2w = torch.eye(4).repeat(n, frames, 1, 1)
    c2w[:, 1:, :3, 3] = step.cumsum(1)
    increments = exp_so3(turn)
    for i in range(1, frames):
        c2w[:, i, :3, :3] = c2w[:, i - 1, :3, :3] @ increments[:, i - 1]
    return c2w


def walks(n, g):
    """Steps and turns (n, T-1, 3) of random walks whose fastest is 1: a path's shape, without its scale."""
    t = torch.linspace(-1, 1, FRAMES - 1)[:, None]

    def walk(*weight):  # of x, y and z
        start, bend = (torch.randn(n, 1, 3, generator=g) for _ in range(2))
        x = start * torch.tensor(weight) + 0.6 * t * bend * torch.tensor(weight)
        return x / x.norm(dim=-1).amax(1)[:, None, None].clamp_min(1e-6)
    return walk(1.0, 0.5, 1.0), walk(0.6, 1.0, 0.2)


# ---- codec: per-patch principal components, with the VAE's interface and its chunking in time ----

def to_patches(x):
    """(B, 3, t, H, W) -> (B, H/4, W/4, 48 t)"""
    return F.pixel_unshuffle(x.flatten(1, 2), PATCH).permute(0, 2, 3, 1).contiguous()


def from_patches(x, t):
    """(B, H/4, W/4, 48 t) -> (B, 3, t, H, W)"""
    return F.pixel_shuffle(x.permute(0, 3, 1, 2), PATCH).unflatten(1, (3, t)).contiguous()


def by_fours(video):
    """(B, 3, 1 + 4k, H, W) -> (B k, 3, 4, H, W), without the first frame"""
    return video[:, :, 1:].unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)


class Codec:
    """Linear: the first frame alone, then four by four, 4x4 pixels -> 16 channels. As vae.py's VAE."""
    def __init__(self, state):
        self.state = state

    def encode(self, video):
        """(B, 3, T, H, W) in [-1, 1] -> latents (B, 16, F, h, w)"""
        s, b = self.state, video.shape[0]
        x = (to_patches(video[:, :, :1]) - s["first.mean"]) @ s["first.down"]
        x = x[:, None]  # (B, F, h, w, 16)
        if video.shape[2] > 1:
            rest = (to_patches(by_fours(video)) - s["rest.mean"]) @ s["rest.down"]
            x = torch.cat([x, rest.unflatten(0, (b, -1))], 1)
        return x.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents):
        """(B, 16, F, h, w) -> video (B, 3, T, H, W) in [-1, 1]"""
        s, b = self.state, latents.shape[0]
        x = latents.permute(0, 2, 3, 4, 1)  # (B, F, h, w, 16)
        video = from_patches(x[:, 0] @ s["first.up"] + s["first.mean"], 1)
        if x.shape[1] > 1:
            rest = from_patches(x[:, 1:].flatten(0, 1) @ s["rest.up"] + s["rest.mean"], 4)
            video = torch.cat([video, rest.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)], 2)
        return video.clamp(-1, 1)


# ---- the reward's estimator: metric poses from pixels alone, the miniature of MapAnything ----

def mlp(*sizes):
    """Linear layers with GELUs between."""
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (torch.nn.GELU(), torch.nn.Linear(a, b))]
    return torch.nn.Sequential(*layers[1:])


def pool(x):
    """(B, h, w, c) -> (B, h/2, w/2, 4 c), 2 x 2 places as one."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)


def unpool(x):
    """(B, h, w, 4 c) -> (B, 2 h, 2 w, c), pool undone."""
    return x.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def blur(x, sigma):
    """Gaussian blur of (..., H, W) with reflected borders; sigma in pixels."""
    r = int(3 * sigma)
    k = torch.exp(-0.5 * (torch.arange(-r, r + 1).to(x) / sigma).square())
    k = k / k.sum()
    padded = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (r, r, r, r), mode="reflect")
    return F.conv2d(F.conv2d(padded, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1)).view(x.shape)


class Estimator(torch.nn.Module):
    """Video (n, 3, T, H, W) in [-1, 1] -> c2w (n, T, 4, 4), metres, relative to frame 0, from pixels alone.

    A network reads metric depth off frame 0 (tile size and eye level tell it); each next frame's camera is
    the one whose picture of these points differs least from frame 0, found by Gauss-Newton from where the
    frame before it was.
    """
    FIELD = 8         # pixels that a place (of 2 x 2) sees of its surroundings
    SIGMA = 1.5, 0.8  # pixels, blur
    STEPS = 4         # Gauss-Newton steps per frame, blurred and sharp each

    def __init__(self):
        super().__init__()
        self.fine = mlp(3 * self.FIELD ** 2 + 2, 96, 64)  # places of 2 x 2 pixels, of 4 x 4, of 8 x 8
        self.mid = mlp(256, 160)
        self.coarse = mlp(640, 192)
        self.room = mlp(192 * (HEIGHT // 8) * (WIDTH // 8), 384, 192)  # the whole picture
        self.uncoarse = mlp(384, 384, 4 * 96)  # and back to every pixel, with what was seen on the way
        self.unmid = mlp(256, 192, 4 * 48)
        self.out = mlp(112, 96, 4)
        self.register_buffer("ray", rays(INTRINSICS, HEIGHT, WIDTH), persistent=False)

    def depth(self, image):
        """Frame (n, 3, H, W) -> log-depth (n, H, W), metres along the optical axis."""
        seen = F.unfold(image, self.FIELD, padding=self.FIELD // 2 - 1, stride=2).transpose(1, 2)
        where = self.ray[::2, ::2, :2].flatten(0, 1).expand(len(image), -1, -1)  # (n, H/2 W/2, 2)
        fine = F.gelu(self.fine(torch.cat([seen, where], -1))).unflatten(1, (HEIGHT // 2, WIDTH // 2))
        mid = F.gelu(self.mid(pool(fine)))
        coarse = F.gelu(self.coarse(pool(mid)))
        room = self.room(coarse.flatten(1))[:, None, None].expand_as(coarse)
        mid = torch.cat([mid, F.gelu(unpool(self.uncoarse(torch.cat([coarse, room], -1))))], -1)
        fine = torch.cat([fine, F.gelu(unpool(self.unmid(mid)))], -1)
        return 1.2 + unpool(self.out(fine))[..., 0]

    def forward(self, video):
        n, _, frames, height, width = video.shape
        log_depth = self.depth(video[:, :, 0])
        point = log_depth.exp()[..., None] * self.ray                              # (n, H, W, 3)
        jump = torch.stack(torch.gradient(log_depth, dim=(1, 2))).square().sum(0)  # where surfaces meet,
        trust = (1 / (1 + jump / 0.05 ** 2)).flatten(1)                            # slopes mislead (n, P)

        # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
        near, zero = 1 / point[..., 2], torch.zeros_like(point[..., 2])
        u, v = self.ray[..., 0].expand_as(near), self.ray[..., 1].expand_as(near)
        flow = torch.stack([-near, zero, u * near, u * v, -1 - u * u, v,
                            zero, -near, v * near, 1 + v * v, -u * v, -u], -1)
        flow = flow.unflatten(-1, (2, 6)).flatten(1, 2)                            # (n, P, 2, 6), P = H W

        # frame 0 at each sharpness: its slopes, and J^T J of every pixel, are the same for all frames
        levels = []
        for sigma in self.SIGMA:
            seen = blur(video, sigma)
            gy, gx = torch.gradient(seen[:, :, 0], dim=(2, 3))
            slope = torch.stack([gx * INTRINSICS[0] * width, gy * INTRINSICS[1] * height], -1).flatten(2, 3)
            JtJ = torch.einsum("ncpa,ncpb->npab", slope, slope)                    # slope (n, 3, P, 2)
            JtJ = (flow.transpose(2, 3) @ JtJ @ flow).flatten(2)                   # (n, P, 36)
            levels.append((seen, seen[:, :, 0].flatten(2), slope, JtJ))

        point, to_grid = point.flatten(1, 2), 2 * torch.tensor(INTRINSICS[:2])
        pose = before = torch.eye(4).repeat(n, 1, 1)
        path = [pose]
        for i in range(1, frames):
            pose, before = pose @ torch.linalg.inv(before) @ pose, pose            # as fast as so far
            for seen, first, slope, JtJ in levels:
                for _ in range(self.STEPS):
                    y = (point - pose[:, None, :3, 3]) @ pose[:, :3, :3]           # in camera i
                    at = y[..., :2] / y[..., 2:].clamp(min=0.1) * to_grid          # (n, P, 2) in [-1, 1]
                    miss = F.grid_sample(seen[:, :, i], at[:, None], align_corners=False)[:, :, 0] - first
                    inside = at.abs().amax(-1) < 1
                    weight = trust * inside * 0.2 / miss.square().sum(1).sqrt().clamp(min=0.2)  # Huber
                    g = (miss[..., None] * slope).sum(1) * weight[..., None]
                    g = (g.flatten(1)[:, None] @ flow.flatten(1, 2))[:, 0]         # (n, 6)
                    H = (weight[:, None] @ JtJ).view(n, 6, 6)
                    damping = 1e-3 * torch.eye(6) * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
                    step = torch.linalg.solve(H + damping + 1e-9 * torch.eye(6), g).clamp(-0.2, 0.2)
                    pose = torch.linalg.solve(to_c2w(exp_so3(step[:, 3:]), step[:, :3]), pose)
            path.append(pose)
        return torch.stack(path, 1)


def read_tensors(path, wanted):
    """A safetensors file's tensors; ValueError where they are not those `wanted`: name -> shape."""
    state = vae.read_weights(path)
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
    return dit, codec, estimator


# ---- the toy as train.py and evaluate.py see it ----

def sources(n, seed, codec):
    """n rooms and their source videos, filmed from an almost steady hand: Room, c2w (n, T, 4, 4), metres,
    latents (n, 16, F, h, w), and what the codec shows of them, uint8 (n, T, H, W, 3)."""
    room = rooms(n, seed)
    step, turn = walks(n, torch.Generator().manual_seed(seed))
    c2w = integrate(0.1 * BASE_SPEED * step, 0.1 * BASE_TURN * turn)
    latents = codec.encode(film(room, c2w))
    return room, c2w, latents, data.to_uint8(codec.decode(latents))


def plucker_maps(c2w, scale=1):
    """Packed Pluecker maps (n, 24, F, H, W) of paths (n, T, 4, 4), at `scale` times the latents' size."""
    intrinsics = torch.tensor([INTRINSICS]).expand(len(c2w), -1)
    return trajectories.camera_maps(c2w, intrinsics, scale * HEIGHT // PATCH, scale * WIDTH // PATCH)


def film_anew(target, source, latents, videos):
    """Target paths c2w (n, T, 4, 4) and `sources` of as many rooms -> what the policy gets, model.Condition,
    and what rewards do, rewards.Scene."""
    n = len(target)
    condition = model.Condition(torch.zeros(n, 1, TEXT), None, latents, plucker_maps(target, 8),
                                plucker_maps(source, 8))
    intrinsics = torch.tensor([INTRINSICS]).expand(n, -1)
    return condition, rewards.Scene(target, intrinsics, ["a room"] * n, FPS, videos, source)


def open_world(config, device, World):
    """train.World of the toy: TRAIN_ROOMS rooms that no pretraining has seen, filmed once; target paths are
    random walks of no scale, rescaled to metric speeds (Eq. 8-14)."""
    dit, codec, estimator = open_weights(config.weights)
    _, source, latents, videos = sources(TRAIN_ROOMS, 10_000_000, codec)
    omega = tuple(np.radians(config.omega))

    def draw(numbers, rngs):
        target = []
        for rng in rngs:
            g = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
            step, turn = walks(1, g)
            path = integrate(0.05 * step, 0.05 * turn)[0].double().numpy()
            target.append(trajectories.rescale(path, *trajectories.draw_speeds(rng, config.v, omega)))
        target = torch.from_numpy(np.stack(target)).float()
        return film_anew(target, source[numbers], latents[numbers], videos[numbers])

    rewarded, weights = rewards.load(config.rewards, config.weights, estimator=estimator,
                                     schedule=config.frame_weights)
    return World(dit, codec, tuple(latents.shape[1:]), TRAIN_ROOMS, draw, None, rewarded, weights)


def held_out(count, codec, speed=1.0):
    """`count` test rooms along the ten evaluation paths each, at the toy's speeds: Room, model.Condition and
    rewards.Scene of 10 count rows, room by room; the true target videos uint8 (10 count, T, H, W, 3)."""
    paths = [trajectories.recammaster(number, FRAMES) for number in range(1, 11)]
    paths = [trajectories.rescale(path, SPEED * speed, TURN * speed) for path in paths]
    target = torch.from_numpy(np.stack(paths)).float().repeat(count, 1, 1, 1)
    rows = torch.arange(count).repeat_interleave(10)
    room, *source = (x[rows] for x in sources(count, TEST_ROOMS, codec))
    condition, scene = film_anew(target, *source)
    return room, condition, scene, data.to_uint8(film(room, target))


# ---- the judge: registers every frame to the true scene; no training ever sees it ----

def judge(video, room, guess, codec=None):
    """Where was each frame taken? video (n, 3, T, H, W) in [-1, 1] of rooms (n), guess (n, T, 4, 4) a path to
    search along -> c2w (n, T, 4, 4), metres, relative to the source's first camera, and the root mean square
    residual (n, T).

    The true room is rendered (through the codec, if given, as a perfect video would be), compared with the
    video, and the pose improved: from the best of standing still to 1.5 times the guess, by
    Levenberg-Marquardt on robust photometric residuals, first blurred, then sharp.
    """
    n, frames, (height, width) = *guess.shape[:2], video.shape[-2:]
    ray = rays(INTRINSICS, height, width)
    by_frame = lambda x: x.transpose(1, 2).flatten(3, 4)  # (n, 3, T, H, W, ...) -> (n, T, 3, P, ...), P = H W

    def look(pose, target, sigma):
        image, depth = render(room, pose, height=height, width=width)
        seen = image if codec is None else codec.decode(codec.encode(image))
        residual = blur(seen, sigma) - target  # (n, 3, T, H, W)
        residual = residual - residual.mean((2, 3, 4), keepdim=True)  # whatever the video's white balance
        weight = 0.1 / residual.abs().clamp_min(0.1)  # Huber: textures at occlusions do not pull
        cost = (weight * residual.square()).mean((1, 3, 4))  # (n, T)
        return blur(image, sigma), depth, residual, weight, cost

    # coarse search along the guess
    target = blur(video, 1.5)
    rotvec = Rotation.from_matrix(guess[..., :3, :3].flatten(0, 1).double()).as_rotvec()
    rotvec = torch.from_numpy(rotvec).view(n, frames, 3)
    poses = torch.stack([to_c2w(exp_so3(k * rotvec), k * guess[..., :3, 3])
                         for k in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)])  # (7, n, T, 4, 4)
    costs = torch.stack([look(pose, target, 1.5)[-1] for pose in poses])
    pose = poses.take_along_dim(costs.argmin(0)[None, ..., None, None], 0)[0]

    for sigma in (1.5, 1.0, 0.7):  # pixels
        target = blur(video, sigma)
        image, depth, residual, weight, cost = look(pose, target, sigma)
        damping = torch.full((n, 1, 1, 1), 1e-3)
        for _ in range(12):
            gy, gx = torch.gradient(image, dim=(-2, -1))
            slope = torch.stack([gx * (INTRINSICS[0] * width), gy * (INTRINSICS[1] * height)], -1)
            slope, w, r = by_frame(slope), by_frame(weight)[..., None], by_frame(residual)[..., None]

            # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
            point = (depth[..., None] * ray).flatten(2, 3)  # (n, T, P, 3) in camera axes
            x, y, z = point.unbind(-1)
            zero = torch.zeros_like(z)
            flow = torch.stack([1 / z, zero, -x / z ** 2, zero, 1 / z, -y / z ** 2], -1).unflatten(-1, (2, 3))
            flow = torch.cat([flow, torch.linalg.cross(point[..., None, :].expand_as(flow), flow)], -1)

            # normal equations a step = -b: J = slope flow, (n, T, 3, P, 2) and (n, T, P, 2, 6)
            a = torch.einsum("ntcpi,ntcpj->ntpij", slope * w, slope)
            a = torch.einsum("ntpai,ntpaj->ntij", flow, torch.einsum("ntpab,ntpbj->ntpaj", a, flow))
            b = torch.einsum("ntpai,ntpa->nti", flow, (slope * w * r).sum(2))
            a = a + damping * torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) + 1e-6 * torch.eye(6)
            step = -torch.linalg.solve(a, b)
            trial = pose @ to_c2w(exp_so3(step[..., 3:]), step[..., :3])

            seen = look(trial, target, sigma)
            better = seen[-1].mean(1) < cost.mean(1)  # (n,) of whole videos: the codec mixes frames
            pick = lambda new, old: torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
            pose, image, depth, residual, weight, cost = map(
                pick, (trial, *seen), (pose, image, depth, residual, weight, cost))
            damping = pick(damping * 0.3, damping * 8).clamp(1e-6, 1e3)
    return pose, residual.square().mean((1, 3, 4)).sqrt()


# ---- pretraining: `python toy.py` makes the shipped weights ----

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
    data.write_file(path, save({k: v.half().contiguous() for k, v in state.items()}))


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
    def filmed(number):  # rooms for TAKES steps, a take for each
        source, source_path, takes, scripts = footage(rows, number, draw)
        each = lambda f, x: f(x.flatten(0, 1)).unflatten(0, (rows, TAKES))
        return (codec.encode(source), plucker_maps(source_path), each(codec.encode, takes),
                each(plucker_maps, scripts))

    def loss_at(step):
        source, source_maps, takes, maps = filmed(step // TAKES)
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


def describe(folder="weights", n=240):
    """Print how far off the estimator is on clean and decoded videos of unseen rooms at test speeds."""
    _, codec, estimator = open_weights(folder)
    room = rooms(n, 30_000_000)
    step, turn = walks(n, torch.Generator().manual_seed(30_000_000))
    for speed in (1.0, 1.5, 2.0):
        c2w = integrate(step * SPEED * speed, turn * TURN * speed)
        motion = c2w[:, :, :3, 3].norm(dim=-1).mean()
        video = film(room, c2w)
        for name, seen in (("clean", video), ("decoded", codec.decode(codec.encode(video)))):
            position, rotation = trajectories.pose_errors(estimator(data.to_uint8(seen)), c2w, "uniform")
            print(f"speed {speed}, {name} videos: median error {position.median():.3f} m, "
                  f"{torch.rad2deg(rotation.median()):.2f} degrees (mean motion {motion:.3f} m)")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(f"{__doc__}\nusage: python toy.py [folder to pretrain in] | describe [folder of weights]")
    if sys.argv[1:2] == ["describe"]:
        sys.exit(describe(*sys.argv[2:3]))
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/pretraining")
    folder.mkdir(parents=True, exist_ok=True)
    codec = fit_codec(footage(128, 1_000_000)[2].flatten(0, 1))
    data.write_file(folder / "toy_codec.safetensors", save(codec.state))
    train_estimator(folder, codec)
    pretrain_base(folder, codec)
    describe(folder)
