"""TrajectoryCrafter and CogNVS: where their warping puts the camera, what is sent, what comes back."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scenes import clip, walk
from scipy.spatial.transform import Rotation

import trajectories
from conftest import refused
from data.video import read_video, write_video
from evaluation.cases import find_generated
from evaluation.scores import save_poses
from evaluation.warping import Warp, fit_target_pose, target_pose, warp

# theta phi r x y of the ten paths at 49 frames and speed 1, and --radius_scale, as the design has them
TABLE = {1: ("1e-9", "0 -11.925 0 0 0"), 2: ("1e-9", "0 11.925 0 0 0"), 3: ("1e-9", "-5.963 0 0 0 0"),
         4: ("1e-9", "5.963 0 0 0 0"), 5: ("1e9", "0 0 0.239 0 0"), 6: ("1e9", "0 0 -0.239 0 0"),
         7: ("1e-9", "8.436 0 0 0 0.596"), 8: ("1e-9", "-8.436 0 0 0 -0.596"),
         9: ("1e9", "0 -17.765 0.01 0.324 0"), 10: ("1e9", "0 17.765 0.01 -0.324 0")}
SOURCE = walk(np.random.default_rng(0), 13)


@pytest.mark.parametrize("number", TABLE)
def test_target_pose_of_the_ten_paths(number):
    """Turns on the spot are exact, whatever their speed; the others off by what is said."""
    target = trajectories.recammaster(number, 49)
    values, radius, distance, angle = fit_target_pose(target)
    scale, wanted = TABLE[number]
    assert [f"{x:g}" for x in values] == wanted.split() and (radius > 1) == (scale == "1e9")
    made = target_pose(values, radius, 49)
    assert np.linalg.norm((made - target)[:, :3, 3], axis=1).max() == pytest.approx(distance)
    assert distance < 0.09 and angle < 0.18 and np.abs(made[0] - np.eye(4)).max() < 1e-12
    if number < 5:
        assert max(fit_target_pose(trajectories.recammaster(number, 33, 2.0))[2:]) < 1e-3


def test_target_pose_by_their_formula():
    """One pose, step by step, from the identity but for two axes; the result is taken for w2c."""
    theta, phi, r, x, y, radius = 10.0, -20.0, 0.1, 0.2, 0.3, 5.0
    first = np.diag([-1.0, 1, -1, 1])
    pose = first.copy()
    pose[:3, 3] = -x, y, -r * radius
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xy", [theta, phi], degrees=True).as_matrix()
    pose = turn @ pose
    pose[2, 3] += radius
    first[2, 3] += radius
    found = np.linalg.inv(target_pose([theta, phi, r, x, y], radius, 5)[-1])
    np.testing.assert_allclose(found, pose @ np.linalg.inv(first), atol=1e-12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Evaluations' sources: two clips of 13 frames in E, with cameras, one of 49 in L, of 53 in X."""
    folder = tmp_path_factory.mktemp("sources")
    for name, frames in (("E/sources/a", 13), ("E/sources/b", 13), ("L/sources/a", 49), ("X/sources/a", 53)):
        write_video(folder / f"{name}.mp4", clip(frames), 24)
    for name in "ab":
        save_poses(folder / f"cameras/{name}.npz", SOURCE)
    return folder


@pytest.fixture
def config(sources, tmp_path):
    return Warp(method="CogNVS", evaluation=str(sources / "E"), cameras=str(sources / "cameras"), paths="5,9",
                out=str(tmp_path / "W"))


def sent(config):
    warp(config)
    return json.loads(Path(f"{config.out}/cases.json").read_text())


def test_cognvs_there_and_back(config, tmp_path):
    """49 frames there, the last repeated; what comes back is cut and resized, and found by evaluate."""
    cases = sent(config)["cases"]
    video = read_video(tmp_path / "W/inputs/a.mp4")[0]
    assert len(video) == 49 and np.abs(video[12:].astype(int) - video[12]).max() < 3
    T1, T2 = map(np.load(tmp_path / "W/poses/b_camera_9_speed_1.npz").get, ("T1", "T2"))
    assert T1.shape == T2.shape == (49, 4, 4) and np.array_equal(T2[12:], np.repeat(T2[12:13], 37, 0))
    # Both methods move what the source's camera i sees by T2[i] inv(T1[i]): there our target's sees it.
    world = np.array([[0.1], [-0.2], [5], [1]])
    moved = T2[:13] @ np.linalg.inv(T1[:13]) @ (np.linalg.inv(SOURCE) @ world)
    np.testing.assert_allclose(moved, np.linalg.inv(trajectories.recammaster(9, 13)) @ world, atol=1e-6)
    assert not (tmp_path / "W/commands.sh").exists() and len(cases) == 4
    for case in list(cases)[:3]:
        write_video(tmp_path / f"R/{case}.mp4", clip(49, 60, 90), 8)
    assert warp(dataclasses.replace(config, back=str(tmp_path / "R"))) == ["b_camera_9_speed_1"]
    back, fps = read_video(tmp_path / "W/CogNVS/a_camera_5_speed_1.mp4")
    assert back.shape == (13, 48, 64, 3) and fps == 24
    assert set(find_generated(f"{config.out}/CogNVS")) == set(cases) - {"b_camera_9_speed_1"}


def test_trajectorycrafter_there_and_back(config, sources, tmp_path):
    """A command a case; what --target_pose cannot express is refused, its poses are there all the same."""
    config = dataclasses.replace(config, method="TrajectoryCrafter", speeds="1,2")
    inexpressible = sent(config)["refused"]
    lines = (tmp_path / "W/commands.sh").read_text().splitlines()
    assert len(lines) + len(inexpressible) == 8 and len(read_video(tmp_path / "W/inputs/a.mp4")[0]) == 13
    words = ("--video_length 13", "--mode gradual --mask --stride 1", "inputs/a.mp4",
             "--exp_name a_camera_5_speed_1 --camera target")
    assert all(word in lines[0] for word in words)
    back = dataclasses.replace(config, back=str(tmp_path / "R"))
    for frames in (13, 9):
        write_video(tmp_path / "R/a_camera_5_speed_1/gen.mp4", clip(frames, 48, 84), 10)
        if frames == 13:
            warp(back)
    assert len(read_video(tmp_path / "W/TrajectoryCrafter/a_camera_5_speed_1.mp4")[0]) == 13
    for change, why in (({}, "9 frames, expected 13 or more"), ({"back": str(tmp_path)}, "none of 8 videos"),
                        ({"method": "CogNVS"}, "written for TrajectoryCrafter, not for CogNVS")):
        refused(lambda: warp(dataclasses.replace(back, **change)), why)
    long = sent(dataclasses.replace(config, evaluation=str(sources / "L"), cameras="static"))
    assert list(long["refused"]) == ["a_camera_9_speed_2"] and len(long["cases"]) == 4
    assert "off by 0.19 depth units and 0.66 degrees" in long["refused"]["a_camera_9_speed_2"]
    assert (np.load(tmp_path / "W/poses/a_camera_9_speed_2.npz")["T1"] == np.eye(4)).all()


@pytest.mark.parametrize("changes, why", [
    (dict(method="Crafter"), "method: expected TrajectoryCrafter or CogNVS"),
    (dict(evaluation=""), "--evaluation=FOLDER is needed"), (dict(evaluation="{}"), "sources"),
    (dict(cameras=""), "no source cameras there"), (dict(cameras="{}/cameras/none"), "no camera file"),
    (dict(paths="11"), "paths"), (dict(speeds="1,-1"), "speeds: expected numbers such as"),
    (dict(back="{}/none"), "cases.json"), (dict(evaluation="{}/X"), "53 frames, CogNVS makes 49 at most")])
def test_bad_input(config, sources, changes, why):
    changes = {key: x.format(sources) for key, x in changes.items()}
    refused(lambda: warp(dataclasses.replace(config, **changes)), why, error=(ValueError, OSError))
