import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from pretrained.vae import MEAN, STD, VAE, load_vae


GOLDEN = Path(__file__).parent / "golden"


def weights(seed=0, widths=(8, 8, 16, 24, 24), blocks=2, temporal=(False, True, True), z=16):
    torch.manual_seed(seed)
    state = VAE(z, list(widths), blocks, list(temporal)).state_dict()
    return {k: v + 0.3 * torch.randn_like(v) if "gamma" in k else v for k, v in state.items()}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "random.safetensors"
    save_file(weights(), path)
    return load_vae(path)


def video(frames, height=16, width=24, batch=1, seed=1):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def far(a, b):
    return (a - b).abs().max().item()


# ---- against the official implementation and diffusers


def test_golden():
    vae, io = load_vae(GOLDEN / "vae_weights.safetensors"), load_file(GOLDEN / "vae_io.safetensors")
    assert far(vae.encode(io["video"]), io["latents"]) < 1e-4
    # the recorded reconstruction is not clamped yet
    assert far(vae.decode(io["latents"]), io["reconstruction"].clamp(-1, 1)) < 1e-4


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


@pytest.mark.parametrize("seed, frames, height, width", [(0, 9, 16, 24), (3, 5, 40, 16), (4, 1, 8, 8)])
def test_diffusers(tmp_path, seed, frames, height, width):
    diffusers = pytest.importorskip("diffusers")
    state = weights(seed, (12, 12, 24, 48, 48))
    save_file(state, tmp_path / "vae.safetensors")
    ours = load_vae(tmp_path / "vae.safetensors")
    theirs = diffusers.AutoencoderKLWan(base_dim=12, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
                                        temperal_downsample=[False, True, True]).eval()
    theirs.load_state_dict({diffusers_key(k): v for k, v in state.items()})
    x = video(frames, height, width, batch=2)
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (MEAN, STD))
    with torch.no_grad():
        mu = theirs.encode(x).latent_dist.mean
        z = torch.randn(mu.shape)
        reference = theirs.decode(z * std + mean).sample
    assert far(ours.encode(x), (mu - mean) / std) < 1e-4
    assert far(ours.decode(z), reference) < 1e-4


def test_full_size_has_diffusers_parameters():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours = VAE(16, [96, 96, 192, 384, 384], 2, [False, True, True]).state_dict()
        theirs = diffusers.AutoencoderKLWan().state_dict()
    assert {diffusers_key(k): v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sum(v.numel() for v in ours.values()) == 126_892_531


# ---- shape, causality, chunks


def test_shapes_and_clamp(vae):
    z = vae.encode(video(9, 16, 24, batch=2))
    assert z.shape == (2, 16, 3, 2, 3) and z.dtype == torch.float32
    x = vae.decode(100 * z)
    assert x.shape == (2, 3, 9, 16, 24) and x.abs().max() == 1
    assert vae.decode(z[:, :, :1]).shape == (2, 3, 1, 16, 24)


@pytest.mark.parametrize("widths, blocks, temporal, space, time",
                         [((4, 8, 4), 1, (True,), 2, 2), ((8, 8, 8, 16), 3, (True, True), 4, 4)])
def test_reads_its_shape(tmp_path, widths, blocks, temporal, space, time):
    save_file(weights(1, widths, blocks, temporal), tmp_path / "vae.safetensors")
    vae = load_vae(tmp_path / "vae.safetensors")
    z = vae.encode(video(2 * time + 1, 4 * space, 6 * space))
    assert z.shape == (1, 16, 3, 4, 6) and vae.decode(z).shape == (1, 3, 2 * time + 1, 4 * space, 6 * space)


def test_common_prefix(vae):
    x = video(17)
    z = vae.encode(x)
    y = vae.decode(z)
    for k in range(4):
        assert far(vae.encode(x[:, :, : 4 * k + 1]), z[:, :, : k + 1]) < 1e-5
        assert far(vae.decode(z[:, :, : k + 1]), y[:, :, : 4 * k + 1]) < 1e-5


def test_latents_see_no_later_frame(vae):
    x = video(13)
    z = vae.encode(x)
    for frame in 1, 4, 5, 12:
        changed = x.clone()
        changed[:, :, frame:] = -x[:, :, frame:]
        first = (frame + 3) // 4  # the latent frame that holds it
        difference = (vae.encode(changed) - z).abs().amax((0, 1, 3, 4))
        assert difference[:first].max() == 0 and difference[first] > 1e-3


def test_batch_rows_are_independent(vae):
    x = torch.cat([video(5, seed=1), video(5, seed=2)])
    z = vae.encode(x)
    assert far(z[1:], vae.encode(x[1:])) < 1e-5
    assert far(vae.decode(z)[1:], vae.decode(z[1:])) < 1e-5


class Peak(TorchDispatchMode):
    """Most bytes alive at a time among the storages that operations return, beside those known before."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.alive, self.peak = {t.untyped_storage()._cdata for t in known}, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_memory_does_not_grow_with_frames(vae):
    peaks = {}
    for frames in 9, 25:
        x = video(frames, 32, 32)
        with Peak(x, *vae.parameters()) as encode:
            z = vae.encode(x)
        with Peak(z, *vae.parameters()) as decode:
            for piece in vae.decode_chunks(z):
                del piece
        peaks[frames] = encode.peak - z.nbytes, decode.peak
    for short, long in zip(*peaks.values()):
        assert long < 1.02 * short
    assert [piece.shape[2] for piece in vae.decode_chunks(z)] == [1, 4, 4, 4, 4, 4, 4]


# ---- dtypes and files


def test_bfloat16(tmp_path, vae):
    save_file(weights(), tmp_path / "vae.safetensors")
    half = load_vae(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in half.parameters()} == {(torch.bfloat16, False)}
    x = video(5)
    z = vae.encode(x)
    for exact, rough in (z, half.encode(x)), (vae.decode(z), half.decode(z)):
        assert rough.dtype == torch.float32 and (rough - exact).norm() < 0.04 * exact.norm()
    # results come in the input's dtype
    assert half.encode(x.bfloat16()).dtype == half.decode(z.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("legacy", [False, True])
def test_pth(tmp_path, vae, legacy):
    torch.save(weights(), tmp_path / "vae.pth", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(load_vae(str(tmp_path / "vae.pth")).encode(video(5)), vae.encode(video(5)))


def one_line(path, *words, error=ValueError):
    with pytest.raises(error) as info:
        load_vae(path)
    message = str(info.value)
    assert "\n" not in message and str(path) in message and all(word in message for word in words), message


def test_wrong_keys_in_one_error(tmp_path):
    state = weights()
    del state["decoder.head.2.bias"], state["encoder.middle.1.proj.weight"]
    state["decoder.conv1.weight"] = torch.zeros(2, 3)
    state["conv1.bias"] = torch.zeros(32, dtype=torch.int32)
    state["extra.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "vae.safetensors")
    one_line(tmp_path / "vae.safetensors", "5 keys", "missing ", "unexpected extra.weight", "decoder.conv1.weight is")


def test_other_files(tmp_path):
    one_line(tmp_path / "none.pth", "no such file", error=FileNotFoundError)
    save_file({"blocks.0.weight": torch.zeros(3)}, tmp_path / "dit.safetensors")
    one_line(tmp_path / "dit.safetensors", "no Wan VAE", "encoder.conv1.weight", "blocks.0.weight")
    save_file(weights(z=4), tmp_path / "z4.safetensors")
    one_line(tmp_path / "z4.safetensors", "4 latent channels", "16")
    torch.save({"state_dict": weights()}, tmp_path / "nested.pth")
    one_line(tmp_path / "nested.pth", "other things than tensors")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as f:
        f.writestr("a.txt", "a")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in "zip.pth", "text.pth", "empty.pth", "empty.safetensors":
        one_line(tmp_path / name)


@pytest.mark.parametrize("name, legacy", [("vae.safetensors", False), ("vae.pth", False), ("vae.pth", True)])
def test_truncated(tmp_path, name, legacy):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(weights(), path, _use_new_zipfile_serialization=not legacy)
    else:
        save_file(weights(), path)
    whole = path.read_bytes()
    for length in 3, 100, 5000, len(whole) // 2, len(whole) - 10:
        path.write_bytes(whole[:length])
        one_line(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_code_is_refused_unexecuted(tmp_path, form):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "vae.pth"
    content = {"conv1.weight": torch.zeros(1), "bad": Malicious()}
    if form == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    one_line(path, "refused")
    assert not (tmp_path / "executed").exists()


def test_bad_input_before_any_work(vae, monkeypatch):
    monkeypatch.setattr(vae.encoder, "forward", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr(vae.decoder, "forward", lambda *_: pytest.fail("work was done"))
    x, z = video(5), torch.zeros(1, 16, 2, 2, 2)
    for bad, word in [(video(8), "4k+1"), (video(5, 12), "divisible by 8"),
                      (video(5, 16, 20), "divisible by 8"), (x[0], "(B, 3,"), (x[:, :2], "(B, 3,"),
                      (x[:0], "(B, 3,"), (x.byte(), "torch.uint8"), ((x + 1) * 127, "[-1, 1]"),
                      (x * float("nan"), "[-1, 1]")]:
        with pytest.raises(ValueError, match=re.escape(word)):
            vae.encode(bad)
    for bad, word in [(z[:, :4], "(B, 16,"), (z[0], "(B, 16,"), (z[:, :, :0], "(B, 16,"), (z.int(), "int32")]:
        with pytest.raises(ValueError, match=re.escape(word)):
            vae.decode(bad)
    with pytest.raises(ValueError, match="torch.int8"):
        load_vae(GOLDEN / "vae_weights.safetensors", dtype=torch.int8)
