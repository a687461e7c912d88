"""Evaluation: did it get better, and at what? (paper, section 4)

    python evaluate.py --videos=DAVIS --weights=... --ckpt=out   the protocol, base and tuned
    python evaluate.py --videos=DAVIS --weights=... --baselines=...   other policies beside it
    python evaluate.py --videos=DAVIS --generated=W/CogNVS       videos made elsewhere
    python evaluate.py warp --method=CogNVS --evaluation=...     to methods that warp, and back
    python evaluate.py toy --ckpt=out/toy                        Tables 1 and 2 in the toy world
    python evaluate.py ablation                                  Table 3 there: trains two runs
    python evaluate.py compare out/a out/b                       evaluations, on the cases all have
    python evaluate.py curves out/a out/b                        logs, also of runs still going on
    python evaluate.py try my.py:f                               is this reward any good?
    python evaluate.py retake clip.mp4 --camera=arc_left --speed=1.5 --weights=...   your own video

`python evaluate.py [COMMAND] --help` lists the settings. The first three may run under torchrun;
the ranks then share the cases: `torchrun --nproc-per-node=8 -- evaluate.py ...` (without the `--`
it takes --log for an option of its own). The same command again goes on from where it stopped. In
--out:
    sources/<clip>.mp4                    the source as the model saw it
    conditions/<clip>.safetensors         and encoded (a baseline's: <method>/conditions)
    <method>/videos/<clip>_camera_<n>_speed_<s>.mp4, and the like in <method>/poses and /cases
    results.json, tables.md, report.html  every case; the paper's tables; all of it to look at

The protocol is ReDirector's, which the paper follows: every clip (its largest 4k+1 frames) along
ReCamMaster's ten paths. TransErr and RotErr compare estimated with target cameras. TransErr aligns
scale first and is exactly 0 on the four pure rotations. So it is also given for the paths that move
alone, and errors in metres without alignment. An estimate of n frames is compared with the path of
n frames at the same speed, as ReDirector does it (some methods make 49 at most). Deviation: scores
of VBench are means over videos of each video's score, so that intervals and pairs can be had.
"""
import plumbing.early  # noqa: F401, before all: a signal during the imports ends this quietly

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from evaluation import outside
from evaluation.ablation import Ablation, ablation
from evaluation.cases import folders_of, say_what_is_asked, what_is_asked
from evaluation.compare import Compare, Curves, compare, draw_curves
from evaluation.generate import Generating, generate_videos
from evaluation.report import finish
from evaluation.retake import Retake, retake
from evaluation.scores import collect_scores, keep_settings, open_estimator, score_cases
from evaluation.sources import prepare_sources, read_clip
from evaluation.toy import Toy, evaluate_toy
from evaluation.trial import try_reward
from evaluation.warping import Warp, warp
from plumbing.files import lock_folder
from plumbing.ranks import connect, own_device, rank_of
from plumbing.settings import run_command
from train import Config


@dataclass
class Evaluate(Generating):
    """python evaluate.py: the paper's protocol, for videos made here or elsewhere."""
    videos: str = ""            # folder of source videos, or of folders of images (as DAVIS has)
    clips: str = ""             # only these, by commas or one a line in a file; empty: all
    baselines: str = ""         # folders of other policies' weights, by commas: a method each
    generated: str = ""         # folders of videos made elsewhere: <clip>_camera_<n>_speed_<s>.mp4
    out: str = "out/evaluation"  # folder for all that is made; goes on there
    paths: str = "1,2,3,4,5,6,7,8,9,10"  # ReCamMaster's, by number or name (paper)
    speeds: str = "1"           # of the paths (paper: 1; and 1,1.5,2 on 40 clips)
    frames: int = 0             # per clip at most; 0: the largest 4k + 1 it has (ReDirector)
    estimator: str = "vipe"     # of cameras: vipe (paper), mapanything (in weights), its folder, or
                                # a folder of poses, <method>/<case>.npz
    captions: str = ""          # csv with columns file_name, text; empty: BLIP-2 (ReDirector)
    vbench: str = ""            # python of VBench's environment; empty: this one
    redirector: str = ""        # ReDirector's checkout, for MEt3R and Dyn-MEt3R
    redirector_python: str = ""  # python of its environment; empty: this one
    log: str = ""               # training logs for the report: files or runs' folders, by commas
    show: str = ""              # cases in the report, by commas; empty: best, median, worst change


def evaluate(config):
    """The paper's protocol; writes what the top of this file says, and prints three lines."""
    started = time.time()
    rank, ranks = rank_of()
    quiet = rank > 0
    device = own_device()
    out = Path(config.out)
    sources = out / "sources"

    # What is asked for, and with which tools. Whatever can be refused is refused now.
    asked = what_is_asked(config)
    estimate = open_estimator(config.estimator, config.weights, config.vipe, config.vipe_pipeline,
                              device)
    met3r = partial(outside.met3r, config.redirector_python or sys.executable, config.redirector)
    met3r = met3r if config.redirector and asked.clips else None
    vbench = partial(outside.vbench, config.vbench or sys.executable)
    lock = lock_folder(out) if rank == 0 else None  # noqa: F841, until this process ends
    for folder, settings in folders_of(config, asked).items():
        keep_settings(folder, settings)
    if ranks > 1:
        connect("gloo", timeout=30 * 24 * 3600)  # only to wait for each other
    wait = dist.barrier if ranks > 1 else lambda: None
    if rank == 0:
        say_what_is_asked(asked)

    # Sources: the clips as the model sees them, and encoded once for all methods of one policy.
    mine = dict(list(asked.clips.items())[rank::ranks])  # this rank's share
    read = partial(read_clip, frames=config.frames, size=(config.height, config.width))
    policies = {model.conditions: model for model in asked.models.values()}
    for model in policies.values() or [None]:
        prepare_sources(mine, Path(config.videos), sources, model, read, config.captions,
                        config.blip, config.cameras or estimate, config.fov, device, quiet)
    wait()

    # Videos: of base and tuned models and of baselines, from the same noise.
    mine = asked.cases[rank::ranks]
    sampling = {"steps": config.steps, "shift": config.shift, "guidance": config.guidance,
                "seed": config.seed}
    for method, model in asked.models.items():
        videos = {case: asked.files[method][case] for case in mine}
        generate_videos(method, model, videos, sampling, device, quiet)

    # Scores: cameras and MEt3R by every rank for its own cases, VBench by the first.
    notes = {}
    for method, videos in asked.files.items():
        model = asked.models.get(method)
        notes[method] = score_cases(out / method, {case: videos[case] for case in mine}, sources,
                                    model and model.conditions, estimate, met3r, quiet)
    wait()
    if rank == 0:
        methods = {}
        for method, videos in asked.files.items():
            methods[method] = collect_scores(out / method, videos, sources, vbench, notes[method])
        finish(out, config, methods, asked.checkpoints, started, "clips")
    if ranks > 1:
        dist.destroy_process_group()


@dataclass
class Try(Config):
    """python evaluate.py try my.py:f [CONFIG]: what a reward says of two batches of a run."""
    reward: str = ""            # my.py:function, or a name of rewards.py; may be given plainly
    batches: int = 2            # of conditions x members videos each

    FILE = str(Path(__file__).parent / "config/toy.py")  # where none is named


COMMANDS = {  # name -> settings, what it does, and the setting that may be given plainly
    "evaluate": (Evaluate, evaluate, None), "toy": (Toy, evaluate_toy, None),
    "warp": (Warp, warp, None), "ablation": (Ablation, ablation, None),
    "compare": (Compare, compare, "results"), "curves": (Curves, draw_curves, "logs"),
    "try": (Try, try_reward, "reward"), "retake": (Retake, retake, "clip")}


if __name__ == "__main__":
    run_command("evaluate.py", __doc__, COMMANDS, sys.argv[1:] or ["--help"])
