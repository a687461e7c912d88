"""evaluation/outside.py, against small stand-ins that write the real programs' files, or fail to."""
import sys

import numpy as np
import pytest
from conftest import ROOT, refused
from scenes import clip, put

import trajectories
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
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"
    for name, x in zip(names, ("1", "2", "1", "h", "x", "5,7")):
        monkeypatch.setenv(name, x)
    code = f"import os; print([os.environ.get(n) for n in {names}])"
    assert outside.call([sys.executable, "-c", code]) == (0, "[None, None, None, None, None, '7']")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert outside.call([sys.executable, "-c", code])[1].endswith("'1']")
    other = program(tmp_path / "env/bin/other", "")
    tool = program(tmp_path / "env/bin/tool", "import shutil; print(shutil.which('other'))")
    assert outside.call([tool]) == (0, other)


# ---- ViPE ----

VIPE = """
import os, re, sys
import numpy as np
args = sys.argv[1:]
assert args[0] == "infer" and args[2] == "-o" and args[4:] == ["-p", "default"], args
assert not re.search(r"[=,(){}\\[\\]'#&;]", " ".join(args)), "hydra would stumble"
name, out = os.path.splitext(os.path.basename(args[1]))[0], args[3]
intrinsics = np.tile([50.0, 60.0, 32, 16], (9, 1))
for kind, array in (("pose", np.load(os.environ["POSES"])), ("intrinsics", intrinsics)):
    os.makedirs(f"{out}/{kind}", exist_ok=True)
    np.savez(f"{out}/{kind}/{name}.npz", data=array, inds=np.arange(len(array)))
"""
GARBAGE = ("import os, sys\nfor k in 'pose', 'intrinsics':\n  os.makedirs(sys.argv[4] + '/' + k)\n"
           "  open(sys.argv[4] + '/' + k + '/video.npz', 'w').write('PK')")
# The path in another world frame: ViPE's first pose need not be the identity.
WORLD_PATH = trajectories.published(9)[3] @ trajectories.recammaster(9, 9)


@pytest.mark.parametrize("body, poses, why", [
    (VIPE, WORLD_PATH, None), (VIPE, np.zeros((9, 2, 4)), "no usable cameras.*shape"),
    (VIPE, np.where(np.arange(9)[:, None, None] == 4, np.nan, WORLD_PATH), "no usable.*frame 4: not finite"),
    (GARBAGE, WORLD_PATH, "no usable cameras"),
    ("print('out of memory'); exit(1)", WORLD_PATH, "exit code 1: out of memory"),
    ("print('done')", WORLD_PATH, "exit code 0: done"), (None, WORLD_PATH, "not installed: ViPE")],
    ids=["good", "shape", "nan", "garbage", "fails", "writes nothing", "not there"])
def test_vipe(tmp_path, monkeypatch, video, body, poses, why):
    """Metric poses relative to the first, and the lens, of a video of any name; or why there are none."""
    np.save(tmp_path / "poses.npy", poses)
    monkeypatch.setenv("POSES", str(tmp_path / "poses.npy"))
    odd = tmp_path / "a=(b), [c]#'d'" / "clip{1};&.mp4"
    odd.parent.mkdir()
    video.rename(odd)
    tool = program(tmp_path / "vipe", body) if body else str(tmp_path / "none")
    if why:
        refused(lambda: outside.vipe(tool)(odd), "ViPE", *why.split(".*"))
        return
    c2w, intrinsics = outside.vipe(tool)(odd)
    assert np.abs(c2w - trajectories.recammaster(9, 9)).max() < 1e-6
    assert intrinsics == pytest.approx([50 / 64, 60 / 32, 0.5, 0.5])


# ---- VBench ----

FAKE_TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = str\n"
VBENCH = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu" and full_info_dir.endswith("VBench_full_info.json")
        self.out = output_path
        os.makedirs(output_path, exist_ok=True)
    def evaluate(self, videos_path, name, dimension_list, mode, imaging_quality_preprocessing_mode):
        assert mode == "custom_input" and imaging_quality_preprocessing_mode == "longer"
        results = {}
        for dimension in dimension_list:
            videos = [{"video_path": os.path.join(videos_path, f), "video_results": SCORE}
                      for f in sorted(os.listdir(videos_path))]
            results[dimension] = [sum(v["video_results"] for v in videos) / len(videos), videos]
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as f:
            json.dump(results, f)
"""
SIZE = "os.path.getsize(os.path.join(videos_path, f))"  # tells which file stands behind a name
ONE, TWO = "bear_camera_1_speed_1", "bear_camera_2_speed_1"
FAILED = "failed: VBench, motion_smoothness ("


@pytest.mark.parametrize("dimension, score, change, scores, note", [
    ("motion_smoothness", SIZE, (), {ONE: 1, TWO: 2}, None),
    ("imaging_quality", "68.42", (), {ONE: 0.6842, TWO: 0.6842}, None),  # in per cent there
    ("motion_smoothness", '0.5 if "camera_1" in f else float("nan")', (), {ONE: 0.5},
     FAILED + f"1 videos, {TWO} first)"),
    ("motion_smoothness", "0.5", ("sorted(", f"['{TWO}.mp4'] or ("), {TWO: 0.5}, FAILED + f"1 videos, {ONE}"),
    *[("motion_smoothness", "0.5", change, {}, FAILED + why) for change, why in (
        (("json.dump(results, f)", "f.write('{\"motion_smoothness\": [0.5]}')"),
         "exit code 0: no output; IndexError"),
        (("results = {}", "raise RuntimeError('no weights')"), "exit code 1: RuntimeError: no weights"))],
    ("motion_smoothness", "", None, {}, "not installed: VBench ("),
    ("motion_smoothness", "", "no python", {}, "not installed: VBench (")])
def test_vbench(tmp_path, monkeypatch, dimension, score, change, scores, note):
    """A video's own score under its case's name, or a note on what there is none of, and why."""
    put(tmp_path / "site/torch.py", FAKE_TORCH)
    if isinstance(change, tuple):
        body = VBENCH.replace("SCORE", score)
        put(tmp_path / "site/vbench/__init__.py", body.replace(*change) if change else body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    videos = {case: put(tmp_path / f"{n}/whatever.mp4", b"x" * n) for n, case in ((1, ONE), (2, TWO))}
    python = str(tmp_path / "no/python") if change == "no python" else sys.executable
    found, said = outside.vbench(python, videos, dimension)
    assert found == pytest.approx(scores)
    assert said is note is None or said.startswith(note)


MET3R = f"""
import os, sys
assert sys.argv[1] == "--data_path"
path = sys.argv[2]
folder, name = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0].split("_")
assert (int(name[-3]), float(name[-1])) == (9, 1.5)
assert os.path.exists("dataset.json")  # it reads files of its checkout by relative paths
assert open(path, "rb").read() == open(os.environ["VIDEO"], "rb").read()
def write(*values):
    open(folder + '/results.txt', 'w').write(
        "TransErr: 0.02\\nRotErr: 1.37\\nDyn-MEt3R: %s\\nMEt3R: %s\\n" % values)
sys.path.insert(0, {str(ROOT)!r})
"""
LENGTH = "from data.video import read_video\nwrite(0.5, len(read_video(folder + '/input.mp4')[0]))"


@pytest.mark.parametrize("body, scores, note", [
    ("assert open(folder + '/input.mp4', 'rb').read() == b'source'\nwrite(0.8573, 0.3077)\nraise OSError",
     {"Dyn-MEt3R": 0.8573, "MEt3R": 0.3077}, None),
    (LENGTH, {"Dyn-MEt3R": 0.5, "MEt3R": 9}, None),
    ("write(0.8, 'nan')", {"Dyn-MEt3R": 0.8}, "failed: MEt3R (its results.txt has none)"),
    ("import featup_of_another_environment", {}, "not installed: MEt3R (ModuleNotFoundError: "),
    ("raise RuntimeError('CUDA')", {}, "failed: MEt3R (exit code 1: RuntimeError: CUDA)"),
    ("", {}, "failed: MEt3R (exit code 0: no output)"), (None, {}, "not installed: MEt3R ("),
    ("open(folder + '/results.txt', 'wb').write(b'\\xff\\xfe')", {}, "failed: MEt3R"),
    ("open(folder + '/results.txt', 'w').write('MEt3R: ')", {}, "failed: MEt3R and Dyn-MEt3R")])
def test_met3r(tmp_path, monkeypatch, video, body, scores, note):
    """What its file says counts, whatever its exit code; the source is cut to a shorter video."""
    monkeypatch.setenv("VIDEO", str(video))
    program(tmp_path / "checkout/evaluate.py", MET3R + (body or ""))
    (tmp_path / "checkout/dataset.json").touch()
    source = put(tmp_path / "source (1).mp4", b"source")
    if body == LENGTH:
        write_video(source, clip(13, 32, 64), 24)
    python = sys.executable if body is not None else str(tmp_path / "none")
    found, said = outside.met3r(python, str(tmp_path / "checkout"), source, video, 9, 1.5)
    assert found == scores and (said is note is None or said.startswith(note))
