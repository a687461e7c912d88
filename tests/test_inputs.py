"""Bad input to every entry point: one line that names what is wrong, no traceback, no output. Fuzzing."""
import io
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from scenes import clip, path_of
from safetensors.torch import load_file, save, save_file

from data import cameras
from plumbing import checkpoint
import model
import tiny_weights
import toy.world
import train
from data.clips import ClipCache, INDEX, NEGATIVE, TENSORS, load_clip, read_index
from data.video import find_videos, write_video
from evaluation.cases import find_clips
from evaluation import scores
from evaluation.scores import keep_settings, read_results
from plumbing.files import digest
from plumbing.settings import parse
from pretrained.weights import TEXT_FILE, VAE_FILE, open_tensors, read_weights


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of inputs: good ones to start from, and everything that can be wrong with them."""
    w = tmp_path_factory.mktemp("world")
    tiny_weights.write(w / "weights")
    (w / "videos").mkdir()
    write_video(w / "videos/a.mp4", clip(9), 24)
    content = (w / "videos/a.mp4").read_bytes()
    write_video(w / "short.mp4", clip(3), 24)
    (w / "cut.mp4").write_bytes(content[:len(content) // 2])
    (w / "zero.mp4").write_bytes(b"")
    (w / "text.mp4").write_text("no video\n" * 99)
    audio_only(w / "sound.mp4")
    (w / "empty").mkdir()
    (w / "notes").mkdir()
    (w / "notes/notes.txt").write_text("no video")
    (w / "made").mkdir()
    shutil.copy(w / "videos/a.mp4", w / "made/anything.mp4")
    (w / "good").mkdir()
    shutil.copy(w / "videos/a.mp4", w / "good/a_camera_1_speed_1.mp4")
    np.savez(w / "camera.npz", c2w=path_of(9, 1), intrinsics=[50.0, 60.0, 32.0, 24.0])
    np.savez(w / "nan.npz", c2w=path_of(9, 1) * np.nan)
    np.savez(w / "bare.npz", c2w=path_of(9, 1))
    np.savez(w / "few.npz", c2w=path_of(2, 1), intrinsics=[50.0, 60.0, 32.0, 24.0])
    np.save(w / "flat.npy", np.zeros((9, 16)))
    np.save(w / "object.npy", np.array([Evil(w)], object), allow_pickle=True)
    (w / "camera.json").write_text('{"quats": [[1, 0, 0, 0]], "tra')
    (w / "list.json").write_text("[1, 2]")
    for name in ("paths", "bad_paths"):
        (w / name).mkdir()
    shutil.copy(w / "camera.npz", w / "paths")
    shutil.copy(w / "nan.npz", w / "bad_paths")
    for name, text in {
            "broken.py": "lr = = 3\n", "code.py": f"open({str(w / 'ran')!r}, 'w')\n",
            "call.py": "lr = float('1')\n",
            "binary.py": "lr = 1\0\n", "key.py": "learning = 1\n", "type.py": "lr = 'fast'\n",
            "good.py": "lr = 1e-4\n",
            "reward.py": "def f(videos, scene):\n    return videos.float().mean((1, 2, 3, 4))\n"
                         "def one(videos):\n    return 0\nnumber = 3\n",
            "leaves_exit.py": "import sys\nsys.exit(3)\n", "leaves_interrupt.py": "raise KeyboardInterrupt\n",
            "leaves_quiet.py": "class Quiet(BaseException):\n    def __str__(self):\n        1 / 0\nraise Quiet\n",
            "own.py": f"rewards = '{w}/evil.py:f=1'\n", "evil.py": f"open({str(w / 'ran')!r}, 'w')\n",
            "syntax.py": "def f(:\n", "raises.py": "import no_such_package\n", "words.csv": "a,b\n1,2\n",
            "none.csv": "file_name,text\n", "two.csv": "file_name,text\na.mp4,x\na.mp4,y\n",
            "bare.json": json.dumps({"protocol": scores.PROTOCOL}), "results.json": json.dumps(RESULTS),
            "old.json": '{"protocol": 0}', "cut.json": '{"protocol": 2, "met',
            "log.jsonl": '{"iteration": 0}\nno json\n{"iteration": 2}\n', "clips.txt": "a\nb\n"}.items():
        (w / name).write_text(text)
    (w / "latin.csv").write_bytes("file_name,text\na.mp4,caf\xe9\n".encode("latin-1"))
    base = (w / "weights" / tiny_weights.DIT).read_bytes()
    for name, file, content in (
            ("cut_dit", tiny_weights.DIT, base[:-100]), ("zero_dit", tiny_weights.DIT, b""),
            ("other_dit", tiny_weights.DIT, save({"conv.weight": torch.zeros(3)})),
            ("evil_vae", VAE_FILE, pickle.dumps({"conv1.weight": Evil(w)}, protocol=2)),
            ("cut_vae", VAE_FILE, (w / "weights" / VAE_FILE).read_bytes()[:5000]),
            ("other_vae", VAE_FILE, None),
            ("cut_text", TEXT_FILE, (w / "weights" / TEXT_FILE).read_bytes()[:5000]),
            ("no_redirector", tiny_weights.REDIRECTOR, None)):
        (w / name).mkdir()
        for part in (w / "weights").iterdir():
            (w / name / part.name).symlink_to(part)
        (w / name / file).unlink()
        if content is not None:
            (w / name / file).write_bytes(content)
    torch.save({"a": 1}, w / "other_vae" / VAE_FILE)
    shipped = ROOT / "toy/weights"
    for name, file, content in (
            ("toy_cut_base", "toy_base.safetensors", (shipped / "toy_base.safetensors").read_bytes()[:-100]),
            ("toy_no_codec", "toy_codec.safetensors", None)):
        (w / name).mkdir()
        for part in shipped.glob("*.safetensors"):
            (w / name / part.name).symlink_to(part)
        (w / name / file).unlink()
        if content is not None:
            (w / name / file).write_bytes(content)
    (w / "foreign.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    (w / "cut.safetensors").write_bytes(save({"a": torch.zeros(2)})[:-3])
    settings = dict(frames=9, height=32, width=48, stride=1)
    for name, index in (("no_index", None), ("broken_index", "{"), ("list_index", "[]"),
                        ("number_index", '"x"'),
                        ("no_clips", {"settings": settings, "clips": [], "skipped": {}}),
                        ("others", {"settings": settings | {"width": 64}, "clips": ["a"], "skipped": {}}),
                        ("lost_clip", {"settings": settings, "clips": ["a.mp4"], "skipped": {}}),
                        ("cut_clip", {"settings": settings, "clips": ["b.mp4"], "skipped": {}})):
        (w / name).mkdir()
        if index is not None:
            (w / name / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
        save_file({"text": torch.zeros(512, 32)}, w / name / NEGATIVE)
    (w / "cut_clip/b.mp4.safetensors").write_bytes(base[:500])
    other = w / "other_run/iteration_000002"  # a checkpoint with another learning rate
    other.mkdir(parents=True)
    files = {f"{name}.safetensors": save({"a": torch.zeros(2)}) for name in ("self_attn", "optimizer")}
    for name, content in files.items():
        (other / name).write_bytes(content)
    config = vars(train.Config()) | {"lr": 0.5}
    (other / "state.json").write_text(json.dumps({"iteration": 2, "config": config, "digests": {
        name: digest(content) for name, content in files.items()}}))
    yield w
    assert not (w / "ran").exists()  # nothing in any of these files was run


RESULTS = {"protocol": scores.PROTOCOL, "settings": {"estimator": "vipe"}, "methods": {"base": {"cases": {
    "a_camera_1_speed_1": {"clip": "a", "path": "pan_right", "speed": 1.0, "TransErr": 0.1, "RotErr": 2.0}},
    "notes": {}}}}


class Evil:
    """Unpickled, it would leave a file."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return open, (str(self.folder / "ran"), "w")


TRAIN = "train.py --iterations=1 --rooms=0 --conditions=1 --members=2"
CLIPS = "train.py --iterations=1 --world=clips --frames=9 --height=32 --width=48 --weights={w}/weights"
MORE = " --clips={w}/lost_clip --trajectories={w}/paths"
PROTOCOL = "evaluate.py --frames=9 --height=32 --width=48 --estimator={w}/paths"
RETAKE = "evaluate.py retake --height=32 --width=48 --frames=9"
GOOD = " --clip={w}/videos/a.mp4 --weights={w}/weights"
PREPARE = "-m data.prepare --frames=9 --height=32 --width=48"
SOURCES = " --videos={w}/videos --weights={w}/weights --cameras={w}/paths"

BAD = [  # command, with {w} the folder above; what its line must say
    (TRAIN + " {w}/nowhere.py", "nowhere.py: no such config file; a setting is --name=value"),
    (TRAIN + " {w}/empty", "empty"),
    (TRAIN + " {w}/broken.py", "broken.py: expected lines of name = value"),
    (TRAIN + " {w}/binary.py", "binary.py: expected lines of name = value"),
    (TRAIN + " {w}/camera.npz", "camera.npz: expected lines of name = value"),
    (TRAIN + " {w}/code.py", "code.py, line 1: expected name = value"),
    (TRAIN + " {w}/call.py", "call.py, line 1: expected a constant"),
    (TRAIN + " {w}/key.py", "key.py, line 1: no setting 'learning'"),
    (TRAIN + " {w}/type.py", "type.py, line 1: expected float, found 'fast'"),
    (TRAIN + " {w}/good.py {w}/key.py", "one config file at most"),
    (TRAIN + " --member=3", "no setting 'member'; did you mean members?"),
    (TRAIN + " --members=3.5", "--members=3.5: expected int, found 3.5"),
    (TRAIN + " --members=True", "expected int, found True"),
    (TRAIN + " --compile=yes", "expected bool, found 'yes'"),
    (TRAIN + " --lr", "expected --name=value"),
    (TRAIN + " --lr=1e999", "expected float, found inf"),
    (TRAIN + " --lr=1" + 400 * "0", "expected float"),
    (TRAIN + " --lr=-1", "lr: expected > 0, found -1.0"),
    (TRAIN + " --v=(1,2)", "v and omega: expected (lowest, highest, mean, sd)"),
    (TRAIN + " --v=(0.3,0.1,0.2,0.1)", "speed bounds 0.3, 0.1"),
    (TRAIN + " --omega=('a','b','c','d')", "expected tuple"),
    (TRAIN + " --frames=80", "frames: expected 4k + 1, found 80"),
    (TRAIN + " --frames=-3", "frames: expected at least 1, found -3"),
    (TRAIN + " --conditions=0", "conditions: expected at least 1, found 0"),
    (TRAIN + " --timeout=0", "timeout: expected at least 1, found 0"),
    (TRAIN + " --seed=-1", "seed: expected at least 0, found -1"),
    (TRAIN + " --reward_batch=-1", "reward_batch: expected at least 0, found -1"),
    (TRAIN + " --seed=99999999999999999999", "expected int, found 99999999999999999999"),
    (TRAIN + " --v=" + 500 * "(", "expected tuple"),
    (TRAIN + " --omega={{[]:1}}", "expected tuple"),
    (TRAIN + " --rewards=a\0b=1", "expected text without null characters"),
    (TRAIN + " --conditions=99999999999", "conditions: expected at most 65536"),
    (TRAIN + " --members=99999999999", "members: expected at most 4096"),
    (TRAIN + " --threads=99999999999", "threads: expected at most 1024"),
    (TRAIN + " --rooms=99999999999", "rooms: expected at most 4096"),
    (TRAIN + " --first=7", "first: expected at most 6, the steps, found 7"),
    (TRAIN + " --keep=3", "max_skips: expected below keep, 3, found 3"),
    (TRAIN + " --out=", "--out=: expected a folder, found nothing"),
    (TRAIN + " --out=a,b", "out: expected a folder without commas"),
    (TRAIN + " --out=a\n", r"expected a folder without blanks around its name"),
    *((TRAIN + f" --{name}={x}", f"{name}: expected {size}, the toy's, found {x}") for name, x, size in
      (("frames", 81, 5), ("height", 480, 24), ("width", 48, 40))),
    *((TRAIN + f" --{name}={x}", f"{name}: the toy has no use for it") for name, x in
      (("clips", "x"), ("trajectories", "x"), ("estimator_stride", 2), ("grey_mq", True),
       ("hpsv3_prompt", "x"), ("park", True))),
    (TRAIN + " --updates=7", "updates: 7 do not divide"),
    (TRAIN + " --size=6", "window size: expected 1 to"),
    (TRAIN + " --strategy=sideways", "expected progressive, random or all, found 'sideways'"),
    (TRAIN + " --normalise=std", "normalise: expected max or group, found std"),
    (TRAIN + " --world=moon", "world: expected toy, clips or captions, found 'moon'"),
    (TRAIN + " --weights={w}/nowhere", "nowhere/toy_base.safetensors"),
    (TRAIN + " --weights={w}/toy_cut_base", "toy_base.safetensors: not a whole safetensors file"),
    (TRAIN + " --weights={w}/toy_no_codec", "toy_codec.safetensors"),
    (TRAIN + " {w}/own.py", "code of one's own runs only when named by --rewards="),
    (TRAIN + " --guidance=2", "guidance: this world has no negative prompt, expected 1"),
    (TRAIN + " --rewards=tran=1", "did you mean trans?"),
    (TRAIN + " --rewards={w}/nothing.py:f=1", "nothing.py: no such file"),
    (TRAIN + " --rewards={w}/syntax.py:f=1", "syntax.py: SyntaxError"),
    (TRAIN + " --rewards={w}/raises.py:f=1",
     "raises.py: ModuleNotFoundError: No module named 'no_such_package'"),
    *((TRAIN + " --rewards={w}/" + f"leaves_{kind}.py:f=1", f"leaves_{kind}.py: {said}") for kind, said in
      (("exit", "SystemExit: 3"), ("interrupt", "KeyboardInterrupt"), ("quiet", "Quiet"))),
    (TRAIN + " --rewards={w}/reward.py:g=1", "expected a function g(videos, scene), found none"),
    (TRAIN + " --rewards={w}/reward.py:one=1", "expected one(videos, scene), found one(videos)"),
    (CLIPS, "--clips=FOLDER is needed"),
    (CLIPS + MORE + " --height=100", "height and width: expected multiples of 16"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/nowhere", "nowhere: no index.json"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/no_index", "no_index: no index.json"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/broken_index", "index.json: no index of prepared clips"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/list_index", "index.json: no index of prepared clips"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/number_index", "index.json: no index of prepared clips"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/no_clips", "lists no clip"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/others", "width = 64, wanted 48"),
    (CLIPS + " --clips={w}/lost_clip --trajectories={w}/nowhere", "nowhere: no such folder of camera paths"),
    (CLIPS + " --clips={w}/lost_clip --trajectories={w}/bad_paths",
     "no usable camera path of 9 or more frames"),
    (CLIPS + MORE + " --weights={w}/empty", "diffusion_pytorch_model.safetensors: no such file"),
    (CLIPS + MORE + " --weights={w}/no_redirector", "step20000.safetensors: no such file"),
    (CLIPS + MORE + " --weights={w}/cut_dit",
     "diffusion_pytorch_model.safetensors: not a whole safetensors file"),
    (CLIPS + MORE + " --weights={w}/zero_dit",
     "diffusion_pytorch_model.safetensors: not a whole safetensors file"),
    (CLIPS + MORE + " --weights={w}/other_dit", "not a Wan DiT"),
    (CLIPS + MORE + " --weights={w}/evil_vae", "Wan2.1_VAE.pth: refused"),
    (CLIPS + MORE + " --weights={w}/cut_vae", "Wan2.1_VAE.pth: truncated"),
    (CLIPS + MORE + " --weights={w}/other_vae", "Wan2.1_VAE.pth: holds other things than tensors"),
    (CLIPS + MORE, "trans and rot need MapAnything: pip install"),
    (CLIPS + MORE + " --rewards=exposure=1", "a.mp4.safetensors"),
    (CLIPS + " --trajectories={w}/paths --clips={w}/cut_clip --rewards=exposure=1",
     "b.mp4.safetensors: truncated"),
    (PREPARE, "--videos=FOLDER is needed"),
    (PREPARE + SOURCES + " --frames=many", "--frames=many: expected int, found 'many'"),
    (PREPARE + SOURCES + " --videos={w}/nowhere", "nowhere: no such folder of videos"),
    (PREPARE + SOURCES + " --videos={w}/notes", "notes: no videos"),
    (PREPARE + SOURCES + " --captions={w}/nowhere.csv", "nowhere.csv"),
    (PREPARE + SOURCES + " --captions={w}/words.csv", "words.csv: needs columns file_name and text"),
    (PREPARE + SOURCES + " --captions={w}/none.csv", "none.csv: no row with a caption"),
    (PREPARE + SOURCES + " --captions={w}/two.csv", "two.csv: line 3: another caption for a.mp4"),
    (PREPARE + SOURCES + " --captions={w}/latin.csv", "latin.csv: expected UTF-8 csv"),
    (PREPARE + SOURCES + " --captions={w}/camera.npz", "camera.npz: expected UTF-8 csv"),
    (PREPARE + SOURCES + " --cameras={w}/nowhere",
     "nowhere: expected mapanything, a camera file or a folder"),
    (PREPARE + SOURCES + " --fov=nan", "--fov=nan: expected float, found 'nan'"),
    (PREPARE + SOURCES + " --fov=200", "fov: expected degrees between 0 and 180, found 200"),
    (PREPARE + SOURCES + " --weights={w}/nowhere", "Wan2.1_VAE.pth: no such file"),
    (PREPARE + SOURCES + " --weights={w}/evil_vae", "Wan2.1_VAE.pth: refused"),
    (PREPARE + SOURCES + " --weights={w}/cut_text", "models_t5_umt5-xxl-enc-bf16.pth: truncated"),
    (PREPARE + SOURCES + " --frames=10", "expected 4k+1 frames"),
    (PREPARE + SOURCES + " --frames=-3", "-3 frames"),
    (PREPARE + SOURCES + " --height=-32", "-32x48"),
    (PREPARE + SOURCES + " --stride=0", "stride: expected at least 1, found 0"),
    ("evaluate.py compre", "no command 'compre'; did you mean compare?"),
    (PROTOCOL + " --videos={w}/videos", "give --weights=FOLDER"),
    (PROTOCOL + " --videos={w}/videos --weights={w}/weights --out={w}/no_cameras",
     "base takes the sources' cameras, which the poses in"),
    (PROTOCOL + " --generated={w}/made --path=3", "did you mean paths?"),
    (PROTOCOL + " --generated={w}/made", "expected <clip>_camera_<1-10>_speed_<s>.mp4, found anything.mp4"),
    (PROTOCOL + " --generated={w}/nowhere", "nowhere: no such folder of videos"),
    (PROTOCOL + " --generated={w}/good --paths=11", "no evaluation path '11'"),
    (PROTOCOL + " --generated={w}/good --speeds=fast", "speeds: could not convert string to float: 'fast'"),
    (PROTOCOL + " --generated={w}/good --speeds=-1", "speeds: expected numbers such as 1 and 1.5"),
    (PROTOCOL + " --generated={w}/good --estimator={w}/nowhere", "expected vipe, mapanything or a folder"),
    (PROTOCOL + " --generated={w}/good --videos={w}/videos --clips={w}/clips.txt", "1 of 2 are not in"),
    (PROTOCOL + " --generated={w}/good --show=b", "show: no case 'b'"),
    (PROTOCOL + " --generated={w}/good --log={w}/log.jsonl", "log.jsonl, line 2: expected a JSON object"),
    (PROTOCOL + " --videos={w}/videos --weights={w}/empty", "no such file, expected the published weights"),
    (PROTOCOL + " --videos={w}/videos --weights={w}/weights --ckpt={w}/empty", "empty: no checkpoint"),
    (PROTOCOL + " --videos={w}/videos --weights={w}/weights --captions={w}/words.csv",
     "words.csv: needs columns"),
    ("evaluate.py toy --speeds=nan", "speeds: expected numbers such as 1 and 1.5, found nan"),
    ("evaluate.py toy --estimator=guess", "estimator: expected judge or estimator, found 'guess'"),
    ("evaluate.py toy --weights={w}/nowhere", "nowhere/toy_base.safetensors"),
    ("evaluate.py toy --weights={w}/toy_cut_base", "toy_base.safetensors: not a whole safetensors file"),
    ("evaluate.py toy --ckpt={w}/nowhere", "nowhere: no checkpoint"),
    ("evaluate.py toy --ckpt={w}/cut.safetensors", "cut.safetensors: not a whole safetensors file"),
    ("evaluate.py toy --ckpt={w}/evil_vae/Wan2.1_VAE.pth", "Wan2.1_VAE.pth: refused"),
    ("evaluate.py toy --ckpt={w}/foreign.safetensors", "unexpected a"),
    ("evaluate.py toy --rooms=99999999999", "rooms: expected at most 4096"),
    ("evaluate.py toy --rooms=0", "rooms: expected at least 1, found 0"),
    ("evaluate.py compare {w}/results.json",
     "expected two different results.json, or their folders, or more"),
    ("evaluate.py compare {w}/results.json {w}/nowhere.json", "nowhere.json"),
    ("evaluate.py compare {w}/results.json {w}/cut.json", "cut.json: damaged"),
    ("evaluate.py compare {w}/results.json {w}/old.json", "old.json: protocol 0, expected"),
    ("evaluate.py compare {w}/results.json {w}/list.json", "list.json: protocol None, expected"),
    ("evaluate.py compare {w}/results.json {w}/bare.json", "bare.json: damaged"),
    (RETAKE, "retake: expected a clip and --weights=FOLDER"),
    (RETAKE + GOOD + " --clip={w}/nowhere.mp4", "nowhere.mp4: no such video"),
    (RETAKE + GOOD + " --clip={w}/cut.mp4", "cut.mp4: unreadable or truncated"),
    (RETAKE + GOOD + " --clip={w}/zero.mp4", "zero.mp4: empty file (0 bytes)"),
    (RETAKE + GOOD + " --clip={w}/text.mp4", "text.mp4: unreadable"),
    (RETAKE + GOOD + " --clip={w}/sound.mp4", "sound.mp4: no video stream, only audio"),
    (RETAKE + GOOD + " --clip={w}/short.mp4", "short.mp4: too short, 3 frames"),
    (RETAKE + GOOD + " --clip={w}/empty", "empty: a folder without images"),
    (RETAKE + GOOD + " --height=33", "height and width: expected multiples of 16, found 33 x 48"),
    (RETAKE + GOOD + " --stride=0", "stride: expected at least 1, found 0"),
    (RETAKE + GOOD + " --camera=loop", "no path 'loop': expected 1-10"),
    (RETAKE + GOOD + " --camera={w}/camera.json", "camera.json: truncated or broken file"),
    (RETAKE + GOOD + " --camera={w}/list.json", "list.json: not a camera format"),
    (RETAKE + GOOD + " --camera={w}/nan.npz", "nan.npz: frame 0: not finite"),
    (RETAKE + GOOD + " --camera={w}/flat.npy", "flat.npy: wrong shape"),
    (RETAKE + GOOD + " --camera={w}/object.npy", "object.npy: Object arrays cannot be loaded"),
    (RETAKE + GOOD + " --cameras={w}/nowhere.npz", "nowhere.npz: no such camera file"),
    (RETAKE + GOOD + " --cameras={w}/few.npz", "few.npz: 2 cameras for a video of 9 frames"),
    (RETAKE + GOOD + " --cameras={w}/bare.npz", "no intrinsics; give --fov"),
    (RETAKE + GOOD + " --fov=-60", "fov: expected degrees between 0 and 180, found -60"),
    (RETAKE + GOOD + " --cameras={w}/camera.npz --prompt=x --weights={w}/cut_vae",
     "Wan2.1_VAE.pth: truncated"),
    (RETAKE + GOOD + " --ckpt={w}/nowhere", "nowhere: no checkpoint"),
    (RETAKE + GOOD + " --steps=0", "steps: expected at least 1, found 0"),
]


def call(command, monkeypatch):
    """A command line in this process, by its script's own __main__ -> exit code, lines on stderr."""
    def leave(code):
        raise SystemExit(code)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(toy.world, "TRAIN_ROOMS", 4)
    words = command.split(" ")
    is_module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[is_module:])
    err, handlers = io.StringIO(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stderr(err), redirect_stdout(io.StringIO()):
            if is_module:
                runpy.run_module(sys.argv[0], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code, words = (1, leaving.code) if isinstance(leaving.code, str) else (leaving.code, "")
        print(words, file=err)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, [line for line in err.getvalue().replace("\r", "\n").split("\n") if line.strip()]


@pytest.mark.filterwarnings("ignore:.data.prepare. found in sys.modules")
@pytest.mark.parametrize("command, message", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input_is_one_line(world, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(ROOT)
    out = "" if " compare" in command or " --out=" in command else f" --out={tmp_path / 'out'}"
    command = command.format(w=world) + out
    code, lines = call(command, monkeypatch)
    assert code == 1 and len(lines) == 1 and message in lines[0], lines
    assert len(lines[0]) < 1000 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [TRAIN + " --frames=80", RETAKE])
def test_the_same_as_a_process(tmp_path, command):
    command = [sys.executable, *command.split(" "), f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_left_alone(world, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = {f: f.read_bytes() for f in (world / "other_run").rglob("*") if f.is_file()}
    code, lines = call(TRAIN + f" --out={world / 'other_run'}", monkeypatch)
    assert code == 1 and len(lines) == 1 and "lr = 0.5, now" in lines[0]
    now = {f: f.read_bytes() for f in (world / "other_run").rglob("*") if f.is_file()}
    assert now.pop(world / "other_run/lock") == b"" and before == now


# ---- mutated files: nothing but our own error, or a value ----

TOKENS = [b"NaN", b"-1", b"1e999", b"null", b"[[[[", b"]", b"}", b'"', b"{}", b"..", b"\\u0000", b"\xff",
          b"0" * 40,
          b"9" * 400, b"true", b",", b"[" * 3000, b"(" * 300, b"-", b"0x"]


def mutations(content, count, seed=0, first=0):
    """`count` copies of bytes, each with one to four random changes from byte `first` on."""
    g = random.Random(seed)
    for _ in range(count):
        x = bytearray(content)
        for _ in range(g.randint(1, 4)):
            at, to = sorted(g.randrange(first, max(len(x), first + 1)) for _ in range(2))
            kind = g.randrange(6)
            if kind == 0 and at < len(x):
                x[at] = g.randrange(256)
            elif kind == 1:
                del x[at:min(to, at + 20)]
            elif kind == 2:
                x[at:at] = x[at:min(to, at + 60)]
            elif kind == 3:
                x[at:at] = g.choice(TOKENS)
            elif kind == 4:
                numbers = [m for m in re.finditer(rb"\d+", bytes(x)) if m.start() >= first]
                if numbers:
                    m = g.choice(numbers)
                    new = g.choice([b"0", b"-1", b"1", b"4096", b"1e9", b"9" * 11, b"null", b'"a"'])
                    x[m.start():m.end()] = new
            elif g.random() < 0.2:
                del x[at:]
        yield bytes(x)


def fuzz(path, content, read, count=2000, first=0, errors=(ValueError, OSError)):
    """read() after each mutation of the file at `path`; anything else than `errors` gets out."""
    refused, begun = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for x in mutations(content, count, first=first):
        path.write_bytes(x)
        try:
            with warnings.catch_warnings(action="ignore"):  # of python's, about odd but valid literals
                read()
        except errors as error:
            assert "\n" not in str(error) and str(path.parent) in str(error), error
            refused += 1
    assert refused > count // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 500_000  # kB


def test_fuzzed_config(tmp_path):
    path = tmp_path / "config.py"
    content = (ROOT / "config/toy.py").read_bytes()

    def read():
        config = parse(train.Config, [str(path)])
        try:
            config.check(1)
        except ValueError as error:
            raise ValueError(f"{tmp_path}: {error}") from None  # it names the setting, not the file
    fuzz(path, content, read)


CAMERAS = {
    "split_0.json": json.dumps({"quats": [[1, 0, 0, 0], [0.8, 0.6, 0, 0]],
                                "trans": [[0, 0, 0], [0, 0.5, 1]]}),
    "info.json": json.dumps({"extrinsics": np.eye(4)[None].repeat(2, 0).tolist()}),
    "camera_extrinsics.json": json.dumps({f"frame{i}": {
        "cam01": f"[1 0 0 0] [0 1 0 0] [0 0 1 0] [{i} 0 0 1] "} for i in range(3)})}


@pytest.mark.parametrize("name", CAMERAS)
def test_fuzzed_cameras(tmp_path, name):
    path = tmp_path / name
    fuzz(path, CAMERAS[name].encode(), lambda: cameras.read_path(path), 1000)


def test_fuzzed_index_results_and_settings(tmp_path):
    index = {"settings": {"frames": 9}, "clips": ["a"], "skipped": {"b": "why"}}
    fuzz(tmp_path / INDEX, json.dumps(index).encode(), lambda: read_index(tmp_path), 1000)
    file = tmp_path / "r.json"
    fuzz(file, json.dumps(RESULTS).encode(), lambda: read_results(file), 1000)
    settings = {"protocol": scores.PROTOCOL, "frames": 9, "name": "x"}
    fuzz(tmp_path / "settings.json", json.dumps(settings).encode(),
         lambda: keep_settings(tmp_path, {"frames": 9, "name": "x"}), 1000)


def test_fuzzed_safetensors(world, tmp_path):
    """Header and all: the first 8 bytes are its length."""
    content = (world / "weights" / tiny_weights.DIT).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    small = save({"model.weight": torch.zeros(2, 3), "b": torch.zeros(4)})
    path = tmp_path / "x.safetensors"
    fuzz(path, small, lambda: open_tensors(path))
    fuzz(path, small, lambda: read_weights(path))
    fuzz(path, small, lambda: model.load_dit(path), 300)
    pad = content[8:header].replace(b" ", b"")
    for k, mutated in enumerate(mutations(pad, 150)):  # whole files, their keys and shapes mutated
        mutated += b" " * (-len(mutated) % 8)
        path.write_bytes(len(mutated).to_bytes(8, "little") + mutated + content[header:])
        with pytest.raises((ValueError, OSError)):
            model.load_dit(path)
            raise ValueError("loaded: the change did not matter")
    facts = {"name": "a", "video": "a.mp4", "caption": "c", "fps": 24.0, "text_length": 5}
    prepared = save({key: torch.zeros(2, 3) for key in TENSORS}, {"clip": json.dumps(facts)})
    fuzz(path, prepared, lambda: load_clip(path))


def test_fuzzed_checkpoint(tmp_path):
    """state.json in every way: refused in one line, never half restored."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    made, names, folder = vars(train.Config()), {"p": parameter}, tmp_path / "iteration_000002"
    checkpoint.save_checkpoint(tmp_path, 2, names, optimizer, made)
    content, kept = (folder / "state.json").read_bytes(), parameter.detach().clone()
    found = set()
    for x in mutations(content, 1500):
        (folder / "state.json").write_bytes(x)
        try:
            found.add(checkpoint.resume(tmp_path, names, optimizer, made, train.Config.FREE))
        except (ValueError, RuntimeError) as error:  # damaged, or its settings differ
            found.add(type(error))
            assert str(folder) in str(error) and "\n" not in str(error)
        assert torch.equal(parameter, kept)
    assert found == {2, ValueError, RuntimeError}  # never 0: nothing is begun over it


# ---- names and contents that would do harm ----

def test_names_with_dots_stay_inside(world, tmp_path):
    (tmp_path / "v/..a").mkdir(parents=True)
    write_video(tmp_path / "v/..a/..b.mp4", clip(5), 24)
    assert find_videos(tmp_path / "v") == ["..a/..b.mp4"] and find_clips(tmp_path / "v") == {
        "..a_..b": "..a/..b.mp4"}  # a clip's name is one path component
    index = {"settings": {}, "clips": ["../secret"], "skipped": {}}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json.*'../secret'"):
        ClipCache(tmp_path / "cache")
