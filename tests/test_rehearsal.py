"""The real run, rehearsed: pretrained/README.md's own lines, on tiny weights, and again to resume."""
import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file
from scenes import as_ranks, put
from tiny_weights import DIT

SCRIPT = (ROOT / "tests/real_run.sh").read_text()
README = (ROOT / "pretrained/README.md").read_text(encoding="utf-8")
STUB = """#!/bin/sh
printf '%s\\n' "PATH=$PATH" "PYTHONPATH=$PYTHONPATH" "${0##*/}" "$@" "" >> RECORD
"""


def commands(text):
    """A script's commands, comments and settings of the shell apart."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "set "))]


def words_of(script, folder):
    """What bash makes of a script: (PATH, PYTHONPATH, "python" or "torchrun", words) of each command."""
    for name in ("python", "torchrun"):
        put(folder / "stubs" / name, STUB.replace("RECORD", str(folder / "record"))).chmod(0o755)
    stubbed = os.environ | {"PATH": f"{folder / 'stubs'}:{os.environ['PATH']}", "PYTHONPATH": ""}
    subprocess.run(["bash", "-euc", script], cwd=ROOT, check=True, env=stubbed)
    for block in (folder / "record").read_text().split("\n\n")[:-1]:
        path, packages, program, *words = block.split("\n")
        path = path.removeprefix("PATH=").replace(str(folder / "stubs"), str(Path(sys.executable).parent))
        yield path, packages.removeprefix("PYTHONPATH="), program, words


def run(*words):
    """python WORDS, in this process."""
    is_module = words[0] == "-m"
    sys.argv = list(words[is_module:])
    (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")


def test_the_readmes_rehearsal(tmp_path, monkeypatch):
    """The README has the script's commands, and its rehearsal of them runs word for word, but for the
    folder `out`, on two ranks, in processes that have imported what is slow; training under torchrun
    itself. Then it goes on."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.S)
    assert commands(SCRIPT) in [commands(block) for block in blocks]
    lines = next(block for block in blocks if "tests/tiny_weights.py" in block)
    lines = lines.replace("$PWD/out/", "out/").replace("out/", f"{tmp_path}/")
    monkeypatch.chdir(ROOT)
    for path, packages, program, words in words_of(lines, tmp_path):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("PYTHONPATH", packages)
        if packages:
            monkeypatch.syspath_prepend(packages)
        ranks = 1
        if program == "torchrun":
            ranks = int(words.pop(0).removeprefix("--nproc-per-node="))
        if "train.py" in words:
            command = ["torchrun", f"--nproc-per-node={ranks}", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0 and "on-policy ratio 1 + " in done.stdout, done.stdout + done.stderr
            words = [*words, "--iterations=2"]
        said = as_ranks(partial(run, *words), tmp_path / "said", ranks)
    for phrase in ("train:            all there", "clips made", "verdict     fits 2 card(s)",
                   "1 of 2 iterations done", "report.html", "side_by_side.mp4", "whole.safetensors: "):
        assert phrase in said, phrase
    record = json.loads((tmp_path / "rehearsal/log.jsonl").read_text().splitlines()[0])
    for name in ("trans", "rot", "vq", "mq", "hpsv3"):
        assert type(record[f"reward/{name}"]) is float and record[f"spread/{name}"] > 0
    whole = load_file(tmp_path / "rehearsal/whole.safetensors")
    assert set(whole) > set(load_file(tmp_path / "W" / DIT))
