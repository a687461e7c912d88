"""Benchmarks, one table each; the figures are in README.md here.

    python -m benchmarks.bench network      forward, forward + backward with checkpointing; beside the official code
                                 with --official=REDIRECTOR_CHECKOUT
    python -m benchmarks.bench compilation  graphs made while window, caption and condition change
    python -m benchmarks.bench iteration    evaluations on paper and in seconds: every member alone against ours
    python -m benchmarks.bench memory       peak per phase against --dry-run's estimate; a soak of toy iterations
    python -m benchmarks.bench scaling      one and two gloo ranks; points at which the host waits for the device
    python -m benchmarks.bench share        VAE decode and Pluecker packing
    python -m benchmarks.bench curves       the toy's learning curve, fast loop against every member alone, over seeds

--json=FILE keeps the rows. Weights are random. Sizes and --dtype default to the published ones on a GPU, to
small ones and float32 on a CPU. Seconds are the best of --repeat; on a CPU with one thread they are seconds
of that thread, so that other programs on the same core do not count.
"""
import argparse
import ast
import collections
import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plan
import train
import trajectories
from pretrained import vae
from grpo import micro_batches, policy_loss
from model import Condition, Config, DiT, trainable
from sampler import rollout, schedule

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32
ROOT = Path(__file__).resolve().parent.parent
RESULTS = {}


def table(title, rows):
    """Prints rows (dicts with the same keys) under a title, and keeps them for --json."""
    RESULTS[title] = rows
    show = lambda x: f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x)
    text = [[show(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *text)]
    print(f"\n{title}")
    for line in (list(rows[0]), *text):
        cells = [line[0].ljust(widths[0]), *(x.rjust(n) for x, n in zip(line[1:], widths[1:]))]
        print(*cells, sep="  ", flush=True)


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


# ---- what is measured: a DiT with random weights, its condition, one iteration on them ----

def shape_of(args):
    return Config(dim=args.dim, num_heads=args.dim // 128, num_layers=args.layers, ffn_dim=args.ffn,
                  image_dim=1280, camera_dim=24, roce=True)


def build(args, seed=0):
    """DiT, latent's shape, one Condition, what the DiT prepares of it; random, every part at work."""
    torch.manual_seed(seed)
    with DEVICE, torch.no_grad():
        dit = DiT(shape_of(args)).to(DTYPE).eval()
        for name, p in dit.named_parameters():
            if name.endswith("head.weight") or "rope_phase" in name:
                p.normal_(std=0.02)
        for p in trainable(dit):
            p.data = p.data.float()
        shape = (16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
        maps = torch.randn(2, 1, 24, shape[1], args.height, args.width)
        text, image = torch.randn(1, 512, 4096), torch.randn(1, 257, 1280)
        condition = Condition(text, image, torch.randn(1, *shape), *maps)
        return dit, shape, condition, dit.prepare(condition)


def flops(config, tokens, text=512, image=257):
    """Of one row's forward pass once `prepare` has run: matrix products and attention, an addition counted as
    one. tokens: of target and source together."""
    D, phases = config.dim, 2 * config.num_heads * 2 * (config.dim // config.num_heads // 6)
    linear = 6 * D * D + phases * D + 2 * D * config.ffn_dim  # q k v o, cross-attention's q o, RoCE, MLP
    ends = tokens // 2 * 4 * D * (config.out_dim + config.out_dim)  # patches in and out, of the target
    return 2 * (config.num_layers * (tokens * linear + 2 * tokens * D * (tokens + text + image)) + ends)


def one_iteration(dit, prepared, shape, at, mark, members=8, steps=25, codec=None, **settings):
    """Rollout, decode, update of one condition as train.py does them; mark(phase) after each. settings:
    rollout's."""
    sampled = rollout(dit, prepared, members, at, sigmas=schedule(steps, 5.0), shape=shape, seed=0,
                      condition_ids=[0], device=DEVICE, **settings)
    mark("rollout")
    videos = codec and train.decode(codec, sampled.latents[0], 1)
    mark("decode")
    A = torch.linspace(-1, 1, members, device=DEVICE)[None]
    dit.zero_grad()
    for k in range(len(at)):
        for c, m in micro_batches(sampled, k, settings.get("micro_batch")):
            policy_loss(dit, sampled, k, A, None, c, m)[0].backward()
    mark("update")
    return videos


def random_vae(width=96):
    torch.manual_seed(0)
    with DEVICE:
        codec = vae.VAE(16, [width, width, 2 * width, 4 * width, 4 * width], 2, [False, True, True])
    return codec.to(DTYPE).eval().requires_grad_(False)


# ---- network ----

def official(path, dit):
    """velocity = f(x, t, condition, checkpointing), by a checkout of ReDirector with dit's weights."""
    package = types.ModuleType("redirector")
    package.__path__ = [str(Path(path) / "diffsynth/models")]
    sys.modules["redirector"] = package
    code = importlib.import_module("redirector.wan_video_dit")
    file = Path(path) / "diffsynth/pipelines/wan_video_new.py"
    scope = {**vars(code), "torch": torch, "Optional": {torch.Tensor: None}}  # of one function in that file
    body = [x for x in ast.parse(file.read_text()).body if getattr(x, "name", "") == "model_fn_wan_video"]
    exec(compile(ast.Module(body, []), str(file), "exec"), scope)
    c, head = dit.config, dit.head_dim
    with DEVICE:
        wan = code.WanModel(dim=c.dim, in_dim=32, ffn_dim=c.ffn_dim, out_dim=16, text_dim=4096, freq_dim=256,
                            eps=1e-6, patch_size=(1, 2, 2), num_heads=c.num_heads, num_layers=c.num_layers,
                            has_image_input=True, add_control_adapter=True, in_dim_control_adapter=24)
        for block in wan.blocks:
            for name in ("rope_phase_qk", "rope_phase_vo"):
                phases = torch.nn.Linear(c.dim, c.num_heads * (2 * head // 3 // 2), bias=False)
                setattr(block.self_attn, name, torch.nn.Sequential(torch.nn.SiLU(), phases))
    wan = wan.to(DTYPE)
    wan.load_state_dict(dit.state_dict())
    trainable(wan)

    def velocity(x, t, condition, checkpointing=False):
        c = condition.to(DTYPE)
        return scope["model_fn_wan_video"](
            wan, latents=x.to(DTYPE), timestep=(1000 * t[None]).to(DTYPE), context=c.text,
            clip_feature=c.image, y=c.source, control_camera_latents_input=c.camera,
            cond_plucker_embedding=c.source_camera,
            use_gradient_checkpointing=checkpointing)
    return velocity


class Traffic(TorchDispatchMode):
    """Bytes that kernels read and write; views cost nothing."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x))
        return out


def network(args):
    dit, shape, condition, prepared = build(args)
    tokens = 2 * shape[1] * shape[2] * shape[3] // 4
    a, b = (torch.randn(n, device=DEVICE, dtype=DTYPE) for n in ((tokens, args.dim), (args.dim, args.ffn)))
    rate = 2 * tokens * args.dim * args.ffn / seconds(lambda: a @ b, 10)[1]
    big = torch.randn(2 ** 25, device=DEVICE)
    bandwidth = 2 * big.nbytes / seconds(lambda: big.clone(), 5)[1]
    work = flops(dit.config, tokens)
    print(f"{args.frames}x{args.height}x{args.width}: {tokens} tokens, {work / 1e12:.3f} TFLOP a forward; "
          f"measured: matrix product {rate / 1e12:.3f} TFLOP/s, copy {bandwidth / 1e9:.1f} GB/s; "
          f"floor {work / rate:.3f} s (arithmetic), "
          f"{sum(p.nbytes for p in dit.parameters()) / bandwidth:.3f} s (weights read once)")
    q = torch.randn(1, dit.config.num_heads, tokens, dit.head_dim, device=DEVICE, dtype=DTYPE)
    attend = lambda: F.scaled_dot_product_attention(q, q, q)
    alone, its = args.layers * seconds(attend, args.repeat)[1], args.layers * 4 * tokens ** 2 * args.dim
    print(f"self-attention alone: {alone:.3f} s, {its / alone / rate:.0%} of the matrix product's rate; "
          f"the other arithmetic at that rate: {(work - its) / rate:.3f} s")
    if args.backward:
        q.requires_grad_()
        both = args.layers * seconds(lambda: attend().backward(q.detach()), args.repeat)[1]
        print(f"self-attention alone with its backward: {both:.3f} s")
    del a, b, big, q
    x, t = torch.randn(1, *shape, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    ours, rows, values = (lambda c: lambda recompute: dit(x, t, c)), [], {}

    def measure(name, forward):
        dit.checkpoint = True
        try:
            with torch.no_grad():
                first, forwards = seconds(lambda: values.update({name: forward(False)}), args.repeat)
                traffic = Traffic()
                if name != "ours, compiled":  # whose kernels it does not see
                    with traffic:
                        forward(False)
            first_both, both = 0, None
            if args.backward:
                loss = lambda: forward(True).float().square().mean()
                first_both, both = seconds(lambda: loss().backward(), args.repeat)
        except RuntimeError as error:
            return print(f"{name}: not measured, {str(error).splitlines()[0]}")
        rows.append({"": name, "forward s": forwards, "of matrix product rate": work / rate / forwards,
                     "GB moved": traffic.bytes / 1e9 or None,
                     "fwd + bwd s": both, "over forward": both and both / forwards,
                     "first calls s": first + first_both})
    if args.official:
        with torch.no_grad():
            reference = official(args.official, dit)
        measure("official", lambda recompute: reference(x, t, condition, recompute))
    measure("ours, nothing prepared", ours(condition))
    measure("ours, prepared", ours(prepared))
    backends = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"] if CUDA else []
    for name in backends + ["MATH"] * (tokens < 2 ** 13):  # it writes N x N weights
        with sdpa_kernel(getattr(SDPBackend, name)):
            measure(f"ours, {name.lower()}", ours(prepared))
    if args.compile:
        dit.compile()
        measure("ours, compiled", ours(prepared))
    for row in rows if args.official else ():
        row |= {f"official / this, {key[:-2]}": row[key] and rows[0][key] / row[key]
                for key in ("forward s", "fwd + bwd s")}
    if args.official:
        error = (values["ours, prepared"] - values["official"]).abs().max() / values["official"].abs().max()
        print(f"largest difference from the official velocity: {float(error):.1e} of the largest value")
    table(f"network, {args.frames} frames", rows)


def compilation(args):
    """Graphs that dynamo makes while what should not matter changes."""
    graphs, G, rows = (lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]), 4, []
    dit, shape, _, first = build(args)
    dit.checkpoint = True
    dit.compile()
    with torch.no_grad():
        other = dit.prepare(build(args, 2)[2])
    for name, at, prepared, members in (
            ("window of 2: rows 1 and G, with and without gradient", (1, 2), first, G),
            ("another window", (5, 6), first, G), ("window of 1", (3,), first, G),
            ("another condition and caption", (1, 2), other, G), ("another G", (1, 2), other, 3)):
        start = now()
        one_iteration(dit, prepared, shape, at, lambda phase: None, members, 8)
        rows.append({"": name, "graphs so far": graphs(), "seconds": now() - start})
    table("compilation", rows)


# ---- iteration ----

def iteration(args):
    dit, shape, _, prepared = build(args)
    dit.checkpoint, rows = True, []

    def timed(at, **settings):
        """Seconds of (rollout, update)."""
        times = []
        for _ in range(args.repeat):
            stamps = [now()]
            one_iteration(dit, prepared, shape, at, lambda phase: stamps.append(now()), **settings)
            times.append(np.diff(stamps)[[0, 2]])
        return np.min(times, 0)
    timed((0,))  # warm
    for name, size, starts, few in (("1, any", 1, 24, (0, 12, 23)), ("1, first 6", 1, 6, (0, 5)),
                                    ("4, any", 4, 21, (0, 10, 20))):
        windows, chosen = ([tuple(range(w, w + size)) for w in x] for x in (range(starts), few))
        alone = timed(chosen[-1], share_prefix=False, micro_batch=1).sum()
        for loop, tail in (("exact", None), ("with tail", 0.4)):
            count = lambda windows, *how: sum(plan.cost(plan.evaluations(w, 25, 8, *how)) for w in windows)
            times = lambda windows: count(windows, False) / count(windows, True, tail)
            one, many = (np.mean([timed(w, tail=tail, micro_batch=n) for w in chosen], 0) for n in (1, None))
            rows.append({"window": name, "ours": loop, "on paper": float(times(windows)),
                         "windows timed": float(times(chosen)), "in seconds": float(alone / one.sum()),
                         "seconds / paper": float(alone / one.sum() / times(chosen)),
                         "all rows at once": float(alone / many.sum()), "alone s": float(alone),
                         "ours s": float(one.sum()), "update's share": float(one[1] / one.sum())})
    table("iteration: times less than every member alone (G 8, 25 steps)", rows)


# ---- memory ----

def status(pid, key="VmRSS"):
    """MB of a process; None where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith(key)), None)


def memory(args):
    """Peaks of one condition's phases, one row a call, against plan.memory's."""
    G = 8 if CUDA else 2
    config = train.Config(world="clips", weights="", frames=args.frames, height=args.height, width=args.width,
                          conditions=1, members=G, micro_batch=1, size=2)
    with patch.object(plan, "FUN_CAMERA", shape_of(args)):
        peaks = plan.memory(config, dtype=DTYPE)[1]
    found, resident = {}, status("self")

    def mark(phase):
        peak = torch.cuda.max_memory_allocated() if CUDA else live.peak
        found[phase] = peak, status("self", "VmHWM") - resident
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        live.peak = live.now
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with plan.Live() as live:
        mark("start")
        dit, shape, condition, prepared = build(args)
        dit.checkpoint, codec, optimizer = True, random_vae(), torch.optim.AdamW(trainable(dit))
        for p in trainable(dit):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        mark("building")
        with torch.no_grad():
            prepared = dit.prepare(condition)
        mark("conditions")
        del condition
        videos = one_iteration(dit, prepared, shape, (1, 2), mark, G, 4, codec, micro_batch=1)
    del videos
    table("memory: peak per phase", [
        {"": phase, "estimate MB": x / 1e6, "tensors MB": found[phase][0] / 1e6,
         "estimate / tensors": x / found[phase][0], "resident MB": None if CUDA else found[phase][1]}
        for phase, x in peaks.items()])
    soak(args)


def soak(args):
    """Live tensor bytes and resident memory at the start of each of a toy run's iterations."""
    seen = []

    def clock(device, Clock=train.Clock):
        seen.append((live.now / 1e6, status("self")))
        return Clock(device)
    with tempfile.TemporaryDirectory() as out, patch.object(train, "Clock", clock), plan.Live() as live:
        train.main(["--rooms=0", "--conditions=2", "--members=8", "--save_every=99", "--sample_every=99",
                    f"--iterations={args.iterations}", f"--out={out}"])
    rows = [{"iterations": i, "tensors MB": x, "resident MB": y} for i, (x, y) in enumerate(seen)]
    table("soak: a toy run, 2 conditions x 8 members", rows[::max(1, len(rows) // 6)] + rows[-1:])


# ---- scaling ----

def torchrun(ranks):
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def toy_log(*settings, ranks=1):
    """log.jsonl of a run of train.py on the toy."""
    with tempfile.TemporaryDirectory() as out:
        launch = [sys.executable, *(torchrun(ranks) if ranks > 1 else [])]
        run = subprocess.run([*launch, "train.py", "--rooms=0",
                              "--save_every=100000", "--sample_every=100000", f"--out={out}", *settings],
                             cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


class Waits(TorchDispatchMode):
    """Where values leave tensors for python: what a GPU's host would wait for. file:line -> times."""
    def __init__(self):
        super().__init__()
        self.at = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_stack()
                      if f.filename.startswith(str(ROOT)) and "bench.py" not in f.filename]
            self.at[frames[-1] if frames else "elsewhere"] += 1
        return function(*args, **(kwargs or {}))


def scaling(args):
    rows = []
    for ranks in (1, 2):
        log = toy_log(f"--iterations={args.iterations}", f"--conditions={8 * ranks}", "--threads=1",
                      ranks=ranks)[1:]
        phases = {k.removeprefix("seconds/"): float(np.median([r[k] for r in log]))
                  for k in log[0] if k.startswith("seconds/")}
        rows.append({"ranks": ranks, "videos": 128 * ranks, **phases, "together": sum(phases.values())})
    table("scaling: wall seconds an iteration of the toy, 8 conditions and one thread a rank", rows)
    command = [sys.executable, *torchrun(2), __file__, "allreduce"]
    size, s = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    table("all-reduce of the toy's gradient, gloo", [
        {"MB": size / 1e6, "seconds": s, "share of an iteration": s / rows[1]["together"]}])
    waits(args)


def allreduce(args):
    """On every rank: the toy's gradient, once around."""
    import torch.distributed as dist
    dist.init_process_group("gloo")
    x, times = torch.zeros(306176), []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(x.nbytes, sorted(times)[10])
    dist.destroy_process_group()


def waits(args):
    """Of train.py's whole iteration on the toy, the world's own files (toy, rewards) apart."""
    counts = []
    for iterations in (1, 3):
        with tempfile.TemporaryDirectory() as out, Waits() as w:
            train.main(["--rooms=0", "--conditions=2", "--members=4", "--size=2", "--sample_every=99",
                        "--save_every=99", "--checkpointing=True", f"--iterations={iterations}",
                        f"--out={out}"])
        counts.append(w.at)
    each = {key: (n - counts[0][key]) / 2 for key, n in counts[1].items() if n > counts[0][key]}
    theirs = "toy", "rewards", "trajectories", "data", "elsewhere"
    world = {k: n for k, n in each.items() if k.startswith(theirs)}
    rows = [{"where": k, "per iteration": n} for k, n in sorted(each.items()) if k not in world]
    rows.append({"where": "toy world and its rewards", "per iteration": sum(world.values())})
    table("values read by the host", rows)


# ---- share ----

def share(args):
    """VAE decode and Pluecker maps against the network's part of an iteration."""
    codec, network = random_vae(), []
    args.dim, args.ffn = 1536, 8960
    for args.layers in (1, 2):
        dit, shape, _, prepared = build(args)
        x, t = torch.randn(1, *shape, device=DEVICE), torch.ones((), device=DEVICE)
        with torch.no_grad():
            network.append(seconds(lambda: dit(x, t, prepared), args.repeat)[1])
    forward = network[0] + 29 * (network[1] - network[0])
    decode = 8 * seconds(lambda: codec.decode(x.to(DTYPE)), args.repeat)[1]
    c2w = torch.from_numpy(trajectories.recammaster(9, args.frames))[None].to(DEVICE)
    intrinsics = torch.tensor([[0.9, 1.56, 0.5, 0.5]], device=DEVICE)
    make = lambda: trajectories.camera_maps(c2w, intrinsics, args.height, args.width)
    maps = 2 * seconds(make, args.repeat)[1]
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        vae.VAE(16, [96, 96, 192, 384, 384], 2, [False, True, True]).decode(torch.empty(1, 16, 21, 60, 104))
    decode_work, forward_work = counter.get_total_flops() / 1e12, flops(plan.FUN_CAMERA, 65520) / 1e12
    rows, counted = [], []
    for name, tail in (("exact", None), ("with tail", 0.4)):
        windows = [range(w, w + 4) for w in range(21)]
        n = float(np.mean([plan.cost(plan.evaluations(w, 25, 8, True, tail)) for w in windows]))
        whole = n * forward + decode + maps
        rows.append({"window 4, G 8": name, "network s": n * forward, "decode s": decode, "maps s": maps,
                     "decode's share": decode / whole, "maps' share": maps / whole})
        counted.append({"window 4, G 8": name, "evaluations": n, "a forward": forward_work,
                        "a decode": decode_work,
                        "decodes' share": 8 * decode_work / (8 * decode_work + n * forward_work)})
    size = f"{args.frames}x{args.height}x{args.width}"
    table(f"share: the full VAE, 1.3B (30 blocks from the times of 1 and 2), {size}", rows)
    table("share: arithmetic at 81x480x832, TFLOP", counted)


# ---- curves ----

def curves(args):
    """A shared prefix and a tail against neither (calls of one row would change no sum, only take long)."""
    runs = {name: [toy_log(f"--iterations={args.iterations}", f"--seed={seed}", *how)
                   for seed in range(args.seeds)]
            for name, how in (("fast", ()), ("alone", ("--share_prefix=False", "--tail=0.0")))}
    length, rows = max(1, args.iterations // 10), []
    for i in range(0, args.iterations, length):
        fast, alone = ([np.mean([r["reward/trans"] for r in log[i:i + length]]) for log in logs]
                       for logs in runs.values())
        rows.append({"from iteration": i, "fast": float(np.mean(fast)), "alone": float(np.mean(alone)),
                     "difference": float(np.mean(fast) - np.mean(alone)),
                     "sd over seeds": float(np.std(fast + alone))})
    table(f"curves: the toy's translation reward, metres, mean over {args.seeds} seeds", rows)
    cost = lambda log: sum(r["seconds/rollout"] + r["seconds/update"] for r in log)
    table("curves: seconds of rollout and update", [
        {name: float(np.mean([cost(log) for log in logs])) for name, logs in runs.items()}])


def main():
    global DTYPE
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    commands = {f.__name__: f for f in (network, compilation, iteration, memory, scaling,
                                       allreduce, share, curves)}
    parser.add_argument("command", choices=commands)
    published = dict(frames=81, height=480, width=832, dim=1536, layers=30, ffn=8960)
    small = dict(frames=17, height=96, width=96, dim=384, layers=4, ffn=1536)
    for name, value in dict(published if CUDA else small, repeat=3, iterations=50, seeds=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=str(DTYPE).removeprefix("torch."))
    parser.add_argument("--official", help="a checkout of byeongjun-park/ReDirector; needs einops")
    parser.add_argument("--no-backward", dest="backward", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    DTYPE = getattr(torch, args.dtype)
    if args.command != "allreduce":
        where = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
        print(f"{where}, torch {torch.__version__}, {DTYPE}")
    commands[args.command](args)
    if args.json:
        found = {"argv": sys.argv[1:], "torch": torch.__version__, "tables": RESULTS}
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
