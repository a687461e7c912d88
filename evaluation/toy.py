"""The evaluation in the toy world: `python evaluate.py toy`."""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import trajectories
from data.draw import upscale
from data.video import to_float, write_video
from evaluation import report
from evaluation.cases import case_name, find_checkpoints, listed
from evaluation.generate import generate
from evaluation.report import finish
from evaluation.scores import checkpoint_digest, keep_settings, pose_scores, save_poses
from model import load_dit
from plumbing.files import read_json, write_json
from plumbing.settings import at_least_1
from toy.poses import judge
from toy.rooms import HEADS
from toy.world import held_out, open_weights


@dataclass
class Toy:
    """python evaluate.py toy: the paper's Tables 1 and 2 in the toy world."""
    ckpt: str = ""              # to compare with the base: files, checkpoints' or runs' folders, by commas
    weights: str = "toy/weights"    # folder of the shipped base, codec and estimator
    out: str = "out/toy_evaluation"  # folder for all that is made; goes on there
    rooms: int = 8              # held-out rooms, ten paths each
    speeds: str = "1,1.5,2"     # of the paths (paper)
    steps: int = 6              # denoising steps
    shift: float = 5.0          # of the schedule
    tail: float = 0.0           # share of the steps to keep, by DPM-Solver++; 0: all of them, by the ODE
    seed: int = 0               # of the noise
    estimator: str = "judge"    # of cameras: judge (independent), or estimator (the reward's)
    log: str = ""               # training log (log.jsonl) to draw in the report
    show: str = ""              # cases in the report, comma-separated; empty: best, median, worst change


def evaluate_toy(config):
    """Tables 1 and 2 in miniature; writes what the top of this file says, and prints the main tables."""
    out, speeds = Path(config.out), listed(config.speeds, "speeds", float)
    if config.estimator not in ("judge", "estimator"):
        raise ValueError(f"estimator: expected judge or estimator, found {config.estimator!r}")
    if config.log:
        report.read_log(config.log)
    at_least_1(config, "rooms", "steps")
    if not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(f"speeds: expected numbers such as 1 and 1.5, found {config.speeds}")
    checkpoints, file = find_checkpoints(config.ckpt), Path(config.weights) / "toy_base.safetensors"
    settings = {name: getattr(config, name)
                for name in ("rooms", "steps", "shift", "tail", "seed", "estimator")}
    base, codec, estimator = open_weights(config.weights)
    dits = {method: load_dit(file, checkpoint, num_heads=HEADS) if checkpoint else base
            for method, checkpoint in checkpoints.items()}
    for method, checkpoint in checkpoints.items():
        keep_settings(out / method / "cases", settings | {"base": checkpoint_digest(file),
                                                  "checkpoint": checkpoint_digest(checkpoint)})
    methods = {method: {"cases": {}, "notes": {}} for method in dits}
    show = lambda video: upscale(video.numpy(), max(1, 160 // video.shape[1]))
    for speed in speeds:
        room, condition, scene, truth = held_out(config.rooms, codec, speed)
        for k in tqdm(range(config.rooms), f"speed {speed:g}", unit="room"):
            rows = slice(10 * k, 10 * k + 10)
            cases = [case_name(f"room{k}", n, speed) for n in range(1, 11)]
            write_video(out / "sources" / f"room{k}.mp4", show(scene.source[10 * k]), scene.fps)
            for case, c2w in zip(cases, scene.c2w[rows]):
                save_poses(out / "targets" / f"{case}.npz", c2w)
            for method, dit in dits.items():
                folder = out / method
                if not all((folder / "cases" / f"{case}.json").exists() for case in cases):
                    videos = generate(dit, codec, condition[rows], cases, steps=config.steps,
                                      shift=config.shift, seed=config.seed, tail=config.tail or None)
                    if config.estimator == "judge":
                        seen = torch.stack([to_float(video) for video in videos])
                        pred = judge(seen, room[rows], scene.c2w[rows], codec)[0]
                    else:
                        pred = estimator(videos)
                    error = (videos.float() - truth[rows].float()).square().mean((1, 2, 3, 4)).clamp(min=0.01)
                    for i, case in enumerate(cases):
                        video = folder / "videos" / f"{case}.mp4"
                        write_video(video, show(videos[i]), scene.fps)
                        save_poses(folder / "poses" / f"{case}.npz", pred[i])
                        scores = {"clip": f"room{k}", "path": trajectories.PATHS[i], "speed": speed,
                                  "video": str(video), "PSNR": 10 * math.log10(255 ** 2 / float(error[i]))}
                        scores |= pose_scores(pred[i], scene.c2w[rows][i])
                        write_json(folder / "cases" / f"{case}.json", scores)
                methods[method]["cases"] |= {
                    case: read_json(folder / "cases" / f"{case}.json") for case in cases}
    finish(out, config, methods)
