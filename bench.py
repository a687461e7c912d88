"""Benchmarks, one table each; the figures are in BENCHMARKS.md.

    python bench.py network    forward, and forward + backward with checkpointing; --official=REDIRECTOR_CHECKOUT to compare
    python bench.py iteration  evaluations on paper and in seconds: every member alone against ours
    python bench.py memory     peak per phase against --dry-run's estimate; a soak of toy iterations
    python bench.py scaling    one and two gloo ranks; points at which the host waits for the device
    python bench.py share      VAE decode and Pluecker packing
    python bench.py curves     the toy's learning curve, fast loop against every member alone, over seeds

--json=FILE keeps the rows. Weights are random. Sizes default to the published ones on a GPU, to small ones on a CPU.
Seconds are the best of --repeat; on a CPU with one thread they are seconds of that thread, so that other programs on
the same core do not count.
"""
import argparse
import ast
import collections
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import plan
import trajectories
import vae
from grpo import micro_batches, policy_loss
from model import Condition, Config, DiT, trainable
from sampler import rollout, schedule
from train import decode

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32
ROOT = Path(__file__).resolve().parent
RESULTS = {}


def table(title, rows):
    """Prints rows (dicts with the same keys) under a title, and keeps them for --json."""
    RESULTS[title] = rows
    text = [[f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *text)]
    print(f"\n{title}")
    for line in (list(rows[0]), *text):
        print("  ".join(x.ljust(n) if i == 0 else x.rjust(n) for i, (x, n) in enumerate(zip(line, widths))), flush=True)


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

def build(args, seed=0, rows=1):
    """DiT, latent's shape, Condition of `rows`; random, but with every part at work."""
    torch.manual_seed(seed)
    config = Config(dim=args.dim, num_heads=args.dim // 128, num_layers=args.layers, ffn_dim=args.ffn, image_dim=1280,
                    camera_dim=24, roce=True)
    with DEVICE:
        dit = DiT(config).to(DTYPE).eval()
        for name, p in dit.named_parameters():
            if name.endswith("head.weight") or "rope_phase" in name:
                torch.nn.init.normal_(p, std=0.02)
        for p in trainable(dit):
            p.data = p.data.float()
        shape = (16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
        maps = (rows, 24, shape[1], args.height, args.width)
        text = torch.randn(rows, 512, 4096) * (torch.arange(512) < 60)[:, None]
        return dit, shape, Condition(text, torch.randn(rows, 257, 1280), torch.randn(rows, *shape), torch.randn(maps), torch.randn(maps))


def flops(config, tokens, text=512, image=257):
    """Of one row's forward pass once `prepare` has run: matrix products and attention, an addition counted as one.
    tokens: of target and source together."""
    D, phases = config.dim, 2 * config.num_heads * 2 * (config.dim // config.num_heads // 6)
    linear = 6 * D * D + phases * D + 2 * D * config.ffn_dim  # q k v o, cross-attention's q o, RoCE, feed-forward
    ends = tokens // 2 * 4 * D * (config.out_dim + config.out_dim)  # patches in and out, of the target
    return 2 * (config.num_layers * (tokens * linear + 2 * tokens * D * (tokens + text + image)) + ends)


def one_iteration(dit, prepared, shape, at, mark, members=8, steps=25, codec=None, **settings):
    """Rollout, decode, update of one condition as train.py does them; mark(phase) after each. settings: rollout's."""
    sampled = rollout(dit, prepared, members, at, sigmas=schedule(steps, 5.0), shape=shape, seed=0, condition_ids=[0],
                      device=DEVICE, **settings)
    mark("rollout")
    videos = codec and decode(codec, sampled.latents[0], 1)
    mark("decode")
    A = torch.linspace(-1, 1, members, device=DEVICE)[None]
    for p in dit.parameters():
        p.grad = None
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
    """velocity = f(x, t, condition, checkpointing) of the official code in a checkout of ReDirector, with dit's weights."""
    package = types.ModuleType("redirector")
    package.__path__ = [str(Path(path) / "diffsynth/models")]
    sys.modules["redirector"] = package
    code = importlib.import_module("redirector.wan_video_dit")
    file, scope = Path(path) / "diffsynth/pipelines/wan_video_new.py", {"torch": torch, "Optional": object, **vars(code)}
    scope["Optional"] = {torch.Tensor: None}
    body = [x for x in ast.parse(file.read_text()).body if isinstance(x, ast.FunctionDef) and x.name == "model_fn_wan_video"]
    exec(compile(ast.Module(body, []), str(file), "exec"), scope)
    c, head = dit.config, dit.head_dim
    with DEVICE:
        wan = code.WanModel(dim=c.dim, in_dim=32, ffn_dim=c.ffn_dim, out_dim=16, text_dim=4096, freq_dim=256, eps=1e-6,
                            patch_size=(1, 2, 2), num_heads=c.num_heads, num_layers=c.num_layers, has_image_input=True,
                            add_control_adapter=True, in_dim_control_adapter=24)
        for block in wan.blocks:
            for name in ("rope_phase_qk", "rope_phase_vo"):
                phases = torch.nn.Linear(c.dim, c.num_heads * (2 * head // 3 // 2), bias=False)
                setattr(block.self_attn, name, torch.nn.Sequential(torch.nn.SiLU(), phases))
    wan = wan.to(DTYPE)
    wan.load_state_dict(dit.state_dict())
    trainable(wan)

    def velocity(x, t, condition, checkpointing=False):
        return scope["model_fn_wan_video"](
            wan, latents=x.to(DTYPE), timestep=(1000 * t[None]).to(DTYPE), context=condition.text.to(DTYPE),
            clip_feature=condition.image.to(DTYPE), y=condition.source.to(DTYPE), control_camera_latents_input=condition.camera.to(DTYPE),
            cond_plucker_embedding=condition.source_camera.to(DTYPE), use_gradient_checkpointing=checkpointing)
    return velocity


def network(args):
    for frames in args.frames_list:
        network_at(argparse.Namespace(**{**vars(args), "frames": frames}))


def network_at(args):
    dit, shape, condition = build(args)
    tokens = 2 * shape[1] * shape[2] * shape[3] // 4
    a, b = torch.randn(tokens, args.dim, device=DEVICE, dtype=DTYPE), torch.randn(args.dim, args.ffn, device=DEVICE, dtype=DTYPE)
    rate = 2 * tokens * args.dim * args.ffn / seconds(lambda: a @ b, 10)[1]
    big = torch.randn(2 ** 25, device=DEVICE)
    bandwidth = 2 * big.nbytes / seconds(lambda: big.clone(), 5)[1]
    work = flops(dit.config, tokens)
    print(f"{args.frames}x{args.height}x{args.width}: {tokens} tokens, {work / 1e12:.3f} TFLOP a forward; measured matrix product "
          f"{rate / 1e12:.3f} TFLOP/s, copy {bandwidth / 1e9:.1f} GB/s; floor {work / rate:.3f} s (arithmetic), "
          f"{sum(p.nbytes for p in dit.parameters()) / bandwidth:.3f} s (weights read once)")
    x, t = torch.randn(1, *shape, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    with torch.no_grad():
        prepared = dit.prepare(condition)
    ours, rows, values = (lambda c: lambda recompute: dit(x, t, c)), [], {}

    def measure(name, forward):
        dit.checkpoint = True
        try:
            with torch.no_grad():
                first, forwards = seconds(lambda: values.update({name: forward(False)}), args.repeat)
            first_both, both = seconds(lambda: forward(True).float().square().mean().backward(), args.repeat)
        except RuntimeError as error:
            return print(f"{name}: not measured, {str(error).splitlines()[0]}")
        rows.append({"": name, "forward s": forwards, "share of matrix product rate": work / rate / forwards, "fwd + bwd s": both,
                     "over forward": both / forwards, "first calls s": first + first_both - forwards - both})
    if args.official:
        with torch.no_grad():
            reference = official(args.official, dit)
        measure("official", lambda recompute: reference(x, t, condition, recompute))
    measure("ours, nothing prepared", ours(condition))
    measure("ours, prepared", ours(prepared))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            if CUDA or backend == SDPBackend.MATH:
                measure(f"ours, {backend.name.lower()}", ours(prepared))
    if args.compile:
        dit.compile()
        measure("ours, compiled", ours(prepared))
    if args.official:
        for row in rows:
            row["official / this"], row["fwd + bwd: official / this"] = rows[0]["forward s"] / row["forward s"], rows[0]["fwd + bwd s"] / row["fwd + bwd s"]
        error = (values["ours, prepared"] - values["official"]).abs().max() / values["official"].abs().max()
        print(f"largest difference from the official velocity: {float(error):.1e} of the largest value")
    table(f"network, {args.frames} frames", rows)
    if args.compile:
        recompiles(args, dit, shape)


def recompiles(args, dit, shape):
    """Graphs that dynamo makes while what should not matter changes."""
    graphs, rows = (lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]), []
    rows.append({"": "after the table above", "graphs": graphs(), "seconds": None})
    with torch.no_grad():
        first, other = (dit.prepare(build(args, seed)[2]) for seed in (1, 2))
    G = 4
    for name, at, prepared, members in (
            ("iteration: rollout and update, rows 1 and G", (2,), first, G), ("another window", (5,), first, G),
            ("wider window", (1, 2), first, G), ("another condition and caption", (2,), other, G), ("another G", (2,), other, G - 1)):
        start = now()
        one_iteration(dit, prepared, shape, at, lambda phase: None, members, 8)
        rows.append({"": name, "graphs": graphs(), "seconds": now() - start})
    table("graphs compiled so far", rows)


# ---- iteration ----

def iteration(args):
    dit, shape, condition = build(args)
    dit.checkpoint = True
    with torch.no_grad():
        prepared = dit.prepare(condition)
    members, steps, rows = 8, 25, []

    def timed(at, **settings):
        phases, last = {}, [now()]

        def mark(phase):
            phases[phase], last[0] = now() - last[0], now()
        best = None
        for _ in range(args.repeat):
            last[0] = now()
            one_iteration(dit, prepared, shape, at, mark, members, steps, **settings)
            best = dict(phases) if best is None else {p: min(best[p], phases[p]) for p in best}
        return np.array([best["rollout"], best["update"]])
    with torch.no_grad():  # warm
        dit(torch.zeros(1, *shape, device=DEVICE), torch.ones((), device=DEVICE), prepared)
    for name, size, starts, few in (("1, any step", 1, range(24), (0, 12, 23)), ("1, first 6", 1, range(6), (0, 5)), ("4, any", 4, range(21), (0, 10, 20))):
        windows = [tuple(range(w, w + size)) for w in starts]
        chosen = [tuple(range(w, w + size)) for w in few]
        paper = timed(chosen[-1], share_prefix=False, micro_batch=1)
        for loop, tail in (("exact", None), ("with tail", 0.4)):
            mean = lambda windows, *how: np.mean([plan.cost(plan.evaluations(w, steps, members, *how)) for w in windows])
            one, many = (np.mean([timed(w, tail=tail, micro_batch=rows_) for w in chosen], 0) for rows_ in (1, None))
            counted = mean(chosen, False) / mean(chosen, True, tail)
            rows.append({"window": name, "ours": loop, "paper": float(mean(windows, False) / mean(windows, True, tail)),
                         "these windows": float(counted), "seconds": float(paper.sum() / one.sum()), "over count": float(paper.sum() / one.sum() / counted),
                         "all rows at once": float(paper.sum() / many.sum()), "alone s": float(paper.sum()), "ours s": float(one.sum()),
                         "update share": float(one[1] / one.sum())})
    table("iteration: times less than every member alone (G 8, 25 steps)", rows)


# ---- memory ----

def status(pid, key="VmRSS"):
    """MB of a process."""
    try:
        return next(int(line.split()[1]) / 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(key))
    except (OSError, StopIteration):
        return None


def memory(args):
    """Peaks of one condition's phases, micro-batches of one row, against plan.memory's."""
    from train import Config as Run
    config = Run(world="clips", weights="", frames=args.frames, height=args.height, width=args.width, conditions=1, micro_batch=1, size=2)
    fun, plan.FUN_CAMERA = plan.FUN_CAMERA, Config(dim=args.dim, num_heads=args.dim // 128, num_layers=args.layers, ffn_dim=args.ffn,
                                                   image_dim=1280, camera_dim=24, roce=True)
    estimate, peaks, plan.FUN_CAMERA = *plan.memory(config, dtype=DTYPE), fun
    rows, found = [], {}
    live = plan.Live()

    def reset():
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        live.peak = live.now
        Path("/proc/self/clear_refs").write_text("5")  # the resident set's peak
    resident = status("self")

    def mark(phase):
        found[phase] = (torch.cuda.max_memory_allocated() if CUDA else live.peak) / 1e6, (status("self", "VmHWM") - resident) * 1.048576
        reset()
    with live:
        reset()
        dit, shape, condition = build(args)
        dit.checkpoint, codec = True, random_vae()
        optimizer = torch.optim.AdamW(trainable(dit))
        for p in trainable(dit):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with torch.no_grad():
            prepared = dit.prepare(condition)
        mark("conditions")
        del condition
        one_iteration(dit, prepared, shape, (1, 2), mark, steps=4, codec=codec, micro_batch=1)
    for phase in peaks:
        rows.append({"": phase, "estimate MB": peaks[phase] / 1e6, "tensors MB": found[phase][0], "estimate / tensors": peaks[phase] / 1e6 / found[phase][0],
                     "resident MB": None if CUDA else found[phase][1]})
    table("memory: peak per phase", rows)
    soak(args)


def soak(args):
    with tempfile.TemporaryDirectory() as out:
        run, sizes = toy_process(out, f"--iterations={args.iterations}", "--sample_every=100000"), {}
        while run.poll() is None:
            lines = Path(out, "log.jsonl").read_text().count("\n") if Path(out, "log.jsonl").exists() else 0
            sizes[lines] = status(run.pid) or sizes.get(lines)
            time.sleep(0.05)
        if run.returncode:
            sys.exit(run.stderr.read())
    at = sorted(k for k in sizes if k > 1 and sizes[k])
    table("soak: resident MB of a toy run after so many iterations", [{"iterations": k, "MB": sizes[k]} for k in at[::max(1, len(at) // 6)] + at[-1:]])


# ---- scaling ----

def toy_process(out, *settings, ranks=1):
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *start, "train.py", "--rooms=0", "--save_every=100000", f"--out={out}", *settings],
                            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def toy_log(*settings, ranks=1):
    with tempfile.TemporaryDirectory() as out:
        run = toy_process(out, *settings, ranks=ranks)
        error = run.communicate()[1]
        if run.returncode:
            sys.exit(error)
        return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


class Waits(TorchDispatchMode):
    """Where values leave tensors for python: what a GPU's host would wait for. file:line -> times."""
    def __init__(self):
        super().__init__()
        self.at = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and "bench.py" not in f.filename]
            self.at[f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "elsewhere"] += 1
        return function(*args, **(kwargs or {}))


def scaling(args):
    rows = []
    for ranks in (1, 2):
        log = toy_log(f"--iterations={args.iterations}", f"--conditions={8 * ranks}", "--sample_every=100000", f"--timeout={args.timeout}", ranks=ranks)[1:]
        phases = {k.split("/")[1]: float(np.median([r[k] for r in log])) for k in log[0] if k.startswith("seconds/")}
        rows.append({"ranks": ranks, "videos": 128 * ranks, **phases, "together": sum(phases.values())})
    table("scaling: wall seconds an iteration of the toy, 8 conditions a rank", rows)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "allreduce"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr)
    for line in found.stdout.splitlines():
        size, s = map(float, line.split())
        table("all-reduce over gloo", [{"MB": size / 1e6, "seconds": s, "share of an iteration": s / rows[1]["together"]}])
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
    """Of the method's part of an iteration: rollout and update."""
    dit, shape, condition = build(argparse.Namespace(**{**vars(args), "frames": 5, "height": 32, "width": 32, "dim": 128, "layers": 1, "ffn": 128}))
    with torch.no_grad():
        prepared = dit.prepare(condition)
    rows = []
    for name, at, settings in (("window 1", (2,), {}), ("window 4", (2, 3, 4, 5), {}), ("window 4, tail, one row a call", (2, 3, 4, 5), dict(tail=0.4, micro_batch=1))):
        found, before = {}, 0
        with Waits() as w:
            def mark(phase):
                nonlocal before
                found[phase], before = w.at.total() - before, w.at.total()
            one_iteration(dit, prepared, shape, at, mark, **settings)
        rows.append({"": name, "rollout": found["rollout"], "update": found["update"], "where": "; ".join(f"{n}x {k}" for k, n in w.at.most_common(4)) or "-"})
    table("values read by the host, per iteration", rows)


# ---- share ----

def share(args):
    """VAE decode and Pluecker maps against the network's part of an iteration."""
    real = argparse.Namespace(**{**vars(args), "dim": 1536, "ffn": 8960, "layers": 1})
    codec = random_vae()
    dit, shape, condition = build(real)
    z = torch.randn(1, *shape, device=DEVICE, dtype=DTYPE)
    _, decoding = seconds(lambda: codec.decode(z), args.repeat)
    with torch.no_grad():
        prepared = dit.prepare(condition)
        x, t, network = torch.randn(1, *shape, device=DEVICE), torch.ones((), device=DEVICE), []
        for layers in (1, 2):
            dit = build(argparse.Namespace(**{**vars(real), "layers": layers}))[0]
            prepared = dit.prepare(condition)
            network.append(seconds(lambda: dit(x, t, prepared), args.repeat)[1])
    forward = network[0] + 29 * (network[1] - network[0])
    c2w, intrinsics = torch.from_numpy(trajectories.recammaster(9, args.frames))[None].to(DEVICE), torch.tensor([[0.9, 1.56, 0.5, 0.5]], device=DEVICE)
    _, packing = seconds(lambda: trajectories.camera_maps(c2w, intrinsics, args.height, args.width), args.repeat)
    rows = []
    for name, tail in (("exact", None), ("with tail", 0.4)):
        evaluations = np.mean([plan.cost(plan.evaluations(tuple(range(w, w + 4)), 25, 8, True, tail)) for w in range(21)])
        whole = evaluations * forward + 8 * decoding + 2 * packing
        rows.append({"window 4, G 8": name, "network s": evaluations * forward, "decode s": 8 * decoding, "maps s": 2 * packing,
                     "decode share": 8 * decoding / whole, "maps share": 2 * packing / whole})
    table(f"share: 1.3B (30 blocks from the time of 1 and 2), full VAE, {args.frames}x{args.height}x{args.width}", [{k: float(v) if k not in list(row)[:1] else v for k, v in row.items()} for row in rows])
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae.VAE(16, [96, 96, 192, 384, 384], 2, [False, True, True]).decode(torch.empty(1, 16, 21, 60, 104))
    decode_flops = counter.get_total_flops()
    forward_flops = flops(plan.FUN_CAMERA, 65520)
    table("arithmetic at 81x480x832, TFLOP", [{"a forward": forward_flops / 1e12, "a decode": decode_flops / 1e12,
                                               "decodes' share, window 4, exact": 8 * decode_flops / (8 * decode_flops + 223 * forward_flops)}])


# ---- curves ----

def curves(args):
    rows, settings = [], {"fast": (), "alone": ("--share_prefix=False", "--tail=0.0")}  # a micro-batch changes no sum
    logs = {name: [toy_log(f"--iterations={args.iterations}", f"--seed={seed}", "--sample_every=100000", *how) for seed in range(args.seeds)]
            for name, how in settings.items()}
    for start in range(0, args.iterations, max(1, args.iterations // 10)):
        part = {name: [np.mean([r["reward/trans"] for r in log[start:start + max(1, args.iterations // 10)]]) for log in runs] for name, runs in logs.items()}
        rows.append({"from iteration": start, **{name: float(np.mean(x)) for name, x in part.items()},
                     "sd over seeds": float(np.mean([np.std(x) for x in part.values()])), "difference": float(np.mean(part["fast"]) - np.mean(part["alone"]))})
    table(f"curves: translation reward of the toy (metres), mean over {args.seeds} seeds", rows)
    spent = {name: float(np.mean([sum(r["seconds/rollout"] + r["seconds/update"] for r in log) for log in runs])) for name, runs in logs.items()}
    print(f"rollout + update: {spent['fast']:.1f} s fast, {spent['alone']:.1f} s alone, {spent['alone'] / spent['fast']:.2f} times")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (network, iteration, memory, scaling, allreduce, share, curves)}
    parser.add_argument("command", choices=commands)
    big = dict(frames="81,49,17", height=480, width=832, dim=1536, layers=30, ffn=8960)
    for name, value in (big if CUDA else dict(frames="17", height=96, width=96, dim=384, layers=4, ffn=1536)).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    for name, value in dict(repeat=3, iterations=50, seeds=3, timeout=1800).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--official", help="a checkout of byeongjun-park/ReDirector; needs einops")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    args.frames_list = [int(x) for x in args.frames.split(",")]
    args.frames = args.frames_list[0]
    if args.command != "allreduce":
        where = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
        print(f"{where}, torch {torch.__version__}, {DTYPE}")
    commands[args.command](args)
    if args.json:
        Path(args.json).write_text(json.dumps({"argv": sys.argv[1:], "torch": torch.__version__, "tables": RESULTS}, indent=1))


if __name__ == "__main__":
    main()
