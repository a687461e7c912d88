"""What an evaluation measures: estimates that are none fail, and two videos are not one case."""
import numpy as np
import pytest

from data.video import write_video
from evaluation.cases import find_generated
from evaluation.scores import open_estimator, pose_scores, score_poses
from trajectories import recammaster


STILL = np.tile(np.eye(4), (21, 1, 1))


@pytest.mark.parametrize("number", [1, 3, 5, 9])  # pan, tilt, zoom, arc
def test_constant_poses_fail(number):
    turned = recammaster(9, 21)[[7] * 21]  # constant, but not the identity
    for poses in (STILL, turned):
        assert pose_scores(poses, recammaster(number, 21))["failed"] == "the estimated camera stands still: 21 equal poses"
    assert "failed" not in pose_scores(STILL, STILL)  # the path asked for stands still
    assert pose_scores(STILL[:1], recammaster(number, 1)) == {"failed": "1 pose, which is no path"}
    assert "failed" not in pose_scores(recammaster(9, 21), recammaster(number, 21))


@pytest.mark.parametrize("kind, change, why", [
    ("exact", lambda c2w: c2w, None), ("w2c", np.linalg.inv, None), ("identity", lambda c2w: STILL, "21 equal poses"),
    ("single", lambda c2w: c2w[:1], "1 poses for 21 frames"), ("every fourth", lambda c2w: c2w[::4], "6 poses for 21 frames"),
    ("longer", lambda c2w: recammaster(9, 25), "25 poses for 21 frames"),
    ("nan", lambda c2w: c2w * np.nan, "frame 0: not finite")])
def test_pose_folders(tmp_path, kind, change, why):
    """Poses from elsewhere: as many as the video has frames, told apart from another convention by their key."""
    video = tmp_path / "clip_camera_9_speed_1.mp4"
    write_video(video, np.random.default_rng(0).integers(0, 255, (21, 32, 48, 3), dtype=np.uint8), 24)
    poses = change(recammaster(9, 21))
    for name, key in (("told@w2c" if kind == "w2c" else "told@c2w", "pose"), ("said", "w2c" if kind == "w2c" else "c2w")):
        folder = tmp_path / name.partition("@")[0] / "method"
        folder.mkdir(parents=True)
        np.savez(folder / f"{video.stem}.npz", **{key: poses})
        estimate = open_estimator(str(tmp_path / name), "", "", "", None)
        scores = score_poses(tmp_path / "out" / name / "method", video.stem, video, estimate, "")
        assert why in scores["failed"] if why else scores["scale"] == pytest.approx(1) and scores["position"] < 1e-6


@pytest.mark.parametrize("names", [
    ("seed0/x_camera_1_speed_1.mp4", "seed1/x_camera_1_speed_1.mp4"),
    ("x_camera_01_speed_1.mp4", "x_camera_1_speed_1.mp4"), ("x_camera_1_speed_1.mkv", "x_camera_1_speed_1.mp4"),
    ("x_camera_1_speed_1.0.mp4", "x_camera_1_speed_1.mp4")])
def test_two_videos_of_one_case_are_refused(tmp_path, names):
    for name in (*names, "y_camera_1_speed_1.5.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=" and .* are both x_camera_1_speed_1; expected one video") as error:
        find_generated(tmp_path)
    assert all(name in str(error.value) for name in names)
    (tmp_path / names[1]).unlink()
    assert set(find_generated(tmp_path)) == {"x_camera_1_speed_1", "y_camera_1_speed_1.5"}
