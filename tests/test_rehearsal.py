"""The real run, rehearsed: pretrained/README.md's own lines, on tiny weights, and again to resume."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file
from scenes import on_two_ranks

import train
from pretrained.weights import DIT

SCRIPT = (ROOT / "tests/real_run.sh").read_text()
README = (ROOT / "pretrained/README.md").read_text(encoding="utf-8")


def commands(text):
    """A script's commands, comments and settings of the shell apart."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "set "))]


def test_the_readmes_rehearsal(tmp_path, monkeypatch):
    """The README has the script's commands, and its rehearsal of them runs word for word, but for the
    folder `out`, on two ranks; the training command goes on from there."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.S)
    assert commands(SCRIPT) in [commands(block) for block in blocks]
    lines = next(block for block in blocks if "tests/tiny_weights.py" in block)
    lines = lines.replace("$PWD/out/", "out/").replace("out/", f"{tmp_path}/")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    train_line = next(line for line in commands(SCRIPT) if " train.py " in line)
    done = subprocess.run(["bash", "-euc", f'{lines}\necho "{train_line}"'], cwd=ROOT,
                          env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for phrase in ("train:            all there", "clips made", "verdict     fits 2 card(s)",
                   "on-policy ratio 1 + ", "report.html", "side_by_side.mp4", "whole.safetensors: "):
        assert phrase in done.stdout, phrase
    record = json.loads((tmp_path / "rehearsal/log.jsonl").read_text().splitlines()[0])
    for name in ("trans", "rot", "vq", "mq", "hpsv3"):
        assert type(record[f"reward/{name}"]) is float and record[f"spread/{name}"] > 0
    whole = load_file(tmp_path / "rehearsal/whole.safetensors")
    assert set(whole) > set(load_file(tmp_path / "W" / DIT))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path / "W/packages")
    _, _, flags = done.stdout.splitlines()[-1].partition(" train.py ")
    go_on = [*shlex.split(flags), "--iterations=2"]
    assert "1 of 2 iterations done" in on_two_ranks(lambda: train.main(go_on), tmp_path / "said")
