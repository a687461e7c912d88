"""What is said about an evaluation: means with intervals, comparisons in pairs, the paper's tables.

Cases are named <clip>_camera_<n>_speed_<s>. {case: scores} maps them to dicts of numbers. A score
is None or absent where it failed or does not apply; "failed" says why the cameras could not be had.
The baseline comes first among methods, {name: {"cases": {case: scores}, "notes": {tool: note},
"folder": of videos and poses}}. A table is a dict of title, header (strings), rows (lists of
strings) and notes. page.py draws it all.
"""
import dataclasses
import datetime
import html
import itertools
import json
import platform
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import trajectories
from data.cameras import read_path
from evaluation import page
from evaluation.cases import items, split_case
from evaluation.scores import PROTOCOL
from plumbing.files import printable, write_file, write_json

METRICS = {  # key -> (heading, better: 1 higher, -1 lower, 0 nearer to one); the paper's ten first
    "subject_consistency": ("Subject Consistency", 1),
    "background_consistency": ("Background Consistency", 1),
    "aesthetic_quality": ("Aesthetic Quality", 1), "imaging_quality": ("Imaging Quality", 1),
    "temporal_flickering": ("Temporal Flickering", 1),
    "motion_smoothness": ("Motion Smoothness", 1),
    "Dyn-MEt3R": ("Dyn-MEt3R", 1), "MEt3R": ("MEt3R", -1),
    "TransErr": ("TransErr", -1), "RotErr": ("RotErr (deg)", -1),
    "TransErr_moving": ("TransErr, paths that move", -1), "position": ("Position error (m)", -1),
    "rotation": ("Rotation error (deg)", -1), "scale": ("Scale ratio", 0), "PSNR": ("PSNR (dB)", 1)}
PAPER = tuple(METRICS)[:10]
CAMERA = tuple(METRICS)[8:]
WARP = "explicit warping"
IMPLICIT = "implicit condition"
TABLE1 = {  # the paper's, metrics in the order of PAPER
    "CogNVS": (WARP, .9134, .9342, .4830, .6398, .9460, .9768, .8037, .2736, .0367, 6.9499),
    "TrajectoryCrafter": (
        WARP, .9145, .9331, .5252, .6394, .9432, .98, .8244, .2136, .0293, 10.434),
    "ReCamMaster": (IMPLICIT, .905, .919, .5146, .6611, .9644, .9867, .7971, .3485, .0245, 2.3175),
    "ReDirector": (IMPLICIT, .9098, .915, .5141, .6821, .9537, .9856, .8497, .313, .0149, 1.4635),
    "Geo-Align": (IMPLICIT, .9151, .9179, .5168, .6842, .9548, .9862, .8573, .3077, .0129, 1.3645)}
TABLE2 = {  # by camera speed, on 40 of the clips
    ("ReDirector", 1.0): (.9130, .9143, .5168, .6755, .9540, .9857, .8555, .3206, .0140, 1.3689),
    ("Geo-Align", 1.0): (.9178, .9174, .5191, .6782, .9552, .9862, .8638, .3150, .0123, 1.2156),
    ("ReDirector", 1.5): (.8922, .9004, .5085, .6713, .9486, .9838, .8368, .3354, .0157, 1.5476),
    ("Geo-Align", 1.5): (.8983, .9035, .5111, .6741, .9495, .9844, .8458, .3307, .0129, 1.5491),
    ("ReDirector", 2.0): (.8726, .8881, .4984, .6624, .9457, .9820, .8249, .3496, .0161, 1.9246),
    ("Geo-Align", 2.0): (.8783, .8911, .5017, .6668, .9469, .9828, .8338, .3444, .0153, 1.8821)}

TABLE3 = {  # the ablation of the rewards; the paper's runs of it took 16 GPUs, the others 64
    "no RL": (.9098, .9150, .5141, .6821, .9537, .9856, .8497, .3130, .0149, 1.4635),
    "video quality reward": (.9130, .9174, .5145, .6818, .9549, .9861, .8531, .3117, .0147, 1.6082),
    "full reward": (.9147, .9181, .5163, .6828, .9548, .9863, .8550, .3082, .0140, 1.3895)}


# ---- from scores to numbers ----

def interval(values, clips, over=None):
    """95 % bootstrap interval of the mean of values (n,), or of sum(values) / sum(over).

    Clips (n names) are resampled: the cases of one clip are no independent samples. None for fewer
    than two.
    """
    names, index = np.unique(np.asarray(clips), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.bincount(index, values)
    below = np.bincount(index, over)  # without `over`, the number of cases
    picked = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
    weights = below[picked].sum(1)
    known = weights != 0  # of a few clips, a draw may have none that counts
    means = sums[picked].sum(1)[known] / weights[known]
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def mean(cases, metric):
    """(mean, interval, number of cases) of a metric over {case: scores}; (None, None, 0) if none
    has it."""
    found = {name: case[metric] for name, case in cases.items() if case.get(metric) is not None}
    if not found:
        return None, None, 0
    values = list(found.values())
    clips = [split_case(name)[0] for name in found]
    return float(np.mean(values)), interval(values, clips), len(found)


def can_move(case, metric):
    """Whether a case's score says anything: TransErr is exactly 0 on pure rotations for any
    estimate."""
    return metric != "TransErr" or split_case(case)[1] > 4


def paired(a, b, metric):
    """Paired comparison of {case: scores} b with a on the cases both have -> dict; None where there
    are none.

    cases (their number), a, b (means), difference (mean of b - a), interval, relative (difference
    over a's mean), relative_interval, improved (number of cases where b is strictly better),
    movable (number of cases where it could be). relative is None where a's mean is nothing but
    rounding. A scale ratio counts by its distance from 1.
    """
    better = METRICS[metric][1]
    common = [name for name in a
              if a[name].get(metric) is not None and b.get(name, {}).get(metric) is not None]
    if not common:
        return None
    x = np.array([a[name][metric] for name in common])
    y = np.array([b[name][metric] for name in common])
    if better == 0:
        x = abs(x - 1)
        y = abs(y - 1)
    clips = [split_case(name)[0] for name in common]
    gain = (y - x) * (better or -1)
    relative = None
    relative_interval = None
    if x.mean() > 5e-5:  # else it prints as 0.0000
        relative = float(y.mean() / x.mean() - 1)
        relative_interval = interval(y - x, clips, x)
    return {"cases": len(common), "a": float(x.mean()), "b": float(y.mean()),
            "difference": float((y - x).mean()), "interval": interval(y - x, clips),
            "relative": relative, "relative_interval": relative_interval,
            "improved": int((gain > 0).sum()),
            "movable": sum(can_move(name, metric) for name in common)}


# ---- three lines ----

def short(name):
    """A method's name for people: "toy-iteration_000080" -> "toy @ 80"."""
    return re.sub(r"-iteration_0*(\d+)$", r" @ \1", name)


def three_lines(methods, a, b):
    """Three lines on method b against a, or on b alone where they are one: position, rotation,
    image."""
    lines = []
    known = known_metrics(methods)
    image = next((m for m in ("PSNR", "imaging_quality") if m in known), None)
    asked = [("position error", "position", "m"), ("rotation error", "rotation", "deg")]
    asked += [("image (PSNR)", "PSNR", "dB")] if image == "PSNR" else []
    asked += [("imaging quality", "imaging_quality", "")] if image == "imaging_quality" else []
    number = lambda x: f"{x:#.3g}" if x >= 0.001 else f"{x:.4f}"
    for label, metric, unit in asked:
        x = paired(methods[a]["cases"], methods[b]["cases"], metric)
        if x is None:
            line = "no case has it" if a == b else "no case has it from both"
        elif a == b:
            bounds = mean(methods[a]["cases"], metric)[1]
            line = f"{number(x['a'])} {unit}".rstrip()
            line += f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else ""
        else:
            line = f"{number(x['a'])} -> {number(x['b'])} {unit}".rstrip()
            line += f" ({change(x, metric)})"
        lines.append(f"{label:16}{line}")
    if image is None:
        notes = [methods[b]["notes"].get("VBench", "no score of the image")]
        lines.append(f"{'image':16}{notes[0].split(' (')[0]}")
    return lines


def change(x, metric):
    """"-35 % [-41, -28]" of what `paired` found; a difference where a share says nothing (dB)."""
    if metric == "PSNR" or x["relative"] is None:
        bounds = x["interval"]
        text = f"{x['difference']:+.2f}"
        return text if bounds is None else f"{text} [{bounds[0]:+.2f}, {bounds[1]:+.2f}]"
    bounds = x["relative_interval"]
    text = f"{100 * x['relative']:+.0f} %"
    return text if bounds is None else f"{text} [{100 * bounds[0]:+.0f}, {100 * bounds[1]:+.0f}]"


def lines_of_pairs(methods, pairs):
    """The lines of every pair of methods, [(a, b)]; named where it is not the one there is."""
    lines = []
    for a, b in pairs:
        if len(pairs) > 1 or len(methods) > 2:
            lines.append(f"{b} against {a}:")
        lines += three_lines(methods, a, b)
    return lines


# ---- tables ----

def text_of(x):
    return "" if x is None else f"{x:.4f}"


def mean_text(cases, metric):
    """"0.0129 [0.0121, 0.0138]"; a dash where no case has it."""
    average, bounds, _ = mean(cases, metric)
    if average is None:
        return "–"
    return text_of(average) + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")


def heading(metric):
    return METRICS[metric][0] + {1: " ↑", -1: " ↓", 0: " → 1"}[METRICS[metric][1]]


def table(title, header, rows, *notes):
    return {"title": title, "header": list(header), "rows": rows, "notes": list(notes)}


def only(cases, speed=None, number=None):
    """The cases of one speed, of one path."""
    return {name: case for name, case in cases.items()
            if speed in (None, split_case(name)[2]) and number in (None, split_case(name)[1])}


def known_metrics(methods):
    """Those of METRICS that any case of any method has, in their order."""
    every = [case for method in methods.values() for case in method["cases"].values()]
    return [m for m in METRICS if any(case.get(m) is not None for case in every)]


def tables(methods, pairs=None, paper=True):
    """All tables of methods. pairs: [(a, b)] to compare b with a (None: all); paper: whether its
    rows stand below ours (not in the toy, whose figures do not compare)."""
    names = {name for method in methods.values() for name in method["cases"]}
    speeds = sorted({split_case(name)[2] for name in names})
    paths = sorted({split_case(name)[1] for name in names})
    known = known_metrics(methods)
    camera = [m for m in CAMERA if m in known]
    pairs = list(itertools.combinations(methods, 2)) if pairs is None else pairs
    out = papers_tables(methods, [m for m in PAPER if m in known], speeds, len(paths), paper)
    rewarded = ablation_table(methods)
    out += [rewarded] if rewarded else []

    rows = []
    for speed in speeds:
        for name, method in methods.items():
            cases = only(method["cases"], speed)
            rows.append([name, f"{speed:g}", str(mean(cases, "RotErr")[2]),
                         *(mean_text(cases, m) for m in camera)])
    out.append(table("Cameras, with and without alignment",
                     ["Method", "Speed", "Cases", *map(heading, camera)], rows,
                     "TransErr aligns position, rotation and scale; position and rotation error "
                     "nothing.",
                     "Scale ratio: length of the estimated over that of the target path; above 1, "
                     "too far."))
    for a, b in pairs:
        for speed in [*speeds, None] if len(speeds) > 1 else [None]:
            out.append(comparison(methods, a, b, known, speed))
    rows = []
    for n in paths:
        for name, method in methods.items():
            cases = only(method["cases"], None, n)
            rows.append([f"{n} {trajectories.PATHS[n - 1]}", name,
                         *(mean_text(cases, m) for m in camera)])
    out.append(table("By path, all speeds", ["Path", "Method", *map(heading, camera)], rows))

    rows = []
    for name, method in methods.items():
        for case, scores in method["cases"].items():
            failed = "failed" in scores
            reasons = [scores["failed"]] if failed else scores.get("incomplete", {}).values()
            rows += [[name, case, reason] for reason in reasons]
    out.append(table(f"Failed: {len(rows)}", ["Method", "Case", "Why"], rows,
                     "Means leave out what failed. Comparisons use the cases that both methods "
                     "have."))
    return out


def papers_tables(methods, columns, speeds, paths, paper):
    """The paper's Table 1 and, for several speeds, Table 2: ours, then the paper's rows. columns:
    metrics that any method has; what no method has is left out, and a footnote says why."""
    pick = lambda scores: [text_of(scores[PAPER.index(m)]) for m in columns]
    first = 1.0 if 1.0 in speeds else speeds[0]
    rows = []
    for name, method in methods.items():
        cases = only(method["cases"], first)
        good = sum("failed" not in case for case in cases.values())
        rows.append([name, f"here, {good} of {len(cases)} cases",
                     *(mean_text(cases, m) for m in columns)])
    notes = ["[a, b]: 95 % bootstrap interval over clips.",
             "On the four pure rotations TransErr is exactly 0 for any estimate."]
    if paper:
        rows += [[f"{name} (paper)", kind, *pick(scores)]
                 for name, (kind, *scores) in TABLE1.items()]
        notes.append("(paper): 50 DAVIS clips, ten paths, ViPE; figures of other clips or by "
                     "another estimator do not compare.")
    notes += sorted({note for method in methods.values() for note in method["notes"].values()})
    out = [table(f"Table 1: {paths} paths at speed {first:g}",
                 ["Method", "Type", *map(heading, columns)], rows, *notes)]
    if len(speeds) < 2:
        return out

    rows = []
    for speed in speeds:
        for name, method in methods.items():
            cases = only(method["cases"], speed)
            rows.append([name, f"{speed:g}", *(mean_text(cases, m) for m in columns)])
        rows += [[f"{name} (paper)", f"{speed:g}", *pick(scores)]
                 for (name, s), scores in TABLE2.items() if s == speed and paper]
    notes = ["(paper): on 40 of the clips."] if paper else []
    out.append(table("Table 2: by camera speed",
                     ["Method", "Camera Speed", *map(heading, columns)], rows, *notes))
    return out


def ablated(rewards):
    """Which row of Table 3 a run's rewards ("trans=1,vq=1"; "" for the base) belong to. None where
    they are not known, and for geometry alone, which the paper did not train."""
    if rewards is None:
        return None
    weights = [item.rpartition("=") for item in rewards.split(",") if item.strip()]
    used = {name.strip() for name, _, weight in weights if float(weight)}
    geometry = used & {"trans", "rot"}
    if not used:
        return "no RL"
    if not geometry:
        return "video quality reward"
    return "full reward" if used - geometry else None


def ablation_table(methods):
    """The paper's Table 3, ours first, by the rewards of each method's run ("rewards", see finish).
    None where no run had the video quality reward alone."""
    kinds = {name: ablated(method.get("rewards")) for name, method in methods.items()}
    if "video quality reward" not in kinds.values():
        return None
    columns = known_metrics(methods)
    speeds = {split_case(case)[2] for method in methods.values() for case in method["cases"]}
    first = 1.0 if 1.0 in speeds else min(speeds)
    rows = []
    for kind in TABLE3:
        for name, method in methods.items():
            if kinds[name] == kind:
                cases = only(method["cases"], first)
                rows.append([kind, name, *(mean_text(cases, m) for m in columns)])
    for kind, scores in TABLE3.items():
        paper = dict(zip(PAPER, scores))
        rows.append([f"{kind} (paper)", "", *(text_of(paper.get(m)) for m in columns)])
    return table(f"Table 3: rewards, at speed {first:g}",
                 ["Reward", "Method", *map(heading, columns)], rows,
                 "(paper): 140 iterations on 16 GPUs, where Tables 1 and 2 are of 64; 50 DAVIS "
                 "clips, ten paths, ViPE. Figures of other clips do not compare, their changes do.")


def comparison(methods, a, b, metrics, speed=None):
    """Table of `paired` for the methods named a and b."""
    rows = []
    for metric in metrics:
        x = paired(only(methods[a]["cases"], speed), only(methods[b]["cases"], speed), metric)
        if x is None:
            continue
        name, better = METRICS[metric]
        title = heading(metric) if better else f"{name}, distance from 1 ↓"
        bounds = f"[{x['interval'][0]:+.4f}, {x['interval'][1]:+.4f}]" if x["interval"] else ""
        relative = "" if x["relative"] is None else f"{100 * x['relative']:+.1f} %"
        improved = f"{x['improved']} of {x['movable']}" if x["movable"] else ""
        rows.append([title, str(x["cases"]), text_of(x["a"]), text_of(x["b"]),
                     f"{x['difference']:+.4f}", bounds, relative, improved])
    return table(f"{b} against {a}, " + (f"speed {speed:g}" if speed else "all speeds"),
                 ["Metric", "Cases", a, b, "Difference", "95 % interval", "Relative",
                  "Cases improved"],
                 rows, *([] if rows else ["No case has a score from both."]))


def markdown(tables):
    """Tables -> Markdown."""
    # Names may hold anything.
    plain = lambda text: html.escape(printable(text.replace("\n", " ")), quote=False)
    cell = lambda text: plain(text).replace("\\", "\\\\").replace("|", "\\|")
    line = lambda cells: "| " + " | ".join(map(cell, cells)) + " |"
    lines = []
    for t in tables:
        lines += [f"## {plain(t['title'])}", ""]
        if t["rows"]:
            lines += [line(t["header"]), "|" + "---|" * len(t["header"]), *map(line, t["rows"]), ""]
        lines += [f"- {plain(note)}" for note in t["notes"]] + [""] * bool(t["notes"])
    return "\n".join(lines)


# ---- what is shown of single cases ----

def extremes(a, b):
    """{title: case}: of the cases of both {case: scores}, all speeds, the best, median and worst
    change of position error from a to b; where a is b, the best, median and worst position
    error."""
    changes = {}
    for case, scores in b.items():
        before = a.get(case, {}).get("position")
        after = scores.get("position")
        if before is not None and after is not None:
            changes[case] = after if a is b else after - before
    order = sorted(changes, key=changes.get)
    if not order:
        return {}
    picked = {}
    for title, k in (("Best", 0), ("Median", len(order) // 2), ("Worst", len(order) - 1)):
        if order[k] not in picked.values():
            picked[title] = order[k]
    what = "position error" if a is b else "change of position error"
    return {f"{title} of {len(order)} cases by {what}": case for title, case in picked.items()}


def shown_cases(methods, pair, asked=()):
    """What the page shows of single cases (see page.cases): those asked for, or else the pair's
    extremes."""
    a, b = pair
    picked = {case: case for case in asked} or extremes(methods[a]["cases"], methods[b]["cases"])
    known = known_metrics(methods)
    metrics = [m for m in CAMERA if m in known]
    shown = []
    for title, case in picked.items():
        clip, number, speed = split_case(case)
        folder = methods[a]["folder"].parent
        videos = [("source", folder / "sources" / f"{clip}.mp4"),
                  ("true view", folder / "truth" / f"{case}.mp4")]
        videos = [(label, file) for label, file in videos if file.is_file()]
        paths = []
        rows = []
        for name, method in methods.items():
            scores = method["cases"].get(case, {"failed": "not there"})
            rows.append([name, *(text_of(scores.get(m)) for m in metrics)])
            video = Path(scores.get("video", ""))
            beside = method["folder"] / "videos" / f"{case}.mp4"  # where the folder has moved
            videos += [(name, file) for file in (video, beside) if file.is_file()][:1]
            poses = method["folder"] / "poses" / f"{case}.npz"
            if "failed" not in scores and poses.is_file():
                paths.append((name, read_path(poses)))
        if paths:
            file = folder / "targets" / f"{case}.npz"
            target = trajectories.recammaster(number, len(paths[0][1]), speed)
            paths.insert(0, ("target", read_path(file) if file.is_file() else target))
        what = f"{clip}, {trajectories.PATHS[number - 1].replace('_', ' ')}, speed {speed:g}"
        shown.append({"title": what if asked else f"{title}: {what}",
                      "short": what if asked else f"{title.split()[0].lower()}: {what}",
                      "videos": videos, "paths": paths,
                      "scores": table("", ["Method", *map(heading, metrics)], rows)})
    return shown


# ---- the facts of a run ----

def version():
    """The commit that this code is at, "unknown" where it is no checkout of its own."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown (no git checkout)"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty= and changes"],
            capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown (no git)"
    return done.stdout.strip() or "unknown"


def facts(config, started):
    """What someone who wants the same figures again must know: {name: text}. started: time.time()
    then."""
    device = f"{platform.machine()} CPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    differ = [f"{f.name} = {getattr(config, f.name)!r}" for f in dataclasses.fields(config)
              if getattr(config, f.name) != f.default]
    now = datetime.datetime.now(datetime.timezone.utc)
    found = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "commit": version()}
    for name in ("seed", "estimator"):
        if hasattr(config, name):
            found[name] = str(getattr(config, name))
    threads = torch.get_num_threads()
    return found | {"device": f"{device}, {threads} threads, torch {torch.__version__}",
                    "wall time": f"{time.time() - started:.0f} s (of this call)",
                    "settings that differ from the default": ", ".join(differ) or "none"}


def trained_with(file):
    """The settings of the run that wrote a checkpoint; {} where nothing beside the file tells."""
    try:
        settings = json.loads(file.with_name("state.json").read_text())["config"]
    except (OSError, ValueError, LookupError, TypeError):
        settings = None
    return settings if isinstance(settings, dict) else {}


def training_facts(checkpoints):
    """{"toy @ 80 was trained with": its settings} of checkpoints {method: file or None} that have
    any."""
    found = {}
    for name, file in checkpoints.items():
        settings = trained_with(file) if file else {}
        if settings:
            told = ", ".join(f"{k} = {x!r}" for k, x in settings.items())
            found[f"{short(name)} was trained with"] = told
    return found


# ---- the end ----

def write_report(out, title, methods, pairs, *, paper, log="", asked=(), run=None, results=None):
    """Write tables.md, report.html and, if there are any, results.json to the folder out; print
    three lines for each pair of methods, how many cases failed, and the page's path."""
    lines = lines_of_pairs(methods, pairs)
    found = tables(methods, [pair for pair in pairs if pair[0] != pair[1]], paper)
    failed = sum("failed" in case
                 for method in methods.values() for case in method["cases"].values())
    if failed:
        lines.append(f"{failed} cases failed; the report's last table says why")
    text = "\n".join(printable(line).replace("```", "` ` `") for line in lines)
    sections = [page.html_lines(lines), page.cases(shown_cases(methods, pairs[0], asked)),
                page.training(log), page.section("Tables", *map(page.html_table, found)),
                page.html_facts(run or {})]

    # All is made by now: what is written belongs together.
    if results:
        write_json(out / "results.json", results)
    write_file(out / "tables.md", f"```\n{text}\n```\n\n{markdown(found)}".encode())
    page.write(out / "report.html", title, sections)
    print(f"{text}\n{out / 'report.html'}")


def finish(out, config, methods, checkpoints, started, world):
    """The end of an evaluation: results.json, and write_report of base against each tuned method.

    methods: {name: {"cases", "notes"}}, each in out/<name>; checkpoints: {method: file or None};
    started: time.time() at its beginning; world: "clips" (the paper's rows are shown) or "toy".
    """
    for name, method in methods.items():
        for scores in method["cases"].values():
            scores.pop("made", None)
        if name in checkpoints:  # which row of Table 3 it is
            file = checkpoints[name]
            method["rewards"] = trained_with(file).get("rewards") if file else ""
    run = facts(config, started)
    results = {"protocol": PROTOCOL, "world": world, "run": run,
               "settings": dataclasses.asdict(config), "methods": methods}
    named = {short(name): method | {"folder": out / name} for name, method in methods.items()}
    base, *others = named
    pairs = [(base, other) for other in others] or [(base, base)]
    title = " and ".join(others) + f" against {base}" if others else base
    write_report(out, f"Evaluation: {title}", named, pairs, paper=world == "clips", log=config.log,
                 asked=items(config.show), run=run | training_facts(checkpoints), results=results)
    check_failures(methods)


def check_failures(methods):
    """ValueError where more than half of all cases failed, with the commonest reason. Videos of
    others that are missing are none."""
    every = [case for method in methods.values() for case in method["cases"].values()]
    reasons = [case["failed"] for case in every
               if "failed" in case and not case["failed"].startswith("missing")]
    if 2 * len(reasons) > len(every):
        kinds = [re.sub(r"\d[\d.]*", "N", reason) for reason in reasons]  # whatever the numbers
        kind, count = Counter(kinds).most_common(1)[0]
        raise ValueError(f"{len(reasons)} of {len(every)} cases failed, {count} like this: "
                         f"{reasons[kinds.index(kind)]}")
