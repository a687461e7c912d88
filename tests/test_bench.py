"""What bench.py counts, against what torch counts."""
import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench


def test_flops_of_a_forward():
    args = argparse.Namespace(dim=256, layers=2, ffn=512, frames=5, height=32, width=48)
    dit, shape, _, prepared = bench.build(args)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dit(torch.zeros(1, *shape), torch.ones(()), prepared)
    counted = counter.get_total_flops()
    assert bench.flops(dit.config, 2 * 2 * 2 * 3) == pytest.approx(counted, rel=0.1)  # less the time MLP


def test_one_iteration_marks_its_phases():
    args = argparse.Namespace(dim=128, layers=1, ffn=128, frames=5, height=16, width=16)
    dit, shape, _, prepared = bench.build(args)
    phases = []
    bench.one_iteration(dit, prepared, shape, (1, 2), phases.append, members=2, steps=4, tail=0.4,
                        micro_batch=1)
    assert phases == ["rollout", "decode", "update"]
    assert all(p.grad.abs().sum() > 0 for name, p in dit.named_parameters() if ".self_attn.q." in name)
