"""Camera files: every format as its publisher writes it, and broken; folders of them; paths by name."""
import json
import math

import numpy as np
import pytest
from conftest import ROOT
from scenes import pose, walk
from scipy.spatial.transform import Rotation

from data import cameras
from data.camera_files import check_path
import trajectories as tr

PUBLISHED = ROOT.parent / "shared/clips/recammaster_camera_extrinsics.json"


def write_omniworld(scene, paths, change=lambda cameras, splits: None):
    """An OmniWorld-Game scene: world-to-camera, quaternions w, x, y, z, frames listed in split_info."""
    cameras, splits, start = [], [], 0
    for c2w in paths:
        w2c = np.linalg.inv(c2w)
        quats = Rotation.from_matrix(w2c[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]] * 1.7  # of any length
        cameras.append({"focals": [1002.5] * len(c2w), "cx": 640.0, "cy": 360.0, "invalid_frame": [],
                        "quats": quats.tolist(), "trans": w2c[:, :3, 3].tolist()})
        splits.append(list(range(start, start + len(c2w))))
        start += len(c2w) + 3
    change(cameras, splits)
    for folder in ("camera", "droidclib", "subject_masks", "color"):
        (scene / folder).mkdir(parents=True)
    for i, camera in enumerate(cameras):
        (scene / "camera" / f"split_{i}.json").write_text(json.dumps(camera))
        (scene / "droidclib" / f"split_{i}.json").write_text("{}")
        (scene / "subject_masks" / f"split_{i}.json").write_text("{}")
    (scene / "split_info.json").write_text(json.dumps({"split_num": len(splits), "split": splits}))


def write_unreal(file, paths, change=lambda frames: None):
    """MultiCamVideo's camera_extrinsics.json of OpenCV paths in metres: transposed, cm, Unreal's axes."""
    swap = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])  # to forward, right, up
    start = np.eye(4)
    start[:3, :3] = Rotation.from_euler("xyz", [0.3, -0.2, 1.1]).as_matrix()
    start[:3, 3] = 3390, 1380, 240
    frames = {}
    for k, c2w in enumerate(paths):
        unreal = swap @ c2w @ swap.T
        unreal[:, :3, 3] *= 100
        for i, matrix in enumerate((start @ unreal).transpose(0, 2, 1)):
            rows = " ".join("[" + " ".join(f"{x:.9g}" for x in row) + "]" for row in matrix) + " "
            frames.setdefault(f"frame{i}", {})[f"cam{k + 1:02d}"] = rows
    change(frames)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(frames))


def test_reads_omniworld(tmp_path):
    rng = np.random.default_rng(0)
    paths = [pose(rng) @ walk(rng, n) for n in (5, 30)]
    write_omniworld(tmp_path / "b04f88d1f85a", paths)
    for i, c2w in enumerate(paths):
        read = cameras.read_path(tmp_path / "b04f88d1f85a" / "camera" / f"split_{i}.json")
        np.testing.assert_allclose(read, tr.relative(c2w), atol=1e-9)
    (tmp_path / "b04f88d1f85a" / "split_info.json").unlink()  # then the file speaks for itself
    assert len(cameras.read_path(tmp_path / "b04f88d1f85a" / "camera" / "split_1.json")) == 30


def test_reads_omniworld_coarse_poses(tmp_path):
    c2w = walk(np.random.default_rng(0), 12)
    file = tmp_path / "recon" / "split_0" / "info.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"split": list(range(12)), "extrinsics": c2w.tolist()}))
    np.testing.assert_allclose(cameras.read_path(file), c2w, atol=1e-9)
    assert cameras.find_paths(tmp_path) == ([str(file)], 0)


@pytest.mark.parametrize("key", ["c2w", "cam_c2w", "data", "cam2world", "camera_to_world", "Twc"])
def test_reads_npz(tmp_path, key):
    rng = np.random.default_rng(0)
    path = walk(rng, 20)
    K = np.tile(np.eye(3), (20, 1, 1))
    arrays = {"intrinsic": K, "inds": np.arange(20), key: (pose(rng) @ path).astype(np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    np.testing.assert_allclose(cameras.read_path(tmp_path / "a.npz"), path, atol=1e-5)


def test_reads_multicamvideo(tmp_path):
    rng = np.random.default_rng(0)
    paths = [walk(rng, 21) for _ in range(10)]
    file = tmp_path / "f24_aperture5" / "scene1" / "cameras" / "camera_extrinsics.json"
    write_unreal(file, paths)
    for k, c2w in enumerate(paths):
        np.testing.assert_allclose(cameras.read_path(f"{file}#cam{k + 1:02d}"), c2w, atol=1e-6)
    with pytest.raises(ValueError, match="10 cameras.*json#cam01"):
        cameras.read_path(file)
    write_unreal(tmp_path / "one.json", paths[:1])
    np.testing.assert_allclose(cameras.read_path(tmp_path / "one.json"), paths[0], atol=1e-6)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="ReCamMaster's camera file is not in ../shared")
def test_reads_the_published_recammaster_file():
    for number in range(1, 11):
        c2w = cameras.read_path(f"{PUBLISHED}#cam{number:02d}")
        np.testing.assert_allclose(c2w, tr.published(number), atol=1e-4)


def spoil(where, value):
    """A change to write_omniworld: the first camera's entry at the path `where` becomes value."""
    def change(cameras, splits):
        x = cameras[0]
        for key in where[:-1]:
            x = x[key]
        x[where[-1]] = value
    return change


@pytest.mark.parametrize("change, reason", [
    (lambda cameras, splits: cameras[0].pop("quats"), "missing key 'quats'"),
    (lambda cameras, splits: cameras[0].pop("trans"), "missing key 'trans'"),
    (lambda cameras, splits: cameras[0]["quats"].pop(), "wrong number of frames"),
    (lambda cameras, splits: cameras[0]["trans"].pop(), "wrong number of frames"),
    (lambda cameras, splits: splits[0].pop(), "wrong number of frames"),
    (lambda cameras, splits: splits.clear(), "not in split_info.json"),
    (spoil(("quats", 2), [0, 0, 0, 0]), "frame 2: not a rotation"),
    (spoil(("quats", 3, 1), math.nan), "frame 3: not a rotation"),
    (spoil(("trans", 1, 0), math.inf), "frame 1: not finite"),
    (spoil(("trans", 4, 2), None), "frame 4: not finite"),
    (spoil(("quats", 2), [1, 0, 0]), "inhomogeneous"),
    (spoil(("quats", 2, 0), "x"), "could not convert"),
    (spoil(("trans",), {}), ""),
])
def test_bad_omniworld_files_are_one_error(tmp_path, change, reason):
    write_omniworld(tmp_path, [walk(np.random.default_rng(0), 6)], change)
    file = tmp_path / "camera" / "split_0.json"
    with pytest.raises(ValueError) as e:
        cameras.read_path(file)
    assert str(e.value).startswith(f"{file}: ") and reason in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, reason", [
    (lambda f: f.pop("frame3"), "frame 3: missing"),
    (lambda f: f["frame2"].pop("cam02"), "frame 2: missing cam02"),
    (lambda f: f["frame4"].update(cam02="[1 0 0 0] [0 1 0 0] [0 0 1 0]"), "frame 4: wrong shape"),
    (lambda f: f["frame4"].update(cam02="[1 0 0 0] [0 1 0 0] [0 0 1 0] [a 0 0 1]"), "could not convert"),
    (lambda f: f["frame0"].update(cam02="[2 0 0 0] [0 2 0 0] [0 0 2 0] [0 0 0 1]"), "frame 0: not a rot"),
    (lambda f: f["frame1"].update(cam02="[1 0 0 0] [0 1 0 0] [0 0 -1 0] [0 0 0 1]"), "frame 1: a reflection"),
    (lambda f: f["frame1"].update(cam02="[1 0 0 0] [0 nan 0 0] [0 0 1 0] [0 0 0 1]"), "frame 1: not finite"),
    (lambda f: f["frame1"].update(cam02="[1 0 0 5] [0 1 0 0] [0 0 1 0] [0 0 0 1]"), "frame 1: last row"),
    (lambda f: f["frame1"].update(cam02=None), "frame 1: missing cam02"),
    (lambda f: f.update(frame2=[]), ""),
    (lambda f: f.clear(), "not a camera format"),
])
def test_bad_multicamvideo_files_are_one_error(tmp_path, change, reason):
    rng = np.random.default_rng(0)
    write_unreal(tmp_path / "camera_extrinsics.json", [walk(rng, 6), walk(rng, 6)], change)
    name = f"{tmp_path}/camera_extrinsics.json#cam02"
    with pytest.raises(ValueError) as e:
        cameras.read_path(name)
    assert str(e.value).startswith(f"{name}: ") and reason in str(e.value) and "\n" not in str(e.value)


def bad_arrays():
    c2w = walk(np.random.default_rng(0), 8)
    c2w[4] = np.eye(4)
    for index, value, reason in (((3, 0, 0), np.nan, "not finite"), ((7, 1, 3), np.inf, "not finite"),
                                 ((2, 0, 0), 1.3, "not a rotation"), ((4, 0, 0), 1.006, "not a rotation"),
                                 ((5, 3, 3), 0, "last row")):
        broken = c2w.copy()
        broken[index] = value
        yield broken, f"frame {index[0]}: {reason}"
    yield c2w * [1, 1, -1, 1], "frame 0: a reflection"
    yield c2w[0], "wrong shape"
    yield c2w[:, :2], "wrong shape"
    yield c2w[:0], "wrong shape"
    yield np.array(["a"]), "could not convert"
    yield np.array([{}], object), "allow_pickle"


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("array, reason", list(bad_arrays()))
def test_bad_arrays_are_one_error(tmp_path, kind, array, reason):
    file = tmp_path / f"clip.{kind}"
    np.save(file, array) if kind == "npy" else np.savez(file, extrinsic=array)
    with pytest.raises(ValueError) as e:
        cameras.read_path(file)
    assert str(e.value).startswith(f"{file}: ") and reason in str(e.value) and "\n" not in str(e.value)


def test_rotations_off_by_rounding_are_accepted_and_made_exact(tmp_path):
    c2w = walk(np.random.default_rng(0), 40)
    np.save(tmp_path / "a.npy", c2w.round(5))
    R = cameras.read_path(f"{tmp_path}/a.npy@c2w")[:, :3, :3]
    np.testing.assert_allclose(R, c2w[:, :3, :3], atol=2e-5)
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.broadcast_to(np.eye(3), R.shape), atol=1e-12)


def test_npz_without_one_clear_path_names_what_it_holds(tmp_path):
    np.savez(tmp_path / "a.npz", left=np.zeros((3, 4, 4)), right=np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="which of its matrices.*left, right"):
        cameras.read_path(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npz", "npy", "json"])
def test_truncated_files_are_one_error(tmp_path, suffix):
    rng = np.random.default_rng(0)
    write_omniworld(tmp_path, [walk(rng, 30)])
    whole = tmp_path / "camera" / "split_0.json"
    if suffix != "json":
        whole = tmp_path / f"whole.{suffix}"
        c2w = walk(rng, 30)
        np.save(whole, c2w) if suffix == "npy" else np.savez_compressed(whole, extrinsic=c2w)
    data = whole.read_bytes()
    file = tmp_path / "camera" / f"split_0.{suffix}"
    for size in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError) as e:
            cameras.read_path(file)
        assert str(e.value).startswith(f"{file}: ") and "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cameras.read_path(tmp_path / f"nowhere.{suffix}")


def test_a_broken_split_info_is_named(tmp_path):
    write_omniworld(tmp_path, [walk(np.random.default_rng(0), 6)])
    for text in ("", "{}", '{"split": [[0, 1'):
        (tmp_path / "split_info.json").write_text(text)
        with pytest.raises(ValueError, match="split_0.json: .*split_info.json"):
            cameras.read_path(tmp_path / "camera" / "split_0.json")


def test_other_json_is_one_error(tmp_path):
    for text, reason in (("[1, 2]", "not a camera format"), ("{}", "not a camera format"), ("3", "not a camera format")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            cameras.read_path(tmp_path / "a.json")


# ---- conventions, and the formats that people bring

CASES = ROOT.parent / "shared/cases"
NEEDS_CASES = pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not there")
FLIP = np.diag([1.0, -1, -1, 1])  # OpenCV's camera axes to OpenGL's


def test_conventions(tmp_path):
    """A path written in each convention under each name is read as the same path, or not without being told."""
    rng = np.random.default_rng(0)
    path = pose(rng) @ walk(rng, 12)
    written = {"c2w": path, "w2c": np.linalg.inv(path)}
    written |= {"c2w,opengl": path @ FLIP, "w2c,opengl": np.linalg.inv(path @ FLIP)}
    for convention, poses in written.items():
        for key in ("extrinsic", "extrinsics", "pose", "poses", "arr_0"):
            np.savez(tmp_path / "a.npz", **{key: poses[:, :3] if key == "pose" else poses})
            with pytest.raises(ValueError, match="a.npz: does not say whether.*FILE@c2w or FILE@w2c"):
                cameras.read_path(tmp_path / "a.npz")
            np.testing.assert_allclose(cameras.read_path(f"{tmp_path}/a.npz@{convention}"), tr.relative(path), atol=1e-9)
        np.save(tmp_path / "a.npy", poses)
        (tmp_path / "a.json").write_text(json.dumps({"pose": poses.tolist()}))
        (tmp_path / "b.json").write_text(json.dumps(poses.tolist()))
        for name in ("a.npy", "a.json", "b.json"):
            with pytest.raises(ValueError, match=f"{name}: does not say whether"):
                cameras.read_path(tmp_path / name)
            read = cameras.named_path(f"{tmp_path}/{name}@{convention}", 12)
            np.testing.assert_allclose(read, tr.relative(path), atol=1e-9)
    for key in ("w2c", "world_to_camera", "viewmats", "world2cam", "T_cw", "w2cs", "World-To-Cam", "cam_from_world"):
        np.savez(tmp_path / "a.npz", **{key: written["w2c"], "inds": np.arange(12)})
        np.testing.assert_allclose(cameras.read_path(tmp_path / "a.npz"), tr.relative(path), atol=1e-9)
        with pytest.raises(ValueError, match="says w2c, its name c2w"):
            cameras.read_path(f"{tmp_path}/a.npz@c2w")
    np.savez(tmp_path / "a.npz", w2c=written["w2c"], c2w=path)  # both: they say the same
    np.testing.assert_allclose(cameras.read_path(tmp_path / "a.npz"), tr.relative(path), atol=1e-9)
    for wrong in ("@wc2", "@c2w,w2c", "@c2w,unreal"):
        with pytest.raises(ValueError, match="expected a convention, @c2w or @w2c"):
            cameras.read_path(f"{tmp_path}/a.npz{wrong}")
    paths = cameras.find_paths(f"{tmp_path}@w2c,opengl")[0]
    with pytest.raises(ValueError, match="which of its matrices"):
        np.savez(tmp_path / "two.npz", source_w2c=path, target_w2c=path)
        cameras.read_path(tmp_path / "two.npz")
    assert len(paths) == 4 and all(name.endswith("@w2c,opengl") for name in paths)


def write_formats(folder, path):
    """The path in the formats that say what they are."""
    w2c, gl = np.linalg.inv(path), path @ FLIP
    quats = Rotation.from_matrix(path[:, :3, :3]).as_quat()
    row = lambda *x: " ".join(f"{y:.16g}" for y in np.concatenate([np.ravel(y) for y in x]))
    frames = [{"file_path": f"images/frame_{i + 1}.png", "transform_matrix": x.tolist()} for i, x in enumerate(gl)]
    (folder / "transforms.json").write_text(json.dumps(
        {"w": 640, "h": 360, "fl_x": 554, "fl_y": 500, "cx": 320, "cy": 180, "frames": frames[::-1]}))
    (folder / "re10k.txt").write_text("https://www.youtube.com/watch?v=x\n" + "\n".join(
        row(33367 * i + 52553000, [0.86, 1.5, 0.5, 0.5, 0, 0], x[:3]) for i, x in enumerate(w2c)))
    (folder / "tum.txt").write_text("# time x y z q\n" + "\n".join(
        row(0.033 * i + 1305031102.17, x[:3, 3], q) for i, (x, q) in enumerate(zip(path, quats))))
    (folder / "kitti.txt").write_text("\n".join(row(x[:3]) for x in path))
    (folder / "colmap").mkdir()
    turned = Rotation.from_matrix(w2c[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]]
    lines = [f"{i + 7} {row(q, x[:3, 3])} 1 frame_{i:03d}.png\n1.0 2.0 -1 3 4 5 6 7 8 9 10 11" + i % 2 * "\n"
             for i, (x, q) in enumerate(zip(w2c, turned))]
    (folder / "colmap/images.txt").write_text("# Image list\n" + "\n".join(lines[::-1]))
    (folder / "colmap/cameras.txt").write_text("# cameras\n1 PINHOLE 640 360 554 500 320 180\n")
    return {"transforms.json": (554 / 640, 500 / 360), "re10k.txt": (0.86, 1.5), "tum.txt": None, "kitti.txt": None,
            "colmap/images.txt": (554 / 640, 500 / 360)}


def test_formats_that_say_what_they_are(tmp_path):
    rng = np.random.default_rng(1)
    path = pose(rng) @ walk(rng, 12)
    for name, focal in write_formats(tmp_path, path).items():
        np.testing.assert_allclose(cameras.read_path(tmp_path / name), tr.relative(path), atol=1e-6)
        found = cameras.focal_of(cameras.read_cameras(tmp_path / name), (720, 1280))
        assert found == (focal and pytest.approx(focal)), name
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(whole.replace("matrix", "x") if "json" in name else whole.replace(" ", " x"))
        with pytest.raises(ValueError, match="missing key 'transform_matrix'|not a camera format|could not convert"):
            cameras.read_path(tmp_path / name)
    (tmp_path / "notes.txt").write_text("a walk in the park")
    (tmp_path / "other.json").write_text('{"fps": 24}')
    for name in ("notes.txt", "other.json"):
        with pytest.raises(ValueError, match="not a camera format.*nerfstudio.*KITTI.*COLMAP"):
            cameras.read_path(tmp_path / name)


def test_rows_that_leave_frames_out(tmp_path):
    """By ViPE's inds, by time, or by a picture's name: what is left out is interpolated, long gaps are refused."""
    path = tr.recammaster(9, 21)
    kept = [0, 1, 3, 4, 8, 12, 20]
    np.savez(tmp_path / "v.npz", data=path[kept], inds=kept)
    (tmp_path / "tum.txt").write_text("\n".join(
        " ".join(map(str, [i / 30, *path[i, :3, 3], *Rotation.from_matrix(path[i, :3, :3]).as_quat()])) for i in kept))
    for name in ("v.npz", "tum.txt"):
        read = cameras.read_path(tmp_path / name)
        assert read.shape == (21, 4, 4)
        np.testing.assert_allclose(read[kept], tr.relative(path[kept]), atol=1e-9)
        np.testing.assert_allclose(read, tr.relative(path), atol=5e-3)
    for numbers, why in (([0, 1, 3, 4, 8, 12, 21], "between frames 12 and 21"), ([0, 1, 1, 4, 8, 12, 20], "rising"),
                         (kept[:-1], "7 cameras, found 6"), (np.array(kept) + 0.5, "rising frame number")):
        np.savez(tmp_path / "v.npz", data=path[kept], inds=numbers)
        with pytest.raises(ValueError, match=f"v.npz: .*{why}"):
            cameras.read_path(tmp_path / "v.npz")


@pytest.mark.parametrize("rounded", [lambda x: x.round(3), lambda x: x.astype(np.float16), lambda x: x.round(4)])
def test_rounded_rotations_are_projected_with_one_warning(tmp_path, capsys, rounded):
    c2w = walk(np.random.default_rng(0), 40)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", c2w=rounded(c2w))
        R = cameras.read_path(tmp_path / f"{name}.npz")[:, :3, :3]
        np.testing.assert_allclose(R, c2w[:, :3, :3], atol=2e-3)
        np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.broadcast_to(np.eye(3), R.shape), atol=1e-12)
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1 and "a.npz: its rotations are rounded, off by up to" in warned
    c2w[3, :3, :3] *= 1.05
    np.savez(tmp_path / "b.npz", c2w=c2w)
    with pytest.raises(ValueError, match="b.npz: frame 3: not a rotation .R R.T differs from the identity by 0.1;"):
        cameras.read_path(tmp_path / "b.npz")


@NEEDS_CASES
@pytest.mark.parametrize("name, end", [
    ("w2c/ok_c2w.npz", (-0.509, 0, 0.037)), ("w2c/w2c.npz", (-0.509, 0, 0.037)), ("w2c/vggt44.npz", None),
    ("w2c/vggt44.npz@w2c", (-0.509, 0, 0.037)), ("rounded/r4.npy@c2w", (-0.509, 0, 0.037)), ("rounded/r4.npy", None),
    ("rounded/recam_3dec.json", (-0.509, 0, 0.037)), ("formats/transforms.json", (-0.509, 0, 0.037)),
    ("formats/re10k.txt", (-0.509, 0, 0.037)), ("formats/c2wjson.json", (-0.509, 0, 0.037)),
    ("formats/recam_lists.json", (-0.509, 0, 0.037))])
def test_cases(name, end):
    if end is None:
        with pytest.raises(ValueError, match="does not say whether"):
            cameras.read_path(CASES / name)
    else:
        np.testing.assert_allclose(cameras.read_path(CASES / name)[-1, :3, 3], end, atol=2e-3)


# ---- folders

def dataset(folder):
    """Three layouts in a folder: 4 OmniWorld splits, 2 Sekai files, a MultiCamVideo file of ten paths."""
    rng = np.random.default_rng(0)
    write_omniworld(folder / "OmniWorld-Game" / "020c2bed1dbb" / "020c2bed1dbb_others", [walk(rng, 25)] * 2)
    write_omniworld(folder / "OmniWorld-Game" / "b04f88d1f85a", [walk(rng, 30), walk(rng, 9)])
    (folder / "sekai").mkdir()
    for i in range(2):
        np.savez(folder / "sekai" / f"xpPEhccDNak_0023550_002535{i}.npz", c2w=walk(rng, 40))
    write_unreal(folder / "train" / "f24_aperture5" / "scene1" / "cameras" / "camera_extrinsics.json",
                 [walk(rng, 21) for _ in range(10)])


def test_finds_every_layout_and_nothing_else(tmp_path):
    dataset(tmp_path)
    names, others = cameras.find_paths(tmp_path)
    assert others == 2  # two split_info.json
    assert len(names) == 4 + 2 + 10 and names == sorted(names)
    assert not any("droidclib" in n or "mask" in n or "split_info" in n for n in names)
    assert [len(cameras.read_path(n)) for n in names] == [25, 25, 30, 9, 40, 40] + [21] * 10


def test_a_folder_is_opened_only_where_it_is_drawn_from(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for i in range(300):
        np.savez(tmp_path / "a" / f"{i:03d}.npz", c2w=walk(np.random.default_rng(i), 8))
    opened = []
    real = cameras.read_path
    monkeypatch.setattr(cameras, "read_path", lambda name: opened.append(name) or real(name))
    paths = cameras.PathFolder(tmp_path, 5)
    assert len(paths) == 300 and len(opened) <= 1
    for _ in range(7):
        paths.draw(np.random.default_rng(0))
    assert len(opened) <= 8
    for file in (tmp_path / "a").glob("[1-9]*.npz"):
        file.write_bytes(b"")
    opened.clear()
    for seed in range(500):
        paths.draw(np.random.default_rng(seed))
    assert max(opened.count(name) for name in paths.skipped) == 1  # a bad file is opened once


def test_draws_are_stretches_of_the_paths(tmp_path):
    dataset(tmp_path)
    paths, rng = cameras.PathFolder(tmp_path, 20), np.random.default_rng(0)
    whole = list(cameras.PathFolder(tmp_path))
    assert len(whole) == 16
    stretches = [tr.relative(c[i:i + 20]) for c in whole for i in range(len(c) - 19)]
    seen = set()
    for _ in range(200):
        c2w = paths.draw(rng)
        found = [i for i, s in enumerate(stretches) if np.allclose(c2w, s, atol=1e-9)]
        assert found
        seen.update(found)
    assert len(seen) > 40  # of 6 + 6 + 11 + 21 + 21 + 2 x 10, the first two the same
    assert "1 x too short" in paths.summary() and "found 9 frames, expected 20" in paths.summary()


def test_draws_do_not_depend_on_what_was_drawn_before(tmp_path):
    dataset(tmp_path)
    (tmp_path / "sekai" / "broken.npz").write_bytes(b"PK")
    used = cameras.PathFolder(tmp_path, 10)
    for _ in range(50):
        used.draw(np.random.default_rng(1))
    list(used)
    for seed in range(30):
        fresh = cameras.PathFolder(tmp_path, 10)
        a, b = np.random.default_rng(seed), np.random.default_rng(seed)
        np.testing.assert_array_equal(fresh.draw(a), used.draw(b))


def test_bad_files_are_skipped_counted_and_explained(tmp_path):
    dataset(tmp_path)
    c2w = walk(np.random.default_rng(0), 30)
    for i in range(3):
        broken = c2w.copy()
        broken[i + 2, 0, 3] = np.nan
        np.save(tmp_path / f"nan{i}.npy", broken)
    (tmp_path / "sekai" / "cut.npz").write_bytes((tmp_path / "sekai" / "xpPEhccDNak_0023550_0025350.npz")
                                                 .read_bytes()[:500])
    paths, rng = cameras.PathFolder(tmp_path, 10), np.random.default_rng(0)
    for _ in range(300):
        check_path(paths.draw(rng))
    text = paths.summary()
    assert "20 camera paths, 5 skipped" in text and "3 x not finite" in text
    assert "1 x truncated or broken" in text and "\n" not in text
    assert sum(1 for _ in paths) == 15


def test_a_folder_without_a_usable_path_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cameras.PathFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no usable camera path.*0 camera paths"):
        cameras.PathFolder(tmp_path)
    np.save(tmp_path / "a.npy", np.full((9, 4, 4), np.nan))
    np.savez(tmp_path / "b.npz", c2w=walk(np.random.default_rng(0), 9))
    with pytest.raises(ValueError, match="no usable camera path.*1 x not finite.*1 x too short"):
        cameras.PathFolder(tmp_path, 10)
    assert len(cameras.PathFolder(tmp_path, 9).draw(np.random.default_rng(0))) == 9
    paths = cameras.PathFolder(tmp_path, 9)
    (tmp_path / "b.npz").unlink()  # gone while training
    with pytest.raises(ValueError, match="is left.*no such camera file"):
        paths.draw(np.random.default_rng(0))


def test_named_paths(tmp_path):
    for number in range(1, 11):
        expected = tr.recammaster(number, 17, 1.5)
        np.testing.assert_array_equal(cameras.named_path(str(number), 17, 1.5), expected)
        np.testing.assert_array_equal(cameras.named_path(tr.PATHS[number - 1], 17, 1.5), expected)
    np.testing.assert_array_equal(cameras.named_path("static", 9), np.tile(np.eye(4), (9, 1, 1)))
    rng = np.random.default_rng(5)
    path, world = walk(rng, 33), pose(rng)
    np.savez(tmp_path / "mine.npz", c2w=world @ path)
    np.testing.assert_allclose(cameras.named_path(tmp_path / "mine.npz", 33), path, atol=1e-9)
    v, omega = tr.speeds(cameras.named_path(str(tmp_path / "mine.npz"), 17))
    faster = cameras.named_path(tmp_path / "mine.npz", 17, 1.5)
    np.testing.assert_allclose(tr.speeds(faster), (1.5 * v, 1.5 * omega))
    with pytest.raises(FileNotFoundError, match="arc_left.*static"):
        cameras.named_path("sideways")


def test_a_file_of_too_many_poses_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", c2w=np.zeros((2_000_000, 4, 4)))  # 0.3 MB hold 256
    with pytest.raises(ValueError, match="bomb.npz: 256 MB, expected at most 100000 poses"):
        cameras.read_path(tmp_path / "bomb.npz")
