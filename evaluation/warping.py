"""TrajectoryCrafter and CogNVS in the same tables: `python evaluate.py warp`, there and back.

Both warp each source frame into the target view and complete it, by code and weights of their own:
    python evaluate.py --videos=DAVIS --weights=... --frames=49 --out=E   our rows, and the sources
    python evaluate.py warp --method=CogNVS --evaluation=E --out=W        what CogNVS is to be given
    (CogNVS runs, and writes <case>.mp4 into a folder R)
    python evaluate.py warp --method=CogNVS --evaluation=E --out=W --back=R   its videos, renamed
    python evaluate.py --videos=DAVIS --weights=... --frames=49 --out=E --generated=W/CogNVS
Written to --out: inputs/<clip>.mp4; poses/<case>.npz with T1 and T2 (T, 4, 4) of source and target,
world-to-camera, OpenCV, metres: forward_warp of either method moves the points of frame i by
T2[i] inv(T1[i]). For TrajectoryCrafter also commands.sh, whose --target_pose takes the source's
camera to stand still.
Sources: TrajectoryCrafter (Yu et al., ICCV 2025), CogNVS (Chen et al., arXiv 2507.12646).
"""
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

import trajectories
from data.cameras import source_cameras
from data.clips import load_clip
from data.video import read_video, write_video
from evaluation.cases import case_name, find_clips, listed, split_case
from plumbing.files import read_json, write_file, write_json

METHODS = ("TrajectoryCrafter", "CogNVS")
LONGEST = 49  # frames of either method; CogNVS makes exactly as many
FAR = 5.0    # TrajectoryCrafter's radius with --radius_scale 1e9: capped at 5 depth units
NEAR = 1e-9  # and with 1e-9
LIMITS = 0.1, 0.2  # how far --target_pose may be off a path of 49 frames: depth units, degrees


@dataclass
class Warp:
    """python evaluate.py warp: what a warping method needs for an evaluation's cases, and its
    videos back."""
    method: str = ""            # TrajectoryCrafter or CogNVS
    evaluation: str = ""        # folder of an evaluation made with --frames=49
    cameras: str = ""           # source cameras: a file, a folder of them, or static; empty: that
                                # evaluation's
    paths: str = "1,2,3,4,5,6,7,8,9,10"  # ReCamMaster's, by number or name (paper)
    speeds: str = "1"           # of the paths
    back: str = ""              # folder where the method wrote its videos: they are taken over
    out: str = "out/warp"       # folder for all that is written


# ---- poses ----

def transforms(source, target):
    """Source and target path, c2w (T, 4, 4) relative to the source's first camera -> T1, T2:
    world-to-camera. A point that camera i of the source sees at p is at T2[i] inv(T1[i]) p for the
    target's."""
    return np.linalg.inv(source), np.linalg.inv(target)


def target_pose(values, radius, frames):
    """The path that TrajectoryCrafter makes of --target_pose theta phi r x y, c2w (frames, 4, 4)
    relative to the source's camera, which stands still. Degrees, then shares of the radius, then
    depth units."""
    theta, phi, r, x, y = np.outer(np.linspace(0, 1, frames), values).T
    moved = np.tile(np.diag([-1.0, 1, -1, 1]), (frames, 1, 1))  # where its own first camera looks
    moved[:, :3, 3] = np.stack([-x, y, -r * radius], 1)
    turn = np.tile(np.eye(4), (frames, 1, 1))
    turn[:, :3, :3] = (Rotation.from_euler("y", phi[:, None], degrees=True)
                       * Rotation.from_euler("x", theta[:, None], degrees=True)).as_matrix()
    poses = turn @ moved
    poses[:, 2, 3] += radius
    return poses[0] @ np.linalg.inv(poses)  # it takes them for world-to-camera


def off(a, b):
    """Largest distance between two paths, and largest angle in degrees."""
    angle = Rotation.from_matrix(a[:, :3, :3].swapaxes(1, 2) @ b[:, :3, :3]).magnitude()
    return np.linalg.norm(a[:, :3, 3] - b[:, :3, 3], axis=1).max(), np.degrees(angle.max())


def fit_target_pose(target):
    """The --target_pose nearest to a path -> (values, radius, largest distance, largest angle in
    degrees). By turns in place (NEAR) where they do, since those depend on no depth; else about a
    point (FAR). Angles count as what moves at a distance of 2.8."""
    def wrong(values, radius):
        made = target_pose(values, radius, len(target))
        angle = Rotation.from_matrix(made[:, :3, :3].swapaxes(1, 2) @ target[:, :3, :3]).as_rotvec()
        return np.concatenate([(made - target)[:, :3, 3].ravel(), 8 ** 0.5 * angle.ravel()])

    for radius in (NEAR, FAR):
        scales = (10, 10, 0.1, 0.1, 0.1)
        values = least_squares(wrong, np.zeros(5), x_scale=scales, args=(radius,)).x
        values = np.round(values * [1, 1, radius == FAR, 1, 1], 3) + 0.0  # no -0
        distance, angle = off(target_pose(values, radius, len(target)), target)
        if near_enough(distance, angle, len(target)):
            break
    return values, radius, distance, angle


def near_enough(distance, angle, frames):
    """Whether a path of --target_pose will do: LIMITS are those of the longest, shorter ones go
    less far."""
    share = (frames - 1) / (LONGEST - 1)
    return distance <= share * LIMITS[0] and angle <= share * LIMITS[1]


def command(case, clip, target):
    """TrajectoryCrafter's command line for a case; ValueError where its --target_pose has no such
    path."""
    values, radius, distance, angle = fit_target_pose(target)
    if not near_enough(distance, angle, len(target)):
        raise ValueError(f"--target_pose cannot express it: its nearest is off by {distance:.2f} "
                         f"depth units and {angle:.2f} degrees; its Warper can, from "
                         f"poses/{case}.npz")
    words = ["python", "inference.py", "--video_path", f"inputs/{clip}.mp4", "--out_dir", "made",
             "--exp_name", case, "--camera", "target", "--mode", "gradual", "--mask",
             "--stride", "1", "--video_length", str(len(target)),
             "--radius_scale", "1e9" if radius == FAR else "1e-9",
             "--target_pose", *(f"{value:g}" for value in values)]
    return shlex.join(words)


# ---- there ----

def read_source(config, clip):
    """A clip as the evaluation's models saw it: uint8 (T, H, W, 3), fps, cameras c2w (T, 4, 4)."""
    file = Path(config.evaluation) / "sources" / f"{clip}.mp4"
    video, fps = read_video(file)
    if len(video) > LONGEST:
        raise ValueError(f"{file}: {len(video)} frames, {config.method} makes {LONGEST} at most: "
                         f"evaluate with --frames={LONGEST}")
    if config.cameras == "static":
        return video, fps, np.tile(np.eye(4), (len(video), 1, 1))
    if config.cameras:
        numbers = np.arange(len(video))
        shape = video.shape[1:3]
        c2w, _ = source_cameras(video, numbers, shape, clip, config.cameras, fov=90.0)
        return video, fps, c2w.numpy()
    prepared = Path(config.evaluation) / "conditions" / f"{clip}.safetensors"
    c2w = load_clip(prepared).c2w if prepared.is_file() else None
    if c2w is None:
        raise ValueError(f"{prepared}: no source cameras there; give --cameras=FOLDER, or static")
    return video, fps, c2w.numpy()


def padded(x):
    """Its last element repeated until there are LONGEST."""
    return np.concatenate([x, np.repeat(x[-1:], LONGEST - len(x), 0)])


def send(config, clips, numbers, speeds):
    """Write what the method needs to config.out; returns the cases, name -> what is to come
    back."""
    out = Path(config.out)
    cases = {}
    lines = []
    refused = {}
    for clip in clips:
        video, fps, source = read_source(config, clip)
        frames, height, width = video.shape[:3]
        exact = config.method == "CogNVS"
        write_video(out / "inputs" / f"{clip}.mp4", padded(video) if exact else video, fps)
        for speed in speeds:
            for number in numbers:
                case = case_name(clip, number, speed)
                target = trajectories.recammaster(number, frames, speed)
                T1, T2 = transforms(source, target)
                file = out / "poses" / f"{case}.npz"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, T1=padded(T1) if exact else T1, T2=padded(T2) if exact else T2)
                cases[case] = {"frames": frames, "height": height, "width": width, "fps": fps}
                try:
                    lines += [] if exact else [command(case, clip, target)]
                except ValueError as error:
                    refused[case] = str(error)
    if lines:
        write_file(out / "commands.sh", ("\n".join(lines) + "\n").encode())
    write_json(out / "cases.json", {"method": config.method, "cases": cases, "refused": refused})
    print(f"{out}: {len(clips)} inputs, {len(cases)} poses, {len(lines)} lines of commands.sh")
    for case, why in list(refused.items())[:5]:
        print(f"  {case}: {why}")
    return cases


# ---- and back ----

def take(config, cases):
    """The method's videos, cut and resized to the sources' length and size, to
    config.out/<method>."""
    out = Path(config.out) / config.method
    missing = []
    for case, wanted in cases.items():
        made = [Path(config.back) / f"{case}.mp4", Path(config.back) / case / "gen.mp4"]
        file = next((f for f in made if f.is_file()), None)
        if file is None:
            missing.append(case)
            continue
        video = read_video(file)[0]
        if len(video) < wanted["frames"]:
            raise ValueError(f"{file}: {len(video)} frames, expected {wanted['frames']} or more")
        x = torch.from_numpy(video[:wanted["frames"]]).movedim(-1, 1)
        size = wanted["height"], wanted["width"]
        if x.shape[2:] != size:  # both methods stretch what they are given: stretched back
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        write_video(out / f"{case}.mp4", x.movedim(1, -1).numpy(), wanted["fps"])
    if len(missing) == len(cases):
        raise ValueError(f"{config.back}: none of {len(cases)} videos, expected {made[0]} or "
                         f"{made[1]}")
    print(f"{out}: {len(cases) - len(missing)} videos, {len(missing)} missing; now "
          f"--generated={out}")
    return missing


def warp(config):
    """Write what the method needs, or take back what it made."""
    if config.method not in METHODS:
        raise ValueError(f"method: expected {' or '.join(METHODS)}, found {config.method!r}")
    if not config.evaluation:
        raise ValueError("--evaluation=FOLDER is needed, an evaluation's --out")
    numbers = listed(config.paths, "paths", trajectories.path_number)
    speeds = listed(config.speeds, "speeds", float)
    for speed in speeds:
        if split_case(case_name("clip", 1, speed)) is None:
            raise ValueError(f"speeds: expected numbers such as 1 and 1.5, found {speed:g}")
    if not config.back:
        return send(config, list(find_clips(Path(config.evaluation) / "sources")), numbers, speeds)
    sent = read_json(Path(config.out) / "cases.json")
    if sent["method"] != config.method:
        raise ValueError(f"{config.out}: written for {sent['method']}, not for {config.method}")
    return take(config, sent["cases"])
