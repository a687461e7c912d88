"""The policy: a Wan2.1 video diffusion transformer with ReDirector's camera conditioning.

Read it from the bottom up as one would draw it, or top to bottom as it is built: rotary angles, attention, block,
what it is conditioned on, the model, loading, what trains. Module names are the official checkpoints' key names.

Sources: Wan2.1 (Wan Team, arXiv 2503.20314); ReDirector (Park et al., arXiv 2511.19827): the source video's
tokens are appended along frames at the *same* positions as the target's, and Rotary Camera Encoding (RoCE) turns
each head's height and width pairs by learned per-token camera phases.
Shapes: B rows, b conditions (b divides B; the m = B // b rows of a condition are neighbours), F latent frames,
N tokens, D channels, H heads, P complex pairs per head (D = 2 H P).
"""
import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


def wide(x):
    """x in at least float32: where norms, modulation and rotations are computed (no copy if it is already)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- rotary angles ----

def camera_pairs(head_dim):
    """Complex pairs of a head that encode height and width (RoCE's phases are added to these); the rest is time."""
    return 2 * (head_dim // 6)


@functools.lru_cache(maxsize=16)
def rope_angles(frames, height, width, head_dim, device, dtype=torch.float32):
    """(frames * height * width, P) radians: 3-D rotary positions, theta 10000, pairs split time / height / width."""
    pairs = camera_pairs(head_dim) // 2
    with torch.inference_mode(False):  # cached: must stay usable under autograd
        angles = []
        for size, n in ((frames, head_dim // 2 - 2 * pairs), (height, pairs), (width, pairs)):
            frequency = 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
            angles.append(torch.arange(size, dtype=torch.float64)[:, None] * frequency)
        f, h, w = angles
        grid = (frames, height, width, -1)
        angles = torch.cat([f[:, None, None].expand(grid), h[:, None].expand(grid), w.expand(grid)], -1)
        return angles.flatten(0, 2).to(device, dtype)


def rotate(x, angle):
    """Turn x's interleaved pairs (2i, 2i+1): x (B, N, H, 2P) by angle (b or 1, N, H or 1, P) radians, b dividing B."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    real, imag = wide(x).unflatten(0, (angle.shape[0], -1)).unflatten(-1, (-1, 2)).unbind(-1)  # (b, m, N, H, P)
    return torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1).flatten(-2).flatten(0, 1)


# ---- attention ----

def linear(x, layer):
    """layer(x) in x's type: trained weights may be kept in float32 beside a bfloat16 model."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def rms_norm(x, weight):
    """(..., D) normalised over all heads at once, in float32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)


def prologue(q, k, v, weight_q, weight_k, heads, angle, phase):
    """RMSNorm of q and k, then rotations: q and k by `angle`, v by -`phase` (None: not). (B, N, D) -> (B, H, N, 2P)."""
    dtype = v.dtype
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (rms_norm(q, weight_q), rms_norm(k, weight_k), v))
    q, k = rotate(q, angle), rotate(k, angle)
    if phase is not None:
        v = rotate(v, -phase)
    return (x.to(dtype).transpose(1, 2) for x in (q, k, v))


def epilogue(x, heads, phase):
    """Turn the attention output, after its projection, back by `phase`. (B, N, D) -> (B, N, D)."""
    return rotate(x.unflatten(-1, (heads, -1)), phase).flatten(2).to(x.dtype)


class RMSNorm(nn.Module):
    """Holds a weight; rms_norm does the work."""
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class SelfAttention(nn.Module):
    """What the RL stage trains. Self-attention with rotary positions and RoCE."""
    def __init__(self, dim, heads, roce):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        if roce:
            phases = heads * camera_pairs(dim // heads)
            self.rope_phase_qk = nn.Sequential(nn.SiLU(), nn.Linear(dim, phases, bias=False))
            self.rope_phase_vo = nn.Sequential(nn.SiLU(), nn.Linear(dim, phases, bias=False))

    def phase(self, camera, layer):
        """Camera tokens, SiLU already applied (b, N, D) -> (b, N, H, P) radians, zero for the time pairs."""
        phase = wide(linear(camera, layer[1])).unflatten(-1, (self.heads, -1))
        return F.pad(phase, (self.q.in_features // self.heads // 2 - phase.shape[-1], 0))

    def forward(self, x, rope, camera):
        angle, phase = rope[None, :, None], None  # (1, N, 1, P)
        if camera is not None:
            angle = angle + self.phase(camera, self.rope_phase_qk)  # (b, N, H, P)
            phase = self.phase(camera, self.rope_phase_vo)
        q, k, v = prologue(linear(x, self.q), linear(x, self.k), linear(x, self.v),
                           self.norm_q.weight, self.norm_k.weight, self.heads, angle, phase)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = linear(x, self.o)
        return x if phase is None else epilogue(x, self.heads, phase)


class CrossAttention(nn.Module):
    """Attention to text and, separately, to image tokens, summed before the projection."""
    def __init__(self, dim, heads, image):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        if image:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), RMSNorm(dim)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, H, L, 2P)

    def keys_values(self, text, image):
        """Text and image tokens (b, L, D) -> ((k, v),) or ((k, v), (k_img, v_img)), each (b, H, L, 2P)."""
        k = rms_norm(self.k(text), self.norm_k.weight).to(text.dtype)
        pairs = ((self.split(k), self.split(self.v(text))),)
        if image is not None:
            k = rms_norm(self.k_img(image), self.norm_k_img.weight).to(image.dtype)
            pairs += ((self.split(k), self.split(self.v_img(image))),)
        return pairs

    def forward(self, x, keys_values):
        b = keys_values[0][0].shape[0]
        q = rms_norm(self.q(x), self.norm_q.weight).to(x.dtype)
        q = self.split(q.reshape(b, -1, q.shape[-1]))  # rows of one condition share keys: (b, H, m N, 2P)
        out = sum(F.scaled_dot_product_attention(q, k, v) for k, v in keys_values)
        return self.o(out.transpose(1, 2).reshape(x.shape))


# ---- block ----

def modulate(x, shift, scale):
    """LayerNorm without weights, scaled and shifted in float32: x (B, N, D), shift and scale (B or 1, 1, D)."""
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.self_attn = SelfAttention(dim, config.num_heads, config.roce)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.image_dim is not None)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def forward(self, x, e, rope, camera, keys_values):
        """x (B, N, D), e (B or 1, 6, D) float32, rope (N, P), camera (b, N, D) or None -> (B, N, D)."""
        shift, scale, gate, shift2, scale2, gate2 = (e + self.modulation).unsqueeze(2).unbind(1)
        y = self.self_attn(modulate(x, shift, scale), rope, camera)
        x = torch.addcmul(wide(x), gate, wide(y)).to(x.dtype)
        x = x + self.cross_attn(self.norm3(x), keys_values)
        y = self.ffn(modulate(x, shift2, scale2))
        return torch.addcmul(wide(x), gate2, wide(y)).to(x.dtype)


# ---- conditions ----

def tree_map(f, *trees):
    """f on corresponding tensors of nested tuples; None and numbers are passed through."""
    if isinstance(trees[0], tuple):
        return tuple(tree_map(f, *branches) for branches in zip(*trees, strict=True))
    return f(*trees) if torch.is_tensor(trees[0]) else trees[0]


class Batch:
    """A dataclass whose tensors all have the batch first: slices, concatenates and moves as one."""
    def map(self, f, *others):
        trees = [tuple(getattr(x, field.name) for field in dataclasses.fields(self)) for x in (self, *others)]
        return type(self)(*tree_map(f, *trees))

    @classmethod
    def cat(cls, batches):
        return batches[0].map(lambda *tensors: torch.cat(tensors), *batches[1:])

    def __getitem__(self, rows):
        return self.map(lambda x: x[rows])

    def __len__(self):
        return len(self.text)

    def to(self, *args, **kwargs):
        return self.map(lambda x: x.to(*args, **kwargs))


@dataclass
class Condition(Batch):
    """What the policy is conditioned on, as batched tensors."""
    text: torch.Tensor                          # (b, L, text_dim) text encoder's output, zeroed past the caption
    image: torch.Tensor | None = None           # (b, 257, image_dim) CLIP tokens of the source's first frame
    source: torch.Tensor | None = None          # (b, 16, F, h, w) normalised latents of the source video
    camera: torch.Tensor | None = None          # (b, 24, F, 8h, 8w) packed Pluecker maps of the target path
    source_camera: torch.Tensor | None = None   # (b, 24, F, 8h, 8w) and of the source's


@dataclass
class Prepared(Batch):
    """All that follows from a Condition through frozen weights, whatever t and x are: DiT.prepare makes it."""
    text: tuple             # per block: ((k, v) of the text[, (k, v) of the image]), each (b, H, L, 2P)
    target: torch.Tensor | None   # (b, N, D) camera tokens added to the target's
    source: torch.Tensor | None   # (b, N, D) the source video's tokens
    camera: torch.Tensor | None   # (b, 2N, D) SiLU of all camera tokens, for RoCE
    grid: tuple | None            # latent frames, height and width it is for; None: any

    def __len__(self):
        return len(self.text[0][0][0])


# ---- model ----

@dataclass
class Config:
    """A DiT's shape; the optional parts are None or False."""
    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_dim: int = 32
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    image_dim: int | None = None      # width of CLIP tokens
    camera_dim: int | None = None     # channels of a packed Pluecker map: 24
    camera_blocks: int = 1            # residual blocks of the camera adapter
    roce: bool = False                # ReDirector's rotary camera encoding


def patches(x):
    """(B, C, F, h, w) -> (B, N, 4 C): 2x2 patches, channel first, as the patch embedding's kernel is laid out."""
    b, c, f, h, w = x.shape
    x = x.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(b, f * (h // 2) * (w // 2), c * 4)


class ResidualBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Packed Pluecker maps (b, 24, F, 8h, 8w), frame by frame -> camera tokens (b, N, D)."""
    def __init__(self, channels, dim, blocks):
        super().__init__()
        self.conv = nn.Conv2d(channels * 64, dim, 2, stride=2)
        self.residual_blocks = nn.Sequential(*(ResidualBlock(dim) for _ in range(blocks)))

    def forward(self, maps):
        b = maps.shape[0]
        x = F.pixel_unshuffle(maps.transpose(1, 2).flatten(0, 1), 8)
        x = self.residual_blocks(self.conv(x))  # (b F, D, h/2, w/2)
        return x.unflatten(0, (b, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)


class ImageEmbedding(nn.Module):
    def __init__(self, image_dim, dim):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(),
                                  nn.Linear(image_dim, dim), nn.LayerNorm(dim))

    def forward(self, x):
        return self.proj(x)


class Head(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.head = nn.Linear(dim, out_dim * 4)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)

    def forward(self, x, e):
        """(B, N, D), e (B or 1, D) -> (B, N, 4 out_dim) in float32: it is cheap, and log-probs hang on it."""
        shift, scale = (e[:, None] + self.modulation).unsqueeze(2).unbind(1)
        return linear(modulate(wide(x), shift, scale), self.head)


class DiT(nn.Module):
    """velocity = dit(x, t, condition), see forward. Built with Wan's initialisation; load_dit reads official files."""
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        if dim % (2 * config.num_heads):
            raise ValueError(f"dim {dim} is not a multiple of 2 x num_heads {config.num_heads}")
        self.config = config
        self.checkpoint = False  # gradient checkpointing, block by block: recompute instead of storing activations
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = None if config.image_dim is None else ImageEmbedding(config.image_dim, dim)
        self.control_adapter = None
        if config.camera_dim is not None:
            self.control_adapter = CameraAdapter(config.camera_dim, dim, config.camera_blocks)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim)
        self.init()

    @torch.no_grad()
    def init(self):
        """Wan's initialisation; RoCE starts at phase 0, the head at velocity 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero = [self.head.head]
        if self.config.roce:
            for block in self.blocks:
                zero += [block.self_attn.rope_phase_qk[1], block.self_attn.rope_phase_vo[1]]
        for layer in zero:
            nn.init.zeros_(layer.weight)

    def compile(self, **options):
        """torch.compile each block (they share one graph): norms, modulation and rotations become single kernels."""
        for block in self.blocks:
            block.compile(**options)

    def tokens(self, x):
        """Latents (B, C, F, h, w) -> (B, N, D); channels missing from in_dim count as zeros."""
        weight = self.patch_embedding.weight[:, :x.shape[1]].flatten(1)
        return F.linear(patches(x.to(weight.dtype)), weight, self.patch_embedding.bias)

    def time(self, t):
        """t (B,) in [0, 1] -> e (B, D), six modulation vectors (B, 6, D), in float32."""
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = (1000 * wide(t)).double()[:, None] * frequency  # multiplied first: 0.517 then gives 517 exactly
        e = torch.cat([angle.cos(), angle.sin()], 1).to(wide(self.patch_embedding.weight[:0]).dtype)
        e = linear(F.silu(linear(e, self.time_embedding[0])), self.time_embedding[2])
        return e, linear(F.silu(e), self.time_projection[1]).unflatten(1, (6, -1))

    def prepare(self, condition):
        """Condition -> Prepared: everything that depends neither on t nor on x nor on what the RL stage trains.
        Raises ValueError where the condition lacks what this model needs or its shapes disagree."""
        self.check(condition)
        dtype = self.patch_embedding.weight.dtype
        text, image, source, camera, source_camera = (
            None if x is None else x.to(dtype) for x in tree_map(lambda x: x, tuple(vars(condition).values())))
        text = self.text_embedding(text)
        image = None if image is None else self.img_emb(image)
        pairs = tuple(block.cross_attn.keys_values(text, image) for block in self.blocks)
        grid = target = phases = None
        if source is not None:
            grid, source = tuple(source.shape[2:]), self.tokens(source)
        if camera is not None:
            grid = camera.shape[2], camera.shape[3] // 8, camera.shape[4] // 8
            target = self.control_adapter(camera)
            both = [target]
            if source is not None:
                both.append(self.control_adapter(source_camera))
                source = source + both[1]
            phases = F.silu(torch.cat(both, 1)) if self.config.roce else None
        return Prepared(pairs, target, source, phases, grid)

    def check(self, condition):
        c, config = condition, self.config
        for name, here, needed in (("image", c.image, config.image_dim), ("camera", c.camera, config.camera_dim)):
            if (here is None) != (needed is None):
                raise ValueError(f"condition.{name}: this model {'takes none' if needed is None else 'needs it'}")
        if c.source is not None and config.in_dim != 2 * config.out_dim:
            raise ValueError(f"condition.source: a model of {config.in_dim} input channels takes none")
        if (c.source_camera is None) != (c.camera is None or c.source is None):
            raise ValueError("condition.source_camera goes with condition.source and condition.camera")
        want = {"text": (len(c), None, config.text_dim), "image": (len(c), None, config.image_dim)}
        grid = (None, None, None) if c.source is None else tuple(c.source.shape[2:])
        want["source"] = (len(c), config.out_dim, *grid)
        pixels = tuple(n and k * n for k, n in zip((1, 8, 8), grid))
        want["camera"] = (len(c), config.camera_dim, *pixels)
        want["source_camera"] = want["camera"] if c.camera is None else tuple(c.camera.shape)
        for name, shape in want.items():
            x = getattr(c, name)
            if x is not None and (x.ndim != len(shape) or any(n and n != k for n, k in zip(shape, x.shape))):
                raise ValueError(f"condition.{name} is {tuple(x.shape)}, expected {shape} (None: any)")

    def forward(self, x, t, condition):
        """Velocity eps - x_0 (B, 16, F, h, w) of noisy latents x (same shape) at noise level t (B,) or 0-dim in [0, 1].
        condition: Condition or Prepared of b conditions, b dividing B; row r of x has condition r // (B // b).
        Raises ValueError where shapes disagree."""
        rows, channels, frames, height, width = x.shape
        if height % 2 or width % 2:
            raise ValueError(f"x is {tuple(x.shape)}: latent height and width must be even (a video's size / 16)")
        if rows % len(condition):
            raise ValueError(f"{len(condition)} conditions do not divide {rows} rows")
        p = condition if isinstance(condition, Prepared) else self.prepare(condition)
        if p.grid is not None and p.grid != (frames, height, width):
            raise ValueError(f"x is {(frames, height, width)} latent frames, height, width; its condition {p.grid}")
        if channels != (self.config.in_dim if p.source is None else self.config.out_dim):
            raise ValueError(f"x has {channels} channels; in_dim is {self.config.in_dim}, out_dim {self.config.out_dim}")
        e, modulation = self.time(t.reshape(-1))
        tokens = self.tokens(x).unflatten(0, (len(condition), -1))  # (b, m, N, D)
        n = tokens.shape[2]
        if p.target is not None:
            tokens = tokens + p.target[:, None]
        head_dim = self.config.dim // self.config.num_heads
        rope = rope_angles(frames, height // 2, width // 2, head_dim, x.device, e.dtype)
        if p.source is not None:  # at the same positions
            tokens = torch.cat([tokens, p.source[:, None].expand_as(tokens)], 2)
            rope = rope.repeat(2, 1)
        tokens = tokens.flatten(0, 1)
        for block, keys_values in zip(self.blocks, p.text):
            args = (tokens, modulation, rope, p.camera, keys_values)
            if self.checkpoint and torch.is_grad_enabled():
                tokens = checkpoint(block, *args, use_reentrant=False)
            else:
                tokens = block(*args)
        v = self.head(tokens[:, :n], e)  # target half only; (B, N, 4 C): patch row, patch column, channel
        v = v.reshape(rows, frames, height // 2, width // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return v.reshape(rows, -1, frames, height, width).to(x.dtype)


# ---- loading ----

def config_from(shapes, num_heads=None):
    """A DiT's Config from its state dict's {key: shape}. num_heads only where the head size isn't Wan's 128."""
    dim, in_dim = shapes["patch_embedding.weight"][:2]
    image, camera = shapes.get("img_emb.proj.1.weight"), shapes.get("control_adapter.conv.weight")
    return Config(
        dim=dim, num_heads=num_heads or dim // 128, in_dim=in_dim,
        num_layers=len({k.split(".")[1] for k in shapes if k.startswith("blocks.")}),
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0], out_dim=shapes["head.head.weight"][0] // 4,
        freq_dim=shapes["time_embedding.0.weight"][1], text_dim=shapes["text_embedding.0.weight"][1],
        image_dim=image and image[1], camera_dim=camera and camera[1] // 64,
        camera_blocks=len({k.split(".")[2] for k in shapes if k.startswith("control_adapter.residual_blocks.")}),
        roce=any("rope_phase" in k for k in shapes))


def load_dit(path, *overlays, num_heads=None, device="cpu", dtype=torch.float32):
    """Official files -> DiT in eval mode."""
    state = {}
    for p in (path, *overlays):
        with safe_open(p, "pt") as f:
            state.update({k: f.get_tensor(k).to(device, dtype) for k in f.keys()})
    with torch.device("meta"):
        dit = DiT(config_from({k: tuple(x.shape) for k, x in state.items()}, num_heads))
    dit.load_state_dict(state, assign=True)
    return dit.eval()


# ---- what trains ----

def trainable(dit):
    """Freeze all but self-attention (q, k, v, o, their norms, RoCE); returns those parameters as a list."""
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
    return [parameter for parameter in dit.parameters() if parameter.requires_grad]
