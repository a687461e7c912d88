"""The real run, rehearsed: pretrained/README.md's own lines, on tiny weights, two ranks, and again to resume."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file

from pretrained.weights import DIT

SCRIPT = ROOT / "tests/real_run.sh"


def readme_blocks():
    text = (ROOT / "pretrained/README.md").read_text(encoding="utf-8")
    return re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)


def commands(text):
    """A script's commands, comments and settings of the shell apart."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "set "))]


def test_the_readme_has_the_scripts_commands():
    assert commands(SCRIPT.read_text()) in [commands(block) for block in readme_blocks()]


def test_the_readmes_rehearsal(tmp_path):
    """Word for word, but for the folder `out`."""
    lines = next(block for block in readme_blocks() if "tests/tiny_weights.py" in block)
    lines = lines.replace("$PWD/out/", "out/").replace("out/", f"{tmp_path}/")
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

    def run(script):
        done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    said = run(lines)
    for phrase in ("train:            all there", "clips made", "verdict     fits 2 card(s)",
                   "on-policy ratio 1 + ", "report.html", "side_by_side.mp4", "whole.safetensors: "):
        assert phrase in said, phrase
    out = tmp_path / "rehearsal"
    record = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    for name in ("trans", "rot", "vq", "mq", "hpsv3"):
        assert type(record[f"reward/{name}"]) is float and record[f"spread/{name}"] > 0
    assert set(load_file(out / "whole.safetensors")) > set(load_file(tmp_path / "W" / DIT))

    # The same training command again goes on from there.
    settings = lines.replace("bash tests/real_run.sh", "").replace("python tests/tiny_weights.py", "true")
    train = next(line for line in commands(SCRIPT.read_text()) if " train.py " in line)
    assert "2 of 3 iterations done" in run(settings.replace("--iterations=2", "--iterations=3") + train)
