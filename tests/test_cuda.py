"""The loop's phases on a GPU that need not be there: fake tensors have device, shape and type, no values.

Operations that mix devices raise, and so do float(x), x.tolist(), x[mask], x.numpy(): what makes the host
wait for a value. Not seen: copies with .cpu(), the backward pass, which attention kernel a card would choose.
Needs torch built for CUDA (`pip install torch` from PyPI).
"""
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rewards
import sampler
import trajectories
from benchmarks import bench
from pretrained import vae
from grpo import advantages, micro_batches, policy_loss, summary
from data.video import decode
from evaluation.generate import prepare
from model import Condition, Config, DiT, trainable
from sampler import compress, rollout, schedule

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")


@pytest.mark.parametrize("tail, guidance", [(None, 1.0), (0.4, 2.0)])
def test_phases_stay_on_the_device_and_read_no_value(tail, guidance):
    device, C, G, frames, height, width = torch.device("cuda:0"), 2, 3, 9, 32, 48
    shape, sigmas = (16, 3, height // 8, width // 8), schedule(8, 5.0)
    levels = None if tail is None else len(compress(sigmas, 4, tail))  # made on the CPU, from its values
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(sampler, "compress",
                                                                  lambda *args: torch.empty(levels)):
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                dit = DiT(Config(dim=256, num_heads=2, num_layers=2, ffn_dim=512, image_dim=1280,
                                 camera_dim=24, roce=True)).eval()
                codec = vae.VAE(16, [32, 32, 64, 64, 64], 1, [False, True, True]).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        for p in trainable(dit):
            p.data = p.data.float()

        # conditions
        c2w = torch.empty(C, frames, 4, 4, dtype=torch.float64, device=device)
        intrinsics = torch.empty(C, 4, device=device)
        maps = trajectories.camera_maps(c2w, intrinsics, height, width)
        text, image = torch.empty(C, 512, 4096, device=device), torch.empty(C, 257, 1280, device=device)
        condition = Condition(text, image, torch.empty(C, *shape, device=device), maps, maps.clone())
        prepared, negative = prepare(dit, condition, torch.empty(1, 512, 4096), guidance)

        # rollout, decode
        sampled = rollout(dit, prepared, G, (2, 3), sigmas=sigmas, shape=shape, seed=0, condition_ids=[0, 1],
                          tail=tail, negative=negative, guidance=guidance, micro_batch=2, device=device)
        videos = decode(codec, sampled.latents.flatten(0, 1), 2)
        assert videos.shape == (C * G, frames, height, width, 3) and videos.device == device

        # rewards, advantages
        c2w = c2w.repeat_interleave(G, 0)
        scene = rewards.Scene(c2w, intrinsics, [""] * C * G, 24.0, torch.empty_like(videos), c2w)
        scores = {}
        for reward in (*rewards.MODEL_FREE, rewards.geometry(lambda videos, scene: scene.c2w.clone())):
            scores |= {name: x.view(C, G) for name, x in reward(videos, scene).items()}
        weights = dict.fromkeys(scores, 1.0)
        A = advantages(scores, weights)

        # objective
        stats = []
        for k in range(2):
            for c, m in micro_batches(sampled, k, 2):
                loss, found = policy_loss(dit, sampled, k, A, None, c, m)
                stats.append(found)
        out = [loss, *summary(stats).values(), *scores.values(), A]
        assert loss.requires_grad and {x.device for x in out} == {device}


def test_bench_measures_a_network_on_the_device(monkeypatch):
    """No value is read: the tables' seconds are python's own, and nothing else is asked of the tensors."""
    monkeypatch.setattr(bench, "DEVICE", torch.device("cuda:0"))
    config = bench.Network(dim=256, layers=2, ffn=512, frames=9, height=32, width=48, dtype="bfloat16", repeat=1,
                           backward=False, compile=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        facts, rows = bench.measure_network(config)
    assert facts["tokens"] == 2 * 3 * 2 * 3 and {"ours, prepared", "ours, nothing prepared"} <= set(rows)
