"""The policy: a Wan2.1 video diffusion transformer with ReDirector's camera conditioning.

From the bottom up, as one would draw it: rotary angles, attention, block, conditions, model, loading, what
trains. Module names are the official checkpoints' key names.
Sources: Wan2.1 (Wan Team, arXiv 2503.20314); ReDirector (Park et al., arXiv 2511.19827), which appends the
source video's tokens along frames, at the *same* positions as the target's, and turns each head's height and
width pairs by learned per-token camera phases (RoCE, rotary camera encoding).
Shapes: B rows; b conditions, the B/b rows of each being neighbours; F latent frames; N tokens; D channels;
H heads of P complex pairs each, D = 2 H P.
Precision: matrix products and attention run in the weights' type (bfloat16 or float32); the residual stream,
norms, modulation, rotations, time embedding and head in float32 ("wide"). What trains may be kept in float32
beside a bfloat16 model: `linear` casts it in every forward, and its gradients are float32.
"""
import dataclasses
import functools
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def wide(x):
    """x in at least float32: for norms, modulation and rotations. Nothing is copied if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- rotary angles ----

def camera_pairs(head_dim):
    """Complex pairs of a head for height and width, to which RoCE adds its phases; the rest are for time."""
    return 2 * (head_dim // 6)


@functools.lru_cache(maxsize=16)
def rope_angles(frames, height, width, head_dim, device, dtype):
    """3-D rotary positions (frames * height * width, P), radians, theta 10000: time, height, width pairs."""
    pairs = camera_pairs(head_dim) // 2
    with torch.inference_mode(False):  # cached, so it must stay usable under autograd
        count = functools.partial(torch.arange, dtype=torch.float64)
        f, h, w = (count(size)[:, None] * 10000.0 ** (-count(n) / n)
                   for size, n in ((frames, head_dim // 2 - 2 * pairs), (height, pairs), (width, pairs)))
        grid = (frames, height, width, -1)
        angles = torch.cat([f[:, None, None].expand(grid), h[:, None].expand(grid), w.expand(grid)], -1)
        return angles.flatten(0, 2).to(device, dtype)


def rotate(x, angle, dtype):
    """Turn the interleaved pairs (2i, 2i+1) of x (B, N, H, 2P) by angle (b or 1, N, H or 1, P) radians ->
    (B, N, H, 2P) in dtype; the arithmetic is wide."""
    x = wide(x).unflatten(0, (angle.shape[0], -1)).unflatten(-1, (-1, 2))  # (b, B/b, N, H, P, 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    if torch.compiler.is_compiling():  # real arithmetic, which fuses with what is around it
        real, imag = x.unbind(-1)
        x = torch.stack(((real * cos - imag * sin).to(dtype), (real * sin + imag * cos).to(dtype)), -1)
    else:  # uncompiled: the same products in one complex64 kernel instead of seven real ones
        x = torch.view_as_real(torch.view_as_complex(x) * torch.complex(cos, sin)).to(dtype)
    return x.flatten(-2).flatten(0, 1)


# ---- attention ----

def linear(x, layer):
    """layer(x) in x's type, whatever type its weights are kept in."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def rms_norm(x, weight):
    """x (..., D) over the root mean square of all its channels (all heads at once), in float32."""
    x = wide(x)
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * weight.to(x.dtype)


class Attention(nn.Module):
    """The projections that both kinds have."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)  # rms_norm uses their weights

    def split(self, x):
        """(B, N, D) -> (B, N, H, 2P)"""
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    """Self-attention with rotary positions and RoCE: the part that the RL stage trains."""
    def __init__(self, dim, heads, roce):
        super().__init__(dim, heads)
        self.frame_pairs = dim // heads // 2 - camera_pairs(dim // heads)
        if roce:
            phases = heads * camera_pairs(dim // heads)
            self.rope_phase_qk = nn.Sequential(nn.SiLU(), nn.Linear(dim, phases, bias=False))
            self.rope_phase_vo = nn.Sequential(nn.SiLU(), nn.Linear(dim, phases, bias=False))

    def phase(self, camera, layer):
        """SiLU of camera tokens (b, N, D) -> (b, N, H, P) radians, zero for the time pairs."""
        return F.pad(self.split(wide(linear(camera, layer[1]))), (self.frame_pairs, 0))

    def forward(self, x, rope, camera):
        q = self.split(rms_norm(linear(x, self.q), self.norm_q.weight))
        k = self.split(rms_norm(linear(x, self.k), self.norm_k.weight))
        v, angle = self.split(linear(x, self.v)), rope[None, :, None]  # (B, N, H, 2P), (1, N, 1, P)
        if camera is not None:
            angle = angle + self.phase(camera, self.rope_phase_qk)  # (b, N, H, P)
            phase = self.phase(camera, self.rope_phase_vo)
            v = rotate(v, -phase, x.dtype)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, angle, x.dtype), rotate(k, angle, x.dtype), v))
        x = linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), self.o)
        return x if camera is None else rotate(self.split(x), phase, x.dtype).flatten(2)


class CrossAttention(Attention):
    """Attention to text and, separately, to image tokens, summed before the projection."""
    def __init__(self, dim, heads, image):
        super().__init__(dim, heads)
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = nn.RMSNorm(dim)

    def keys_values(self, text, image):
        """Text and image tokens (b, L, D) -> ((k, v),) or ((k, v), (k_img, v_img)), each (b, H, L, 2P)."""
        pairs = [(rms_norm(self.k(text), self.norm_k.weight), self.v(text))]
        if image is not None:
            pairs.append((rms_norm(self.k_img(image), self.norm_k_img.weight), self.v_img(image)))
        return tuple(tuple(self.split(x.to(text.dtype)).transpose(1, 2) for x in pair) for pair in pairs)

    def forward(self, x, keys_values):
        q = rms_norm(self.q(x), self.norm_q.weight).to(x.dtype)
        # the rows of a condition share its keys, so they are queries of one sequence: (b, H, B/b N, 2P)
        q = q.reshape(len(keys_values[0][0]), -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
        out = [F.scaled_dot_product_attention(q, k, v).transpose(1, 2) for k, v in keys_values]
        return self.o(sum(out[1:], out[0]).reshape(x.shape))


# ---- block ----

def mlp(dim_in, hidden, activation, dim_out):
    return nn.Sequential(nn.Linear(dim_in, hidden), activation, nn.Linear(hidden, dim_out))


def modulate(x, shift, scale, dtype):
    """LayerNorm without weights, scaled and shifted: x (B, N, D), shift and scale (B or 1, 1, D), wide."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale).to(dtype)


def keep_attention(context, op, *args, **kwargs):
    """What a checkpointed block keeps for backward: self-attention's result, most of a long video's work."""
    kept = "scaled_dot_product" in str(op) and args[0].shape == args[1].shape  # as many queries as keys
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated by the noise level."""
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.self_attn = SelfAttention(dim, config.num_heads, config.roce)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.image_dim is not None)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = mlp(dim, config.ffn_dim, nn.GELU("tanh"), dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def forward(self, x, e, rope, camera, keys_values, recompute=False):
        """x (B, N, D), e (B or 1, 6, D), rope (N, P), wide; camera (b, N, D) or None -> (B, N, D), wide.
        recompute: gradient checkpointing, for one backward pass."""
        if recompute:  # inside what is compiled, which then recomputes only what backward needs
            keep = functools.partial(create_selective_checkpoint_contexts, keep_attention)
            return checkpoint(self.forward, x, e, rope, camera, keys_values, use_reentrant=False,
                              preserve_rng_state=False, context_fn=keep)
        dtype = self.ffn[0].weight.dtype
        shift, scale, gate, shift2, scale2, gate2 = (e + self.modulation).unsqueeze(2).unbind(1)
        x = torch.addcmul(x, gate, wide(self.self_attn(modulate(x, shift, scale, dtype), rope, camera)))
        x = x + self.cross_attn(self.norm3(x.to(dtype)), keys_values)
        return torch.addcmul(x, gate2, wide(self.ffn(modulate(x, shift2, scale2, dtype))))


# ---- conditions ----

def tree_map(f, *trees):
    """f on corresponding tensors of nested tuples; None and numbers are passed through."""
    if isinstance(trees[0], tuple):
        return tuple(tree_map(f, *branches) for branches in zip(*trees, strict=True))
    if any((tree is None) != (trees[0] is None) for tree in trees):
        raise ValueError("conditions to be joined must all have the same parts")
    return f(*trees) if torch.is_tensor(trees[0]) else trees[0]


class Batch:
    """A dataclass of tensors, batch first, that slices (batch[i:j]), concatenates and moves as one."""
    def map(self, f, *others):
        trees = [tuple(getattr(x, field.name) for field in dataclasses.fields(self)) for x in (self, *others)]
        return type(self)(*tree_map(f, *trees))

    @classmethod
    def cat(cls, batches):
        return batches[0].map(lambda *tensors: torch.cat(tensors), *batches[1:])

    def __getitem__(self, rows):
        return self.map(lambda x: x[rows])

    def to(self, *args, **kwargs):
        return self.map(lambda x: x.to(*args, **kwargs))

    def __len__(self):
        text = self.text
        while isinstance(text, tuple):
            text = text[0]
        return len(text)


@dataclass
class Condition(Batch):
    """What the policy is conditioned on. Which parts a model takes, its Config says."""
    text: torch.Tensor                          # (b, L, 4096) text encoder's output, zero beyond the caption
    image: torch.Tensor | None = None           # (b, 257, 1280) CLIP tokens of the source's first frame
    source: torch.Tensor | None = None          # (b, 16, F, h, w) normalised latents of the source video
    camera: torch.Tensor | None = None          # (b, 24, F, 8h, 8w) packed Pluecker maps of the target path
    source_camera: torch.Tensor | None = None   # (b, 24, F, 8h, 8w) and of the source's


@dataclass
class Prepared(Batch):
    """What follows from a Condition whatever x and t are, through weights that the RL stage leaves frozen."""
    text: tuple                   # per block (k, v) of the text and, if any, of the image, (b, H, L, 2P) each
    target: torch.Tensor | None   # (b, N, D) camera tokens, added to the target's tokens
    source: torch.Tensor | None   # (b, N, D) the source video's tokens
    camera: torch.Tensor | None   # (b, 2N, D) SiLU of target's and source's camera tokens: what RoCE reads
    grid: tuple | None            # latent frames, height, width it was made for; None: any


# ---- model ----

@dataclass
class Config:
    """A DiT's shape. Optional parts default to absent; in_dim 16 is plain T2V, 32 takes a source video."""
    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_dim: int = 32
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    image_dim: int | None = None      # width of CLIP tokens: 1280
    camera_dim: int | None = None     # channels of a packed Pluecker map: 24
    camera_blocks: int = 1            # residual blocks of the camera adapter
    roce: bool = False                # ReDirector's rotary camera encoding


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
        x = F.pixel_unshuffle(maps.transpose(1, 2).flatten(0, 1), 8)
        x = self.residual_blocks(self.conv(x))  # (b F, D, h/2, w/2)
        return x.unflatten(0, (len(maps), -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)


class Head(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.head = nn.Linear(dim, out_dim * 4)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)

    def forward(self, x, e):
        """(B, N, D), e (B or 1, D) -> (B, N, 4 out_dim), all wide: it is cheap, and log-probs hang on it."""
        shift, scale = (e[:, None] + self.modulation).unsqueeze(2).unbind(1)
        return linear(modulate(x, shift, scale, x.dtype), self.head)


class DiT(nn.Module):
    """velocity = dit(x, t, condition), see forward. Starts from Wan's initialisation; load_dit fills it."""
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        if config.num_heads < 1 or dim % (2 * config.num_heads):
            raise ValueError(f"dim {dim} is not {config.num_heads} heads of pairs: give num_heads")
        self.config, self.head_dim = config, dim // config.num_heads
        self.takes_source = config.in_dim == 2 * config.out_dim  # along frames, with zero channels
        self.checkpoint = False  # gradient checkpointing: backward recomputes blocks, see keep_attention
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = mlp(config.text_dim, dim, nn.GELU("tanh"), dim)
        self.time_embedding = mlp(config.freq_dim, dim, nn.SiLU(), dim)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.image_dim is not None:
            layers = mlp(config.image_dim, config.image_dim, nn.GELU(), dim)
            proj = nn.Sequential(nn.LayerNorm(config.image_dim), *layers, nn.LayerNorm(dim))
            self.img_emb = nn.ModuleDict({"proj": proj})
        if config.camera_dim is not None:
            self.control_adapter = CameraAdapter(config.camera_dim, dim, config.camera_blocks)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim)
        for name, p in self.named_parameters():
            if name.endswith("bias") or "rope_phase" in name or name == "head.head.weight":
                nn.init.zeros_(p)  # RoCE starts at phase 0, the model at velocity 0
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1 and "modulation" not in name:
                nn.init.xavier_uniform_(p.data.flatten(1))

    def compile(self, **options):
        """torch.compile the blocks, which share one graph."""
        torch._dynamo.config.optimize_ddp = False  # would cut blocks up; DDP communicates between them anyway
        torch._dynamo.config.recompile_limit = 64  # one row or many, with gradient or not, ...: 7 as a rule
        for block in self.blocks:
            block.compile(**options)

    def tokens(self, x):
        """Patch embedding, (B, C, F, h, w) -> (B, N, D); channels that x lacks of in_dim count as zeros."""
        weight = self.patch_embedding.weight[:, :x.shape[1]].flatten(1)
        x = x.to(weight.dtype).unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # (B, C, F, h/2, 2, w/2, 2)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(x, weight, self.patch_embedding.bias)

    def time(self, t):
        """t (B,) in [0, 1] -> e (B, D) and the six modulation vectors (B, 6, D), float32."""
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = (1000 * wide(t)).double()[:, None] * frequency  # 1000 t in t's type: 0.517 gives 517
        e = torch.cat([angle.cos(), angle.sin()], 1)
        e = e.to(torch.promote_types(self.patch_embedding.weight.dtype, torch.float32))
        e = linear(F.silu(linear(e, self.time_embedding[0])), self.time_embedding[2])
        return e, linear(F.silu(e), self.time_projection[1]).unflatten(1, (6, -1))

    def check(self, c):
        """ValueError unless the condition has what this model takes, in shapes that agree."""
        def expect(name, shape):  # None or False: absent; None in a shape: any size
            x = getattr(c, name)
            if (x is None) == bool(shape):
                raise ValueError(f"condition.{name}: this model {'needs it' if shape else 'takes none'}")
            if shape and (x.ndim != len(shape) or any(n and n != k for n, k in zip(shape, x.shape))):
                wanted = ", ".join(str(n or "any") for n in shape)
                raise ValueError(f"condition.{name} is {tuple(x.shape)}, expected ({wanted})")

        config, b = self.config, len(c)
        source = c.source is not None
        expect("text", (b, None, config.text_dim))
        expect("image", config.image_dim and (b, None, config.image_dim))
        expect("source", source and self.takes_source and (b, config.out_dim, None, None, None))
        frames, height, width = c.source.shape[2:] if source else (None, 0, 0)
        expect("camera", config.camera_dim and (b, config.camera_dim, frames, 8 * height, 8 * width))
        expect("source_camera", config.camera_dim and source and c.camera.shape)
        if c.camera is not None and (c.camera.shape[3] % 16 or c.camera.shape[4] % 16):
            raise ValueError(f"condition.camera is {tuple(c.camera.shape)}: size no multiple of 16")

    def prepare(self, condition):
        """Condition -> Prepared, made once and given to forward in the condition's place: same result, same
        gradients of what `trainable` returns. Raises ValueError as `check` does."""
        self.check(condition)
        c = condition.to(self.patch_embedding.weight.dtype)
        text, image = self.text_embedding(c.text), None if c.image is None else self.img_emb.proj(c.image)
        keys_values = tuple(block.cross_attn.keys_values(text, image) for block in self.blocks)
        grid = target = source = camera = None
        if c.source is not None:
            grid, source = tuple(c.source.shape[2:]), self.tokens(c.source)
        if c.camera is not None:
            grid = c.camera.shape[2], c.camera.shape[3] // 8, c.camera.shape[4] // 8
            both = [self.control_adapter(x) for x in (c.camera, c.source_camera) if x is not None]
            target, source = both[0], None if source is None else source + both[1]
            camera = F.silu(torch.cat(both, 1)) if self.config.roce else None
        return Prepared(keys_values, target, source, camera, grid)

    def forward(self, x, t, condition):
        """Velocity eps - x_0 of noisy latents x (B, 16, F, h, w) at noise level t, (B,) or 0-dim in [0, 1].
        condition: Condition or Prepared of b conditions, b dividing B; row r of x has condition r // (B/b).
        Raises ValueError where shapes disagree, before any heavy work."""
        if x.ndim != 5 or x.shape[3] % 2 or x.shape[4] % 2:
            raise ValueError(f"x is {tuple(x.shape)}, expected (B, C, F, h, w), h and w even")
        rows, channels, *grid = x.shape
        if rows % len(condition) or t.numel() not in (1, rows):
            raise ValueError(f"{rows} rows of x, {len(condition)} conditions, {t.numel()} noise levels")
        c = condition if isinstance(condition, Prepared) else self.prepare(condition)
        wanted = (self.config.in_dim if c.source is None else self.config.out_dim, *(c.grid or grid))
        if (channels, *grid) != wanted:
            raise ValueError(f"x has channels, frames, height, width {(channels, *grid)}, expected {wanted}")
        e, modulation = self.time(t.reshape(-1))
        tokens = wide(self.tokens(x)).unflatten(0, (len(condition), -1))  # (b, B/b, N, D)
        n = tokens.shape[2]
        rope = rope_angles(grid[0], grid[1] // 2, grid[2] // 2, self.head_dim, x.device, e.dtype)
        if c.target is not None:
            tokens = tokens + c.target[:, None]
        if c.source is not None:  # at the same positions
            tokens = torch.cat([tokens, c.source[:, None].expand_as(tokens)], 2)
            rope = rope.repeat(2, 1)
        tokens, recompute = tokens.flatten(0, 1), self.checkpoint and torch.is_grad_enabled()
        for block, keys_values in zip(self.blocks, c.text):
            tokens = block(tokens, modulation, rope, c.camera, keys_values, recompute)
        v = self.head(tokens[:, :n], e)  # target half only: (B, N, 4 C), a patch's rows, columns, channels
        v = v.reshape(rows, grid[0], grid[1] // 2, grid[2] // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return v.reshape(rows, -1, *grid).to(x.dtype)


# ---- loading ----

def config_from(shapes, num_heads=None):
    """A DiT's Config from its state dict's {key: shape}; num_heads only where the head size isn't Wan's 128.
    Raises ValueError if the keys are not a Wan DiT's."""
    def size(part, axis):  # as most such keys have it: then a single wrong shape is reported as wrong
        sizes = [shape[axis] for key, shape in shapes.items() if part in key and len(shape) > axis]
        return statistics.mode(sizes) if sizes else None

    def count(prefix):
        return len({key[len(prefix):].split(".")[0] for key in shapes if key.startswith(prefix)})

    needed = {"dim": size(".norm", 0), "ffn_dim": size(".ffn.0.", 0), "out_dim": size("head.head.", 0),
              "in_dim": size("patch_embedding.weight", 1), "text_dim": size("text_embedding.0.weight", 1),
              "freq_dim": size("time_embedding.0.weight", 1)}
    if None in needed.values():
        unknown = [name for name, n in needed.items() if n is None]
        raise ValueError(f"not a Wan DiT: {', '.join(unknown)} cannot be told from {sorted(shapes)[:3]} ...")
    if not num_heads and needed["dim"] % 128:
        raise ValueError(f"dim {needed['dim']} is not heads of 128: give num_heads")
    needed["out_dim"] //= 4  # a patch has four
    camera = size("control_adapter.conv.weight", 1)
    return Config(**needed, num_heads=num_heads or needed["dim"] // 128, num_layers=count("blocks."),
                  image_dim=size("img_emb.proj.1.", 0), camera_dim=camera and camera // 64,
                  camera_blocks=count("control_adapter.residual_blocks."),
                  roce=any("rope_phase" in key for key in shapes))


FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def read_shapes(path):
    """{key: shape} of a safetensors file, from its header. ValueError if cut off, foreign, not floats."""
    try:
        with safe_open(path, "pt") as f:
            slices = {key: f.get_slice(key) for key in f.keys()}
            strange = [f"{k} ({x.get_dtype()})" for k, x in slices.items() if x.get_dtype() not in FLOATS]
            shapes = {key: tuple(x.get_shape()) for key, x in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    if strange:
        raise ValueError(f"{path}: expected types {', '.join(FLOATS)}, found {', '.join(strange)}")
    return shapes


def load_dit(path, *overlays, num_heads=None, device="cpu", dtype=torch.float32, trained_dtype=None):
    """Official safetensors files, by their own key names -> DiT in eval mode.
    path: a Wan2.1 DiT (T2V, Fun-Control-Camera). overlays: laid over it in order, each with any of its keys,
    or RoCE's for all blocks: ReDirector's file, our checkpoints. num_heads: where the head size isn't 128.
    dtype: bfloat16 or float32. trained_dtype: self-attention's, if another (float32 beside bfloat16).
    Raises ValueError listing every unexpected, missing and wrongly shaped key; FileNotFoundError."""
    files = {str(p): read_shapes(p) for p in (path, *overlays)}
    base = files[str(path)]
    roce = {key: shape for shapes in files.values() for key, shape in shapes.items() if "rope_phase" in key}
    try:
        config = config_from({**base, **roce}, num_heads)
        with torch.device("meta"):
            dit = DiT(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = {key: tuple(x.shape) for key, x in dit.state_dict().items()}
    wrong = [f"missing {key}" for key in expected if key not in base and key not in roce]
    for file, shapes in files.items():
        wrong += [f"unexpected {key} in {file}" for key in shapes if key not in expected]
        wrong += [f"{key} is {shape} in {file}, expected {expected[key]}"
                  for key, shape in shapes.items() if expected.get(key, shape) != shape]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} keys do not fit {config}: " + "; ".join(wrong))
    state = {}
    for key in expected:
        file = [file for file, shapes in files.items() if key in shapes][-1]
        with safe_open(file, "pt") as f:  # anew for every key: closing it gives the mapped memory back
            kind = trained_dtype if trained_dtype and ".self_attn." in key else dtype
            state[key] = f.get_tensor(key).to(device, kind, copy=True)
    dit.load_state_dict(state, assign=True)
    return dit.eval()


# ---- what trains ----

def trainable(dit):
    """Freeze all but self-attention (q, k, v, o, their norms, RoCE); return its parameters as a list."""
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
    return [parameter for parameter in dit.parameters() if parameter.requires_grad]
