"""The paper's Table 3 in the toy world: `python evaluate.py ablation` trains two runs, and judges
them.

One has the full reward of a config file, one what is left of it without the geometry (`trans`,
`rot`). The same command again goes on where it stopped.
"""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from evaluation.report import ablation_table, markdown
from evaluation.toy import Toy, evaluate_toy
from plumbing.checkpoint import find_checkpoint
from plumbing.files import read_json
from plumbing.settings import at_least_1
from rewards import POSES

ROOT = Path(__file__).parent.parent


@dataclass
class Ablation:
    """python evaluate.py ablation: no RL, video quality reward alone and full reward, in the toy
    world."""
    config: str = "config/toy.py"  # settings of both runs, with the full reward
    out: str = "out/ablation"   # folder for both runs and the evaluation
    iterations: int = 0         # of each run; 0: the config's
    seed: int = 0               # of both runs
    rooms: int = 8              # held-out rooms to judge in, ten paths each


def without_geometry(spec):
    """"trans=1,rot=1,sharpness=0.01" -> "sharpness=0.01"; ValueError where nothing, or all, is
    geometry."""
    items = [item.strip() for item in spec.split(",")]
    left = [item for item in items if item.partition("=")[0] not in POSES]
    if not 0 < len(left) < len(items):
        raise ValueError(f"rewards: expected some of {', '.join(POSES)} and some of quality, "
                         f"found {spec}")
    return ",".join(left)


def train(config, out, *more):
    """Run train.py to its end -> the settings it ran with. ValueError where it fails."""
    command = [sys.executable, str(ROOT / "train.py"), config.config, f"--out={out}",
               f"--seed={config.seed}", "--rooms=0", *more]
    if config.iterations:
        command.append(f"--iterations={config.iterations}")
    code = subprocess.run(command).returncode
    if code:
        raise ValueError(f"{out}: train.py ended with exit code {code}; the same command goes on")
    return read_json(find_checkpoint(out).with_name("state.json"))["config"]


def ablation(config):
    """Train both, judge both beside the base, print the tables."""
    at_least_1(config, "rooms")
    out = Path(config.out)
    settings = train(config, out / "full_reward")
    quality = without_geometry(settings["rewards"])
    train(config, out / "video_quality_reward", f"--rewards={quality}")
    runs = f"{out / 'video_quality_reward'},{out / 'full_reward'}"
    evaluate_toy(Toy(ckpt=runs, weights=settings["weights"], rooms=config.rooms,
                     out=str(out / "evaluation"), speeds="1", steps=settings["steps"],
                     shift=settings["shift"]))
    methods = read_json(out / "evaluation/results.json")["methods"]
    print(markdown([ablation_table(methods)]))
