"""Which cases an evaluation has: clips, paths, speeds, checkpoints, and videos made elsewhere."""
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.prepare import read_captions
from data.video import VIDEOS, find_videos, without_suffix
from evaluation.page import read_log
from plumbing.checkpoint import WEIGHTS, find_checkpoint
from plumbing.files import digest
from plumbing.settings import at_least_1
from pretrained.weights import Policy, find_policy, weights_sizes
from trajectories import path_number


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


def case_name(clip, number, speed):
    """A case's name; of a speed that six digits don't tell, all digits, so that no two share a
    name."""
    text = f"{speed:g}" if float(f"{speed:g}") == speed else repr(speed)
    return f"{clip}_camera_{number}_speed_{text}"


def split_case(name):
    """"bear_camera_9_speed_1.5" -> ("bear", 9, 1.5); None for any other name."""
    match = re.fullmatch(r"(.+)_camera_(\d+)_speed_(\d+(?:\.\d+)?)", name, re.S)
    if match is None or not 1 <= int(match[2]) <= 10:
        return None
    return match[1], int(match[2]), float(match[3])


def find_clips(videos, only=""):
    """{clip: video, by its name below the folder `videos`}. only: clips, comma-separated or one a
    line in a text file; ValueError naming those that do not exist."""
    clips = {}
    for video in find_videos(videos):
        clip = without_suffix(video).replace("/", "_")
        if clips.setdefault(clip, video) != video:
            raise ValueError(f"{videos}: {clips[clip]} and {video} would both be called {clip}")
    if not only:
        return clips
    wanted = Path(only).read_text().split("\n") if Path(only).is_file() else items(only)
    wanted = [line.strip() for line in wanted if line.strip()]
    wanted = [Path(name).stem if name.lower().endswith(VIDEOS) else name for name in wanted]
    missing = [name for name in wanted if name not in clips]
    if missing or not wanted:
        near = difflib.get_close_matches(missing[0], clips, 1) if missing else []
        raise ValueError(f"clips: {len(missing)} of {len(wanted)} are not in {videos}: "
                         + ", ".join(missing[:5]) + (f"; did you mean {near[0]}?" if near else ""))
    return {name: clips[name] for name in wanted}


def find_generated(folder):
    """{case: file} of a folder of videos made elsewhere. ValueError for one that is not named like
    a case, and for two of the same case."""
    cases = {}
    for name in find_videos(folder):
        case = split_case(without_suffix(Path(name).name))
        if case is None:
            raise ValueError(f"{folder}: expected <clip>_camera_<1-10>_speed_<s>.mp4, found {name}")
        file = Path(folder) / name
        if cases.setdefault(case_name(*case), file) != file:
            first = cases[case_name(*case)].relative_to(folder)
            raise ValueError(f"{folder}: {first} and {name} are both {case_name(*case)}; expected "
                             "one video a case")
    return cases


def find_checkpoints(text):
    """Comma-separated checkpoints -> {method: file, None for the base}; a run's is
    <run>-<iteration>."""
    files = [find_checkpoint(x) for x in items(text)]
    names = ["-".join(f.resolve().parts[-3:-1]) if f.name == WEIGHTS else f.stem for f in files]
    if len({*names, "base", "sources", "conditions", "targets", "truth"}) < len(names) + 5:
        raise ValueError("ckpt: expected different names, none of them base, found "
                         f"{', '.join(names)}")
    return {"base": None, **dict(zip(names, files))}


def case_digest(*parts):
    """What a case's source and truth look like, so coarsely that two machines agree: two hex digits
    for each of some numbers, which `is_same_case` compares.

    Rendering, decoding and resizing differ in the last bit between machines. So of a video, uint8
    (T, H, W, 3), it is the mean colours of 2 x 3 fields in the first, middle and last frame, in
    200ths of full scale; of a path, c2w (T, 4, 4), the middle and last pose, in hundredths.
    """
    numbers = []
    for part in parts:
        part = np.asarray(part, np.float64)
        moments = part[[0, len(part) // 2, len(part) - 1]]
        if part.ndim == 4:
            for half in np.array_split(moments, 2, axis=1):
                for field in np.array_split(half, 3, axis=2):
                    numbers.extend(200 / 255 * field.mean((1, 2)).ravel())  # (3 frames, 3 colours)
        else:
            numbers.extend(100 * moments[1:, :3].ravel())
    return bytes(round(x) % 256 for x in numbers).hex()


def is_same_case(a, b):
    """Whether two digests of case_digest are of the same source and truth: no number of theirs is
    more than one apart (numbers of paths count on from 255 to 0)."""
    try:
        a = np.frombuffer(bytes.fromhex(a), np.uint8)
        b = np.frombuffer(bytes.fromhex(b), np.uint8)
    except (TypeError, ValueError):  # none, or no digest
        return False
    return len(a) == len(b) and bool((a - b + 1 <= 2).all())


def file_digest(path):
    """A digest of a file's bytes; "" without a file."""
    return digest(path.read_bytes()) if path else ""


# ---- all of an evaluation ----

@dataclass
class Model:
    """What generates a method's videos here."""
    weights: str        # folder of the published files
    policy: Policy      # which one they are, and what it takes
    sizes: dict         # of those files
    checkpoint: object  # file laid over them; None: the base
    conditions: Path    # folder of the clips encoded for it


@dataclass
class Asked:
    """What an evaluation is asked for."""
    clips: dict        # clip -> its video below the folder of videos; {} where none is needed
    cases: list        # names <clip>_camera_<n>_speed_<s>
    checkpoints: dict  # method -> file (None: the base), of the policy in --weights
    models: dict       # method -> Model, of those that generate here
    elsewhere: dict    # method -> case -> video, of videos made elsewhere, whatever their cases
    files: dict        # method -> case -> video, of all methods and of the cases


def what_is_asked(config):
    """Settings -> Asked. ValueError, OSError for what cannot be."""
    numbers = listed(config.paths, "paths", path_number)
    speeds = listed(config.speeds, "speeds", float)
    check_settings(config)

    # files: checkpoints, source videos, videos made elsewhere, and what generates here
    out = Path(config.out)
    checkpoints = find_checkpoints(config.ckpt) if config.weights else {}
    clips = find_clips(config.videos, config.clips) if config.videos else {}
    if config.captions:
        read_captions(config.captions)
    folders = [Path(name) for name in items(config.generated)]
    elsewhere = {folder.resolve().name: find_generated(folder) for folder in folders}
    models = {}
    if config.weights:
        policy = find_policy(config.weights)
        sizes = weights_sizes(config.weights)  # all there?
        for method, checkpoint in checkpoints.items():
            models[method] = Model(config.weights, policy, sizes, checkpoint, out / "conditions")
    for weights in items(config.baselines):
        policy = find_policy(weights)
        name = policy.name
        if name in models:
            raise ValueError(f"baselines: expected one {name}, found another in {weights}")
        sizes = weights_sizes(weights)
        models[name] = Model(weights, policy, sizes, None, out / name / "conditions")
    at_least_1(config, "height", "width", "steps")
    check_size(config.height, config.width)
    if len({*models, *elsewhere}) < len(models) + len(folders):
        raise ValueError("generated: expected folders of different names, none "
                         f"{', '.join(models)}")
    check_models(models, config.cameras, config.estimator)

    # cases: every clip along every path at every speed
    generated = {case for videos in elsewhere.values() for case in videos}
    names = list(clips) or sorted({split_case(case)[0] for case in generated})
    cases = [case_name(clip, number, speed)
             for clip in names for speed in speeds for number in numbers]
    check_cases(cases, items(config.show), elsewhere)
    files = {}
    for method in models:
        files[method] = {case: out / method / "videos" / f"{case}.mp4" for case in cases}
    for method, videos in elsewhere.items():
        files[method] = {case: videos.get(case, Path(method) / f"{case}.mp4") for case in cases}
    return Asked(clips, cases, checkpoints, models, elsewhere, files)


# ---- what is refused ----

def check_size(height, width):
    """ValueError for a video's size that the VAE and the patches do not divide."""
    if height % 16 or width % 16:
        raise ValueError(f"height and width: expected multiples of 16, found {height} x {width}")


def check_settings(config):
    """ValueError, OSError for settings without others that they need, and for missing files."""
    if not (config.weights or config.generated):
        raise ValueError("give --weights=FOLDER to generate videos, or --generated=FOLDER to score "
                         "some")
    if (config.weights or config.clips) and not config.videos:
        raise ValueError("--videos=FOLDER is needed, the source videos")
    if not config.weights and (config.ckpt or config.baselines):
        raise ValueError("ckpt and baselines: --weights=FOLDER is needed")
    if config.redirector and not (Path(config.redirector) / "evaluate.py").is_file():
        raise FileNotFoundError(f"{config.redirector}/evaluate.py: no such file, expected "
                                "ReDirector's")
    for log in items(config.log):
        read_log(log)


def check_models(models, cameras, estimator):
    """ValueError where a policy takes no source video, or takes the sources' cameras and nothing
    could tell them: a folder of poses found before, as estimator, has neither those of the sources
    nor focal lengths."""
    for model in models.values():
        if not model.policy.source:
            raise ValueError(f"{model.weights}: {model.policy.name} takes no source video")
    if cameras or estimator in ("vipe", "mapanything"):
        return
    is_model = (Path(estimator) / "model.safetensors").exists()
    needs = [name for name, model in models.items() if "c2w" in model.policy.parts]
    if needs and not is_model:
        raise ValueError(f"cameras: {needs[0]} takes the sources' cameras, which the poses in "
                         f"{estimator} do not tell; give --cameras=FOLDER")


def check_cases(cases, show, elsewhere):
    """ValueError for cases whose speed is none, for one to show that is none of them, and for
    {method: {case: video}} without any of them."""
    if odd := [case for case in cases if split_case(case) is None]:
        raise ValueError("speeds: expected numbers such as 1 and 1.5, found "
                         f"{odd[0].split('_')[-1]}")
    if unknown := [case for case in show if case not in cases]:
        raise ValueError(f"show: no case {unknown[0]!r}, expected for example {cases[0]}")
    for method, videos in elsewhere.items():
        if not set(videos) & set(cases):
            raise ValueError(f"{method}: none of its {len(videos)} videos has such a clip, path "
                             "and speed")


# ---- what is said and kept of it ----

def say_what_is_asked(asked):
    """Prints the number of cases, and how many of them the folders of videos made elsewhere
    have."""
    print(f"{len(asked.cases)} cases for each of {', '.join(asked.files)}")
    for method, videos in asked.elsewhere.items():
        known = len(set(asked.cases) & set(videos))
        print(f"{method}: has {known} of them, and {len(videos) - known} other videos")


def folders_of(config, asked):
    """{folder: the settings that made what it holds} of an evaluation's folders."""
    out = Path(config.out)
    shape = {"frames": config.frames, "height": config.height, "width": config.width}
    encoded = shape | {"cameras": config.cameras or config.estimator, "fov": config.fov,
                       "captions": config.captions}
    sampled = {"steps": config.steps, "shift": config.shift, "guidance": config.guidance,
               "seed": config.seed}
    folders = {out / "sources": shape}
    for method, model in asked.models.items():
        folders[model.conditions] = encoded | model.sizes
        checkpoint = {"checkpoint": file_digest(model.checkpoint)}
        folders[out / method / "videos"] = encoded | model.sizes | sampled | checkpoint
    for method in asked.files:
        folders[out / method / "cases"] = {"estimator": config.estimator,
                                           "pipeline": config.vipe_pipeline}
    return folders
