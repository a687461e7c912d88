"""Camera paths: by name, from a folder to draw training paths from, and a clip's own.

What they give is c2w (T, 4, 4) as in trajectories.py, relative to the first camera. camera_files.py
reads the files, and says how a convention is told.
"""
import math
import os
import re
from collections import Counter

import numpy as np
import torch

from data.camera_files import (
    check_path, focal_of, read_cameras, read_focal, read_path, split_name, suffix_of)
from data.video import without_suffix
from trajectories import PATHS, recammaster, relative, resample, scale_motion


# ---- by name ----

def named_path(path, frames=81, speed=1.0):
    """A path as users name it, an evaluation path, "static" or a camera file: c2w (frames, 4, 4),
    whose first is the identity.

    A file (see read_path) is resampled from start to end, then its motion multiplied by speed.
    """
    if path in PATHS or str(path).isdecimal():
        return recammaster(path, frames, speed)
    if path == "static":
        return resample(np.eye(4)[None], frames)
    if not split_name(path)[0].is_file():
        raise FileNotFoundError(f"no path {str(path)!r}: expected 1-10, {', '.join(PATHS)}, static "
                                "or a file")
    return scale_motion(resample(read_path(path), frames), speed, speed)


# ---- a folder of them ----

def find_paths(folder):
    """(names, others): sorted names, as read_path takes them, of all files below a folder that may
    hold cameras, and the number of other files. None is opened. A convention told of the folder, as
    in DATA@w2c, is told of each.

    Folders of images, masks, text and intrinsics, and OmniWorld-Game's coarser droidclib poses, are
    not entered. Each camera_extrinsics.json counts as its ten cameras. FileNotFoundError for a
    missing folder.
    """
    told = suffix_of(folder)
    folder = split_name(folder)[0]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of camera paths")
    closed = {"color", "depth", "prior_depth", "flow", "gdino_mask", "subject_masks", "text",
              "droidclib", "images", "intrinsics"}
    no_paths = {"split_info.json", "fps.txt", "cameras.txt", "points3D.txt", "rigs.txt",
                "frames.txt"}
    names = []
    others = 0
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
    """The camera paths below a folder, opened when drawn: a folder of 96,000 is only listed at
    first.

    What cannot be read or has fewer than `frames` frames is skipped and counted with its reason;
    ValueError where nothing is usable.
    """

    def __init__(self, folder, frames=1):
        self.folder = folder
        self.frames = frames
        self.names, self.others = find_paths(folder)
        self.skipped = {}
        if next(iter(self), None) is None:  # opens files up to the first usable one
            raise ValueError(f"{folder}: no usable camera path of {frames} or more frames: "
                             f"{self.summary()}")

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
        """A random stretch of a random path, c2w (frames, 4, 4), relative to its first, by a
        Generator.

        The same rng state gives the same stretch whatever was drawn before.
        """
        while len(self.skipped) < len(self):
            c2w = self.read(self.names[rng.integers(len(self))])
            if c2w is not None:
                start = rng.integers(len(c2w) - self.frames + 1)
                return relative(c2w[start:start + self.frames])
        raise ValueError(f"{self.folder}: no usable camera path is left: {self.summary()}")

    def summary(self):
        """One line: how many paths are listed, how many of those opened were skipped and why, and
        how many other files there are."""
        short = lambda reason: re.sub(r"^frame \d+: | \(.*\)$", "", reason)
        why = Counter(map(short, self.skipped.values()))
        first = "".join(f"; first: {name}: {self.skipped[name]}" for name in list(self.skipped)[:1])
        others = f"; {self.others} other files were passed over" if self.others else ""
        return (f"{len(self)} camera paths, {len(self.skipped)} skipped"
                + "".join(f", {n} x {reason}" for reason, n in why.most_common()) + first + others)


# ---- a clip's own cameras ----

def check_fov(fov):
    """ValueError unless a field of view, in degrees, is one."""
    if not 0 < fov < 180:
        raise ValueError(f"fov: expected degrees between 0 and 180, found {fov:g}")


def camera_file(cameras, name):
    """The camera file, as read_cameras takes it, of a clip `name` (its path below the videos
    folder).

    cameras: a file; or a folder that for a/b.mp4 holds a/b.npz, .npy, .json or .txt,
    a/b/transforms.json or images.txt, or ViPE's pose/b.npz, and for a/cam03.mp4 MultiCamVideo's
    camera_extrinsics.json, in a or in the folder cameras beside it. ValueError where there is none.
    """
    folder, camera, _ = split_name(cameras)
    stem = folder / without_suffix(name)
    numbered = f"#{stem.name}" if re.fullmatch(r"cam\d+", stem.name) else ""
    if folder.is_file():
        several = camera is None and folder.name.endswith("camera_extrinsics.json")
        return f"{folder}{numbered}{suffix_of(cameras)}" if several else str(cameras)
    files = [f"{stem}{suffix}" for suffix in (".npz", ".npy", ".json", ".txt")]
    files += [stem / "transforms.json", stem / "images.txt", stem / "sparse/0/images.txt"]
    files += [place / "pose" / f"{stem.name}.npz" for place in (folder, stem.parent)]
    if numbered:
        for place in (stem.parent, stem.parent.parent / "cameras"):
            files.append(f"{place}/camera_extrinsics.json{numbered}")
    file = next((file for file in files if split_name(file)[0].is_file()), None)
    if file is None:
        raise ValueError(f"no camera file {stem}.npz, .npy, .json or .txt, nor "
                         f"{folder / 'pose' / stem.name}.npz")
    return f"{file}{suffix_of(cameras)}"


def rows_of(found, numbers, count, name):
    """Cameras of a video's frames `numbers`, c2w (T, 4, 4); count: see source_cameras. ValueError
    where the file's rows are not known to be the video's frames, or leave some out."""
    if np.ptp(found.poses, axis=0).max() == 0:  # it stands still: whatever frames the rows are
        return found.poses[:1].repeat(len(numbers), 0)
    rows = len(found.poses)
    first = found.numbers[0] if found.absolute else 0
    if not found.absolute:
        frames = count(rows) if count else max(rows, numbers[-1] + 1)
        if frames != rows:
            raise ValueError(f"{name}: {rows} cameras for a video of {frames} frames; expected one "
                             "for each, or an .npz with c2w and inds, the frames' numbers")
    if numbers[0] < first or numbers[-1] >= first + rows:
        raise ValueError(f"{name}: has cameras for the frames {first} to {first + rows - 1}, but "
                         f"the clip's are {numbers[0]} to {numbers[-1]}")
    return found.poses[numbers - first]


def source_cameras(video, numbers, shape, name, cameras, fov=None, count=None):
    """A clip's cameras -> c2w (T, 4, 4), metres, relative to its first, and normalised intrinsics
    (4,).
    video: uint8 (T, H, W, 3), scaled and cropped; numbers (T,): its frames as rows of a camera file
    shape: (H, W) of the video as it is shown
    fov: its horizontal view in degrees, for files without intrinsics
    cameras: an estimator, videos (1, T, H, W, 3) -> metric c2w (1, T, 4, 4) and intrinsics (1, 4),
        or the name of a file or folder as camera_file takes it
    count: how many frames the whole video has, a function of the number expected; None: enough
    ValueError with the reason where there are none, too few, or the estimator failed."""
    if callable(cameras):
        c2w, intrinsics = cameras(video[None])
        if not c2w.isfinite().all():
            raise ValueError("the pose estimator failed on it")
        c2w = check_path(c2w[0].double().cpu().numpy(), "estimate")
        focal = intrinsics[0, :2].tolist()
    else:
        name = camera_file(cameras, name)
        found = read_cameras(name)
        c2w = rows_of(found, np.asarray(numbers), count, name)
        focal = stored_focal(found, name, shape)
        if focal is None and fov is None:
            raise ValueError(f"{name}: no intrinsics; give --fov, the horizontal field of view in "
                             "degrees")
        h, w = shape
        height, width = video.shape[1:3]
        if focal is None:
            fx = 0.5 / math.tan(math.radians(fov) / 2)
            focal = fx, fx * w / h  # square pixels
        scale = max(height / h, width / w)  # as in resize_to_cover
        focal = focal[0] * w * scale / width, focal[1] * h * scale / height
    intrinsics = torch.tensor([*focal, 0.5, 0.5], dtype=torch.float32)
    return torch.from_numpy(relative(c2w)), intrinsics


def stored_focal(found, name, shape):
    """(fx/W, fy/H) of Cameras read from the file `name`, or from ViPE's other file; None
    without."""
    file = split_name(name)[0]
    vipe = file.parent.parent / "intrinsics" / file.name
    try:
        focal = focal_of(found, shape)
        if focal is None and file.parent.name == "pose" and vipe.is_file():
            focal = read_focal(vipe, shape)
        return focal
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
