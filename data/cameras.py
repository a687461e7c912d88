"""Camera files of all formats, one reader; folders of them, to draw training paths from; a clip's own cameras.

What they give is c2w (T, 4, 4) as in trajectories.py, relative to the first camera. No convention is guessed
from a shape. Published layouts have known ones. Other files say theirs in a key (c2w, w2c, viewmats, ...; OpenCV
axes), or are told by their name:

    path.npz@w2c         world-to-camera matrices, OpenCV axes (x right, y down, z forward)
    folder@c2w,opengl    camera-to-world matrices, OpenGL axes (x right, y up, z backward), of a folder's files
"""
import json
import math
import os
import re
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

import trajectories
from data.video import natural, without_suffix
from trajectories import PATHS, check, interpolate, recammaster, relative, resample, scale_motion

FORMATS = ("JSON of OmniWorld-Game, MultiCamVideo and nerfstudio; .npz (of ViPE, MegaSaM), .npy or JSON with "
           "matrices (T, 4, 4) or (T, 3, 4); text of RealEstate10K, TUM and KITTI; COLMAP's images.txt")
NO_FORMAT = f"not a camera format that is read here: {FORMATS}"
ROUNDING = 0.01  # by which R R^T of a rotation may differ from the identity: three decimals, float16
LONGEST_GAP = 8  # frames from one row to the next; those between are interpolated


@dataclass
class Cameras:
    """What a camera file holds."""
    poses: np.ndarray         # (N, 4, 4) or (N, 3, 4), one a row
    direction: str = None     # c2w or w2c; None: the file does not say
    axes: str = None          # opencv or opengl; None: the file does not say
    numbers: list = None      # the rows' N frame numbers, rising; None: one frame after another
    absolute: bool = False    # whether the numbers are the video's frames', or only their differences count
    intrinsics: tuple = None  # fx, fy, cx, cy of the first, pixels or shares of the size; fy None: square pixels
    size: tuple = None        # (width, height) of the picture that they are of; None: the file does not say


# ---- names ----

def split_name(name):
    """"a/camera_extrinsics.json#cam03@w2c" -> (Path of the file, "cam03" or None, {"direction": "w2c"}).

    ValueError for what is no convention.
    """
    name, words = str(name), ""
    if not Path(name).exists() and re.search(r"@[\w,]+$", name):
        name, _, words = name.rpartition("@")
    told = {}
    for word in filter(None, words.split(",")):
        kinds = {"c2w": "direction", "w2c": "direction", "opencv": "axes", "opengl": "axes"}
        if word not in kinds or kinds[word] in told:
            raise ValueError(f"{name}@{words}: expected a convention, @c2w or @w2c, with OpenGL's axes @c2w,opengl "
                             f"or @w2c,opengl, found {word!r}")
        told[kinds[word]] = word
    match = re.fullmatch(r"(.+)#(cam\d+)", name)
    return (Path(match[1]), match[2], told) if match else (Path(name), None, told)


def suffix_of(name):
    """What a name tells of its convention, as it was written: "@w2c", or ""."""
    told = split_name(name)[2]
    return "@" + ",".join(told.values()) if told else ""


# ---- one file ----

def read_path(name):
    """One camera file -> c2w (T, 4, 4) relative to its first frame, in its unit (MultiCamVideo: metres).

    Its format is one of FORMATS; one of the ten cameras in MultiCamVideo's file is named as file.json#cam03.
    Frames that its rows leave out (ViPE's inds) are interpolated.
    FileNotFoundError, or a ValueError naming file, frame (if one is to blame) and reason.
    """
    return relative(read_cameras(name).poses)


def read_cameras(name):
    """One camera file -> Cameras; poses: valid c2w (T, 4, 4), OpenCV axes, any world frame, a frame apart."""
    file, camera, told = split_name(name)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no such camera file")
    try:
        cameras = read_file(file, camera, name)
        cameras.poses = opencv_c2w(cameras, told, name)
        return every_frame(cameras)
    except (json.JSONDecodeError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{name}: truncated or broken file ({e})") from None
    except KeyError as e:
        raise ValueError(f"{name}: missing key {e}") from None
    except Exception as e:  # whatever else a malformed file makes json, numpy or zlib raise
        raise ValueError(f"{name}: {str(e).removeprefix(f'{name}: ')}") from None


def read_file(file, camera, name):
    """A file's content as Cameras; camera: which one, where it holds several; name: for messages."""
    if file.suffix == ".npy":
        return Cameras(np.load(file))  # refuses pickles
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return matrices(arrays)
    if file.suffix not in (".json", ".txt"):
        raise ValueError(NO_FORMAT)
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".txt":
        return images_txt(file, text) if file.name == "images.txt" else columns(text)
    data = json.loads(text)
    if isinstance(data, list):
        data = {"": data}
    if not isinstance(data, dict):
        raise ValueError(NO_FORMAT)
    if isinstance(data.get("frames"), list):
        return nerfstudio(data)
    if any(re.fullmatch(r"frame\d+", key) for key in data):
        return multicam(file, data, camera, name)
    if {"quats", "trans"} & {*data}:
        return omniworld(file, data)
    cameras = matrices(data)
    if re.search(r"(recon/split_\d+/info|droidclib/split_\d+)\.json$", file.resolve().as_posix()):
        cameras.direction = "c2w"  # OmniWorld's coarser poses
    return cameras


def opencv_c2w(cameras, told, name):
    """Poses of any convention -> c2w (N, 4, 4), OpenCV axes; told: the convention that the name tells."""
    poses = np.array(cameras.poses, np.float64)
    if poses.ndim == 3 and poses.shape[1:] == (3, 4):
        poses = np.concatenate([poses, np.tile([0.0, 0, 0, 1], (len(poses), 1, 1))], 1)
    poses = check(unrounded(poses, name), name)
    said = {"direction": cameras.direction, "axes": cameras.axes}
    for what, word in told.items():
        if said[what] not in (None, word):
            raise ValueError(f"its format or key says {said[what]}, its name {word}: leave that out of the name")
    said |= told
    if said["direction"] is None:
        raise ValueError("does not say whether it holds camera-to-world or world-to-camera matrices: name it, or "
                         "its folder, as FILE@c2w or FILE@w2c (with OpenGL's axes FILE@c2w,opengl)")
    if said["direction"] == "w2c":
        poses = np.linalg.inv(poses)
    if said["axes"] == "opengl":
        poses = poses * [1, -1, -1, 1]  # the camera's y and z axes, the second and third column
    return poses


def unrounded(poses, name):
    """Rotations of (N, 4, 4) that were rounded, by up to 0.01 in R R^T, made exact, with a warning.
    ValueError where one is off by more. What is not finite, or of another shape, is left for check."""
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not np.isfinite(poses).all():
        return poses
    R = poses[:, :3, :3]
    off = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max((1, 2))
    worst = off.max(initial=0)
    if worst > ROUNDING:
        i = (off > ROUNDING).argmax()
        raise ValueError(f"frame {i}: not a rotation (R R^T differs from the identity by {off[i]:.2g}; up to "
                         f"{ROUNDING} would count as rounding)")
    if worst > 1e-4 and (np.linalg.det(R) > 0).all():
        poses = poses.copy()
        poses[:, :3, :3] = Rotation.from_matrix(R).as_matrix()
        warn_rounded(split_name(name)[0].parent, f"{name}: its rotations are rounded (R R^T differs from the "
                     f"identity by up to {worst:.1e}) and are made exact")
    return poses


WARNED = set()  # folders of which warn_rounded has spoken


def warn_rounded(folder, message):
    """One warning a folder: a data set has thousands of such files."""
    if folder not in WARNED:
        WARNED.add(folder)
        print(f"warning: {message}", file=sys.stderr)


def every_frame(cameras):
    """Cameras with one pose for every frame from the first row's to the last row's."""
    if cameras.numbers is None:
        return cameras
    numbers = np.asarray(cameras.numbers)
    gaps = np.diff(numbers) if numbers.ndim == 1 else np.zeros(1)
    if numbers.dtype.kind not in "iu" or len(numbers) != len(cameras.poses) or min(gaps, default=1) < 1:
        raise ValueError(f"expected a rising frame number for each of its {len(cameras.poses)} cameras, found "
                         f"{len(numbers)}: {numbers.tolist()!s:.80}")
    if max(gaps, default=1) > LONGEST_GAP:
        i = (gaps > LONGEST_GAP).argmax()
        raise ValueError(f"no camera between frames {numbers[i]} and {numbers[i + 1]}")
    if max(gaps, default=1) > 1:
        cameras.poses = interpolate(cameras.poses, numbers, np.arange(numbers[0], numbers[-1] + 1))
    cameras.numbers = list(range(numbers[0], numbers[-1] + 1))
    return cameras


# ---- formats ----

SAYS = {  # what a key says, in small letters and without separators
    "c2w": r"c2w|cam(era)?s?(2|to)w|worldfromcam|^twc$",
    "w2c": r"w2c|world(2|to)c|cam(era)?fromworld|viewmat|^tcw$"}
INTRINSICS = ("intrinsics", "intrinsic", "K", "Ks")
SILENT = ("extrinsics", "extrinsic", "poses", "pose")  # keys of matrices that do not say which


def said_by(key):
    """"c2w" or "w2c" as a key says, None for one that does not say."""
    plain = re.sub(r"[^a-z0-9]", "", key.lower())
    return next((word for word, pattern in SAYS.items() if re.search(pattern, plain)), None)


def looks_like_poses(x):
    try:
        shape = np.shape(x)
    except ValueError:  # lists of different lengths
        return False
    return len(shape) == 3 and shape[1:] in ((3, 4), (4, 4))


def matrices(arrays):
    """Arrays or lists by name, of an .npz or a JSON file -> Cameras."""
    says = sorted((key for key in arrays if said_by(key)), key=said_by)  # c2w first
    known = [key for key in ("data", *SILENT) if key in arrays]  # data: ViPE's
    if says and [said_by(key) for key in says].count("c2w") < 2:
        known = says[:1] + known
    rest = [] if known else [key for key in arrays if key not in INTRINSICS and looks_like_poses(arrays[key])]
    if not known and len(rest) != 1:
        found = ", ".join(arrays)
        raise ValueError(f"which of its matrices are the cameras'? Expected one key with c2w or w2c, found {found}"
                         if rest else f"{NO_FORMAT}; found keys {found!s:.100}")
    key = (known or rest)[0]
    numbers = next((arrays[name] for name in ("inds", "frame_indices") if name in arrays), None)
    return Cameras(arrays[key], "c2w" if key == "data" else said_by(key), None, numbers, numbers is not None,
                   intrinsics_of(arrays))


def intrinsics_of(arrays):
    """(fx, fy, cx, cy) of the first frame from arrays by name: (4,) or (T, 4) of them, or matrices (3, 3) or
    (T, 3, 3), or focals with cx and cy. None without."""
    key = next((key for key in INTRINSICS if key in arrays), None)
    if key:
        k = np.asarray(arrays[key], np.float64)
        if k.shape[-2:] == (3, 3):
            return tuple(k.reshape(-1, 9)[0, [0, 4, 2, 5]])
        if k.ndim in (1, 2) and k.shape[-1] == 4 and len(k):
            return tuple(k.reshape(-1, 4)[0])
    if all(name in arrays for name in ("focals", "cx", "cy")):
        f, cx, cy = (float(np.ravel(arrays[name])[0]) for name in ("focals", "cx", "cy"))
        return f, f, cx, cy
    return None


def rigid(rotations, positions):
    """Rotations (N) and positions (N, 3) -> (N, 4, 4)."""
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3, :3] = rotations.as_matrix()
    poses[:, :3, 3] = positions
    return poses


def quaternions(wxyz):
    """(N, 4) w x y z, of any length but 0 -> rotations."""
    bad = ~(np.linalg.norm(wxyz, axis=1) > 1e-8)  # NaN too
    if bad.any():
        raise ValueError(f"frame {bad.argmax()}: not a rotation (found quaternion {wxyz[bad.argmax()].tolist()})")
    return Rotation.from_quat(wxyz[:, [1, 2, 3, 0]])  # scipy: x, y, z, w


def omniworld(file, data):
    """OmniWorld-Game's camera/split_<i>.json: quats (w, x, y, z) and trans, world-to-camera; as many frames as
    split_info.json, beside the camera folder, says (where there is one)."""
    quats = np.array(data["quats"], np.float64)
    trans = np.array(data["trans"], np.float64)
    frames, info = len(trans), file.parent.parent / "split_info.json"
    if info.is_file():
        try:
            frames = len(json.loads(info.read_text())["split"][int(file.stem.removeprefix("split_"))])
        except Exception as e:
            raise ValueError(f"its frames are not in split_info.json ({e!r})") from None
    if quats.shape != (frames, 4) or trans.shape != (frames, 3):
        raise ValueError(f"wrong number of frames (expected {frames}, found {quats.shape} and {trans.shape})")
    return Cameras(rigid(quaternions(quats), trans), "w2c", "opencv", intrinsics=intrinsics_of(data))


def multicam(file, data, camera, name):
    """MultiCamVideo's {"frame0": {"cam01": "[r r r 0] [r r r 0] [r r r 0] [x y z 1] ", ..}, ..}, of lists too."""
    poses = []
    for i in range(sum(key.startswith("frame") for key in data)):
        cameras = data.get(f"frame{i}", {})
        if camera is None and len(cameras) > 1:
            raise ValueError(f"{len(cameras)} cameras in one file, name one as in file.json#{min(cameras)}")
        numbers = cameras.get(camera or min(cameras, default=None))
        if numbers is None:
            raise ValueError(f"frame {i}: missing" + (f" {camera}" if cameras else ""))
        if isinstance(numbers, str):
            numbers = numbers.replace("[", " ").replace("]", " ").split()
        numbers = np.array(numbers, np.float64)
        if numbers.size != 16:
            raise ValueError(f"frame {i}: wrong shape (expected 16 numbers, found {numbers.size})")
        poses.append(numbers.reshape(4, 4).T)
    poses = check(unrounded(np.stack(poses), name), name)
    # Unreal: camera axes forward, right, up in a left-handed world, centimetres. Renaming the axes leaves
    # absolute poses with determinant -1; only relative ones are rotations.
    poses = poses[..., [1, 2, 0, 3]] * [1, -1, 1, 1]
    poses[:, :3, 3] /= 100
    lens = re.search(r"/f(\d+)_aperture", file.resolve().as_posix())  # in mm; the sensor is 23.76 mm wide
    intrinsics = (int(lens[1]) / 23.76, None, 0.5, 0.5) if lens else None
    return Cameras(relative(poses), "c2w", "opencv", range(len(poses)), True, intrinsics)


def in_order(names):
    """Pictures' file names -> their natural order, and their numbers in it (None where one has none)."""
    order = sorted(range(len(names)), key=lambda i: natural(names[i]))
    digits = [re.search(r"(\d+)\D*$", Path(names[i]).stem) for i in order]
    return order, [int(x[1]) for x in digits] if all(digits) else None


def nerfstudio(data):
    """transforms.json: camera-to-world, OpenGL axes; its frames in the order of their pictures' names."""
    model = data.get("camera_model", "OPENCV")
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE"):
        raise ValueError(f"camera_model {model}, expected a perspective one")
    frames = data["frames"]
    order, numbers = in_order([str(frame.get("file_path", "")) for frame in frames])
    poses = np.array([frames[i]["transform_matrix"] for i in order], np.float64)
    first = data | (frames[order[0]] if frames else {})  # intrinsics stand in the frame or at the top
    intrinsics, size = None, None
    if "camera_angle_x" in first:
        intrinsics = 0.5 / math.tan(float(first["camera_angle_x"]) / 2), None, 0.5, 0.5
    if all(key in first for key in ("fl_x", "cx", "cy")):
        intrinsics = tuple(float(first[key]) for key in ("fl_x", "fl_y" if "fl_y" in first else "fl_x", "cx", "cy"))
        size = (float(first["w"]), float(first["h"])) if {"w", "h"} <= {*first} else None
    return Cameras(poses, "c2w", "opengl", numbers, False, intrinsics, size)


def columns(text):
    """Text of as many numbers a line: RealEstate10K's, TUM's or KITTI's."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and lines[0][0].startswith("http"):  # RealEstate10K's first line
        lines = lines[1:]
    try:
        x = np.array(lines, np.float64)
    except ValueError:
        raise ValueError(NO_FORMAT) from None
    if x.ndim != 2 or x.shape[1] not in (8, 12, 19):
        raise ValueError(NO_FORMAT)
    if x.shape[1] == 12:  # KITTI: a matrix a line
        return Cameras(x.reshape(-1, 3, 4), "c2w", "opencv")
    if x.shape[1] == 8:  # TUM: time x y z qx qy qz qw
        poses, direction, intrinsics = rigid(quaternions(x[:, [7, 4, 5, 6]]), x[:, 1:4]), "c2w", None
    else:  # RealEstate10K: time fx fy cx cy 0 0 matrix
        poses, direction, intrinsics = x[:, 7:].reshape(-1, 3, 4), "w2c", tuple(x[0, 1:5])
    return Cameras(poses, direction, "opencv", frames_of(x[:, 0]), False, intrinsics)


def frames_of(times):
    """Frame numbers, from 0, of rows at the times (N,), most of which are a frame apart. ValueError where they are
    not whole frames apart."""
    steps = np.diff(times)
    if not len(steps):
        return [0]
    if not steps.min() > 0:  # NaN too
        raise ValueError(f"row {steps.argmin() + 1}: its time {times[steps.argmin() + 1]:.10g} is not after the last")
    for unit in (steps.min(), np.median(steps)):
        gaps = np.rint(steps / unit)
        if (gaps > 0).all() and np.abs(steps / unit - gaps).max() < 0.3:
            return [0, *np.cumsum(gaps).astype(int)]
    raise ValueError(f"its times are no whole frames apart, from {steps.min():.4g} to {steps.max():.4g}")


def images_txt(file, text):
    """COLMAP's images.txt, world-to-camera, in the order of the pictures' names; cameras.txt beside it."""
    rows = []
    for line in text.splitlines():
        words = line.split(maxsplit=9)  # id qw qx qy qz tx ty tz camera name; what else stands there are points
        if len(words) == 10 and words[0] != "#" and not re.fullmatch(r"[-+.\deE]+", words[9].split()[0]):
            rows.append(words)
    if not rows:
        raise ValueError(NO_FORMAT)
    order, numbers = in_order([row[9] for row in rows])
    rows = [rows[i] for i in order]
    x = np.array([row[1:8] for row in rows], np.float64)
    intrinsics, size, cameras = None, None, file.with_name("cameras.txt")
    lines = cameras.read_text().splitlines() if cameras.is_file() else []
    for _, model, *words in (words for words in map(str.split, lines) if words[:1] == [rows[0][8]]):
        size, parameters = (float(words[0]), float(words[1])), [float(word) for word in words[2:]]
        if model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
            intrinsics = parameters[0], parameters[0], parameters[1], parameters[2]
        elif model in ("PINHOLE", "OPENCV", "FULL_OPENCV"):
            intrinsics = tuple(parameters[:4])
    return Cameras(rigid(quaternions(x[:, :4]), x[:, 4:]), "w2c", "opencv", numbers, False, intrinsics, size)


# ---- paths by name ----

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
    """(names, others): sorted names, as read_path takes them, of all files below a folder that may hold
    cameras, and the number of other files. None is opened. A convention told of the folder, as in DATA@w2c, is
    told of each.

    Folders of images, masks, text and intrinsics, and OmniWorld-Game's coarser droidclib poses, are not
    entered. Each camera_extrinsics.json counts as its ten cameras. FileNotFoundError for a missing folder.
    """
    told = suffix_of(folder)
    folder = split_name(folder)[0]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of camera paths")
    closed = {"color", "depth", "prior_depth", "flow", "gdino_mask", "subject_masks", "text", "droidclib",
              "images", "intrinsics"}
    no_paths = {"split_info.json", "fps.txt", "cameras.txt", "points3D.txt", "rigs.txt", "frames.txt"}
    names, others = [], 0
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in closed]
        for file in files:
            path = os.path.join(root, file)
            if file.endswith("camera_extrinsics.json"):
                names += [f"{path}#cam{i:02d}{told}" for i in range(1, 11)]
            elif re.search(r"\.(np[yz]|json|txt)$", file) and file not in no_paths:
                names.append(path + told)
            else:
                others += 1
    return sorted(names), others


class PathFolder:
    """The camera paths below a folder, opened when drawn: a folder of 96,000 is only listed at the start.

    What cannot be read or has fewer than `frames` frames is skipped and counted with its reason; ValueError
    where nothing is usable.
    """

    def __init__(self, folder, frames=1):
        self.folder = folder
        self.frames = frames
        self.names, self.others = find_paths(folder)
        self.skipped = {}
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
        """One line: how many paths are listed, how many of those opened were skipped and why, and how many
        other files there are."""
        why = Counter(re.sub(r"^frame \d+: | \(.*\)$", "", reason) for reason in self.skipped.values())
        first = "".join(f"; first: {name}: {reason}" for name, reason in list(self.skipped.items())[:1])
        others = f"; {self.others} other files were passed over" if self.others else ""
        return (f"{len(self)} camera paths, {len(self.skipped)} skipped"
                + "".join(f", {n} x {reason}" for reason, n in why.most_common()) + first + others)


# ---- a clip's own cameras ----

def focal_of(cameras, shape):
    """Cameras' (fx/W, fy/H) for a video of shape (H, W), None without intrinsics.

    Intrinsics below 10 are shares of width and height. Others are pixels of a picture whose size the file says,
    or twice cx, cy tells: the video's, or another of its aspect ratio. ValueError where they contradict it.
    """
    if cameras.intrinsics is None:
        return None
    fx, fy, cx, cy = cameras.intrinsics
    H, W = shape
    fy = fx * W / H if fy is None else fy
    if not (np.isfinite([fx, fy, cx, cy]).all() and min(fx, fy) > 0):
        raise ValueError(f"focal lengths {fx:.4g} and {fy:.4g} must be positive, of a finite centre")
    if fx < 10 and cx < 10:
        return fx, fy
    w, h = cameras.size or (2 * cx, 2 * cy)
    if cameras.size is None and abs(w / W - 1) < 0.05 and abs(h / H - 1) < 0.05:
        w, h = W, H  # the video's own; its centre is a little off the middle
    if not abs(w / W * H / h - 1) < 0.05:
        raise ValueError(f"its intrinsics are of a picture of about {w:.0f} x {h:.0f}, the video is {W} x {H}: expected "
                         "that size, or another of its aspect ratio")
    return fx / w, fy / h


def read_focal(file, shape):
    """(fx/W, fy/H) of the first frame from an .npz, as ViPE writes it for intrinsics, for a video of (H, W)."""
    with np.load(file) as arrays:
        intrinsics = intrinsics_of({"K": arrays["data"]} if "data" in arrays else arrays)
    return focal_of(Cameras(None, intrinsics=intrinsics), shape)


def check_fov(fov):
    """ValueError unless a field of view, in degrees, is one."""
    if not 0 < fov < 180:
        raise ValueError(f"fov: expected degrees between 0 and 180, found {fov:g}")


def camera_file(cameras, name):
    """The camera file, as read_cameras takes it, of a clip `name` (its path below the videos folder).

    cameras: a file; or a folder that for a/b.mp4 holds a/b.npz, .npy, .json or .txt, a/b/transforms.json or
    images.txt, ViPE's pose/b.npz, or for a/cam03.mp4 MultiCamVideo's camera_extrinsics.json, in a or beside it in
    cameras. ValueError where there is none.
    """
    folder, camera, _ = split_name(cameras)
    stem = folder / without_suffix(name)
    numbered = f"#{stem.name}" if re.fullmatch(r"cam\d+", stem.name) else ""
    if folder.is_file():
        several = folder.name.endswith("camera_extrinsics.json") and camera is None
        return f"{folder}{numbered if several else ''}{suffix_of(cameras)}" if camera is None else str(cameras)
    files = [f"{stem}{suffix}" for suffix in (".npz", ".npy", ".json", ".txt")]
    files += [stem / "transforms.json", stem / "images.txt", stem / "sparse/0/images.txt"]
    files += [place / "pose" / f"{stem.name}.npz" for place in (folder, stem.parent)]
    if numbered:
        several = stem.parent / "camera_extrinsics.json", stem.parent.parent / "cameras/camera_extrinsics.json"
        files += [f"{file}{numbered}" for file in several]
    file = next((file for file in files if split_name(file)[0].is_file()), None)
    if file is None:
        raise ValueError(f"no camera file {stem}.npz, .npy, .json or .txt, nor {folder / 'pose' / stem.name}.npz")
    return f"{file}{suffix_of(cameras)}"


def cameras_of(found, numbers, count, name):
    """Cameras of a video's frames `numbers`, c2w (T, 4, 4). count: see source_cameras. ValueError where the rows
    are not known to be those frames, or leave some out."""
    first = found.numbers[0] if found.absolute else 0
    last = first + len(found.poses) - 1
    still = np.ptp(found.poses, axis=0).max() == 0
    if not found.absolute and not still:
        frames = count(len(found.poses)) if count else max(len(found.poses), numbers[-1] + 1)
        if frames != len(found.poses):
            raise ValueError(f"{name}: {len(found.poses)} cameras for a video of {frames} frames; expected one for each, "
                             "or an .npz with c2w and inds, the frames' numbers")
    if still:
        return found.poses[:1].repeat(len(numbers), 0)
    if numbers[0] < first or numbers[-1] > last:
        raise ValueError(f"{name}: has cameras for the frames {first} to {last}, but the clip's are {numbers[0]} to "
                         f"{numbers[-1]}")
    return found.poses[numbers - first]


def source_cameras(video, numbers, shape, name, cameras, fov=None, count=None):
    """A clip's cameras -> c2w (T, 4, 4), metres, relative to its first, and normalised intrinsics (4,).
    video: uint8 (T, H, W, 3), scaled and cropped; numbers (T,): its frames as rows of a camera file
    shape: (H, W) of the video as it is shown; fov: its horizontal view in degrees, for files without intrinsics
    cameras: an estimator, videos (1, T, H, W, 3) -> metric c2w (1, T, 4, 4) and intrinsics (1, 4), or the name
        of a file or folder as camera_file takes it
    count: how many frames the whole video has, a function of the number that is expected; None: at least those
    ValueError with the reason where there are none, too few, or the estimator failed."""
    if callable(cameras):
        c2w, intrinsics = cameras(video[None])
        if not c2w.isfinite().all():
            raise ValueError("the pose estimator failed on it")
        c2w = trajectories.check(c2w[0].double().cpu().numpy(), "estimate")
        focal = intrinsics[0, :2].tolist()
    else:
        name = camera_file(cameras, name)
        found = read_cameras(name)
        c2w = cameras_of(found, np.asarray(numbers), count, name)
        vipe = split_name(name)[0].parent.parent / "intrinsics" / split_name(name)[0].name
        try:
            focal = focal_of(found, shape)
            if focal is None and vipe.is_file() and split_name(name)[0].parent.name == "pose":
                focal = read_focal(vipe, shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if focal is None and fov is None:
            raise ValueError(f"{name}: no intrinsics; give --fov, the horizontal field of view in degrees")
        h, w = shape
        height, width = video.shape[1:3]
        fx, fy = focal or (0.5 / math.tan(math.radians(fov) / 2) * np.array([1, w / h]))  # square pixels
        scale = max(height / h, width / w)  # as in resize_to_cover
        focal = fx * w * scale / width, fy * h * scale / height
    return torch.from_numpy(trajectories.relative(c2w)), torch.tensor([*focal, 0.5, 0.5], dtype=torch.float32)
