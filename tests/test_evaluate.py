"""evaluate.py: scores with known answers, the protocol from beginning to end on tiny weights, bad input."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation

import evaluate
import model
import tiny_weights
import trajectories
from data.video import read_video, to_float, to_uint8, write_video
from evaluation import generate as generating
from evaluation import retake as retaking
from evaluation import outside, report, scores
from evaluation import sources as source_videos
from evaluation import toy as toy_evaluation
from evaluation.cases import case_name, split_case, find_checkpoints, find_clips, find_generated, listed
from evaluation.generate import generate
from evaluation.scores import keep_settings, pose_scores, read_results, save_poses
from plumbing import files
from plumbing.settings import choose_command, run_command
from pretrained import reward_models
from toy.poses import judge
from toy.pretrain import fit_codec
from toy.rooms import FRAMES, HEADS, TEXT, render, rooms
from toy.world import sources
from trajectories import path_number

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def main(argv):
    """evaluate.py as from the command line, but with its errors raised."""
    settings, function = choose_command(evaluate.COMMANDS, argv)
    return function(settings)


# ---- pose scores ----

def test_pose_scores_agree_with_redirectors():
    arrays = np.load(GOLDEN / "pose_errors.npz")
    for k, errors in json.loads((GOLDEN / "pose_errors.json").read_text()).items():
        found = pose_scores(arrays[f"pred{k}"], arrays[f"gt{k}"])
        assert found["TransErr"] == pytest.approx(errors["TransErr"], abs=1e-6)
        assert found["RotErr"] == pytest.approx(errors["RotErr_deg"], abs=1e-6)


@pytest.mark.parametrize("number", range(1, 11))
def test_a_perfect_camera(number):
    path = trajectories.recammaster(number, 21)
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = Rotation.from_rotvec([0.3, -1, 2]).as_matrix(), [5, -6, 7]
    found = pose_scores(world @ path, path)  # whatever its world frame
    moves = number > 4
    assert found.pop("scale") == (pytest.approx(1) if moves else None)
    assert found.pop("TransErr_moving") == (pytest.approx(0, abs=1e-9) if moves else None)
    assert all(x == pytest.approx(0, abs=1e-6) for x in found.values())


@pytest.mark.parametrize("number", [5, 8, 9])
def test_a_camera_that_goes_20_percent_too_far(number):
    path = trajectories.recammaster(number, 41)
    far = trajectories.scale_motion(path, 1.2, 1)
    found = pose_scores(far, path)
    assert found["scale"] == pytest.approx(1.2) and found["TransErr"] == pytest.approx(0, abs=1e-9)
    assert found["position"] == pytest.approx(0.2 * np.linalg.norm(path[:, :3, 3], axis=1).mean())
    assert found["rotation"] == pytest.approx(0, abs=1e-6)


def test_a_camera_that_turns_too_far():
    path = trajectories.recammaster("pan_right", 41)
    found = pose_scores(trajectories.scale_motion(path, 1, 1.5), path)
    angle = np.degrees(np.linalg.norm(Rotation.from_matrix(path[:, :3, :3]).as_rotvec(), axis=1))
    assert found["rotation"] == pytest.approx(0.5 * angle.mean())
    assert found["RotErr"] == pytest.approx(0.5 * np.abs(angle - angle[:, None]).sum() / (41 * 40))
    assert found["TransErr"] == 0 and found["position"] == 0 and found["scale"] is None


def test_a_pure_rotation_forgives_any_movement_in_transerr_only():
    path = trajectories.recammaster(1, 9)
    wrong = path.copy()
    wrong[:, 2, 3] = np.linspace(0, 1, 9)
    found = pose_scores(wrong, path)
    assert found["TransErr"] == 0 and found["TransErr_moving"] is None
    assert found["position"] == pytest.approx(0.5)


def test_poses_that_are_not_finite_have_failed():
    path = trajectories.recammaster(9, 9)
    pred = path.copy()
    pred[4] = np.nan
    assert pose_scores(pred, path) == {"failed": "the estimated poses are not finite"}
    with pytest.raises(ValueError, match="expected poses"):
        pose_scores(path, path[:5])


@pytest.mark.parametrize("stretch", [1.0, 1.2])
def test_known_answer_in_rendered_rooms(stretch):
    """Eight rooms filmed along arc_left, `stretch` times as far: what the judge finds, in the median."""
    target = trajectories.rescale(trajectories.recammaster("arc_left", FRAMES), 0.06, np.radians(1.5))
    path = torch.from_numpy(trajectories.scale_motion(target, stretch, 1)).float().expand(8, -1, -1, -1)
    room = rooms(8, 3)
    video = torch.stack([to_float(x) for x in to_uint8(render(room, path)[0])])  # as 8-bit video shows it
    poses = judge(video, room, torch.from_numpy(target).float().expand(8, -1, -1, -1))[0]
    found = [pose_scores(pose, target) for pose in poses]
    median = {key: np.median([x[key] for x in found]) for key in found[0]}
    assert median["scale"] == pytest.approx(stretch, abs=0.02) and median["TransErr"] < 0.02
    assert median["rotation"] < 0.1 and (median["position"] < 0.003) == (stretch == 1)


# ---- what is to be evaluated ----

def test_clips_are_found_by_name(tmp_path):
    for name in ("bear.mp4", "b/cat.MOV", "dog/00000.jpg", "dog/00001.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips = find_clips(tmp_path)
    assert clips == {"b_cat": "b/cat.MOV", "bear": "bear.mp4", "dog": "dog"}
    names = tmp_path / "subset.txt"
    names.write_text("dog\n\nbear.mp4\n")
    assert list(find_clips(tmp_path, str(names))) == ["dog", "bear"]
    assert list(find_clips(tmp_path, "bear, dog")) == ["bear", "dog"]
    names.write_text("dog\nbeer\nwolf\n")
    with pytest.raises(ValueError, match="clips: 2 of 3 are not in .*: beer, wolf; did you mean bear?"):
        find_clips(tmp_path, str(names))
    (tmp_path / "b_cat.mp4").touch()
    with pytest.raises(ValueError, match="would both be called b_cat"):
        find_clips(tmp_path)


def test_videos_made_elsewhere_are_found_by_name(tmp_path):
    for name in ("bear_camera_9_speed_1.0.mp4", "sub/bear_camera_1_speed_1.5.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(find_generated(tmp_path)) == {"bear_camera_9_speed_1", "bear_camera_1_speed_1.5"}
    (tmp_path / "bear.mp4").touch()
    with pytest.raises(ValueError, match="expected <clip>_camera_.*found bear.mp4"):
        find_generated(tmp_path)


def test_checkpoints_are_found(tmp_path):
    for n in (2, 10):
        (tmp_path / f"run/iteration_{n:06d}").mkdir(parents=True)
        (tmp_path / f"run/iteration_{n:06d}/self_attn.safetensors").touch()
    (tmp_path / "mine.safetensors").touch()
    run, first = tmp_path / "run", tmp_path / "run/iteration_000002"
    found = find_checkpoints(f"{run},{first}, {tmp_path / 'mine.safetensors'}")
    assert list(found) == ["base", "run-iteration_000010", "run-iteration_000002", "mine"]
    assert found["base"] is None
    assert found["run-iteration_000002"] == first / "self_attn.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        find_checkpoints(str(tmp_path))
    with pytest.raises(ValueError, match="different names"):
        find_checkpoints(f"{run},{run}")


def test_paths_by_number_or_name():
    assert listed("1, arc_left,10", "paths", path_number) == [1, 9, 10]
    for text in ("11", "arc_lft", ""):
        with pytest.raises(ValueError, match="paths"):
            listed(text, "paths", path_number)


def test_results_of_another_protocol_are_refused(tmp_path):
    file = tmp_path / "results.json"
    for content, why in (('{"protocol": 0}', "protocol 0, expected"), ("[]", "protocol None"),
                         ('{"prot', "damaged")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"results.json: {why}"):
            read_results(file)
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "none.json")


def test_a_folder_made_with_other_settings_is_refused(tmp_path):
    keep_settings(tmp_path / "a", {"steps": 50, "seed": 0})
    keep_settings(tmp_path / "a", {"steps": 50, "seed": 0})
    (tmp_path / "a/failed.json").write_text('{"failed": "why"}')
    (tmp_path / "a/clip.failed").write_text("why")
    keep_settings(tmp_path / "a", {"steps": 25, "seed": 0})  # nothing was made yet
    (tmp_path / "a/made.mp4").write_text("")
    with pytest.raises(ValueError, match=r"a: made with steps = 25, now 50; choose another --out"):
        keep_settings(tmp_path / "a", {"steps": 50, "seed": 0})
    assert case_name("a", 1, 1.0000001) != case_name("a", 1, 1) == "a_camera_1_speed_1"
    assert split_case(case_name("a\nb", 1, 1.0000001)) == ("a\nb", 1, 1.0000001)


# ---- videos made elsewhere ----

def noisy(number, frames, speed=1.0, scale=1.0, seed=0):
    path = trajectories.scale_motion(trajectories.recammaster(number, frames, speed), scale, 1)
    path[1:, :3, 3] += 1e-3 * np.random.default_rng(seed).standard_normal((frames - 1, 3))
    return path


def put(folder, poses, case, path):
    """A video called `case` in folder and its poses, as an estimator would find them, in poses."""
    write_video(folder / f"{case}.mp4", np.full((len(path), 16, 16, 3), 99, np.uint8), 24)
    save_poses(poses / folder.name / f"{case}.npz", path)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Two methods' videos of two clips and three paths, one of them limited to 9 of 21 frames; VBench not
    there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outside, "vbench", lambda *a: ({}, "not installed: VBench (x)"))
    for clip in ("bear", "cat"):
        for n in (1, 5, 9):
            put(Path("A"), Path("poses"), case_name(clip, n, 1.0), noisy(n, 21, scale=1.2))
            put(Path("B"), Path("poses"), case_name(clip, n, 1.0), noisy(n, 9, scale=1.1))
    return evaluate.Evaluate(generated="A,B", estimator="poses", paths="1,5,9", out="out")


def results(config):
    return read_results(Path(config.out) / "results.json")["methods"]


def test_scoring_videos_made_elsewhere(elsewhere, capsys):
    evaluate.evaluate(elsewhere)
    methods = results(elsewhere)
    assert list(methods) == ["A", "B"] and len(methods["A"]["cases"]) == 6
    case = methods["B"]["cases"]["cat_camera_9_speed_1"]
    assert case["scale"] == pytest.approx(1.1, abs=0.02)  # 9 frames against the path of 9 frames
    assert (case["clip"], case["path"], case["speed"]) == ("cat", "arc_left", 1.0)
    assert methods["A"]["cases"]["cat_camera_1_speed_1"]["scale"] is None
    assert "Geo-Align (paper)" in (Path("out") / "tables.md").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert [line[:14] for line in printed[-4:-1]] == ["position error", "rotation error", "image         "]
    assert " -> " in printed[-4] and printed[-1] == "out/report.html" and Path(printed[-1]).exists()
    assert max(map(len, printed)) <= 80


def test_missing_and_failed_cases_are_listed(elsewhere):
    Path("A/bear_camera_5_speed_1.mp4").unlink()
    Path("poses/B/cat_camera_9_speed_1.npz").write_bytes(b"PK")
    evaluate.evaluate(elsewhere)
    methods = results(elsewhere)
    assert methods["A"]["cases"]["bear_camera_5_speed_1"]["failed"].startswith("missing")
    assert "cat_camera_9_speed_1.npz" in methods["B"]["cases"]["cat_camera_9_speed_1"]["failed"]
    text = Path("out/tables.md").read_text()
    assert "## Failed: 2" in text and "here, 5 of 6 cases" in text
    assert report.paired(*(m["cases"] for m in methods.values()), "position")["cases"] == 4


def test_finished_cases_are_kept_and_failed_ones_tried_again(elsewhere, monkeypatch):
    bad = Path("poses/B/cat_camera_9_speed_1.npz")
    good = bad.read_bytes()
    bad.write_bytes(b"PK")
    evaluate.evaluate(elsewhere)
    bad.write_bytes(good)
    Path("A/bear_camera_5_speed_1.mp4").write_bytes(Path("A/bear_camera_9_speed_1.mp4").read_bytes() + b"new")
    seen, estimate = [], scores.pose_folder("poses")
    monkeypatch.setattr(scores, "pose_folder", lambda folder: lambda *a: seen.append(a[0]) or estimate(*a))
    evaluate.evaluate(elsewhere)
    assert [str(path) for path in seen] == ["A/bear_camera_5_speed_1.mp4", "B/cat_camera_9_speed_1.mp4"]
    assert "## Failed: 0" in Path("out/tables.md").read_text()


def test_interrupted_scoring_goes_on(elsewhere, monkeypatch):
    """Killed at the k-th file written, for every k, then run again: always the same results."""
    evaluate.evaluate(elsewhere)
    whole, replace = Path("out/results.json").read_text(), os.replace
    shutil.rmtree("out")
    count = 0

    def stop(temporary, path):
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise KeyboardInterrupt
        replace(temporary, path)

    monkeypatch.setattr(files.os, "replace", stop)  # every file is written beside, then renamed
    for _ in range(40):
        try:
            evaluate.evaluate(elsewhere)
            break
        except KeyboardInterrupt:
            pass
    again = Path("out/results.json").read_text()
    whole, again = (json.loads(text) | {"run": None} for text in (whole, again))  # but for date and time
    assert count > 9 and again == whole


def test_vbench_and_met3r_in_the_tables(elsewhere, monkeypatch):
    """Their scores reach the results and are kept, where cameras fail too; what they lack is listed."""
    calls = []

    def vbench(python, videos, dimension):
        calls.append(dimension)
        if dimension == "motion_smoothness":
            return {}, "failed: VBench, motion_smoothness (exit code 1)"
        return {case: 0.75 for case in videos}, None

    def met3r(python, checkout, source, video, number, speed):
        calls.append("met3r")
        assert source.exists() and case_name("bear", number, speed) in str(video)
        if number == 5:
            return {"MEt3R": 0.4}, "failed: Dyn-MEt3R (x)"
        return {"MEt3R": 0.3, "Dyn-MEt3R": 0.8}, None

    monkeypatch.setattr(outside, "vbench", vbench)
    monkeypatch.setattr(outside, "met3r", met3r)
    Path("poses/B/bear_camera_1_speed_1.npz").write_bytes(b"PK")
    write_video(Path("videos/bear.mp4"), np.zeros((21, 32, 32, 3), np.uint8), 24)
    Path("checkout").mkdir()
    Path("checkout/evaluate.py").touch()
    config = dataclasses.replace(elsewhere, videos="videos", redirector="checkout", height=32, width=32)
    evaluate.evaluate(config)
    case = results(config)["A"]["cases"]["bear_camera_5_speed_1"]
    assert case["aesthetic_quality"] == 0.75 and case["MEt3R"] == 0.4 and "Dyn-MEt3R" not in case
    text = Path("out/tables.md").read_text()
    assert "| bear_camera_5_speed_1 | failed: Dyn-MEt3R (x) |" in text and "0.7500" in text
    assert text.count("failed: VBench, motion_smoothness (exit code 1)") == 1
    case = results(config)["B"]["cases"]["bear_camera_1_speed_1"]
    assert "failed" in case and "TransErr" not in case and case["MEt3R"] == 0.3
    before, calls[:] = list(calls), []
    evaluate.evaluate(config)  # only what failed is tried again
    assert len(before) == 2 * (6 + 3) and sorted(calls) == ["met3r"] * 2 + ["motion_smoothness"] * 2


@pytest.mark.parametrize("options, why", [
    ({"generated": ""}, "--weights=FOLDER"), ({"clips": "bear"}, "--videos=FOLDER is needed"),
    ({"speeds": "1.5"}, "none of its 6 videos"), ({"speeds": "fast"}, "speeds"), ({"speeds": "-1"}, "speeds"),
    ({"estimator": "vpie"}, "expected vipe, mapanything or a folder"),
    ({"estimator": "vipe", "vipe": "no/vipe"}, "not installed: ViPE"),
    ({"redirector": "nowhere"}, "nowhere/evaluate.py"), ({"generated": "nowhere"}, "nowhere"),
    ({"log": "nowhere.jsonl"}, "nowhere.jsonl"), ({"show": "bear"}, "show: no case 'bear'")])
def test_settings_that_cannot_be(elsewhere, options, why):
    with pytest.raises((ValueError, OSError), match=why):
        evaluate.evaluate(dataclasses.replace(elsewhere, **options))
    assert not Path("out/A/cases/bear_camera_1_speed_1.json").exists()


def test_two_ranks_share_the_cases(elsewhere):
    """Without torchrun's launcher: two processes that find each other as its ranks do."""
    flags = [f"--{key}={getattr(elsewhere, key)}" for key in ("generated", "estimator", "paths")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate as e; e.run_command('e', '', e.COMMANDS, sys.argv[1:])"
    processes = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "PYTHONPATH": "",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        processes.append(subprocess.Popen([sys.executable, "-c", code, *flags, "--out=two"], env=env))
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    evaluate.evaluate(elsewhere)
    two, one = (results(dataclasses.replace(elsewhere, out=out)) for out in ("two", "out"))
    assert {m: x["cases"] for m, x in two.items()} == {m: x["cases"] for m, x in one.items()}


def test_comparing_evaluations(elsewhere, capsys):
    evaluate.evaluate(dataclasses.replace(elsewhere, generated="A", paths="1,5", out="a"))
    evaluate.evaluate(dataclasses.replace(elsewhere, generated="B", paths="5,9", out="b"))
    capsys.readouterr()
    main(["compare", "a", "b/results.json", "--out=c"])
    printed = capsys.readouterr().out.splitlines()
    text = Path("c/tables.md").read_text()
    assert "## B against A, all speeds" in text and "| Position error (m) ↓ | 2 |" in text
    assert printed[-1] == "c/report.html" and "<h3>B against A" in Path("c/report.html").read_text()
    assert max(map(len, printed)) <= 80


def edited(file, edit):
    """Evaluation d: another one's results with something changed in them."""
    results = json.loads(Path(file).read_text())
    edit(results)
    Path("d").mkdir(exist_ok=True)
    Path("d/results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("edit, why", [
    (lambda r: r["settings"].update(estimator="vipe"), "different estimators"),
    (lambda r: r["methods"]["B"].update(cases={"x_camera_1_speed_1": {"failed": "x"}}), "no case in common"),
    (lambda r: r["methods"]["B"]["cases"]["cat_camera_5_speed_1"].update(digest="another"),
     "1 cases of one name .* a and d, cat_camera_5_speed_1 first")])
def test_what_cannot_be_compared(elsewhere, edit, why):
    for name in "AB":
        evaluate.evaluate(dataclasses.replace(elsewhere, generated=name, paths="5", out=name.lower()))
    edited("b/results.json", edit)
    with pytest.raises(ValueError, match=why):
        main(["compare", "a/results.json", "d"])
    for argv, error in ((["a", "a/results.json"], "two different"), (["a", "none"], "none: no results.json"),
                        (["a", "b", "--show=x"], "show: no case 'x'")):
        with pytest.raises((ValueError, OSError), match=error):
            main(["compare", *argv])


# ---- the whole of it, on tiny random weights in the official layout ----

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Weights, a checkpoint equal to ReDirector's and one that is not, two clips, one broken, cameras,
    captions."""
    folder = tmp_path_factory.mktemp("clips")
    weights = tiny_weights.write(folder / "weights")
    state = load_file(weights / tiny_weights.REDIRECTOR)
    save_file(state, folder / "same.safetensors")
    save_file({k: 1.5 * v for k, v in state.items()}, folder / "other.safetensors")
    rng = np.random.default_rng(0)
    write_video(folder / "videos/bear.mp4", rng.integers(0, 255, (8, 40, 32, 3), np.uint8), 24)
    (folder / "videos/broken.mp4").write_bytes(b"garbage")
    (folder / "cameras").mkdir()
    intrinsics = np.array([1, 1, 0.5, 0.5])
    np.savez(folder / "cameras/bear.npz", c2w=trajectories.recammaster(5, 8), intrinsics=intrinsics)
    (folder / "captions.csv").write_text("file_name,text\nbear.mp4,a bear\nbroken.mp4,nothing\n")
    for method in ("base", "same", "other"):
        for n in (1, 9):
            save_poses(folder / f"poses/{method}/bear_camera_{n}_speed_1.npz", noisy(n, 5))
    return folder


@pytest.fixture
def protocol(clips, tmp_path, monkeypatch):
    """The paper's protocol in small: 2 paths, 5 frames of 32 x 32, 1 step."""
    monkeypatch.setattr(outside, "vbench", lambda *a: ({}, "not installed: VBench (x)"))
    folders = {name: str(clips / name) for name in ("videos", "weights", "cameras")}
    return evaluate.Evaluate(**folders, ckpt=f"{clips / 'same.safetensors'},{clips / 'other.safetensors'}", paths="1,9",
                  height=32, width=32, steps=1, captions=str(clips / "captions.csv"),
                  estimator=str(clips / "poses"), out=str(tmp_path / "out"))


def test_protocol(protocol, monkeypatch):
    """Generate, score, go on after an interruption; equal weights make equal videos, other weights do not."""
    out, written, write = Path(protocol.out), [], write_video

    def stop_once(path, *rest):
        if len(written) == 4:
            written.append("interrupted")
            raise KeyboardInterrupt
        written.append(Path(path).relative_to(out).as_posix() if out in Path(path).parents else "report")
        write(path, *rest)

    for module in (generating, source_videos):
        monkeypatch.setattr(module, "write_video", stop_once)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(protocol)
    evaluate.evaluate(protocol)
    videos = [f"{m}/videos/bear_camera_{n}_speed_1.mp4" for m in ("base", "same", "other") for n in (1, 9)]
    assert [x for x in written if x not in ("report", "interrupted")] == ["sources/bear.mp4", *videos]
    read = {x: (out / x).read_bytes() for x in videos}
    assert read[videos[0]] == read[videos[2]] and read[videos[1]] == read[videos[3]]
    assert read[videos[0]] != read[videos[4]] and read[videos[0]] != read[videos[1]]
    assert read_video(out / videos[0])[0].shape == (5, 32, 32, 3)
    methods = results(protocol)
    assert list(methods) == ["base", "same", "other"]
    assert methods["same"]["cases"]["broken_camera_9_speed_1"]["failed"].startswith("source: ")
    assert "failed" not in methods["other"]["cases"]["bear_camera_9_speed_1"]
    page = (out / "report.html").read_text()
    assert page.count("<video") == 1 and page.count(">From above <") == 2  # two good cases, one control


def test_settings_are_kept(protocol):
    keep_settings(Path(protocol.out) / "base/videos", {"steps": 50})
    (Path(protocol.out) / "base/videos/made.mp4").write_text("")
    with pytest.raises(ValueError, match="base/videos: made with steps = 50, now 1"):
        evaluate.evaluate(protocol)


def test_noise_depends_on_case_and_seed_alone(clips):
    """Not on what else is generated with it, nor on the model."""
    drawn = []

    class Recorder(torch.nn.Module):
        def prepare(self, condition):
            return condition

        def forward(self, x, t, condition):
            drawn.append(x)
            return torch.zeros_like(x)

    codec = type("Codec", (), {"decode": staticmethod(lambda x: x[:, :3])})
    row = model.Condition(torch.zeros(1, 1, 4), None, torch.zeros(1, 16, 2, 4, 4))
    both = model.Condition.cat([row, row])
    options = dict(steps=1, shift=5.0)
    together = generate(Recorder(), codec, both, ["a", "b"], **options)
    alone = generate(Recorder(), codec, row, ["b"], **options)
    assert torch.equal(drawn[0][1], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[0][1])
    assert torch.equal(together[1], alone[0]) and together.shape == (2, 2, 4, 4, 3)
    generate(Recorder(), codec, row, ["b"], seed=1, **options)
    assert not torch.equal(drawn[1], drawn[2])


# ---- the toy ----

def test_a_room_is_the_same_among_few_or_many():
    """Room i, its source path and video depend on (seed, i) alone."""
    codec = fit_codec(render(rooms(2, 0), torch.eye(4).expand(2, FRAMES, 4, 4))[0])
    few, many = sources(2, 7, codec), sources(5, 7, codec)
    assert all(torch.equal(x, y[:2]) for x, y in zip(vars(few[0]).values(), vars(many[0]).values()))
    assert torch.equal(few[1], many[1][:2]) and torch.equal(few[3], many[3][:2])
    assert not torch.equal(many[3][0], many[3][1]) and not torch.equal(sources(2, 8, codec)[3], few[3])


@pytest.fixture
def toy_weights(tmp_path, monkeypatch):
    """A small random base and a checkpoint of it; the judge sees every camera go 20 % too far, but for NaN
    once."""
    torch.manual_seed(0)
    config = model.Config(dim=32 * HEADS, num_heads=HEADS, num_layers=1, ffn_dim=64,
                          text_dim=TEXT, camera_dim=24, roce=True)
    state = model.DiT(config).state_dict()
    save_file(state, tmp_path / "toy_base.safetensors")
    save_file({k: v + 0.1 for k, v in state.items() if ".self_attn." in k}, tmp_path / "tuned.safetensors")
    base = model.load_dit(tmp_path / "toy_base.safetensors", num_heads=HEADS)
    codec = fit_codec(render(rooms(2, 0), torch.eye(4).expand(2, FRAMES, 4, 4))[0])
    judged = []

    def judge(video, room, guess, codec):
        judged.append(len(video))
        far = guess.clone()
        far[..., :3, 3] *= 1.2
        far[4, 2, 0, 3] = float("nan")
        return far, None

    monkeypatch.setattr(toy_evaluation, "open_weights", lambda folder: (base, codec, None))
    monkeypatch.setattr(toy_evaluation, "judge", judge)
    return tmp_path, judged


def test_toy(toy_weights):
    folder, judged = toy_weights
    argv = ["toy", f"--weights={folder}", f"--ckpt={folder / 'tuned.safetensors'}", f"--out={folder / 'out'}",
            "--rooms=1", "--steps=1", "--speeds=1,2"]
    main(argv)
    methods = read_results(folder / "out/results.json")["methods"]
    assert list(methods) == ["base", "tuned"] and [len(m["cases"]) for m in methods.values()] == [20, 20]
    case = methods["tuned"]["cases"]["room0_camera_9_speed_2"]
    assert case["scale"] == pytest.approx(1.2, abs=1e-4) and case["TransErr"] == pytest.approx(0, abs=1e-4)
    assert "not finite" in methods["base"]["cases"]["room0_camera_5_speed_1"]["failed"]
    text = (folder / "out/tables.md").read_text()
    assert "## Failed: 4" in text and "## Table 2: by camera speed" in text and "(paper)" not in text
    assert {c: x["digest"] for c, x in methods["base"]["cases"].items()} == {
        c: x["digest"] for c, x in methods["tuned"]["cases"].items()}
    assert len({x["digest"] for x in methods["base"]["cases"].values()}) == 20
    page = (folder / "out/report.html").read_text()
    assert page.count("<video") == 1 and "of 18 cases by change of position error" in page
    main(argv)
    assert judged == [10] * 4  # room by room; nothing twice
    with pytest.raises(ValueError, match="base/cases: made with steps = 1, now 2"):
        main([*argv, "--steps=2"])


# ---- retake ----

def retake(clips, out, *flags):
    main(["retake", str(clips / "videos/bear.mp4"), f"--weights={clips / 'weights'}", "--steps=1",
          f"--cameras={clips / 'cameras/bear.npz'}", "--prompt=a bear", "--height=32", "--width=48",
          f"--out={out}", *flags])


def test_retake(clips, tmp_path):
    retake(clips, tmp_path, "--camera=arc_left", "--speed=1.5", f"--ckpt={clips / 'other.safetensors'}")
    new, fps = read_video(tmp_path / "bear_arc_left_1.5.mp4")
    assert new.shape == (5, 32, 48, 3) and fps == 24  # 8 frames: 5 is the largest 4k + 1
    both, _ = read_video(tmp_path / "bear_arc_left_1.5_side_by_side.mp4")
    assert both.shape[2] == 2 * 48 + 4 and len(both) == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_given_is_estimated(clips, tmp_path, monkeypatch):
    """Source cameras by MapAnything, the caption by BLIP-2 from the middle frame."""
    seen = []

    def cameras(videos):
        n, t = videos.shape[:2]
        c2w = torch.from_numpy(noisy(9, t))[None] * torch.ones(n, 1, 1, 1)
        return c2w, torch.tensor([[0.8, 1.2, 0.5, 0.5]]).expand(n, 4)

    def mapanything(folder, device):
        seen.append(Path(folder))
        return type("Estimator", (), {"cameras": staticmethod(cameras)})

    def caption(frame, *rest):
        seen.append(frame)
        return "a bear, says BLIP-2"

    def recorded(*args, original=retaking.encode_clip):
        seen.append(args[1])
        return original(*args)

    monkeypatch.setattr(reward_models, "mapanything", mapanything)
    monkeypatch.setattr(retaking, "describe_frame", caption)
    monkeypatch.setattr(retaking, "encode_clip", recorded)
    maps = []
    monkeypatch.setattr(trajectories, "camera_maps", lambda *args, original=trajectories.camera_maps: (
        maps.append(args) or original(*args)))
    main(["retake", str(clips / "videos/bear.mp4"), f"--weights={clips / 'weights'}", "--steps=1",
          "--height=32", "--width=32", f"--out={tmp_path}"])
    video = read_video(clips / "videos/bear.mp4", frames=5, size=(32, 32))[0]
    assert seen[0] == clips / "weights/map-anything" and seen[2] == "a bear, says BLIP-2"
    assert np.array_equal(seen[1], video[2])
    (target, intrinsics, *_), (source, *_) = maps
    assert np.allclose(target[0], trajectories.recammaster("arc_left", 5))
    assert np.allclose(source[0], trajectories.relative(noisy(9, 5)))
    assert intrinsics[0].tolist() == pytest.approx([0.8, 1.2, 0.5, 0.5])


@pytest.mark.parametrize("flags, why", [
    (["--camera=arc_lft"], "no path 'arc_lft'"), (["--width=50"], "multiples of 16"),
    (["--ckpt=none"], "no checkpoint"), (["--cameras=none.npz"], "none.npz: no such camera file"),
    (["--speeed=2"], "did you mean speed?"), (["--speed=fast"], "expected float"),
    (["--stride=2"], "too short, 4 frames"), (["--weights=none"], "none/")])
def test_retakes_that_cannot_be(clips, tmp_path, flags, why):
    with pytest.raises((ValueError, OSError), match=why):
        retake(clips, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("clip, why", [
    ("none.mp4", "no such video"), ("broken.mp4", "unreadable"), ("empty.mp4", "empty")])
def test_retakes_of_what_is_no_video(clips, tmp_path, clip, why):
    shutil.copyfile(clips / "videos/broken.mp4", tmp_path / "broken.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises((ValueError, OSError), match=why):
        main(["retake", str(tmp_path / clip), f"--weights={clips / 'weights'}"])


# ---- the command line ----

def test_help_and_unknown_commands(capsys):
    for argv, words in ((["--help"], "--videos=DAVIS"), (["retake", "--help"], "your own video, re-rendered"),
                        ([], "retake")):
        run_command("evaluate.py", evaluate.__doc__, evaluate.COMMANDS, argv or ["--help"])
        assert words in capsys.readouterr().out
    with pytest.raises(ValueError, match="no command 'retke'; did you mean retake?"):
        main(["retke", "clip.mp4"])
    with pytest.raises(ValueError, match="did you mean guidance?"):
        main(["--guidence=3"])


def test_errors_are_one_line(tmp_path):
    command = [sys.executable, ROOT / "evaluate.py", "compare", "none/a.json", "none/b.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none/a.json" in done.stderr
