"""Evaluation: did it get better, and at what? (paper, section 4) And `retake`, for your own video.

    python evaluate.py --videos=DAVIS --weights=... --ckpt=out        the paper's protocol, base against tuned
    python evaluate.py --videos=DAVIS --generated=ReCamMaster,CogNVS  videos made elsewhere
    python evaluate.py toy --ckpt=out/toy                             Tables 1 and 2 in the toy world
    python evaluate.py compare a/results.json b/results.json          evaluations, on the cases all have
    python evaluate.py retake clip.mp4 --camera=arc_left --speed=1.5 --weights=...  a video, filmed anew

`python evaluate.py [COMMAND] --help` lists the settings. The first two, under torchrun, are shared out over
the ranks. What is done is kept: the same command again goes on from there. Written to --out:
    sources/<clip>.mp4                        the source as the model saw it
    <method>/videos/<clip>_camera_<n>_speed_<s>.mp4, and the like in <method>/poses and <method>/cases
    results.json, tables.md, report.html      every case; the paper's tables; all of it to look at

The protocol is ReDirector's, which the paper follows: every clip (its largest 4k+1 frames) along
ReCamMaster's ten paths. TransErr and RotErr compare estimated with target cameras. TransErr aligns scale
first and is exactly 0 on the four pure rotations; so it is also given for the paths that move, and errors in
metres without alignment. An estimate of n frames is compared with the path of n frames at the same speed, as
ReDirector does it (some methods make 49 frames at most). Deviations: VBench's scores are means over videos of
each video's score, to have intervals and pairs.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from tqdm import tqdm

import trajectories
from data.clips import NEGATIVE, load_clip, save_clip
from data.prepare import find_caption, read_captions
from data.video import write_video
from data.world import open_policy
from evaluation import report
from evaluation.cases import (
    case_name, find_checkpoints, find_clips, find_generated, items, listed, split_case)
from evaluation.generate import Generating, encode, find_cameras, read_clip, rerender
from evaluation.report import finish
from evaluation.retake import Retake, retake
from evaluation.scores import (
    checkpoint_digest, keep_settings, open_estimator, read_results, score_met3r,
    score_poses, score_vbench)
from evaluation.toy import Toy, evaluate_toy
from plumbing.files import read_json, write_file
from plumbing.ranks import connect
from plumbing.settings import at_least_1, run_command
from pretrained.encoders import NEGATIVE_PROMPT, load_captioner, open_encoders
from pretrained.vae import load_vae
from pretrained.weights import VAE_FILE, weights_sizes
from trajectories import path_number


# ---- the paper's protocol ----

@dataclass
class Evaluate(Generating):
    """python evaluate.py: the paper's protocol, for videos made here (ckpt: several, by commas) or elsewhere.
    """
    videos: str = ""            # folder of source videos, or of folders of images (DAVIS/JPEGImages/480p)
    clips: str = ""             # only these, comma-separated or one a line in a file; empty: all
    generated: str = ""         # folders of videos made elsewhere: <clip>_camera_<n>_speed_<s>.mp4
    out: str = "out/evaluation"  # folder for all that is made; goes on there
    paths: str = "1,2,3,4,5,6,7,8,9,10"  # ReCamMaster's, by number or name (paper)
    speeds: str = "1"           # of the paths (paper: 1; and 1,1.5,2 on 40 clips)
    frames: int = 0             # per clip at most; 0: the largest 4k + 1 it has (ReDirector)
    estimator: str = "vipe"     # of cameras: vipe (paper), mapanything (in weights), its folder, or a folder
                                # of poses, <method>/<case>.npz
    captions: str = ""          # csv with columns file_name, text; empty: BLIP-2 (ReDirector)
    vbench: str = ""            # python of VBench's environment; empty: this one
    redirector: str = ""        # ReDirector's checkout, for MEt3R and Dyn-MEt3R
    redirector_python: str = ""  # python of its environment; empty: this one
    log: str = ""               # training log (log.jsonl) to draw in the report
    show: str = ""              # cases in the report, comma-separated; empty: best, median, worst change


def prepare_sources(config, clips, out, mine, estimate, device, quiet):
    """Write every clip of `mine` as the model sees it to out/sources and, to generate with, encoded to
    out/conditions. What is wrong with a clip is written to out/sources/<clip>.failed, in its place."""
    sources, conditions = out / "sources", out / "conditions"
    todo = [clip for clip in mine if not (sources / f"{clip}.mp4").exists()
            or config.weights and not (conditions / f"{clip}.safetensors").exists()]
    captions = read_captions(config.captions) if config.captions else None
    if config.weights and (todo or not (conditions / NEGATIVE).exists()):
        encoders = open_encoders(config.weights, device)
        unwanted = encoders[1].embed([NEGATIVE_PROMPT])[0].bfloat16().cpu()
        write_file(conditions / NEGATIVE, save({"text": unwanted}))
    for clip in tqdm(todo, "sources", unit="clip", disable=quiet or not todo):
        path, mp4 = Path(config.videos) / clips[clip], sources / f"{clip}.mp4"
        try:
            read = read_clip(path, config)
            write_video(mp4, *read[:2])
            if config.weights:
                caption = find_caption(clips[clip], captions) if captions else None
                if captions and caption is None:
                    raise ValueError(f"no caption in {config.captions}")
                cameras = find_cameras(path, clips[clip], read, mp4, config, estimate)
                prepared = encode(read, path, caption, cameras, encoders, config, device)
                save_clip(conditions / f"{clip}.safetensors", prepared)
            mp4.with_suffix(".failed").unlink(missing_ok=True)
        except (ValueError, FileNotFoundError) as error:
            write_file(mp4.with_suffix(".failed"), str(error).encode())
            tqdm.write(f"{clip}: {error}")
    if todo and config.weights and not captions:
        load_captioner.cache_clear()  # makes room


def evaluate(config):
    """The paper's protocol; writes what the top of this file says, and prints the main tables."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    # what is asked for; all that can be refused is refused now
    numbers, speeds = listed(config.paths, "paths", path_number), listed(config.speeds, "speeds", float)
    at_least_1(config, "height", "width", "steps")
    if not (config.weights or config.generated):
        raise ValueError("give --weights=FOLDER to generate videos, or --generated=FOLDER to score some")
    if (config.weights or config.clips) and not config.videos:
        raise ValueError("--videos=FOLDER is needed, the source videos")
    if config.redirector and not (Path(config.redirector) / "evaluate.py").is_file():
        raise FileNotFoundError(f"{config.redirector}/evaluate.py: no such file, expected ReDirector's")
    if config.log:
        report.read_log(config.log)
    if config.captions:
        read_captions(config.captions)
    out, clips = Path(config.out), find_clips(config.videos, config.clips) if config.videos else {}
    checkpoints = find_checkpoints(config.ckpt) if config.weights else {}
    folders = [Path(folder) for folder in items(config.generated)]
    elsewhere = {folder.resolve().name: find_generated(folder) for folder in folders}
    if len({*checkpoints, *elsewhere}) < len(checkpoints) + len(folders):
        raise ValueError(f"generated: expected folders of different names, none {', '.join(checkpoints)}")
    names = list(clips) or sorted({split_case(case)[0] for videos in elsewhere.values() for case in videos})
    cases = [case_name(clip, number, speed) for clip in names for speed in speeds for number in numbers]
    if odd := [case for case in cases if split_case(case) is None]:
        raise ValueError(f"speeds: expected numbers such as 1 and 1.5, found {odd[0].split('_')[-1]}")
    if unknown := [case for case in items(config.show) if case not in cases]:
        raise ValueError(f"show: no case {unknown[0]!r}, expected for example {cases[0]}")
    files = {method: {case: out / method / "videos" / f"{case}.mp4" for case in cases}
             for method in checkpoints}
    files |= {method: {case: videos.get(case, Path(method) / f"{case}.mp4") for case in cases}
              for method, videos in elsewhere.items()}
    for method, videos in elsewhere.items():
        if not set(videos) & set(cases):
            raise ValueError(f"{method}: none of its {len(videos)} videos has such a clip, path and speed")
    shape = {"frames": config.frames, "height": config.height, "width": config.width}
    made = {**shape, "cameras": config.cameras or config.estimator, "fov": config.fov}
    made |= {"captions": config.captions, **(weights_sizes(config.weights) if config.weights else {})}
    estimate = open_estimator(config, device)
    keep_settings(out / "sources", shape)
    for method, checkpoint in checkpoints.items():
        keep_settings(out / "conditions", made)
        keep_settings(out / method / "videos", made | {name: getattr(config, name) for name in (
            "steps", "shift", "guidance", "seed")} | {"checkpoint": checkpoint_digest(checkpoint)})
    for method in files:
        keep_settings(out / method / "cases", {"estimator": config.estimator, "pipeline": config.vipe_pipeline})
    if ranks > 1:
        connect("gloo", timeout=30 * 24 * 3600)  # only to wait for each other
    wait = dist.barrier if ranks > 1 else lambda: None
    if rank == 0:
        print(f"{len(names)} clips x {len(numbers)} paths x {len(speeds)} speeds = {len(cases)} cases "
              f"for each of {', '.join(files)}")
        for method, videos in elsewhere.items():
            known = len(set(cases) & set(videos))
            print(f"{method}: has {known} of them, and {len(videos) - known} other videos")

    # sources: the clips as the model sees them, and encoded
    prepare_sources(config, clips, out, list(clips)[rank::ranks], estimate, device, rank > 0)
    wait()

    # videos: of base and tuned models, from the same noise
    for method, checkpoint in checkpoints.items():
        todo = [case for case in cases[rank::ranks] if not files[method][case].exists()
                and (out / "conditions" / f"{split_case(case)[0]}.safetensors").exists()]
        if todo:
            dit = open_policy(config.weights, checkpoint, device)
            codec = load_vae(Path(config.weights) / VAE_FILE, device, dit.patch_embedding.weight.dtype)
            negative = load_file(out / "conditions" / NEGATIVE)["text"][None]
        for case in tqdm(todo, method, unit="video", disable=rank > 0 or not todo):
            name, number, speed = split_case(case)
            clip = load_clip(out / "conditions" / f"{name}.safetensors")
            target = trajectories.recammaster(number, len(clip.c2w), speed)
            video = rerender(dit, codec, clip, target, case, negative, config, device)
            write_video(files[method][case], video, clip.fps)
        dit = codec = None

    # scores: cameras and MEt3R by every rank for its own cases, VBench by the first
    notes = {method: {} for method in files}
    for method, videos in files.items():
        if not config.redirector or not clips:
            notes[method]["MEt3R"] = "not installed: MEt3R (needs --redirector, its checkout, and --videos)"
        for case in tqdm(cases[rank::ranks], f"{method}: scores", unit="video", disable=rank > 0):
            source = out / "sources" / f"{split_case(case)[0]}.mp4"
            failed, why = source.with_suffix(".failed"), "missing: there is no such video"
            if method in checkpoints and failed.exists():
                why = f"source: {failed.read_text()}"
            scores = score_poses(out / method, case, videos[case], estimate, why)
            if "MEt3R" not in notes[method]:
                note = score_met3r(config, out / method, case, source, videos[case], scores)
                notes[method] |= {"MEt3R": note} if note else {}
    wait()
    if rank == 0:
        methods = {}
        for method, videos in files.items():
            scores = {case: read_json(out / method / "cases" / f"{case}.json") for case in cases}
            there = {case: videos[case] for case in cases if scores[case]["made"]}
            found, note = score_vbench(out / method, config.vbench or sys.executable, there)
            methods[method] = {"cases": {case: scores[case] | found.get(case, {}) for case in cases},
                               "notes": notes[method] | ({"VBench": note} if note else {})}
        finish(out, config, methods)
    if ranks > 1:
        dist.destroy_process_group()



# ---- two evaluations together ----

@dataclass
class Compare:
    """python evaluate.py compare a/results.json b/results.json: their tables together, compared in pairs."""
    results: str = ""           # files, or folders of them or of runs, comma-separated or plain arguments
    out: str = ""               # folder for tables.md; empty: only printed


def compare(config):
    """Print the tables of several results.json together; ValueError where they are not comparable."""
    files = [next((str(f) for f in (Path(f, "results.json"), Path(f, "evaluation/results.json"))
                   if f.is_file()), f) for f in items(config.results)]
    if len(set(files)) < 2:
        raise ValueError("compare: expected two different results.json, or their folders, or more")
    results = {str(Path(f).parent): read_results(f) for f in files}
    estimators = {r["settings"]["estimator"] for r in results.values()}
    if len(estimators) > 1:
        raise ValueError(f"compare: different estimators of cameras, {' and '.join(sorted(estimators))}")
    cases = [{case for m in r["methods"].values() for case in m["cases"]} for r in results.values()]
    if not set.intersection(*cases):
        raise ValueError(f"compare: {' and '.join(files)} have no case in common")
    methods, bases = {}, []
    for folder, r in results.items():
        for name, method in r["methods"].items():
            scores = {case: {k: x for k, x in s.items() if k != "video"}
                      for case, s in method["cases"].items()}
            if name != "base" or scores not in bases:  # runs from the same base: shown once
                methods[f"{folder}: {name}"] = method
            bases += [scores] if name == "base" else []
    text = report.markdown(report.tables(methods))
    if config.out:
        write_file(Path(config.out) / "tables.md", text.encode())
    print(text)


COMMANDS = {  # name -> settings, what it does, and the setting that may be given plainly
    "evaluate": (Evaluate, evaluate, None), "toy": (Toy, evaluate_toy, None),
    "compare": (Compare, compare, "results"), "retake": (Retake, retake, "clip")}


if __name__ == "__main__":
    run_command("evaluate.py", __doc__, COMMANDS, sys.argv[1:] or ["--help"])
