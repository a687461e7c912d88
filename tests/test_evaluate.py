"""evaluate.py: scores with known answers, then each command from beginning to end.

Bad input is in test_inputs.py; here is only what needs an evaluation to be made first."""
import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_weights
import torch
from conftest import ROOT, refused
from safetensors.torch import load_file, save_file
from scenes import as_ranks, pose, put
from scipy.spatial.transform import Rotation

import evaluate
import trajectories
from data.video import read_video, write_video
from evaluation import generate as generating
from evaluation import retake as retaking
from evaluation import outside, scores
from evaluation import toy as toy_evaluation
from evaluation.cases import case_name, find_checkpoints, find_clips, find_generated
from evaluation.scores import pose_scores, save_poses
from plumbing.settings import choose_command
from pretrained import reward_models
from trajectories import recammaster, scale_motion

NO_VBENCH = lambda *args: ({}, "not installed: VBench (x)")


def main(*argv):
    """evaluate.py as from the command line, but with its errors raised."""
    settings, function = choose_command(evaluate.COMMANDS, [str(x) for x in argv])
    return function(settings)


def touch(folder, *names):
    for name in names:
        put(folder / name, "")
    return folder


def results(out):
    return json.loads((Path(out) / "results.json").read_text())["methods"]


# ---- pose scores ----

WALKED = np.zeros((41, 4, 4))
WALKED[:, 2, 3] = np.linspace(0, 1, 41)


@pytest.mark.parametrize("numbers, change, wanted", [
    (range(1, 11), lambda c2w: pose(np.random.default_rng(0)) @ c2w, lambda length, angle: {}),
    ((5, 8, 9), lambda c2w: scale_motion(c2w, 1.2, 1), lambda length, angle: {
        "scale": 1.2, "position": 0.2 * length.mean()}),
    ((1, 4), lambda c2w: scale_motion(c2w, 1, 1.5), lambda length, angle: {
        "rotation": 0.5 * angle.mean(), "RotErr": 0.5 * np.abs(angle - angle[:, None]).sum() / (41 * 40)}),
    ((1,), lambda c2w: c2w + WALKED, lambda length, angle: {"position": 0.5})],
    ids=["right", "too far", "turned too far", "walked on the spot"])
def test_what_is_off_and_nothing_else_is_scored(numbers, change, wanted):
    """Closed forms, any world frame. TransErr aligns, position does not; no scale if still."""
    for path in (recammaster(number, 41) for number in numbers):
        length = np.linalg.norm(path[:, :3, 3], axis=1)
        angle = np.degrees(Rotation.from_matrix(path[:, :3, :3]).magnitude())
        moves = length.max() > 0
        right = {"TransErr": 0, "TransErr_moving": 0 if moves else None, "RotErr": 0, "position": 0,
                 "rotation": 0, "scale": 1 if moves else None} | wanted(length, angle)
        for key, x in pose_scores(change(path), path).items():
            assert x is right[key] is None or x == pytest.approx(right[key], abs=2e-6), key


def test_what_is_no_estimate_fails():
    path = recammaster(9, 21)
    for pred, why in ((path * np.nan, "not finite"), (path[:1], "1 pose, which is no path"),
                      (path[[7] * 21], "the estimated camera stands still: 21 equal poses")):
        assert why in pose_scores(pred, path[:len(pred)])["failed"]
    assert "failed" not in pose_scores(path[[0] * 21], path[[0] * 21])  # the path asked for stands still


def test_what_is_found_by_name(tmp_path):
    """Clips, those asked for in their order; videos made elsewhere; checkpoints, runs by their last."""
    clips = touch(tmp_path / "clips", "bear.mp4", "b/cat.MOV", "dog/00000.jpg", "dog/00001.jpg")
    assert find_clips(clips) == {"b_cat": "b/cat.MOV", "bear": "bear.mp4", "dog": "dog"}
    assert list(find_clips(clips, str(put(tmp_path / "s.txt", "dog\n\nbear.mp4\n")))) == ["dog", "bear"]
    refused(lambda: find_clips(clips, "dog, beer, wolf"), "2 of 3 are", "wolf; did you mean bear?")
    refused(lambda: find_clips(touch(clips, "b_cat.mp4")), "would both be called b_cat")
    made = touch(tmp_path / "made", "x_camera_9_speed_1.0.mp4", "sub/x_camera_1_speed_1.5.mp4")
    assert set(find_generated(made)) == {"x_camera_9_speed_1", "x_camera_1_speed_1.5"}
    refused(lambda: find_generated(touch(made, "x_camera_09_speed_1.mkv")), "are both x_camera_9_speed_1")
    run = touch(tmp_path / "run", *(f"iteration_{n:06d}/self_attn.safetensors" for n in (2, 10)))
    found = find_checkpoints(f"{run}, {run / 'iteration_000002'}")
    assert list(found) == ["base", "run-iteration_000010", "run-iteration_000002"]
    refused(lambda: find_checkpoints(f"{run},{run}"), "different names")


# ---- videos made elsewhere ----

def noisy(number, frames, scale=1.0):
    path = scale_motion(recammaster(number, frames), scale, 1)
    path[1:, :3, 3] += 1e-3 * np.random.default_rng(0).standard_normal((frames - 1, 3))
    return path


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Two methods' videos of two clips and three paths, one limited to 9 of 21 frames; no VBench."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outside, "vbench", NO_VBENCH)
    for clip, n in [(clip, n) for clip in ("bear", "cat") for n in (1, 5, 9)]:
        for method, frames, scale in (("A", 21, 1.2), ("B", 9, 1.1)):
            file = f"{method}/{case_name(clip, n, 1.0)}"
            write_video(Path(f"{file}.mp4"), np.full((frames, 16, 16, 3), 99, np.uint8), 24)
            save_poses(Path(f"poses/{file}.npz"), noisy(n, frames, scale))
    return evaluate.Evaluate(generated="A,B", estimator="poses", paths="1,5,9", out="out")


def test_videos_made_elsewhere(elsewhere, monkeypatch):
    """Cameras, VBench and MEt3R reach results and tables; an estimate of n frames is compared with the
    path of n frames; what is missing or failed is listed, and it alone is tried again."""
    calls = []

    def vbench(python, videos, dimension):
        calls.append(dimension)
        failed = dimension == "motion_smoothness"
        return ({}, "failed: VBench (x)") if failed else ({case: 0.75 for case in videos}, None)

    def met3r(python, checkout, source, video, number, speed):
        calls.append(f"met3r {number}")
        if number == 5:
            return {"MEt3R": 0.4}, "failed: Dyn-MEt3R (x)"
        return {"MEt3R": 0.3, "Dyn-MEt3R": 0.8}, None
    monkeypatch.setattr(outside, "vbench", vbench)
    monkeypatch.setattr(outside, "met3r", met3r)
    write_video(Path("videos/bear.mp4"), np.zeros((21, 32, 32, 3), np.uint8), 24)
    touch(Path("checkout"), "evaluate.py")
    bad, lost = Path("poses/B/bear_camera_9_speed_1.npz"), Path("A/bear_camera_1_speed_1.mp4")
    kept = bad.read_bytes()
    bad.write_bytes(b"PK")
    lost.rename("elsewhere.mp4")
    config = dataclasses.replace(elsewhere, videos="videos", redirector="checkout", height=32, width=32)
    evaluate.evaluate(config)
    a, b = (method["cases"] for method in results("out").values())
    assert a[lost.stem]["failed"].startswith("missing") and bad.name in b[bad.stem]["failed"]
    case = b["bear_camera_5_speed_1"]
    assert case["aesthetic_quality"] == 0.75 and case["MEt3R"] == 0.4
    assert case["scale"] == pytest.approx(1.1, abs=0.02)
    text = Path("out/tables.md").read_text()
    assert "## Failed: " in text and "here, 2 of 3 cases" in text and text.count("VBench (x)") == 1
    bad.write_bytes(kept)
    Path("elsewhere.mp4").rename(lost)
    estimate, seen = scores.pose_folder("poses"), []
    monkeypatch.setattr(scores, "pose_folder", lambda x: lambda *a: seen.append(str(a[0])) or estimate(*a))
    calls.clear()
    evaluate.evaluate(config)
    assert seen == [str(lost), f"B/{bad.stem}.mp4"] and calls.count("motion_smoothness") == 2
    assert sorted(x for x in calls if "met3r" in x) == ["met3r 1", "met3r 5", "met3r 5"]


def without_vbench(config):
    """Evaluates, in a process that the fixture did not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "vbench", NO_VBENCH)
        evaluate.evaluate(config)


def test_two_ranks_come_to_the_same(elsewhere):
    evaluate.evaluate(dataclasses.replace(elsewhere, out="one"))
    as_ranks(partial(without_vbench, dataclasses.replace(elsewhere, out="two")), Path("said"))
    assert results("two") == results("one")


def test_comparing_evaluations(elsewhere):
    """On the cases that both have; what cannot be compared is refused."""
    for name, paths in (("A", "1,5"), ("B", "5,9")):
        evaluate.evaluate(dataclasses.replace(elsewhere, generated=name, paths=paths, out=name.lower()))
    main("compare", "a", "b/results.json", "--out=c")
    text = Path("c/tables.md").read_text()
    assert "## B against A, all speeds" in text and "| Position error (m) ↓ | 2 |" in text
    made = json.loads(Path("b/results.json").read_text())
    cases = made["methods"]["B"]["cases"]
    cases["cat_camera_5_speed_1"]["digest"] = "another"
    for change, why in (
            ({"settings": made["settings"] | {"estimator": "vipe"}}, "different estimators"),
            ({"methods": {"B": {"cases": {"x_camera_1_speed_1": {"failed": "x"}}}}}, "no case in common"),
            ({"methods": {"B": {"cases": cases}}}, "a and d, cat_camera_5_speed_1")):
        put(Path("d/results.json"), made | change)
        refused(lambda: main("compare", "a", "d"), why)
    refused(lambda: main("compare", "a", "b", "--show=x"), "show: no case 'x'")


# ---- the whole of it, on tiny random weights in the official layout ----

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Weights, a checkpoint like ReDirector's and another, two clips, one of them broken."""
    folder = tmp_path_factory.mktemp("clips")
    state = load_file(tiny_weights.write(folder / "weights") / tiny_weights.REDIRECTOR)
    save_file(state, folder / "same.safetensors")
    save_file({k: 1.5 * v for k, v in state.items()}, folder / "other.safetensors")
    video = np.random.default_rng(0).integers(0, 255, (8, 40, 32, 3), np.uint8)
    write_video(folder / "videos/bear.mp4", video, 24)
    put(folder / "videos/broken.mp4", b"garbage")
    put(folder / "cameras/bear.npz", {"c2w": recammaster(5, 8), "intrinsics": [1, 1, 0.5, 0.5]})
    put(folder / "captions.csv", "file_name,text\nbear.mp4,a bear\nbroken.mp4,nothing\n")
    for method, n in [(method, n) for method in ("base", "same", "other") for n in (1, 9)]:
        save_poses(folder / f"poses/{method}/bear_camera_{n}_speed_1.npz", noisy(n, 5))
    return folder


def test_protocol(clips, tmp_path, monkeypatch):
    """Generate and score. Noise depends on case and seed alone: equal weights make equal videos, also
    with fewer paths; other weights and paths do not. Other settings are refused."""
    monkeypatch.setattr(outside, "vbench", NO_VBENCH)
    config = evaluate.Evaluate(
        **{name: str(clips / name) for name in ("videos", "weights", "cameras")}, paths="1,9", steps=1,
        ckpt=f"{clips / 'same.safetensors'},{clips / 'other.safetensors'}", height=32, width=32,
        captions=str(clips / "captions.csv"), estimator=str(clips / "poses"), out=str(tmp_path / "out"))
    evaluate.evaluate(config)
    videos = [f"{m}/videos/bear_camera_{n}_speed_1.mp4" for m in ("base", "same", "other") for n in (1, 9)]
    base1, base9, same1, same9, other1, _ = (tmp_path.joinpath("out", x).read_bytes() for x in videos)
    assert base1 == same1 != base9 == same9 and base1 != other1
    assert read_video(tmp_path / "out" / videos[0])[0].shape == (5, 32, 32, 3)
    found = results(tmp_path / "out")
    assert found["same"]["cases"]["broken_camera_9_speed_1"]["failed"].startswith("source: ")
    assert "failed" not in found["other"]["cases"]["bear_camera_9_speed_1"]
    written = []
    monkeypatch.setattr(generating, "write_video", lambda path, *rest: written.append(path.parts[-3:])
                        or write_video(path, *rest))
    (tmp_path / "out" / videos[2]).unlink()
    evaluate.evaluate(config)
    assert ["/".join(parts) for parts in written] == videos[2:3]  # what is there is not made again
    alone = dataclasses.replace(config, paths="9", ckpt="", clips="bear", out=str(tmp_path / "alone"))
    evaluate.evaluate(alone)
    assert (tmp_path / "alone" / videos[1]).read_bytes() == base9
    other = dataclasses.replace(config, steps=50, seed=1)
    refused(lambda: evaluate.evaluate(other), "base/videos: made with", "1, now 50", "seed = 0, now 1")


def test_retake(clips, tmp_path, monkeypatch):
    """The largest 4k + 1 of 8 frames, re-rendered, and both side by side. What is not given is
    estimated: source cameras by MapAnything, the caption by BLIP-2 from the middle frame."""
    seen, maps, of = [], [], trajectories.camera_maps

    class Estimator:
        cameras = staticmethod(lambda videos: (torch.from_numpy(noisy(9, videos.shape[1]))[None],
                                               torch.tensor([[0.8, 1.2, 0.5, 0.5]])))
    monkeypatch.setattr(reward_models, "mapanything", lambda *args: Estimator)
    monkeypatch.setattr(retaking, "describe_frame", lambda frame, *args: seen.append(frame) or "a bear")
    monkeypatch.setattr(trajectories, "camera_maps", lambda *args: maps.append(args) or of(*args))
    main("retake", clips / "videos/bear.mp4", f"--weights={clips / 'weights'}", f"--out={tmp_path}",
         "--steps=1", "--speed=1.5", f"--ckpt={clips / 'other.safetensors'}", "--height=32", "--width=48")
    assert np.array_equal(seen[0], read_video(clips / "videos/bear.mp4", frames=5, size=(32, 48))[0][2])
    (target, intrinsics, *_), (source, *_) = maps
    assert np.allclose(target[0], recammaster("arc_left", 5, 1.5))
    assert np.allclose(source[0], trajectories.relative(noisy(9, 5)))
    assert intrinsics[0].tolist() == pytest.approx([0.8, 1.2, 0.5, 0.5])
    new, fps = read_video(tmp_path / "bear_arc_left_1.5.mp4")
    assert new.shape == (5, 32, 48, 3) and fps == 24 and len(list(tmp_path.iterdir())) == 2


def test_toy(tmp_path, monkeypatch):
    """Base and checkpoint, one room; a judge who sees all go 20 % too far, but for NaN once."""
    state = load_file(ROOT / "toy/weights/toy_base.safetensors")
    save_file({k: v + 0.1 for k, v in state.items() if ".self_attn." in k}, tmp_path / "tuned.safetensors")
    judged = []

    def judge(video, room, guess, codec):
        judged.append(len(video))
        far = guess.clone()
        far[..., :3, 3] *= 1.2
        far[4, 2, 0, 3] = float("nan")
        return far, None
    monkeypatch.setattr(toy_evaluation, "judge", judge)
    argv = ["toy", f"--weights={ROOT / 'toy/weights'}", f"--ckpt={tmp_path / 'tuned.safetensors'}",
            "--rooms=1", "--steps=1", "--speeds=2", f"--out={tmp_path / 'out'}"]
    main(*argv)
    base, tuned = (method["cases"] for method in results(tmp_path / "out").values())
    case = tuned["room0_camera_9_speed_2"]
    assert (case["scale"], case["TransErr"]) == pytest.approx((1.2, 0), abs=1e-4)
    assert "not finite" in base["room0_camera_5_speed_2"]["failed"]
    digests = [[x["digest"] for x in cases.values()] for cases in (base, tuned)]
    assert digests[0] == digests[1] and len(set(digests[0])) == 10
    main(*argv)
    assert judged == [10] * 2  # room by room; nothing twice
    refused(lambda: main(*argv, "--steps=2"), "base/cases: made with steps = 1, now 2")
