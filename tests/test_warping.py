"""TrajectoryCrafter and CogNVS: where their warping puts the camera, what is written for them, what comes back."""
import dataclasses
import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy.spatial.transform import Rotation
from test_outside import program
from scenes import clip

import evaluate
import trajectories
from data.video import read_video, write_video
from evaluation import outside
from evaluation.scores import save_poses
from evaluation.warping import Warp, fit_target_pose, target_pose, transforms, warp

# theta phi r x y of the ten paths at 49 frames and speed 1, and --radius_scale, as the design card gives them
TABLE = {1: ("1e-9", "0 -11.925 0 0 0"), 2: ("1e-9", "0 11.925 0 0 0"), 3: ("1e-9", "-5.963 0 0 0 0"),
         4: ("1e-9", "5.963 0 0 0 0"), 5: ("1e9", "0 0 0.239 0 0"), 6: ("1e9", "0 0 -0.239 0 0"),
         7: ("1e-9", "8.436 0 0 0 0.596"), 8: ("1e-9", "-8.436 0 0 0 -0.596"),
         9: ("1e9", "0 -17.765 0.01 0.324 0"), 10: ("1e9", "0 17.765 0.01 -0.324 0")}


def walk(frames):
    """A source path that moves and turns."""
    c2w = trajectories.recammaster(9, frames)
    c2w[:, :3, :3] = c2w[:, :3, :3] @ Rotation.from_rotvec(0.02 * np.outer(np.arange(frames), [1, 2, 3])).as_matrix()
    return trajectories.relative(c2w)


def angles(a, b):
    return Rotation.from_matrix(a[:, :3, :3].swapaxes(1, 2) @ b[:, :3, :3]).magnitude()


@pytest.mark.parametrize("number", range(1, 11))
def test_forward_warp_puts_the_camera_where_our_path_does(number):
    """Both move what the source's camera i sees by T2[i] inv(T1[i]): a point of the world, seen by the source
    at p, must be where our target's camera sees it; so that camera, carried by the source's, is our target's."""
    source, target = walk(21), trajectories.recammaster(number, 21, 1.5)
    T1, T2 = transforms(source, target)
    M = T2 @ np.linalg.inv(T1)
    found = source @ np.linalg.inv(M)
    assert np.abs(found[:, :3, 3] - target[:, :3, 3]).max() < 1e-6 and angles(found, target).max() < 1e-5
    world = np.random.default_rng(0).normal(size=(4, 5)) + [[0], [0], [5], [0]]
    world[3] = 1
    seen = np.linalg.inv(source) @ world
    np.testing.assert_allclose(M @ seen, np.linalg.inv(target) @ world, atol=1e-6)


@pytest.mark.parametrize("number", range(1, 11))
def test_target_pose_of_the_ten_paths(number):
    target = trajectories.recammaster(number, 49)
    values, radius, distance, angle = fit_target_pose(target)
    scale, wanted = TABLE[number]
    assert [f"{x:g}" for x in values] == wanted.split() and (radius > 1) == (scale == "1e9")
    assert distance < 0.09 and angle < 0.18
    made = target_pose(values, radius, 49)
    assert np.abs(made[0] - np.eye(4)).max() < 1e-12
    assert np.linalg.norm(made[:, :3, 3] - target[:, :3, 3], axis=1).max() == pytest.approx(distance)
    if number < 5:  # turns on the spot are exact, whatever their speed
        values, radius, distance, angle = fit_target_pose(trajectories.recammaster(number, 33, 2.0))
        assert distance < 1e-6 and angle < 1e-3


def test_target_pose_by_their_formula():
    """One pose, step by step: the camera starts at the identity but for two axes, is moved by (-x, y, -r radius),
    turned about x by theta and then about y by phi, and moved by the radius along z; the result is taken for
    world-to-camera."""
    theta, phi, r, x, y, radius = 10.0, -20.0, 0.1, 0.2, 0.3, 5.0
    pose = np.diag([-1.0, 1, -1, 1])
    pose[:3, 3] = -x, y, -r * radius
    a, b = np.radians([theta, phi])
    about_x = [[1, 0, 0, 0], [0, np.cos(a), -np.sin(a), 0], [0, np.sin(a), np.cos(a), 0], [0, 0, 0, 1]]
    about_y = [[np.cos(b), 0, np.sin(b), 0], [0, 1, 0, 0], [-np.sin(b), 0, np.cos(b), 0], [0, 0, 0, 1]]
    pose = np.array(about_y) @ np.array(about_x) @ pose
    first = np.diag([-1.0, 1, -1, 1])
    pose[2, 3] += radius
    first[2, 3] += radius
    moved = pose @ np.linalg.inv(first)  # forward_warp's T2 inv(T1), source standing still
    np.testing.assert_allclose(np.linalg.inv(target_pose([theta, phi, r, x, y], radius, 5)[-1]), moved, atol=1e-12)


@pytest.fixture
def sources(tmp_path):
    """An evaluation's sources: two clips of 13 frames, and their cameras."""
    for i, name in enumerate("ab"):
        write_video(tmp_path / f"E/sources/{name}.mp4", np.roll(clip(13), i, 0), 24)
        save_poses(tmp_path / f"cameras/{name}.npz", walk(13))
    return tmp_path


def there(folder, method, **options):
    config = Warp(method=method, evaluation=str(folder / "E"), cameras=str(folder / "cameras"), paths="5,9",
                  out=str(folder / "W"), **options)
    warp(config)
    return config, json.loads((folder / "W/cases.json").read_text())


def test_cognvs_there_and_back(sources):
    """49 frames there, the last repeated; what comes back is cut and resized, and enters the tables."""
    config, sent = there(sources, "CogNVS")
    video = read_video(sources / "W/inputs/a.mp4")[0]
    assert len(video) == 49 and np.abs(video[12:].astype(int) - video[12]).max() < 3
    with np.load(sources / "W/poses/b_camera_9_speed_1.npz") as poses:
        T1, T2 = poses["T1"], poses["T2"]
    assert T1.shape == T2.shape == (49, 4, 4) and np.array_equal(T2[12:], np.repeat(T2[12:13], 37, 0))
    np.testing.assert_allclose(np.linalg.inv(T1[:13]), walk(13), atol=1e-12)
    np.testing.assert_allclose(np.linalg.inv(T2[:13]), trajectories.recammaster(9, 13), atol=1e-12)
    assert not (sources / "W/commands.sh").exists() and len(sent["cases"]) == 4
    for case in list(sent["cases"])[:3]:
        write_video(sources / f"R/{case}.mp4", clip(49, 60, 90), 8)
    missing = warp(dataclasses.replace(config, back=str(sources / "R"))) or ["b_camera_9_speed_1"]
    assert missing == ["b_camera_9_speed_1"]
    back, fps = read_video(sources / "W/CogNVS/a_camera_5_speed_1.mp4")
    assert back.shape == read_video(sources / "E/sources/a.mp4")[0].shape and fps == 24
    for case in sent["cases"]:
        save_poses(sources / f"poses/CogNVS/{case}.npz", trajectories.recammaster(5, 13))
    evaluate.evaluate(evaluate.Evaluate(generated=str(sources / "W/CogNVS"), estimator=str(sources / "poses"),
                                        paths="5,9", out=str(sources / "T"), vbench=str(sources / "none")))
    cases = json.loads((sources / "T/results.json").read_text())["methods"]["CogNVS"]["cases"]
    assert sum("failed" not in scores for scores in cases.values()) == 3


def test_trajectorycrafter_there_and_back(sources):
    config, sent = there(sources, "TrajectoryCrafter", speeds="1,2")
    lines = (sources / "W/commands.sh").read_text().splitlines()
    assert len(lines) + len(sent["refused"]) == 8 and len(read_video(sources / "W/inputs/a.mp4")[0]) == 13
    assert all("--video_length 13" in line and "--mode gradual --mask --stride 1" in line for line in lines)
    case = "a_camera_5_speed_1"
    assert f"--exp_name {case} --camera target" in lines[0] and "inputs/a.mp4" in lines[0]
    write_video(sources / f"R/{case}/gen.mp4", clip(13, 48, 84), 10)
    warp(dataclasses.replace(config, back=str(sources / "R")))
    assert len(read_video(sources / f"W/TrajectoryCrafter/{case}.mp4")[0]) == 13
    write_video(sources / f"R/{case}/gen.mp4", clip(9, 48, 84), 10)
    with pytest.raises(ValueError, match="9 frames, expected 13 or more"):
        warp(dataclasses.replace(config, back=str(sources / "R")))
    with pytest.raises(ValueError, match="written for TrajectoryCrafter, not for CogNVS"):
        warp(dataclasses.replace(config, method="CogNVS", back=str(sources / "R")))


def test_what_target_pose_cannot_express_is_refused(tmp_path):
    write_video(tmp_path / "E/sources/a.mp4", clip(49), 24)
    warp(Warp(method="TrajectoryCrafter", evaluation=str(tmp_path / "E"), cameras="static", paths="5,9",
              speeds="1,2", out=str(tmp_path / "W")))
    sent = json.loads((tmp_path / "W/cases.json").read_text())
    assert list(sent["refused"]) == ["a_camera_9_speed_2"] and len(sent["cases"]) == 4
    assert "off by 0.19 depth units and 0.66 degrees" in sent["refused"]["a_camera_9_speed_2"]
    with np.load(tmp_path / "W/poses/a_camera_9_speed_2.npz") as poses:  # its Warper can be given these
        assert np.array_equal(poses["T1"], np.tile(np.eye(4), (49, 1, 1)))


@pytest.mark.parametrize("changes, why", [
    (dict(method="Crafter"), "method: expected TrajectoryCrafter or CogNVS"),
    (dict(evaluation=""), "--evaluation=FOLDER is needed"), (dict(cameras=""), "no source cameras there"),
    (dict(cameras="{w}/cameras/none"), "no camera file"), (dict(paths="11"), "paths"),
    (dict(speeds="1,-1"), "speeds: expected numbers such as"), (dict(speeds="nan"), "found nan"),
    (dict(back="{w}/none"), "cases.json"), (dict(evaluation="{w}"), "sources")])
def test_bad_input(sources, changes, why):
    config = dict(method="CogNVS", evaluation=str(sources / "E"), cameras=str(sources / "cameras"),
                  out=str(sources / "W")) | {k: x.format(w=sources) for k, x in changes.items()}
    with pytest.raises((ValueError, OSError), match=why):
        warp(Warp(**config))


def test_sources_longer_than_either_method(tmp_path):
    write_video(tmp_path / "E/sources/a.mp4", clip(53), 24)
    with pytest.raises(ValueError, match="53 frames, CogNVS makes 49 at most: evaluate with --frames=49"):
        warp(Warp(method="CogNVS", evaluation=str(tmp_path / "E"), cameras="static", out=str(tmp_path / "W")))


def test_met3r_of_a_video_shorter_than_its_source(tmp_path):
    """The source is cut to the video; where it is as long, it is handed on byte by byte."""
    body = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data.video import read_video; import os\n" \
           "folder = os.path.dirname(sys.argv[2])\n" \
           "n = len(read_video(folder + '/input.mp4')[0])\n" \
           "open(folder + '/results.txt', 'w').write(f'Dyn-MEt3R: 0.5\\nMEt3R: {n}\\n')\n"
    program(tmp_path / "checkout/evaluate.py", body)
    write_video(tmp_path / "source.mp4", clip(13), 24)
    for frames in (9, 13):
        write_video(tmp_path / "video.mp4", clip(frames), 24)
        files = tmp_path / "source.mp4", tmp_path / "video.mp4"
        scores, note = outside.met3r(sys.executable, str(tmp_path / "checkout"), *files, 9, 1.0)
        assert scores == {"Dyn-MEt3R": 0.5, "MEt3R": frames} and note is None
