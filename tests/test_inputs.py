"""Bad input to every command: one line that names what is wrong, and no output. Fuzzing."""
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import tiny_weights
import torch
from conftest import ROOT
from safetensors.torch import save
from scenes import clip, path_of, put

import model
import toy.world
import train
from data import cameras
from data.clips import INDEX, NEGATIVE, TENSORS, load_clip, read_index
from data.video import write_video
from evaluation.scores import PROTOCOL, keep_settings, read_results
from plumbing.settings import parse
from pretrained.weights import REDIRECTOR, read_weights

CASE = {"clip": "a", "path": "pan_right", "speed": 1.0, "TransErr": 0.1, "RotErr": 2.0}
RESULTS = {"protocol": PROTOCOL, "settings": {"estimator": "vipe"},
           "methods": {"base": {"cases": {"a_camera_1_speed_1": CASE}, "notes": {}}}}


def index(clips, width=48):
    settings = dict(frames=9, height=32, width=width, stride=1)
    return {"settings": settings, "clips": clips, "skipped": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of inputs: good ones to start from, and everything that can be wrong with them."""
    w = tmp_path_factory.mktemp("world")
    tiny_weights.write(w / "weights")
    write_video(put(w / "videos", None) / "a.mp4", clip(9), 24)
    write_video(w / "short.mp4", clip(3), 24)
    video = (w / "videos/a.mp4").read_bytes()
    code, none = f"open({str(w / 'ran')!r}, 'w')\n", save({"text": torch.zeros(512, 32)})
    for name, content in {
            "empty": None, "notes/notes.txt": "no video", "made/anything.mp4": video,
            "good/a_camera_1_speed_1.mp4": video, "bad_paths/nan.npz": {"c2w": path_of(9) * np.nan},
            "paths/camera.npz": {"c2w": path_of(9), "intrinsics": [50.0, 60.0, 32.0, 24.0]},
            "binary.py": "lr = 1\0\n", "code.py": code,
            "call.py": "lr = float('1')\n", "good.py": "lr = 1e-4\n",
            "own.py": f"rewards = '{w}/code.py:f=1'\n", "latin.csv": b"file_name,text\na,caf\xe9\n",
            "leaves.py": "import sys\nsys.exit(3)\n",
            "results.json": RESULTS, "bare.json": {"protocol": PROTOCOL},
            "old.json": {"protocol": 0}, "cut.json": '{"protocol": 2, "met',
            "log.jsonl": '{"iteration": 0}\nno json\n{"iteration": 2}\n',
            "foreign.safetensors": save({"a": torch.zeros(2)}),
            "list_index/" + INDEX: "[]", "others/" + INDEX: index(["a"], width=64),
            **{f"{name}/{NEGATIVE}": none for name in ("no_clips", "lost_clip", "cut_clip")},
            "outside/" + INDEX: index(["../secret"]),
            "no_clips/" + INDEX: index([]), "lost_clip/" + INDEX: index(["a.mp4"]),
            "cut_clip/" + INDEX: index(["b"]), "cut_clip/b.safetensors": none[:-10]}.items():
        put(w / name, content)
    for name, good, file in (("no_redirector", w / "weights", REDIRECTOR),
                             ("toy_no_codec", ROOT / "toy/weights", "toy_codec.safetensors")):
        shutil.copytree(good, w / name, copy_function=os.symlink)
        (w / name / file).unlink()
    yield w
    assert not (w / "ran").exists()  # nothing in any of these files was run


TRAIN = "train.py --iterations=1 --rooms=0 --conditions=1 --members=2 "
SMALL = "--frames=9 --height=32 --width=48 --weights={w}/weights "
CLIPS = "train.py --world=clips --trajectories={w}/paths --clips={w}/lost_clip " + SMALL
PREPARE = "-m data.prepare --videos={w}/videos --cameras={w}/paths " + SMALL
MAKE = "evaluate.py --estimator={w}/paths --videos={w}/videos " + SMALL
SCORE = "evaluate.py --frames=9 --estimator={w}/paths --generated={w}/good "
RETAKE = "evaluate.py retake --clip={w}/videos/a.mp4 " + SMALL
COMPARE = "evaluate.py compare {w}/results.json "
BAD = {  # command: (more of it, what its line must say); {w} is the folder above. One row a source
    TRAIN: [
        ("{w}/nowhere.py", "nowhere.py: no such config file; a setting is --name=value"),
        ("{w}/good.py {w}/code.py", "one config file at most"),
        ("{w}/binary.py", "binary.py: expected lines of name = value"),
        ("{w}/code.py", "code.py, line 1: expected name = value"),
        ("{w}/call.py", "call.py, line 1: expected a constant"),
        ("--member=3", "no setting 'member'; did you mean members?"),
        ("--lr", "expected --name=value"), ("--members=True", "expected int"),
        ("--compile=yes", "expected bool"), ("--lr=1e999", "expected float"),
        ("--v=((", "expected tuple"), ("--lr=-1.0", "lr: expected > 0, found -1.0"),
        ("--frames=80", "frames: expected 4k + 1"), ("--conditions=0", "conditions: expected at least 1"),
        ("--first=7", "first: expected at most 6, the steps"),
        ("--height=480", "height: expected 24, the toy's"),
        ("--normalise=std", "normalise: expected max or group"),
        ("--rewards=trans=much", "each name once with a number"),
        ("--world=moon", "world: expected toy, clips or captions, found 'moon'"),
        ("--v=(1,2)", "v and omega: expected (lowest, highest, mean, sd)"),
        ("--v=(0.3,0.1,0.2,0.1)", "speed bounds 0.3, 0.1"),
        ("--members=1", "or nothing can be learnt"), ("--betas=(0.9,1.0)", "betas: expected two"),
        ("--grad_clip=0.5", "grad_clip: expected more than 1"), ("--tau=-0.1", "tau: expected >= 0"),
        ("--strategy=all --window_per_condition", "window_per_condition: expected strategy random"),
        ("--updates=7", "updates: 7 do not divide"), ("--park", "park: the toy has no use for it"),
        ("--keep=3", "max_skips: expected below keep, 3"), ("--size=6", "window size: expected 1"),
        ("--log_to=paper", "log_to: expected tensorboard or wandb"),
        ("--rewards=a\0b=1", "expected text without null characters"),
        ("--out=", "--out=: expected a folder, found nothing"), ("--out=a,b", "without commas"),
        ("--out=a\n", "without blanks around its name"), ("--rooms=9999999999", "at most 4096"),
        ("--weights={w}/toy_no_codec", "toy_codec.safetensors"),
        ("{w}/own.py", "code of one's own runs only when named by --rewards="),
        ("--guidance=2", "guidance: this world has no negative prompt, expected 1"),
        ("--rewards={w}/leaves.py:f=1", "leaves.py: SystemExit: 3")],
    CLIPS: [
        ("--clips=", "--clips=FOLDER is needed"), ("--clips={w}/empty", "empty: no index.json"),
        ("--height=100", "height and width: expected multiples of 16"),
        ("--clips={w}/list_index", "index.json: no index of prepared clips"),
        ("--clips={w}/no_clips", "lists no clip"), ("--clips={w}/others", "width = 64, wanted 48"),
        ("--clips={w}/outside", "expected names below this folder, found '../secret'"),
        ("--trajectories={w}/bad_paths", "no usable camera path of 9 or more frames"),
        ("--trajectories={w}/nowhere", "nowhere: no such folder of camera paths"),
        ("--weights={w}/no_redirector", "step20000.safetensors: no such"),
        ("", "trans and rot need MapAnything: pip install"),
        ("--clips={w}/cut_clip --rewards=exposure=1", "b.safetensors: truncated")],
    PREPARE: [
        ("--videos=", "--videos=FOLDER is needed"), ("--videos={w}/nowhere", "nowhere: no such f"),
        ("--videos={w}/notes", "notes: no videos"), ("--captions={w}/nowhere.csv", "nowhere.csv"),
        ("--captions={w}/latin.csv", "latin.csv: expected UTF-8 csv"),
        ("--cameras={w}/nowhere", "nowhere: expected mapanything, a camera file or a folder"),
        ("--fov=200", "fov: expected degrees between 0 and 180, found 200"),
        ("--frames=10", "expected 4k+1 frames, height and width divisible by 16"),
        ("--stride=0", "stride: expected at least 1")],
    MAKE: [
        ("--weights=", "give --weights=FOLDER"), ("--ckpt={w}/empty", "empty: no checkpoint"),
        ("--out={w}/no_cameras", "base takes the sources' cameras, which the poses in"),
        ("--weights={w}/empty", "no such file, expected the published weights")],
    SCORE: [
        ("--generated={w}/made", "<clip>_camera_<1-10>_speed_<s>.mp4, found anything.mp4"),
        ("--generated={w}/nowhere", "nowhere: no such folder of videos"),
        ("--paths=11", "no evaluation path '11'"), ("--show=b", "show: no case 'b'"),
        ("--speeds=fast", "speeds: could not convert"), ("--speeds=-1", "speeds: expected numbers"),
        ("--estimator={w}/nowhere", "expected vipe, mapanything or a folder"),
        ("--log={w}/log.jsonl", "log.jsonl, line 2: expected a JSON object"),
        ("--speeds=1.5", "none of its 1 videos"), ("--redirector=nowhere", "nowhere/evaluate.py"),
        ("--estimator=vipe --vipe=no/vipe", "not installed: ViPE"),
        ("--log=nowhere.jsonl", "nowhere.jsonl: no such training log"),
        ("--paths=", "paths: expected a comma-separated list"),
        ("--clips=a", "--videos=FOLDER is needed"), ("--ckpt=x", "--weights=FOLDER is needed")],
    RETAKE: [
        ("--camera=loop", "no path 'loop': expected 1-10"), ("--clip=", "expected a clip"),
        ("--clip={w}/short.mp4", "too short, 3 frames"), ("--fov=-60", "fov: expected degrees"),
        ("--height=33", "height and width: expected multiples of 16, found 33 x 48"),
        ("--cameras={w}/nowhere.npz", "nowhere.npz: no such camera file")],
    "evaluate.py toy ": [
        ("--estimator=guess", "estimator: expected judge or estimator, found 'guess'"),
        ("--ckpt={w}/foreign.safetensors", "unexpected a"), ("--speeds=nan", "found nan"),
        ("--rooms=0", "rooms: expected at least 1"), ("--show=room9_camera_1_speed_1", "show: no case")],
    COMPARE: [
        ("", "expected two different results.json, or their folders, or more"),
        ("{w}/nowhere.json", "nowhere.json"), ("{w}/cut.json", "cut.json: damaged"),
        ("{w}/old.json", "old.json: protocol 0, expec"), ("{w}/bare.json", "bare.json: damaged")],
    "evaluate.py curves ": [("", "expected a log.jsonl")],
    "evaluate.py try ": [("", "expected a reward"), ("{w}/none.py:f", "none.py: no such file"),
                         ("brightness", "expected name=weight"), ("exposure --batches=0", "batches")],
    "": [("evaluate.py compre", "no command 'compre'; did you mean compare?")]}
ROWS = [(command + more, message) for command, rows in BAD.items() for more, message in rows]


def call(command, monkeypatch):
    """A command line in this process, by its script's __main__ -> exit code, lines on stderr."""
    def leave(code):
        raise SystemExit(code)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(toy.world, "TRAIN_ROOMS", 4)
    words = command.split(" ")
    is_module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", [word for word in words[is_module:] if word])
    run = runpy.run_module if is_module else runpy.run_path
    err, code = io.StringIO(), 0
    try:
        with redirect_stderr(err), redirect_stdout(io.StringIO()):
            run(words[1] if is_module else str(ROOT / words[0]), run_name="__main__")
    except SystemExit as leaving:
        code, said = (1, leaving.code) if isinstance(leaving.code, str) else (leaving.code, "")
        print(said, file=err)
    return code, [line for line in err.getvalue().replace("\r", "\n").split("\n") if line.strip()]


@pytest.mark.filterwarnings("ignore:.data.prepare. found in sys.modules")
@pytest.mark.parametrize("command, message", ROWS, ids=[f"{i}" for i in range(len(ROWS))])
def test_bad_input_is_one_line(world, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(ROOT)
    no_out = any(word in command for word in (" compare", " try ", " --out="))
    out = "" if no_out else f" --out={tmp_path / 'out'}"
    code, lines = call(command.format(w=world) + out, monkeypatch)
    assert code == 1 and len(lines) == 1 and message in lines[0], lines
    assert len(lines[0]) < 1000 and not (tmp_path / "out").exists()


# ---- mutated files: nothing but our own error, or a value ----

TOKENS = [b"NaN", b"-1", b"0", b"1e999", b"null", b"[[[[", b"}", b'"', b"\\u0000", b"\xff", b"9" * 400,
          b"true", b"[" * 3000, b"(" * 300, b"0x"]


def mutations(content, count):
    """`count` copies of bytes with another byte, a piece left out, or a token, perhaps for a number."""
    g = random.Random(0)
    numbers = [m.span() for m in re.finditer(rb"\d+", content)]
    for _ in range(count):
        at = g.randrange(len(content))
        changes = [(at, at + 1, bytes([g.randrange(256)])), (at, at + g.randrange(20), b""),
                   (at, len(content), b""), (at, at, g.choice(TOKENS)),
                   (*g.choice(numbers), g.choice(TOKENS))]
        start, end, new = g.choice(changes)
        yield content[:start] + new + content[end:]


def read_config(path):
    config = parse(train.Config, [str(path)])
    try:
        config.check(1)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None  # it names the setting, not the file


FACTS = {"name": "a", "video": "a.mp4", "caption": "c", "fps": 24.0, "text_length": 5}
CLIP = save({key: torch.zeros(2, 3) for key in TENSORS}, {"clip": json.dumps(FACTS)})
SMALL = save({"model.weight": torch.zeros(2, 3), "b": torch.zeros(4)})
POSES = [np.eye(4).tolist()] * 2
MATRIX = "[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] "
FUZZED = [  # file, content, how it is read
    ("config.py", (ROOT / "config/toy.py").read_bytes(), read_config),
    ("split_0.json", {"quats": [[1, 0, 0, 0], [0.8, 0.6, 0, 0]], "trans": [[0, 0, 0], [0, 0.5, 1]]},
     cameras.read_path),
    ("recon/split_0/info.json", {"extrinsics": POSES}, cameras.read_path),
    ("extrinsics.json", {f"frame{i}": {"cam01": MATRIX} for i in range(3)}, cameras.read_path),
    (INDEX, {"settings": {"frames": 9}, "clips": ["a"], "skipped": {"b": "why"}},
     lambda path: read_index(path.parent)),
    ("results.json", RESULTS, read_results),
    ("settings.json", {"protocol": PROTOCOL, "frames": 9, "name": "x"},
     lambda path: keep_settings(path.parent, {"frames": 9, "name": "x"})),
    ("b.safetensors", SMALL, read_weights), ("c.safetensors", SMALL, model.load_dit),
    ("d.safetensors", CLIP, load_clip)]


@pytest.mark.parametrize("name, content, read", FUZZED, ids=[name for name, *_ in FUZZED])
def test_mutated_files_are_refused_in_one_line_or_read(tmp_path, name, content, read):
    begun, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    path = put(tmp_path / name, content)
    for x in mutations(path.read_bytes(), 200):
        path.write_bytes(x)
        try:
            with warnings.catch_warnings(action="ignore"):  # python's, about odd but valid literals
                read(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            refused += 1
    assert refused > 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 500_000  # kB
