from pathlib import Path
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
import model
from model import Condition

GOLDEN = Path(__file__).parent / "golden"
IO = load_file(GOLDEN / "redirector_io.safetensors")


def golden_dit(**kw):
    return model.load_dit(GOLDEN / "redirector_weights.safetensors", num_heads=2, **kw)


def golden_condition(text="context"):
    return Condition(IO[text], IO["clip_feature"], IO["y"], IO["camera_target"], IO["camera_cond"])


@pytest.mark.parametrize("t", ["1000", "517", "37.5"])
def test_velocity(t):
    dit = golden_dit()
    with torch.no_grad():
        v = dit(IO["x"], torch.tensor(float(t) / 1000), golden_condition())
    print((v - IO[f"velocity_t{t}"]).abs().max())
    assert (v - IO[f"velocity_t{t}"]).abs().max() < 1e-4


def test_backward():
    dit = golden_dit()
    parameters = model.trainable(dit)
    dit(IO["x"], torch.tensor([0.5]), golden_condition()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)


def test_sample():
    dit, x = golden_dit(), IO["x"]
    both = Condition.cat([golden_condition("negative_context"), golden_condition()])
    u = torch.linspace(1, 0, 7)
    ts = 5 * u / (1 + 4 * u)
    with torch.no_grad():
        prepared = dit.prepare(both)
        for t, t_next in zip(ts[:-1], ts[1:]):
            negative, positive = dit(torch.cat([x, x]), t, prepared).chunk(2)
            x = x + (t_next - t) * (negative + 5 * (positive - negative))
    assert (x - IO["euler6_cfg5"]).abs().max() < 1e-3
