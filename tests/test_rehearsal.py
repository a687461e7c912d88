"""The real run, rehearsed: pretrained/README.md's commands, unchanged, on tiny weights, two ranks, and again to resume."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_weights
from conftest import ROOT
from safetensors.torch import load_file

from pretrained.weights import DIT

SCRIPT = ROOT / "tests/real_run.sh"
SMALL = {"SIZE": "--frames=9 --height=64 --width=112", "CARDS": "2", "CONFIG": "config/eight_cards_80gb.py",
         "FEW": "--conditions=2 --members=2 --steps=7 --iterations=1 --validate=2 --compile=False --park=False"}


def commands(text):
    """A script's commands, comments and settings of the shell apart."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "set "))]


def test_the_readme_has_the_scripts_commands():
    readme = (ROOT / "pretrained/README.md").read_text(encoding="utf-8")
    blocks = [commands(block) for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", readme, re.S)]
    assert commands(SCRIPT.read_text()) in blocks


def test_the_real_run_on_tiny_weights(tmp_path):
    w = tiny_weights.write(tmp_path / "W")
    out = tmp_path / "out"
    python = Path(sys.executable).parent
    env = os.environ | SMALL | {
        "PATH": os.pathsep.join([str(w / "bin"), str(python), os.environ["PATH"]]),
        "PYTHONPATH": str(w / "packages"), "OUT": str(out), "WEIGHTS": str(w), "CACHE": str(tmp_path / "C"),
        "VIDEOS": str(w / "videos"), "CAPTIONS": str(w / "videos/captions.csv"), "PATHS": str(w / "paths"),
        "DAVIS": str(w / "videos"), "CLIP": str(w / "videos/clip0.mp4"),
        "SHORT": f"--captions={w}/videos/captions.csv --clips=clip0 --paths=1,9 --steps=2"}
    done = subprocess.run(["bash", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for phrase in ("train:            all there", "clips made", "verdict     fits 2 card(s)", "on-policy ratio 1 + ",
                   "report.html", "side_by_side.mp4", "whole.safetensors: "):
        assert phrase in done.stdout, phrase
    record = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    for name in ("trans", "rot", "vq", "mq", "hpsv3"):
        assert type(record[f"reward/{name}"]) is float and record[f"spread/{name}"] > 0
    assert set(load_file(out / "whole.safetensors")) > set(load_file(w / DIT))

    # The same training command again goes on from there.
    train = next(line for line in commands(SCRIPT.read_text()) if " train.py " in line)
    env["FEW"] = SMALL["FEW"].replace("--iterations=1", "--iterations=2")
    done = subprocess.run(["bash", "-c", train], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 2 iterations done" in done.stdout, done.stderr[-4000:]
