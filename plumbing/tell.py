"""What a run says while it goes on: the log's numbers, the progress bar, warnings. Rank 0 only."""
import shutil
import sys

import torch
from tqdm import tqdm

from plumbing.ranks import mean


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


def warn_of_eps(record, eps, warned):
    """AdamW divides by the gradient's size plus eps: an eps of that size swallows the step. Said once."""
    rms = record["grad_rms"]
    if rms is not None and rms < 10 * eps and "eps" not in warned:
        tqdm.write(f"warning: eps: the gradient's RMS is {rms:.1e}, below 10 times eps ({eps:.0e}), so that "
                   "updates are too small; lower --eps", sys.stderr)
        warned.add("eps")


def progress(start, total, is_first_rank):
    """A bar over iterations; none on other ranks and where there is no terminal."""
    return tqdm(range(start, total), initial=start, total=total, unit="it",
                disable=not is_first_rank or not sys.stderr.isatty(),
                bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} {elapsed}<{remaining} {postfix}")


def tell(bar, records, total, iteration_seconds):
    """The bar's words: running means of rewards over ten iterations, in brackets their change since the first
    ten; then seconds by phase as far as the line has room. Without a terminal, a plain line every tenth
    iteration. records: the log's lines so far."""
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
    words += [f"{name.removeprefix('seconds/')} {x:.1f}s" for name, x in records[-1].items()
              if name.startswith("seconds/")]
    if not bar.disable:
        line = ""
        for word in words:
            if len(line) + len(word) + 36 < width:  # 36: percentage, counts and times
                line += word + " "
        bar.set_postfix_str(line.strip())
    elif done % 10 == 0 or done == total:
        rewards = " ".join(word for word in words if "(" in word)
        print(f"iteration {done} of {total}: {rewards}; {iteration_seconds:.1f} s an iteration", flush=True)
