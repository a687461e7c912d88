"""What a run will need, whether it fits the cards, and how long it takes: before anything is
downloaded.

    python -m benchmarks.plan config/geo_align.py --ranks=64 --card=80
    python -m benchmarks.plan config/geo_align.py --ranks=8 --card=80 --park --rate=400

Needs neither data nor weights nor a card. Exit code 1 where the run does not fit. Network rows are
counted. Memory is measured: the run's own functions on torch's fake tensors, which have shape and
type but no contents, adding up what is alive. Reward models are added by their published sizes.
Time follows from arithmetic and a rate.
"""
import dataclasses
import functools
import json
import math
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from data.video import to_uint8
from grpo import micro_batches, policy_loss
from model import Condition, Config, DiT, config_from, rope_angles, trainable, trains
from plumbing.settings import run_command
from pretrained.vae import VAE
from pretrained.weights import find_policy, open_tensors
from sampler import chunks, rollout, schedule
from toy.rooms import Codec, HEADS, PATCH, TEXT

FUN_CAMERA = Config(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, image_dim=1280, camera_dim=24,
                    roce=True)
WAN_T2V = Config(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, in_dim=16)
# Of a card: the rest is for CUDA itself, kernels' scratch space and the allocator's losses
USABLE = 0.9


# ---- network rows ----

def evaluations(window, steps, members, share=True, tail=None, updates=1):
    """Network rows that one condition costs without guidance: (of the rollout, of the update's
    forward).

    share: the group starts from one noise, so it is one latent up to and including the first window
    step.
    """
    after = steps - window[-1] - 1
    if tail is not None:
        after = max(1, int(tail * after))
    if not share:
        return members * (window[-1] + 1 + after), members * len(window)
    alone = window[0] + 1  # steps that a shared group takes as one; of these one is trained on
    return alone + members * (len(window) - 1 + after), updates + members * (len(window) - 1)


def cost(counts, checkpointing=True):
    """Rows in forward passes, of (rollout, update): a backward counts 2, a recomputed forward 1.

    By convention: attention, most of a long video, is 2.5 backward and is not recomputed.
    """
    return counts[0] + counts[1] * (3 + checkpointing)


def windows(config):
    """The windows of a whole run, of every condition, as often as they occur."""
    every = [config.window(iteration) for iteration in range(config.iterations)]
    return [window for one in every for window in (one if config.window_per_condition else one[:1])]


def mean_evaluations(config, share, tail):
    """(rollout, update) rows of a condition, guidance's second branch counted; mean over the run's
    windows."""
    branches = 1 if config.guidance == 1 else 2
    updates = config.updates if share else 1
    counts = [evaluations(window, config.steps, config.members, share, tail, updates)
              for window in windows(config)]
    return [branches * sum(column) / len(counts) for column in zip(*counts)]


# ---- arithmetic ----

def flops(config, tokens, text=512, image=257):
    """Of one row's forward pass once `prepare` has run: products and attention; an addition counts
    as one.

    tokens: of target and source together.
    """
    D = config.dim
    linear = 6 * D * D + 2 * D * config.ffn_dim  # q k v o, cross-attention's q o, MLP
    if config.roce:
        linear += 2 * config.num_heads * 2 * (D // config.num_heads // 6) * D
    if config.pose_dim:
        linear += D * D  # ReCamMaster's projector
    attention = 2 * tokens * D * (tokens + text + (image if config.image_dim else 0))
    # Patches in and out, of the target
    ends = tokens // 2 * 4 * D * (config.out_dim + config.out_dim)
    return 2 * (config.num_layers * (tokens * linear + attention) + ends)


def decode_flops(codec, shape):
    """Of decoding one video: its first latent frame and, from the second on, four video frames
    each."""
    def counted(frames):
        with FlopCounterMode(display=False) as counter:
            codec.decode(torch.empty(1, shape[0], frames, *shape[2:]))
        return counter.get_total_flops()
    two = counted(2)
    three = counted(3)
    return two + (shape[1] - 2) * (three - two)


# ---- reward models ----

@dataclass
class RewardModel:
    """A published reward model as a run needs it. Sizes follow from the published shapes; see
    `reward_models`."""
    name: str
    rewards: tuple    # whose rewards it gives
    weights: float    # bytes on the card
    working: float    # bytes while it judges one call's videos, beyond weights and videos (assumed)
    flops: float      # for one video


def reward_models(config, ranks=1):
    """Those that config.rewards names.

    MapAnything: 1.23 B parameters in float32; 8 dense maps at a time take about 5 GB; per video
    2.11 n + 0.0288 n^2 TFLOP for n frames of 294x518 (through 78 at 27 frames and 360 at 81).
    VideoAlign: Qwen2-VL-2B without its language head, 2.21 B in bfloat16; 2 frames a second are
    about 1,000 tokens. HPSv3: Qwen2-VL-7B likewise, 7.75 B; every frame is about 450 tokens, 8
    frames a call.
    """
    wanted = {item.rpartition("=")[0].strip() for item in config.rewards.split(",")}
    # Frames that MapAnything is shown
    seen = -(-(config.frames - 1) // config.estimator_stride) + 1
    videos = config.reward_batch or config.conditions // ranks * config.members  # in a call
    known = (
        RewardModel("MapAnything", ("trans", "rot"), 4 * 1.23e9, 5e9 + videos * seen * 20e6,
                    (2.11 * seen + 0.0288 * seen ** 2) * 1e12),
        RewardModel("VideoAlign", ("vq", "mq", "ta"), 2 * 2.21e9, videos * 0.5e9, 2 * 2.21e9 * 1000),
        RewardModel("HPSv3", ("hpsv3",), 2 * 7.75e9, 1e9, 2 * 7.75e9 * 450 * config.frames))
    return [model for model in known if wanted & set(model.rewards)]


# ---- memory of the run itself ----

class Live(TorchDispatchMode):
    """Bytes of tensors alive that were made under it, or shown to it by `add`: now, and at their
    peak."""
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
        before = self.now
        self.peak = self.now
        return f(*args), self.peak - before


def parts(config):
    """(DiT's Config, codec, latent's shape, text's shape) of a run; the codec on the default
    device.

    The headers of weights are read where they are there; else the published model is meant.
    """
    folder = Path(config.weights)
    frames = (config.frames - 1) // 4 + 1
    shapes_of = lambda *names: {k: x for name in names for k, x in open_tensors(folder / name)[0].items()}
    if config.world == "toy":
        shapes = shapes_of("toy_codec.safetensors")
        codec = Codec({key: torch.empty(shape) for key, shape in shapes.items()})
        dit = config_from(shapes_of("toy_base.safetensors"), HEADS)
        return dit, codec, (16, frames, config.height // PATCH, config.width // PATCH), (1, TEXT)
    dit = WAN_T2V if config.world == "captions" else FUN_CAMERA
    files = find_policy(folder).files
    if all(file.is_file() for file in files):
        dit = config_from(shapes_of(*(file.name for file in files)))
    codec = VAE(16, [96, 96, 192, 384, 384], 2, [False, True, True])  # as published
    return dit, codec, (16, frames, config.height // 8, config.width // 8), (512, dit.text_dim)


def memory(config, ranks=1, dtype=None, dit_config=None):
    """Bytes on one rank -> (what stays: part -> bytes, peaks: phase -> bytes, with what stays).

    Without reward models, and uncompiled. dtype: of frozen weights; None: that of a run on cards.
    dit_config: the DiT's shape; None: as `parts` finds it. Blocks are alike, so two and three of
    them tell of all; so are conditions from the second on (the first may leave the update with a
    single backward pass).
    """
    def all_blocks(conditions):
        two, layers = measure(settings, conditions, ranks, 2, dtype, dit_config)
        three, layers = measure(settings, conditions, ranks, 3, dtype, dit_config)
        return [extend(x, y, layers - 2) for x, y in zip(two, three)]

    settings = tuple((name, x) for name, x in vars(config).items() if name not in ELSEWHERE)
    dit_config = dit_config and dataclasses.astuple(dit_config)  # as a key of the cache
    local = config.conditions // ranks
    if local <= 3:
        return all_blocks(local)
    return [extend(x, y, local - 2) for x, y in zip(all_blocks(2), all_blocks(3))]


@contextmanager
def without_contents():
    """Tensors made here have shape and type but no contents; yields the count of their bytes, a
    Live."""
    rope_angles.cache_clear()  # must not keep tensors of the one kind for the other
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
            yield live
    finally:
        rope_angles.cache_clear()


# Settings that `measure` does not depend on, or is told apart.
ELSEWHERE = ("conditions", "park", "rewards", "estimator_stride", "iterations", "out", "save_every",
             "sample_every", "ranks", "card", "rate", "largest", "measured")


@functools.cache
def measure(settings, conditions, ranks, blocks, dtype, dit_config):
    """`memory` of `conditions` on a rank and so many blocks, and how many blocks the DiT has."""
    config = Plan(**dict(settings), conditions=conditions * ranks)
    with without_contents() as live:
        found, *others = parts(config)
        whole = Config(*dit_config) if dit_config else found
        small = dataclasses.replace(whole, num_layers=blocks)
        dtype = dtype or (torch.float32 if config.world == "toy" else torch.bfloat16)
        return _memory(live, config, ranks, dtype, small, *others), whole.num_layers


def extend(a, b, steps):
    """Name -> number, `steps` steps from a, of which b is one: along a straight line."""
    return {name: a[name] + steps * (b[name] - a[name]) for name in a}


class Sliced:
    """In a condition's place where it is only sliced: slices are views, and slow to make without
    contents."""
    def __getitem__(self, rows):
        return self


def _memory(live, config, ranks, dtype, dit_config, codec, shape, text):
    """`memory` of a DiT with as many blocks as dit_config says, under Live."""
    # What stays: frozen weights, float32 masters, AdamW's two moments, DDP's buckets of gradients.
    dit = DiT(dit_config)
    if config.world != "toy":  # nothing else of it is a module
        state = {k: torch.empty(x.shape, dtype=dtype) for k, x in codec.state_dict().items()}
        codec.load_state_dict(state, assign=True)
        del state
    dit.load_state_dict({k: torch.empty(x.shape, dtype=torch.float32 if trains(k) else dtype)
                         for k, x in dit.state_dict().items()}, assign=True)
    dit.checkpoint = config.checkpointing
    parameters = trainable(dit)
    masters = sum(p.nbytes for p in parameters)
    stay = {"frozen weights": live.now - masters, "masters": masters}
    moments, stay["optimiser"] = live.extra(lambda: [torch.empty_like(p) for p in parameters + parameters])
    buckets = [torch.empty_like(p) for p in parameters] if ranks > 1 else []
    if buckets:
        stay["buckets"] = masters
    base = [torch.empty_like(p) for p in parameters] if config.kl else []  # that kl refers to
    if base:
        stay["base"] = masters

    # Conditions, and the source videos that rewards compare with.
    C = config.conditions // ranks
    G = config.members
    rows = config.micro_batch or None
    branches = 1 if config.guidance == 1 else 2
    live.peak = live.now
    peaks = {}
    condition = Condition(torch.empty(C, *text))
    if dit.takes_source:
        condition.source = torch.empty(C, *shape)
    if dit_config.image_dim:
        condition.image = torch.empty(C, 257, dit_config.image_dim)
    if dit_config.pose_dim:
        condition.camera = torch.empty(C, shape[1], dit_config.pose_dim)
    elif dit_config.camera_dim:
        condition.camera = torch.empty(C, 24, shape[1], 8 * shape[2], 8 * shape[3])
        condition.source_camera = torch.empty_like(condition.camera)
    with torch.no_grad():
        prepared = dit.prepare(condition)
        negative = dit.prepare(condition) if branches == 2 else None
    sources = torch.empty(C, config.frames, config.height, config.width, 3, dtype=torch.uint8)
    peaks["conditions"] = live.peak
    del condition

    # Rollout: what one network call needs, and a stand-in for the network in the real rollout.
    c, m = chunks(C, G, rows, branches)[0]
    x = torch.empty(c.stop * m.stop * branches, *shape)
    both = prepared[c] if branches == 1 else prepared.cat([prepared[c], negative[c]])
    with torch.no_grad():
        _, call = live.extra(lambda: dit(x, torch.ones(()), both).float())
    del x, both

    if config.tail:  # its solver holds one estimate of x_0 meanwhile
        call += 4 * C * G * math.prod(shape)
    n = len(config.window(0)[0])

    def policy(x, t, condition):
        live.peak = max(live.peak, live.now + call)
        return torch.empty_like(x)
    live.peak = live.now
    sampled = rollout(policy, prepared if negative else Sliced(), G, range(n), shape=shape, seed=0,
                      sigmas=schedule(n + 1, config.shift), condition_ids=range(C), negative=negative,
                      guidance=config.guidance, micro_batch=rows, share_noise=config.share_noise,
                      share_prefix=config.share_prefix)
    sampled.condition = prepared
    peaks["rollout"] = live.peak

    # Decode: `reward_batch` videos at a time, joined at the end. Three latent frames need what more
    # would.
    several = min(C * G, config.reward_batch or C * G)
    few = min(shape[1], 3)
    with torch.no_grad():
        piece, decoding = live.extra(codec.decode, torch.empty(several, shape[0], few, *shape[2:]))
    video = piece.new_empty(*piece.shape[:2], 4 * shape[1] - 3, *piece.shape[3:])
    decoding += video.nbytes - piece.nbytes
    del piece
    every = video.numel() // several * C * G  # bytes of all videos as uint8
    converting = live.extra(to_uint8, video)[1] + video.nbytes
    del video
    peaks["decode"] = live.now + every + max(decoding, converting, every)
    videos = torch.empty(every, dtype=torch.uint8)
    peaks["rewards"] = live.now

    # Update: the largest micro-batch. Gradients are there from the first backward of several on; the
    # loop frees them after the step.
    batches = [(k, c, m) for k in range(len(sampled.x)) for c, m in micro_batches(sampled, k, rows)]
    if len(batches) > 1:
        for p in parameters:
            p.grad = torch.empty_like(p)
    k, c, m = max(batches, key=lambda at: sampled.x[at[0]][at[1]][:, at[2]].shape[:2].numel())
    live.peak = live.now
    policy_loss(dit, sampled, k, torch.empty(C, G), 1, c, m, config.clip)[0].backward()
    peaks["update"] = live.peak
    del moments, buckets, base, sources, videos
    return stay, peaks


# ---- does it fit ----

def needs(config, ranks):
    """(What stays, phase -> bytes on a card) with the reward models of a run in it."""
    stay, peaks = memory(config, ranks)
    models = reward_models(config, ranks) if config.world != "toy" else []
    weights = [model.weights for model in models]
    working = max((model.working for model in models), default=0)
    if config.park:  # on the card one at a time, while it judges
        peaks["rewards"] += max((model.weights + model.working for model in models), default=0)
    else:
        stay["reward models"] = sum(weights)
        peaks = {phase: size + sum(weights) for phase, size in peaks.items()}
        peaks["rewards"] += working
    return stay, peaks


def fits(config, ranks, card):
    """Whether every phase stays below USABLE of a card of `card` GB (of 2^30 bytes, as cards are
    sold)."""
    return max(needs(config, ranks)[1].values()) <= USABLE * card * 2 ** 30


def largest(config, ranks, card):
    """The largest values of single settings that fit, the others as asked: lines to print.

    Where that alone helps, reward models are parked.
    """
    lines = []
    if config.world != "toy" and not config.park and not fits(config, ranks, card):
        config = dataclasses.replace(config, park=True)
        if fits(config, ranks, card):
            lines.append("as asked, with --park")
    searches = {  # setting -> its values, and what one of them changes
        "frames": (range(5, 401, 4), lambda x: {"frames": x}),
        "conditions": (range(ranks, 1000 * ranks, ranks), lambda x: {"conditions": x}),
        "height": (range(64, 2161, 16),
                   lambda x: {"height": x, "width": round(x * config.width / config.height / 16) * 16})}
    for name, (values, change) in tqdm(searches.items(), "what would fit", leave=False):
        peaks = lambda i: needs(dataclasses.replace(config, **change(values[i])), ranks)[1]
        at = min(range(len(values)), key=lambda i: abs(values[i] - getattr(config, name)))
        best = last_that_fits(peaks, at, len(values), USABLE * card * 2 ** 30)
        if best >= 0:
            changed = " ".join(f"--{key}={value}" for key, value in change(values[best]).items())
            lines.append(f"{changed}{' --park' if config.park else ''}")
    return lines


def last_that_fits(peaks, at, count, limit):
    """The last of 0 .. count - 1 at which no phase is above `limit`, -1 if none; peaks: i -> phase
    -> bytes.

    Memory is about linear in i: two values tell where the limit lies. The answer itself was
    measured; where the line has led too far, halves are tried.
    """
    other = at // 2 if at > 8 else at + 8
    x = peaks(at)
    y = peaks(other)
    slopes = {phase: (y[phase] - x[phase]) / (other - at) for phase in x}
    ends = [at + (limit - x[phase]) / slope for phase, slope in slopes.items() if slope > 0]
    guess = min(max(int(min(ends, default=count - 1)), 0), count - 1)
    low = max([i for i, found in ((at, x), (other, y)) if max(found.values()) <= limit], default=-1)
    high = guess + 1
    while low < guess < high:
        if max(peaks(guess).values()) <= limit:
            low = guess
        else:
            high = guess
        guess = (low + high) // 2
    return low


# ---- time ----

def measured_rates(file):
    """{"forward", "update", "decode": FLOP/s} that `python -m benchmarks.bench card` wrote;
    ValueError."""
    try:
        rates = json.loads(Path(file).read_text())["rates"]
        return {name: float(rates[name]) for name in ("forward", "update", "decode")}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: expected the json file of benchmarks.bench card ({error!r})") from None


def hours(config, ranks):
    """Part of an iteration -> (hours, why), by arithmetic over a rate in FLOP/s."""
    if config.measured:
        rates = measured_rates(config.measured)
        source = f"measured, {config.measured}"
    else:
        rate = 1e12 * config.rate
        rates = {"forward": rate, "update": rate, "decode": rate / 2}
        source = "given by --rate"
    with without_contents():
        dit_config, codec, shape, _ = parts(config)
        decoding = decode_flops(codec, shape) if config.world != "toy" else 0
    halves = 1 if config.world == "captions" else 2
    tokens = halves * shape[1] * (shape[2] // 2) * (shape[3] // 2)
    row = flops(dit_config, tokens)
    share = config.share_noise and config.share_prefix
    rolled, updated = mean_evaluations(config, share, config.tail or None)
    local = config.conditions // ranks
    judging = sum(model.flops for model in reward_models(config, ranks)) if config.world != "toy" else 0
    branches = 1 if config.guidance == 1 else 2
    valid = config.validate / config.sample_every / ranks  # videos an iteration
    work = {
        "validation": (valid * config.steps * branches * row, rates["forward"],
                       f"{config.validate} videos every {config.sample_every} iterations, "
                       f"{config.steps * branches} rows each,"),
        "rollout": (local * rolled * row, rates["forward"],
                    f"{local} conditions x {rolled:.1f} rows of {row / 1e12:,.0f} TFLOP"),
        "decode": (local * config.members * decoding, rates["decode"],
                   f"{local} x {config.members} videos of {decoding / 1e12:,.0f} TFLOP"),
        "rewards": (local * config.members * judging, rates["decode"],
                    f"{local} x {config.members} videos of {judging / 1e12:,.0f} TFLOP"),
        "update": (local * updated * (3 + config.checkpointing) * row, rates["update"],
                   f"{local} x {updated:.1f} rows, each {3 + config.checkpointing} forwards,")}
    times = {}
    for phase, (flop, rate, why) in work.items():
        halved = ", halved: assumed" if not config.measured and phase in ("decode", "rewards") else ""
        why = f"{why} at {rate / 1e12:,.0f} TFLOP/s ({source}{halved})"
        times[phase] = flop / rate / 3600, why
    return times


# ---- what is printed ----

def gb(size):
    return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


def describe(config, ranks):
    """Lines about the run: batch, rows, disk."""
    with without_contents():
        dit_config, _, shape, _ = parts(config)
        dit = DiT(dit_config)
    trained = sum(p.numel() for p in trainable(dit))
    total = sum(p.numel() for p in dit.parameters())
    share = config.share_noise and config.share_prefix
    ours = mean_evaluations(config, share, config.tail or None)
    alone = mean_evaluations(config, False, None)
    ours_cost = cost(ours, config.checkpointing)
    alone_cost = cost(alone, config.checkpointing)
    tokens = shape[1] * (shape[2] // 2) * (shape[3] // 2)
    videos = config.conditions * config.members
    times = 3 + config.checkpointing
    return {
        "batch": f"{config.conditions} conditions x {config.members} members = {videos} videos an iteration "
                 f"on {ranks} card(s), {videos // ranks} on each",
        "run": f"{config.iterations} iterations, {config.iterations * videos:,} videos, "
               f"{config.iterations * config.updates:,} optimiser steps",
        "parameters": f"{total:,}, of which {trained:,} train",
        "tokens": f"{(1 + dit.takes_source) * tokens:,} a network row: {tokens:,} of the target video"
                  + ", as many of the source" * dit.takes_source,
        "rows": f"{ours[0]:.1f} rollout + {ours[1]:.1f} update x {times} = {ours_cost:.1f} for a condition "
                "and iteration, mean over the run's windows",
        "": f"(update x {times}: forward 1, backward 2{', recomputed forward 1' if times == 4 else ''}; "
            f"every member alone by Euler: {alone[0]:.1f} + {alone[1]:.1f} x {times} = {alone_cost:.1f}, "
            f"{alone_cost / ours_cost:.2f} times as many)",
        "disk": f"{gb(12 * trained)} a checkpoint (weights and two moments in float32), {config.keep} kept"}


def report_memory(config, ranks, card):
    """(Lines about memory on each card, whether it fits)."""
    stay, peaks = needs(config, ranks)
    limit = USABLE * card * 2 ** 30
    models = reward_models(config, ranks) if config.world != "toy" else []
    lines = [f"all the time: {', '.join(f'{name} {gb(size)}' for name, size in stay.items())}",
             f"together {gb(sum(stay.values()))}; uncompiled, measured on tensors without contents"]
    for phase, size in peaks.items():
        verdict = ""
        if card:
            verdict = "fits" if size <= limit else f"does NOT fit, {gb(size - limit)} too much"
        line = f"{phase:<10} {size / 1e9:5.1f} GB at its peak, all that stays in it   {verdict}"
        lines.append(line.rstrip())
    if models:
        where = "visit the card one at a time" if config.park else "stay on the card (--park: only visit it)"
        sizes = ", ".join(f"{model.name} {gb(model.weights)}" for model in models)
        lines.append(f"reward models {where}: {sizes}; while they judge up to "
                     f"{gb(max(model.working for model in models))} more (assumed)")
    if config.park:
        held = ranks * sum(model.weights for model in models)
        lines.append(f"in the computer's memory: {gb(held)} of parked reward models for {ranks} card(s)")
    if card:
        lines.append(f"usable of a card of {card:g} GB: {gb(limit)}, nine tenths of {card:g} x 2^30 bytes; "
                     "the rest is for CUDA, kernels' scratch and gaps")
    return lines, not card or max(peaks.values()) <= limit


def report_time(config, ranks):
    """Lines about time."""
    by_phase = hours(config, ranks)
    together = sum(time for time, _ in by_phase.values())
    lines = [f"{phase:<10} {60 * time:7.1f} min   {why}" for phase, (time, why) in by_phase.items()]
    days = config.iterations * together / 24
    lines.append(f"together {together:.2f} h an iteration, {days:.1f} days for {config.iterations} "
                 f"iterations, {ranks * 24 * days:,.0f} card hours; reading files and waiting for the "
                 "slowest rank apart")
    return lines


# ---- the command ----

@dataclass
class Plan(train.Config):
    """`python -m benchmarks.plan`: a run's settings, and the cards it should fit."""
    ranks: int = 1                     # processes, one on each card
    card: float = 0.0                  # memory of a card, GB; 0: fit is not asked
    rate: float = 150.0                # TFLOP/s of a card in the network: 48 % of an A100's or A800's 312
    largest: bool = False              # also where it fits: tell the largest settings that would (a minute)
    measured: str = ""                 # json file of `python -m benchmarks.bench card`, in place of --rate


def plan(config):
    """Print what the run would need; exit code 1 where it does not fit the card."""
    config.check(config.ranks, folders=False)
    if config.card < 0 or config.rate <= 0:
        raise ValueError(f"card and rate: expected > 0, found {config.card} and {config.rate}")
    lines = describe(config, config.ranks)
    memory_lines, fit = report_memory(config, config.ranks, config.card)
    sections = {**{name: [line] for name, line in lines.items()}, "memory": memory_lines}
    if config.world != "toy":
        sections["time"] = report_time(config, config.ranks)
    for name, found in sections.items():
        for i, line in enumerate(found):
            print(f"{name if i == 0 else '':<11} {line}")
    if not config.card:
        return
    if config.largest or not fit:
        none = ["no single setting makes it fit: take fewer frames and a smaller picture"]
        for i, line in enumerate(largest(config, config.ranks, config.card) or none):
            print(f"{'largest' if i == 0 else '':<11} {line}")
    verdict = "fits" if fit else "does not fit"
    print(f"{'verdict':<11} {verdict} {config.ranks} card(s) of {config.card:g} GB")
    if not fit:
        sys.exit(1)


if __name__ == "__main__":
    run_command("benchmarks.plan", __doc__, {"plan": (Plan, plan, None)}, sys.argv[1:] or ["--help"])
