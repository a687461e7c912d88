"""What the evaluation measures of one video: camera errors here, the rest by programs of others
(outside.py).

Scores are kept in files, whole or not at all, and made again where the video is another.
"""
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import trajectories
from data.clips import NEGATIVE
from data.cameras import read_path, split_name, suffix_of
from data.video import count_frames, read_video
from evaluation import outside
from evaluation.cases import case_digest, split_case
from plumbing.checkpoint import differing
from plumbing.files import TEMPORARY, read_json, write_file, write_json
from pretrained import reward_models

PROTOCOL = 2  # of results.json: raised whenever a number would come out differently


# ---- cameras ----

def pose_scores(pred, target):
    """Camera scores of one video: c2w pred, target (T, 4, 4) -> dict; None where a score does not
    apply.

    TransErr (after alignment; dimensionless), TransErr_moving (None on pure rotations), RotErr
    (degrees, all pairs of frames): ReDirector's. position (metres), rotation (degrees): means over
    frames, both paths relative to their first frame, nothing aligned. scale: length of the
    estimated over that of the target path, None on pure rotations; jitter lengthens a path too.
    What is no estimate gives {"failed": why}: poses that are not finite, a single one, or the same
    ones in every frame of a path that moves or turns. ValueError for paths of different lengths.
    """
    pred = np.asarray(pred, np.float64)
    target = np.asarray(target, np.float64)
    if not np.isfinite(pred).all():
        return {"failed": "the estimated poses are not finite"}
    if len(pred) == 1:
        return {"failed": "1 pose, which is no path"}
    if np.ptp(pred, axis=0).max() == 0 and np.ptp(target, axis=0).max() > 1e-6:
        return {"failed": f"the estimated camera stands still: {len(pred)} equal poses"}
    both = torch.from_numpy(pred), torch.from_numpy(target)
    position, rotation = trajectories.pose_errors(*both, schedule="uniform")
    aligned = trajectories.trans_err(pred, target)
    wanted = length(target)
    moves = wanted > 1e-6
    return {"TransErr": aligned, "TransErr_moving": aligned if moves else None,
            "RotErr": trajectories.rot_err(pred, target), "position": float(position),
            "rotation": math.degrees(float(rotation)),
            "scale": float(length(pred) / wanted) if moves else None}


def length(c2w):
    """How far a camera c2w (T, 4, 4) goes, in metres."""
    return np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1).sum()


def pose_folder(folder):
    """Cameras estimated before: <folder>/<method>/<case>.npz or, as ViPE does,
    <method>/pose/<case>.npz. Their convention, where the files do not say it, is told as for all
    camera files, by FOLDER@w2c."""
    told = suffix_of(folder)
    folder = split_name(folder)[0]
    if not folder.is_dir():
        raise ValueError("estimator: expected vipe, mapanything or a folder, found "
                         f"{str(folder)!r}")

    def estimate(path, method=""):
        files = [folder / method / where / f"{path.stem}.npz" for where in ("", "pose")]
        file = next((f for f in files if f.is_file()), files[0])
        return read_path(f"{file}{told}"), None

    return estimate


def mapanything(folder, device):
    """MapAnything in a folder, as an estimator of a video file's cameras."""
    cameras = reward_models.mapanything(folder, device).cameras

    def estimate(path, method=""):
        c2w, intrinsics = cameras(torch.from_numpy(read_video(path)[0])[None].to(device))
        return c2w[0].double().cpu().numpy(), intrinsics[0].float().cpu().numpy()

    return estimate


def open_estimator(name, weights, vipe, pipeline, device):
    """The pose estimator called `name`: vipe (the program `vipe` and its pipeline), mapanything (in
    the folder `weights`), a folder of MapAnything's, or a folder of poses.

    Returns a function (video file, method's name) -> (c2w (T, 4, 4), one for every frame, and
    normalised intrinsics (4,) or None) that raises ValueError or FileNotFoundError where it fails.
    """
    folder = Path(weights, "map-anything") if name == "mapanything" else Path(name)
    if name == "vipe":
        find = outside.vipe(vipe, pipeline)
    elif name == "mapanything" or (folder / "model.safetensors").exists():
        find = mapanything(folder, device)
    else:
        find = pose_folder(name)

    def estimate(path, method=""):
        c2w, intrinsics = find(path, method)
        frames = count_frames(path, len(c2w))
        if len(c2w) != frames:
            raise ValueError(f"{len(c2w)} poses for {frames} frames")
        return c2w, intrinsics

    return estimate


# ---- kept in files ----

def save_poses(path, c2w):
    file = io.BytesIO()
    np.savez_compressed(file, c2w=np.asarray(c2w, np.float64))
    write_file(path, file.getvalue())


def fingerprint(path):
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def read_results(path):
    """results.json; FileNotFoundError, or ValueError where it is damaged or of another protocol."""
    results = read_json(path)
    found = results.get("protocol")
    if found != PROTOCOL:
        raise ValueError(f"{path}: protocol {found}, expected {PROTOCOL}: evaluate again to "
                         "compare")
    try:
        scores = [dict(case) for m in results["methods"].values() for case in m["cases"].values()]
        if not scores or not isinstance(results["settings"]["estimator"], str):
            raise ValueError("no case, or no estimator")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error!r})") from None
    return results


def is_made(file):
    """Whether a file of an evaluation's folder is a result, and no settings, nor the reason why
    there is none."""
    if file.name in ("settings.json", NEGATIVE) or file.suffix == ".failed":
        return False
    if file.match(TEMPORARY):
        return False
    return file.suffix != ".json" or "failed" not in read_json(file)


def keep_settings(folder, settings):
    """Make a folder, or go on with one made with the same settings; ValueError naming those that
    differ. One in which nothing was made, but what says why, may change them."""
    settings = {"protocol": PROTOCOL, **settings}
    if not (folder / "settings.json").exists():
        return write_json(folder / "settings.json", settings)
    made = read_json(folder / "settings.json")
    if differ := differing(made, {name: settings.get(name) for name in made}):
        if not any(is_made(file) for file in folder.iterdir()):
            return write_json(folder / "settings.json", settings)
        raise ValueError(f"{folder}: made with {differ}; choose another --out")


# ---- every score of a video ----

def score_poses(folder, case, video, estimate, why):
    """Scores of one case, also written to folder/cases/<case>.json; kept if the video is still the
    same, unless it failed. why: the reason, where there is no video."""
    file = folder / "cases" / f"{case}.json"
    made = fingerprint(video)
    clip, number, speed = split_case(case)
    scores = {"clip": clip, "path": trajectories.PATHS[number - 1], "speed": speed,
              "video": str(video), "made": made}
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


def score_met3r(met3r, folder, case, source, video, scores):
    """Add MEt3R and Dyn-MEt3R to a case's scores, unless there -> note if they cannot be had at
    all. met3r: outside.met3r, told all but videos and path."""
    if not scores["made"] or {"MEt3R", "Dyn-MEt3R"} <= set(scores) or not source.exists():
        return None
    _, number, speed = split_case(case)
    found, note = met3r(source, video, number, speed)
    if note and note.startswith("not installed"):
        return note
    scores = scores | found | {"incomplete": {"MEt3R": note} if note else {}}
    write_json(folder / "cases" / f"{case}.json", scores)


def score_vbench(vbench, folder, videos):
    """VBench's six dimensions of {case: file} -> ({case: {dimension: score}}, note or None). Each
    is kept in folder/vbench while the videos are the same. vbench: outside.vbench, told its
    python."""
    made = {case: fingerprint(path) for case, path in videos.items()}
    scores = {}
    notes = []
    for dimension in outside.DIMENSIONS if videos else ():
        file = folder / "vbench" / f"{dimension}.json"
        kept = read_json(file) if file.exists() else {}
        if kept.get("made") != made:
            found, note = vbench(videos, dimension)
            kept = {"made": made, "scores": found, "note": note}
            if note is None:
                write_json(file, kept)
        for case, x in kept["scores"].items():
            scores.setdefault(case, {})[dimension] = x
        notes += [kept["note"]] if kept["note"] else []
        if kept["note"] and kept["note"].startswith("not installed"):
            break
    return scores, "; ".join(notes) or None


# ---- every score of a method ----

def score_cases(folder, videos, sources, conditions, estimate, met3r, quiet):
    """Camera scores and MEt3R of a method's {case: video}, in folder/cases -> notes {tool: note}.

    sources, conditions: the folders of the sources' videos and, where this method's are made here,
    of what they are made from; met3r: see score_met3r, None: not to be had.
    """
    notes = {}
    if met3r is None:
        notes["MEt3R"] = "not installed: MEt3R (needs --redirector, its checkout, and --videos)"
    for case, video in tqdm(videos.items(), f"{folder.name}: scores", unit="video", disable=quiet):
        clip, _, _ = split_case(case)
        why = "missing: there is no such video"
        if conditions:
            failed = conditions / f"{clip}.failed"
            why = f"source: {failed.read_text()}" if failed.exists() else why
        scores = score_poses(folder, case, video, estimate, why)
        if "MEt3R" not in notes:
            source = sources / f"{clip}.mp4"
            note = score_met3r(met3r, folder, case, source, video, scores)
            notes |= {"MEt3R": note} if note else {}
    return notes


def collect_scores(folder, videos, sources, vbench, notes):
    """All scores of a method's {case: video}, VBench's added -> {"cases": {case: scores}, "notes":
    {tool: note}}."""
    scores = {case: read_json(folder / "cases" / f"{case}.json") for case in videos}
    there = {case: video for case, video in videos.items() if scores[case]["made"]}
    found, note = score_vbench(vbench, folder, there)
    for case in videos:
        clip, number, speed = split_case(case)
        source = sources / f"{clip}.digest"
        seen = source.read_text() if source.exists() else ""
        scores[case] |= found.get(case, {})
        path = case_digest(trajectories.recammaster(number, 81, speed))
        scores[case]["digest"] = seen + path
    return {"cases": scores, "notes": notes | ({"VBench": note} if note else {})}
