"""Does it learn? Runs of the toy, a table each; the figures are in learning.md here.

    python -m benchmarks.learning recipe     at 25 steps: the paper's loop, geo_align.py's, the fast recipe
    python -m benchmarks.learning kl         what staying near the base buys and costs
    python -m benchmarks.learning updates    one, two and four updates of one rollout

Each arm trains once a seed and is judged in rooms never trained on. The same command again goes on
where it stopped; --iterations, --conditions and so on make runs larger.
"""
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.plan import cost, mean_evaluations
from evaluation.toy import Toy, evaluate_toy
from plumbing.files import read_json
from plumbing.settings import Folder, at_least_1, parse, run_command
from train import Config

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Recipe:
    """python -m benchmarks.learning recipe"""
    out: Folder = "out/learning/recipe"  # folder for runs and evaluation; goes on there
    seeds: int = 3                       # runs of each arm
    iterations: int = 20                 # of each run
    conditions: int = 8                  # per iteration
    members: int = 8                     # videos per condition
    steps: int = 25                      # denoising steps
    lr: float = 4e-4                     # twice the toy's, for a quarter of its videos
    validate: int = 16                   # fixed conditions, sampled and scored every ten iterations
    rooms: int = 3                       # judged at the end, ten paths each; 0: no judge


@dataclass
class Kl(Recipe):
    """python -m benchmarks.learning kl"""
    out: Folder = "out/learning/kl"      # folder for runs and evaluation; goes on there
    seeds: int = 1                       # runs of each arm
    iterations: int = 30                 # of each run
    steps: int = 6                       # denoising steps (the toy's)
    validate: int = 32                   # fixed conditions, sampled and scored every ten iterations


@dataclass
class Updates(Kl):
    """python -m benchmarks.learning updates"""
    out: Folder = "out/learning/updates"  # folder for runs and evaluation; goes on there


# The paper's loop computes every member alone; its samples and gradients are those of geo_align to
# rounding.
PAPER = ("--strategy=progressive", "--size=4", "--first=0", "--iters_per_window=25", "--tail=0")
FAST = ("--strategy=random", "--window_per_condition=True")
ONE = (*FAST, "--size=1", "--tail=0.4")
ARMS = {
    Recipe: {"paper": (*PAPER, "--share_prefix=False"),
             "geo_align": PAPER,
             "fast": (*FAST, "--size=2", "--tail=0.25", "--first=6"),
             "shorter": (*FAST, "--size=2", "--tail=0.2", "--first=6"),
             "one_step": (*ONE, "--first=6"),
             "no_tail": (*ONE, "--tail=0", "--first=6"),
             "earlier": (*ONE, "--first=4"),
             "later": (*ONE, "--skip=5", "--first=10")},
    Kl: {f"kl{kl:g}": (f"--kl={kl}",) for kl in (0.0, 0.001, 0.01, 0.1)},
    Updates: {f"updates{n}": (f"--updates={n}",) for n in (1, 2, 4)}}


def settings_of(config, arm, seed):
    """One run's command line."""
    same = [f"--{name}={getattr(config, name)}"
            for name in ("iterations", "conditions", "members", "steps", "lr", "validate")]
    return [*ARMS[type(config)][arm], *same, f"--seed={seed}", "--rooms=0", "--sample_every=10",
            "--save_every=10", f"--out={Path(config.out) / f'{arm}_{seed}'}"]


def rows_of(flags):
    """Network rows of an iteration, a backward counting 2: as run, and with every member alone."""
    run = parse(Config, flags, str(ROOT / "config/toy.py"))
    return [run.conditions * cost(mean_evaluations(run, share, run.tail or None), checkpointing=False)
            for share in (run.share_prefix, False)]


def train(config, arm, seed):
    """Run train.py to its end, or go on -> its log's validations, (iteration, rewards)."""
    flags = settings_of(config, arm, seed)
    out = Path(config.out) / f"{arm}_{seed}"
    if not (out / f"iteration_{config.iterations:06d}").exists():
        if subprocess.run([sys.executable, str(ROOT / "train.py"), *flags]).returncode:
            raise ValueError(f"{out}: train.py failed; the same command goes on")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "valid/trans" in line]


def learning(config):
    """Train every arm, judge all beside the base, print the two tables."""
    at_least_1(config, "seeds", "iterations")
    arms = ARMS[type(config)]
    logs = {(arm, seed): train(config, arm, seed) for seed in range(config.seeds) for arm in arms}
    print("\nvalidation, minus metres and radians, first to last; rows of the network an iteration")
    for (arm, seed), log in logs.items():
        rows, alone = rows_of(settings_of(config, arm, seed))
        curve = "  ".join(f"{line['iteration']}: {line['valid/trans']:.4f} {line['valid/rot']:.4f}"
                          for line in log)
        print(f"{arm:<12} seed {seed}  {rows:,.0f} rows ({alone:,.0f} alone)  {curve}")
    if not config.rooms:
        return
    out = Path(config.out) / "evaluation"
    runs = ",".join(f"{config.out}/{arm}_{seed}" for arm, seed in logs)
    evaluate_toy(Toy(ckpt=runs, out=str(out), rooms=config.rooms, speeds="1", steps=config.steps))
    print(f"\nby the judge, {config.rooms} rooms, ten paths each")
    for name, method in read_json(out / "results.json")["methods"].items():
        cases = list(method["cases"].values())
        position, rotation, image = (np.mean([case[key] for case in cases])
                                     for key in ("position", "rotation", "PSNR"))
        print(f"{name:<22} position {position:.4f} m, rotation {rotation:.3f} deg, PSNR {image:.2f} dB")


if __name__ == "__main__":
    run_command("benchmarks.learning", __doc__, {
        "recipe": (Recipe, learning, None), "kl": (Kl, learning, None),
        "updates": (Updates, learning, None)}, sys.argv[1:])
