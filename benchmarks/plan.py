"""What a run will cost, before it starts: `python -m benchmarks.plan CONFIG --ranks=8`.

Needs neither data nor weights.

Network evaluations are counted, memory is measured: the run's own functions on tensors without contents
(torch's meta device), adding up what is alive. A kernel's own scratch space and the allocator's losses are
not seen.
"""
import dataclasses
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sampler
import train
from data.video import to_uint8
from grpo import micro_batches, policy_loss
from model import Condition, Config, DiT, config_from, trainable, trains
from plumbing.settings import run_command
from pretrained.vae import VAE
from pretrained.weights import find_policy, open_tensors
from sampler import chunks, rollout, schedule, window
from toy.rooms import Codec, HEADS, PATCH, TEXT

FUN_CAMERA = Config(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, image_dim=1280, camera_dim=24,
                    roce=True)


# ---- network evaluations ----

def evaluations(window, steps, members, share=True, tail=None, updates=1):
    """Network rows that one condition costs without guidance: (rollout, update), the update's in forward
    passes. share: the group starts from one noise, so it is one latent up to and including the first window
    step."""
    rest = steps - window[-1] - 1
    rest = rest if tail is None else max(1, int(tail * rest))
    alone = window[0] + 1  # steps a shared group takes as one; of these one is trained on
    if not share:
        return members * (window[-1] + 1 + rest), members * len(window)
    return alone + members * (len(window) - 1 + rest), updates + members * (len(window) - 1)


def cost(counts, checkpointing=True):
    """Evaluations of an iteration from (rollout, update): a backward counts 2, a recomputed forward 1, by
    convention (attention, which long videos mostly are, is 2.5 and is not recomputed)."""
    return counts[0] + counts[1] * (3 + checkpointing)


# ---- memory ----

class Live(TorchDispatchMode):
    """Bytes of tensors alive that were made under it, or shown to it by `add`: now, and at their peak."""
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def add(self, *trees):
        for x in tree_leaves(trees):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(out)
        return out

    def extra(self, f, *args):
        """(f's result, bytes by which memory rises meanwhile)."""
        before, self.peak = self.now, self.now
        return f(*args), self.peak - before


def parts(config):
    """(DiT's Config, codec, latent's shape, text's shape) of a run; weights' headers are read where they are
    there. Codec without contents: to be called under torch.device("meta")."""
    folder, frames = Path(config.weights), (config.frames - 1) // 4 + 1
    if config.world == "toy":
        shapes = open_tensors(folder / "toy_codec.safetensors")[0]
        codec = Codec({key: torch.empty(shape) for key, shape in shapes.items()})
        return (config_from(open_tensors(folder / "toy_base.safetensors")[0], HEADS), codec,
                (16, frames, config.height // PATCH, config.width // PATCH), (1, TEXT))
    plain = dict(in_dim=16, image_dim=None, camera_dim=None, roce=False)  # Wan T2V
    dit = dataclasses.replace(FUN_CAMERA, **(plain if config.world == "captions" else {}))
    files = find_policy(folder).files
    if all(file.is_file() for file in files):  # they say what it is
        dit = config_from({key: shape for file in files for key, shape in open_tensors(file)[0].items()})
    codec = VAE(16, [96, 96, 192, 384, 384], 2, [False, True, True])  # as published
    return dit, codec, (16, frames, config.height // 8, config.width // 8), (512, dit.text_dim)


def memory(config, ranks=1, dtype=None):
    """Bytes on one rank -> (what stays: part -> bytes, peaks: phase -> bytes, with what stays). Reward models
    are not in it. dtype: of frozen weights; None: the one of a GPU run."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # meta's own choice has N x N weights
    attention = lambda q, k, v: flash(q, k, v)[0]
    noise = lambda shape, *key: torch.empty(shape)  # a generator with a seed needs a real device
    with (torch.device("meta"), patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
          patch.object(sampler, "_noise", noise)):
        dit_config, *others = parts(config)
        dtype = dtype or (torch.float32 if config.world == "toy" else torch.bfloat16)
        measured = []
        for n in (2, 3):
            with Live() as live:
                small = dataclasses.replace(dit_config, num_layers=n)
                measured.append(_memory(live, config, ranks, dtype, small, *others))
    return tuple({name: a[name] + (dit_config.num_layers - 2) * (b[name] - a[name]) for name in a}
                 for a, b in zip(*measured))  # every block needs the same


def empty_condition(dit, C, text, shape):
    """C conditions without contents, with the parts that this DiT takes. shape: of a latent."""
    config = dit.config
    image = torch.empty(C, 257, config.image_dim) if config.image_dim else None
    source = torch.empty(C, *shape) if dit.takes_source else None
    if dit.takes_poses:
        return Condition(torch.empty(C, *text), None, source, torch.empty(C, shape[1], config.pose_dim))
    maps = lambda: torch.empty(C, 24, shape[1], 8 * shape[2], 8 * shape[3]) if config.camera_dim else None
    return Condition(torch.empty(C, *text), image, source, maps(), maps())


def _memory(live, config, ranks, dtype, dit_config, codec, shape, text):
    """`memory` of a DiT with as many blocks as dit_config says, under Live."""
    dit = DiT(dit_config)
    if config.world != "toy":  # nothing else of it is a module
        state = {k: torch.empty(x.shape, dtype=dtype) for k, x in codec.state_dict().items()}
        codec.load_state_dict(state, assign=True)
        del state
    dit.load_state_dict({k: torch.empty(x.shape, dtype=torch.float32 if trains(k) else dtype)
                         for k, x in dit.state_dict().items()}, assign=True)
    dit.checkpoint, parameters = config.checkpointing, trainable(dit)
    masters = sum(p.nbytes for p in parameters)
    stay = {"frozen weights": live.now - masters, "masters": masters}
    moments, stay["optimiser"] = live.extra(lambda: [torch.empty_like(p) for p in parameters + parameters])
    buckets = [torch.empty_like(p) for p in parameters] if ranks > 1 else []  # DDP's
    stay["gradients"] = masters * (2 if buckets else 1)
    for p in parameters:
        p.grad = torch.empty_like(p)  # of the iteration before, until the update

    n = len(window(0, config.steps, config.size, config.strategy, first=config.first or None))
    C, G, rows = config.conditions // ranks, config.members, config.micro_batch or None
    branches = 1 if config.guidance == 1 else 2
    peaks, live.peak = {}, live.now
    condition = empty_condition(dit, C, text, shape)
    with torch.no_grad():
        prepared = dit.prepare(condition)
        negative = dit.prepare(condition) if branches == 2 else None
    peaks["conditions"], condition = live.peak, None

    # rollout: what one network call needs, and a stand-in for it in the real rollout
    c, m = chunks(C, G, rows, branches)[0]
    x = torch.empty(c.stop * m.stop * branches, *shape)
    both = prepared[c] if branches == 1 else prepared.cat([prepared[c], negative[c]])
    with torch.no_grad():
        _, call = live.extra(lambda: dit(x, torch.ones(()), both).float())
    del x, both

    def policy(x, t, condition):
        live.peak = max(live.peak, live.now + call)
        return torch.empty_like(x)
    live.peak = live.now
    sampled = rollout(policy, prepared, G, range(n), sigmas=schedule(n + 2, config.shift), shape=shape,
                      seed=0, condition_ids=range(C), negative=negative, guidance=config.guidance,
                      micro_batch=rows, share_noise=config.share_noise, share_prefix=config.share_prefix,
                      device="meta")
    peaks["rollout"] = live.peak

    # decode, `reward_batch` videos at a time, joined at the end; three latent frames need what more would
    several, few = min(C * G, config.reward_batch or C * G), min(shape[1], 3)
    piece, decoding = live.extra(codec.decode, torch.empty(several, shape[0], few, *shape[2:]))
    video = piece.new_empty(*piece.shape[:2], 4 * shape[1] - 3, *piece.shape[3:])
    piece, decoding = None, decoding + video.nbytes - piece.nbytes
    size, converting = video.numel() // several * C * G, live.extra(to_uint8, video)[1]
    converting, video = converting + video.nbytes, None
    peaks["decode"] = live.now + size + max(decoding, converting, size)
    videos = torch.empty(size, dtype=torch.uint8)

    # update: the largest micro-batch
    batches = [(k, c, m) for k in range(n) for c, m in micro_batches(sampled, k, rows)]
    for p in parameters[:len(parameters) if len(batches) == 1 else 0]:  # the first backward brings its own
        p.grad = None
    live.peak = live.now
    k, c, m = max(batches, key=lambda at: sampled.x[at[0]][at[1]][:, at[2]].shape[:2].numel())
    policy_loss(dit, sampled, k, torch.empty(C, G), 1, c, m, config.clip)[0].backward()
    peaks["update"] = live.peak
    return stay, peaks


def report(config, ranks=1):
    """What the command prints."""
    with torch.device("meta"):
        dit_config, _, shape, _ = parts(config)
        dit = DiT(dit_config)
    trained, total = sum(p.numel() for p in trainable(dit)), sum(p.numel() for p in dit.parameters())
    C, G, share = config.conditions, config.members, config.share_noise and config.share_prefix
    windows = [window(i, config.steps, config.size, config.strategy, config.stride, config.iters_per_window,
                      config.first or None, config.seed) for i in range(config.iterations)]
    branches = 1 if config.guidance == 1 else 2
    mean = lambda *args: [branches * sum(x) / len(windows)
                          for x in zip(*(evaluations(w, config.steps, G, *args) for w in windows))]
    ours, paper = mean(share, config.tail or None, config.updates), mean(False)
    ours_cost, paper_cost = (cost(x, config.checkpointing) for x in (ours, paper))
    tokens = shape[1] * (shape[2] // 2) * (shape[3] // 2)
    halves = f"{tokens:,} of the target, as many of the source" if dit.takes_source else "of the target"
    stay, peaks = memory(config, ranks)
    size = lambda n: f"{n / 1e9:.2f} GB" if n > 1e9 else f"{n / 1e6:.1f} MB"
    sizes = lambda x: ", ".join(f"{name} {size(n)}" for name, n in x.items())
    lines = {
        "batch": f"{C} conditions x {G} members = {C * G} videos an iteration on {ranks} rank(s), "
                 f"{C // ranks * G} on each; {config.updates} optimiser step(s) an iteration",
        "run": f"{config.iterations} iterations, {config.iterations * C * G:,} videos, "
               f"{config.iterations * config.updates:,} optimiser steps",
        "parameters": f"{total:,}, of which {trained:,} train",
        "tokens": f"{(1 + dit.takes_source) * tokens:,} a network row: {halves}",
        "evaluations": "per condition and iteration, mean over the run's windows "
                       "(backward 2, recomputation 1)",
        " ours": f"{ours[0]:.1f} rollout + {ours[1]:.1f} update x {3 + config.checkpointing} "
                 f"= {ours_cost:.1f}; on all ranks {C * ours_cost:,.0f}, "
                 f"the whole run {config.iterations * C * ours_cost:,.0f}",
        " paper's": f"{paper[0]:.1f} + {paper[1]:.1f} x {3 + config.checkpointing} = {paper_cost:.1f}, "
                    f"every member alone, Euler throughout: {paper_cost / ours_cost:.2f} times ours",
        "disk": f"{size(12 * trained)} a checkpoint (weights and two moments, float32), {config.keep} kept",
        "memory": "per rank, without reward models, uncompiled; estimated on tensors without contents",
        " stays": f"{sizes(stay)}; together {size(sum(stay.values()))}",
        " peaks": f"{sizes(peaks)}; each with what stays"}
    return "\n".join(f"{name:<12} {line}" for name, line in lines.items())


@dataclass
class Plan(train.Config):
    """`python -m benchmarks.plan`: a run's settings, and on how many cards."""
    ranks: int = 1                     # processes, one on each card


def plan(config):
    """Print what the run would cost."""
    config.check(config.ranks, folders=False)
    print(report(config, config.ranks))


if __name__ == "__main__":
    run_command("benchmarks.plan", __doc__, {"plan": (Plan, plan, None)}, sys.argv[1:] or ["--help"])
