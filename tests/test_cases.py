"""Inputs that were once read wrongly, with their right values: every one of ../shared/cases."""
import runpy

import numpy as np
import pytest
import rewards
import torch
from conftest import ROOT

import data
import evaluate
from data.cameras import read_path, source_cameras
from data.prepare import read_captions
from data.video import count_frames, read_frames, read_video, write_video

CASES = ROOT.parent / "shared/cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")


@pytest.mark.parametrize("name, frames, shown", [
    ("sar/sar.mp4", 24, "RGBx"), ("mirror/hflip.mp4", 24, "GRxB"), ("mirror/vflip.mp4", 24, "BxRG"),
    ("cover/thumbfirst.mp4", 24, "RGBx"), ("interlaced/inter.mp4", 12, "RGBx"),
    ("hdr/hlg2.mp4", 0, "HLG")])
def test_videos(name, frames, shown):
    """Size, corners (red, green, blue, grey), a round circle or a straight edge; or refused."""
    if not frames:
        with pytest.raises(ValueError, match=shown):
            read_video(CASES / name)
        return
    video, _ = read_video(CASES / name)
    corners = [video[0, y, x].astype(int) for y in (3, -4) for x in (3, -4)]
    assert "".join("x" if np.ptp(p) < 50 else "RGB"[p.argmax()] for p in corners) == shown
    assert video.shape == (frames, 360, 640, 3)
    if "inter" in name:  # once 48 and 56 in turn
        assert np.ptp((video[4, 176:184, 20:120, 1] < 60).argmax(1)) == 0
    else:
        height, width = map(np.ptp, (video[0] > 240).all(2).nonzero())
        assert abs(height - width) <= 2


@pytest.mark.parametrize("name, told", [
    ("w2c/ok_c2w.npz", True), ("w2c/w2c.npz", True), ("w2c/vggt44.npz", False),
    ("w2c/vggt44.npz@w2c", True), ("rounded/r4.npy", False), ("rounded/r4.npy@c2w", True),
    ("rounded/recam_3dec.json", True), ("formats/transforms.json", True),
    ("formats/re10k.txt", True), ("formats/c2wjson.json", True),
    ("formats/recam_lists.json", True)])
def test_camera_files(name, told):
    """All hold arc_left, by 21 frames; those that do not say their convention are refused."""
    if told:
        assert np.allclose(read_path(CASES / name)[-1, :3, 3], (-0.509, 0, 0.037), atol=2e-3)
    else:
        with pytest.raises(ValueError, match="does not say whether"):
            read_path(CASES / name)


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


def test_a_caption_with_commas_is_refused_with_its_line():
    with pytest.raises(ValueError, match="commas.csv: line 2: 4 fields, expected 2"):
        read_captions(CASES / "captions/commas.csv")


def test_each_video_has_its_own_rate():
    """Also for a reward that takes one number: it is then asked video by video."""
    found = [read_video(CASES / f"mixed_fps/videos/{name}.mp4", 5) for name in ("a24", "b60")]
    videos = torch.stack([torch.from_numpy(video) for video, _ in found])
    scene = rewards.Scene(None, None, ["", ""], torch.tensor([fps for _, fps in found]))
    loaded, _ = rewards.load(f"{CASES}/mixed_fps/fpsreward.py:fpsreward=1")
    scores, _ = rewards.score(loaded, videos, scene)
    assert scores["fpsreward"].tolist() == pytest.approx([24, 60], abs=1e-3)


def test_poses_that_are_none_fail_with_the_count_of_frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "write_video", write_video, raising=False)  # where it once was
    runpy.run_path(str(CASES / "poses/make.py"))
    for method, why in (
            ("identity", "stands still: 21 equal poses"), ("single", "1 poses for 21 frames"),
            ("every4", "6 poses for 21 frames"), ("longer", "25 poses for 21 frames"),
            ("nan", "frame 0: not finite"), ("exact", None)):
        config = evaluate.Evaluate(generated=f"gen/{method}", estimator="poses", paths="1,5,9",
                                   frames=21, out=f"out/{method}")
        if why:
            with pytest.raises(ValueError, match=f"3 of 3 cases failed, 3 like this: .*{why}"):
                evaluate.evaluate(config)
    evaluate.evaluate(config)  # of the exact ones
