"""Evaluation's outside programs, each run in an environment of its own: ViPE, VBench, MEt3R and
Dyn-MEt3R.

None is needed to train or to render a video. Each is called as a program, by a path that the user
names, and judged by the file it writes, not by what it says: some exit with 0 after failing, some
with 1 after succeeding. A note is "what (details)": the tables show what, their footnotes all.
"""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from data.cameras import read_focal, read_path
from data.video import read_video, write_video
from plumbing.files import one_line


def call(command, cwd=None):
    """Run a program -> (exit code or None if there is no such program, the last line it wrote)."""
    env = {k: v for k, v in os.environ.items()  # a tool must not take itself for one of our ranks
           if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                        "MASTER_PORT")
           and not k.startswith(("TORCHELASTIC", "GROUP_", "ROLE_"))}
    if os.sep in command[0]:  # an environment's programs call each other by name
        folder = os.path.dirname(os.path.abspath(command[0]))
        env["PATH"] = os.pathsep.join([folder, env.get("PATH", "")])
    if "LOCAL_RANK" in os.environ:  # one of our ranks: on its own GPU
        devices = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        local = int(os.environ["LOCAL_RANK"])
        ours = local < len(devices) and devices[0]
        env["CUDA_VISIBLE_DEVICES"] = devices[local] if ours else str(local)
    try:
        done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return None, one_line(error)
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode, lines[-1].strip()[:300] if lines else "no output"


def vipe(program="vipe", pipeline="default"):
    """ViPE (Huang et al., arXiv 2508.10934) as a pose estimator: a function (video file) -> (c2w
    (N, 4, 4), intrinsics (4,) normalised) that raises ValueError where it fails.

    ValueError "not installed" without the program. Where a video hardly moves (fewer than 8
    keyframes) it returns poor poses and says nothing. Videos visit a folder of plain name: = , ( [
    and more in a path are options to it.
    """
    if shutil.which(next(iter(shlex.split(program)), "")) is None:
        raise ValueError(f"not installed: ViPE (no program {program!r}; pip install nvidia-vipe in "
                         "an environment of its own, name it by --vipe, or use "
                         "--estimator=mapanything)")

    def estimate(path, method=""):
        with tempfile.TemporaryDirectory(prefix="vipe_") as folder:
            video = f"{folder}/video.mp4"
            out = Path(folder) / "out"
            shutil.copyfile(path, video)
            code, last = call([*shlex.split(program), "infer", video, "-o", str(out),
                               "-p", pipeline])
            files = [out / kind / "video.npz" for kind in ("pose", "intrinsics")]
            if code != 0 or not all(f.is_file() for f in files):
                raise ValueError(f"ViPE failed (exit code {code}: {last})")
            try:
                c2w = read_path(files[0])
                focal = read_focal(files[1], read_video(path, frames=1)[0].shape[1:3])
                return c2w, np.array([*focal, 0.5, 0.5], np.float32)
            except (ValueError, TypeError, EOFError, OSError, KeyError) as error:
                why = str(error).replace(folder, "")
                raise ValueError(f"ViPE wrote no usable cameras ({why})") from None

    return estimate


DIMENSIONS = (  # of VBench, those the paper reports
    "subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality",
    "temporal_flickering", "motion_smoothness")
VBENCH = """
import os, sys, vbench, torch
videos, out, dimension = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
vbench.VBench(device, info, out).evaluate(videos_path=videos, name="cases",
                                          dimension_list=[dimension], mode="custom_input",
                                          imaging_quality_preprocessing_mode="longer")
"""


def vbench(python, videos, dimension):
    """One VBench dimension (Huang et al., CVPR 2024) of videos {case: file} -> ({case: score}, note
    or None)."""
    with tempfile.TemporaryDirectory(prefix="vbench_") as folder:
        staged = Path(folder) / "videos"
        out = Path(folder) / "out"
        staged.mkdir()
        for name, path in videos.items():
            (staged / f"{name}.mp4").symlink_to(Path(path).resolve())
        code, last = call([python, "-c", VBENCH, str(staged), str(out), dimension])
        if code is None or "No module named 'vbench" in last:
            return {}, (f"not installed: VBench ({last}; pip install vbench and name its python by "
                        "--vbench)")
        try:
            found = json.loads((out / "cases_eval_results.json").read_text())[dimension][1]
            found = {Path(x["video_path"]).stem: float(x["video_results"]) for x in found}
        except (OSError, ValueError, LookupError, TypeError) as error:
            return {}, (f"failed: VBench, {dimension} (exit code {code}: {last}; "
                        f"{type(error).__name__})")
    scale = 100 if dimension == "imaging_quality" else 1  # single videos are in per cent there
    scores = {name: found[name] / scale for name in videos
              if math.isfinite(found.get(name, math.nan))}
    lacks = [name for name in videos if name not in scores]
    if lacks:
        return scores, f"failed: VBench, {dimension} ({len(lacks)} videos, {lacks[0]} first)"
    return scores, None


def copy_as_long(source, video, path):
    """Copies a source, cut to the length of a shorter video: ReDirector's program shortens videos
    only."""
    shutil.copyfile(source, path)
    try:
        frames = len(read_video(video)[0])
        whole, fps = read_video(source)
    except ValueError:
        return  # that program then says what is wrong with it
    if frames < len(whole):
        write_video(path, whole[:frames], fps)


def met3r(python, checkout, source, video, number, speed):
    """Scores of one video by ReDirector's evaluate.py -> ({"MEt3R", "Dyn-MEt3R": score}, note or
    None).

    MEt3R (Asim et al., CVPR 2025): frame i of the source with frame i of the video, lower is
    better. Dyn-MEt3R (Park et al., ICCV 2025): within the video, higher is better. number, speed:
    of the path, which that program reads off the file's name; its own pose errors are rounded to
    two digits and not taken.
    """
    with tempfile.TemporaryDirectory(prefix="met3r_") as folder:
        file = f"{folder}/clip_camera_{number}_speed_{speed:g}.mp4"
        copy_as_long(source, video, f"{folder}/input.mp4")
        shutil.copyfile(video, file)
        code, last = call([python, "evaluate.py", "--data_path", file], checkout)
        try:
            text = (Path(folder) / "results.txt").read_text()
        except (OSError, ValueError):
            if code is None or "No module named" in last:
                return {}, (f"not installed: MEt3R ({last}; set up ReDirector's environment and "
                            "name its python by --redirector_python)")
            return {}, f"failed: MEt3R (exit code {code}: {last})"
    scores = {}
    for key, x in re.findall(r"^((?:Dyn-)?MEt3R): *(\S+)$", text, re.M):  # None where it failed
        if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", x):
            scores[key] = float(x)
    lacks = [key for key in ("MEt3R", "Dyn-MEt3R") if key not in scores]
    return scores, f"failed: {' and '.join(lacks)} (its results.txt has none)" if lacks else None
