"""The codec: Wan2.1's causal 3-D VAE, video <-> latents 8x smaller in space and 4x in time.

Causal: a frame depends on no later one, so a video passes through in chunks (the first frame alone,
then four by four, one latent frame each) and every convolution keeps the last frames it saw as
context for the next chunk. The result is that of the video in one piece; the memory does not depend
on the number of frames. Inference only. Architecture and weights: Wan2.1 (Wan Team, 2025),
`Wan2.1_VAE.pth`.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn
from pretrained.weights import fill, need, read_weights

# published statistics of the 16 latent channels; the policy sees (mu - mean) / std
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


# ---- layers; x is (B,C,T,H,W), one chunk; `past` maps a convolution to the frames it keeps between
# chunks


class CausalConv3d(nn.Conv3d):
    """Convolution over the present and the past; before the first frame there are zeros."""

    def __init__(self, width_in, width_out, kernel, stride=1):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(width_in, width_out, kernel, (stride, 1, 1), padding)

    def forward(self, x, past):
        keep = self.kernel_size[0] - self.stride[0]
        if keep:
            B, C, _, H, W = x.shape
            before = past[self] if self in past else x.new_zeros(B, C, keep, H, W)
            x = torch.cat([before, x], 2)
            past[self] = x[:, :, -keep:].clone()  # a copy, so that the chunk itself is freed
        return super().forward(x)


class RMSNorm(nn.Module):
    """Over channels; for video or (image=True) for single frames (B,C,H,W)."""

    def __init__(self, width, image=False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1) if image else torch.ones(width, 1, 1, 1))

    def forward(self, x):
        x = F.rms_norm(x.movedim(1, -1), self.gamma.shape[:1], self.gamma.flatten(), 1e-24)
        return x.movedim(-1, 1)


class Chain(nn.Sequential):
    """nn.Sequential that hands `past` to those layers that look back."""

    def forward(self, x, past):
        for layer in self:
            x = layer(x) if isinstance(layer, (RMSNorm, nn.SiLU, nn.Identity)) else layer(x, past)
        return x


def per_frame(f, x):
    """Applies f on images (B*T,C,H,W)."""
    return f(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, width_in, width_out):
        super().__init__()
        self.residual = Chain(
            RMSNorm(width_in), nn.SiLU(inplace=True), CausalConv3d(width_in, width_out, (3, 3, 3)),
            RMSNorm(width_out), nn.SiLU(inplace=True), nn.Identity(),  # where training had dropout
            CausalConv3d(width_out, width_out, (3, 3, 3)))
        same = width_in == width_out
        self.shortcut = None if same else CausalConv3d(width_in, width_out, (1, 1, 1))

    def forward(self, x, past):
        return self.residual(x, past).add_(x if self.shortcut is None else self.shortcut(x, past))


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width, image=True)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def attend(self, x):
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # (B*T,1,HW,3C)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, -1))[:, 0].transpose(1, 2)
        return x + self.proj(out.unflatten(2, x.shape[2:]))

    def forward(self, x, past):
        return per_frame(self.attend, x)


class Downsample(nn.Module):
    """Halves height and width and, where `time`, the number of frames after the first, which stands
    alone."""

    def __init__(self, width, time):
        super().__init__()
        conv = nn.Conv2d(width, width, 3, stride=2)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), stride=2) if time else None

    def forward(self, x, past):
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if self.time_conv not in past:  # the first frame
            past[self.time_conv] = x
            return x
        return self.time_conv(x, past)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, where `time`, doubles the frames after the
    first."""

    def __init__(self, width, time):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(width, width // 2, 3, padding=1))
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x, past):
        if self.time_conv is not None and self.time_conv in past:
            x = self.time_conv(x, past).movedim(1, -1).unflatten(-1, (2, -1))  # (B,T,H,W,2,C)
            x = x.movedim(-2, 2).flatten(1, 2).movedim(-1, 1)  # (B,C,2T,H,W), each pair in order
        elif self.time_conv is not None:  # the first frame; the next looks back on zeros, not on it
            past[self.time_conv] = torch.zeros_like(x).repeat(1, 1, 2, 1, 1)
        return per_frame(self.resample, x)


# ---- the two halves, and the codec


def middle(width):
    return Chain(ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width))


class Encoder(nn.Module):
    def __init__(self, z, widths, blocks, temporal):
        super().__init__()
        self.conv1 = CausalConv3d(3, widths[0], (3, 3, 3))
        layers = []
        width = widths[0]
        for level, out in enumerate(widths[1:]):
            for _ in range(blocks):
                layers.append(ResidualBlock(width, out))
                width = out
            if level < len(temporal):
                layers.append(Downsample(width, temporal[level]))
        self.downsamples = Chain(*layers)
        self.middle = middle(width)
        conv = CausalConv3d(width, 2 * z, (3, 3, 3))
        self.head = Chain(RMSNorm(width), nn.SiLU(inplace=True), conv)

    def forward(self, x, past):
        return self.head(self.middle(self.downsamples(self.conv1(x, past), past), past), past)


class Decoder(nn.Module):
    def __init__(self, z, widths, blocks, temporal):
        super().__init__()
        width = widths[-1]
        self.conv1 = CausalConv3d(z, width, (3, 3, 3))
        self.middle = middle(width)
        layers = []
        for level, out in enumerate(widths[:0:-1]):
            for _ in range(blocks + 1):
                layers.append(ResidualBlock(width, out))
                width = out
            if level < len(temporal):
                layers.append(Upsample(width, temporal[::-1][level]))
                width //= 2
        self.upsamples = Chain(*layers)
        self.head = Chain(RMSNorm(width), nn.SiLU(inplace=True), CausalConv3d(width, 3, (3, 3, 3)))

    def forward(self, x, past):
        return self.head(self.upsamples(self.middle(self.conv1(x, past), past), past), past)


class VAE(nn.Module):
    """z: latent channels; widths: of the first convolution, then of every level; blocks: residual
    ones per level; temporal: for every downsampling, whether it also halves the number of
    frames."""

    def __init__(self, z, widths, blocks, temporal):
        super().__init__()
        self.encoder = Encoder(z, widths, blocks, temporal)
        self.conv1 = CausalConv3d(2 * z, 2 * z, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder(z, widths, blocks, temporal)
        self.z = z
        self.time = 2 ** sum(temporal)  # video frames of a latent frame, the first apart
        self.space = 2 ** len(temporal)  # pixels of a latent pixel, in each direction

    @torch.no_grad()
    def encode(self, video):
        """Video (B,3,T,H,W) in [-1,1], T = 4k+1, H and W divisible by 8 -> normalised latents
        (B,16,F,H/8,W/8), F = (T-1)/4 + 1: the posterior's mean, on the video's device and in its
        dtype. Memory grows with B, H and W, not with T. ValueError for another shape, dtype or
        range."""
        check(video, "video", 3)
        T, H, W = video.shape[2:]
        if (T - 1) % self.time or H % self.space or W % self.space:
            raise ValueError(f"video: {T} frames of {H}x{W}; expected {self.time}k+1 frames, "
                             f"height and width divisible by {self.space}")
        low, high = video.aminmax()
        # leaves room for a resize's overshoot, none for 0..255 or NaN
        if not (low >= -1.5 and high <= 1.5):
            raise ValueError(f"video: values from {low:.3g} to {high:.3g}; expected [-1, 1]")
        past = {}
        mu = []
        for x in video.split([1, *(T - 1) // self.time * [self.time]], 2):  # one latent frame each
            mu.append(self.conv1(self.encoder(self.place(x), past), past)[:, : self.z].float())
        mean, std = statistics(mu[0])
        return ((torch.cat(mu, 2) - mean) / std).to(video)

    @torch.no_grad()
    def decode_chunks(self, latents):
        """Yields what `decode` returns piece by piece: (B,3,1,H,W), then (B,3,4,H,W) each."""
        check(latents, "latents", self.z)
        past = {}
        mean, std = statistics(latents)
        for z in latents.split(1, 2):
            x = self.decoder(self.conv2(self.place(z.float() * std + mean), past), past)
            yield x.clamp_(-1, 1).to(latents)

    def decode(self, latents):
        """Normalised latents (B,16,F,h,w) -> video (B,3,4F-3,8h,8w) clamped to [-1,1], on the
        latents' device and in their dtype. Memory, but for the video itself, grows with B, h and w,
        not with F. ValueError for another shape or dtype."""
        check(latents, "latents", self.z)
        B, _, frames, h, w = latents.shape
        T = self.time * (frames - 1) + 1
        video = latents.new_empty(B, 3, T, self.space * h, self.space * w)
        end = 0
        for piece in self.decode_chunks(latents):
            video[:, :, end : end + piece.shape[2]] = piece
            end += piece.shape[2]
        return video

    def place(self, x):
        """To the weights' device and dtype, channels last in memory: convolutions and norms are
        faster so."""
        weight = self.conv1.weight
        return x.to(weight.device, weight.dtype, memory_format=torch.channels_last_3d)


def statistics(x):
    return (torch.tensor(s, device=x.device).view(1, -1, 1, 1, 1) for s in (MEAN, STD))


def check(x, name, channels):
    if x.dim() != 5 or x.shape[1] != channels or not x.numel():
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected (B, {channels}, frames, "
                         "height, width)")
    if not x.is_floating_point():
        raise ValueError(f"{name}: dtype {x.dtype}, expected floating point")


# ---- loading


def load_vae(path, device="cpu", dtype=torch.float32):
    """Official `Wan2.1_VAE.pth`, or the same keys in safetensors -> VAE; its shape is read off the
    weights. FileNotFoundError; ValueError when the file is not such a VAE."""
    state = read_weights(path)
    down = re.compile(r"encoder\.downsamples\.(\d+)\.resample\.1\.weight")
    downs = sorted(int(m[1]) for m in map(down.fullmatch, state) if m)
    # as long as the first convolution is wide, then as each level is
    keys = {"encoder.conv1.weight": 5,
            **{f"encoder.downsamples.{i}.resample.1.weight": 4 for i in downs or [2]},
            "encoder.head.0.gamma": 4}
    need(path, state, "Wan VAE", {**keys, "conv2.weight": 5})
    if (z := len(state["conv2.weight"])) != len(MEAN):
        raise ValueError(f"{path}: {z} latent channels, expected {len(MEAN)}, whose statistics are "
                         "published")
    with torch.device("meta"):
        temporal = [f"encoder.downsamples.{i}.time_conv.weight" in state for i in downs]
        vae = VAE(z, [len(state[k]) for k in keys], downs[0], temporal)
    fill(vae, state, path, device, dtype)
    for layer in vae.modules():  # as the activations, or each call would convert them
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    return vae
