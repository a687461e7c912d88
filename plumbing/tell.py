"""What a run says while it goes on: numbers for the log, progress, warnings, and why it must stop."""
import math
import shutil
import sys

import torch
from tqdm import tqdm

from plumbing.ranks import largest, mean, rank_of


def describe(config, dit, ranks, device, run):
    """Prints a run's size at its start."""
    if not run.writes:
        return
    trained = sum(p.numel() for p in run.trained.values())
    every = sum(p.numel() for p in dit.parameters())
    print(f"{config.conditions} conditions x {config.members} members = "
          f"{config.conditions * config.members} videos an iteration on {ranks} rank(s), {device.type}; "
          f"{trained:,} of {every:,} parameters train; "
          f"{run.done} of {config.iterations} iterations done in {run.out}")


def warn_of_failures(failures, count, warned):
    """Names each failing reward that is not in `warned`, with its first reason -> what can be said of each."""
    reasons = []
    for name, failed in failures.items():
        if not failed:
            continue
        first = next(iter(failed.values()))
        what = f"{len(failed)} of {count} videos, {first}"
        reasons.append(f"{name}: {what}")
        if name not in warned:
            tqdm.write(f"warning: reward {name} failed for {what}", sys.stderr)
            warned.add(name)
    return reasons


def on_all_ranks(stats):
    """The objective's statistics as means over ranks: loss, clip_fraction and, if there is one, kl."""
    names = [name for name in ("loss", "clip_fraction", "kl") if name in stats]
    means = mean(torch.stack([stats[name] for name in names])).tolist()
    return dict(zip(names, means))


def sizes(parameters, optimizer, norm):
    """For the log: the gradient's norm and RMS before clipping, the RMS of the last step relative to
    lr (1 is AdamW's first; far below 1, eps swallows it). None where they are no numbers."""
    count = sum(p.numel() for p in parameters)
    total = 0
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state:
                step = float(state["step"])
                first = state["exp_avg"] / (1 - beta1 ** step)
                second = state["exp_avg_sq"] / (1 - beta2 ** step)
                total = total + (first / (second.sqrt() + group["eps"])).square().sum()
    found = {"grad_norm": float(norm), "grad_rms": float(norm) / count ** 0.5,
             "update_rms": (float(total) / count) ** 0.5}
    return {name: x if math.isfinite(x) else None for name, x in found.items()}


def warn_of_eps(record, eps, warned):
    """AdamW divides by the gradient's size plus eps: an eps of that size swallows the step. Said once."""
    rms = record["grad_rms"]
    if rms is not None and rms < 10 * eps and "eps" not in warned:
        tqdm.write(f"warning: eps: the gradient's RMS is {rms:.1e}, below 10 times eps ({eps:.0e}), so that "
                   "updates are too small; lower --eps", sys.stderr)
        warned.add("eps")


def check_on_policy(stats, clip, is_first):
    """All ranks' largest |r - 1| of an iteration's first update, from its statistics: weights have not
    changed yet, so r = 1. RuntimeError where a run's first (is_first) does not repeat the rollout's numerics."""
    error = float(largest(stats["ratio_error"]))
    if not is_first:
        return error
    if not math.isfinite(error):
        raise RuntimeError("on-policy ratio: not a number, so conditions or weights hold one")
    if error > clip:
        raise RuntimeError(f"on-policy ratio is off by {error:.1e}, more than the clip range "
                           f"{clip:.1e}: rollout and update run different numerics")
    if rank_of()[0] == 0:
        print(f"on-policy ratio 1 + {error:.0e}, as it should be")
    return error


def check_divergence(skipped, max_skips, norm, iteration):
    """Updates whose gradients are no numbers are skipped; RuntimeError at max_skips in a row."""
    if skipped >= max_skips:
        raise RuntimeError(f"iteration {iteration}: gradient norm {float(norm)}, "
                           f"{skipped} updates skipped in a row")


def progress(start, total, is_first_rank):
    """A bar over iterations; none on other ranks and where there is no terminal."""
    return tqdm(range(start, total), initial=start, total=total, unit="it",
                disable=not is_first_rank or not sys.stderr.isatty(),
                bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} {elapsed}<{remaining} {postfix}")


def tell(bar, records, eps, warned):
    """The bar's words: running means of rewards over ten iterations, in brackets their change since the first
    ten; then seconds by phase as far as the line has room. Without a terminal, a plain line every tenth
    iteration. records: the log's lines so far; eps, warned: see warn_of_eps."""
    warn_of_eps(records[-1], eps, warned)
    width = shutil.get_terminal_size((80, 24)).columns
    done = records[-1]["iteration"] + 1
    words = []
    for name in records[-1]:
        if name.startswith("reward/"):
            values = [r[name] for r in records if r.get(name) is not None]
            if values:
                now = sum(values[-10:]) / len(values[-10:])
                first = sum(values[:10]) / len(values[:10])
                words.append(f"{name.removeprefix('reward/')} {now:.3f} ({now - first:+.3f})")
    seconds = {name.removeprefix("seconds/"): x for name, x in records[-1].items()
               if name.startswith("seconds/")}
    words += [f"{phase} {x:.1f}s" for phase, x in seconds.items()]
    if not bar.disable:
        line = ""
        for word in words:
            if len(line) + len(word) + 36 < width:  # 36: percentage, counts and times
                line += word + " "
        bar.set_postfix_str(line.strip())
    elif rank_of()[0] == 0 and (done % 10 == 0 or done == bar.total):
        rewards = " ".join(word for word in words if "(" in word)
        print(f"iteration {done} of {bar.total}: {rewards}; {sum(seconds.values()):.1f} s an iteration",
              flush=True)


def mirror_to(name, out):
    """A function that sends a record of log.jsonl to tensorboard or wandb too; "": nowhere."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out)
        return lambda record: [writer.add_scalar(key, x, record["iteration"])
                               for key, x in record.items() if isinstance(x, (int, float))]
    if name == "wandb":
        import wandb
        run = wandb.init(project="geo-align", dir=out)
        return lambda record: run.log(record, step=record["iteration"])
    return lambda record: None
