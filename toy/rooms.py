"""The toy's rooms: procedural, metric, ray-cast; random camera paths through them; and the codec of their videos."""
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

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
    """n random rooms (Room). Room i depends on (seed, i) alone: among 2 rooms or 8, it is the same."""
    rngs = [np.random.default_rng((seed, i)) for i in range(n)]
    each = lambda draw: torch.from_numpy(np.stack([draw(rng) for rng in rngs]))
    rand = lambda *shape, low=0.0, high=1.0: (
        low + (high - low) * each(lambda rng: rng.random(shape, np.float32)))
    randn = lambda *shape: each(lambda rng: rng.standard_normal(shape, np.float32))
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


def render_video(room, c2w):
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
