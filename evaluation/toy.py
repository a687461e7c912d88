"""The evaluation in the toy world: `python evaluate.py toy`."""
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import trajectories
from data.draw import upscale
from data.video import to_float, write_video
from evaluation.cases import (
    case_digest, case_name, file_digest, find_checkpoints, items, listed, split_case)
from evaluation.generate import generate
from evaluation.page import read_log
from evaluation.report import finish
from evaluation.scores import keep_settings, pose_scores, save_poses
from model import load_dit
from plumbing.files import lock_folder, read_json, write_json
from plumbing.settings import at_least_1, at_most
from toy.poses import judge
from toy.rooms import FPS, HEADS
from toy.world import held_out, open_weights


@dataclass
class Toy:
    """python evaluate.py toy: the paper's Tables 1 and 2 in the toy world."""
    ckpt: str = ""              # beside the base: files, checkpoints' or runs' folders, by commas
    weights: str = "toy/weights"    # folder of the shipped base, codec and estimator
    out: str = "out/toy_evaluation"  # folder for all that is made; goes on there
    rooms: int = 8              # held-out rooms, ten paths each
    speeds: str = "1,1.5,2"     # of the paths (paper)
    steps: int = 6              # denoising steps
    shift: float = 5.0          # of the schedule
    tail: float = 0.0           # share of the steps kept, by DPM-Solver++; 0: all, by the ODE
    seed: int = 0               # of the noise
    estimator: str = "judge"    # of cameras: judge (independent), or estimator (the reward's)
    log: str = ""               # training logs for the report: files or runs' folders, by commas
    show: str = ""              # cases in the report, by commas; empty: best, median, worst change


def evaluate_toy(config):
    """Tables 1 and 2 in miniature; writes what evaluate.py's top says, and prints three lines."""
    started = time.time()
    speeds = listed(config.speeds, "speeds", float)
    check_settings(config, speeds)
    out = Path(config.out)
    checkpoints = find_checkpoints(config.ckpt)
    file = Path(config.weights) / "toy_base.safetensors"
    base, codec, estimator = open_weights(config.weights)
    dits = {method: load_dit(file, checkpoint, num_heads=HEADS) if checkpoint else base
            for method, checkpoint in checkpoints.items()}
    settings = {name: getattr(config, name)
                for name in ("rooms", "steps", "shift", "tail", "seed", "estimator")}
    lock = lock_folder(out)  # noqa: F841, until this function ends
    for method, checkpoint in checkpoints.items():
        digests = {"base": file_digest(file), "checkpoint": file_digest(checkpoint)}
        keep_settings(out / method / "cases", settings | digests)

    methods = {method: {"cases": {}, "notes": {}} for method in dits}
    for speed in speeds:
        room, condition, scene, truth = held_out(config.rooms, codec, speed)
        for k in tqdm(range(config.rooms), f"speed {speed:g}", unit="room"):
            # a room is ten rows, one for each path
            rows = slice(10 * k, 10 * k + 10)
            cases = [case_name(f"room{k}", number, speed) for number in range(1, 11)]
            scenes = scene[rows]
            save_truth(out, cases, scenes, truth[rows])
            for method, dit in dits.items():
                folder = out / method
                if not all((folder / "cases" / f"{case}.json").exists() for case in cases):
                    # the same noise for every method: it depends on the seed and the case's name
                    videos = generate(dit, codec, condition[rows], cases, steps=config.steps,
                                      shift=config.shift, seed=config.seed,
                                      tail=config.tail or None)
                    if config.estimator == "judge":
                        seen = torch.stack([to_float(video) for video in videos])
                        poses = judge(seen, room[rows], scenes.c2w, codec)[0]
                    else:
                        poses = estimator(videos)
                    save_scores(folder, cases, videos, poses, scenes, truth[rows])
                for i, case in enumerate(cases):
                    scores = read_json(folder / "cases" / f"{case}.json")
                    scores["digest"] = case_digest(scenes.source[i], scenes.c2w[i],
                                                   truth[rows][i])
                    methods[method]["cases"][case] = scores
    finish(out, config, methods, checkpoints, started, "toy")


def check_settings(config, speeds):
    """ValueError, OSError for settings that cannot be."""
    at_least_1(config, "rooms", "steps")
    at_most(config, rooms=1 << 12, steps=1 << 12)
    if config.estimator not in ("judge", "estimator"):
        raise ValueError(f"estimator: expected judge or estimator, found {config.estimator!r}")
    if not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(f"speeds: expected numbers such as 1 and 1.5, found {config.speeds}")
    for log in items(config.log):
        read_log(log)
    for case in items(config.show):
        clip, number, speed = split_case(case) or ("", 0, 0)
        room = int(clip[4:]) if re.fullmatch(r"room\d+", clip) else config.rooms
        if room >= config.rooms or speed not in speeds:
            example = case_name("room0", 9, speeds[0])
            raise ValueError(f"show: no case {case!r}, expected for example {example}")


def enlarged(video):
    """A toy video, uint8 (T, H, W, 3), large enough to look at."""
    return upscale(video.numpy(), max(1, 240 // video.shape[1]))


def save_truth(out, cases, scene, truth):
    """The source video of one room's cases, and the path and the true view (uint8) of each."""
    write_video(out / "sources" / f"{split_case(cases[0])[0]}.mp4", enlarged(scene.source[0]), FPS)
    for case, c2w, video in zip(cases, scene.c2w, truth):
        save_poses(out / "targets" / f"{case}.npz", c2w)
        write_video(out / "truth" / f"{case}.mp4", enlarged(video), FPS)


def save_scores(folder, cases, videos, poses, scene, truth):
    """A method's videos, uint8, the cameras found in them, and their scores, to its folder."""
    error = (videos.float() - truth.float()).square().mean((1, 2, 3, 4)).clamp(min=0.01)
    for i, case in enumerate(cases):
        clip, number, speed = split_case(case)
        video = folder / "videos" / f"{case}.mp4"
        shown = enlarged(videos[i])
        write_video(video, shown, FPS)
        save_poses(folder / "poses" / f"{case}.npz", poses[i])
        scores = {"clip": clip, "path": trajectories.PATHS[number - 1], "speed": speed,
                  "video": str(video),
                  "PSNR": 10 * math.log10(255 ** 2 / float(error[i]))}
        write_json(folder / "cases" / f"{case}.json", scores | pose_scores(poses[i], scene.c2w[i]))
