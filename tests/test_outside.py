"""outside.py, against small stand-ins that write the real programs' files: as they should, and as they should
not."""
import stat
import sys

import numpy as np
import pytest

from evaluation import outside
import trajectories
from data.video import write_video


def program(path, body):
    """An executable python script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def video(tmp_path):
    """A film of 9 frames, 32 x 64."""
    path = tmp_path / "bear_camera_9_speed_1.5.mp4"
    write_video(path, np.full((9, 32, 64, 3), 128, np.uint8), 24)
    return path


# ---- calling programs ----

def test_call_returns_the_exit_code_and_the_last_line(tmp_path):
    code = "import sys; print('a'); print(' why ', file=sys.stderr); print(); sys.exit(3)"
    assert outside.call([sys.executable, "-c", code]) == (3, "why")
    assert outside.call([sys.executable, "-c", ""]) == (0, "no output")
    assert outside.call([str(tmp_path / "none")])[0] is None


def test_programs_do_not_take_themselves_for_a_rank(monkeypatch, tmp_path):
    """Under torchrun a tool must not join our process group; it gets its rank's GPU."""
    for name, x in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1",
                    "TORCHELASTIC_RUN_ID": "x", "CUDA_VISIBLE_DEVICES": "5,7"}.items():
        monkeypatch.setenv(name, x)
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"
    code = f"import os; print([os.environ.get(n) for n in {names}])"
    assert outside.call([sys.executable, "-c", code]) == (0, "[None, None, None, None, None, '7']")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert outside.call([sys.executable, "-c", code])[1].endswith("'1']")


def test_programs_of_an_environment_find_each_other(tmp_path):
    tool = program(tmp_path / "env/bin/tool", "import shutil; print(shutil.which('other'))")
    other = program(tmp_path / "env/bin/other", "")
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


def world_path(n=9):
    """The path in another world frame: ViPE's first pose need not be the identity."""
    return trajectories.published(9)[3] @ trajectories.recammaster(9, n)


def test_vipe(tmp_path, monkeypatch, video):
    np.save(tmp_path / "poses.npy", world_path())
    monkeypatch.setenv("POSES", str(tmp_path / "poses.npy"))
    odd = tmp_path / "a=(b), [c]#'d'" / "clip{1};&.mp4"
    odd.parent.mkdir()
    odd.write_bytes(video.read_bytes())
    c2w, intrinsics = outside.vipe(program(tmp_path / "vipe", VIPE))(odd)
    assert np.abs(c2w - trajectories.recammaster(9, 9)).max() < 1e-6
    assert intrinsics == pytest.approx([50 / 64, 60 / 32, 0.5, 0.5])


@pytest.mark.parametrize("poses, why", [
    (np.where(np.arange(9)[:, None, None] == 4, np.nan, world_path()), "frame 4: not finite"),
    (np.zeros((9, 2, 4)), "shape"), (np.zeros((0, 4, 4)), "shape")], ids=["nan", "shape", "empty"])
def test_vipe_with_unusable_poses(tmp_path, monkeypatch, video, poses, why):
    np.save(tmp_path / "poses.npy", poses)
    monkeypatch.setenv("POSES", str(tmp_path / "poses.npy"))
    with pytest.raises(ValueError, match=f"ViPE wrote no usable cameras.*{why}"):
        outside.vipe(program(tmp_path / "vipe", VIPE))(video)


@pytest.mark.parametrize("body, why", [
    ("import sys; print('CUDA out of memory'); sys.exit(1)", "exit code 1: CUDA out of memory"),
    ("print('done')", "exit code 0: done"),
    ("import os, sys; o = sys.argv[4]\nfor k in 'pose', 'intrinsics':\n  os.makedirs(o + '/' + k)\n"
     "  open(o + '/' + k + '/video.npz', 'w').write('PK')", "no usable cameras")],
    ids=["fails", "writes nothing", "writes garbage"])
def test_vipe_failing(tmp_path, video, body, why):
    with pytest.raises(ValueError, match=f"ViPE .*{why}"):
        outside.vipe(program(tmp_path / "vipe", body))(video)


def test_vipe_not_installed(tmp_path):
    with pytest.raises(ValueError, match="not installed: ViPE"):
        outside.vipe(str(tmp_path / "none"))


# ---- VBench ----

FAKE_TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = str\n"
FAKE_VBENCH = """
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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a stand-in for VBench, and the videos {case: file} to score."""
    def put(body=FAKE_VBENCH):
        (tmp_path / "site/vbench").mkdir(parents=True, exist_ok=True)
        (tmp_path / "site/vbench/__init__.py").write_text(body)
        (tmp_path / "site/torch.py").write_text(FAKE_TORCH)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        videos = {}
        for n, folder in ((1, "here"), (2, "elsewhere")):
            path = tmp_path / folder / f"whatever{n}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x" * n)
            videos[f"bear_camera_{n}_speed_1"] = path
        return videos
    return put


SIZE = "os.path.getsize(os.path.join(videos_path, f))"  # tells which file stands behind a name


def test_vbench(install):
    videos = install(FAKE_VBENCH.replace("SCORE", SIZE))
    scores, note = outside.vbench(sys.executable, videos, "motion_smoothness")
    assert scores == {"bear_camera_1_speed_1": 1, "bear_camera_2_speed_1": 2} and note is None


def test_vbench_imaging_quality_of_a_video_is_in_per_cent(install):
    videos = install(FAKE_VBENCH.replace("SCORE", "68.42"))
    scores, _ = outside.vbench(sys.executable, videos, "imaging_quality")
    assert list(scores.values()) == pytest.approx([0.6842] * 2)


@pytest.mark.parametrize("score", ['float("nan")', 'float("inf")'])
def test_vbench_videos_without_a_number(install, score):
    videos = install(FAKE_VBENCH.replace("SCORE", f'0.5 if "camera_1" in f else {score}'))
    scores, note = outside.vbench(sys.executable, videos, "aesthetic_quality")
    assert scores == {"bear_camera_1_speed_1": 0.5}
    assert note == "failed: VBench, aesthetic_quality (1 videos, bear_camera_2_speed_1 first)"


def test_vbench_leaving_a_video_out(install):
    """As temporal_flickering does with a video that it cannot read."""
    body = FAKE_VBENCH.replace("SCORE", "0.5").replace("sorted(", "['bear_camera_2_speed_1.mp4'] or (")
    videos = install(body)
    scores, note = outside.vbench(sys.executable, videos, "temporal_flickering")
    assert scores == {"bear_camera_2_speed_1": 0.5} and "bear_camera_1_speed_1" in note


@pytest.mark.parametrize("body, why", [
    (FAKE_VBENCH.replace("json.dump(results, f)", "f.write('{\"x\": ')"), "JSONDecodeError"),
    (FAKE_VBENCH.replace("json.dump(results, f)", "f.write('{}')"), "KeyError"),
    (FAKE_VBENCH.replace("json.dump(results, f)", "f.write('{\"motion_smoothness\": [0.5]}')"), "IndexError"),
    (FAKE_VBENCH.replace("results = {}", "raise SystemExit(0)"), "exit code 0"),
    (FAKE_VBENCH.replace("results = {}", "raise RuntimeError('no weights')"), "RuntimeError: no weights")],
    ids=["cut short", "empty", "no videos", "silent", "raises"])
def test_vbench_failing(install, body, why):
    scores, note = outside.vbench(sys.executable, install(body.replace("SCORE", "0.5")), "motion_smoothness")
    assert scores == {} and note.startswith("failed: VBench, motion_smoothness (") and why in note


def test_vbench_not_installed(install, monkeypatch, tmp_path):
    videos = install()
    (tmp_path / "site/vbench/__init__.py").unlink()
    (tmp_path / "site/vbench").rmdir()
    for python in (sys.executable, str(tmp_path / "no/python")):
        scores, note = outside.vbench(python, videos, "motion_smoothness")
        assert scores == {} and note.startswith("not installed: VBench (")


# ---- MEt3R and Dyn-MEt3R by ReDirector's evaluate.py ----

MET3R = """
import os, sys
assert sys.argv[1] == "--data_path"
path = sys.argv[2]
folder, name = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0].split("_")
assert (int(name[-3]), float(name[-1])) == (9, 1.5)
assert open(path, "rb").read() == b"video" and open(folder + "/input.mp4", "rb").read() == b"source"
assert os.path.exists("dataset.json")  # it reads files of its checkout by relative paths
"""
RESULTS = "TransErr: 0.02\nRotErr: 1.37\nDyn-MEt3R: {}\nMEt3R: {}\n"


def run_met3r(tmp_path, body, python=sys.executable):
    checkout = tmp_path / "checkout"
    program(checkout / "evaluate.py", MET3R + body)
    (checkout / "dataset.json").touch()
    for name in ("source", "video"):
        (tmp_path / f"{name} (1).mp4").write_bytes(name.encode())
    files = tmp_path / "source (1).mp4", tmp_path / "video (1).mp4"
    return outside.met3r(python, str(checkout), *files, 9, 1.5)


def write_results(*values):
    return f"open(folder + '/results.txt', 'w').write({RESULTS.format(*values)!r})\n"


def test_met3r(tmp_path):
    """It ends with an error after writing its results where its clean-up finds nothing: the file counts."""
    for ending in ("", "raise FileNotFoundError('resized')"):
        scores, note = run_met3r(tmp_path, write_results(0.8573, 0.3077) + ending)
        assert scores == {"Dyn-MEt3R": 0.8573, "MEt3R": 0.3077} and note is None


@pytest.mark.parametrize("values, scores, lacks", [
    ((None, 0.3), {"MEt3R": 0.3}, "Dyn-MEt3R"), ((0.8, "nan"), {"Dyn-MEt3R": 0.8}, "MEt3R"),
    ((None, None), {}, "MEt3R and Dyn-MEt3R")])
def test_met3r_in_part(tmp_path, values, scores, lacks):
    found, note = run_met3r(tmp_path, write_results(*values))
    assert found == scores and note == f"failed: {lacks} (its results.txt has none)"


@pytest.mark.parametrize("body, note", [
    ("import featup_of_another_environment", "not installed: MEt3R (ModuleNotFoundError: No module named"),
    ("raise RuntimeError('CUDA')", "failed: MEt3R (exit code 1: RuntimeError: CUDA)"),
    ("", "failed: MEt3R (exit code 0: no output)"),
    ("open(folder + '/results.txt', 'wb').write(b'\\xff\\xfe')", "failed: MEt3R"),
    ("open(folder + '/results.txt', 'w').write('MEt3R: ')", "failed: MEt3R and Dyn-MEt3R")])
def test_met3r_failing(tmp_path, body, note):
    scores, found = run_met3r(tmp_path, body)
    assert scores == {} and found.startswith(note)


def test_met3r_without_its_python(tmp_path):
    scores, note = run_met3r(tmp_path, "", str(tmp_path / "none"))
    assert scores == {} and note.startswith("not installed: MEt3R (")
