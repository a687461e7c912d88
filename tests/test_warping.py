"""TrajectoryCrafter and CogNVS: where their warping puts the camera, what is sent, what comes back."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from scenes import clip, walk
from scipy.spatial.transform import Rotation

import trajectories
from data.video import read_video, write_video
from evaluation.cases import find_generated
from evaluation.scores import save_poses
from evaluation.warping import Warp, fit_target_pose, target_pose, warp

SOURCE = walk(np.random.default_rng(0), 13)


@pytest.mark.parametrize("number, scale, wanted", [  # theta phi r x y, at 49 frames and speed 1
    (1, "1e-9", "0 -11.925 0 0 0"), (4, "1e-9", "5.963 0 0 0 0"), (5, "1e9", "0 0 0.239 0 0"),
    (7, "1e-9", "8.436 0 0 0 0.596"), (9, "1e9", "0 -17.765 0.01 0.324 0")])
def test_target_pose_of_the_ten_paths(number, scale, wanted):
    """Off by what is said. The formula: from the identity but for two axes; the result is taken for w2c."""
    target = trajectories.recammaster(number, 49)
    values, radius, distance, angle = fit_target_pose(target)
    assert [f"{x:g}" for x in values] == wanted.split() and (radius > 1) == (scale == "1e9")
    made = target_pose(values, radius, 49)
    assert np.linalg.norm((made - target)[:, :3, 3], axis=1).max() == pytest.approx(distance)
    assert distance < 0.09 and angle < 0.18 and np.abs(made[0] - np.eye(4)).max() < 1e-12
    theta, phi, r, x, y = values
    first, turn = np.diag([-1.0, 1, -1, 1]), np.eye(4)
    pose = first.copy()
    pose[:3, 3] = -x, y, -r * radius
    turn[:3, :3] = Rotation.from_euler("xy", [theta, phi], degrees=True).as_matrix()
    pose = turn @ pose
    pose[2, 3] += radius
    first[2, 3] += radius
    np.testing.assert_allclose(np.linalg.inv(made[-1]), pose @ np.linalg.inv(first), atol=1e-9)


@pytest.fixture
def config(tmp_path):
    """An evaluation E of two clips of 13 frames, with cameras."""
    for name in "ab":
        write_video(tmp_path / f"E/sources/{name}.mp4", clip(13), 24)
        save_poses(tmp_path / f"cameras/{name}.npz", SOURCE)
    return Warp(method="CogNVS", evaluation=f"{tmp_path}/E", cameras=f"{tmp_path}/cameras", paths="5,9",
                out=f"{tmp_path}/W")


def sent(config):
    warp(config)
    return json.loads(Path(f"{config.out}/cases.json").read_text())


def test_cognvs_there_and_back(config, tmp_path):
    """49 frames there, the last repeated; what comes back is cut and resized, and found by evaluate."""
    cases = sent(config)["cases"]
    video = read_video(tmp_path / "W/inputs/a.mp4")[0]
    assert len(video) == 49 and np.abs(video[12:].astype(int) - video[12]).max() < 3
    T1, T2 = map(np.load(tmp_path / "W/poses/b_camera_9_speed_1.npz").get, ("T1", "T2"))
    for w2c, path in ((T1, SOURCE), (T2, trajectories.recammaster(9, 13))):
        np.testing.assert_allclose(w2c[np.r_[:13, 48]] @ path[np.r_[:13, 12]], [np.eye(4)] * 14, atol=1e-6)
    assert not (tmp_path / "W/commands.sh").exists() and len(cases) == 4
    for case in list(cases)[:3]:
        write_video(tmp_path / f"R/{case}.mp4", clip(49, 60, 90), 8)
    assert warp(dataclasses.replace(config, back=f"{tmp_path}/R")) == ["b_camera_9_speed_1"]
    back, fps = read_video(tmp_path / "W/CogNVS/a_camera_5_speed_1.mp4")
    assert back.shape == (13, 48, 64, 3) and fps == 24
    assert set(find_generated(f"{config.out}/CogNVS")) == set(cases) - {"b_camera_9_speed_1"}


def test_trajectorycrafter_there_and_back(config, tmp_path):
    """A command a case; what --target_pose cannot express is refused, its poses are there all the same."""
    config = dataclasses.replace(config, method="TrajectoryCrafter", speeds="1,2", cameras="static")
    refusals = sent(config)["refused"]
    lines = (tmp_path / "W/commands.sh").read_text().splitlines()
    assert len(lines) + len(refusals) == 8 and refusals
    assert "--target_pose cannot express it" in refusals["a_camera_9_speed_2"]
    assert (np.load(tmp_path / "W/poses/a_camera_9_speed_2.npz")["T1"] == np.eye(4)).all()
    assert "--exp_name a_camera_5_speed_1 --camera target" in lines[0] and "--video_length 13" in lines[0]
    back = dataclasses.replace(config, back=f"{tmp_path}/R")
    write_video(tmp_path / "R/a_camera_5_speed_1/gen.mp4", clip(13, 48, 84), 10)
    warp(back)
    assert len(read_video(tmp_path / "W/TrajectoryCrafter/a_camera_5_speed_1.mp4")[0]) == 13
    write_video(tmp_path / "R/a_camera_5_speed_1/gen.mp4", clip(9), 10)
    for change, why in (({}, "9 frames, expected 13 or more"), ({"back": str(tmp_path)}, "none of 8 videos"),
                        ({"method": "CogNVS"}, "written for TrajectoryCrafter, not for CogNVS")):
        refused(lambda: warp(dataclasses.replace(back, **change)), why)


@pytest.mark.parametrize("changes, why", [
    (dict(method="Crafter"), "method: expected TrajectoryCrafter or CogNVS"),
    (dict(evaluation=""), "--evaluation=FOLDER is needed"), (dict(cameras=""), "no source cameras there"),
    (dict(speeds="1,-1"), "speeds: expected numbers such as"), ({}, "53 frames, CogNVS makes 49 at most")])
def test_bad_input(config, changes, why):
    if not changes:
        write_video(Path(config.evaluation) / "sources/a.mp4", clip(53), 24)
    refused(lambda: warp(dataclasses.replace(config, **changes)), why)
