"""Camera files of all formats, one reader; folders of them, to draw training paths from; a clip's own cameras.

What they give is c2w (T, 4, 4) as in trajectories.py, relative to the first camera.
"""
import json
import math
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

import trajectories
from data.video import without_suffix
from trajectories import PATHS, check, recammaster, relative, resample, scale_motion


# ---- one file ----

def split_name(name):
    """"a/camera_extrinsics.json#cam03" -> (Path of the file, "cam03"); any other name -> (Path, None)."""
    match = re.fullmatch(r"(.+)#(cam\d+)", str(name))
    return (Path(match[1]), match[2]) if match else (Path(name), None)


def read_path(name):
    """One camera file -> c2w (T, 4, 4) relative to its first frame, in its unit (MultiCamVideo: metres).

    - OmniWorld-Game camera/split_<i>.json: quats (w, x, y, z) and trans, world-to-camera; as many frames as
      split_info.json, beside the camera folder, says (where there is one);
    - OmniWorld's coarser recon/split_<i>/info.json and droidclib/split_<i>.json: extrinsics (T, 4, 4), c2w;
    - MultiCamVideo camera_extrinsics.json: ten cameras in a file, one of which is named as file.json#cam03;
    - .npz: c2w, or extrinsic (Sekai), cam_c2w (MegaSaM), data (ViPE), or its only (T, 4, 4) array; .npy.

    FileNotFoundError, or a ValueError naming file, frame (if one is to blame) and reason.
    """
    file, camera = split_name(name)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no such camera file")
    try:
        if file.suffix in (".npz", ".npy"):
            return relative(check(read_numpy(file), name))
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, found a {type(data).__name__}")
        if "extrinsics" in data:
            return relative(check(data["extrinsics"], name))
        if not any(key.startswith("frame") for key in data):
            return relative(check(read_omniworld(file, data), name))
        c2w = check(read_unreal(data, camera), name)
        # Unreal: camera axes forward, right, up in a left-handed world, centimetres. Renaming the axes leaves
        # absolute poses with determinant -1; only relative ones are rotations.
        c2w = c2w[..., [1, 2, 0, 3]] * [1, -1, 1, 1]
        c2w[:, :3, 3] /= 100
        return relative(c2w)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{name}: truncated or broken file ({e})") from None
    except KeyError as e:
        raise ValueError(f"{name}: missing key {e}") from None
    except Exception as e:  # whatever else a malformed file makes json, numpy or zlib raise
        raise ValueError(f"{name}: {str(e).removeprefix(f'{name}: ')}") from None


def read_numpy(file):
    array = np.load(file)  # refuses pickles
    if file.suffix == ".npy":
        return array
    with array:
        for key in ("c2w", "extrinsic", "cam_c2w", "data"):
            if key in array:
                return array[key]
        shapes = {key: array[key].shape for key in array}
        paths = [key for key, shape in shapes.items() if len(shape) == 3 and shape[1:] == (4, 4)]
        if len(paths) != 1:
            raise ValueError(f"missing key 'c2w' or 'extrinsic' (found {shapes})")
        return array[paths[0]]


def read_omniworld(file, data):
    quats, trans = np.array(data["quats"], np.float64), np.array(data["trans"], np.float64)
    frames, info = len(trans), file.parent.parent / "split_info.json"
    if info.is_file():
        try:
            frames = len(json.loads(info.read_text())["split"][int(file.stem.removeprefix("split_"))])
        except Exception as e:
            raise ValueError(f"its frames are not in split_info.json ({e!r})") from None
    if quats.shape != (frames, 4) or trans.shape != (frames, 3):
        raise ValueError(f"wrong number of frames (expected {frames}, found {quats.shape} and {trans.shape})")
    bad = ~(np.linalg.norm(quats, axis=1) > 1e-8)  # NaN too
    if bad.any():
        i = bad.argmax()
        raise ValueError(f"frame {i}: not a rotation (found quaternion {quats[i].tolist()})")
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3] = Rotation.from_quat(quats[:, [1, 2, 3, 0]]).inv().as_matrix()  # scipy: x, y, z, w
    c2w[:, :3, 3:] = -c2w[:, :3, :3] @ trans[..., None]
    return c2w


def read_unreal(data, camera):
    """{"frame0": {"cam01": "[r r r 0] [r r r 0] [r r r 0] [x y z 1] ", ..}, ..} -> one camera's (T, 4, 4)."""
    poses = []
    for i in range(sum(key.startswith("frame") for key in data)):
        cameras = data.get(f"frame{i}", {})
        if camera is None and len(cameras) > 1:
            raise ValueError(f"{len(cameras)} cameras in one file, name one as in file.json#{min(cameras)}")
        text = cameras.get(camera or min(cameras, default=None))
        if text is None:
            raise ValueError(f"frame {i}: missing" + (f" {camera}" if cameras else ""))
        numbers = text.replace("[", " ").replace("]", " ").split()
        if len(numbers) != 16:
            raise ValueError(f"frame {i}: wrong shape (expected 16 numbers, found {len(numbers)})")
        poses.append(np.array(numbers, np.float64).reshape(4, 4).T)
    return np.stack(poses)


def named_path(path, frames=81, speed=1.0):
    """A path as users name it, an evaluation path, "static" or a camera file: c2w (frames, 4, 4), first = I.

    A file (see read_path) is resampled from start to end, then its motion multiplied by speed.
    """
    if path in PATHS or str(path).isdecimal():
        return recammaster(path, frames, speed)
    if path == "static":
        return resample(np.eye(4)[None], frames)
    if not split_name(path)[0].is_file():
        raise FileNotFoundError(f"no path {str(path)!r}: expected 1-10, {', '.join(PATHS)}, static or a file")
    return scale_motion(resample(read_path(path), frames), speed, speed)


# ---- a folder of them ----

def find_paths(folder):
    """Sorted names, as read_path takes them, of all camera files below a folder; none is opened.

    Folders of images, masks and text, and OmniWorld-Game's coarser droidclib poses, are not entered. Each
    camera_extrinsics.json counts as its ten cameras. FileNotFoundError for a missing folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of camera paths")
    others = {"color", "depth", "prior_depth", "flow", "gdino_mask", "subject_masks", "text", "droidclib"}
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in others]
        for file in (os.path.join(root, f) for f in files):
            if file.endswith("camera_extrinsics.json"):
                names += [f"{file}#cam{i:02d}" for i in range(1, 11)]
            elif re.search(r"\.np[yz]$|split_\d+\.json$|split_\d+/info\.json$", file):
                names.append(file)
    return sorted(names)


class PathFolder:
    """The camera paths below a folder, opened when drawn: a folder of 96,000 is only listed at the start.

    What cannot be read or has fewer than `frames` frames is skipped and counted with its reason; ValueError
    where nothing is usable.
    """

    def __init__(self, folder, frames=1):
        self.folder, self.frames, self.names, self.skipped = folder, frames, find_paths(folder), {}
        if next(iter(self), None) is None:  # opens files up to the first usable one
            raise ValueError(f"{folder}: no usable camera path of {frames} or more frames: {self.summary()}")

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        """All usable whole paths, c2w (T, 4, 4), one after another."""
        return (c2w for c2w in map(self.read, self.names) if c2w is not None)

    def read(self, name):
        """One whole path, or None after noting why it is skipped."""
        try:
            if name not in self.skipped:
                c2w = read_path(name)
                if len(c2w) >= self.frames:
                    return c2w
                self.skipped[name] = f"too short (found {len(c2w)} frames, expected {self.frames})"
        except (ValueError, OSError) as e:
            self.skipped[name] = str(e).removeprefix(f"{name}: ")

    def draw(self, rng):
        """A random stretch of a random path, c2w (frames, 4, 4), first = identity, by a numpy Generator.

        The same rng state gives the same stretch whatever was drawn before.
        """
        while len(self.skipped) < len(self):
            c2w = self.read(self.names[rng.integers(len(self))])
            if c2w is not None:
                start = rng.integers(len(c2w) - self.frames + 1)
                return relative(c2w[start:start + self.frames])
        raise ValueError(f"{self.folder}: no usable camera path is left: {self.summary()}")

    def summary(self):
        """One line: how many paths are listed, how many of those opened were skipped and why."""
        why = Counter(re.sub(r"^frame \d+: | \(.*\)$", "", reason) for reason in self.skipped.values())
        first = "".join(f"; first: {name}: {reason}" for name, reason in list(self.skipped.items())[:1])
        return (f"{len(self)} camera paths, {len(self.skipped)} skipped"
                + "".join(f", {n} x {reason}" for reason, n in why.most_common()) + first)


# ---- a clip's own cameras ----

def read_focal(file, shape):
    """(fx/W, fy/H) of the first frame from an .npz's intrinsics, intrinsic or data (ViPE's); None without.
    (4,) or (T, 4) fx fy cx cy, or matrices (3, 3) or (T, 3, 3); in pixels of the stored video, whose shape is
    (H, W), or normalised, which is told by fx below 10."""
    if file.suffix != ".npz" or not file.is_file():
        return None
    with np.load(file) as arrays:
        key = next((key for key in ("intrinsics", "intrinsic", "data") if key in arrays), None)
        if key is None or key == "data" and file.parent.name != "intrinsics":
            return None
        k = np.asarray(arrays[key], dtype=np.float64)
    fx, fy = k.reshape(-1, 9)[0, [0, 4]] if k.shape[-2:] == (3, 3) else k.reshape(-1, 4)[0, :2]
    if not (np.isfinite([fx, fy]).all() and min(fx, fy) > 0):
        raise ValueError(f"{file}: focal lengths {fx:.4g} and {fy:.4g} must be positive")
    return (fx, fy) if fx < 10 else (fx / shape[1], fy / shape[0])


def check_fov(fov):
    """ValueError unless a field of view, in degrees, is one."""
    if not 0 < fov < 180:
        raise ValueError(f"fov: expected degrees between 0 and 180, found {fov:g}")


def source_cameras(video, numbers, shape, name, cameras, fov=None):
    """A clip's cameras -> c2w (T, 4, 4), metres, relative to its first, and normalised intrinsics (4,).
    video: uint8 (T, H, W, 3), scaled and cropped; numbers (T,): its frames as rows of a camera file
    shape: (H, W) of the stored video; fov: its horizontal view in degrees, for files without intrinsics
    cameras: an estimator, videos (1, T, H, W, 3) -> metric c2w (1, T, 4, 4) and intrinsics (1, 4), or a
        file that cameras.read_path reads (an .npz may hold intrinsics too: read_focal), or a folder that
        for a clip a/b.mp4 holds a/b.npz, .npy or .json, or ViPE's pose/b.npz and intrinsics/b.npz
    ValueError with the reason where there are none, too few, or the estimator failed."""
    if callable(cameras):
        c2w, intrinsics = cameras(video[None])
        if not c2w.isfinite().all():
            raise ValueError("the pose estimator failed on it")
        c2w, focal = trajectories.check(c2w[0].double().cpu().numpy(), "estimate"), intrinsics[0, :2].tolist()
    else:
        stem = Path(cameras) / without_suffix(name)
        vipe = Path(cameras) / "pose" / f"{stem.name}.npz"
        files = Path(cameras), Path(f"{stem}.npz"), Path(f"{stem}.npy"), Path(f"{stem}.json"), vipe
        file = next((f for f in files if split_name(f)[0].is_file()), None)
        if file is None:
            raise ValueError(f"no camera file {stem}.npz, .npy or .json, nor {vipe}")
        c2w = read_path(file)
        if len(c2w) <= numbers[-1]:
            raise ValueError(f"{file}: {len(c2w)} cameras, but the clip's last frame is {numbers[-1]}")
        c2w, (h, w), (height, width) = c2w[numbers], shape, video.shape[1:3]
        focal = read_focal(file, shape)
        if focal is None and file.parent.name == "pose":  # ViPE's
            focal = read_focal(file.parent.parent / "intrinsics" / file.name, shape)
        if focal is None and fov is None:
            raise ValueError(f"{file}: no intrinsics; give --fov, the horizontal field of view in degrees")
        fx, fy = focal or (0.5 / math.tan(math.radians(fov) / 2) * np.array([1, w / h]))  # square pixels
        scale = max(height / h, width / w)  # as in resize_to_cover
        focal = fx * w * scale / width, fy * h * scale / height
    return torch.from_numpy(trajectories.relative(c2w)), torch.tensor([*focal, 0.5, 0.5], dtype=torch.float32)
