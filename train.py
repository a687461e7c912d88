"""Geo-Align's training loop: condition -> rollout -> decode -> rewards -> advantages -> objective -> step.

    python train.py                                   the toy world, on a laptop (config/toy.py)
    python train.py config/toy.py --seed=1 --out=out/seed1
    torchrun --nproc-per-node=8 train.py config/geo_align.py --weights=... --clips=... --trajectories=...
    python -m benchmarks.plan config/geo_align.py --ranks=8   what that would cost, on each of 8 cards

The same command again resumes from --out. Exit codes: 0 done, 1 bad input or failed run (one line says why),
75 stopped by SIGTERM or SIGINT after writing a checkpoint (torchrun then ends with 1 and a traceback).
"""
import dataclasses
import inspect
import json
import math
import os
import signal
import sys

from contextlib import nullcontext
from dataclasses import dataclass

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import rewards
import trajectories
from data.video import decode
from data.world import clip_numbers, open_clips
from evaluation.generate import demonstration, negative_of
from evaluation.toy import Toy, evaluate_toy
from grpo import advantages, group_std, micro_batches, policy_loss, succeeded, summary
from model import trainable
from plumbing.checkpoint import lock_folder, open_log, resume, save_checkpoint
from plumbing.files import digest
from plumbing.ranks import (
    Clock, Stop, absent, assert_ranks_agree, connect, deafen, gather, lost_contact, reduce)
from plumbing.settings import parse
from sampler import rollout, schedule, window
from toy.world import open_toy


@dataclass
class Config:
    """One comment per field: what it is, its unit, where its default comes from."""
    # the world
    world: str = "toy"                 # "toy": rooms, shipped weights; "clips": real, published models
    weights: str = "toy/weights"       # folder of the official files (clips) or of the toy's
    clips: str = ""                    # folder that `python -m data.prepare` wrote
    trajectories: str = ""             # folder of camera paths, of any format that data/cameras reads
    frames: int = 81                   # video length, 4k + 1 (ReDirector; paper's missing)
    height: int = 480                  # pixels (ReDirector)
    width: int = 832                   # pixels (ReDirector)
    v: tuple = (0.005, 0.06, 0.025, 0.015)  # m/frame: lowest, highest, mean, sd of Eq. 10 (ours: unknown)
    omega: tuple = (0.05, 0.8, 0.3, 0.2)  # deg/frame: the same of Eq. 11 (ours: unknown)
    # rollout
    conditions: int = 8                # per iteration, over all ranks; divisible by their number
    members: int = 8                   # G, videos per condition (ours: paper's unknown)
    steps: int = 25                    # N, denoising steps (MixGRPO)
    shift: float = 5.0                 # of the schedule (Wan)
    strategy: str = "progressive"      # progressive (MixGRPO), random (LongCat) or all steps (Flow-GRPO)
    size: int = 4                      # steps in the window (MixGRPO)
    stride: int = 1                    # progressive: steps advanced ...
    iters_per_window: int = 25         # ... every so many iterations (MixGRPO)
    first: int = 0                     # window only among the first so many steps; 0: all (LongCat: 6 of 16)
    eta: float = 1.0                   # SDE noise (LongCat)
    tau: float = 0.45                  # cap of a step's std (LongCat); 0: Flow-GRPO's cure for t = 1 instead
    guidance: float = 1.0              # classifier-free guidance of the policy (paper's unknown); 1: off
    share_noise: bool = True           # one initial noise per group (LongCat, MixGRPO)
    share_prefix: bool = True          # compute once what a group shares; off: same numbers, slower
    tail: float = 0.0                  # keep this share of the steps after the window (MixGRPO-Flash: 0.4)
    micro_batch: int = 0               # network rows per call; 0: all at once
    # rewards and objective
    rewards: str = "trans=1,rot=1,vq=1,mq=1,hpsv3=1"  # and my_file.py:function=weight (ours: unknown)
    frame_weights: str = "linear"      # w_i of Eq. 3-4: linear (ours; paper: growing), uniform, quadratic
    estimator_stride: int = 1          # estimate the camera of every so many frames only
    reward_batch: int = 1              # videos per reward call; 0: all at once
    park: bool = False                 # keep reward models on the CPU between uses
    grey_mq: bool = False              # motion quality of the grey video, against colour hacking (LongCat)
    hpsv3_prompt: str = ""             # for all, as "A high-quality image" (LongCat); empty: the caption
    normalise: str = "max"             # by the largest group deviation (Eq. 5), or each "group"'s own (GRPO)
    reweight: bool = True              # lambda_t of Eq. 7
    clip: float = 1e-4                 # e of Eq. 7; small because log-probs are means (MixGRPO)
    updates: int = 1                   # optimiser steps an iteration, each on its share of every group
    lr: float = 1e-5                   # AdamW, constant (ours: paper's unknown)
    weight_decay: float = 1e-4         # AdamW
    grad_clip: float = 1.0             # largest gradient norm
    # the run
    iterations: int = 140              # (paper)
    seed: int = 0                      # of noise, conditions and paths
    out: str = "out"                   # folder for checkpoints, log.jsonl and samples; resumes from it
    save_every: int = 10               # iterations between checkpoints
    keep: int = 2                      # checkpoints kept
    sample_every: int = 10             # iterations between sample videos
    rooms: int = 8                     # toy: test rooms judged at the end, ten paths each; 0: none
    compile: bool = False              # torch.compile the transformer's blocks
    checkpointing: bool = True         # recompute blocks in the backward pass, but for attention's product
    threads: int = 0                   # CPU threads per process; 0: torch's choice
    timeout: int = 1800                # seconds until a rank that does not answer ends the run
    max_failures: float = 0.25         # stop where more than this share of an iteration's videos fail
    max_skips: int = 3                 # stop at so many updates in a row with non-finite gradients

    FREE = ("out", "iterations", "save_every", "keep", "sample_every", "timeout", "max_failures", "max_skips",
            "threads", "park", "reward_batch", "rooms")  # may change on resume


def check(config, ranks, folders=True):
    """ValueError where settings cannot work together; `folders`: or where those of the data are not named."""
    def need(ok, message):
        if not ok:
            raise ValueError(message)
    need(config.world in ("toy", "clips"), f"world: expected toy or clips, found {config.world!r}")
    need(config.height % 16 == 0 and config.width % 16 == 0 or config.world == "toy",
         f"height and width: expected multiples of 16, found {config.height} x {config.width}")
    need(len(config.v) == 4 and len(config.omega) == 4, "v and omega: expected (lowest, highest, mean, sd)")
    trajectories.draw_speeds(np.random.default_rng(0), config.v, config.omega)  # refuses bounds out of order
    zero = ("first", "micro_batch", "reward_batch", "seed", "rooms", "threads")  # may be 0
    for name, x in vars(config).items():
        need(type(x) is not int or x >= (name not in zero),
             f"{name}: expected at least {int(name not in zero)}, found {x}")
    need(config.frames % 4 == 1, f"frames: expected 4k + 1, found {config.frames}")
    need(config.normalise in ("max", "group"), f"normalise: expected max or group, found {config.normalise}")
    need(config.conditions % ranks == 0, f"conditions: {config.conditions} do not divide over {ranks} ranks")
    need(config.members % config.updates == 0,
         f"updates: {config.updates} do not divide {config.members} members")
    need(config.lr > 0 and config.eta > 0, f"lr and eta: expected > 0, found {config.lr} and {config.eta}")
    for name in ("clip", "grad_clip", "shift"):
        need(getattr(config, name) > 0, f"{name}: expected > 0, found {getattr(config, name)}")
    need(config.tau >= 0 and config.tail >= 0, f"tau, tail: expected >= 0, found {config.tau}, {config.tail}")
    window(0, config.steps, config.size, config.strategy, config.stride, config.iters_per_window,
           config.first or None)  # refuses one that does not fit
    if config.world == "clips" and folders:
        for name in ("clips", "trajectories"):
            need(getattr(config, name), f"--{name}=FOLDER is needed")





# ---- the loop ----


def main(argv):
    if "--help" in argv or "-h" in argv:
        return print(__doc__, inspect.getsource(Config), sep="\n")
    default = str(Path(__file__).parent / "config/toy.py")
    config = parse(Config, argv, default)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(config, ranks)
    if ":" in config.rewards and not any(arg.startswith("--rewards=") for arg in argv):
        raise ValueError(f"rewards: code of one's own runs only when named by --rewards=: {config.rewards}")
    half, signals = False, []  # whether between an update and its log line; what was received

    def stop(signum, frame):
        signals.append(signum)
        if not half:  # else the iteration is finished first
            raise Stop
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.world == "clips":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if ranks > 1:
        connect("nccl" if device.type == "cuda" else "gloo", config.timeout)
    say = print if rank == 0 else lambda *args: None

    world = {"toy": open_toy, "clips": open_clips}[config.world](config, device)
    dit, out = world.dit, Path(config.out)
    dit.checkpoint = config.checkpointing
    parameters = trainable(dit)
    for p in parameters:
        p.data = p.data.float()  # float32 masters; the frozen rest stays as loaded
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    if config.compile:
        dit.compile()
    optimizer = torch.optim.AdamW(parameters, config.lr, (0.9, 0.999), weight_decay=config.weight_decay)
    local, G, sigmas = config.conditions // ranks, config.members, schedule(config.steps, config.shift)
    sampling = dict(sigmas=sigmas, shape=world.shape, eta=config.eta, tau=config.tau or None,
                    t_max=None if config.tau else float(sigmas[1]), tail=config.tail or None,
                    guidance=config.guidance, micro_batch=config.micro_batch or None, seed=config.seed,
                    share_noise=config.share_noise, share_prefix=config.share_prefix, device=device)

    code = {reward.names[0]: digest(reward.code) for reward in world.rewards if hasattr(reward, "code")}
    made = dataclasses.asdict(config) | ({"code of rewards": code} if code else {})
    show = demonstration(world, config) if rank == 0 else None  # films the base, before weights are resumed
    lock = lock_folder(out) if rank == 0 else None  # noqa: F841, held until this process ends
    if ranks > 1:
        dist.barrier()  # nobody reads what a run that is ending still writes
    start = done = saved = resume(out, trained, optimizer, made, config.FREE)
    assert_ranks_agree(parameters, "at the start")
    count = lambda parameters: f"{sum(p.numel() for p in parameters):,}"
    say(f"{config.conditions} conditions x {G} members = {config.conditions * G} videos an iteration "
        f"on {ranks} rank(s), {device.type}; {count(parameters)} of {count(dit.parameters())} parameters "
        f"train; {start} of {config.iterations} iterations done in {out}")
    log = open_log(out / "log.jsonl", start) if rank == 0 else None
    policy = dit
    if ranks > 1:
        policy = DistributedDataParallel(dit, None if device.type == "cpu" else [device.index])
    skipped, warned = 0, set()
    try:
        if show and start == 0:
            show(out / "samples/iteration_000000.mp4")
        bar = tqdm(range(start, config.iterations), initial=start, total=config.iterations, disable=rank > 0,
                   unit="it")
        for iteration in bar:
            clock = Clock(device)

            # conditions: clips without replacement over all ranks, target paths independently (Sec. 3.4)
            mine = slice(rank * local, (rank + 1) * local)
            numbers = clip_numbers(iteration, config.conditions, world.size, config.seed)
            rngs = [np.random.default_rng((config.seed, iteration, j)) for j in range(config.conditions)]
            condition, scene = world.draw(numbers[mine], rngs[mine])
            with torch.no_grad():
                prepared = dit.prepare(condition)
                negative = negative_of(dit, condition, world.negative, config.guidance)
            del condition  # its camera maps are large
            clock("conditions")

            # rollout: G videos per condition, stochastic in the window's steps only (Sec. 3.3)
            steps = window(iteration, config.steps, config.size, config.strategy, config.stride,
                           config.iters_per_window, config.first or None, config.seed)
            sampled = rollout(dit, prepared, G, steps, iteration=iteration, negative=negative,
                              condition_ids=list(range(config.conditions))[mine], **sampling)
            clock("rollout")
            videos = decode(world.codec, sampled.latents.flatten(0, 1), config.reward_batch)  # C G of them
            clock("decode")

            # rewards of every video against its own target (Sec. 3.2), then of all ranks: name -> (C, G)
            rows = torch.arange(local).repeat_interleave(G).tolist()
            scores, failures = rewards.score(world.rewards, videos, scene[rows], config.reward_batch or None)
            why = {name: f"{len(f)} of {len(rows)} videos, {next(iter(f.values()))}"
                   for name, f in failures.items() if f}
            for name in why.keys() - warned:
                tqdm.write(f"warning: reward {name} failed for {why[name]}", sys.stderr)
            warned |= why.keys()
            scores = {name: gather(x.view(local, G)) for name, x in scores.items()}
            failed = ~succeeded(scores, world.reward_weights)
            if failed.float().mean() > config.max_failures:
                first = next((f"{name}: {x}" for name, x in why.items()), "on another rank")
                raise RuntimeError(f"iteration {iteration}: rewards failed for {int(failed.sum())} of "
                                   f"{failed.numel()} videos ({first})")
            clock("rewards")

            # advantages: normalised by the largest group deviation of all ranks (Eq. 5-6)
            A_all = advantages(scores, world.reward_weights, normalise=config.normalise)
            A = A_all[mine]

            # objective (Eq. 7) and step; `updates` of them, each on its share of every group's members
            share = G // config.updates
            for u in range(config.updates):
                members = slice(u * share, (u + 1) * share)
                part = sampled.part(members)
                total = part.log_prob.numel()  # this rank's share: DDP then averages over ranks
                batches = [(k, c, m) for k in range(len(steps))
                           for c, m in micro_batches(part, k, config.micro_batch or None)]
                statistics = []
                optimizer.zero_grad(set_to_none=True)
                for k, c, m in batches:
                    last = (k, c, m) == batches[-1]
                    with nullcontext() if last or ranks == 1 else policy.no_sync():
                        loss, s = policy_loss(policy, part, k, A[:, members], total, c, m, config.clip,
                                              config.reweight)
                        loss.backward()
                    statistics.append(s)
                stats = summary(statistics)
                mean = reduce(torch.stack([stats["loss"], stats["clip_fraction"]])) / ranks
                if u == 0:  # before weights change, the update must repeat the rollout's numerics
                    error = float(reduce(stats["ratio_error"], dist.ReduceOp.MAX))
                if iteration == start and u == 0:
                    if not math.isfinite(error):
                        raise RuntimeError("on-policy ratio: not a number, so conditions or weights hold one")
                    if error > config.clip:
                        raise RuntimeError(f"on-policy ratio is off by {error:.1e}, more than the clip range "
                                           f"{config.clip:.1e}: rollout and update run different numerics")
                    say(f"on-policy ratio 1 + {error:.0e}, as it should be")
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
                skipped = 0 if norm.isfinite() else skipped + 1
                if skipped >= config.max_skips:
                    raise RuntimeError(f"iteration {iteration}: gradient norm {float(norm)}, "
                                       f"{skipped} updates skipped in a row")
                half = True
                if not skipped:
                    optimizer.step()
                if iteration == start and u == 0:
                    assert_ranks_agree(parameters, "after the first update")
            clock("update")
            done = iteration + 1
            record = {"iteration": iteration, "window": list(steps), "failed": int(failed.sum()),
                      "skipped": skipped, "ratio_error": error, "grad_norm": float(norm),
                      "evaluations": sampled.evaluations, "loss": float(mean[0]),
                      "clip_fraction": float(mean[1]), "advantage_std": float(A_all.std())}
            for name, x in scores.items():
                ok = x[x.isfinite()]
                record |= {f"reward/{name}": float(ok.mean()) if len(ok) else None,  # JSON knows no NaN
                           f"spread/{name}": float(group_std({name: x}, {name: 1})[name].mean()),
                           f"failed/{name}": x.numel() - len(ok)}
            record |= {f"seconds/{phase}": round(s, 4) for phase, s in clock.seconds.items()}
            if rank == 0:
                try:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                except OSError as e:
                    raise OSError(e.errno, e.strerror, log.name) from None
                shown = [f"{name}={x[x.isfinite()].mean():.4f}" for name, x in scores.items()]
                shown += [f"|r-1|={error:.0e} clip={record['clip_fraction']:.2f} grad={float(norm):.2g}"]
                bar.set_postfix_str(" ".join(shown + [f"{p}={s:.2f}s" for p, s in clock.seconds.items()]))
            half = False
            if signals:
                raise Stop
            del prepared, negative, sampled, part, videos  # or they stay while the next are made
            if done % config.save_every == 0 or done == config.iterations:
                assert_ranks_agree(parameters, f"iteration {iteration}")
                if rank == 0:
                    save_checkpoint(out, done, trained, optimizer, made)
                    saved = done
            if show and (done % config.sample_every == 0 or done == config.iterations):
                show(out / f"samples/iteration_{done:06d}.mp4")
        if rank == 0 and config.world == "toy" and config.rooms:
            evaluate_toy(Toy(
                str(out), config.weights, str(out / "evaluation"), config.rooms, "1", steps=config.steps,
                shift=config.shift, log=str(out / "log.jsonl")))
        if ranks > 1:
            dist.destroy_process_group()
    except Stop:
        deafen()
        if rank == 0:
            if done > saved:
                save_checkpoint(out, done, trained, optimizer, made)
            print(f"\nstopped after {done} iterations, saved; the same command goes on", file=sys.stderr)
        os._exit(75)  # other ranks may wait in a collective that this one has left
    except RuntimeError as e:
        deafen()
        if rank == 0 and lost_contact(e) and not half and done > saved:  # this rank is whole
            save_checkpoint(out, done, trained, optimizer, made)
        raise


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            sys.stdout.flush()
            os._exit(0)  # the communication's threads may abort an interpreter that ends by itself
    except Stop:
        os._exit(75)  # before the first iteration
    except (ValueError, OSError, RuntimeError) as e:
        deafen()  # torchrun sends a signal while this still finds out who is gone
        if os.environ.get("DEBUG"):
            raise
        known = dist.is_initialized() and dist.is_torchelastic_launched()
        gone = absent() if known and lost_contact(e) else []
        why = f"rank {', '.join(gone)} ended or hangs: " if gone else ""
        print(f"error: {why}{str(e).splitlines()[0]}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
