"""The policy: a Wan2.1 video diffusion transformer that is told where its camera goes.

From the bottom up, as one would draw it. Module names are the official checkpoints' key names; the
keys say which of these a model is:
- Wan2.1 T2V (Wan Team, arXiv 2503.20314): text alone.
- ReDirector (Park et al., arXiv 2511.19827): appends the source video's tokens along frames, at the
  *same* positions as the target's. Camera maps become tokens, whose learned phases turn each head's
  height and width pairs (RoCE, rotary camera encoding).
- ReCamMaster (Bai et al., arXiv 2503.11647): appends the source as the frames *after* the target's;
  each block adds the target's poses to both halves.
Shapes: B rows; b conditions, the B/b rows of each being neighbours; F latent frames; N tokens;
D channels; H heads of P complex pairs each, D = 2 H P.
Precision: matrix products and attention run in the weights' type (bfloat16 or float32), all else in
float32. What trains may be kept in float32 beside a bfloat16 model: `linear` casts it in every
forward, and its gradients are float32.
"""
import functools
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as recompute

from plumbing.batch import Batch
from pretrained.weights import open_tensors, refuse_misfit, refuse_nan, refuse_prefix


def upcast(x):
    """x in at least float32, uncopied if it is already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- rotary angles ----

def camera_pairs(head_dim):
    """How many of a head's complex pairs are for height and width; the rest are for time."""
    return 2 * (head_dim // 6)


@functools.lru_cache(maxsize=16)
def rope_angles(frames, height, width, head_dim, device, dtype):
    """3-D rotary positions, theta 10000 -> (frames * height * width, P) radians."""
    pairs = camera_pairs(head_dim) // 2
    grid = (frames, height, width, -1)

    def angles(size, pairs):
        frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        return torch.arange(size, dtype=torch.float64)[:, None] * frequency

    with torch.inference_mode(False):  # cached, so it must stay usable under autograd
        f = angles(frames, head_dim // 2 - 2 * pairs)[:, None, None].expand(grid)
        h = angles(height, pairs)[:, None].expand(grid)
        w = angles(width, pairs).expand(grid)
        return torch.cat([f, h, w], -1).flatten(0, 2).to(device, dtype)


def rotate(x, angle, dtype):
    """Pairs (2i, 2i+1) of x (B, N, H, 2P) turned by angle (b or 1, N, H or 1, P) radians."""
    x = upcast(x).unflatten(0, (angle.shape[0], -1)).unflatten(-1, (-1, 2))  # (b, B/b, N, H, P, 2)
    cos = angle.cos()[:, None]  # (b, 1, N, H, P)
    sin = angle.sin()[:, None]
    if torch.compiler.is_compiling():  # real arithmetic, which fuses with what is around it
        real, imag = x.unbind(-1)
        turned = real * cos - imag * sin, real * sin + imag * cos
        x = torch.stack([part.to(dtype) for part in turned], -1)
    else:  # uncompiled: the same products in one complex64 kernel instead of seven real ones
        x = torch.view_as_real(torch.view_as_complex(x) * torch.complex(cos, sin)).to(dtype)
    return x.flatten(-2).flatten(0, 1)


# ---- attention ----

def linear(x, layer):
    """layer(x) in x's type, whatever type its weights are kept in."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def rms_norm(x, weight):
    """x (..., D) over the root mean square of all its channels (all heads at once), in float32."""
    x = upcast(x)
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * weight.to(x.dtype)


class Attention(nn.Module):
    """The projections that self- and cross-attention both have."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim)  # of which `rms_norm` uses the weights
        self.norm_k = nn.RMSNorm(dim)

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
        return F.pad(self.split(upcast(linear(camera, layer[1]))), (self.frame_pairs, 0))

    def forward(self, x, rope, camera):
        """x (B, N, D), rope (N, P), camera: SiLU of camera tokens (b, N, D) or None -> (B, N, D)"""
        q = self.split(rms_norm(linear(x, self.q), self.norm_q.weight))  # (B, N, H, 2P)
        k = self.split(rms_norm(linear(x, self.k), self.norm_k.weight))
        v = self.split(linear(x, self.v))
        angle = rope[None, :, None]  # (1, N, 1, P)
        if camera is not None:  # RoCE: a phase for queries and keys, one for values and output
            angle = angle + self.phase(camera, self.rope_phase_qk)  # (b, N, H, P)
            phase = self.phase(camera, self.rope_phase_vo)
            v = rotate(v, -phase, x.dtype)
        heads = (rotate(q, angle, x.dtype), rotate(k, angle, x.dtype), v)
        x = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in heads))  # (B, H, N, 2P)
        x = linear(x.transpose(1, 2).flatten(2), self.o)
        return x if camera is None else rotate(self.split(x), phase, x.dtype).flatten(2)


class CrossAttention(Attention):
    """Attention to text and, separately, to image tokens, summed before the projection."""
    def __init__(self, dim, heads, image):
        super().__init__(dim, heads)
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = nn.RMSNorm(dim)

    def keys_values(self, text, image):
        """Tokens (b, L, D) -> ((k, v),) of text, or with those of the image, (b, H, L, 2P) each."""
        pairs = [(rms_norm(self.k(text), self.norm_k.weight), self.v(text))]
        if image is not None:
            pairs.append((rms_norm(self.k_img(image), self.norm_k_img.weight), self.v_img(image)))
        heads = lambda x: self.split(x.to(text.dtype)).transpose(1, 2)
        return tuple((heads(k), heads(v)) for k, v in pairs)

    def forward(self, x, keys_values):
        """x (B, N, D), keys_values as above -> (B, N, D)"""
        q = rms_norm(self.q(x), self.norm_q.weight).to(x.dtype)
        b = len(keys_values[0][0])  # its rows share a condition's keys: (b, H, B/b N, 2P) queries
        q = q.reshape(b, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
        out = [F.scaled_dot_product_attention(q, k, v).transpose(1, 2) for k, v in keys_values]
        return self.o(sum(out[1:], out[0]).reshape(x.shape))


# ---- block ----

def mlp(dim_in, hidden, activation, dim_out):
    return nn.Sequential(nn.Linear(dim_in, hidden), activation, nn.Linear(hidden, dim_out))


def modulate(x, shift, scale, dtype):
    """LayerNorm without weights, scaled and shifted; shift and scale are (B or 1, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale).to(dtype)


def keep_attention(context, op, *args, **kwargs):
    """Of a checkpointed block, backward finds self-attention's result: a long video's main work."""
    policy = recompute.CheckpointPolicy
    kept = "scaled_dot_product" in str(op) and args[0].shape == args[1].shape  # as many q as k
    return policy.MUST_SAVE if kept else policy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward. The noise level modulates first and last."""
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.self_attn = SelfAttention(dim, config.num_heads, config.roce)
        if config.pose_dim is not None:
            self.cam_encoder = nn.Linear(config.pose_dim, dim)
            self.projector = nn.Linear(dim, dim)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.image_dim is not None)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = mlp(dim, config.ffn_dim, nn.GELU("tanh"), dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def attend(self, x, rope, camera):
        """Self-attention. ReCamMaster adds a frame's pose before it and a linear map after it."""
        if not hasattr(self, "cam_encoder"):
            return self.self_attn(x, rope, camera)
        pose = linear(camera, self.cam_encoder).to(x.dtype)  # (b, F, D), from float32 poses
        # target and source have the same poses: (b, B/b, 2, F, N/2F, D)
        frames = x.unflatten(1, (2, pose.shape[1], -1)).unflatten(0, (len(pose), -1))
        x = (frames + pose[:, None, None, :, None]).view_as(x)
        return linear(self.self_attn(x, rope, None), self.projector)

    def forward(self, x, e, rope, camera, keys_values, again=False):
        """x (B, N, D), e (B or 1, 6, D), rope (N, P), float32, camera as in Prepared -> (B, N, D),
        float32. again: gradient checkpointing, backward computes most of it again."""
        if again:  # inside what is compiled, which then recomputes only what backward needs
            keep = functools.partial(recompute.create_selective_checkpoint_contexts, keep_attention)
            return recompute.checkpoint(
                self.forward, x, e, rope, camera, keys_values, use_reentrant=False,
                preserve_rng_state=False, context_fn=keep)
        dtype = self.ffn[0].weight.dtype
        shift, scale, gate, shift2, scale2, gate2 = (e + self.modulation).unsqueeze(2).unbind(1)
        attended = self.attend(modulate(x, shift, scale, dtype), rope, camera)
        x = torch.addcmul(x, gate, upcast(attended))
        x = x + self.cross_attn(self.norm3(x.to(dtype)), keys_values)
        return torch.addcmul(x, gate2, upcast(self.ffn(modulate(x, shift2, scale2, dtype))))


# ---- conditions ----

@dataclass
class Condition(Batch):
    """What the policy is conditioned on: text, and what else its Config says."""
    text: torch.Tensor                  # (b, L, 4096) text embedding, zero beyond the caption
    image: torch.Tensor | None = None   # (b, 257, 1280) CLIP tokens of the source's first frame
    source: torch.Tensor | None = None  # (b, 16, F, h, w) normalised latents of the source video
    # paths as Pluecker maps (b, 24, F, 8h, 8w); ReCamMaster: the target's poses (b, F, 12) alone
    camera: torch.Tensor | None = None
    source_camera: torch.Tensor | None = None


@dataclass
class Prepared(Batch):
    """What of a forward pass depends on neither x nor t, nor on what trains: computed once."""
    text: tuple                  # per block (k, v) of text and, if any, image, (b, H, L, 2P) each
    target: torch.Tensor | None  # (b, N, D) camera tokens, added to the target's tokens
    source: torch.Tensor | None  # (b, N, D) the source video's tokens
    camera: torch.Tensor | None  # (b, 2N, D) SiLU of both paths' camera tokens, for RoCE; or poses
    grid: tuple | None           # latent frames, height, width it was made for; None: any


# ---- model ----

@dataclass
class Config:
    """A DiT's shape. Optional parts default to absent."""
    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_dim: int = 32               # ReDirector's; 16: Wan T2V's and ReCamMaster's
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    image_dim: int | None = None   # width of CLIP tokens: 1280
    camera_dim: int | None = None  # channels of a packed Pluecker map: 24
    camera_blocks: int = 1         # residual blocks of the camera adapter
    roce: bool = False             # ReDirector's rotary camera encoding
    pose_dim: int | None = None    # numbers of a frame's pose: ReCamMaster's 12


class ResidualBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

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
        """(B, N, D), e (B or 1, D) -> (B, N, 4 out_dim). In float32, since log-probs hang on it."""
        shift, scale = (e[:, None] + self.modulation).unsqueeze(2).unbind(1)
        return linear(modulate(x, shift, scale, x.dtype), self.head)


class DiT(nn.Module):
    """velocity = dit(x, t, condition), see forward. Starts from Wan's initialisation."""
    def __init__(self, config):
        super().__init__()
        check_config(config)
        dim = config.dim
        self.config = config
        self.head_dim = dim // config.num_heads
        self.takes_poses = config.pose_dim is not None  # ReCamMaster
        self.takes_source = self.takes_poses or config.in_dim == 2 * config.out_dim  # else T2V
        self.checkpoint = False  # gradient checkpointing: recompute blocks, see keep_attention
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
            if name.endswith("bias") or name == "head.head.weight":
                nn.init.zeros_(p)  # the model starts at velocity 0,
            elif "rope_phase" in name or "cam_encoder" in name:
                nn.init.zeros_(p)  # with cameras that change nothing
            elif "projector" in name:
                nn.init.eye_(p)
            elif name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1 and "modulation" not in name:
                nn.init.xavier_uniform_(p.data.flatten(1))

    def compile(self, **options):
        """torch.compile the blocks, which share one graph."""
        torch._dynamo.config.optimize_ddp = False  # DDP communicates between blocks anyway
        torch._dynamo.config.recompile_limit = 64  # one row or many, gradient or not: 7 as a rule
        for block in self.blocks:
            block.compile(**options)

    def tokens(self, x):
        """Patch embedding, (B, C, F, h, w) -> (B, N, D). Channels that x lacks count as zeros."""
        weight = self.patch_embedding.weight[:, :x.shape[1]].flatten(1)
        x = x.to(weight.dtype).unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)  # (B, F h/2 w/2, C 2 2)
        return F.linear(x, weight, self.patch_embedding.bias)

    def time(self, t):
        """t (B,) in [0, 1] -> e (B, D) and the six modulation vectors (B, 6, D), float32."""
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
        thousands = 1000 * upcast(t)  # in t's own type, so that 0.517 gives 517
        angle = thousands.double()[:, None] * frequency
        e = torch.cat([angle.cos(), angle.sin()], 1)
        e = e.to(torch.promote_types(self.patch_embedding.weight.dtype, torch.float32))
        e = linear(F.silu(linear(e, self.time_embedding[0])), self.time_embedding[2])
        return e, linear(F.silu(e), self.time_projection[1]).unflatten(1, (6, -1))

    def prepare(self, condition):
        """Condition -> Prepared, which forward takes as well: same result, same gradients of what
        trains. ValueError unless the condition fits this model."""
        check_condition(self, condition)
        c = condition.to(self.patch_embedding.weight.dtype)
        text = self.text_embedding(c.text)
        image = None if c.image is None else self.img_emb.proj(c.image)
        keys_values = tuple(block.cross_attn.keys_values(text, image) for block in self.blocks)
        grid = target = source = camera = None
        if c.source is not None:
            grid = tuple(c.source.shape[2:])
            source = self.tokens(c.source)
        if self.takes_poses:  # in float32: bfloat16 would move the camera by millimetres
            camera = condition.camera.to(torch.promote_types(c.text.dtype, torch.float32))
        elif c.camera is not None:
            grid = c.camera.shape[2], c.camera.shape[3] // 8, c.camera.shape[4] // 8
            both = [self.control_adapter(x) for x in (c.camera, c.source_camera) if x is not None]
            target = both[0]
            source = None if source is None else source + both[1]
            camera = F.silu(torch.cat(both, 1)) if self.config.roce else None
        return Prepared(keys_values, target, source, camera, grid)

    def forward(self, x, t, condition):
        """Velocity eps - x_0 (B, 16, F, h, w) of noisy latents x at noise level t, (B,) or 0-dim in
        [0, 1]. condition: Condition or Prepared of b conditions, b dividing B. Row r of x has
        condition r // (B/b). ValueError where shapes disagree, before any heavy work."""
        c = condition if isinstance(condition, Prepared) else self.prepare(condition)
        check_input(self, x, t, c)
        rows, _, frames, height, width = x.shape
        e, modulation = self.time(t.reshape(-1))
        tokens = upcast(self.tokens(x)).unflatten(0, (len(c), -1))  # (b, B/b, N, D)
        n = tokens.shape[2]
        times = 2 * frames if self.takes_poses else frames  # ReCamMaster: the source comes after
        rope = rope_angles(times, height // 2, width // 2, self.head_dim, x.device, e.dtype)
        if c.target is not None:
            tokens = tokens + c.target[:, None]
        if c.source is not None:
            tokens = torch.cat([tokens, c.source[:, None].expand_as(tokens)], 2)
            rope = rope if self.takes_poses else rope.repeat(2, 1)  # ReDirector: same positions
        tokens = tokens.flatten(0, 1)
        again = self.checkpoint and torch.is_grad_enabled()
        for block, keys_values in zip(self.blocks, c.text):
            tokens = block(tokens, modulation, rope, c.camera, keys_values, again)
        v = self.head(tokens[:, :n], e)  # of the target (B, N, 4 C): patch row, column, channel
        v = v.reshape(rows, frames, height // 2, width // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return v.reshape(rows, -1, frames, height, width).to(x.dtype)


# ---- loading ----

def config_from(shapes, num_heads=None):
    """A DiT's Config from its state dict's {key: shape}. num_heads: only where the head size isn't
    Wan's 128. ValueError if the keys are not a Wan DiT's."""
    def size(part, axis):  # of most such keys, so that a single wrong shape is reported as wrong
        sizes = [shape[axis] for key, shape in shapes.items() if part in key and len(shape) > axis]
        return statistics.mode(sizes) if sizes else None

    def count(prefix):
        return len({key[len(prefix):].split(".")[0] for key in shapes if key.startswith(prefix)})

    needed = {"dim": size(".norm", 0), "ffn_dim": size(".ffn.0.", 0),
              "in_dim": size("patch_embedding.weight", 1), "out_dim": size("head.head.", 0),
              "text_dim": size("text_embedding.0.weight", 1),
              "freq_dim": size("time_embedding.0.weight", 1)}
    unknown = [name for name, n in needed.items() if n is None]
    if unknown:
        raise ValueError(f"not a Wan DiT: no {', '.join(unknown)} in {sorted(shapes)[:3]} ...")
    if not num_heads and needed["dim"] % 128:
        raise ValueError(f"dim {needed['dim']} is not heads of 128: give num_heads")
    needed["out_dim"] //= 4  # a patch has four
    camera = size("control_adapter.conv.weight", 1)
    return Config(
        **needed, num_heads=num_heads or needed["dim"] // 128, num_layers=count("blocks."),
        image_dim=size("img_emb.proj.1.", 0), camera_dim=camera and camera // 64,
        camera_blocks=count("control_adapter.residual_blocks."),
        roce=any("rope_phase" in key for key in shapes), pose_dim=size(".cam_encoder.weight", 1))


def load_dit(path, *overlays, num_heads=None, device="cpu", dtype=torch.float32,
             trained_dtype=None):
    """Official files, by their own key names -> DiT in eval mode.
    path: a whole DiT (Wan T2V, Fun-Control-Camera, ReCamMaster), .safetensors or .ckpt.
    overlays: laid over it in order, each with any of its keys, or all of those that a method adds:
    ReDirector's file, our checkpoints. num_heads: where the head size isn't 128. dtype: bfloat16 or
    float32. trained_dtype: of what trains, if another (float32 beside bfloat16).
    ValueError naming the file whose keys do not fit, or hold NaN; FileNotFoundError."""
    files = {str(p): open_tensors(p) for p in (path, *overlays)}
    for file, (shapes, _) in files.items():
        refuse_prefix(file, shapes, ("blocks.", "patch_embedding."))
    base = files[str(path)][0]
    blocks = {key.split(".")[1] for key in base if key.startswith("blocks.")}
    added = {key: shape for shapes, _ in files.values() for key, shape in shapes.items()
             if any(part in key for part in ADDS) and key.split(".")[1] in blocks}
    try:
        config = config_from({**base, **added}, num_heads)
        with torch.device("meta"):
            dit = DiT(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = {key: tuple(x.shape) for key, x in dit.state_dict().items()}
    what = f"a DiT of {config.num_layers} blocks of width {config.dim}"
    missing = {str(path): [key for key in expected if key not in base and key not in added]}
    for file, (shapes, _) in files.items():
        refuse_misfit(file, shapes, expected, missing.get(file, ()), what)
    state = {}
    for key in expected:
        file, read = [(file, read) for file, (shapes, read) in files.items() if key in shapes][-1]
        kind = trained_dtype if trained_dtype and trains(key) else dtype
        state[key] = read(key).detach().to(device, kind, copy=True)
        refuse_nan(file, key, state[key])
    dit.load_state_dict(state, assign=True)
    return dit.eval()


# ---- what trains ----

ADDS = (".rope_phase", ".cam_encoder.", ".projector.")  # what ReDirector and ReCamMaster add to Wan


def trains(name):
    """Whether a parameter trains: self-attention's q, k, v, o and norms, and what a method adds."""
    return any(part in name for part in (".self_attn.", *ADDS))


def trainable(dit):
    """Freeze all but what trains; return that as a list of parameters."""
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(trains(name))
    return [parameter for parameter in dit.parameters() if parameter.requires_grad]


# ---- checks: ValueError in one line ----

def check_config(c):
    """Whether a DiT's parts go together."""
    if c.num_heads < 1 or c.dim % (2 * c.num_heads):
        raise ValueError(f"dim {c.dim} is not {c.num_heads} heads of pairs: give num_heads")
    if c.roce and not c.camera_dim:
        raise ValueError("rope_phase (ReDirector) needs a base with control_adapter, found none")
    if c.pose_dim not in (None, 12):
        raise ValueError(f"cam_encoder takes {c.pose_dim} numbers a frame, ReCamMaster's takes 12")
    if c.pose_dim and (c.camera_dim or c.in_dim != c.out_dim):
        raise ValueError(f"cam_encoder (ReCamMaster) needs Wan T2V, found in_dim {c.in_dim}")


def check_condition(dit, c):
    """Whether a Condition has what the model takes, in shapes that agree."""
    def expect(name, shape):  # None or False: absent; None in a shape: any size
        x = getattr(c, name)
        if (x is None) == bool(shape):
            needs = "needs it" if shape else "takes none"
            raise ValueError(f"condition.{name}: this model {needs}")
        if shape and (x.ndim != len(shape) or any(n and n != k for n, k in zip(shape, x.shape))):
            wanted = ", ".join(str(n or "any") for n in shape)
            raise ValueError(f"condition.{name} is {tuple(x.shape)}, expected ({wanted})")

    config = dit.config
    b = len(c)
    source = dit.takes_poses or c.source is not None
    expect("text", (b, None, config.text_dim))
    expect("image", config.image_dim and (b, None, config.image_dim))
    expect("source", source and dit.takes_source and (b, config.out_dim, None, None, None))
    frames, height, width = c.source.shape[2:] if source else (None, 0, 0)
    maps = config.camera_dim and (b, config.camera_dim, frames, 8 * height, 8 * width)
    expect("camera", (b, frames, config.pose_dim) if dit.takes_poses else maps)
    expect("source_camera", maps and source and c.camera.shape)
    if maps and (c.camera.shape[3] % 16 or c.camera.shape[4] % 16):
        raise ValueError(f"condition.camera is {tuple(c.camera.shape)}: size no multiple of 16")
    if height % 2 or width % 2:
        raise ValueError(f"condition.source is {tuple(c.source.shape)}: size no multiple of 2")


def check_input(dit, x, t, prepared):
    """Whether x and t fit the model and what was prepared for them."""
    if x.ndim != 5 or x.shape[3] % 2 or x.shape[4] % 2:
        raise ValueError(f"x is {tuple(x.shape)}, expected (B, C, F, h, w), h and w even")
    rows, channels, *grid = x.shape
    if rows % len(prepared) or t.numel() not in (1, rows):
        raise ValueError(f"{rows} rows of x, {len(prepared)} conditions, {t.numel()} noise levels")
    wanted = dit.config.in_dim if prepared.source is None else dit.config.out_dim
    wanted = (wanted, *(prepared.grid or grid))
    if (channels, *grid) != wanted:
        raise ValueError(f"x has channels, frames, height, width {(channels, *grid)}, "
                         f"expected {wanted}")
