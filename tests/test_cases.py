"""Inputs that were once read wrongly: those of ../shared/cases that no written file stands for."""
import numpy as np
import pytest
import rewards
import torch
from conftest import ROOT

from data.cameras import read_path, source_cameras
from data.video import count_frames, read_frames, read_video

CASES = ROOT.parent / "shared/cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
FOV60 = 0.866, 1.540
MANY = "layouts/mc/cameras/camera_extrinsics.json"


@pytest.mark.parametrize("videos, cameras, name, fov, path, focal", [
    ("vipe_inds/videos", "vipe_inds/cams", "plain.mp4", None, (-0.198, 0, 0.055), (0.7812, 1.389)),
    ("intrinsics_size/videos", "intrinsics_size/cams", "clip.mp4", None, None, FOV60),
    ("layouts/mc/videos", "layouts/mc/cameras", "cam02.mp4", 60, "#cam02", FOV60),
    ("layouts/mc/videos", MANY, "cam01.mp4", 60, "#cam01", FOV60),
    ("layouts/mc", "layouts/mc", "videos/cam01.mp4", 60, "#cam01", FOV60),
    ("layouts/ow/videos", "layouts/ow", "clip.mp4", None, None, FOV60)])
def test_a_clips_cameras(videos, cameras, name, fov, path, focal):
    """Intrinsics; the camera of frame 8, or the whole path of one of several in a file."""
    file = CASES / videos / name
    video, _, numbers = read_frames(file, 9)
    c2w, intrinsics = source_cameras(video, numbers, (360, 640), name, CASES / cameras, fov,
                                     lambda expected: count_frames(file, expected))
    assert intrinsics.tolist() == pytest.approx([*focal, 0.5, 0.5], abs=1e-3)
    if isinstance(path, str):
        assert np.allclose(c2w, read_path(f"{CASES}/{MANY}{path}")[:9])
    elif path:
        assert c2w[8, :3, 3].tolist() == pytest.approx(path, abs=1e-3)


def test_each_video_has_its_own_rate():
    """Also for a reward that takes one number: it is then asked video by video."""
    found = [read_video(CASES / f"mixed_fps/videos/{name}.mp4", 5) for name in ("a24", "b60")]
    videos = torch.stack([torch.from_numpy(video) for video, _ in found])
    scene = rewards.Scene(None, None, ["", ""], torch.tensor([fps for _, fps in found]))
    loaded, _ = rewards.load(f"{CASES}/mixed_fps/fpsreward.py:fpsreward=1")
    scores, _ = rewards.score(loaded, videos, scene)
    assert scores["fpsreward"].tolist() == pytest.approx([24, 60], abs=1e-3)
