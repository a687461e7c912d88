"""One camera file, of any format, told in any convention -> one camera a frame.

No convention is guessed from a shape. Published layouts have known ones. Other files say theirs in
a key (c2w, w2c, viewmats, ...; OpenCV axes), or are told by their name, or by that of their folder:

    path.npz@w2c         world-to-camera matrices, OpenCV axes (x right, y down, z forward)
    folder@c2w,opengl    camera-to-world matrices, OpenGL axes (x right, y up, z backward)
"""
import json
import math
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data.video import natural
from trajectories import interpolate, relative

FORMATS = ("JSON of OmniWorld-Game, MultiCamVideo and nerfstudio; .npz (of ViPE, MegaSaM), .npy or "
           "JSON with matrices (T, 4, 4) or (T, 3, 4); text of RealEstate10K, TUM and KITTI; "
           "COLMAP's images.txt")
NO_FORMAT = f"not a camera format that is read here: {FORMATS}"
ROUNDING = 0.01  # R R^T of a rotation may differ by it from the identity: three decimals, float16
LONGEST_GAP = 8  # frames from one row to the next; those between are interpolated
MOST = 100_000   # cameras in a file


@dataclass
class Cameras:
    """What a camera file holds."""
    poses: np.ndarray         # (N, 4, 4) or (N, 3, 4), one a row
    direction: str = None     # c2w or w2c; None: the file does not say
    axes: str = None          # opencv or opengl; None: the file does not say
    numbers: list = None      # the rows' N frame numbers, rising; None: one frame after another
    absolute: bool = False    # the numbers are the video's frames', or only their differences count
    intrinsics: tuple = None  # fx, fy, cx, cy of the first, in pixels or in shares of the picture's
                              # size; fy None: square pixels
    size: tuple = None        # (width, height) of that picture; None: the file does not say


# ---- names ----

def split_name(name):
    """"a/extrinsics.json#cam03@w2c" -> (Path of the file, "cam03" or None, {"direction": "w2c"}).

    ValueError for what is no convention.
    """
    name = str(name)
    words = ""
    if not Path(name).exists() and re.search(r"@[\w,]+$", name):
        name, _, words = name.rpartition("@")
    kinds = {"c2w": "direction", "w2c": "direction", "opencv": "axes", "opengl": "axes"}
    told = {}
    for word in filter(None, words.split(",")):
        if word not in kinds or kinds[word] in told:
            raise ValueError(f"{name}@{words}: expected a convention, @c2w or @w2c, with OpenGL's "
                             f"axes @c2w,opengl or @w2c,opengl, found {word!r}")
        told[kinds[word]] = word
    match = re.fullmatch(r"(.+)#(cam\d+)", name)
    return (Path(match[1]), match[2], told) if match else (Path(name), None, told)


def suffix_of(name):
    """What a name tells of its convention: "@w2c", or ""."""
    told = split_name(name)[2]
    return "@" + ",".join(told.values()) if told else ""


# ---- one file ----

def read_path(name):
    """One camera file -> c2w (T, 4, 4) relative to its first frame, in its unit (MultiCamVideo:
    metres).

    Its format is one of FORMATS; one of MultiCamVideo's ten cameras is named as file.json#cam03.
    Frames that its rows leave out (ViPE's inds) are interpolated.
    FileNotFoundError, or a ValueError naming file, frame (if one is to blame) and reason.
    """
    return relative(read_cameras(name).poses)


def read_cameras(name):
    """One camera file -> Cameras; poses: valid c2w (T, 4, 4), OpenCV axes, one for every frame."""
    file, camera, told = split_name(name)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no such camera file")
    try:
        check_size(file)
        cameras = read_file(file, camera, name)
        cameras.poses = opencv_c2w(cameras, told, name)
        return every_frame(cameras)
    except (json.JSONDecodeError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{name}: truncated or broken file ({e})") from None
    except KeyError as e:
        raise ValueError(f"{name}: missing key {e}") from None
    except Exception as e:  # whatever else a malformed file makes json, numpy or zlib raise
        raise ValueError(f"{name}: {str(e).removeprefix(f'{name}: ')}") from None


def check_size(file):
    """ValueError for a file that, unpacked, is larger than MOST cameras can be in any format."""
    size = file.stat().st_size
    if file.suffix == ".npz":
        with zipfile.ZipFile(file) as parts:
            size = sum(part.file_size for part in parts.infolist())
    if size > 2000 * MOST:
        raise ValueError(f"{size / 1e6:.0f} MB, expected at most {MOST} poses")


def read_file(file, camera, name):
    """A file's content as Cameras; camera: which one, if it holds several; name: for messages."""
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


def check_path(c2w, name="path"):
    """c2w as a valid path: float64 (T, 4, 4), T >= 1, rotations projected on SO(3).

    ValueError naming `name`, frame and reason unless all numbers are finite, last rows 0 0 0 1 and
    rotations orthonormal to 1e-4 with determinant +1.
    """
    c2w = np.array(c2w, np.float64)
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or not len(c2w):
        raise ValueError(f"{name}: wrong shape (expected (T, 4, 4), found {c2w.shape})")
    R = c2w[:, :3, :3]
    with np.errstate(invalid="ignore", over="ignore"):
        last_row_off = np.abs(c2w[:, 3] - [0, 0, 0, 1]).max(1)
        rotation_off = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max((1, 2))
        faults = {"not finite": ~np.isfinite(c2w).all((1, 2)),
                  "last row is not 0 0 0 1": last_row_off > 1e-4,
                  "not a rotation": rotation_off > 1e-4,
                  "a reflection, not a rotation": np.linalg.det(R) < 0}
    for reason, bad in faults.items():
        if bad.any():
            i = bad.argmax()
            found = c2w[i, :3].round(4).tolist()
            raise ValueError(f"{name}: frame {i}: {reason} (found {found})")
    R[:] = Rotation.from_matrix(R).as_matrix()  # rounding in a file must not look like motion
    return c2w


def opencv_c2w(cameras, told, name):
    """Poses of any convention -> c2w (N, 4, 4), OpenCV axes; told: what the name tells of it."""
    poses = np.array(cameras.poses, np.float64)
    if poses.ndim and len(poses) > MOST:
        raise ValueError(f"{len(poses)} cameras, expected at most {MOST}")
    if poses.ndim == 3 and poses.shape[1:] == (3, 4):
        poses = np.concatenate([poses, np.tile([0.0, 0, 0, 1], (len(poses), 1, 1))], 1)
    exact = unrounded(poses)
    checked = check_path(exact, name)
    said = {"direction": cameras.direction, "axes": cameras.axes}
    for what, word in told.items():
        if said[what] not in (None, word):
            raise ValueError(f"its format or key says {said[what]}, its name {word}: leave that "
                             "out of the name")
    said |= told
    if said["direction"] is None:
        raise ValueError("does not say whether it holds camera-to-world or world-to-camera "
                         "matrices: name it, or its folder, as FILE@c2w or FILE@w2c (with OpenGL's "
                         "axes FILE@c2w,opengl)")
    warn_of_rounding(poses, exact, name)
    c2w = np.linalg.inv(checked) if said["direction"] == "w2c" else checked
    if said["axes"] == "opengl":
        c2w = c2w * [1, -1, -1, 1]  # the camera's y and z axes, the second and third column
    return c2w


def unrounded(poses):
    """Rotations of (N, 4, 4) that were rounded, by up to 0.01 in R R^T, made exact. ValueError
    where one is off by more. What is not finite, or of another shape, is left for check_path."""
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not np.isfinite(poses).all():
        return poses
    R = poses[:, :3, :3]
    off = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max((1, 2))
    if off.max(initial=0) > ROUNDING:
        i = (off > ROUNDING).argmax()
        raise ValueError(f"frame {i}: not a rotation (R R^T differs from the identity by "
                         f"{off[i]:.2g}; up to {ROUNDING} would count as rounding)")
    if off.max(initial=0) > 1e-4 and (np.linalg.det(R) > 0).all():
        poses = poses.copy()
        poses[:, :3, :3] = Rotation.from_matrix(R).as_matrix()
    return poses


WARNED = set()  # folders


def warn_of_rounding(given, exact, name):
    """One warning a folder, as a data set has thousands of files, where `unrounded` changed any."""
    folder = split_name(name)[0].parent
    off = np.abs(given[:, :3, :3] - exact[:, :3, :3]).max()
    if exact is not given and folder not in WARNED:
        WARNED.add(folder)
        print(f"warning: {name}: its rotations are rounded, off by up to {off:.1e}, and are made "
              "exact", file=sys.stderr)


def every_frame(cameras):
    """Cameras with one pose for every frame from the first row's to the last row's."""
    if cameras.numbers is None:
        return cameras
    numbers = np.asarray(cameras.numbers)
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu"
    gaps = np.diff(numbers.astype(np.int64)) if whole else np.zeros(1)
    if not whole or min(gaps, default=1) < 1 or len(numbers) != len(cameras.poses):
        raise ValueError(f"expected a rising frame number for each of its {len(cameras.poses)} "
                         f"cameras, found {len(numbers)}: {numbers.tolist()!s:.80}")
    longest = max(gaps, default=1)
    if longest > LONGEST_GAP:
        i = gaps.argmax()
        raise ValueError(f"no camera between frames {numbers[i]} and {numbers[i + 1]}")
    frames = np.arange(numbers[0], numbers[-1] + 1)
    if longest > 1:
        cameras.poses = interpolate(cameras.poses, numbers, frames)
    cameras.numbers = frames.tolist()
    return cameras


def focal_of(cameras, shape):
    """Cameras' (fx/W, fy/H) for a video of shape (H, W), None without intrinsics.

    Intrinsics below 10 are shares of width and height. Others are pixels of a picture whose size
    the file says, or twice cx, cy tells: the video's, or another of its aspect ratio. ValueError
    where they contradict it.
    """
    if cameras.intrinsics is None:
        return None
    fx, fy, cx, cy = cameras.intrinsics
    H, W = shape
    fy = fx * W / H if fy is None else fy
    if not (np.isfinite([fx, fy, cx, cy]).all() and min(fx, fy) > 0):
        raise ValueError(f"focal lengths {fx:.4g} and {fy:.4g} must be positive, of a finite "
                         "centre")
    if fx < 10 and cx < 10:
        return fx, fy
    w, h = cameras.size or (2 * cx, 2 * cy)
    if cameras.size is None and abs(w / W - 1) < 0.05 and abs(h / H - 1) < 0.05:
        w = W  # the video's own size; its centre is a little off the middle
        h = H
    if not abs(w / W * H / h - 1) < 0.05:
        raise ValueError(f"its intrinsics are of a picture of about {w:.0f} x {h:.0f}, the video "
                         f"is {W} x {H}: expected that size, or another of its aspect ratio")
    return fx / w, fy / h


# ---- matrices by name: .npz, and JSON ----

SAYS = {  # what a key says, in small letters and without separators
    "c2w": r"c2w|cam(era)?s?(2|to)w|worldfromcam|^twc$",
    "w2c": r"w2c|world(2|to)c|cam(era)?fromworld|viewmat|^tcw$"}
INTRINSICS = ("intrinsics", "intrinsic", "K", "Ks")
SILENT = ("extrinsics", "extrinsic", "poses", "pose")  # keys of matrices that do not say which


def said_by(key):
    """"c2w" or "w2c" as a key says, None for one that does not say."""
    plain = re.sub(r"[^a-z0-9]", "", key.lower())
    return next((word for word, pattern in SAYS.items() if re.search(pattern, plain)), None)


def are_poses(x):
    """Whether an array, or lists, have the shape (T, 4, 4) or (T, 3, 4)."""
    try:
        shape = np.shape(x)
    except ValueError:  # lists of different lengths
        return False
    return len(shape) == 3 and shape[1:] in ((3, 4), (4, 4))


def matrices(arrays):
    """Arrays or lists by name, of an .npz or a JSON file -> Cameras."""
    says = [key for key in arrays if said_by(key)]
    says = sorted([key for key in says if are_poses(arrays[key])] or says, key=said_by)  # c2w first
    same = [key for key in says if said_by(key) == said_by(says[0])]
    known = same[:1]
    if len(same) != 1:  # none, or one of several
        known = [key for key in ("data", *SILENT) if key in arrays]  # data: ViPE's
    others = [key for key in arrays if key not in INTRINSICS and are_poses(arrays[key])]
    if not known and len(others) != 1:
        found = f"{', '.join(arrays):.100}"
        raise ValueError("which of its matrices are the cameras'? Expected one key with c2w or "
                         f"w2c, found {found}" if others else f"{NO_FORMAT}; found keys {found}")
    key = (known or others)[0]
    direction = "c2w" if key == "data" else said_by(key)
    numbers = next((arrays[name] for name in ("inds", "frame_indices") if name in arrays), None)
    absolute = numbers is not None
    return Cameras(arrays[key], direction, None, numbers, absolute, intrinsics_of(arrays))


def intrinsics_of(arrays):
    """(fx, fy, cx, cy) of the first frame from arrays by name: (4,) or (T, 4) of them, or matrices
    (3, 3) or (T, 3, 3), or focals with cx and cy. None without."""
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


def read_focal(file, shape):
    """(fx/W, fy/H) of the first frame, from ViPE's .npz of intrinsics, for a video of (H, W)."""
    with np.load(file) as arrays:
        intrinsics = intrinsics_of({"K": arrays["data"]} if "data" in arrays else arrays)
    return focal_of(Cameras(None, intrinsics=intrinsics), shape)


# ---- published layouts ----

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
        i = bad.argmax()
        raise ValueError(f"frame {i}: not a rotation (found quaternion {wxyz[i].tolist()})")
    return Rotation.from_quat(wxyz[:, [1, 2, 3, 0]])  # scipy: x, y, z, w


def omniworld(file, data):
    """OmniWorld-Game's camera/split_<i>.json: quats (w, x, y, z) and trans, world-to-camera; as
    many frames as split_info.json, beside the camera folder, says (where there is one)."""
    quats = np.array(data["quats"], np.float64)
    trans = np.array(data["trans"], np.float64)
    frames = len(trans)
    info = file.parent.parent / "split_info.json"
    if info.is_file():
        try:
            splits = json.loads(info.read_text())["split"]
            frames = len(splits[int(file.stem.removeprefix("split_"))])
        except Exception as e:
            raise ValueError(f"its frames are not in split_info.json ({e!r})") from None
    if quats.shape != (frames, 4) or trans.shape != (frames, 3):
        raise ValueError(f"wrong number of frames (expected {frames}, found {quats.shape} and "
                         f"{trans.shape})")
    poses = rigid(quaternions(quats), trans)
    return Cameras(poses, "w2c", "opencv", intrinsics=intrinsics_of(data))


def multicam(file, data, camera, name):
    """MultiCamVideo's {"frame0": {"cam01": "[r r r 0] [r r r 0] [r r r 0] [x y z 1] ", ..}, ..}, or
    with lists in the place of strings."""
    poses = []
    for i in range(sum(key.startswith("frame") for key in data)):
        cameras = data.get(f"frame{i}", {})
        if camera is None and len(cameras) > 1:
            raise ValueError(f"{len(cameras)} cameras in one file, name one as in "
                             f"file.json#{min(cameras)}")
        numbers = cameras.get(camera or min(cameras, default=None))
        if numbers is None:
            raise ValueError(f"frame {i}: missing" + (f" {camera}" if cameras else ""))
        if isinstance(numbers, str):
            numbers = numbers.replace("[", " ").replace("]", " ").split()
        numbers = np.array(numbers, np.float64)
        if numbers.size != 16:
            raise ValueError(f"frame {i}: wrong shape (expected 16 numbers, found {numbers.size})")
        poses.append(numbers.reshape(4, 4).T)
    given = np.stack(poses)
    exact = unrounded(given)
    poses = check_path(exact, name)
    warn_of_rounding(given, exact, name)
    # Unreal: camera axes forward, right, up in a left-handed world, centimetres. Renaming the axes
    # leaves absolute poses with determinant -1; only relative ones are rotations.
    poses = poses[..., [1, 2, 0, 3]] * [1, -1, 1, 1]
    poses[:, :3, 3] /= 100
    lens = re.search(r"/f(\d+)_aperture", file.resolve().as_posix())  # mm; the sensor is 23.76 wide
    intrinsics = (int(lens[1]) / 23.76, None, 0.5, 0.5) if lens else None
    return Cameras(relative(poses), "c2w", "opencv", range(len(poses)), True, intrinsics)


def in_order(names):
    """Pictures' file names -> their natural order, and their numbers in it (None without some)."""
    order = sorted(range(len(names)), key=lambda i: natural(names[i]))
    digits = [re.search(r"(\d+)\D*$", Path(names[i]).stem) for i in order]
    return order, [int(x[1]) for x in digits] if all(digits) else None


def nerfstudio(data):
    """transforms.json: camera-to-world, OpenGL axes; its frames in the order of their pictures."""
    model = data.get("camera_model", "OPENCV")
    perspective = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
    if model not in perspective:
        raise ValueError(f"camera_model {model}, expected one of {', '.join(perspective)}")
    frames = data["frames"]
    order, numbers = in_order([str(frame.get("file_path", "")) for frame in frames])
    poses = np.array([frames[i]["transform_matrix"] for i in order], np.float64)
    first = data | (frames[order[0]] if frames else {})  # intrinsics stand in frames or at the top
    intrinsics = None
    size = None
    if "camera_angle_x" in first:
        intrinsics = 0.5 / math.tan(float(first["camera_angle_x"]) / 2), None, 0.5, 0.5
    if {"fl_x", "cx", "cy"} <= {*first}:
        fl_y = first.get("fl_y", first["fl_x"])
        intrinsics = tuple(map(float, (first["fl_x"], fl_y, first["cx"], first["cy"])))
        size = (float(first["w"]), float(first["h"])) if {"w", "h"} <= {*first} else None
    return Cameras(poses, "c2w", "opengl", numbers, False, intrinsics, size)


def columns(text):
    """Text of as many numbers a line: RealEstate10K's, TUM's or KITTI's."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and lines[0].startswith("http"):  # RealEstate10K's first line
        lines = lines[1:]
    try:
        x = np.array([line.split() for line in lines], np.float64)
    except ValueError:
        raise ValueError(NO_FORMAT) from None
    width = x.shape[1] if x.ndim == 2 else 0
    if width == 12:  # KITTI: a matrix a line
        return Cameras(x.reshape(-1, 3, 4), "c2w", "opencv")
    if width == 8:  # TUM: time x y z qx qy qz qw
        poses = rigid(quaternions(x[:, [7, 4, 5, 6]]), x[:, 1:4])
        return Cameras(poses, "c2w", "opencv", frames_of(x[:, 0]))
    if width == 19:  # RealEstate10K: time fx fy cx cy 0 0 matrix
        poses = x[:, 7:].reshape(-1, 3, 4)
        return Cameras(poses, "w2c", "opencv", frames_of(x[:, 0]), False, tuple(x[0, 1:5]))
    raise ValueError(NO_FORMAT)


def frames_of(times):
    """Frame numbers, from 0, of rows at the times (N,), most of which are a frame apart. ValueError
    where they are not whole frames apart."""
    steps = np.diff(times)
    if not len(steps):
        return [0]
    if not steps.min() > 0:  # NaN too
        i = steps.argmin() + 1
        raise ValueError(f"row {i}: its time {times[i]:.10g} is not after the last")
    for unit in (steps.min(), np.median(steps)):
        gaps = np.rint(steps / unit)
        if (gaps > 0).all() and np.abs(steps / unit - gaps).max() < 0.3:
            return [0, *np.cumsum(gaps).astype(int)]
    raise ValueError(f"its times are no whole frames apart, from {steps.min():.4g} to "
                     f"{steps.max():.4g}")


def images_txt(file, text):
    """COLMAP's images.txt, world-to-camera, in the order of the pictures' names; cameras.txt beside
    it."""
    rows = []
    for line in text.splitlines():
        words = line.split(maxsplit=9)  # id qw qx qy qz tx ty tz camera name
        points = len(words) == 10 and re.fullmatch(r"[-+.\deE]+", words[9].split()[0])
        if len(words) == 10 and words[0] != "#" and not points:
            rows.append(words)
    if not rows:
        raise ValueError(NO_FORMAT)
    order, numbers = in_order([row[9] for row in rows])
    x = np.array([rows[i][1:8] for i in order], np.float64)
    poses = rigid(quaternions(x[:, :4]), x[:, 4:])
    intrinsics, size = colmap_camera(file.with_name("cameras.txt"), rows[order[0]][8])
    return Cameras(poses, "w2c", "opencv", numbers, False, intrinsics, size)


def colmap_camera(file, number):
    """(fx, fy, cx, cy) and (width, height) of a camera in COLMAP's cameras.txt, None for each
    without."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        words = line.split()  # id model width height parameters
        if words[:1] == [number]:
            size = float(words[2]), float(words[3])
            parameters = [float(word) for word in words[4:]]
            if words[1] in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
                return (parameters[0], *parameters[:3]), size
            if words[1] in ("PINHOLE", "OPENCV", "FULL_OPENCV"):
                return tuple(parameters[:4]), size
    return None, None
