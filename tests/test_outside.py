"""evaluation/outside.py, against small stand-ins that write the real programs' files, or fail to."""
import sys

import numpy as np
import pytest
from conftest import refused
from scenes import clip, put

from data.video import write_video
from evaluation import outside


def program(path, body):
    """An executable python script."""
    put(path, f"#!{sys.executable}\n{body}").chmod(0o755)
    return str(path)


@pytest.fixture
def video(tmp_path):
    """A film of 9 frames, 32 x 64."""
    path = tmp_path / "bear_camera_9_speed_1.5.mp4"
    write_video(path, np.full((9, 32, 64, 3), 128, np.uint8), 24)
    return path


def test_programs_do_not_take_themselves_for_a_rank(monkeypatch, tmp_path):
    """Not in our process group, on the rank's GPU, among its environment's programs."""
    code = "import sys; print('a'); print(' why ', file=sys.stderr); print(); sys.exit(3)"
    assert outside.call([sys.executable, "-c", code]) == (3, "why")
    names = "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"
    for name, x in zip(names, ("1", "1", "x", "5,7")):
        monkeypatch.setenv(name, x)
    code = f"import os; print([os.environ.get(n) for n in {names}])"
    assert outside.call([sys.executable, "-c", code]) == (0, "[None, None, None, '7']")
    other = program(tmp_path / "bin/other", "")
    tool = program(tmp_path / "bin/tool", "import shutil; print(shutil.which('other'))")
    assert outside.call([tool]) == (0, other)


GARBAGE = ("import os, sys\nfor k in 'pose', 'intrinsics':\n  os.makedirs(sys.argv[4] + '/' + k)\n"
           "  open(sys.argv[4] + '/' + k + '/video.npz', 'w').write('PK')")


def test_vipe_that_fails(tmp_path, video):  # one that does not: see test_rehearsal
    for body, why in ((GARBAGE, "no usable cameras"), ("print('no memory'); exit(1)", "code 1: no memory")):
        tool = program(tmp_path / "vipe", body)
        refused(lambda: outside.vipe(tool)(video), "ViPE", why)


VBENCH = """
import json, os
class VBench:
    def __init__(self, device, info, out):
        os.makedirs(out)
        self.out = out
    def evaluate(self, videos_path, name, dimension_list, **options):
        found = [{"video_path": f"{videos_path}/{f}", "video_results": SCORE}
                 for f in os.listdir(videos_path)]
        with open(f"{self.out}/{name}_eval_results.json", "w") as file:
            json.dump({dimension_list[0]: [0, found]}, file)
"""
SIZE = "os.path.getsize(os.path.join(videos_path, f))"  # tells which file stands behind a name
ONE, TWO = "bear_camera_1_speed_1", "bear_camera_2_speed_1"


@pytest.mark.parametrize("dimension, score, scores, note", [
    ("motion_smoothness", SIZE, {ONE: 1, TWO: 2}, None),
    ("imaging_quality", "68.42", {ONE: 0.6842, TWO: 0.6842}, None),  # in per cent there
    ("motion_smoothness", '0.5 if "camera_1" in f else float("nan")', {ONE: 0.5},
     f"failed: VBench, motion_smoothness (1 videos, {TWO} first)"),
    ("motion_smoothness", "1 / 0", {}, "failed: VBench, motion_smoothness (exit code 1: ZeroDivisionError"),
    ("motion_smoothness", None, {}, "not installed: VBench (")])
def test_vbench(tmp_path, monkeypatch, dimension, score, scores, note):
    """A video's own score under its case's name, or a note on what there is none of, and why."""
    put(tmp_path / "torch.py", "class cuda:\n    is_available = lambda: False\ndevice = str\n")
    if score is not None:
        put(tmp_path / "vbench.py", VBENCH.replace("SCORE", score))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    videos = {case: put(tmp_path / f"{n}/whatever.mp4", b"x" * n) for n, case in ((1, ONE), (2, TWO))}
    found, said = outside.vbench(sys.executable, videos, dimension)
    assert found == pytest.approx(scores)
    assert said is note is None or said.startswith(note)


MET3R = """
import os, sys
folder = os.path.dirname(sys.argv[2])
assert os.path.basename(sys.argv[2]) == "clip_camera_9_speed_1.5.mp4"
assert os.path.exists("dataset.json")  # it reads files of its checkout by relative paths
def write(*values):
    with open(folder + '/results.txt', 'w') as file:
        file.write("TransErr: 0.02\\nDyn-MEt3R: %s\\nMEt3R: %s\\n" % values)
"""
LENGTH = "import av\nwrite(0.5, av.open(folder + '/input.mp4').streams.video[0].frames)"


@pytest.mark.parametrize("body, scores, note", [
    (f"{LENGTH}\nraise OSError", {"Dyn-MEt3R": 0.5, "MEt3R": 9}, None),
    ("write(0.8, 'nan')", {"Dyn-MEt3R": 0.8}, "failed: MEt3R (its results.txt has none)"),
    ("raise RuntimeError('CUDA')", {}, "failed: MEt3R (exit code 1: RuntimeError: CUDA)"),
    ("import another", {}, "not installed: MEt3R (")])
def test_met3r(tmp_path, video, body, scores, note):
    """What its file says counts, whatever its exit code; the source is cut to a shorter video."""
    program(tmp_path / "checkout/evaluate.py", MET3R + body)
    put(tmp_path / "checkout/dataset.json", "")
    source = tmp_path / "source (1).mp4"
    write_video(source, clip(13, 32, 64), 24)
    found, said = outside.met3r(sys.executable, str(tmp_path / "checkout"), source, video, 9, 1.5)
    assert found == scores and (said is note is None or said.startswith(note))
