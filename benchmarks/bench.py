"""Measurements, one table each; the figures are in README.md here.

    python -m benchmarks.bench card         all that is owed of a card, in at most 9 minutes; a markdown table
    python -m benchmarks.bench network      forward, and forward + backward with checkpointing
    python -m benchmarks.bench compilation  graphs made while window, caption and condition change
    python -m benchmarks.bench iteration    rows on paper and in seconds: every member alone against ours
    python -m benchmarks.bench memory       peak of each phase against plan's estimate
    python -m benchmarks.bench soak         resident memory over many iterations of the toy
    python -m benchmarks.bench scaling      one and two gloo ranks; where the host waits for the device
    python -m benchmarks.bench share        VAE decode and Pluecker packing
    python -m benchmarks.bench curves       the toy's learning curve, fast loop against every member alone

`python -m benchmarks.bench COMMAND --help` lists a command's settings. --official=CHECKOUT puts the
official code beside ours. Weights are random. Sizes and dtype are the published
ones on a card, small ones and float32 on a CPU. Seconds are the best of --repeat; on a CPU with one thread they are seconds of
that thread, so that other programs on the same core do not count.
"""
import collections
import dataclasses
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
import trajectories
from benchmarks import plan
from data.video import decode
from grpo import micro_batches, policy_loss
from model import Condition, Config, DiT, trainable
from plumbing.files import write_file, write_json
from plumbing.settings import parse, run_command
from pretrained.vae import VAE
from sampler import rollout, schedule

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Bench:
    """Settings of all commands."""
    frames: int = 81 if CUDA else 17     # of a video
    height: int = 480 if CUDA else 96    # pixels
    width: int = 832 if CUDA else 96     # pixels
    dim: int = 1536 if CUDA else 384     # of the network
    layers: int = 30 if CUDA else 4      # blocks
    ffn: int = 8960 if CUDA else 1536    # width of a block's MLP
    dtype: str = "bfloat16" if CUDA else "float32"
    repeat: int = 3                      # the best of so many
    json: str = ""                       # file that keeps the rows


# ---- tables and clocks ----

def show(x):
    return f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x)


def table(config, title, rows):
    """Prints rows (dicts with the same keys) under a title, and adds them to the json file if one
    is asked."""
    text = [[show(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *text)]
    print(f"\n{title}")
    for line in (list(rows[0]), *text):
        cells = [line[0].ljust(widths[0]), *(x.rjust(n) for x, n in zip(line[1:], widths[1:]))]
        print(*cells, sep="  ", flush=True)
    if config.json:
        file = Path(config.json)
        kept = json.loads(file.read_text()) if file.is_file() else {"torch": torch.__version__, "tables": {}}
        kept["tables"][title] = rows
        write_json(file, kept)


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.process_time() if not CUDA and torch.get_num_threads() == 1 else time.perf_counter()


def seconds(f, repeat):
    """(first, best of the `repeat` after it)"""
    times = []
    for _ in range(repeat + 1):
        start = now()
        f()
        times.append(now() - start)
    return times[0], min(times[1:])


def say_where(config):
    where = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{where}, torch {torch.__version__}, {config.dtype}")


# ---- what is measured: a DiT with random weights, its condition, one iteration on them ----

def shape_of(config):
    return Config(dim=config.dim, num_heads=config.dim // 128, num_layers=config.layers, ffn_dim=config.ffn,
                  image_dim=1280, camera_dim=24, roce=True)


@contextmanager
def made_in(config):
    """Modules made here are on the device and of config.dtype from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with DEVICE:
            yield
    finally:
        torch.set_default_dtype(before)


def build(config, seed=0):
    """DiT, latent's shape, one Condition, what the DiT prepares of it; random, every part at
    work."""
    torch.manual_seed(seed)
    with made_in(config):
        dit = DiT(shape_of(config)).eval()
    with DEVICE, torch.no_grad():
        for name, p in dit.named_parameters():
            if name.endswith("head.weight") or "rope_phase" in name:
                p.normal_(std=0.02)
        for p in trainable(dit):
            p.data = p.data.float()
        shape = (16, (config.frames - 1) // 4 + 1, config.height // 8, config.width // 8)
        maps = torch.randn(2, 1, 24, shape[1], config.height, config.width)
        text = torch.randn(1, 512, 4096)
        image = torch.randn(1, 257, 1280)
        condition = Condition(text, image, torch.randn(1, *shape), *maps)
        return dit, shape, condition, dit.prepare(condition)


def published_vae():
    """Wan's VAE in its published size, as torch initialises it, on the default device."""
    return VAE(16, [96, 96, 192, 384, 384], 2, [False, True, True])


def random_vae(config):
    torch.manual_seed(0)
    with made_in(config):
        codec = published_vae()
    return codec.eval().requires_grad_(False)


def one_iteration(dit, prepared, shape, at, mark, members=8, steps=25, codec=None, **settings):
    """Rollout, decode, update of one condition as train.py does them; mark(phase) after each.

    settings: rollout's.
    """
    sampled = rollout(dit, prepared, members, at, sigmas=schedule(steps, 5.0), shape=shape, seed=0,
                      condition_ids=[0], device=DEVICE, **settings)
    mark("rollout")
    videos = codec and decode(codec, sampled.latents[0], 1)
    mark("decode")
    A = torch.linspace(-1, 1, members, device=DEVICE)[None]
    dit.zero_grad()
    for k in range(len(at)):
        for c, m in micro_batches(sampled, k, settings.get("micro_batch")):
            policy_loss(dit, sampled, k, A, None, c, m)[0].backward()
    mark("update")
    return videos


# ---- network ----

class Traffic(TorchDispatchMode):
    """Bytes that kernels read and write, and how many kernels; views cost nothing."""
    bytes = 0
    kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        moves = not function.is_view and function is not torch.ops.aten._unsafe_view.default
        if moves and function.namespace == "aten":
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x))
            self.kernels += 1
        return out


def rates(config, tokens):
    """(Matrix product's FLOP/s, a copy's bytes/s) at the network's sizes."""
    dtype = getattr(torch, config.dtype)
    a = torch.randn(tokens, config.dim, device=DEVICE, dtype=dtype)
    b = torch.randn(config.dim, config.ffn, device=DEVICE, dtype=dtype)
    product = 2 * tokens * config.dim * config.ffn / seconds(lambda: a @ b, 10)[1]
    big = torch.randn(2 ** 25, device=DEVICE)
    return product, 2 * big.nbytes / seconds(lambda: big.clone(), 5)[1]


def official(config, dit, x, t, condition):
    """ReDirector's own code with dit's weights, run in its checkout: (row of seconds, velocity).

    ValueError with the program's last line where it fails.
    """
    parts = {"x": x, "t": t[None], **vars(condition)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_file({name: y.contiguous().cpu() for name, y in parts.items()}, folder / "inputs.safetensors")
        save_file({name: y.contiguous().cpu() for name, y in dit.state_dict().items()},
                  folder / "weights.safetensors")
        shape = dict(dim=config.dim, ffn_dim=config.ffn, num_heads=config.dim // 128,
                     num_layers=config.layers)
        write_json(folder / "settings.json", {"shape": shape, "device": DEVICE.type, "dtype": config.dtype,
                                              "repeat": config.repeat, "backward": config.backward})
        done = subprocess.run([config.official_python, ROOT / "benchmarks/official.py", folder],
                              cwd=config.official, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"official code: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        found = json.loads((folder / "seconds.json").read_text())
        return found, load_file(folder / "velocity.safetensors")["velocity"]


@dataclass
class Network(Bench):
    """python -m benchmarks.bench network"""
    official: str = ""                   # a checkout of byeongjun-park/ReDirector
    official_python: str = sys.executable  # python of its environment
    backward: bool = True                # forward + backward too
    compile: bool = True                 # compiled too


def measure_network(config):
    """(Facts, rows: name -> row) of the network at one size: seconds, bytes, share of the product's
    rate."""
    dit, shape, condition, prepared = build(config)
    tokens = 2 * shape[1] * shape[2] * shape[3] // 4
    product, copy = rates(config, tokens)
    work = plan.flops(dit.config, tokens)
    q = torch.randn(1, dit.config.num_heads, tokens, dit.head_dim, device=DEVICE,
                    dtype=getattr(torch, config.dtype), requires_grad=config.backward)
    attend = lambda: F.scaled_dot_product_attention(q, q, q)
    with torch.no_grad():
        attention = config.layers * seconds(attend, config.repeat)[1]
    scores = config.layers * 4 * tokens ** 2 * config.dim
    facts = {"tokens": tokens, "TFLOP a forward": work / 1e12, "matrix product TFLOP/s": product / 1e12,
             "copy GB/s": copy / 1e9, "self-attention alone s": attention,
             "its share of the product's rate": scores / attention / product}
    if config.backward:
        both = seconds(lambda: attend().backward(q.detach()), config.repeat)[1]
        facts["self-attention with its backward s"] = config.layers * both
    del q
    x = torch.randn(1, *shape, device=DEVICE)
    t = torch.tensor(0.7, device=DEVICE)
    rows = {}
    values = {}
    if config.official:
        try:
            found, values["official"] = official(config, dit, x, t, condition)
            rows["official"] = {**found, "GB moved": None, "kernels": None, "first calls s": None}
        except ValueError as error:
            print(error, file=sys.stderr)

    def measure(name, condition):
        dit.checkpoint = True
        forward = lambda: dit(x, t, condition)
        traffic = Traffic()
        both = None
        first_both = 0
        with torch.no_grad():
            first, forwards = seconds(forward, config.repeat)
            values[name] = forward().float().cpu()
            if name != "ours, compiled":  # whose kernels it does not see
                with traffic:
                    forward()
        if config.backward:
            first_both, both = seconds(lambda: forward().float().square().mean().backward(), config.repeat)
        rows[name] = {"forward s": forwards, "fwd + bwd s": both, "GB moved": traffic.bytes / 1e9 or None,
                      "kernels": traffic.kernels or None, "first calls s": first + first_both}

    measure("ours, nothing prepared", condition)
    measure("ours, prepared", prepared)
    backends = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"] if CUDA else []
    if tokens < 2 ** 13:  # it writes N x N weights
        backends.append("MATH")
    for name in backends:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                measure(f"ours, {name.lower()}", prepared)
        except RuntimeError as error:
            print(f"ours, {name.lower()}: not measured, {str(error).splitlines()[0]}", file=sys.stderr)
    if config.compile:
        dit.compile()
        measure("ours, compiled", prepared)
    if "official" in values:
        error = (values["ours, prepared"] - values["official"]).abs().max() / values["official"].abs().max()
        facts["largest difference from the official velocity"] = float(error)
    for row in rows.values():
        row["of matrix product rate"] = work / product / row["forward s"]
        row["over forward"] = row["fwd + bwd s"] and row["fwd + bwd s"] / row["forward s"]
        for key in ("forward s", "fwd + bwd s"):
            reference = rows.get("official", {}).get(key)
            row[f"official / this, {key[:-2]}"] = reference and row[key] and reference / row[key]
    return facts, rows


def check_checkout(config):
    """FileNotFoundError where --official names no checkout of ReDirector."""
    if config.official and not (Path(config.official) / "model_utils.py").is_file():
        raise FileNotFoundError(f"{config.official}: no checkout of byeongjun-park/ReDirector (no model_utils.py)")


def network(config):
    check_checkout(config)
    say_where(config)
    facts, rows = measure_network(config)
    print(", ".join(f"{name} {show(x)}" for name, x in facts.items()))
    table(config, f"network, {config.frames} frames", [{"": name, **row} for name, row in rows.items()])


# ---- compilation ----

def graphs():
    """Graphs that dynamo made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compilation(config):
    """Graphs made while what should not matter changes."""
    say_where(config)
    dit, shape, _, first = build(config)
    dit.checkpoint = True
    dit.compile()
    with torch.no_grad():
        other = dit.prepare(build(config, 2)[2])
    rows = []
    for name, at, prepared, members in (
            ("window of 2: rows 1 and G, with and without gradient", (1, 2), first, 4),
            ("another window", (5, 6), first, 4), ("window of 1", (3,), first, 4),
            ("another condition and caption", (1, 2), other, 4), ("another G", (1, 2), other, 3)):
        start = now()
        one_iteration(dit, prepared, shape, at, lambda phase: None, members, 8)
        rows.append({"": name, "graphs so far": graphs(), "seconds": now() - start})
    table(config, "compilation", rows)


# ---- iteration ----

def iteration(config):
    """Times less than every member alone, on paper and in seconds."""
    say_where(config)
    dit, shape, _, prepared = build(config)
    dit.checkpoint = True

    def timed(at, **settings):
        """Seconds of (rollout, update)."""
        times = []
        for _ in range(config.repeat):
            stamps = [now()]
            one_iteration(dit, prepared, shape, at, lambda phase: stamps.append(now()), **settings)
            times.append(np.diff(stamps)[[0, 2]])
        return np.min(times, 0)

    def on_paper(windows, tail):
        """Rows of every member alone over ours."""
        count = lambda *how: sum(plan.cost(plan.evaluations(w, 25, 8, *how)) for w in windows)
        return count(False) / count(True, tail)

    timed((0,))  # warm
    rows = []
    for name, size, starts, few in (("1, any", 1, 24, (0, 12, 23)), ("1, first 6", 1, 6, (0, 5)),
                                    ("4, any", 4, 21, (0, 10, 20))):
        windows = [tuple(range(w, w + size)) for w in range(starts)]
        chosen = [tuple(range(w, w + size)) for w in few]
        alone = timed(chosen[-1], share_prefix=False, micro_batch=1).sum()
        for loop, tail in (("exact", None), ("with tail", 0.4)):
            one = np.mean([timed(w, tail=tail, micro_batch=1) for w in chosen], 0)
            many = np.mean([timed(w, tail=tail) for w in chosen], 0)
            timed_ones = on_paper(chosen, tail)
            rows.append({"window": name, "ours": loop, "on paper": on_paper(windows, tail),
                         "windows timed": timed_ones, "in seconds": float(alone / one.sum()),
                         "seconds / paper": float(alone / one.sum() / timed_ones),
                         "all rows at once": float(alone / many.sum()), "alone s": float(alone),
                         "ours s": float(one.sum()), "update's share": float(one[1] / one.sum())})
    table(config, "iteration: times less than every member alone (G 8, 25 steps)", rows)


# ---- memory ----

def process_memory(pid="self", key="VmRSS"):
    """MB of a process; None where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith(key)), None)


class Peaks:
    """Peak bytes of each phase: of the card's allocator, or of live tensors on a CPU (under
    `live`)."""
    def __init__(self):
        self.live = plan.Live()
        self.found = {}  # phase -> (bytes, MB by which the process grew at most)
        self.start = process_memory()

    def mark(self, phase):
        peak = torch.cuda.max_memory_allocated() if CUDA else self.live.peak
        self.found[phase] = peak, process_memory(key="VmHWM") - self.start
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.live.peak = self.live.now
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def measure_memory(config, settings, at, members, steps, mark, **how):
    """(Rows: phase, plan's estimate, measured) of one condition's iteration at `at`.

    settings: train.Config's that plan is told; mark(phase) is called too; how: rollout's options.
    """
    estimate = train.Config(world="clips", weights="", frames=config.frames, height=config.height,
                            width=config.width, conditions=1, members=members, micro_batch=1, **settings)
    dtype = getattr(torch, config.dtype)
    expected = plan.memory(estimate, dtype=dtype, dit_config=shape_of(config))[1]
    peaks = Peaks()
    with nullcontext() if CUDA else peaks.live:  # which would slow a card down, and counts nothing there
        dit, shape, condition, prepared = build(config)
        codec = random_vae(config)
        dit.checkpoint = True
        if how.pop("compile", False):
            dit.compile()
        optimizer = torch.optim.AdamW(trainable(dit))
        for p in trainable(dit):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()  # as the loop does
        peaks.mark("building")
        del prepared
        with torch.no_grad():
            prepared = dit.prepare(condition)
        peaks.mark("conditions")
        del condition

        def both(phase):
            peaks.mark(phase)
            mark(phase)
        mark("start")
        videos = one_iteration(dit, prepared, shape, at, both, members, steps, codec, micro_batch=1, **how)
    del videos
    return [{"": phase, "plan MB": expected[phase] / 1e6, "tensors MB": peak / 1e6,
             "plan / tensors": expected[phase] / peak, "process MB": None if CUDA else grown}
            for phase, (peak, grown) in peaks.found.items() if phase in expected]


def memory(config):
    say_where(config)
    members = 8 if CUDA else 2
    rows = measure_memory(config, {"size": 2}, (1, 2), members, 4, lambda phase: None)
    table(config, "memory: peak per phase", rows)


@dataclass
class Soak(Bench):
    """python -m benchmarks.bench soak"""
    iterations: int = 50                 # of the toy


def soak(config):
    """Resident memory of train.py on the toy, read whenever it logs an iteration."""
    with tempfile.TemporaryDirectory() as out:
        run = subprocess.Popen([sys.executable, "train.py", "--rooms=0", "--validate=0", "--conditions=2",
                                "--members=8", "--save_every=999", "--sample_every=999", f"--out={out}",
                                f"--iterations={config.iterations}"], cwd=ROOT, stderr=subprocess.DEVNULL)
        log = Path(out) / "log.jsonl"
        rows = []
        while run.poll() is None:
            time.sleep(0.05)
            lines = len(log.read_text().splitlines()) if log.exists() else 0
            if lines > len(rows):
                rows.append({"iterations": lines, "resident MB": process_memory(run.pid)})
        if run.returncode or not rows:
            raise ValueError(f"soak: train.py ended with {run.returncode}")
    table(config, "soak: a toy run, 2 conditions x 8 members", rows[::max(1, len(rows) // 6)] + rows[-1:])


# ---- scaling ----

def torchrun(ranks):
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def toy_log(*settings, ranks=1):
    """The iterations' lines of log.jsonl of a run of train.py on the toy."""
    with tempfile.TemporaryDirectory() as out:
        launch = [sys.executable, *(torchrun(ranks) if ranks > 1 else [])]
        run = subprocess.run([*launch, "train.py", "--rooms=0", "--validate=0", "--save_every=99999",
                              "--sample_every=99999", f"--out={out}", *settings],
                             cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(f"train.py: {(run.stderr.strip().splitlines() or ['no output'])[-1]}")
        lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]


@dataclass
class Scaling(Bench):
    """python -m benchmarks.bench scaling"""
    iterations: int = 8                  # of the toy


def scaling(config):
    rows = []
    for ranks in (1, 2):
        log = toy_log(f"--iterations={config.iterations}", f"--conditions={8 * ranks}", "--threads=1",
                      ranks=ranks)[1:]
        phases = {key.removeprefix("seconds/"): float(np.median([line[key] for line in log]))
                  for key in log[0] if key.startswith("seconds/")}
        rows.append({"ranks": ranks, "videos": 128 * ranks, **phases, "together": sum(phases.values())})
    table(config, "scaling: wall seconds an iteration of the toy, 8 conditions and one thread a rank", rows)
    command = [sys.executable, *torchrun(2), "-m", "benchmarks.bench", "allreduce"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size, once = map(float, done.stdout.split())
    table(config, "all-reduce of the toy's gradient, gloo", [
        {"MB": size / 1e6, "seconds": once, "share of an iteration": once / rows[1]["together"]}])
    waits(config)


def allreduce(config):
    """On every rank: the toy's gradient, once around."""
    dist.init_process_group("gloo")
    x = torch.zeros(306176)
    times = []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(x.nbytes, sorted(times)[10])
    dist.destroy_process_group()


class Waits(TorchDispatchMode):
    """Where values leave tensors for python: what a card's host would wait for. file:line ->
    times."""
    def __init__(self):
        super().__init__()
        self.at = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_stack()
                      if f.filename.startswith(str(ROOT)) and "bench.py" not in f.filename]
            self.at[frames[-1] if frames else "elsewhere"] += 1
        return function(*args, **(kwargs or {}))


def waits(config):
    """Of train.py's whole iteration on the toy, the world's own files (toy, rewards) apart."""
    counts = []
    for iterations in (1, 3):
        with tempfile.TemporaryDirectory() as out, Waits() as w:
            train.main(["--rooms=0", "--validate=0", "--conditions=2", "--members=4", "--size=2",
                        "--sample_every=99", "--save_every=99", "--checkpointing=True",
                        f"--iterations={iterations}", f"--out={out}"])
        counts.append(w.at)
    each = {key: (n - counts[0][key]) / 2 for key, n in counts[1].items() if n > counts[0][key]}
    theirs = ("toy", "rooms", "poses", "world", "rewards", "trajectories", "video", "elsewhere")
    world = {key: n for key, n in each.items() if key.startswith(theirs)}
    rows = [{"where": key, "per iteration": n} for key, n in sorted(each.items()) if key not in world]
    rows.append({"where": "toy world and its rewards", "per iteration": sum(world.values())})
    table(config, "values read by the host", rows)


# ---- share ----

def share(config):
    """VAE decode and Pluecker maps against the network's part of an iteration."""
    say_where(config)
    codec = random_vae(config)
    network = []
    for layers in (1, 2):
        dit, shape, _, prepared = build(dataclasses.replace(config, dim=1536, ffn=8960, layers=layers))
        x = torch.randn(1, *shape, device=DEVICE)
        t = torch.ones((), device=DEVICE)
        with torch.no_grad():
            network.append(seconds(lambda: dit(x, t, prepared), config.repeat)[1])
    forward = network[0] + 29 * (network[1] - network[0])
    latents = x.to(getattr(torch, config.dtype))
    decoding = 8 * seconds(lambda: codec.decode(latents), config.repeat)[1]
    c2w = torch.from_numpy(trajectories.recammaster(9, config.frames))[None].to(DEVICE)
    intrinsics = torch.tensor([[0.9, 1.56, 0.5, 0.5]], device=DEVICE)
    make = lambda: trajectories.camera_maps(c2w, intrinsics, config.height, config.width)
    maps = 2 * seconds(make, config.repeat)[1]
    with plan.without_contents():
        decode_work = plan.decode_flops(published_vae(), (16, 21, 60, 104)) / 1e12
    forward_work = plan.flops(plan.FUN_CAMERA, 65520) / 1e12
    rows = []
    counted = []
    for name, tail in (("exact", None), ("with tail", 0.4)):
        windows = [range(w, w + 4) for w in range(21)]
        n = float(np.mean([plan.cost(plan.evaluations(w, 25, 8, True, tail)) for w in windows]))
        whole = n * forward + decoding + maps
        rows.append({"window 4, G 8": name, "network s": n * forward, "decode s": decoding, "maps s": maps,
                     "decode's share": decoding / whole, "maps' share": maps / whole})
        counted.append({"window 4, G 8": name, "rows": n, "a forward": forward_work, "a decode": decode_work,
                        "decodes' share": 8 * decode_work / (8 * decode_work + n * forward_work)})
    size = f"{config.frames}x{config.height}x{config.width}"
    table(config, f"share: the full VAE, 1.3B (30 blocks from the times of 1 and 2), {size}", rows)
    table(config, "share: arithmetic at 81x480x832, TFLOP", counted)


# ---- curves ----

@dataclass
class Curves(Bench):
    """python -m benchmarks.bench curves"""
    iterations: int = 80                 # of the toy
    seeds: int = 3                       # runs of each loop


def curves(config):
    """A shared prefix and a tail against neither (calls of one row would change no sum, only take
    long)."""
    runs = {name: [toy_log(f"--iterations={config.iterations}", f"--seed={seed}", *how)
                   for seed in range(config.seeds)]
            for name, how in (("fast", ()), ("alone", ("--share_prefix=False", "--tail=0.0")))}
    length = max(1, config.iterations // 10)
    rows = []
    for i in range(0, config.iterations, length):
        fast, alone = ([np.mean([line["reward/trans"] for line in log[i:i + length]]) for log in logs]
                       for logs in runs.values())
        rows.append({"from iteration": i, "fast": float(np.mean(fast)), "alone": float(np.mean(alone)),
                     "difference": float(np.mean(fast) - np.mean(alone)),
                     "sd over seeds": float(np.std(fast + alone))})
    table(config, f"curves: the toy's translation reward, metres, mean over {config.seeds} seeds", rows)
    cost = lambda log: sum(line["seconds/rollout"] + line["seconds/update"] for line in log)
    table(config, "curves: seconds of rollout and update", [
        {name: float(np.mean([cost(log) for log in logs])) for name, logs in runs.items()}])


# ---- all that is owed of a card ----

class TimeLimit(BaseException):
    """A part of `card` took longer than it may. No Exception: the compiler would swallow it, and go on."""


@contextmanager
def limited(budget):
    """Ends what is inside after `budget` seconds, by TimeLimit; between python's own
    instructions."""
    def end(signum, frame):
        raise TimeLimit
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, budget, 5)  # and every 5 s, where somebody swallows it all the same
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Card(Network):
    """python -m benchmarks.bench card"""
    lengths: str = "81,49,17" if CUDA else "9,5"  # frames of the network's tables
    repeat: int = 2                      # the best of so many
    minutes: float = 9.0                 # for everything together
    out: str = "out/card"                # OUT.md and OUT.json (for plan's --measured)


def driver():
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"


def markdown(rows):
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join(lines + [f"| {' | '.join(map(show, row.values()))} |" for row in rows])


def card_network(config, report):
    """The network at one length: a table, and its rate for plan."""
    before = graphs()
    facts, rows = measure_network(config)
    ours = rows.get("ours, compiled") or rows["ours, prepared"]
    share_of_attention = facts["self-attention alone s"] / ours["forward s"]
    work = 1e12 * facts["TFLOP a forward"]
    report["rates"].setdefault("forward", work / ours["forward s"])
    if ours["fwd + bwd s"]:
        report["rates"].setdefault("update", 4 * work / ours["fwd + bwd s"])
    facts["self-attention's share of our forward"] = share_of_attention
    facts["graphs compiled"] = graphs() - before
    if "ours, compiled" in rows:
        usual = ours["forward s"] + (ours["fwd + bwd s"] or 0)
        facts["compile s"] = ours["first calls s"] - usual
    report["tables"][f"network, {config.frames} frames"] = [{"": name, **row} for name, row in rows.items()]
    report["facts"][f"{config.frames} frames"] = facts


def card_iteration(config, report):
    """One iteration of the fast recipe at full size, decoded: seconds, and memory against plan."""
    fast = parse(train.Config, [str(ROOT / "config/geo_align_fast.py")])
    start = (fast.first - fast.size) // 2
    at = tuple(range(start, start + fast.size))  # the middle of where its window may be
    stamps = {}
    mark = lambda phase: stamps.update({phase: now()})
    settings = dict(strategy="random", size=fast.size, first=fast.first, tail=fast.tail)
    before = graphs()
    rows = measure_memory(config, settings, at, fast.members, fast.steps, mark, tail=fast.tail,
                          compile=config.compile)
    times = dict(zip(("rollout", "decode", "update"), np.diff(list(stamps.values())).tolist()))
    rolled, updated = plan.evaluations(at, fast.steps, fast.members, True, fast.tail)
    shape = (16, (config.frames - 1) // 4 + 1, config.height // 8, config.width // 8)
    with plan.without_contents():
        work = plan.decode_flops(published_vae(), shape)
    report["rates"]["decode"] = fast.members * work / times["decode"]
    report["tables"]["memory of one condition"] = rows
    report["facts"]["one iteration of geo_align_fast, one condition"] = {
        **{f"{phase} s": x for phase, x in times.items()}, "rollout rows": rolled, "update rows": updated,
        "compilation is in the rollout and update": config.compile, "graphs compiled": graphs() - before}


def card(config):
    """Everything that is owed of a card, in parts with a limit each; writes a markdown table and
    plan's rates."""
    say_where(config)
    start = time.monotonic()
    report = {"device": torch.cuda.get_device_name() if CUDA else f"CPU {platform.processor()}",
              "driver": driver(), "cuda": torch.version.cuda, "torch": torch.__version__,
              "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "dtype": config.dtype,
              "command": " ".join(["python -m benchmarks.bench", *sys.argv[1:]]),
              "rates": {}, "facts": {}, "tables": {}, "not measured": {}}
    lengths = [int(x) for x in config.lengths.split(",") if x.strip().isdecimal()]
    if not lengths or any(n % 4 != 1 for n in lengths) or len(lengths) != len(config.lengths.split(",")):
        raise ValueError(f"lengths: expected numbers 4k + 1 such as 81,49,17, found {config.lengths!r}")
    check_checkout(config)
    parts = [(f"network, {n} frames", share, card_network, dataclasses.replace(config, frames=n))
             for n, share in zip(lengths, (0.3, 0.12, 0.08, *[0.05] * len(lengths)))]
    parts.append(("one iteration", 0.45, card_iteration, config))
    for name, share, part, settings in parts:
        left = 60 * config.minutes - (time.monotonic() - start)
        print(f"{name}: at most {min(left, 60 * share * config.minutes):.0f} s", flush=True)
        try:
            with limited(max(1, min(left, 60 * share * config.minutes))):
                part(settings, report)
        except TimeLimit:
            report["not measured"][name] = f"stopped at its limit, {60 * share * config.minutes:.0f} s"
        except (RuntimeError, ValueError, OSError) as error:  # out of memory, a kernel that the card lacks
            report["not measured"][name] = str(error).splitlines()[0]
        if CUDA:
            torch.cuda.empty_cache()
    head = ("device", "driver", "cuda", "torch", "python", "date", "dtype")
    text = [f"# {report['device']}", ", ".join(f"{name} {report[name]}" for name in head[1:]),
            f"`{report['command']}`, {time.monotonic() - start:.0f} s", ""]
    for name, facts in report["facts"].items():
        text += [f"**{name}**: " + ", ".join(f"{key} {show(x)}" for key, x in facts.items()), ""]
    for name, rows in report["tables"].items():
        text += [f"**{name}**", "", markdown(rows), ""]
    text += [f"*{name}*: not measured, {why}" for name, why in report["not measured"].items()]
    write_file(f"{config.out}.md", "\n".join(text).encode())
    write_json(f"{config.out}.json", report)
    print("\n".join(text))
    print(f"{config.out}.md\n{config.out}.json")


COMMANDS = {"card": (Card, card, None), "network": (Network, network, None),
            "compilation": (Bench, compilation, None), "iteration": (Bench, iteration, None),
            "memory": (Bench, memory, None), "soak": (Soak, soak, None), "scaling": (Scaling, scaling, None),
            "allreduce": (Bench, allreduce, None), "share": (Bench, share, None),
            "curves": (Curves, curves, None)}

if __name__ == "__main__":
    run_command("benchmarks.bench", __doc__, COMMANDS, sys.argv[1:] or ["--help"])
