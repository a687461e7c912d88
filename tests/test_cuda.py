"""The loop's phases on a GPU that need not be there: fake tensors have device, shape and type, no values.

Operations that mix devices raise, and so do float(x), x.tolist(), x[mask], x.numpy(): what makes the host
wait for a value. Not seen: copies with .cpu(), the backward pass, which attention kernel a card would choose.
Needs torch built for CUDA (`pip install torch` from PyPI).
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rewards
import sampler
import trajectories
from data.video import decode
from evaluation.generate import prepare
from grpo import advantages, micro_batches, policy_loss, summary
from model import Condition, Config, DiT, trainable
from pretrained.vae import VAE

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
CUDA = torch.device("cuda:0")


def test_phases_stay_on_the_device_and_read_no_value():
    C, G, frames, height, width = 2, 3, 9, 32, 48
    shape, sigmas = (16, 3, height // 8, width // 8), sampler.schedule(8, 5.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            with CUDA:
                dit = DiT(Config(dim=256, num_heads=2, num_layers=2, ffn_dim=512, image_dim=1280,
                                 camera_dim=24, roce=True)).eval()
                codec = VAE(16, [32, 32, 64, 64, 64], 1, [False, True, True]).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        for p in trainable(dit):
            p.data = p.data.float()
        with CUDA:
            c2w, intrinsics = torch.empty(C, frames, 4, 4, dtype=torch.float64), torch.empty(C, 4)
            text, image, source = torch.empty(C, 512, 4096), torch.empty(C, 257, 1280), torch.empty(C, *shape)
        maps = trajectories.camera_maps(c2w, intrinsics, height, width)
        condition = Condition(text, image, source, maps, maps.clone())
        prepared, negative = prepare(dit, condition, torch.empty(1, 512, 4096), 2.0)
        sampled = sampler.rollout(dit, prepared, G, (2, 3), sigmas=sigmas, shape=shape, seed=0, device=CUDA,
                                  condition_ids=[0, 1], negative=negative, guidance=2.0, micro_batch=2)
        videos = decode(codec, sampled.latents.flatten(0, 1), 2)
        assert videos.shape == (C * G, frames, height, width, 3) and videos.device == CUDA
        c2w = c2w.repeat_interleave(G, 0)
        scene = rewards.Scene(c2w, intrinsics, [""] * C * G, 24.0, torch.empty_like(videos), c2w)
        scores = {}
        for reward in (*rewards.MODEL_FREE, rewards.geometry(lambda videos, scene: scene.c2w.clone())):
            scores |= {name: x.view(C, G) for name, x in reward(videos, scene).items()}
        A = advantages(scores, dict.fromkeys(scores, 1.0))
        losses, stats = zip(*(policy_loss(dit, sampled, k, A, None, c, m)
                              for k in range(2) for c, m in micro_batches(sampled, k, 2)))
        out = [*losses, *summary(stats).values(), *scores.values(), A]
        assert losses[-1].requires_grad and {x.device for x in out} == {CUDA}
