"""The toy: a world small enough for two CPU cores in which the paper's problem is real.

Procedural rooms are ray-cast with known metric geometry. `python toy.py` pretrains a base policy (model.py's DiT) on
footage of slow scripted paths. Half of its operators fall short of the script, walk on where they should stand, and have
their white balance off; so the base has two habits, and takes up either. Nothing that rewards it looks at colours: the
metric reward alone must find out which habit follows the camera. The same command trains the metric depth network of a
small pose estimator (MapAnything's part); both are shipped in weights/.
`judge` is the independent referee: it registers a video to the true scene and is never seen by any training.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
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

FRAMES, HEIGHT, WIDTH = 5, 24, 40
INTRINSICS = (0.5 / math.tan(math.radians(40)), 0.5 / math.tan(math.radians(40)) * WIDTH / HEIGHT, 0.5, 0.5)
EYE, PITCH, CEILING, TILE = 1.4, math.radians(12), 3.2, 0.5  # metres, radians, metres, metres
WAVES = 6
HEADS, TEXT = 4, 8  # of the toy's DiT: attention heads, width of its (empty) text


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
    tile: torch.Tensor      # (n, 3) contrast colour of the half-metre tiles

    def __getitem__(self, rows):
        return Room(*(getattr(self, f.name)[rows] for f in fields(self)))


def rooms(n, seed):
    """n random rooms (Room), the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape, low=0.0, high=1.0: low + (high - low) * torch.rand(n, *shape, generator=g)
    randn = lambda *shape: torch.randn(n, *shape, generator=g)
    half = rand(2, low=2.8, high=4.2)
    yaw = rand(low=0, high=2 * math.pi)
    cos, sin, zero, one = yaw.cos(), yaw.sin(), torch.zeros(n), torch.ones(n)
    heading = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], -1).view(n, 3, 3)
    c, s = math.cos(PITCH), math.sin(PITCH)
    pitch = torch.tensor([[1, 0, 0], [0, c, s], [0, -s, c]])  # looks down
    pose = torch.eye(4).repeat(n, 1, 1)
    pose[:, :3, :3] = heading @ pitch
    where = (rand(2) - 0.5) * (2 * half - 4.0)
    pose[:, :3, 3] = torch.stack([where[:, 0], -EYE * one, where[:, 1]], -1)
    boxes = []
    for side in (-1, 1):  # one to the left, one to the right of the line of sight
        ahead = torch.stack([side * rand(low=0.35, high=1.5), zero, rand(low=1.9, high=3.2)], -1)
        centre = (heading @ ahead[..., None])[..., 0] + pose[:, :3, 3]
        size = torch.stack([rand(low=0.25, high=0.5), rand(low=0.4, high=1.5), rand(low=0.25, high=0.5)], -1)
        low, high = centre - size, centre + size
        low[:, 1], high[:, 1] = -size[:, 1], 0
        boxes.append(torch.stack([low, high], 1))
    ahead = torch.stack([rand(low=-1, high=1), -rand(low=0.3, high=1.2), rand(low=1.8, high=2.8)], -1)
    centre = (heading @ ahead[..., None])[..., 0]
    centre[:, [0, 2]] += pose[:, [0, 2], 3]
    velocity = 0.05 * randn(3) * torch.tensor([1, 0.3, 1])
    ball = torch.cat([centre, velocity, rand(1, low=0.15, high=0.3)], -1)
    direction = F.normalize(randn(WAVES, 3), dim=-1)
    length = torch.exp(rand(WAVES, 1, low=math.log(0.9), high=math.log(3.0)))
    wave = torch.cat([direction * 2 * math.pi / length, rand(WAVES, 1, high=2 * math.pi)], -1)
    tint = 0.13 * (randn(WAVES, 1) + 0.4 * randn(WAVES, 3))
    colour = 0.9 * (rand(9, 1) - 0.5) + 0.5 * (rand(9, 3) - 0.5)
    tile = 0.35 * (1 + 0.3 * randn(3)) * torch.sign(randn(1))
    return Room(half, pose, torch.stack(boxes, 1), ball, colour, wave, tint, tile)


def rays(intrinsics, height, width):
    """Directions (H, W, 3) through pixel centres with z = 1."""
    fx, fy, cx, cy = intrinsics
    u = ((torch.arange(width) + 0.5) / width - cx) / fx
    v = ((torch.arange(height) + 0.5) / height - cy) / fy
    return torch.stack([u.expand(height, width), v[:, None].expand(height, width), torch.ones(height, width)], -1)


def render(room, c2w, height=HEIGHT, width=WIDTH):
    """Rooms (n) seen from c2w (n, T, 4, 4), relative to the first camera -> video (n, 3, T, H, W) in [-1, 1] and depth
    along the optical axis (n, T, H, W), metres. The ball is where it is at frame 0 ... T-1."""
    n, frames = c2w.shape[:2]
    pose = room.pose[:, None] @ c2w.to(room.pose)
    d = torch.einsum("ntij,pj->ntpi", pose[..., :3, :3], rays(INTRINSICS, height, width).flatten(0, 1))
    o = pose[..., None, :3, 3]  # (n, T, 1, 3)
    inv = 1 / torch.where(d.abs() < 1e-6, torch.copysign(torch.tensor(1e-6), d), d)

    x, z = room.half[:, 0], room.half[:, 1]
    low = torch.stack([-x, torch.full_like(x, -CEILING), -z], -1)[:, None, None]
    high = torch.stack([x, torch.zeros_like(x), z], -1)[:, None, None]
    far = torch.where(inv > 0, high - o, low - o) * inv  # at d = 0 only inv has a sign
    depth, axis = far.min(-1)                                      # leaving the room
    positive = d.gather(-1, axis[..., None])[..., 0] > 0
    surface = torch.where(axis == 1, torch.where(positive, 0, 1), 2 + axis + positive)  # floor 0, ceiling 1, walls 2-5
    facing = d.gather(-1, axis[..., None])[..., 0].abs()
    for k in range(2):                                             # boxes: slab test
        a, b = (room.box[:, k, 0, None, None] - o) * inv, (room.box[:, k, 1, None, None] - o) * inv
        (near, side), leave = torch.minimum(a, b).max(-1), torch.maximum(a, b).amin(-1)
        hit = (near < leave) & (near > 0.05) & (near < depth)
        depth, surface = torch.where(hit, near, depth), torch.where(hit, 6 + k, surface)
        facing = torch.where(hit, d.gather(-1, side[..., None])[..., 0].abs(), facing)
    centre = room.ball[:, None, :3] + room.ball[:, None, 3:6] * torch.arange(frames)[:, None]
    oc = o - centre[:, :, None]                                    # (n, T, 1, 3)
    qa, qb = d.square().sum(-1), (oc * d).sum(-1)
    disc = qb.square() - qa * (oc.square().sum(-1) - room.ball[:, None, None, 6].square())
    near = (-qb - disc.clamp_min(0).sqrt()) / qa
    hit = (disc > 0) & (near > 0.05) & (near < depth)
    depth, surface = torch.where(hit, near, depth), torch.where(hit, 8, surface)

    p = o + depth[..., None] * d                                   # (n, T, P, 3) where the ray ends
    p = torch.where((surface == 8)[..., None], p - centre[:, :, None], p)
    # texture, each wave faded where it is finer than the pixels that sample it
    pixel = depth / (INTRINSICS[0] * width) / (facing / qa.sqrt()).clamp_min(0.05)
    fade = lambda k: torch.exp(-0.18 * (pixel[..., None] * k).square())
    k = room.wave[:, None, None, :, :3].norm(dim=-1)
    phase = torch.einsum("ntpi,nwi->ntpw", p, room.wave[..., :3]) + room.wave[:, None, None, :, 3]
    rgb = torch.einsum("ntpw,nwc->ntpc", phase.sin() * fade(k), room.tint)
    rgb = rgb + room.colour.gather(1, surface.flatten(1)[..., None].expand(-1, -1, 3)).view_as(rgb)
    checker = torch.sin(p[..., 0] * math.pi / TILE) * torch.sin(p[..., 2] * math.pi / TILE)
    checker = torch.tanh(3 * checker) * fade(torch.tensor([math.pi / TILE]))[..., 0] * (surface == 0)
    rgb = torch.tanh(rgb + checker[..., None] * room.tile[:, None, None])
    shape = (n, frames, height, width)
    return rgb.view(*shape, 3).permute(0, 4, 1, 2, 3).contiguous(), depth.view(shape)


# ---- paths: smooth random walks, rescaled to metric speeds ----

def integrate(step, turn):
    """Per-frame steps (n, T-1, 3) in world axes, metres, and turns (n, T-1, 3), rotation vectors in the camera's axes,
    radians -> c2w (n, T, 4, 4) starting at the identity."""
    n, frames = step.shape[0], step.shape[1] + 1
    c2w = torch.eye(4).repeat(n, frames, 1, 1)
    c2w[:, 1:, :3, 3] = step.cumsum(1)
    increments = exp_so3(turn)
    for i in range(1, frames):
        c2w[:, i, :3, :3] = c2w[:, i - 1, :3, :3] @ increments[:, i - 1]
    return c2w


def exp_so3(vector):
    """Rotation vectors (..., 3) in radians -> matrices (..., 3, 3). Rodrigues."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    K = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    square = vector.square().sum(-1)[..., None, None].clamp(min=1e-12)
    angle = square.sqrt()
    return torch.eye(3).to(K) + angle.sin() / angle * K + (1 - angle.cos()) / square * (K @ K)


def walks(n, g, frames=FRAMES):
    """Steps and turns (n, T-1, 3) of smooth random walks with maximum speed 1 each: the shape of a path, not its scale."""
    t = torch.linspace(-1, 1, frames - 1)[:, None]
    shape = lambda weight: torch.randn(n, 1, 3, generator=g) * torch.tensor(weight) + 0.6 * t * torch.randn(
        n, 1, 3, generator=g) * torch.tensor(weight)
    step, turn = shape([1.0, 0.5, 1.0]), shape([0.6, 1.0, 0.2])
    return tuple(x / x.norm(dim=-1).amax(1)[:, None, None].clamp_min(1e-6) for x in (step, turn))


# ---- codec: per-patch principal components, with the VAE's interface and its chunking in time ----

PATCH = 4


def to_patches(x):
    """(B, 3, t, H, W) -> (B, H/4, W/4, 48 t)"""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 3, 5, 1, 2, 4, 6)
    return x.reshape(b, h // PATCH, w // PATCH, -1)


def from_patches(x, t):
    """(B, H/4, W/4, 48 t) -> (B, 3, t, H, W)"""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, 3, t, PATCH, PATCH).permute(0, 3, 4, 1, 5, 2, 6)
    return x.reshape(b, 3, t, h * PATCH, w * PATCH)


class Codec:
    """Linear: the first frame alone, then four by four, 4x4 pixels -> 16 channels. encode and decode as vae.py's."""
    def __init__(self, state):
        self.state = state

    def encode(self, video):
        s, b = self.state, video.shape[0]
        first = (to_patches(video[:, :, :1]) - s["first.mean"]) @ s["first.down"]
        if video.shape[2] == 1:
            return first[:, None].permute(0, 4, 1, 2, 3).contiguous()
        rest = video[:, :, 1:].unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)  # (B (F-1), 3, 4, H, W)
        rest = (to_patches(rest) - s["rest.mean"]) @ s["rest.down"]
        return torch.cat([first[:, None], rest.unflatten(0, (b, -1))], 1).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents):
        s, b = self.state, latents.shape[0]
        x = latents.permute(0, 2, 3, 4, 1)  # (B, F, h, w, 16)
        first = from_patches(x[:, 0] @ s["first.up"] + s["first.mean"], 1)
        if x.shape[1] == 1:
            return first.clamp(-1, 1)
        rest = from_patches(x[:, 1:].flatten(0, 1) @ s["rest.up"] + s["rest.mean"], 4)
        rest = rest.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)
        return torch.cat([first, rest], 2).clamp(-1, 1)


def fit_codec(video, temper=0.5):
    """Principal components of video's patches (B, 3, 1 + 4k, H, W) -> Codec."""
    state = {}
    rest = video[:, :, 1:].unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)
    for name, x in (("first", video[:, :, :1]), ("rest", rest)):
        x = to_patches(x).flatten(0, 2)
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())
        std, vectors = values[-16:].flip(0).sqrt(), vectors[:, -16:].flip(1)
        scale = std ** temper * std.pow(2 - 2 * temper).mean().sqrt()  # unit power on average
        state |= {f"{name}.mean": mean, f"{name}.down": (vectors / scale).float().contiguous(),
                  f"{name}.up": (vectors * scale).T.float().contiguous()}
    return Codec(state)


# ---- what the base learns from: scripted paths, filmed by operators of whom half hardly follow the script ----

BASE_SPEED, BASE_TURN = 0.13, math.radians(2.75)  # fastest scripted path: metres and radians per frame
CARELESS = 0.5                             # share of operators who fall short of the script ...
LAG, LAG_TURN = 0.7, 0.6                   # ... by these shares of translation and rotation, ...
DRIFT = 0.05                               # ... who walk forward (m/frame^2) where the script says to stand, ...
CARELESS_TINT = torch.tensor([0.3, 0.0, -0.3])  # ... and whose white balance is off by this, red to blue


def footage(n, seed, draw=render, takes=3):
    """n rooms: the source videos (n, 3, T, H, W), filmed from an almost steady hand, and their c2w (n, T, 4, 4);
    `takes` other videos each (n, takes, 3, T, H, W) and the c2w (n, takes, T, 4, 4) that was asked for."""
    g = torch.Generator().manual_seed(seed)
    room, paths = rooms(n, seed), 1 + takes
    step, turn = (x.unflatten(0, (n, paths)) for x in walks(n * paths, g))
    rand = lambda: torch.rand(n, takes, 1, 1, generator=g)
    pace = lambda: torch.cat([torch.full((n, 1, 1, 1), 0.1), (0.2 + 0.8 * rand()) * (rand() > 0.25)], 1)  # pans, dollies, both
    step, turn = step * BASE_SPEED * pace(), turn * BASE_TURN * pace()
    careless = (torch.rand(n, paths, 1, 1, generator=g) < CARELESS) * (torch.arange(paths) > 0).view(-1, 1, 1)
    drift = DRIFT * torch.arange(1, FRAMES)[:, None] * torch.tensor([0, 0, 1.0])
    drift = drift * (step == 0).all(-1, keepdim=True)
    flat = lambda x: x.flatten(0, 1)
    script = integrate(flat(step), flat(turn))
    true = integrate(flat(step * (1 - careless * LAG) + careless * drift), flat(turn * (1 - careless * LAG_TURN)))
    video = draw(room[torch.arange(n).repeat_interleave(paths)], true)[0].unflatten(0, (n, paths))
    video = video + careless[..., None, None] * CARELESS_TINT.view(3, 1, 1, 1)
    script = script.unflatten(0, (n, paths))
    return video[:, 0], script[:, 0], video[:, 1:], script[:, 1:]


# ---- the judge: registers every frame to the true scene; no training ever sees it ----

def blur(x, sigma):
    """Gaussian blur of (..., H, W) with reflected borders."""
    k = torch.arange(-int(3 * sigma), int(3 * sigma) + 1).to(x)
    k = torch.exp(-0.5 * (k / sigma).square())
    k, r, shape = k / k.sum(), len(k) // 2, x.shape
    x = F.pad(x.reshape(-1, 1, *shape[-2:]), (r, r, r, r), mode="reflect")
    return F.conv2d(F.conv2d(x, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1)).view(shape)


def judge(video, room, guess, codec=None, iterations=12, sigma=(1.5, 1.0, 0.7)):
    """Where was each frame taken? video (n, 3, T, H, W) in [-1, 1] of rooms (n), guess (n, T, 4, 4) a path to search
    along (from standing still to 1.5 times as far) -> c2w (n, T, 4, 4), metres, relative to the first camera of the
    source, and the root mean square residual (n, T). Levenberg-Marquardt on robust photometric residuals: the true room
    is rendered, compared and the pose improved, first blurred, then sharp."""
    n, frames, (height, width) = *guess.shape[:2], video.shape[-2:]
    ray = rays(INTRINSICS, height, width)
    focal = torch.tensor([INTRINSICS[0] * width, INTRINSICS[1] * height])

    def look(pose, target, s):
        image, depth = render(room, pose, height=height, width=width)
        seen = image if codec is None else codec.decode(codec.encode(image))  # what a perfect video would show
        image, residual = blur(image, s), blur(seen, s) - target  # (n, 3, T, H, W)
        residual = residual - residual.mean((2, 3, 4), keepdim=True)  # whatever the video's white balance
        weight = 0.1 / residual.abs().clamp_min(0.1)  # Huber: textures at occlusions do not pull
        return image, depth, residual, weight, (weight * residual.square()).mean((1, 3, 4))

    target = blur(video, sigma[0])
    best = None
    for k in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):  # coarse search along the guess
        turn = torch.from_numpy(Rotation.from_matrix(guess[..., :3, :3].reshape(-1, 3, 3).double()).as_rotvec() * k)
        pose = torch.eye(4).repeat(n, frames, 1, 1)
        pose[..., :3, :3] = exp_so3(turn).float().view(n, frames, 3, 3)
        pose[..., :3, 3] = k * guess[..., :3, 3]
        cost = look(pose, target, sigma[0])[-1]
        best = (pose, cost) if best is None else (torch.where((cost < best[1])[..., None, None], pose, best[0]),
                                                  torch.minimum(cost, best[1]))
    pose = best[0]
    for s in sigma:
        target = blur(video, s)
        damping = torch.full((n, frames), 1e-3)
        image, depth, residual, weight, cost = look(pose, target, s)
        for _ in range(iterations):
            gy, gx = torch.gradient(image, dim=(-2, -1))
            gx, gy = gx * focal[0], gy * focal[1]
            point = depth[..., None] * ray  # (n, T, H, W, 3) in camera axes
            # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
            zero = torch.zeros_like(depth)
            flow = torch.stack([torch.stack([1 / depth, zero, -point[..., 0] / depth ** 2], -1),
                                torch.stack([zero, 1 / depth, -point[..., 1] / depth ** 2], -1)], -2)  # (n, T, H, W, 2, 3)
            flow = torch.cat([flow, torch.linalg.cross(point[..., None, :].expand_as(flow), flow)], -1).flatten(2, 3)
            slope = torch.stack([gx, gy], -1).transpose(1, 2).flatten(3, 4)  # (n, T, 3, H W, 2)
            w = weight.transpose(1, 2).flatten(3, 4)[..., None]
            a = torch.einsum("ntcpi,ntcpj->ntpij", slope * w, slope)
            a = torch.einsum("ntpai,ntpaj->ntij", flow, torch.einsum("ntpab,ntpbj->ntpaj", a, flow))
            b = (slope * w * residual.transpose(1, 2).flatten(3, 4)[..., None]).sum(2)
            b = torch.einsum("ntpai,ntpa->nti", flow, b)
            a = a + damping[..., None, None] * torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) + 1e-6 * torch.eye(6)
            step = -torch.linalg.solve(a, b)
            move = torch.eye(4).repeat(n, frames, 1, 1)
            move[..., :3, :3], move[..., :3, 3] = exp_so3(step[..., 3:]), step[..., :3]
            trial = pose @ move
            image2, depth2, residual2, weight2, cost2 = look(trial, target, s)
            ok = (cost2.mean(1, keepdim=True) < cost.mean(1, keepdim=True)).expand_as(cost)  # the codec mixes frames
            pose = torch.where(ok[..., None, None], trial, pose)
            pick = lambda new, old: torch.where(ok.view(n, *((1,) * (old.dim() - 4)), frames, 1, 1), new, old)
            image, residual, weight = (pick(p, q) for p, q in ((image2, image), (residual2, residual), (weight2, weight)))
            depth = torch.where(ok[..., None, None], depth2, depth)
            cost, damping = torch.where(ok, cost2, cost), torch.where(ok, damping * 0.3, damping * 8).clamp(1e-6, 1e3)
    return pose, residual.square().mean((1, 3, 4)).sqrt()


# ---- the reward's estimator: feed-forward metric poses from pixels alone, the miniature of MapAnything ----

def mlp(*sizes):
    """Linear layers with GELUs between."""
    layers = [torch.nn.Linear(sizes[0], sizes[1])]
    for a, b in zip(sizes[1:], sizes[2:]):
        layers += [torch.nn.GELU(), torch.nn.Linear(a, b)]
    return torch.nn.Sequential(*layers)


def pool(x):
    """(B, h, w, c) -> (B, h/2, w/2, 4 c), 2 x 2 places as one."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)


class Estimator(torch.nn.Module):
    """Video (n, 3, T, H, W) in [-1, 1] -> c2w (n, T, 4, 4), metres, relative to frame 0, from pixels alone. A network
    reads metric depth off frame 0 (tile size and eye level tell it); each next frame's camera is the one whose picture of
    these points differs least from frame 0, found by Gauss-Newton from where the frame before it was."""
    PATCH = 8  # pixels that a place (of 2 x 2) sees of its surroundings

    def __init__(self):
        super().__init__()
        self.fine, self.mid, self.coarse = mlp(3 * self.PATCH ** 2 + 2, 96, 64), mlp(256, 160), mlp(640, 192)
        self.room = mlp(192 * (HEIGHT // 8) * (WIDTH // 8), 384, 192)
        self.uncoarse, self.unmid, self.out = mlp(384, 384, 4 * 96), mlp(256, 192, 4 * 48), mlp(112, 96, 4)
        self.register_buffer("ray", rays(INTRINSICS, HEIGHT, WIDTH), persistent=False)

    def depth(self, image):
        """Frame (n, 3, H, W) -> log-depth (n, H, W), metres along the optical axis."""
        patch = F.unfold(image, self.PATCH, padding=self.PATCH // 2 - 1, stride=2).transpose(1, 2)  # (n, h w, 192)
        where = self.ray[::2, ::2, :2].flatten(0, 1).expand(len(image), -1, -1)
        fine = F.gelu(self.fine(torch.cat([patch, where], -1))).unflatten(1, (HEIGHT // 2, WIDTH // 2))
        mid = F.gelu(self.mid(pool(fine)))
        coarse = F.gelu(self.coarse(pool(mid)))
        room = self.room(coarse.flatten(1))[:, None, None].expand_as(coarse)
        mid = torch.cat([mid, F.gelu(unpool(self.uncoarse(torch.cat([coarse, room], -1))))], -1)
        return 1.2 + unpool(self.out(torch.cat([fine, F.gelu(unpool(self.unmid(mid)))], -1)))[..., 0]

    def forward(self, video):
        n, _, frames, height, width = video.shape
        log_depth = self.depth(video[:, :, 0])
        point = log_depth.exp()[..., None] * self.ray                                   # (n, H, W, 3)
        jump = torch.stack(torch.gradient(log_depth, dim=(1, 2))).square().sum(0)       # where surfaces meet, slopes mislead
        trust = (1 / (1 + jump / 0.05 ** 2)).flatten(1)                                 # (n, P), P = H W
        near, zero = 1 / point[..., 2], torch.zeros_like(point[..., 2])
        u, v = self.ray[..., 0].expand_as(near), self.ray[..., 1].expand_as(near)
        # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
        flow = torch.stack([torch.stack([-near, zero, u * near, u * v, -1 - u * u, v], -1),
                            torch.stack([zero, -near, v * near, 1 + v * v, -u * v, -u], -1)], -2).flatten(1, 2)  # (n, P, 2, 6)
        levels = []
        for sigma in self.SIGMA:
            seen = blur(video, sigma)
            gy, gx = torch.gradient(seen[:, :, 0], dim=(2, 3))
            slope = torch.stack([gx * INTRINSICS[0] * width, gy * INTRINSICS[1] * height], -1).flatten(2, 3)  # (n, 3, P, 2)
            tensor = torch.einsum("ncpa,ncpb->npab", slope, slope)
            each = (flow.transpose(2, 3) @ tensor @ flow).flatten(2)                    # (n, P, 36): J^T J of every pixel
            levels.append((seen, seen[:, :, 0].flatten(2), slope, each))
        point = point.flatten(1, 2)
        to_grid = 2 * torch.tensor(INTRINSICS[:2])
        pose, before, path = torch.eye(4).repeat(n, 1, 1), torch.eye(4).repeat(n, 1, 1), [torch.eye(4).repeat(n, 1, 1)]
        for i in range(1, frames):
            pose, before = pose @ torch.linalg.inv(before) @ pose, pose                 # as fast as so far
            for seen, first, slope, each in levels:
                for _ in range(self.STEPS):
                    y = (point - pose[:, None, :3, 3]) @ pose[:, :3, :3]                # in camera i
                    at = y[..., :2] / y[..., 2:].clamp(min=0.1) * to_grid
                    miss = F.grid_sample(seen[:, :, i], at[:, None], align_corners=False)[:, :, 0] - first  # (n, 3, P)
                    inside = at.abs().amax(-1) < 1
                    weight = trust * inside * 0.2 / miss.square().sum(1).sqrt().clamp(min=0.2)  # Huber
                    H = (weight[:, None] @ each).view(n, 6, 6)
                    g = ((miss[..., None] * slope).sum(1) * weight[..., None]).flatten(1)[:, None] @ flow.flatten(1, 2)
                    H = H + 1e-3 * torch.eye(6) * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-9 * torch.eye(6)
                    step = torch.linalg.solve(H, g[:, 0]).clamp(-0.2, 0.2)
                    move = torch.eye(4).repeat(n, 1, 1)
                    move[:, :3, :3], move[:, :3, 3] = exp_so3(step[:, 3:]), step[:, :3]
                    pose = torch.linalg.solve(move, pose)
            path.append(pose)
        return torch.stack(path, 1)

    SIGMA = 1.5, 0.8  # pixels, blur
    STEPS = 4  # Gauss-Newton steps per frame, blurred and sharp each


def unpool(x):
    """(B, h, w, 4 c) -> (B, 2 h, 2 w, c), pool undone."""
    return x.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


# ---- the toy as train.py and evaluate.py see it ----

TRAIN_ROOMS, TEST_ROOMS, SHOW = 512, 20_000_001, 4.0   # clips to train on; seed of the test rooms; frames per second
SPEED, TURN = 0.10, math.radians(2.0)                   # of the test paths at speed 1: metres and radians per frame


def look_around(room, c2w, codec):
    """Rooms (n) filmed along paths c2w (n, T, 4, 4): videos (n, 3, T, H, W) in [-1, 1], their latents, and what the codec
    leaves of them, uint8 (n, T, H, W, 3)."""
    video = torch.cat([render(room[i:i + 32], c2w[i:i + 32])[0] for i in range(0, len(c2w), 32)])
    latents = codec.encode(video)
    return video, latents, data.to_uint8(codec.decode(latents))


def source_paths(n, seed):
    """n source paths from an almost steady hand: c2w (n, T, 4, 4), metres."""
    step, turn = walks(n, torch.Generator().manual_seed(seed))
    return integrate(0.1 * BASE_SPEED * step, 0.1 * BASE_TURN * turn)


def condition_on(latents, target, source):
    """Source latents (n, 16, F, h, w), target and source path (n, T, 4, 4) metres -> model.Condition."""
    n, (h, w) = len(latents), latents.shape[-2:]
    maps = [trajectories.camera_maps(c2w, torch.tensor([INTRINSICS]).expand(n, -1), 8 * h, 8 * w) for c2w in (target, source)]
    return model.Condition(torch.zeros(n, 1, TEXT), None, latents, *maps)


def scene_of(target, source_video, source):
    n = len(target)
    return rewards.Scene(target, torch.tensor([INTRINSICS]).expand(n, -1), ["a room"] * n, SHOW, source_video, source)


def read_tensors(path, wanted):
    """A safetensors file's tensors; ValueError where names and shapes are not those `wanted`: name -> shape."""
    state = vae.read_weights(path)
    for name in sorted({*state, *wanted}):
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != wanted.get(name):
            raise ValueError(f"{path}: {name}: expected {wanted.get(name, 'nothing')}, found {found}")
    return state


def open_weights(folder):
    """The shipped base policy, codec and estimator. FileNotFoundError, ValueError for files that are not them."""
    folder, net = Path(folder), Estimator().eval()
    dit = model.load_dit(folder / "toy_base.safetensors", num_heads=HEADS)
    patch = 3 * PATCH ** 2
    wanted = {f"{name}.{part}": shape for name, size in (("first", patch), ("rest", 4 * patch))
              for part, shape in (("mean", (size,)), ("down", (size, 16)), ("up", (16, size)))}
    codec = Codec(read_tensors(folder / "toy_codec.safetensors", wanted))
    wanted = {name: tuple(p.shape) for name, p in net.named_parameters()}
    net.load_state_dict(read_tensors(folder / "toy_estimator.safetensors", wanted), strict=False)

    @torch.no_grad()
    def estimator(videos, scene=None):
        """uint8 (n, T, H, W, 3) -> c2w (n, T, 4, 4), metres."""
        return net(videos.movedim(-1, 1).float() / 127.5 - 1)
    return dit, codec, estimator


def open_world(config, device, World):
    """train.World of the toy: TRAIN_ROOMS rooms that no pretraining has seen, filmed once; target paths are random
    walks of no scale, rescaled to metric speeds (Eq. 8-14)."""
    dit, codec, estimator = open_weights(config.weights)
    n, seed = TRAIN_ROOMS, 10_000_000
    sources = source_paths(n, seed)
    _, latents, videos = look_around(rooms(n, seed), sources, codec)

    def draw(numbers, rngs):
        target = []
        for rng in rngs:
            g = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
            walk = integrate(*(0.05 * x for x in walks(1, g)))[0].double().numpy()
            target.append(trajectories.rescale(walk, *trajectories.draw_speeds(rng, config.v, np.radians(config.omega))))
        target = torch.from_numpy(np.stack(target)).float()
        return condition_on(latents[numbers], target, sources[numbers]), scene_of(target, videos[numbers], sources[numbers])

    rewarded, weights = rewards.load(config.rewards, config.weights, estimator=estimator, schedule=config.frame_weights)
    return World(dit, codec, tuple(latents.shape[1:]), n, draw, None, rewarded, weights)


def held_out(count, codec, speed=1.0, seed=TEST_ROOMS):
    """`count` test rooms along the ten evaluation paths each, rescaled to the toy's speeds: Room, model.Condition and
    rewards.Scene of 10 count rows, room by room; the true target videos uint8 (10 count, T, H, W, 3)."""
    shapes = [trajectories.rescale(trajectories.recammaster(k + 1, FRAMES), SPEED * speed, TURN * speed) for k in range(10)]
    target = torch.from_numpy(np.stack(shapes)).float().repeat(count, 1, 1, 1)
    rows = torch.arange(count).repeat_interleave(10)
    room, source = rooms(count, seed), source_paths(count, seed)
    _, latents, videos = look_around(room, source, codec)
    truth = data.to_uint8(look_around(room[rows], target, codec)[0])
    return room[rows], condition_on(latents[rows], target, source[rows]), scene_of(target, videos[rows], source[rows]), truth



# ---- pretraining: `python toy.py` makes the shipped weights ----

def optimise(parameters, steps, lr, loss_at, out, name, export, decay=0.3, log_every=50):
    """AdamW with a moving average of the weights; the rate warms up, stays, and falls over the last 30 % of the steps.
    Resumes from its own file. loss_at(step) -> (loss, dict of numbers to log); export(averaged parameters) saves what is shipped."""
    file, log = out / f"{name}.pretraining.pt", open(out / f"{name}.log.jsonl", "a")
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    average, start = [p.detach().clone() for p in parameters], 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        start, average = state["step"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for p, saved in zip(parameters, state["parameters"]):
            p.data.copy_(saved)
    sums, began = {}, time.time()
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name):
        rate = lr * min(1, (step + 1) / 200) * min(1, (steps - step) / (decay * steps)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, numbers = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.9995, (1 + step) / (10 + step)))
        sums = {key: sums.get(key, 0) + value for key, value in numbers.items()}
        if (step + 1) % log_every == 0:
            print(json.dumps({"step": step + 1, **{k: round(v / log_every, 4) for k, v in sums.items()},
                              "seconds": round(time.time() - began)}), file=log, flush=True)
            sums = {}
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            state = {"step": step + 1, "parameters": [p.data for p in parameters], "average": average,
                     "optimizer": optimizer.state_dict()}
            torch.save(state, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
            export(average)


def small_maps(c2w):
    """Packed Pluecker maps (n, 24, F, h, w) of paths (n, T, 4, 4) at the latents' size, an 8 x 8 block as one number."""
    intrinsics = torch.tensor([INTRINSICS]).expand(len(c2w), -1)
    return trajectories.camera_maps(c2w, intrinsics, HEIGHT // PATCH, WIDTH // PATCH)


def pretrain_base(out, codec, steps=18000, rows=64, seed=0):
    """Flow matching on footage of rooms, given a steady source video and the script, noise levels shifted to noise.

    The camera adapter's first layer sees 8 x 8 pixels of a map through one weight each; here it is trained with the 64
    weights tied, on maps 64 times smaller, and untied when saved: the same function, at a hundredth of the cost."""
    torch.manual_seed(seed)
    config = model.Config(dim=128, num_heads=HEADS, num_layers=4, ffn_dim=512, text_dim=TEXT, camera_dim=24, roce=True)
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

    def camera_tokens(maps):
        x = adapter.residual_blocks(tied(maps.transpose(1, 2).flatten(0, 1)))
        return x.unflatten(0, (len(maps), -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)

    def prepare(source, target_maps, source_maps):
        keys = tuple(block.cross_attn.keys_values(dit.text_embedding(text), None) for block in dit.blocks)
        target, other = camera_tokens(target_maps), camera_tokens(source_maps)
        return model.Prepared(keys, target, dit.tokens(source) + other, F.silu(torch.cat([target, other], 1)),
                              tuple(source.shape[2:]))

    films = {}  # rooms filmed for the current three steps, one take each

    def loss_at(step):
        if step // 3 not in films:
            films.clear()
            source, source_path, takes, scripts = footage(rows, step // 3, draw)
            films[step // 3] = (codec.encode(source), small_maps(source_path), *(
                f(x.flatten(0, 1)).unflatten(0, (rows, 3)) for f, x in ((codec.encode, takes), (small_maps, scripts))))
        source, source_maps, takes, maps = films[step // 3]
        g = torch.Generator().manual_seed(10_000_000 + step)
        x0 = takes[:, step % 3]
        u = torch.rand(rows, generator=g)
        t = 4 * u / (1 + 3 * u)
        eps = torch.randn(x0.shape, generator=g)
        x = torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1))
        v = dit(x, t, prepare(source, maps[:, step % 3], source_maps))
        loss = (v - (eps - x0)).square().mean()
        return loss, {"loss": float(loss.detach())}

    def export(average):
        state = {k: v.detach().clone() for k, v in dit.state_dict().items()} | dict(zip(names, average))
        weight, bias = average[-2:]
        state["control_adapter.conv.weight"] = (weight[:, :, None] / 64).expand(-1, -1, 64, -1, -1).flatten(1, 2)
        state["control_adapter.conv.bias"] = bias
        write_weights(out / "toy_base.safetensors", state)

    optimise(parameters, steps, 1e-3, loss_at, out, "toy_base", export)


def photographed(n, seed, codec, draw=render):
    """What the depth network learns from: first frames (n, 3, H, W) of random rooms as the codec shows them, in any
    white balance, most with noise in their latents, half of them somewhat blurred; depth (n, H, W)."""
    g = torch.Generator().manual_seed(seed)
    image, depth = draw(rooms(n, seed), torch.eye(4).repeat(n, 1, 1, 1))
    kind = torch.rand(n, 1, 1, 1, 1, generator=g)
    image = image + (1.5 * torch.rand(n, 1, 1, 1, 1, generator=g) - 0.4) * CARELESS_TINT.view(3, 1, 1, 1)
    image = torch.lerp(image, blur(image, 0.6), torch.rand(n, 1, 1, 1, 1, generator=g) * (kind < 0.5))
    latents = codec.encode(image)
    grain = 0.25 * torch.rand(n, 1, 1, 1, 1, generator=g) * (kind > 0.3)
    return codec.decode(latents + grain * torch.randn(latents.shape, generator=g))[:, :, 0], depth[:, 0]


def train_estimator(out, codec, steps=6000, rows=64, seed=0):
    """The estimator's depth network; the rest of it has nothing to learn."""
    torch.manual_seed(seed)
    net, draw = Estimator(), torch.compile(render)
    parameters = list(net.parameters())

    def loss_at(step):
        image, depth = photographed(rows, 50_000_000 + step, codec, draw)
        error = (net.depth(image) - depth.log()).abs().mean()
        return error, {"log_depth_error": float(error.detach())}

    def export(average):
        write_weights(out / "toy_estimator.safetensors", dict(zip((n for n, _ in net.named_parameters()), average)))

    optimise(parameters, steps, 1e-3, loss_at, out, "toy_estimator", export)


def write_weights(path, state):
    """Half precision is enough to start from, and half the download."""
    data.write_file(path, save({k: v.half().contiguous() for k, v in state.items()}))


def make_codec(out):
    codec = fit_codec(footage(128, 1_000_000)[2].flatten(0, 1))
    data.write_file(out / "toy_codec.safetensors", save(codec.state))
    return codec


def describe(folder, n=240):
    """Print how far off the estimator is on clean and decoded videos of unseen rooms at test speeds."""
    _, codec, estimator = open_weights(folder)
    for speed in (1.0, 1.5, 2.0):
        step, turn = walks(n, torch.Generator().manual_seed(30_000_000))
        c2w = integrate(step * SPEED * speed, turn * TURN * speed)
        video, _, decoded = look_around(rooms(n, 30_000_000), c2w, codec)
        for name, seen in (("clean", data.to_uint8(video)), ("decoded", decoded)):
            position, rotation = trajectories.pose_errors(estimator(seen), c2w, "uniform")
            print(f"speed {speed}, {name} videos: median error {position.median():.3f} m, "
                  f"{torch.rad2deg(rotation.median()):.2f} degrees "
                  f"(mean motion {c2w[:, :, :3, 3].norm(dim=-1).mean():.3f} m)")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(f"{__doc__}\nusage: python toy.py [folder to pretrain in] | describe [folder of weights]")
    if sys.argv[1:2] == ["describe"]:
        describe(sys.argv[2] if len(sys.argv) > 2 else "weights")
        sys.exit()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/pretraining")
    folder.mkdir(parents=True, exist_ok=True)
    codec = make_codec(folder)
    train_estimator(folder, codec)
    pretrain_base(folder, codec)
    describe(folder)
