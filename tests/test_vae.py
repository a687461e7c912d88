"""Wan's causal codec: the official one's recorded numbers, diffusers', causality, wrong input."""
import itertools
import re
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from tiny_weights import random_state, shapes_of, vae_shapes

from pretrained.vae import MEAN, STD, load_vae

GOLDEN = Path(__file__).parent / "golden"


def tiny(path, seed=0, **shape):
    save_file(random_state(vae_shapes(**shape), seed), path)
    return load_vae(path)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("vae") / "vae.safetensors")


def video(frames, height=16, width=24, batch=1):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def far(a, b):
    return (a - b).abs().max().item()


def test_recorded_latents_and_reconstruction():
    vae, recorded = load_vae(GOLDEN / "vae_weights.safetensors"), load_file(GOLDEN / "vae_io.safetensors")
    assert far(vae.encode(recorded["video"]), recorded["latents"]) < 1e-4
    # the recorded reconstruction is not clamped yet
    assert far(vae.decode(recorded["latents"]), recorded["reconstruction"].clamp(-1, 1)) < 1e-4


def diffusers_key(key):
    """Official name -> AutoencoderKLWan's, for four levels of two blocks."""
    key = re.sub(r"^conv1", "quant_conv", re.sub(r"^conv2", "post_quant_conv", key))
    if m := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key):
        level, i = divmod(int(m[1]), 4)  # three blocks, then the upsampler
        key = f"decoder.up_blocks.{level}." + (f"resnets.{i}." if i < 3 else "upsamplers.0.") + m[2]
    names = {"coder.conv1": "coder.conv_in", "head.0": "norm_out", "head.2": "conv_out",
             "downsamples": "down_blocks", "middle.0": "mid_block.resnets.0",
             "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1",
             "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
             "shortcut": "conv_shortcut"}
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize("frames, height, width", [(9, 16, 24), (5, 40, 16), (1, 8, 8)])
def test_equals_diffusers(tmp_path, frames, height, width):
    """At other widths, sizes and lengths; its published size has the same parameters."""
    diffusers = pytest.importorskip("diffusers")
    ours = tiny(tmp_path / "vae.safetensors", frames, widths=(12, 12, 24, 48, 48))
    theirs = diffusers.AutoencoderKLWan(base_dim=12).eval()
    theirs.load_state_dict({diffusers_key(key): x for key, x in ours.state_dict().items()})
    x = video(frames, height, width, batch=2)
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (MEAN, STD))
    with torch.no_grad():
        mu = theirs.encode(x).latent_dist.mean
        z = torch.randn(mu.shape)
        reference = theirs.decode(z * std + mean).sample
    assert far(ours.encode(x), (mu - mean) / std) < 1e-4 and far(ours.decode(z), reference) < 1e-4
    published = {diffusers_key(key): x for key, x in vae_shapes((96, 96, 192, 384, 384)).items()}
    assert published == shapes_of(diffusers.AutoencoderKLWan)


def test_a_beginning_is_coded_as_in_the_whole_and_a_row_as_alone(vae):
    """So no latent frame sees a later video frame, nor another row, and chunks change nothing."""
    x = video(17, batch=2)
    z = vae.encode(x)
    y = vae.decode(z)
    assert z.shape == (2, 16, 5, 2, 3) and z.dtype == torch.float32 and y.shape == x.shape
    for row, k in ((0, 0), (1, 1), (0, 3)):
        part = slice(row, row + 1)
        assert far(vae.encode(x[part, :, : 4 * k + 1]), z[part, :, : k + 1]) < 1e-5
        assert far(vae.decode(z[part, :, : k + 1]), y[part, :, : 4 * k + 1]) < 1e-5
    assert [piece.shape[2] for piece in vae.decode_chunks(z)] == [1, 4, 4, 4, 4]
    assert vae.decode(100 * z).abs().max() == 1


def peak(run):
    """Most bytes that were alive at once of what run() allocated."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_memory_does_not_grow_with_frames(vae):
    short, long = (video(frames, 32, 32) for frames in (9, 25))
    z, longer = vae.encode(short), vae.encode(long)
    assert peak(lambda: vae.encode(long)) < 1.02 * peak(lambda: vae.encode(short)) + 2 * longer.nbytes
    assert peak(lambda: all(True for _ in vae.decode_chunks(longer))) < 1.02 * peak(
        lambda: all(True for _ in vae.decode_chunks(z)))


@pytest.mark.parametrize("shape, space, time", [
    (dict(widths=(4, 8, 4), blocks=1, temporal=(True,)), 2, 2),
    (dict(widths=(8, 8, 8, 16), blocks=3, temporal=(True, True)), 4, 4)])
def test_shape_is_read_off_the_weights(tmp_path, shape, space, time):
    vae = tiny(tmp_path / "vae.safetensors", **shape)
    z = vae.encode(video(2 * time + 1, 4 * space, 6 * space))
    assert z.shape == (1, 16, 3, 4, 6)
    assert vae.decode(z).shape == (1, 3, 2 * time + 1, 4 * space, 6 * space)


def test_bfloat16_stays_near_float32(tmp_path, vae):
    """Weights run in the type that is asked for, results come in the input's."""
    tiny(tmp_path / "vae.safetensors")
    half = load_vae(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in half.parameters()} == {(torch.bfloat16, False)}
    x = video(5)
    z = vae.encode(x)
    for exact, rough in (z, half.encode(x)), (vae.decode(z), half.decode(z)):
        assert rough.dtype == torch.float32 and (rough - exact).norm() < 0.04 * exact.norm()
    assert half.encode(x.bfloat16()).dtype == half.decode(z.bfloat16()).dtype == torch.bfloat16


X, Z = video(5), torch.zeros(1, 16, 2, 2, 2)


@pytest.mark.parametrize("half, bad, word", [
    ("encode", video(8), "4k+1"), ("encode", video(5, 12), "divisible by 8"),
    ("encode", video(5, 16, 20), "divisible by 8"), ("encode", X[0], "(B, 3,"),
    ("encode", X[:, :2], "(B, 3,"), ("encode", X[:0], "(B, 3,"), ("encode", X.byte(), "torch.uint8"),
    ("encode", (X + 1) * 127, "[-1, 1]"), ("encode", X * torch.nan, "[-1, 1]"),
    ("decode", Z[:, :4], "(B, 16,"), ("decode", Z[0], "(B, 16,"), ("decode", Z[:, :, :0], "(B, 16,"),
    ("decode", Z.int(), "int32")])
def test_wrong_input_is_refused_before_any_work(vae, monkeypatch, half, bad, word):
    monkeypatch.setattr(getattr(vae, f"{half}r"), "forward", lambda *_: pytest.fail("work was done"))
    refused(lambda: getattr(vae, half)(bad), word)


def test_a_codec_of_other_latents_is_refused(tmp_path):
    refused(lambda: tiny(tmp_path / "z4.safetensors", z=4), "z4.safetensors: 4 latent channels, ")
