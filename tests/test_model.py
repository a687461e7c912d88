"""model.py against recorded numbers, a plain float64 rewrite of its equations, diffusers, and itself."""
import collections
import dataclasses
import hashlib
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import Condition, Config, DiT, load_dit

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS, IO = GOLDEN / "redirector_weights.safetensors", load_file(GOLDEN / "redirector_io.safetensors")
RECAM_WEIGHTS = GOLDEN / "recammaster_weights.safetensors"
RECAM_IO = load_file(GOLDEN / "recammaster_io.safetensors")
T2V = dict(in_dim=16, image_dim=None, camera_dim=None, roce=False)
RECAM = {**T2V, "pose_dim": 12}
BOTH = pytest.mark.parametrize("changes", [{}, RECAM], ids=["ReDirector", "ReCamMaster"])
WAN = Config(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, image_dim=1280, camera_dim=24, roce=True)


def golden_dit(**options):
    return load_dit(WEIGHTS, num_heads=2, **options)


def golden_condition(text="context"):
    return Condition(IO[text], IO["clip_feature"], IO["y"], IO["camera_target"], IO["camera_cond"])


def recam_condition(text="context"):
    return Condition(RECAM_IO[text], source=RECAM_IO["y"], camera=RECAM_IO["camera"])


GOLDENS = {"redirector": (WEIGHTS, IO, golden_condition),
           "recammaster": (RECAM_WEIGHTS, RECAM_IO, recam_condition)}


def random_condition(dit, b, frames=3, height=4, width=6, seed=0):
    c, g = dit.config, torch.Generator().manual_seed(seed)
    def draw(*shape):
        return torch.randn(b, *shape, generator=g)
    source = (c.out_dim, frames, height, width)
    maps = c.camera_dim and (c.camera_dim, frames, 8 * height, 8 * width)
    camera = (frames, c.pose_dim) if c.pose_dim else maps
    return Condition(draw(7, c.text_dim), draw(5, c.image_dim) if c.image_dim else None,
                     draw(*source) if dit.takes_source else None, draw(*camera) if camera else None,
                     draw(*maps) if maps and dit.takes_source else None)


def random_dit(seed=0, **changes):
    """A tiny DiT, every weight of it doing something."""
    torch.manual_seed(seed)
    dit = DiT(Config(**{**dict(dim=48, num_heads=2, num_layers=2, ffn_dim=80, freq_dim=32, text_dim=40,
                               image_dim=24, camera_dim=24, roce=True), **changes}))
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(torch.randn_like(p) * (0.3 / p.flatten(1).shape[1] ** 0.5 if p.ndim > 1 else 0.1))
    return dit.eval()


def gradients(dit, *args):
    dit.zero_grad()
    dit(*args).square().sum().backward()
    return {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}


def assert_close(a, b, tolerance):
    assert (a.double() - b.double()).abs().max() < tolerance


# ---- a plain rewrite, one row at a time, as the published implementations compute it ----

def plain(dit, x, t, c, dtype):
    """Velocity of one row, all in `dtype` but RMSNorm (at least float32) and rotations (complex128)."""
    s = {key: value.to(dtype) for key, value in dit.state_dict().items()}
    x, c, cfg = x.to(dtype), c.to(dtype), dit.config
    heads, d = cfg.num_heads, cfg.dim // cfg.num_heads

    def lin(x, name):
        return F.linear(x, s[name + ".weight"], s.get(name + ".bias"))

    def rms(x, name):
        y = model.upcast(x)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype) * s[name + ".weight"]

    def norm(x, name=None, eps=1e-6):
        weights = (s[name + ".weight"], s[name + ".bias"]) if name else (None, None)
        return F.layer_norm(x, x.shape[-1:], *weights, eps)

    def attend(q, k, v):
        q, k, v = (y.unflatten(-1, (heads, d)).transpose(0, 1) for y in (q, k, v))
        weights = torch.softmax(q @ k.transpose(1, 2) / d ** 0.5, -1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def turn(x, angle):
        pairs = torch.view_as_complex(x.double().reshape(len(x), heads, d // 2, 2))
        return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(1).to(dtype)

    def embed(x, maps):
        x = torch.cat([x, torch.zeros_like(x)]) if cfg.in_dim == 2 * cfg.out_dim else x
        x = F.conv3d(x[None], s["patch_embedding.weight"], s["patch_embedding.bias"], stride=(1, 2, 2))
        camera = None
        if maps is not None:
            y = F.conv2d(F.pixel_unshuffle(maps.transpose(0, 1), 8), s["control_adapter.conv.weight"],
                         s["control_adapter.conv.bias"], stride=2)
            r = "control_adapter.residual_blocks.0.conv"
            z = F.conv2d(y, s[r + "1.weight"], s[r + "1.bias"], padding=1).relu()
            camera = y + F.conv2d(z, s[r + "2.weight"], s[r + "2.bias"], padding=1)
            x = x + camera.transpose(0, 1)
            camera = camera.permute(0, 2, 3, 1).flatten(0, 2)
        return x[0].flatten(1).T, camera

    frequency = 10000.0 ** (-torch.arange(cfg.freq_dim // 2).double() / (cfg.freq_dim // 2))
    angle = 1000 * t.double() * frequency
    e = lin(torch.cat([angle.cos(), angle.sin()]).to(dtype), "time_embedding.0")
    e = lin(F.silu(e), "time_embedding.2")
    modulation = lin(F.silu(e), "time_projection.1").unflatten(0, (6, -1))
    text = lin(F.gelu(lin(c.text[0], "text_embedding.0"), approximate="tanh"), "text_embedding.2")
    if c.image is not None:
        image = F.gelu(lin(norm(c.image[0], "img_emb.proj.0", 1e-5), "img_emb.proj.1"))
        image = norm(lin(image, "img_emb.proj.3"), "img_emb.proj.4", 1e-5)
    maps, poses = (None, c.camera) if cfg.pose_dim else (c.camera, None)
    tokens, camera = embed(x[0], None if maps is None else maps[0])
    n = len(tokens)
    frames, h, w = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    times = 2 * frames if cfg.pose_dim else frames
    f, i, j = torch.meshgrid(*(torch.arange(k).double() for k in (times, h, w)), indexing="ij")
    third = 2 * (d // 6)
    rope = torch.cat([position.reshape(-1, 1) * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
                      for position, size in ((f, d - 2 * third), (i, third), (j, third))], 1)[:, None]
    if c.source is not None:
        source, source_camera = embed(c.source[0], None if maps is None else c.source_camera[0])
        tokens, rope = torch.cat([tokens, source]), torch.cat([rope, rope])[:2 * n]
        camera = None if camera is None else torch.cat([camera, source_camera])
    for block in range(cfg.num_layers):
        b = f"blocks.{block}."
        a = b + "self_attn."
        shift, scale, gate, shift2, scale2, gate2 = s[b + "modulation"][0] + modulation
        y = norm(tokens) * (1 + scale) + shift
        if cfg.pose_dim:
            y = y + lin(poses[0], b + "cam_encoder").repeat_interleave(h * w, 0).repeat(2, 1)
        qk = vo = torch.zeros(1, heads, d // 2)
        if cfg.roce:
            qk, vo = (lin(F.silu(camera), f"{a}rope_phase_{kind}.1").double() for kind in ("qk", "vo"))
            qk, vo = (F.pad(phase.unflatten(-1, (heads, -1)), (d // 2 - third, 0)) for phase in (qk, vo))
        q = turn(rms(lin(y, a + "q"), a + "norm_q"), rope + qk)
        k = turn(rms(lin(y, a + "k"), a + "norm_k"), rope + qk)
        y = turn(lin(attend(q, k, turn(lin(y, a + "v"), -vo)), a + "o"), vo)
        tokens = tokens + gate * (lin(y, b + "projector") if cfg.pose_dim else y)
        a = b + "cross_attn."
        q = rms(lin(norm(tokens, b + "norm3"), a + "q"), a + "norm_q")
        y = attend(q, rms(lin(text, a + "k"), a + "norm_k"), lin(text, a + "v"))
        if c.image is not None:
            y = y + attend(q, rms(lin(image, a + "k_img"), a + "norm_k_img"), lin(image, a + "v_img"))
        tokens = tokens + lin(y, a + "o")
        y = norm(tokens) * (1 + scale2) + shift2
        tokens = tokens + gate2 * lin(F.gelu(lin(y, b + "ffn.0"), approximate="tanh"), b + "ffn.2")
    shift, scale = s["head.modulation"][0] + e
    v = lin(norm(tokens[:n]) * (1 + scale) + shift, "head.head")
    v = torch.einsum("fhwyxc->cfhywx", v.reshape(frames, h, w, 2, 2, -1))
    return v.reshape(1, -1, frames, 2 * h, 2 * w)


# ---- recorded numbers ----

@pytest.mark.parametrize("policy", GOLDENS)
@pytest.mark.parametrize("t", ["1000", "517", "37.5"])
def test_recorded_velocity(policy, t):
    weights, io, condition = GOLDENS[policy]
    with torch.no_grad():
        v = load_dit(weights, num_heads=2)(io["x"], torch.tensor(float(t) / 1000), condition())
    assert_close(v, io[f"velocity_t{t}"], 1e-5)


@pytest.mark.parametrize("policy", GOLDENS)
def test_recorded_hidden_states(policy):
    weights, io, condition = GOLDENS[policy]
    dit, seen = load_dit(weights, num_heads=2), {}
    for name, module in dit.named_modules():
        if name.count(".") == 1 and name.startswith("blocks.") or name.endswith(("self_attn", "cross_attn")):
            key = "hidden_block" + name.removeprefix("blocks.")
            module.register_forward_hook(lambda module, inputs, output, key=key: seen.update({key: output}))
    with torch.no_grad():
        dit(io["x"], torch.tensor([0.517]), condition())
        assert len(seen) == 6
        for i, block in enumerate(dit.blocks if policy == "recammaster" else ()):
            seen[f"hidden_block{i}.cam_encoder"] = block.cam_encoder(io["camera"])
            seen[f"hidden_block{i}.projector"] = block.projector(seen[f"hidden_block{i}.self_attn"])
        if policy == "redirector":
            adapter = [dit.control_adapter(io[name]) for name in ("camera_target", "camera_cond")]
            assert_close(torch.cat(adapter, 1), io["hidden_adapter"].flatten(2).transpose(1, 2), 1e-5)
    for key, value in seen.items():
        assert_close(value, io[key], 1e-5)


@pytest.mark.parametrize("policy, tolerance", [("redirector", 1e-4), ("recammaster", 1e-5)])
def test_recorded_sample(policy, tolerance):
    weights, io, condition = GOLDENS[policy]
    dit, x = load_dit(weights, num_heads=2), io["x"]
    both = Condition.cat([condition("negative_context"), condition()])
    u = torch.linspace(1, 0, 7)
    levels = 5 * u / (1 + 4 * u)
    with torch.no_grad():
        prepared = dit.prepare(both)
        for t, t_next in zip(levels[:-1], levels[1:]):
            negative, positive = dit(torch.cat([x, x]), t, prepared).chunk(2)
            x = x + (t_next - t) * (negative + 5 * (positive - negative))
    assert_close(x, io["euler6_cfg5"], tolerance)


# ---- ReCamMaster ----

def test_recammaster_without_cameras_is_wan():
    """Poses that add nothing and a projector that changes nothing: Wan T2V on twice the frames, exactly."""
    recam = random_dit(**RECAM)
    t2v = DiT(dataclasses.replace(recam.config, pose_dim=None))
    t2v.load_state_dict({k: x for k, x in recam.state_dict().items() if k in t2v.state_dict()})
    c, x, t = random_condition(recam, 1), torch.randn(1, 16, 3, 4, 6), torch.tensor(0.5)
    with torch.no_grad():
        different = recam(x, t, c)
        for block in recam.blocks:
            torch.nn.init.zeros_(block.cam_encoder.weight)
            torch.nn.init.zeros_(block.cam_encoder.bias)
            torch.nn.init.eye_(block.projector.weight)
            torch.nn.init.zeros_(block.projector.bias)
        same, wan = recam(x, t, c), t2v(torch.cat([x, c.source], 2), t, Condition(c.text))[:, :, :3]
    assert torch.equal(same, wan)
    assert (different - wan).abs().max() > 0.01
    fresh = DiT(recam.config).state_dict()  # training may start from there
    assert not fresh["blocks.1.cam_encoder.weight"].any()
    assert torch.equal(fresh["blocks.1.projector.weight"], torch.eye(48))


def test_recammaster_file_forms(tmp_path):
    """step20000.ckpt: a plain torch.save of mixed types, tensors only; or the same keys in safetensors."""
    state = load_file(RECAM_WEIGHTS)
    mixed = {k: x.float() if "cam_encoder" in k or "projector" in k else x for k, x in state.items()}
    torch.save(mixed, tmp_path / "step20000.ckpt")
    args = RECAM_IO["x"], torch.tensor(0.517), recam_condition()
    dits = [load_dit(file, num_heads=2) for file in (RECAM_WEIGHTS, tmp_path / "step20000.ckpt")]
    assert all(p.dtype == torch.float32 for dit in dits for p in dit.parameters())
    assert dits[0].config == dits[1].config and dits[0].config.pose_dim == 12
    with torch.no_grad():
        assert torch.equal(dits[0](*args), dits[1](*args))
    base = {k: x for k, x in state.items() if "cam_encoder" not in k and "projector" not in k}
    wan = load_dit(saved(tmp_path / "wan.safetensors", base), num_heads=2)
    assert wan.config == dataclasses.replace(dits[0].config, pose_dim=None) and not wan.takes_source
    ours = saved(tmp_path / "ours.safetensors", {k: 2 * x for k, x in mixed.items() if model.trains(k)})
    for file in (tmp_path / "step20000.ckpt", tmp_path / "wan.safetensors"):  # what trains is all it needs
        for key, x in load_dit(file, ours, num_heads=2).state_dict().items():
            assert torch.equal(x, state[key].float() * (2 if model.trains(key) else 1))


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("broken, message", [
    (lambda s: s | {"blocks.0.cam_encoder.weight": torch.zeros(48, 16),
                    "blocks.1.cam_encoder.weight": torch.zeros(48, 16)}, "16 numbers a frame, ReCam"),
    (lambda s: s | {"blocks.1.cam_encoder.weight": torch.zeros(48, 16)}, r"is \(48, 16\), expected \(48, 12\)"),
    (lambda s: s | {"blocks.0.cam_encoder_src.weight": torch.zeros(48, 12)}, "unexpected blocks.0.cam_enc"),
    (lambda s: {k: x for k, x in s.items() if k != "blocks.1.projector.bias"}, "missing blocks.1.projector.b"),
    (lambda s: {k: x for k, x in s.items() if "projector" not in k}, "4 keys do not fit"),
    (lambda s: s | {"head.head.bias": torch.zeros(64).long()}, r"head.head.bias \(torch.int64\)"),
    (lambda s: {"state_dict": s}, "other things than tensors"),
    (lambda s: s | {"code": Bomb()}, "pickled code"),
    (lambda s: s | {"patch_embedding.weight": torch.zeros(48, 32, 1, 2, 2)}, "needs Wan T2V")])
def test_recammaster_refusals(tmp_path, capsys, broken, message):
    file = tmp_path / "step20000.ckpt"
    torch.save(broken(load_file(RECAM_WEIGHTS)), file)
    with pytest.raises(ValueError, match=message) as error:
        load_dit(file, num_heads=2)
    assert "step20000.ckpt" in str(error.value) and "executed" not in capsys.readouterr().out


def test_recammaster_damaged_ckpt(tmp_path):
    torch.save(load_file(RECAM_WEIGHTS), tmp_path / "whole.ckpt")
    data = (tmp_path / "whole.ckpt").read_bytes()
    for name, content in {"cut": data[:-1000], "empty": b"", "noise": b"\x80\x02x" * 99}.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.ckpt"):
            load_dit(tmp_path / f"{name}.ckpt", num_heads=2)
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        load_dit(tmp_path / "nowhere.ckpt")


def test_recammaster_learns_through_its_cameras():
    """What trains has gradients, the camera encoder's as finite differences say, and nothing else has."""
    dit = random_dit(**RECAM).double()
    parameters = model.trainable(dit)
    x, t = torch.randn(2, 16, 3, 4, 6).double(), torch.tensor([0.9, 0.3]).double()
    prepared = dit.prepare(random_condition(dit, 2).to(torch.float64))
    grads = gradients(dit, x, t, prepared)
    assert len(grads) == len(parameters) == 2 * (8 + 2 + 2 + 2)
    assert {name.split(".")[2] for name in grads} == {"self_attn", "cam_encoder", "projector"}
    assert all(g.any() for g in grads.values())
    for name in ("blocks.0.cam_encoder.weight", "blocks.1.cam_encoder.bias", "blocks.0.projector.weight"):
        p, step = dit.get_parameter(name), torch.randn_like(grads[name])
        with torch.no_grad():
            losses = [dit(x, t, prepared).square().sum()
                      for move in (1e-5, -2e-5) if p.add_(move * step) is not None]
        assert float((losses[0] - losses[1]) / 2e-5) == pytest.approx(float((grads[name] * step).sum()), 1e-4)


def test_recammaster_poses_stay_exact_in_bfloat16():
    """Poses are not rounded to bfloat16, which would move a camera at 3 m by millimetres."""
    dit = load_dit(RECAM_WEIGHTS, num_heads=2, dtype=torch.bfloat16)
    camera = dit.prepare(recam_condition()).camera
    assert camera.dtype == torch.float32 and torch.equal(camera, RECAM_IO["camera"])


# ---- mathematics ----

@pytest.mark.parametrize("changes", [{}, RECAM, {"roce": False}, T2V | {"image_dim": 24},
                                     {"image_dim": None, "dim": 64, "num_heads": 1}])
def test_equals_plain_rewrite_in_float64(changes):
    dit = random_dit(**changes).double()
    condition, x = random_condition(dit, 1).to(torch.float64), torch.randn(1, 16, 3, 4, 6).double()
    for t in (1.0, 0.3):
        t = torch.tensor([t]).double()
        with torch.no_grad():
            assert_close(dit(x, t, condition), plain(dit, x, t, condition, torch.float64), 1e-11)


@BOTH
def test_bfloat16_error_no_larger_than_plain(changes):
    ours = theirs = 0
    for seed in range(6):
        dit = random_dit(seed, num_layers=4, **changes).to(torch.bfloat16)
        condition = random_condition(dit, 1, seed=seed).to(torch.bfloat16)
        x, t = torch.randn(1, 16, 3, 4, 6).bfloat16().float(), torch.tensor([0.25 + 0.125 * seed])
        with torch.no_grad():
            v = dit(x, t, condition)
            exact = DiT(dit.config).double()
            exact.load_state_dict(dit.state_dict())
            exact = exact(x.double(), t.double(), condition.to(torch.float64))
            ours += (v - exact).square().mean()
            theirs += (plain(dit, x, t, condition, torch.bfloat16) - exact).square().mean()
    print(f"bfloat16 rms error: {ours ** 0.5:.2e}, plain {theirs ** 0.5:.2e}")
    assert v.dtype == torch.float32 and 0 < ours <= theirs


def test_scores_depend_on_relative_position():
    q, k = torch.randn(2, 1, 24, 1, 24, dtype=torch.float64)
    angle = model.rope_angles(2, 3, 4, 24, torch.device("cpu"), torch.float64)
    assert angle.shape == (24, 12) and torch.equal(angle[0], torch.zeros(12).double())
    grid = torch.arange(24).reshape(2, 3, 4)
    a, b = grid[0, 0, 1], grid[1, 1, 2]
    moved_a, moved_b = grid[0, 1, 2], grid[1, 2, 3]  # both one down, one right
    q, k = q[:, :1].expand(1, 24, 1, 24), k[:, :1].expand(1, 24, 1, 24)
    q, k = (model.rotate(y, angle[None, :, None], q.dtype)[0, :, 0] for y in (q, k))
    assert_close(q[a] @ k[b], q[moved_a] @ k[moved_b], 1e-12)
    assert abs(q[a] @ k[b] - q[a] @ k[a]) > 1e-3


def test_rotation_keeps_length_and_undoes_itself():
    x, angle = torch.randn(6, 5, 2, 8), torch.randn(3, 5, 2, 4)  # three conditions, two rows each
    turned = model.rotate(x, angle, torch.float32)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), 1e-5)
    assert_close(model.rotate(turned, -angle, torch.float32), x, 1e-5)
    assert_close(turned[3], model.rotate(x[3:4], angle[1:2], torch.float32)[0], 1e-6)


def test_rotation_in_real_arithmetic_is_the_same(monkeypatch):
    x, angle = torch.randn(2, 5, 2, 8), torch.randn(1, 5, 2, 4)
    turned = model.rotate(x, angle, torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(model.rotate(x, angle, torch.float32), turned, 1e-6)


def test_zero_phase_is_no_roce():
    with_roce = random_dit()
    without = DiT(dataclasses.replace(with_roce.config, roce=False))
    without.load_state_dict({k: v for k, v in with_roce.state_dict().items() if "rope_phase" not in k})
    for block in with_roce.blocks:
        torch.nn.init.zeros_(block.self_attn.rope_phase_qk[1].weight)
        torch.nn.init.zeros_(block.self_attn.rope_phase_vo[1].weight)
    args = torch.randn(1, 16, 3, 4, 6), torch.tensor(0.5), random_condition(with_roce, 1)
    assert_close(with_roce(*args), without(*args), 1e-5)


def test_new_model_predicts_zero_and_learns():
    dit = DiT(Config(dim=48, num_heads=2, num_layers=1, ffn_dim=80, text_dim=40, camera_dim=24, roce=True))
    condition, x = random_condition(dit, 2), torch.randn(2, 16, 3, 4, 6)
    assert torch.equal(dit(x, torch.tensor(0.5), condition), torch.zeros_like(x))
    (dit(x, torch.tensor(0.5), condition) - x).square().mean().backward()
    assert dit.head.head.weight.grad.abs().max() > 0


# ---- batches ----

@BOTH
def test_conditions_broadcast_to_their_rows(changes):
    dit = random_dit(**changes)
    condition = random_condition(dit, 2)
    x, t = torch.randn(6, 16, 3, 4, 6), torch.rand(6)
    with torch.no_grad():
        together = dit(x, t, condition)
        for row in range(6):
            c = condition[row // 3:row // 3 + 1]
            assert_close(dit(x[row:row + 1], t[row], c), together[row:row + 1], 1e-5)
        assert_close(dit(x, torch.full((6,), 0.4), condition), dit(x, torch.tensor(0.4), condition), 1e-6)


@BOTH
def test_prepared_slices_and_joins(changes):
    dit = random_dit(**changes)
    condition, x, t = random_condition(dit, 3), torch.randn(3, 16, 3, 4, 6), torch.tensor(0.5)
    with torch.no_grad():
        prepared, expected = dit.prepare(condition), dit(x, t, condition)
        again = type(prepared).cat([prepared[1:], prepared[:1]])
        assert (len(condition), len(prepared), len(again)) == (3, 3, 3)
        assert_close(dit(x.roll(-1, 0), t, again), expected.roll(-1, 0), 1e-6)
        joined = Condition.cat([condition[1:], condition[:1]])
        assert_close(dit(x.roll(-1, 0), t, joined), expected.roll(-1, 0), 1e-6)
    assert condition.to(torch.float64).source.dtype == torch.float64
    with pytest.raises(ValueError, match="same parts"):
        Condition.cat([condition, dataclasses.replace(condition, source=None)])


@BOTH
def test_prepared_gives_the_same_gradients(changes):
    dit = random_dit(**changes)
    model.trainable(dit)
    condition, x, t = random_condition(dit, 2), torch.randn(4, 16, 3, 4, 6), torch.rand(4)
    with torch.no_grad():
        prepared = dit.prepare(condition)
    cached, direct = gradients(dit, x, t, prepared), gradients(dit, x, t, condition)
    assert cached.keys() == direct.keys()
    assert all(model.trains(name) and g.any() for name, g in direct.items())
    for name in direct:
        assert_close(cached[name], direct[name], 1e-6 * direct[name].abs().max())


# ---- what trains ----

def test_counts_of_the_real_model():
    with torch.device("meta"):
        dit = DiT(WAN)
    total, trained = sum(p.numel() for p in dit.parameters()), sum(p.numel() for p in model.trainable(dit))
    dim, phases = 1536, 12 * 42
    assert trained == 30 * (4 * (dim * dim + dim) + 2 * dim + 2 * phases * dim) == 329_840_640
    assert total == 1_662_761_792
    assert all(p.requires_grad == (".self_attn." in name) for name, p in dit.named_parameters())
    assert model.config_from({key: tuple(x.shape) for key, x in dit.state_dict().items()}) == WAN


def test_counts_of_recammaster():
    with torch.device("meta"):
        dit = DiT(dataclasses.replace(WAN, **RECAM))
    assert len(dit.state_dict()) == 945 and sum(p.numel() for p in dit.parameters()) == 1_490_420_800
    assert sum(p.numel() for p in model.trainable(dit)) == 354_816_000


@pytest.mark.parametrize("changes, fingerprint", [
    ({}, "ac6a5aa74f4a0aab6f64eb9a72f19901"),  # Wan2.1-Fun-V1.1-1.3B-Control-Camera
    ({"in_dim": 16, "image_dim": None, "camera_dim": None}, "9269f8db9040a9d860eaca435be61814"),  # 1.3B T2V
    ({"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}, "b61c605c2adbd23124d152ed28e049ae")])
def test_keys_and_shapes_are_the_official_files(changes, fingerprint):
    """By the md5 of all keys and shapes that DiffSynth-Studio publishes to recognise Wan's files."""
    with torch.device("meta"):
        dit = DiT(dataclasses.replace(WAN, roce=False, **changes))
    keys = [[f"{key}:{'_'.join(map(str, x.shape))}", key] for key, x in dit.state_dict().items()]
    assert hashlib.md5(",".join(sorted(sum(keys, []))).encode()).hexdigest() == fingerprint


def test_real_shapes_forward_and_backward():
    """1.3B's shapes with two of its blocks, 5 frames of 64x64, bfloat16 with float32 masters."""
    with torch.device("meta"):
        dit = DiT(dataclasses.replace(WAN, num_layers=2))
    dit = dit.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for p in dit.parameters():
            p.uniform_(-0.03, 0.03)
    for block in dit.blocks:
        block.self_attn.float()
    model.trainable(dit)
    dit.checkpoint = True
    condition = Condition(torch.randn(1, 512, 4096), torch.randn(1, 257, 1280), torch.randn(1, 16, 2, 8, 8),
                          torch.randn(1, 24, 2, 64, 64), torch.randn(1, 24, 2, 64, 64))
    grads = gradients(dit, torch.randn(2, 16, 2, 8, 8), torch.tensor([0.9, 0.2]), condition)
    assert len(grads) == 2 * 12
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.parametrize("policy", GOLDENS)
def test_float32_masters_beside_bfloat16(policy):
    weights, io, condition = GOLDENS[policy]
    half = load_dit(weights, num_heads=2, dtype=torch.bfloat16)
    mixed = load_dit(weights, num_heads=2, dtype=torch.bfloat16, trained_dtype=torch.float32)
    for name, p in mixed.named_parameters():
        assert p.dtype == (torch.float32 if model.trains(name) else torch.bfloat16)
    args = io["x"], torch.tensor([0.517]), condition()
    with torch.no_grad():
        assert torch.equal(half(*args), mixed(*args))  # the recorded weights are exact in bfloat16
    model.trainable(mixed)
    grads = gradients(mixed, *args)
    exact = gradients(load_dit(weights, num_heads=2), *args)
    for name, g in grads.items():
        assert g.dtype == torch.float32
        assert F.cosine_similarity(g.flatten(), exact[name].flatten(), 0) > 0.99


@BOTH
def test_gradient_checkpointing_changes_nothing(changes):
    dit = random_dit(**changes)
    args = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.3, 0.8]), random_condition(dit, 1)
    stored = gradients(dit, *args)
    dit.checkpoint = True
    recomputed = gradients(dit, *args)
    assert stored.keys() == recomputed.keys() == dict(dit.named_parameters()).keys()
    for name in stored:
        assert_close(stored[name], recomputed[name], 1e-6 * (1 + stored[name].abs().max()))


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_does_not_repeat_self_attention(compiled):
    """A block has three attentions: of itself, the text, the image. Backward recomputes the short two."""
    dit, ops = random_dit(), []
    condition = random_condition(dit, 1)

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ops.append(str(function))
            return function(*args, **(kwargs or {}))

    def read(gm, inputs):  # a compiled block's backward
        ops.extend(str(x) for node in gm.graph.nodes for x in (node.target, *node.args[:2])
                   if isinstance(x, torch._ops.OpOverload))  # also where a node saves the random state for it
        return make_boxed_func(gm.forward)
    model.trainable(dit)
    dit.checkpoint = True
    if compiled:
        torch._dynamo.reset()
        dit.compile(backend=aot_autograd(fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
                                         bw_compiler=read, partition_fn=min_cut_rematerialization_partition))
    v = dit(torch.randn(1, 16, 3, 4, 6), torch.tensor([0.3]), condition)
    with nullcontext() if compiled else Record():
        v.square().sum().backward()
    attentions = collections.Counter("backward" in op for op in ops if "dot_product" in op)
    assert attentions == {True: 3 * 2, False: 2 * 2}


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("policy", GOLDENS)
def test_compiled(policy):
    torch._dynamo.reset()  # other tests' graphs of the same blocks count towards its limit
    weights, io, condition = GOLDENS[policy]
    dit, compiled = load_dit(weights, num_heads=2), load_dit(weights, num_heads=2)
    compiled.compile(fullgraph=True)  # no graph breaks
    args = io["x"], torch.tensor([0.517]), condition()
    model.trainable(dit), model.trainable(compiled)
    v = compiled(*args)
    assert_close(v, io["velocity_t517"], 1e-5)
    v.square().sum().backward()
    assert compiled.state_dict().keys() == dit.state_dict().keys()
    for name, g in gradients(dit, *args).items():
        assert_close(compiled.get_parameter(name).grad, g, 1e-5 * (1 + g.abs().max()))


# ---- diffusers ----

def test_equals_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    wan = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=40,
        freq_dim=32, ffn_dim=80, num_layers=2, cross_attn_norm=True, eps=1e-6).eval()
    names = {"attn1.": "self_attn.", "attn2.": "cross_attn.", "to_out.0.": "o.", "to_q.": "q.", "to_k.": "k.",
             "to_v.": "v.", "ffn.net.0.proj.": "ffn.0.", "ffn.net.2.": "ffn.2.", "norm2.": "norm3.",
             "condition_embedder.time_proj.": "time_projection.1.", "proj_out.": "head.head.",
             "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
             "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
             "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
             "condition_embedder.text_embedder.linear_2.": "text_embedding.2."}
    state = {}
    for key, value in wan.state_dict().items():
        key = "head." * (key == "scale_shift_table") + key.replace("scale_shift_table", "modulation")
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        state[key] = value.contiguous()
    save_file(state, tmp_path / "t2v.safetensors")
    dit = load_dit(tmp_path / "t2v.safetensors", num_heads=2)
    x, t, text = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.9, 0.25]), torch.randn(2, 11, 40)
    with torch.no_grad():
        assert_close(dit(x, t, Condition(text)), wan(x, 1000 * t, text, return_dict=False)[0], 1e-5)


# ---- files ----

@pytest.fixture
def state():
    return load_file(WEIGHTS)


def saved(path, state):
    save_file(state, path)
    return path


def test_overlays(tmp_path, state):
    roce = {k: v for k, v in state.items() if "rope_phase" in k}
    base = saved(tmp_path / "base.safetensors", {k: v for k, v in state.items() if k not in roce})
    first = saved(tmp_path / "first.safetensors", {k: 2 * v for k, v in state.items() if ".self_attn." in k})
    bias = "blocks.1.self_attn.q.bias"
    second = saved(tmp_path / "second.safetensors", {bias: state[bias]})
    dit = load_dit(base, first, second, num_heads=2)
    for key, value in dit.state_dict().items():
        twice = ".self_attn." in key and key != bias
        assert torch.equal(value, state[key].float() * (2 if twice else 1))
    assert load_dit(base, num_heads=2).config.roce is False
    one = saved(tmp_path / "one.safetensors", {k: v for k, v in roce.items() if "blocks.0" in k})
    with pytest.raises(ValueError, match="missing blocks.1.self_attn.rope_phase_qk.1.weight") as error:
        load_dit(base, one, num_heads=2)
    assert "missing blocks.1.self_attn.rope_phase_vo.1.weight" in str(error.value)
    strange = saved(tmp_path / "strange.safetensors", {"blocks.2.self_attn.q.bias": state["head.head.bias"]})
    with pytest.raises(ValueError, match="strange.safetensors: 1 keys.*unexpected blocks.2.self_attn.q.bias"):
        load_dit(WEIGHTS, strange, num_heads=2)
    plain_base = {k: v for k, v in state.items() if k not in roce and "img" not in k}
    with pytest.raises(ValueError, match="18 keys do not fit.*unexpected"):
        load_dit(saved(tmp_path / "plain.safetensors", plain_base), WEIGHTS, num_heads=2)


def test_our_checkpoint_round_trip(tmp_path):
    dit = golden_dit()
    with torch.no_grad():
        for p in model.trainable(dit):
            p.add_(0.1)
    trained = {name: p.detach() for name, p in dit.named_parameters() if p.requires_grad}
    again = load_dit(WEIGHTS, saved(tmp_path / "ours.safetensors", trained), num_heads=2)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in dit.state_dict().items())


@pytest.mark.parametrize("key", ["blocks.0.ffn.0.weight", "blocks.1.self_attn.q.weight",
                                 "blocks.0.norm3.weight", "control_adapter.conv.bias"])
def test_all_wrong_keys_in_one_error(tmp_path, state, key):
    del state["blocks.0.cross_attn.k_img.bias"]
    state["extra.weight"] = torch.zeros(3)
    state[key] = torch.zeros(5, *state[key].shape[1:])
    with pytest.raises(ValueError) as error:
        load_dit(saved(tmp_path / "bad.safetensors", state), num_heads=2)
    message = str(error.value)
    assert "3 keys do not fit" in message and "bad.safetensors" in message
    assert "missing blocks.0.cross_attn.k_img.bias" in message and "unexpected extra.weight" in message
    assert f"{key} is (5" in message and "expected (" in message


def test_bad_files(tmp_path, state):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_dit(tmp_path / "nowhere.safetensors")
    data = WEIGHTS.read_bytes()
    contents = {"cut": data[:-1000], "short": data[:100], "empty": b"", "noise": b"\x80\x02pickle" * 99}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a whole safetensors file"):
            load_dit(path, num_heads=2)
    with pytest.raises(ValueError, match="foreign.safetensors: not a Wan DiT"):
        load_dit(saved(tmp_path / "foreign.safetensors", {"model.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="give num_heads"):
        load_dit(WEIGHTS)  # head size 24, which shapes alone do not tell
    with pytest.raises(ValueError, match="dim 192 is not heads of 128: give num_heads"), torch.device("meta"):
        plain = DiT(Config(192, num_heads=3, num_layers=1, ffn_dim=8, in_dim=16))  # could pass for one head
        model.config_from({key: tuple(x.shape) for key, x in plain.state_dict().items()})
    with pytest.raises(ValueError, match=r"head.head.bias \(I64\)"):
        load_dit(saved(tmp_path / "int.safetensors", {**state, "head.head.bias": torch.zeros(64).long()}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak memory from")
def test_loading_takes_little_more_than_the_file(tmp_path):
    with torch.device("meta"):
        state = DiT(dataclasses.replace(WAN, num_layers=1)).state_dict()
    state = {key: torch.zeros(x.shape, dtype=torch.bfloat16) for key, x in state.items()}
    path = saved(tmp_path / "big.safetensors", state)
    code = """if 1:
        import sys, torch, model
        def peak():
            return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
        model.load_dit(sys.argv[1], num_heads=2)  # what is imported on first use
        before = peak()
        dit = model.load_dit(sys.argv[2], dtype=torch.bfloat16)
        print(peak() - before)"""
    result = subprocess.run([sys.executable, "-c", code, WEIGHTS, path], cwd=Path(model.__file__).parent,
                            text=True, capture_output=True, check=True)
    assert int(result.stdout) < 1.3 * path.stat().st_size


# ---- wrong input ----

def test_wrong_input():
    dit = random_dit()
    c, x, t = random_condition(dit, 2), torch.randn(2, 16, 3, 4, 6), torch.tensor(0.5)
    replace = dataclasses.replace
    for args, message in [
            ((x[0], t, c), "expected \\(B, C, F, h, w\\)"),
            ((torch.randn(2, 16, 3, 5, 6), t, c), "h and w even"),
            ((torch.randn(3, 16, 3, 4, 6), t, c), "3 rows of x, 2 conditions"),
            ((x, torch.rand(3), c), "3 noise levels"),
            ((x[:, :, :2], t, c), "expected \\(16, 3, 4, 6\\)"),
            ((x[:, :8], t, c), "expected \\(16, 3, 4, 6\\)"),
            ((x, t, replace(c, text=c.text[..., :9])), "text is \\(2, 7, 9\\), expected \\(2, any, 40\\)"),
            ((x, t, replace(c, image=None)), "condition.image: this model needs it"),
            ((x, t, replace(c, image=c.image[:1])), "condition.image is"),
            ((x, t, replace(c, source=c.source[0])), "condition.source is"),
            ((x, t, replace(c, source=c.source[:, :, :2])), "condition.camera is"),
            ((x, t, replace(c, camera=None)), "condition.camera: this model needs it"),
            ((x, t, replace(c, source_camera=None)), "condition.source_camera: this model needs it"),
            ((x, t, replace(c, source_camera=c.camera[:, :, :2])), "condition.source_camera is"),
            ((x, t, replace(c, source=None)), "condition.source_camera: this model takes none")]:
        with pytest.raises(ValueError, match=message):
            dit(*args)
    recam, poses = random_dit(**RECAM), torch.randn(2, 3, 12)
    right = Condition(c.text, source=c.source, camera=poses)
    for changes, message in [
            ({"camera": c.camera}, "camera is .*expected \\(2, 3, 12\\)"),
            ({"camera": poses[:, :2]}, "camera is \\(2, 2, 12\\), expected \\(2, 3, 12\\)"),
            ({"camera": torch.randn(2, 3, 16)}, "camera is \\(2, 3, 16\\)"),
            ({"camera": None}, "condition.camera: this model needs it"),
            ({"source": None}, "condition.source: this model needs it"),
            ({"source": c.source[..., :5]}, "condition.source is .*no multiple of 2"),
            ({"source_camera": c.camera}, "condition.source_camera: this model takes none"),
            ({"image": c.image}, "condition.image: this model takes none")]:
        with pytest.raises(ValueError, match=message):
            recam(x, t, replace(right, **changes))
    assert recam(x, t, right).shape == x.shape
    t2v = random_dit(**T2V)
    with pytest.raises(ValueError, match="condition.source: this model takes none"):
        t2v(x, t, Condition(c.text, source=c.source))
    for config, message in [(dict(num_heads=5), "give num_heads"),
                            (dict(num_heads=2, roce=True), "needs a base with control_adapter"),
                            (dict(num_heads=2, pose_dim=12), "needs Wan T2V")]:
        with pytest.raises(ValueError, match=message):
            DiT(Config(dim=48, num_layers=1, ffn_dim=8, **config))
