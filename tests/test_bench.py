"""What bench counts, against what torch counts; and its command for a card, at a size for a CPU."""
import json
import time
from contextlib import suppress

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench, plan, steps

TINY = dict(dim=128, layers=1, ffn=128, frames=5, height=16, width=16, dtype="float32")


def test_flops_of_a_forward():
    sizes = TINY | dict(dim=256, layers=2, ffn=512, height=32, width=48)
    dit, shape, _, prepared = bench.build(bench.Bench(**sizes))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dit(torch.zeros(1, *shape), torch.ones(()), prepared)
    counted = counter.get_total_flops()
    assert plan.flops(dit.config, 2 * 2 * 2 * 3) == pytest.approx(counted, rel=0.1)  # less the time MLP


@pytest.mark.parametrize("has_card", [False, True])
def test_card_writes_a_table_and_what_plan_reads(has_card, tmp_path, monkeypatch):
    """has_card: what is only done on a card is done too, with a stand-in for the driver."""
    if has_card:
        monkeypatch.setattr(bench, "CUDA", True)
        stand_ins = {"synchronize": None, "empty_cache": None, "get_device_name": "a card",
                     "reset_peak_memory_stats": None, "max_memory_allocated": 1e9}
        for name, found in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    card = dict(lengths="5", repeat=1, compile=False, minutes=60.0, out=str(tmp_path / "card"))
    bench.card(bench.Card(**TINY, **card))
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["not measured"] == {}
    rates = plan.measured_rates(tmp_path / "card.json")
    assert all(x > 0 for x in rates.values())
    table = (tmp_path / "card.md").read_text()
    for phrase in ("| ours, prepared |", "| rollout |", "| update |", "rollout rows 51, update rows 9"):
        assert phrase in table
    assert ("a card" in table) == has_card and ("ours, flash_attention" in table) == has_card
    for row in report["tables"]["memory of one condition"]:  # plan's estimate, by its own functions
        assert row["plan / tensors"] == pytest.approx(row["plan MB"] / 1e3 if has_card else 1, abs=0.1), row


def test_card_refuses_and_a_part_ends_at_its_limit():
    """Also where what runs then hides exceptions, as the compiler does."""
    for wrong, said in ({"lengths": "8"}, "lengths"), ({"official": "nowhere"}, "no checkout"):
        with pytest.raises((ValueError, OSError), match=said):
            bench.card(bench.Card(**TINY | wrong))
    with pytest.raises(bench.TimeLimit), bench.limited(0.01):
        while True:
            with suppress(Exception):
                time.sleep(0.001)


def test_the_cosine_of_halves():
    """Gradients that are alike: 1; at right angles: 0."""
    assert steps.cosine_of_halves(torch.ones(6, 5)) == pytest.approx(1)
    assert steps.cosine_of_halves(torch.eye(6)) == pytest.approx(0)
