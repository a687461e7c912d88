"""model.py against recorded numbers, against its equations written out in float64, and against itself."""
import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import load_file, save_file
from tiny_weights import random_state, shapes_of
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import Condition, Config, DiT, load_dit
from sampler import ode_step, schedule, velocity

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = {name: GOLDEN / f"{name}_weights.safetensors" for name in ("redirector", "recammaster")}
IO = {name: load_file(GOLDEN / f"{name}_io.safetensors") for name in WEIGHTS}
T2V = dict(in_dim=16, image_dim=None, camera_dim=None, roce=False)
RECAM = {**T2V, "pose_dim": 12}
EACH = pytest.mark.parametrize("policy", WEIGHTS)
BOTH = pytest.mark.parametrize("changes", [{}, RECAM], ids=["ReDirector", "ReCamMaster"])


def recorded(policy):
    """x, t and condition of a recorded forward pass."""
    io = IO[policy]
    rest = {"image": io["clip_feature"], "camera": io["camera_target"],
            "source_camera": io["camera_cond"]} if policy == "redirector" else {"camera": io["camera"]}
    return io["x"], torch.tensor([0.517]), Condition(io["context"], source=io["y"], **rest)


def random_dit(seed=0, **changes):
    """A tiny DiT, every weight of it doing something."""
    config = Config(**dict(dim=48, num_heads=2, num_layers=2, ffn_dim=80, freq_dim=32, text_dim=40,
                           image_dim=24, camera_dim=24, roce=True) | changes)
    dit = DiT(config)
    dit.load_state_dict(random_state(shapes_of(DiT, config), seed))
    return dit.eval()


def random_inputs(dit, b, rows=None, dtype=torch.float32, seed=0):
    """x, t and condition of `rows` rows, by default as many as conditions."""
    c, g, rows = dit.config, torch.Generator().manual_seed(seed), rows or b

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float32).to(dtype)

    parts = {"text": (7, c.text_dim), "image": c.image_dim and (5, c.image_dim),
             "source": dit.takes_source and (16, 3, 4, 6), "camera": c.camera_dim and (24, 3, 32, 48),
             "source_camera": dit.takes_source and c.camera_dim and (24, 3, 32, 48)}
    parts |= {"camera": (3, 12)} if c.pose_dim else {}
    condition = Condition(**{name: draw(b, *shape) for name, shape in parts.items() if shape})
    return draw(rows, 16, 3, 4, 6), torch.rand(rows, generator=g).to(dtype), condition


def gradients(dit, *args):
    dit.zero_grad()
    dit(*args).square().sum().backward()
    return {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}


def assert_close(a, b, tolerance):
    assert (a.double() - b.double()).abs().max() < tolerance


@EACH
def test_recorded_velocities_and_sample(policy):
    """At three noise levels; six Euler steps at shift 5 and guidance 5."""
    dit, (x, _, condition) = load_dit(WEIGHTS[policy], num_heads=2), recorded(policy)
    negative = dataclasses.replace(condition, text=IO[policy]["negative_context"])
    with torch.no_grad():
        for t in ("1000", "37.5", "517"):
            v = dit(x, torch.tensor(float(t) / 1000), condition)
            assert_close(v, IO[policy][f"velocity_t{t}"], 1e-5)
        condition, negative = dit.prepare(condition), dit.prepare(negative)
        sigmas = schedule(6, 5.0)
        for t, t_next in zip(sigmas, sigmas[1:]):
            x = ode_step(x, velocity(dit, x, t, condition, negative, 5.0), t, t_next)
    assert_close(x, IO[policy]["euler6_cfg5"], 1e-4)


# ---- the equations, one row at a time, as the published implementations compute them ----

def plain(dit, x, t, c, dtype):
    """Velocity of one row, all in `dtype` but RMSNorm (at least float32) and rotations (complex128)."""
    s = {key: value.to(dtype) for key, value in dit.named_parameters()}
    x, c, cfg = x.to(dtype), c.to(dtype), dit.config
    heads, d = cfg.num_heads, cfg.dim // cfg.num_heads
    third = 2 * (d // 6)

    def lin(x, name):
        return F.linear(x, s[name + ".weight"], s.get(name + ".bias"))

    def rms(x, name):
        y = model.upcast(x)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype) * s[name + ".weight"]

    def norm(x, name=None, eps=1e-6):
        weights = (s[name + ".weight"], s[name + ".bias"]) if name else ()
        return F.layer_norm(x, x.shape[-1:], *weights, eps=eps)

    def attend(q, k, v):
        q, k, v = (y.unflatten(-1, (heads, d)).transpose(0, 1) for y in (q, k, v))
        return (torch.softmax(q @ k.transpose(1, 2) / d ** 0.5, -1) @ v).transpose(0, 1).flatten(1)

    def turn(x, angle):
        pairs = torch.view_as_complex(x.double().reshape(len(x), heads, d // 2, 2))
        return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(1).to(dtype)

    def conv(x, name, **options):
        return F.conv2d(x, s[name + ".weight"], s[name + ".bias"], **options)

    def embed(x, maps):
        x = torch.cat([x, torch.zeros_like(x)]) if cfg.in_dim == 2 * cfg.out_dim else x
        x = F.conv3d(x[None], s["patch_embedding.weight"], s["patch_embedding.bias"], stride=(1, 2, 2))
        if maps is None:
            return x[0].flatten(1).T, None
        y = conv(F.pixel_unshuffle(maps.transpose(0, 1), 8), "control_adapter.conv", stride=2)
        r = "control_adapter.residual_blocks.0.conv"
        y = y + conv(conv(y, r + "1", padding=1).relu(), r + "2", padding=1)
        return (x + y.transpose(0, 1))[0].flatten(1).T, y.permute(0, 2, 3, 1).flatten(0, 2)

    frequency = 10000.0 ** (-torch.arange(cfg.freq_dim // 2).double() / (cfg.freq_dim // 2))
    angle = 1000 * t.double() * frequency
    e = torch.cat([angle.cos(), angle.sin()]).to(dtype)
    e = lin(F.silu(lin(e, "time_embedding.0")), "time_embedding.2")
    modulation = lin(F.silu(e), "time_projection.1").unflatten(0, (6, -1))
    text = lin(F.gelu(lin(c.text[0], "text_embedding.0"), approximate="tanh"), "text_embedding.2")
    if c.image is not None:
        image = F.gelu(lin(norm(c.image[0], "img_emb.proj.0", 1e-5), "img_emb.proj.1"))
        image = norm(lin(image, "img_emb.proj.3"), "img_emb.proj.4", 1e-5)
    tokens, camera = embed(x[0], c.camera[0] if cfg.camera_dim else None)
    n, frames, h, w = len(tokens), x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    axes = (torch.arange(k).double() for k in (2 * frames if cfg.pose_dim else frames, h, w))
    grid = torch.meshgrid(*axes, indexing="ij")
    rope = torch.cat([position.reshape(-1, 1) * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
                      for position, size in zip(grid, (d - 2 * third, third, third))], 1)[:, None]
    if c.source is not None:
        source, source_camera = embed(c.source[0], c.source_camera[0] if cfg.camera_dim else None)
        tokens, rope = torch.cat([tokens, source]), torch.cat([rope, rope])[:2 * n]
        camera = None if camera is None else torch.cat([camera, source_camera])
    for b in (f"blocks.{i}." for i in range(cfg.num_layers)):
        a = b + "self_attn."
        shift, scale, gate, shift2, scale2, gate2 = s[b + "modulation"][0] + modulation
        y = norm(tokens) * (1 + scale) + shift
        if cfg.pose_dim:
            y = y + lin(c.camera[0], b + "cam_encoder").repeat_interleave(h * w, 0).repeat(2, 1)
        qk = vo = torch.zeros(1, heads, d // 2)
        if cfg.roce:
            qk, vo = (lin(F.silu(camera), f"{a}rope_phase_{kind}.1").double() for kind in ("qk", "vo"))
            qk, vo = (F.pad(phase.unflatten(-1, (heads, -1)), (d // 2 - third, 0)) for phase in (qk, vo))
        q, k = (turn(rms(lin(y, a + x), f"{a}norm_{x}"), rope + qk) for x in "qk")
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
    v = lin(norm(tokens[:n]) * (1 + scale) + shift, "head.head").reshape(frames, h, w, 2, 2, -1)
    return torch.einsum("fhwyxc->cfhywx", v).reshape(1, -1, frames, 2 * h, 2 * w)


@pytest.mark.parametrize("changes", [{}, RECAM, T2V, dict(roce=False, image_dim=None, dim=64, num_heads=1)])
def test_equals_the_equations_in_float64(monkeypatch, changes):
    """So do the gradients of all that trains, with gradient checkpointing too."""
    dit = random_dit(**changes).double()
    names = [name for name, _ in dit.named_parameters() if model.trains(name)]
    x, t, condition = random_inputs(dit, 1, dtype=torch.float64)
    expected = plain(dit, x, t, condition, torch.float64)
    exact = torch.autograd.grad(expected.square().sum(), model.trainable(dit))
    for dit.checkpoint in (False, True):
        assert_close(dit(x, t, condition), expected, 1e-11)
        found = gradients(dit, x, t, condition)
        for name, g in zip(names, exact, strict=True):
            assert g.any()
            assert_close(found[name], g, 1e-9 * (1 + g.abs().max()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # rotations in real numbers
    with torch.no_grad():
        assert_close(dit(x, t, condition), expected, 1e-11)


@BOTH
def test_bfloat16_error_is_no_larger_than_the_plain_ones(changes):
    ours = theirs = 0
    for seed in range(3):
        dit = random_dit(seed, num_layers=4, **changes)
        x, t, condition = random_inputs(dit, 1, dtype=torch.bfloat16, seed=seed)
        with torch.no_grad():
            exact = dit.double()(x.double(), t.double(), condition.to(torch.float64))
            v = dit.bfloat16()(x.float(), t.float(), condition)
            ours += (v - exact).square().mean()
            theirs += (plain(dit, x, t, condition, torch.bfloat16) - exact).square().mean()
    assert v.dtype == torch.float32 and 0 < ours <= theirs


def test_a_new_recammaster_is_wan_on_twice_the_frames():
    """Its poses add nothing and its projector changes nothing yet; a new model's velocity is 0."""
    t2v, fresh = random_dit(**T2V), DiT(random_dit(**RECAM).config)
    x, t, c = random_inputs(fresh, 1)
    with torch.no_grad():
        assert not fresh(x, t, c).any()
        fresh.load_state_dict(t2v.state_dict(), strict=False)
        assert torch.equal(fresh(x, t, c), t2v(torch.cat([x, c.source], 2), t, Condition(c.text))[:, :, :3])


@BOTH
def test_rows_share_conditions_that_may_be_prepared_sliced_and_joined(changes):
    """Each row as it is alone; gradients of what trains are the same with a prepared condition."""
    dit = random_dit(**changes)
    x, t, condition = random_inputs(dit, 2, 6)
    model.trainable(dit)
    direct = gradients(dit, x, t, condition)
    with torch.no_grad():
        prepared, together = dit.prepare(condition), dit(x, t, condition)
        for row in range(6):
            alone = dit(x[row:row + 1], t[row], condition[row // 3:row // 3 + 1])
            assert_close(alone, together[row:row + 1], 1e-5)
        for c in (prepared, condition):
            swapped = type(c).cat([c[1:], c[:1]])
            assert_close(dit(x.roll(3, 0), t.roll(3, 0), swapped), together.roll(3, 0), 1e-5)
    for name, g in gradients(dit, x, t, prepared).items():
        assert_close(g, direct[name], 1e-6 * direct[name].abs().max())
    odd = dataclasses.replace(condition, source=condition.source[..., :5])
    refused(lambda: dit.prepare(odd), "size no multiple of 2" if dit.takes_poses else "condition.camera is")
    refused(lambda: Condition.cat([condition, dataclasses.replace(condition, source=None)]), "same parts")


@pytest.mark.parametrize("changes, fingerprint", [
    ({}, "ac6a5aa74f4a0aab6f64eb9a72f19901"),  # Wan2.1-Fun-V1.1-1.3B-Control-Camera
    (T2V | {"camera_blocks": 0}, "9269f8db9040a9d860eaca435be61814")])
def test_published_keys_and_shapes(changes, fingerprint):
    """By the md5 of all keys and shapes by which DiffSynth-Studio recognises Wan's files."""
    config = Config(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960,
                    **dict(image_dim=1280, camera_dim=24, roce=False) | changes)
    shapes = {key: tuple(shape) for key, shape in shapes_of(DiT, config).items()}
    keys = [text for key, shape in shapes.items() for text in (f"{key}:{'_'.join(map(str, shape))}", key)]
    assert hashlib.md5(",".join(sorted(keys)).encode()).hexdigest() == fingerprint
    assert model.config_from(shapes) == config


@EACH
def test_float32_masters_beside_bfloat16(policy):
    half, mixed = (load_dit(WEIGHTS[policy], num_heads=2, dtype=torch.bfloat16, trained_dtype=kind)
                   for kind in (None, torch.float32))
    assert all((p.dtype == torch.float32) == model.trains(name) for name, p in mixed.named_parameters())
    args = recorded(policy)
    with torch.no_grad():
        assert torch.equal(half(*args), mixed(*args))  # the recorded weights are exact in bfloat16
    if policy == "recammaster":  # a pose rounded to bfloat16 would move a camera at 3 m by millimetres
        assert torch.equal(half.prepare(args[2]).camera, args[2].camera)
    model.trainable(mixed)
    assert {g.dtype for g in gradients(mixed, *args).values()} == {torch.float32}


def test_checkpointing_does_not_repeat_self_attention():
    """A block has three attentions: of itself, the text, the image. Backward recomputes the short two."""
    dit, ops = random_dit(num_layers=1), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ops.append(str(function))
            return function(*args, **(kwargs or {}))

    model.trainable(dit)
    dit.checkpoint = True
    v = dit(*random_inputs(dit, 1))
    with Record():
        v.square().sum().backward()
    assert sum("dot_product" in op and "backward" not in op for op in ops) == 2


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@EACH
def test_compiled(policy):
    """No graph breaks, the same keys, velocity and gradients."""
    torch._dynamo.reset()  # other tests' graphs of the same blocks count towards its limit
    dit, compiled = (load_dit(WEIGHTS[policy], num_heads=2) for _ in range(2))
    compiled.compile(fullgraph=True)
    model.trainable(dit), model.trainable(compiled)
    assert_close(compiled(*recorded(policy)), IO[policy]["velocity_t517"], 1e-5)
    found = gradients(compiled, *recorded(policy))
    assert compiled.state_dict().keys() == dit.state_dict().keys()
    for name, g in gradients(dit, *recorded(policy)).items():
        assert_close(found[name], g, 1e-5 * (1 + g.abs().max()))


@EACH
def test_files_lie_over_one_another(tmp_path, policy):
    """A method's additions and what we train over the base; one of them only with all of its keys."""
    state = {key: x.float() for key, x in load_file(WEIGHTS[policy]).items()}
    added = {key: x for key, x in state.items() if any(part in key for part in model.ADDS)}
    base, method, ours = (tmp_path / name for name in ("base.safetensors", "method.ckpt", "ours.safetensors"))
    save_file({key: x for key, x in state.items() if key not in added}, base)
    torch.save(added, method)
    save_file({key: 2 * x for key, x in state.items() if model.trains(key)}, ours)
    for factor, *files in (1, base, method), (2, base, ours), (1, base, ours, WEIGHTS[policy]):
        for key, x in load_dit(*files, num_heads=2).state_dict().items():
            assert torch.equal(x, state[key] * (factor if model.trains(key) else 1))
    last = list(added)[-1]
    torch.save({key: x for key, x in added.items() if key != last}, method)
    refused(lambda: load_dit(base, method, num_heads=2), f"missing {last}")


# ---- wrong input ----

@pytest.mark.parametrize("changes, message", [
    (dict(num_heads=5), "give num_heads"), (dict(pose_dim=12), "needs Wan T2V"),
    (dict(roce=True), "needs a base with control_adapter"),
    (dict(in_dim=16, pose_dim=16), "16 numbers a frame, ReCamMaster's takes 12")])
def test_wrong_shapes_are_refused(changes, message):
    shapes = shapes_of(DiT, Config(192, num_heads=3, num_layers=1, ffn_dim=8))  # could pass for one head
    refused(lambda: model.config_from(shapes), "dim 192 is not heads of 128: give num_heads")
    refused(lambda: DiT(Config(**dict(dim=48, num_heads=2, num_layers=1, ffn_dim=8) | changes)), message)


DIRECTOR = random_dit()
X, _, C = random_inputs(DIRECTOR, 2)


@pytest.mark.parametrize("x, levels, changes, message", [
    (X[..., :3, :], 1, {}, "h and w even"), (torch.cat([X, X])[:3], 1, {}, "3 rows of x, 2 conditions"),
    (X, 3, {}, "3 noise levels"), (X[:, :, :2], 1, {}, "expected (16, 3, 4, 6)"),
    (X, 1, dict(image=C.image[:1]), "condition.image is (1, 5, 24), expected (2, any, 24)"),
    (X, 1, dict(camera=None), "condition.camera: this model needs it"),
    (X, 1, dict(source=None), "condition.source_camera: this model takes none"),
    (X, 1, dict(source=None, source_camera=None, camera=C.camera[..., 8:, :]), "no multiple of 16")])
def test_wrong_input_is_refused(x, levels, changes, message):
    refused(lambda: DIRECTOR(x, torch.zeros(levels), dataclasses.replace(C, **changes)), message)
