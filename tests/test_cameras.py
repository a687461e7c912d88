"""Camera files: every format as published, and broken; folders of them; paths by name."""
import json

import numpy as np
import pytest
import trajectories as tr
from conftest import ROOT
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from scenes import pose, put, walk
from scipy.spatial.transform import Rotation

from data import camera_files, cameras

PUBLISHED = ROOT.parent / "shared/clips/recammaster_camera_extrinsics.json"
FLIP = np.diag([1.0, -1, -1, 1])  # OpenCV's camera axes to OpenGL's
RNG = np.random.default_rng(0)
PATH = pose(RNG) @ walk(RNG, 12)  # in a world of its own
W2C = np.linalg.inv(PATH)


# ---- formats, as published ----

def rows(*columns):
    """Columns of numbers, or of rows of them, as lines of text."""
    table = [np.concatenate([np.ravel(x) for x in row]) for row in zip(*columns)]
    return [" ".join(f"{x:.16g}" for x in row) for row in table]


def quats(c2w, order):
    """Quaternions of matrices, of odd lengths, their parts in an order of x y z w."""
    return 1.7 * Rotation.from_matrix(c2w[:, :3, :3]).as_quat()[:, ["xyzw".index(x) for x in order]]


def tum(times, c2w):
    return rows(times, c2w[:, :3, 3], quats(c2w, "xyzw"))


def omniworld(c2w, **change):
    """OmniWorld-Game's camera/split_<i>.json: world-to-camera."""
    w2c = np.linalg.inv(c2w)
    return {"focals": [1002.5] * len(w2c), "cx": 640.0, "cy": 360.0, "invalid_frame": [],
            "quats": quats(w2c, "wxyz").tolist(), "trans": w2c[:, :3, 3].tolist()} | change


def unreal(*paths):
    """MultiCamVideo's camera_extrinsics.json: transposed, cm, Unreal's forward, right, up."""
    swap = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    frames = {f"frame{i}": {} for i in range(len(paths[0]))}
    for k, c2w in enumerate(paths, 1):
        there = swap @ c2w @ swap.T * np.array([[1, 1, 1, 100]] * 3 + [[1] * 4])
        for i, x in enumerate(there.transpose(0, 2, 1)):
            frames[f"frame{i}"][f"cam{k:02d}"] = " ".join(f"[{row}]" for row in rows(x)) + " "
    return frames


def transforms(**more):
    """nerfstudio's transforms.json: camera-to-world, OpenGL, its frames in any order."""
    frames = [{"file_path": f"images/frame_{i}.png", "transform_matrix": x.tolist()}
              for i, x in enumerate(PATH @ FLIP, 1)]
    return {"w": 640, "h": 360, "fl_x": 554, "fl_y": 500, "cx": 320, "cy": 180,
            "frames": frames[::-1]} | more


IMAGES = [f"{i + 7} {row} 1 frame_{i:03d}.png\n1.0 2.0 -1 3 4 5 6 7 8 9 10 11" + i % 2 * "\n"
          for i, row in enumerate(rows(quats(W2C, "wxyz"), W2C[:, :3, 3]))]
TIMES = 1305031102.17 + 0.033 * np.arange(12)
RE10K = rows(33367 * np.arange(12) + 52553000, [[0.86, 1.5, 0.5, 0.5, 0, 0]] * 12, W2C[:, :3])
FOCAL = 554 / 640, 500 / 360
FORMATS = {  # name -> content, (fx/W, fy/H) for a video of 1280 x 720
    "scene/camera/split_0.json": (omniworld(PATH), (1002.5 / 1280, 1002.5 / 720)),
    "recon/split_0/info.json": ({"split": [*range(12)], "extrinsics": PATH.tolist()}, None),
    "f24_aperture5/m.json#cam02": (unreal(PATH[::-1], PATH), (24 / 23.76, 1.79574)),
    "one.json": (unreal(PATH), None), "c2w.json": ({"c2w": PATH.tolist()}, None),
    "transforms.json": (transforms(), FOCAL),
    "angle.json": ({"camera_angle_x": 1.0, "frames": transforms()["frames"]}, (0.915244, 1.627100)),
    "re10k.txt": ("\n".join(["https://www.youtube.com/watch?v=x", *RE10K]), (0.86, 1.5)),
    "tum.txt": ("\n".join(["# time x y z q", *tum(TIMES, PATH)]), None),
    "kitti.txt": ("\n".join(rows(PATH[:, :3])), None),
    "colmap/images.txt": ("\n".join(["# Image list", *IMAGES[::-1]]), FOCAL),
    "vipe.npz": ({"data": PATH, "inds": np.arange(12)}, None),
    "k.npz": ({"cam_c2w": PATH, "intrinsic": [np.diag([1.0, 2, 1])] * 12}, (1, 2)),
    **{f"{key}.npz": ({key: PATH[:, :3], "K": [0.5, 0.7, 0.5, 0.5]}, (0.5, 0.7)) for key in (
        "camera_to_world", "Twc")},
    **{f"{key}.npz": ({key: W2C, "inds": np.arange(12)}, None) for key in (
        "viewmats", "World-To-Cam", "T_cw", "cam_from_world")},
    "both.npz": ({"w2c": W2C, "c2w": PATH}, None)}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(tmp_path, name):
    content, focal = FORMATS[name]
    put(tmp_path / name.partition("#")[0], content)
    put(tmp_path / "colmap/cameras.txt", "# cameras\n1 PINHOLE 640 360 554 500 320 180\n")
    read = cameras.read_cameras(tmp_path / name)
    assert_allclose(tr.relative(read.poses), tr.relative(PATH), atol=1e-6)
    assert cameras.focal_of(read, (720, 1280)) == (focal and pytest.approx(focal, rel=1e-5))


def test_recammasters_files_are_read():
    """Its own code's numbers of a camera; and its ten evaluation paths, if ../shared has them."""
    golden = load_file(ROOT / "tests/golden/recammaster_io.safetensors")["c2w_target"].double()
    read = cameras.read_path(f"{ROOT}/tests/golden/recammaster_cameras.json#cam01")
    assert_allclose(read, tr.relative(golden), atol=1e-6)
    for number in range(1, 11) if PUBLISHED.exists() else ():
        read = cameras.read_path(f"{PUBLISHED}#cam{number:02d}")
        assert_allclose(read, tr.published(number), atol=1e-4)


def test_conventions_are_told_not_guessed(tmp_path):
    """A path written in each convention is read as the same path, and not without being told."""
    for told, poses in {"c2w": PATH, "w2c": W2C, "c2w,opengl": PATH @ FLIP,
                        "w2c,opengl": np.linalg.inv(PATH @ FLIP)}.items():
        for name, content in (("a.npz", {"arr_0": poses}), ("a.npy", poses), ("b.json", poses.tolist()),
                              ("a.json", {"extrinsics": poses[:, :3].tolist()})):
            put(tmp_path / name, content)
            with pytest.raises(ValueError, match=f"{name}: does not say whether.*FILE@w2c"):
                cameras.read_path(tmp_path / name)
            read = cameras.named_path(f"{tmp_path}/{name}@{told}", 12)
            assert_allclose(read, tr.relative(PATH), atol=1e-9)
    names = cameras.find_paths(f"{tmp_path}@w2c,opengl")[0]
    assert len(names) == 4 and all(name.endswith("@w2c,opengl") for name in names)


def test_rows_that_leave_frames_out(tmp_path):
    """By time, or ViPE's inds: what is left out is interpolated."""
    path, kept = tr.recammaster(9, 21), [0, 1, 3, 4, 8, 12, 20]
    put(tmp_path / "tum.txt", "\n".join(tum(np.array(kept) / 30, path[kept])))
    read = cameras.read_path(tmp_path / "tum.txt")
    assert_allclose(read[kept], tr.relative(path[kept]), atol=1e-9)
    assert_allclose(read, tr.relative(path), atol=5e-3)


@pytest.mark.parametrize("rounded, warnings", [(lambda x: x.round(5), 0), (lambda x: x.round(3), 1)])
def test_rounded_rotations_are_made_exact_with_one_warning(tmp_path, capsys, rounded, warnings):
    c2w = walk(np.random.default_rng(0), 40)
    for name in "ab":
        put(tmp_path / f"{name}.npz", {"c2w": rounded(c2w)})
        R = cameras.read_path(tmp_path / f"{name}.npz")[:, :3, :3]
        assert_allclose(R, c2w[:, :3, :3], atol=2e-3)
        assert_allclose(R @ R.swapaxes(1, 2), [np.eye(3)] * 40, atol=1e-12)
    said = capsys.readouterr().err
    assert said.count("a.npz: its rotations are rounded, off by") == said.count("\n") == warnings


# ---- and broken ----

def at(index, value, array=PATH[:6]):
    """The array with another value at an index."""
    array = array.copy()
    array[index] = value
    return array


SPLIT, BOTH = "camera/split_0.json", "which of its matrices are the cameras"
NO_FORMAT = "not a camera format that is read"
BAD = [  # name, content, what the one line must say
    (SPLIT, {"trans": []}, "missing key 'quats'"),
    (SPLIT, omniworld(PATH[:5]), "wrong number of frames"),
    ("camera/split_1.json", omniworld(PATH[:6]), "not in split_info.json"),
    (SPLIT, omniworld(PATH[:6], quats=[[0, 0, 0, 0]] * 6), "frame 0: not a rotation"),
    (SPLIT, omniworld(PATH[:6], trans=[[0, "x", 0]] * 6), "could not convert"),
    ("m.json#cam02", {"frame0": {"cam01": ""}}, "frame 0: missing"),
    ("m.json", unreal(PATH, PATH), "2 cameras in one file, name one as in file.json#cam01"),
    ("m.json#cam02", {"frame0": {"cam02": "[1 0 0 0]"}}, "frame 0: wrong shape"),
    ("t.json", transforms(camera_model="FISHEYE"), "camera_model FISHEYE, expected one of"),
    ("a.npy", at((3, 0, 0), np.nan), "frame 3: not finite"),
    ("a.npy", at((2, 0, 0), 1.3), "frame 2: not a rotation (R R^T differs from the identity by"),
    ("a.npy", at((4, 3, 3), 0), "frame 4: last row"),
    ("a.npy", PATH * [1, 1, -1, 1], "frame 0: a reflection"),
    *(("a.npy", array, "wrong shape") for array in (PATH[0], PATH[:0])),
    ("a.npy", np.array([{}], object), "allow_pickle"),
    ("a.npz", {"left": PATH, "right": PATH}, BOTH), ("a.npz", {"w2c_a": PATH, "w2c_b": PATH}, BOTH),
    ("a.npz@c2w", {"w2c": W2C}, "says w2c, its name c2w"),
    *((f"a.npz@{wrong}", {"c2w": PATH}, "expected a convention, @c2w or @w2c")
      for wrong in ("wc2", "c2w,w2c")),
    *(("v.npz", {"data": PATH[:4], "inds": inds}, why) for inds, why in (
        ([0, 1, 4, 13], "no camera between frames 4 and 13"), ([0, 1, 1, 4], "rising frame number"),
        ([0, 1, 4], "4 cameras, found 3"), ([0, 1, 4, 5.5], "rising frame number"))),
    *(("tum.txt", "\n".join(tum(times, PATH[:4])), why) for times, why in (
        ([1, 2, 2, 3], "is not after"), ([1, 2, 3.5, 5.2], "no whole frames apart"))),
    *((name, content, NO_FORMAT) for name, content in (
        ("notes.txt", "a walk in the park"), ("two.txt", "1 2\n3 4"), ("images.txt", "# none"),
        ("fps.json", {"fps": 24}), ("three.json", "3"), ("a.csv", "1,2"))),
    ("a.json", json.dumps(omniworld(PATH))[:100], "truncated"), ("a.npz", b"PK\3\4" + bytes(99), "")]


@pytest.mark.parametrize("name, content, reason", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, reason):
    put(tmp_path / "split_info.json", {"split": [[*range(6)]]})
    put(tmp_path / name.partition("#")[0].partition("@")[0], content)
    with pytest.raises(ValueError) as e:
        cameras.read_path(f"{tmp_path}/{name}")
    assert str(e.value).startswith(f"{tmp_path}/{name}: ")
    assert reason in str(e.value) and "\n" not in str(e.value)


def test_files_of_too_many_poses_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(camera_files, "MOST", 20)
    for name, content in (("a.npz", {"c2w": np.zeros((500, 4, 4))}), ("a.npy", np.zeros((21, 4, 4)))):
        with pytest.raises(ValueError, match=f"{name}: .*, expected at most 20"):
            cameras.read_path(put(tmp_path / name, content))


# ---- folders ----

@pytest.fixture
def dataset(tmp_path):
    """14 paths: 2 OmniWorld splits, 2 files of Sekai's, a MultiCamVideo file of ten; and others."""
    rng = np.random.default_rng(0)
    put(tmp_path / "OmniWorld/split_info.json", {"split": [[*range(30)], [*range(9)]]})
    for i, n in enumerate((30, 9)):
        put(tmp_path / f"OmniWorld/camera/split_{i}.json", omniworld(walk(rng, n)))
        put(tmp_path / f"OmniWorld/droidclib/split_{i}.json", "{}")
    for name in "ab":
        put(tmp_path / f"sekai/{name}.npz", {"c2w": walk(rng, 40)})
    ten = unreal(*(walk(rng, 21) for _ in range(10)))
    put(tmp_path / "train/cameras/camera_extrinsics.json", ten)
    return tmp_path


def test_draws_are_stretches_of_every_path(dataset):
    paths, rng = cameras.PathFolder(dataset, 20), np.random.default_rng(0)
    assert paths.others == 1 and paths.names == sorted(paths.names)  # split_info.json
    whole = list(cameras.PathFolder(dataset))
    assert [len(c2w) for c2w in whole] == [30, 9, 40, 40] + [21] * 10
    starts = [c2w[i:i + 20] for c2w in whole for i in range(len(c2w) - 19)]
    stretches, seen = tr.relative(np.stack(starts)), set()
    for _ in range(120):
        off = np.abs(stretches - paths.draw(rng)).max((1, 2, 3))
        assert off.min() < 1e-9
        seen.add(off.argmin())
    assert len(seen) > 30  # of 11 + 21 + 21 + 2 x 10
    assert "1 x too short" in paths.summary() and "found 9 frames, expected 20" in paths.summary()


def test_bad_files_are_skipped_counted_and_explained(dataset, monkeypatch):
    """Opened when drawn, once where bad; a draw does not depend on what was drawn before."""
    for i in range(3):
        put(dataset / f"z{i}.npy", at((i + 2, 0, 3), np.nan))
    opened, real = [], cameras.read_path
    monkeypatch.setattr(cameras, "read_path", lambda name: opened.append(name) or real(name))
    used, fresh = (cameras.PathFolder(dataset, 10) for _ in range(2))
    assert len(used) == 17 and len(opened) == 2
    assert sum(1 for _ in used) == 13 and len(used.skipped) == 4
    for words in ("17 camera paths, 4 skipped", "3 x not finite", "1 x too short"):
        assert words in used.summary()
    for seed in range(20):
        a, b = np.random.default_rng(seed), np.random.default_rng(seed)
        np.testing.assert_array_equal(fresh.draw(a), used.draw(b))
    assert all(opened.count(name) <= 2 for name in used.skipped)  # once each of the two
    used.skipped = dict.fromkeys(used.names, "gone")
    with pytest.raises(ValueError, match="no usable camera path is left: 17 camera paths, 17 skipped"):
        used.draw(np.random.default_rng(0))


def test_named_paths(tmp_path):
    assert (cameras.named_path("5", 17, 1.5) == tr.recammaster(5, 17, 1.5)).all()
    assert (cameras.named_path("static", 9) == np.eye(4)).all()
    mine = put(tmp_path / "mine.npz", {"c2w": PATH})
    assert_allclose(cameras.named_path(mine, 12), tr.relative(PATH), atol=1e-9)
    slow, fast = (tr.speeds(cameras.named_path(str(mine), 7, speed)) for speed in (1, 1.5))
    assert_allclose(fast, np.multiply(1.5, slow))
    with pytest.raises(FileNotFoundError, match="arc_left.*static"):
        cameras.named_path("sideways")
    with pytest.raises(FileNotFoundError, match="no such camera file"):
        cameras.read_path(tmp_path / "none.npz")
