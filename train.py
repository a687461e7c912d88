"""Geo-Align's training loop: condition, rollout, decode, rewards, advantages, objective, step.

    python train.py                                the toy world, on a laptop (config/toy.py)
    python train.py config/toy.py --seed=1 --out=out/seed1
    torchrun --nproc-per-node=8 train.py config/geo_align_fast.py \\
        --weights=... --clips=... --trajectories=...
    python -m benchmarks.plan config/geo_align_fast.py --ranks=8   what that would cost

The same command again resumes from --out. Exit codes: 0 done, 1 bad input or failed run (one line
says why), 75 stopped by SIGTERM, SIGINT or SIGHUP after writing a checkpoint (torchrun: 1).
"""
import plumbing.early  # noqa: F401, before all: a signal during the imports ends this quietly

import importlib.util
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import rewards
import trajectories
from data.captions import open_captions
from data.video import decode
from data.world import clip_numbers, open_clips
from evaluation.compare import finish_run
from evaluation.generate import demonstration, prepare, validation
from evaluation.toy import Toy, evaluate_toy
from grpo import advantages, group_std, micro_batches, policy_loss, succeeded, summary
from model import trainable
from plumbing.checkpoint import Run
from plumbing.guard import seed_everything
from plumbing.ranks import (
    Clock, Interrupts, assert_ranks_agree, gather, launch, rank_of, run_to_end)
from plumbing.settings import Folder, at_most, help_text, parse
from plumbing.tell import (
    check_divergence, check_on_policy, describe, on_all_ranks, progress, sizes, tell,
    warn_of_failures)
from sampler import rollout, schedule, window
from toy.world import SIZE as TOY_SIZE, open_toy

WORLDS = {"toy": open_toy, "clips": open_clips, "captions": open_captions}


@dataclass
class Config:
    """One comment per field: what it is, its unit, where its default comes from."""
    # the world
    world: str = "toy"                 # toy: rooms, shipped weights; clips: real, published models;
                                       # captions: prompts alone, for a policy without a source
    weights: Folder = "toy/weights"    # folder of the official files (clips) or of the toy's
    clips: Folder = ""                 # folder that `python -m data.prepare` wrote
    captions: str = ""                 # captions: text file, one prompt a line
    trajectories: Folder = ""          # folder of camera paths, as data/camera_files reads them
    frames: int = 81                   # video length, 4k + 1 (ReDirector; paper's missing)
    height: int = 480                  # pixels (ReDirector)
    width: int = 832                   # pixels (ReDirector)
    v: tuple = (0.005, 0.06, 0.025, 0.015)  # m/frame: lowest, highest, mean, sd of Eq. 10 (ours)
    omega: tuple = (0.05, 0.8, 0.3, 0.2)  # deg/frame: the same of Eq. 11 (ours)
    # rollout
    conditions: int = 8                # per iteration, over all ranks; divisible by their number
    members: int = 8                   # G, videos per condition (ours: paper's unknown)
    steps: int = 25                    # N, denoising steps (MixGRPO)
    shift: float = 5.0                 # of the schedule (Wan)
    strategy: str = "progressive"      # progressive (MixGRPO), random (LongCat), all (Flow-GRPO)
    size: int = 4                      # steps in the window (MixGRPO)
    stride: int = 1                    # progressive: steps advanced ...
    iters_per_window: int = 25         # ... every so many iterations (MixGRPO)
    first: int = 0                     # window among the first so many steps; 0: all (LongCat: 6)
    skip: int = 0                      # steps at the start that it leaves out (ours)
    window_per_condition: bool = False  # random: each condition has its own (Flash-GRPO)
    eta: float = 1.0                   # SDE noise (LongCat)
    tau: float = 0.45                  # cap of a step's std (LongCat); 0: t_max instead (Flow-GRPO)
    guidance: float = 1.0              # classifier-free guidance of the policy; 1: off (ours)
    share_noise: bool = True           # one initial noise per group (LongCat, MixGRPO)
    share_prefix: bool = True          # compute once what a group shares; off: same numbers, slower
    tail: float = 0.0                  # share of later steps kept (MixGRPO-Flash: 0.4); 0: off
    micro_batch: int = 0               # network rows per call; 0: all at once
    # rewards and objective
    rewards: str = "trans=1,rot=1,vq=1,mq=1,hpsv3=1"  # also my_file.py:function=weight (ours)
    frame_weights: str = "linear"      # w_i of Eq. 3-4: linear, uniform, quadratic (paper: growing)
    estimator_stride: int = 1          # estimate the camera of every so many frames only
    reward_batch: int = 1              # videos per reward call; 0: all at once
    park: bool = False                 # keep reward models on the CPU between uses
    grey_mq: bool = False              # motion quality of the grey video (LongCat)
    hpsv3_prompt: str = ""             # for all: "A high-quality image" (LongCat); empty: captions
    normalise: str = "max"             # by the largest group deviation (Eq. 5), or group (GRPO)
    reweight: bool = True              # lambda_t of Eq. 7
    clip: float = 1e-4                 # e of Eq. 7; small because log-probs are means (MixGRPO)
    kl: float = 0.0                    # times lambda_t^2 KL(policy || base) (LongCat; paper: none)
    updates: int = 1                   # optimiser steps an iteration, each on a share of each group
    lr: float = 1e-5                   # AdamW, constant (ours: paper's unknown)
    betas: tuple = (0.9, 0.999)        # AdamW (torch)
    eps: float = 1e-15                 # AdamW; far below the gradient's size, 2e-9 at 1.3B (ours)
    weight_decay: float = 1e-4         # AdamW (MixGRPO)
    grad_clip: float = 3.0             # longest gradient, in medians of the last 20; 0: any (ours)
    # the run
    iterations: int = 140              # (paper)
    seed: int = 0                      # of noise, conditions and paths
    out: Folder = "out"                # folder for checkpoints, log.jsonl, samples; resumes there
    save_every: int = 10               # iterations between checkpoints
    keep: int = 4                      # checkpoints kept: above max_skips, so that one is healthy
    sample_every: int = 10             # iterations between sample videos, and between validations
    validate: int = 8                  # fixed conditions, sampled by the ODE and scored; 0: none
    rooms: int = 8                     # toy: test rooms judged at the end, ten paths each; 0: none
    log_to: str = ""                   # tensorboard or wandb, besides log.jsonl; empty: neither
    compile: bool = False              # torch.compile the transformer's blocks
    checkpointing: bool = True         # recompute blocks in the backward pass, but not attention
    threads: int = 0                   # CPU threads per process; 0: torch's choice
    timeout: int = 1800                # seconds until a rank that does not answer ends the run
    max_failures: float = 0.25         # stop where more than this share of videos fails
    max_skips: int = 3                 # stop at so many updates in a row with non-finite gradients

    # Settings that a resumed run may change.
    FREE = ("out", "iterations", "save_every", "keep", "sample_every", "timeout", "max_failures",
            "max_skips", "threads", "park", "reward_batch", "rooms", "validate", "log_to")

    def check(self, ranks, folders=True, given=()):
        """ValueError where settings cannot work.

        folders: also where the world's folders are missing; given: names set on the command line.
        """
        def need(ok, message):
            if not ok:
                raise ValueError(message)
        reads = {"toy": (), "clips": ("clips", "trajectories"), "captions": ("captions",)}
        need(self.world in reads, f"world: expected toy, clips or captions, found {self.world!r}")
        fits = self.height % 16 == 0 and self.width % 16 == 0
        need(fits or self.world == "toy",
             f"height and width: expected multiples of 16, found {self.height} x {self.width}")
        need(self.log_to in ("", "tensorboard", "wandb"),
             f"log_to: expected tensorboard or wandb, found {self.log_to!r}")
        need(not self.log_to or importlib.util.find_spec(self.log_to),
             f"log_to: {self.log_to} is not installed; pip install {self.log_to}")
        need(len(self.v) == 4 and len(self.omega) == 4,
             "v and omega: expected (lowest, highest, mean, sd)")
        trajectories.draw_speeds(np.random.default_rng(0), self.v, self.omega)  # refuses bad bounds
        may_be_0 = ("first", "skip", "micro_batch", "reward_batch", "seed", "rooms", "threads",
                    "validate")
        for name, x in vars(self).items():
            if type(x) is int:
                least = 0 if name in may_be_0 else 1
                need(x >= least, f"{name}: expected at least {least}, found {x}")
        at_most(self, conditions=1 << 16, members=1 << 12, rooms=1 << 12, threads=1 << 10,
                steps=1 << 12, validate=1 << 16)
        need(self.frames % 4 == 1, f"frames: expected 4k + 1, found {self.frames}")
        need(self.normalise in ("max", "group"),
             f"normalise: expected max or group, found {self.normalise}")
        need(self.conditions % ranks == 0,
             f"conditions: {self.conditions} do not divide over {ranks} ranks")
        need(self.members >= 2,
             f"members: expected at least 2, or nothing can be learnt, found {self.members}")
        need(self.members % self.updates == 0,
             f"updates: {self.updates} do not divide {self.members} members")
        for name in ("lr", "eta", "clip", "shift"):
            need(getattr(self, name) > 0, f"{name}: expected > 0, found {getattr(self, name)}")
        for name in ("tau", "tail", "kl", "eps", "weight_decay"):
            need(getattr(self, name) >= 0, f"{name}: expected >= 0, found {getattr(self, name)}")
        need(self.grad_clip == 0 or self.grad_clip > 1,
             f"grad_clip: expected more than 1 (in median norms) or 0, found {self.grad_clip}")
        need(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
             f"betas: expected two numbers in [0, 1), found {self.betas}")
        need(self.strategy == "random" or not self.window_per_condition,
             f"window_per_condition: expected strategy random, found {self.strategy}")
        need(self.first <= self.steps,
             f"first: expected at most {self.steps}, the steps, found {self.first}")
        self.window(0)  # refuses one that does not fit
        need("," not in self.out, f"out: expected a folder without commas, found {self.out}")
        need(self.max_skips < self.keep,
             f"max_skips: expected below keep, {self.keep}, found {self.max_skips}")
        if self.world == "toy":
            for name in ("clips", "trajectories", "estimator_stride", "grey_mq", "hpsv3_prompt",
                         "park"):
                need(getattr(self, name) == getattr(Config, name),
                     f"{name}: the toy has no use for it")
            for name, size in TOY_SIZE.items():  # a default stands for the toy's size
                need(getattr(self, name) == size or name not in given
                     and getattr(self, name) == getattr(Config, name),
                     f"{name}: expected {size}, the toy's, found {getattr(self, name)}")
        for name in ("clips", "trajectories", "captions") if folders else ():
            given = bool(getattr(self, name))
            kind = "FILE" if name == "captions" else "FOLDER"
            need(given or name not in reads[self.world], f"--{name}={kind} is needed")
            need(not given or name in reads[self.world],
                 f"{name}: world = {self.world} does not read it")

    def open_world(self, device):
        """The data.world.World that these settings name."""
        return WORLDS[self.world](self, device)

    def window(self, iteration):
        """The stochastic steps of an iteration, which are trained on: C tuples of indices."""
        return [window(iteration, self.steps, self.size, self.strategy, self.stride,
                       self.iters_per_window, self.first or None, self.seed,
                       j if self.window_per_condition else None, self.skip)
                for j in range(self.conditions)]

    def sampling(self, shape, device):
        """What the rollout is told besides the condition; shape: of a latent."""
        sigmas = schedule(self.steps, self.shift)
        return dict(sigmas=sigmas, shape=shape, device=device, seed=self.seed, eta=self.eta,
                    tau=self.tau or None, t_max=None if self.tau else float(sigmas[1]),
                    tail=self.tail or None, guidance=self.guidance,
                    micro_batch=self.micro_batch or None,
                    share_noise=self.share_noise, share_prefix=self.share_prefix)


# ---- the loop ----

def main(argv):
    if "--help" in argv or "-h" in argv:
        return print(help_text(__doc__, Config))
    rank, ranks = rank_of()
    config = read_config(argv, ranks)
    interrupts = Interrupts()
    device = launch(config.world != "toy", config.threads, config.timeout)

    # The world: policy, codec, what to draw, what to reward. Trained weights are kept in float32.
    world = config.open_world(device)
    dit = world.dit
    dit.checkpoint = config.checkpointing
    parameters = trainable(dit)
    for p in parameters:
        p.data = p.data.float()
    if config.compile:
        dit.compile()
    optimizer = torch.optim.AdamW(parameters, config.lr, config.betas, config.eps,
                                  config.weight_decay)

    # The run: its folder, and how far it came. The base is sampled before a checkpoint is loaded.
    show = demonstration(world, config) if rank == 0 else None
    validate = validation(world, config, rank, ranks)
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    base = frozen_copy(dit, trained) if config.kl else None
    run = Run(config, trained, optimizer, world.rewards, world.inputs)
    assert_ranks_agree(parameters, "at the start")
    describe(config, dit, ranks, device, run)

    # Each rank has its share of the conditions; DDP averages the gradients of all ranks.
    on_gpus = None if device.type == "cpu" else [device.index]
    policy = dit if ranks == 1 else DistributedDataParallel(dit, on_gpus)
    ids = range(config.conditions)
    local = config.conditions // ranks
    mine = slice(rank * local, (rank + 1) * local)
    start = run.done
    skipped = 0     # updates in a row whose gradients were no numbers
    warned = set()  # what was warned of already
    with run.saved_however_it_ends(interrupts):
        if show and run.lacks_sample():
            show(run.sample())
        bar = progress(start, config.iterations, rank == 0)
        for iteration in bar:
            clock = Clock(device)
            valid = validate() if iteration % config.sample_every == 0 else {}
            clock("validation")

            # Conditions: clips without replacement over all ranks, paths independently (Sec. 3.4).
            numbers = clip_numbers(iteration, config.conditions, world.size, config.seed)
            rngs = [np.random.default_rng((config.seed, iteration, j)) for j in ids]
            condition, scene = world.draw(numbers[mine], rngs[mine])
            prepared, negative = prepare(dit, condition, world.negative, config.guidance)
            del condition  # its camera maps are large
            clock("conditions")

            # Rollout: G videos of every condition, stochastic in the window only (Sec. 3.3).
            windows = config.window(iteration)
            sampled = rollout(dit, prepared, config.members, windows[mine], iteration=iteration,
                              condition_ids=ids[mine], negative=negative,
                              **config.sampling(world.shape, device))
            evaluations = int(gather(torch.tensor([sampled.evaluations], device=device)).sum())
            clock("rollout")
            videos = decode(world.codec, sampled.latents.flatten(0, 1), config.reward_batch)
            clock("decode")

            # Rewards of every video against its own target (Eq. 3-4); all ranks': name -> (C, G).
            scores, failed = score(world, videos, scene, config, iteration, warned)
            clock("rewards")

            # Advantages: normalised by the largest group deviation of all ranks (Eq. 5-6).
            A = advantages(scores, world.reward_weights, normalise=config.normalise)

            # The objective (Eq. 7) and a step; or `updates` of them, each on a share of each group.
            share = config.members // config.updates
            for update in range(config.updates):
                members = slice(update * share, (update + 1) * share)
                stats = gradients(policy, base, sampled.part(members), A[mine, members], config)
                if update == 0:  # the weights are still those of the rollout
                    ratio_error = check_on_policy(stats, config.clip, iteration == start)
                norm = clip_gradient(parameters, run.norms, config.grad_clip)
                skipped = 0 if norm.isfinite() else skipped + 1
                check_divergence(skipped, config.max_skips, norm, iteration)
                means = on_all_ranks(stats)
                interrupts.hold()  # from the first step to the log's line, a signal waits
                if not skipped:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)  # or gradients stay while videos are made
                if iteration == start and update == 0:
                    assert_ranks_agree(parameters, "after the first update")
            clock("update")

            # One line for the log, then whatever is due.
            record = {"iteration": iteration,
                      "window": windows if config.window_per_condition else windows[0],
                      "failed": failed, "skipped": skipped, "ratio_error": ratio_error,
                      "evaluations": evaluations, **means, **sizes(parameters, optimizer, norm),
                      "advantage_std": float(A.std()), **statistics(scores), **valid,
                      **clock.record()}
            run.log(record)
            tell(bar, run.records, config.eps, warned)
            interrupts.release()
            del prepared, negative, sampled, videos  # or they stay while the next are made
            if run.is_due(config.save_every):
                assert_ranks_agree(parameters, f"iteration {iteration}")
                run.save()
            if show and run.is_due(config.sample_every):
                show(run.sample())
        run.finish()
        if config.validate and start < config.iterations:
            run.note({"iteration": run.done, **validate()})  # of the final weights
        if rank == 0:
            report(run, config)


# ---- the steps of the loop that need more than a line ----

def score(world, videos, scene, config, iteration, warned):
    """All ranks' rewards, name -> (conditions, members), and how many of their videos failed.

    videos: uint8 (C G, T, H, W, 3) of C conditions on this rank; scene: C rows. RuntimeError where
    more than config.max_failures of all ranks' videos failed.
    """
    rows = torch.arange(len(videos) // config.members).repeat_interleave(config.members).tolist()
    seed_everything(config.seed, iteration, rank_of()[0])  # a resumed run draws the same
    scores, failures = rewards.score(world.rewards, videos, scene[rows],
                                     config.reward_batch or None)
    scores = {name: gather(x.view(-1, config.members)) for name, x in scores.items()}
    failed = ~succeeded(scores, world.reward_weights)  # (C, G) of all ranks
    reasons = warn_of_failures(failures, len(videos), warned)
    if failed.float().mean() > config.max_failures:
        first = reasons[0] if reasons else "on another rank"
        raise RuntimeError(f"iteration {iteration}: rewards failed for {int(failed.sum())} of "
                           f"{failed.numel()} videos ({first})")
    return scores, int(failed.sum())


def statistics(scores):
    """For the log, of scores name -> (C, G): each reward's mean (None where all failed: JSON has
    no NaN), the mean over groups of its standard deviation, and how many videos failed."""
    record = {}
    for name, x in scores.items():
        ok = x[x.isfinite()]
        record[f"reward/{name}"] = float(ok.mean()) if len(ok) else None
        record[f"spread/{name}"] = float(group_std({name: x}, {name: 1})[name].mean())
        record[f"failed/{name}"] = x.numel() - len(ok)
    return record


def gradients(policy, base, sampled, A, config):
    """Adds up the gradients of Eq. 7 over window steps and micro-batches -> its statistics.

    A: (C, G) advantages of this rank's conditions; base: the policy that kl refers to, or None.
    Ranks exchange gradients in the last backward pass only; DDP then averages them.
    """
    batches = []
    for k in range(len(sampled.x)):
        batches += [(k, c, m) for c, m in micro_batches(sampled, k, config.micro_batch or None)]
    found = []
    for k, c, m in batches:
        is_last = (k, c, m) == batches[-1]
        alone = not isinstance(policy, DistributedDataParallel)
        with nullcontext() if is_last or alone else policy.no_sync():
            loss, stats = policy_loss(policy, sampled, k, A, conditions=c, members=m,
                                      clip=config.clip, reweight=config.reweight, kl=config.kl,
                                      reference=base)
            loss.backward()
        found.append(stats)
    return summary(found)


def report(run, config):
    """What became of a run: the toy's test rooms, judged; else three lines and its curves."""
    if config.world != "toy" or not config.rooms:
        return finish_run(run.out)
    evaluate_toy(Toy(ckpt=config.out, weights=config.weights, out=str(run.out / "evaluation"),
                     rooms=config.rooms, speeds="1", steps=config.steps, shift=config.shift,
                     log=str(run.out / "log.jsonl")))


def frozen_copy(dit, trained):
    """The policy as it is now, for good: the same network with a copy of what trains swapped in."""
    copy = {name: p.detach().clone() for name, p in trained.items()}
    return lambda *args: torch.func.functional_call(dit, copy, args)


def clip_gradient(parameters, norms, times):
    """Cuts a gradient longer than `times` the median of the last updates' norms -> its norm before.

    norms: of the last 20 updates, to which this one is added. A fixed limit would not do: log-probs
    are means over latent elements, so the usual norm is 1e-2 in the toy and about 4e-5 at 1.3B.
    """
    gradient = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradient)
    limit = times * float(np.median(norms)) if times and len(norms) >= 5 else math.inf
    if norm > limit:
        for g in gradient:
            g.mul_(limit / norm)
    if norm.isfinite():
        norms.append(float(norm))
        del norms[:-20]
    return norm


# ---- settings and the end of the process ----

def read_config(argv, ranks):
    """The settings that argv and its config file make; ValueError where they cannot work."""
    config = parse(Config, argv, str(Path(__file__).parent / "config/toy.py"))
    flags = {arg.partition("=")[0].removeprefix("--") for arg in argv}
    config.check(ranks, given=flags)
    if ":" in config.rewards and "rewards" not in flags:
        raise ValueError("rewards: code of one's own runs only when named by --rewards=: "
                         f"{config.rewards}")
    return config


if __name__ == "__main__":
    run_to_end(main, sys.argv[1:])
