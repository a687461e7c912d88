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
import dataclasses
import difflib
import inspect
import io
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from tqdm import tqdm

import data
import outside
import report
import trajectories
from model import load_dit
from report import case_name, split_case
from train import condition_of, digest, generate, parse
from trajectories import path_number

PROTOCOL = 1  # of results.json: raised whenever a number would come out differently
CHECKPOINT = "self_attn.safetensors"  # as train.py names it
DIT, REDIRECTOR = "diffusion_pytorch_model.safetensors", "step20000.safetensors"  # as published


# ---- scores of a video ----

def pose_scores(pred, target):
    """Camera scores of one video: c2w pred, target (T, 4, 4) -> dict; None where a score does not apply.

    TransErr (after alignment; dimensionless), TransErr_moving (None on pure rotations), RotErr (degrees, all
    pairs of frames): ReDirector's. position (metres), rotation (degrees): means over frames, both paths
    relative to their first frame, nothing aligned. scale: length of the estimated over that of the target
    path, None on pure rotations; jitter lengthens a path too. Poses that are not finite give {"failed": why}.
    ValueError for paths of different lengths.
    """
    pred, target = (np.asarray(x, np.float64) for x in (pred, target))
    if not np.isfinite(pred).all():
        return {"failed": "the estimated poses are not finite"}
    both = torch.from_numpy(pred), torch.from_numpy(target)
    position, rotation = map(float, trajectories.pose_errors(*both, schedule="uniform"))
    length, wanted = (np.linalg.norm(np.diff(x[:, :3, 3], axis=0), axis=1).sum() for x in (pred, target))
    aligned, moves = trajectories.trans_err(pred, target), wanted > 1e-6
    return {"TransErr": aligned, "TransErr_moving": aligned if moves else None,
            "RotErr": trajectories.rot_err(pred, target), "position": position,
            "rotation": math.degrees(rotation), "scale": float(length / wanted) if moves else None}


def pose_folder(folder):
    """Cameras estimated before: <folder>/<method>/<case>.npz or, as ViPE does, <method>/pose/<case>.npz."""
    if not Path(folder).is_dir():
        raise ValueError(f"estimator: expected vipe, mapanything or a folder, found {str(folder)!r}")

    def estimate(path, method=""):
        files = [Path(folder) / method / where / f"{path.stem}.npz" for where in ("", "pose")]
        return trajectories.read_path(next((f for f in files if f.is_file()), files[0])), None

    return estimate


def open_estimator(config, device):
    """The pose estimator that config names: a function (video file, method's name) -> (c2w (N, 4, 4),
    normalised intrinsics (4,) or None) that raises ValueError or FileNotFoundError where it fails."""
    if config.estimator == "vipe":
        return outside.vipe(config.vipe, config.vipe_pipeline)
    ours = config.estimator == "mapanything"
    folder = Path(config.weights, "map-anything") if ours else Path(config.estimator)
    if not ours and not (folder / "model.safetensors").exists():
        return pose_folder(folder)
    from rewards import mapanything
    cameras = mapanything(folder, device).cameras

    def estimate(path, method=""):
        c2w, intrinsics = cameras(torch.from_numpy(data.read_video(path)[0])[None].to(device))
        return c2w[0].double().cpu().numpy(), intrinsics[0].float().cpu().numpy()

    return estimate


# ---- which cases: clips, paths, speeds; videos made elsewhere ----

def items(text):
    """"a, b" -> ["a", "b"]"""
    return [x.strip() for x in text.split(",") if x.strip()]


def listed(text, what, convert):
    """"1,1.5" -> [1.0, 1.5]; ValueError naming `what` where it is no such list."""
    try:
        found = [convert(x) for x in items(text)]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not found:
        raise ValueError(f"{what}: expected a comma-separated list, found {text!r}")
    return found


def at_least_1(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")


def find_clips(videos, only=""):
    """{clip: video, by its name below the folder `videos`}. only: clips, comma-separated or one a line in a
    text file; ValueError naming those that do not exist."""
    clips = {}
    for video in data.find_videos(videos):
        clip = re.sub(rf"({'|'.join(map(re.escape, data.VIDEOS))})$", "", video, flags=re.I).replace("/", "_")
        if clips.setdefault(clip, video) != video:
            raise ValueError(f"{videos}: {clips[clip]} and {video} would both be called {clip}")
    if not only:
        return clips
    wanted = Path(only).read_text().split("\n") if Path(only).is_file() else items(only)
    wanted = [line.strip() for line in wanted if line.strip()]
    wanted = [Path(name).stem if name.lower().endswith(data.VIDEOS) else name for name in wanted]
    missing = [name for name in wanted if name not in clips]
    if missing or not wanted:
        near = difflib.get_close_matches(missing[0], clips, 1) if missing else []
        raise ValueError(f"clips: {len(missing)} of {len(wanted)} are not in {videos}: "
                         + ", ".join(missing[:5]) + (f"; did you mean {near[0]}?" if near else ""))
    return {name: clips[name] for name in wanted}


def find_generated(folder):
    """{case: file} of a folder of videos made elsewhere; ValueError for one that is not named like a case."""
    cases = {}
    for name in data.find_videos(folder):
        case = split_case(Path(name).stem)
        if case is None:
            raise ValueError(f"{folder}: expected <clip>_camera_<1-10>_speed_<s>.mp4, found {name}")
        cases[case_name(*case)] = Path(folder) / name
    return cases


def find_checkpoint(path):
    """A checkpoint's file from itself, its folder, or a run's folder (then the newest)."""
    path = Path(path)
    files = [path, path / CHECKPOINT, *sorted(path.glob(f"iteration_??????/{CHECKPOINT}"))[::-1]]
    found = next((f for f in files if f.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no checkpoint, expected a file or a folder of train.py's")
    return found


def find_checkpoints(text):
    """Comma-separated checkpoints -> {method: file, None for the base}; a run's is <run>-<iteration>."""
    files = [find_checkpoint(x) for x in items(text)]
    names = ["-".join(f.resolve().parts[-3:-1]) if f.name == CHECKPOINT else f.stem for f in files]
    if len({*names, "base", "sources", "conditions", "targets"}) < len(names) + 4:
        raise ValueError(f"ckpt: expected different names, none of them base, found {', '.join(names)}")
    return {"base": None, **dict(zip(names, files))}


# ---- files: whole or not at all, kept if made with the same settings ----

def write_json(path, content):
    data.write_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def read_results(path):
    """results.json; FileNotFoundError, or ValueError where it is damaged or of another protocol."""
    results = read_json(path)
    found = results.get("protocol") if isinstance(results, dict) else None
    if found != PROTOCOL:
        raise ValueError(f"{path}: protocol {found}, expected {PROTOCOL}: evaluate again to compare")
    try:
        scores = [dict(case) for m in results["methods"].values() for case in m["cases"].values()]
        if not scores or not isinstance(results["settings"]["estimator"], str):
            raise ValueError("no case, or no estimator")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error!r})") from None
    return results


def claim(folder, settings):
    """Make a folder, or go on with one made with the same settings; ValueError naming those that differ."""
    settings = {"protocol": PROTOCOL, **settings}
    if not (folder / "settings.json").exists():
        return write_json(folder / "settings.json", settings)
    differ = [f"{k} = {v!r}, now {settings.get(k)!r}" for k, v in read_json(folder / "settings.json").items()
              if settings.get(k) != v]
    if differ:
        raise ValueError(f"{folder}: made with {'; '.join(differ)}; choose another --out")


def save_poses(path, c2w):
    file = io.BytesIO()
    np.savez_compressed(file, c2w=np.asarray(c2w, np.float64))
    data.write_file(path, file.getvalue())


def fingerprint(path):
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def checkpoint_digest(path):
    return digest(path.read_bytes()) if path else ""


# ---- a source video and its condition ----

def read_clip(path, config, stride=1):
    """A video's largest 4k+1 frames, config.frames at most (0: all), scaled to cover and cropped -> uint8
    (T, H, W, 3), fps, and the frames' numbers (T,), rows of a camera file."""
    size = config.height, config.width
    if size[0] % 16 or size[1] % 16:
        raise ValueError(f"height and width: expected multiples of 16, found {size[0]} x {size[1]}")
    try:
        video, fps, rows = data.read_frames(path, config.frames or None, stride, size)
    except ValueError:
        if not config.frames:
            raise
        video, fps, rows = data.read_frames(path, None, stride, size)  # shorter; if broken, it raises again
    frames = (len(video) - 1) // 4 * 4 + 1
    if frames < 5:
        raise ValueError(f"{path}: too short, {len(video)} frames, expected at least 5")
    return video[:frames], fps, rows[:frames]


def source_cameras(path, name, clip, mp4, config, estimate):
    """Cameras of a clip as read_clip returns it: c2w (T, 4, 4), metres, relative to the first, and intrinsics
    (4,). From config.cameras, a file, or a folder that has one for the video called `name`; where that is
    empty, estimated from `mp4`, the clip as the model sees it."""
    video, _, rows = clip
    cameras = config.cameras
    if cameras and Path(cameras).is_file():
        cameras, name = Path(cameras).parent, Path(cameras).name
    elif not cameras:
        def cameras(_):
            c2w, intrinsics = estimate(mp4)
            if len(c2w) != len(video) or intrinsics is None:
                raise ValueError(f"source cameras: expected {len(video)} and intrinsics, found {len(c2w)}")
            return torch.from_numpy(c2w)[None], torch.from_numpy(intrinsics)[None]
    stored = data.read_video(path, frames=1)[0].shape[1:3]
    return data.source_cameras(video, rows, stored, name, cameras, config.fov or None)


def open_encoders(weights, device):
    """VAE, text and image encoder from the folder of the published weights."""
    from encoders import load_image_encoder, load_text_encoder
    from vae import load_vae
    dtype, folder = torch.float32 if device.type == "cpu" else torch.bfloat16, Path(weights)
    return (load_vae(folder / data.VAE_FILE, device, dtype),
            load_text_encoder(folder / data.TEXT_FILE, folder / data.TOKENIZER, device, dtype),
            load_image_encoder(folder / data.IMAGE_FILE, device, dtype))


def encode(clip, path, caption, cameras, encoders, config, device):
    """A clip as read_clip returns it, its caption (None: BLIP-2's) and cameras -> data.Clip."""
    video, fps, _ = clip
    if caption is None:
        from encoders import caption as describe
        caption = describe(video[len(video) // 2], config.blip, device, encoders[0].conv1.weight.dtype)
    latents, image, text = data.encode_clip(torch.from_numpy(video).to(device), caption, *encoders)
    return data.Clip(str(path), str(path), caption, fps, latents, image, text, *cameras)


# ---- generating ----

def open_policy(weights, checkpoint, device):
    """The published DiT with ReDirector's weights and, if any, a checkpoint laid over them."""
    files = [Path(weights) / DIT, Path(weights) / REDIRECTOR, *([checkpoint] if checkpoint else [])]
    return load_dit(*files, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def weights_sizes(weights):
    """{file: bytes} of the published files; FileNotFoundError for one that is missing."""
    names = DIT, REDIRECTOR, data.VAE_FILE, data.TEXT_FILE, data.IMAGE_FILE
    files = [Path(weights) / name for name in names]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file, expected the published weights")
    return {f"bytes of {file.name}": file.stat().st_size for file in files}


def film(dit, codec, clip, target, name, negative, config, device):
    """A data.Clip filmed along a target path (T, 4, 4) -> uint8 (T, H, W, 3); its noise is named `name`."""
    condition = condition_of([clip], target[None], config, device)
    return generate(dit, codec, condition, [name], negative, steps=config.steps, shift=config.shift,
                    guidance=config.guidance, seed=config.seed)[0].cpu().numpy()


# ---- the paper's protocol ----

@dataclass
class Generating:
    """Settings of all that generates videos with the published weights."""
    weights: str = ""           # folder of the published weights
    ckpt: str = ""              # beside or in place of ReDirector's: files, checkpoints' or runs' folders
    cameras: str = ""           # source cameras: a file, or a folder of one for each video; empty: estimated
    fov: float = 0.0            # horizontal field of view, degrees, where camera files have no intrinsics
    blip: str = "Salesforce/blip2-opt-2.7b"  # BLIP-2's local folder or hub id, where captions are not given
    vipe: str = "vipe"          # ViPE's program
    vipe_pipeline: str = "default"  # its preset; only_pose where ReDirector's fork is installed
    height: int = 480           # pixels, a multiple of 16 (ReDirector)
    width: int = 832            # pixels, a multiple of 16 (ReDirector)
    steps: int = 50             # denoising steps (ReDirector)
    shift: float = 5.0          # of the schedule (Wan)
    guidance: float = 5.0       # classifier-free guidance (ReDirector); 1: off
    seed: int = 0               # of the noise


@dataclass
class Config(Generating):
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


def film_sources(config, clips, out, mine, estimate, device, quiet):
    """Write every clip of `mine` as the model sees it to out/sources and, to generate with, encoded to
    out/conditions. What is wrong with a clip is written to out/sources/<clip>.failed, in its place."""
    sources, conditions = out / "sources", out / "conditions"
    todo = [clip for clip in mine if not (sources / f"{clip}.mp4").exists()
            or config.weights and not (conditions / f"{clip}.safetensors").exists()]
    captions = data.read_captions(config.captions) if config.captions else None
    if config.weights and (todo or not (conditions / data.NEGATIVE).exists()):
        from encoders import NEGATIVE_PROMPT, load_captioner
        encoders = open_encoders(config.weights, device)
        unwanted = encoders[1].embed([NEGATIVE_PROMPT])[0].bfloat16().cpu()
        data.write_file(conditions / data.NEGATIVE, save({"text": unwanted}))
    for clip in tqdm(todo, "sources", unit="clip", disable=quiet or not todo):
        path, mp4 = Path(config.videos) / clips[clip], sources / f"{clip}.mp4"
        try:
            read = read_clip(path, config)
            data.write_video(mp4, *read[:2])
            if config.weights:
                caption = data.find_caption(clips[clip], captions) if captions else None
                if captions and caption is None:
                    raise ValueError(f"no caption in {config.captions}")
                cameras = source_cameras(path, clips[clip], read, mp4, config, estimate)
                prepared = encode(read, path, caption, cameras, encoders, config, device)
                data.save_clip(conditions / f"{clip}.safetensors", prepared)
            mp4.with_suffix(".failed").unlink(missing_ok=True)
        except (ValueError, FileNotFoundError) as error:
            data.write_file(mp4.with_suffix(".failed"), str(error).encode())
            tqdm.write(f"{clip}: {error}")
    if todo and config.weights and not captions:
        load_captioner.cache_clear()  # makes room


def score_poses(folder, case, video, estimate, why):
    """Scores of one case, also written to folder/cases/<case>.json; kept if the video is still the same,
    unless it failed. why: the reason, where there is no video."""
    file, made = folder / "cases" / f"{case}.json", fingerprint(video)
    clip, number, speed = split_case(case)
    scores = {"clip": clip, "path": trajectories.PATHS[number - 1], "speed": speed, "video": str(video),
              "made": made}
    try:
        kept = json.loads(file.read_text())
        if made and kept["made"] == made:
            if "failed" not in kept:
                return kept
            scores = {k: x for k, x in kept.items() if k != "failed"}  # other programs' scores stay
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        pass  # not there, or damaged
    try:
        if not made:
            raise ValueError(why)
        pred, _ = estimate(video, folder.name)
        scores |= pose_scores(pred, trajectories.recammaster(number, len(pred), speed))
        save_poses(folder / "poses" / f"{case}.npz", pred)
    except (ValueError, FileNotFoundError) as error:
        scores["failed"] = str(error)
    write_json(file, scores)
    return scores


def score_met3r(config, folder, case, source, video, scores):
    """Add MEt3R and Dyn-MEt3R to a case's scores, unless there -> note if they cannot be had at all."""
    if not scores["made"] or {"MEt3R", "Dyn-MEt3R"} <= set(scores) or not source.exists():
        return None
    _, number, speed = split_case(case)
    python = config.redirector_python or sys.executable
    found, note = outside.met3r(python, config.redirector, source, video, number, speed)
    if note and note.startswith("not installed"):
        return note
    scores = scores | found | {"incomplete": {"MEt3R": note} if note else {}}
    write_json(folder / "cases" / f"{case}.json", scores)


def score_vbench(folder, python, videos):
    """VBench's six dimensions of {case: file} -> ({case: {dimension: score}}, note or None). Each is kept in
    folder/vbench while the videos are the same."""
    made, scores, notes = {case: fingerprint(path) for case, path in videos.items()}, {}, []
    for dimension in outside.DIMENSIONS if videos else ():
        file = folder / "vbench" / f"{dimension}.json"
        kept = read_json(file) if file.exists() else {}
        if kept.get("made") != made:
            found, note = outside.vbench(python, videos, dimension)
            kept = {"made": made, "scores": found, "note": note}
            if note is None:
                write_json(file, kept)
        for case, x in kept["scores"].items():
            scores.setdefault(case, {})[dimension] = x
        notes += [kept["note"]] if kept["note"] else []
        if kept["note"] and kept["note"].startswith("not installed"):
            break
    return scores, "; ".join(notes) or None


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
        data.read_captions(config.captions)
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
    claim(out / "sources", shape)
    for method, checkpoint in checkpoints.items():
        claim(out / "conditions", made)
        claim(out / method / "videos", made | {name: getattr(config, name) for name in (
            "steps", "shift", "guidance", "seed")} | {"checkpoint": checkpoint_digest(checkpoint)})
    for method in files:
        claim(out / method / "cases", {"estimator": config.estimator, "pipeline": config.vipe_pipeline})
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # only to wait for each other
    wait = dist.barrier if ranks > 1 else lambda: None
    if rank == 0:
        print(f"{len(names)} clips x {len(numbers)} paths x {len(speeds)} speeds = {len(cases)} cases "
              f"for each of {', '.join(files)}")
        for method, videos in elsewhere.items():
            known = len(set(cases) & set(videos))
            print(f"{method}: has {known} of them, and {len(videos) - known} other videos")

    # sources: the clips as the model sees them, and encoded
    film_sources(config, clips, out, list(clips)[rank::ranks], estimate, device, rank > 0)
    wait()

    # videos: of base and tuned models, from the same noise
    for method, checkpoint in checkpoints.items():
        todo = [case for case in cases[rank::ranks] if not files[method][case].exists()
                and (out / "conditions" / f"{split_case(case)[0]}.safetensors").exists()]
        if todo:
            from vae import load_vae
            dit = open_policy(config.weights, checkpoint, device)
            codec = load_vae(Path(config.weights) / data.VAE_FILE, device, dit.patch_embedding.weight.dtype)
            negative = load_file(out / "conditions" / data.NEGATIVE)["text"][None]
        for case in tqdm(todo, method, unit="video", disable=rank > 0 or not todo):
            name, number, speed = split_case(case)
            clip = data.load_clip(out / "conditions" / f"{name}.safetensors")
            target = trajectories.recammaster(number, len(clip.c2w), speed)
            video = film(dit, codec, clip, target, case, negative, config, device)
            data.write_video(files[method][case], video, clip.fps)
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


def finish(out, config, methods):
    """Write results.json, tables.md, report.html of {method: {"cases", "notes"}}; print the main tables."""
    for method in methods.values():
        for scores in method["cases"].values():
            scores.pop("made", None)
    write_json(out / "results.json", {"protocol": PROTOCOL, "settings": dataclasses.asdict(config),
                                      "methods": methods})
    tables = report.tables(methods)
    data.write_file(out / "tables.md", report.markdown(tables).encode())
    report.write(out / "report.html", f"Evaluation: {', '.join(methods)}", tables, config.log,
                 report.chosen(out, methods, items(config.show)))
    print(report.markdown([t for t in tables if not t["title"].startswith("By path")]))
    print(f"{out}: results.json, tables.md, report.html")


# ---- the same in the toy world ----

@dataclass
class Toy:
    """python evaluate.py toy: the paper's Tables 1 and 2 in the toy world."""
    ckpt: str = ""              # to compare with the base: files, checkpoints' or runs' folders, by commas
    weights: str = "weights"    # folder of the shipped base, codec and estimator
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
    import toy
    out, speeds = Path(config.out), listed(config.speeds, "speeds", float)
    if config.estimator not in ("judge", "estimator"):
        raise ValueError(f"estimator: expected judge or estimator, found {config.estimator!r}")
    if config.log:
        report.read_log(config.log)
    at_least_1(config, "rooms", "steps")
    checkpoints, file = find_checkpoints(config.ckpt), Path(config.weights) / "toy_base.safetensors"
    settings = {name: getattr(config, name)
                for name in ("rooms", "steps", "shift", "tail", "seed", "estimator")}
    base, codec, estimator = toy.open_weights(config.weights)
    dits = {method: load_dit(file, checkpoint, num_heads=toy.HEADS) if checkpoint else base
            for method, checkpoint in checkpoints.items()}
    for method, checkpoint in checkpoints.items():
        claim(out / method / "cases", settings | {"base": checkpoint_digest(file),
                                                  "checkpoint": checkpoint_digest(checkpoint)})
    methods = {method: {"cases": {}, "notes": {}} for method in dits}
    show = lambda video: data.upscale(video.numpy(), max(1, 160 // video.shape[1]))
    for speed in speeds:
        room, condition, scene, truth = toy.held_out(config.rooms, codec, speed)
        for k in tqdm(range(config.rooms), f"speed {speed:g}", unit="room"):
            rows = slice(10 * k, 10 * k + 10)
            cases = [case_name(f"room{k}", n, speed) for n in range(1, 11)]
            data.write_video(out / "sources" / f"room{k}.mp4", show(scene.source[10 * k]), scene.fps)
            for case, c2w in zip(cases, scene.c2w[rows]):
                save_poses(out / "targets" / f"{case}.npz", c2w)
            for method, dit in dits.items():
                folder = out / method
                if not all((folder / "cases" / f"{case}.json").exists() for case in cases):
                    videos = generate(dit, codec, condition[rows], cases, steps=config.steps,
                                      shift=config.shift, seed=config.seed, tail=config.tail or None)
                    if config.estimator == "judge":
                        seen = torch.stack([data.to_float(video) for video in videos])
                        pred = toy.judge(seen, room[rows], scene.c2w[rows], codec)[0]
                    else:
                        pred = estimator(videos)
                    error = (videos.float() - truth[rows].float()).square().mean((1, 2, 3, 4)).clamp(min=0.01)
                    for i, case in enumerate(cases):
                        video = folder / "videos" / f"{case}.mp4"
                        data.write_video(video, show(videos[i]), scene.fps)
                        save_poses(folder / "poses" / f"{case}.npz", pred[i])
                        scores = {"clip": f"room{k}", "path": trajectories.PATHS[i], "speed": speed,
                                  "video": str(video), "PSNR": 10 * math.log10(255 ** 2 / float(error[i]))}
                        scores |= pose_scores(pred[i], scene.c2w[rows][i])
                        write_json(folder / "cases" / f"{case}.json", scores)
                methods[method]["cases"] |= {
                    case: read_json(folder / "cases" / f"{case}.json") for case in cases}
    finish(out, config, methods)


# ---- two evaluations together ----

@dataclass
class Compare:
    """python evaluate.py compare a/results.json b/results.json: their tables together, compared in pairs."""
    results: str = ""           # the files, comma-separated, or given as plain arguments
    out: str = ""               # folder for tables.md; empty: only printed


def compare(config):
    """Print the tables of several results.json together; ValueError where they are not comparable."""
    files = items(config.results)
    if len(set(files)) < 2:
        raise ValueError("compare: expected two different results.json or more")
    results = {str(Path(f).parent): read_results(f) for f in files}
    estimators = {r["settings"]["estimator"] for r in results.values()}
    if len(estimators) > 1:
        raise ValueError(f"compare: different estimators of cameras, {' and '.join(sorted(estimators))}")
    cases = [{case for m in r["methods"].values() for case in m["cases"]} for r in results.values()]
    if not set.intersection(*cases):
        raise ValueError(f"compare: {' and '.join(files)} have no case in common")
    text = report.markdown(report.tables({f"{folder}: {name}": method for folder, r in results.items()
                                          for name, method in r["methods"].items()}))
    if config.out:
        data.write_file(Path(config.out) / "tables.md", text.encode())
    print(text)


# ---- a video of your own ----

@dataclass
class Retake(Generating):
    """python evaluate.py retake CLIP: your own video, filmed anew along another camera path."""
    clip: str = ""              # video file or folder of images; may be given as a plain argument
    camera: str = "arc_left"    # ReCamMaster's path by number or name, static, or a camera file
    speed: float = 1.0          # of the camera path
    prompt: str = ""            # what the video shows; empty: BLIP-2's caption of the middle frame
    estimator: str = "mapanything"  # of the clip's cameras: mapanything (in weights), or vipe
    out: str = "out/retake"     # folder for the videos
    frames: int = 81            # at most; the largest 4k + 1 that the clip has
    stride: int = 1             # take every n-th frame


def retake(config):
    """Write <clip>_<camera>_<speed>.mp4 and .._side_by_side.mp4 to config.out; returns the two paths."""
    from encoders import NEGATIVE_PROMPT, load_captioner
    if not config.clip or not config.weights:
        raise ValueError("retake: expected a clip and --weights=FOLDER")
    at_least_1(config, "frames", "height", "width", "stride", "steps")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(config.clip)
    read = read_clip(path, config, config.stride)  # what can be refused is refused before big files are read
    video, fps, _ = read
    target = trajectories.named_path(config.camera, len(video), config.speed)
    checkpoint = find_checkpoint(config.ckpt) if config.ckpt else None
    weights_sizes(config.weights)  # all there?
    if config.cameras and not Path(config.cameras).is_file():
        raise FileNotFoundError(f"{config.cameras}: no such camera file")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.mp4"
        data.write_video(source, video, fps)
        estimate = None if config.cameras else open_estimator(config, device)
        cameras = source_cameras(path, path.name, read, source, config, estimate)
    del estimate
    encoders = open_encoders(config.weights, device)
    clip = encode(read, path, config.prompt or None, cameras, encoders, config, device)
    codec, negative = encoders[0], encoders[1].embed([NEGATIVE_PROMPT])
    del encoders
    load_captioner.cache_clear()  # makes room
    dit = open_policy(config.weights, checkpoint, device)
    title = f"{config.camera}, speed {config.speed:g}"
    print(f"{len(video)} frames of {config.height} x {config.width}, {title}: {clip.caption}")
    new = film(dit, codec, clip, target, path.stem, negative, config, device)
    name = re.sub(r"\.\w+(?=#|$)", "", Path(config.camera).name).replace("#", "_")  # of paths.json#cam03 too
    file = Path(config.out) / f"{path.stem}_{name}_{config.speed:g}.mp4"
    beside = file.with_name(f"{file.stem}_side_by_side.mp4")
    data.write_video(file, new, fps)
    drawn = data.draw_paths(new, [clip.c2w.numpy(), target])  # white: the source's, orange: the new cameras
    data.write_video(beside, data.grid([video, drawn], ["source", title]), fps)
    print(f"{file}\n{beside}")
    return file, beside


COMMANDS = {  # name -> settings, what it does, and the setting that may be given plainly
    "evaluate": (Config, evaluate, None), "toy": (Toy, evaluate_toy, None),
    "compare": (Compare, compare, "results"), "retake": (Retake, retake, "clip")}


def main(argv):
    name, argv = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("evaluate", argv)
    settings, run, first = COMMANDS[name]
    if "--help" in argv or "-h" in argv or not argv and name != "toy":
        kinds = [kind for kind in settings.__mro__ if dataclasses.is_dataclass(kind)]
        return print(__doc__, *(inspect.getsource(kind).partition("\n")[2] for kind in kinds), sep="\n")
    plain, flags = ([a for a in argv if a.startswith("--") == flag] for flag in (False, True))
    if plain and first:
        flags.append(f"--{first}={','.join(plain)}")
    elif plain:
        near = difflib.get_close_matches(plain[0], COMMANDS, 1)
        raise ValueError(f"no command {plain[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    run(parse(settings, flags))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted; the same command goes on from here")
