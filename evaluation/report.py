"""What is said about an evaluation: means with intervals, comparisons, the paper's tables, one HTML page.

Cases are named <clip>_camera_<n>_speed_<s>. {case: scores} maps them to dicts of numbers; a score is None or
absent where it failed or does not apply, "failed" says why cameras could not be had.
A table is a dict: title, header (strings), rows (lists of strings), notes.
The page stands alone: curves are inline SVG, videos base64, and its own policy forbids it to load anything.
"""
import base64
import html
import itertools
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np

import trajectories
import dataclasses

from data.cameras import read_path
from data.draw import grid
from data.video import read_video, write_video
from evaluation.cases import items, split_case
from evaluation.scores import PROTOCOL
from plumbing.files import write_file, write_json

METRICS = {  # key -> (heading, better: 1 higher, -1 lower, 0 nearer to one); the paper's ten first
    "subject_consistency": ("Subject Consistency", 1),
    "background_consistency": ("Background Consistency", 1),
    "aesthetic_quality": ("Aesthetic Quality", 1), "imaging_quality": ("Imaging Quality", 1),
    "temporal_flickering": ("Temporal Flickering", 1), "motion_smoothness": ("Motion Smoothness", 1),
    "Dyn-MEt3R": ("Dyn-MEt3R", 1), "MEt3R": ("MEt3R", -1),
    "TransErr": ("TransErr", -1), "RotErr": ("RotErr (deg)", -1),
    "TransErr_moving": ("TransErr, paths that move", -1), "position": ("Position error (m)", -1),
    "rotation": ("Rotation error (deg)", -1), "scale": ("Scale ratio", 0), "PSNR": ("PSNR (dB)", 1)}
PAPER, CAMERA = tuple(METRICS)[:10], tuple(METRICS)[8:]
WARP, IMPLICIT = "explicit warping", "implicit condition"
TABLE1 = {  # the paper's, metrics in the order of PAPER
    "CogNVS": (WARP, .9134, .9342, .4830, .6398, .9460, .9768, .8037, .2736, .0367, 6.9499),
    "TrajectoryCrafter": (WARP, .9145, .9331, .5252, .6394, .9432, .98, .8244, .2136, .0293, 10.434),
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


# ---- from scores to numbers ----


def interval(values, clips, draws=2000, seed=0):
    """95 % bootstrap interval of the mean of values (n,), resampling clips (n names): the cases of one clip
    are no independent samples. None for fewer than two clips."""
    names, index = np.unique(np.asarray(clips), return_inverse=True)
    if len(names) < 2:
        return None
    sums, counts = np.bincount(index, values), np.bincount(index)
    picked = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[picked].sum(1) / counts[picked].sum(1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def mean(cases, metric):
    """(mean, interval, number of cases) of a metric over {case: scores}; (None, None, 0) if none has it."""
    found = {name: case[metric] for name, case in cases.items() if case.get(metric) is not None}
    if not found:
        return None, None, 0
    values = list(found.values())
    return float(np.mean(values)), interval(values, [split_case(name)[0] for name in found]), len(found)


def compare(a, b, metric):
    """Paired comparison of {case: scores} b with a on the cases both have -> dict; None where there are none.

    cases (their number), a, b (means), difference (mean of b - a), interval, relative (difference over a's
    mean), improved (share of cases where b is strictly better). A scale ratio counts by its distance from 1.
    """
    better = METRICS[metric][1]
    common = [name for name in a
              if a[name].get(metric) is not None and b.get(name, {}).get(metric) is not None]
    if not common:
        return None
    x, y = (np.array([cases[name][metric] for name in common]) for cases in (a, b))
    if better == 0:
        x, y = abs(x - 1), abs(y - 1)
    change = float((y - x).mean())
    return {"cases": len(common), "a": float(x.mean()), "b": float(y.mean()), "difference": change,
            "interval": interval(y - x, [split_case(name)[0] for name in common]),
            "relative": change / float(x.mean()) if x.mean() else None,
            "improved": float(((y - x) * (better or -1) > 0).mean())}


# ---- tables ----

def text_of(x):
    return "" if x is None else f"{x:.4f}"


def mean_text(cases, metric, notes=None):
    """"0.0129 [0.0121, 0.0138]", or the note ({tool: note}) on why it is not known."""
    average, bounds, _ = mean(cases, metric)
    if average is None:
        tool = "MEt3R" if "MEt3R" in metric else "VBench" if metric in PAPER[:6] else None
        return (notes or {}).get(tool, "").split(" (")[0]
    return text_of(average) + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")


def heading(metric):
    return METRICS[metric][0] + {1: " ↑", -1: " ↓", 0: " → 1"}[METRICS[metric][1]]


def table(title, header, rows, *notes):
    return {"title": title, "header": list(header), "rows": rows, "notes": list(notes)}


def only(cases, speed=None, number=None):
    """The cases of one speed, of one path."""
    return {name: case for name, case in cases.items()
            if speed in (None, split_case(name)[2]) and number in (None, split_case(name)[1])}


def tables(methods):
    """All tables of methods {name: {"cases": {case: scores}, "notes": {tool: note}}}, the baseline first."""
    every = {name: case for method in methods.values() for name, case in method["cases"].items()}
    speeds, paths = (sorted({split_case(name)[i] for name in every}) for i in (2, 1))
    known = [m for m in METRICS if any(case.get(m) is not None for case in every.values())]
    notes = sorted({note for method in methods.values() for note in method["notes"].values()})
    columns = [m for m in PAPER if m in known or m in CAMERA or notes]
    pick = lambda scores: [text_of(scores[PAPER.index(m)]) for m in columns]
    first, out = 1.0 if 1.0 in speeds else speeds[0], []

    rows = [[f"{name} (paper)", kind, *pick(scores)] for name, (kind, *scores) in TABLE1.items()]
    for name, method in methods.items():
        cases = only(method["cases"], first)
        good = sum("failed" not in case for case in cases.values())
        rows.append([name, f"here, {good} of {len(cases)} cases",
                     *(mean_text(cases, m, method["notes"]) for m in columns)])
    out.append(table(f"Table 1: {len(paths)} paths at speed {first:g}",
                     ["Method", "Type", *map(heading, columns)], rows,
                     "[a, b]: 95 % bootstrap interval over clips. (paper): 50 DAVIS clips, ten paths, ViPE; "
                     "figures of other clips or by another estimator do not compare.",
                     "On the four pure rotations TransErr is exactly 0 for any estimate.", *notes))
    rows = []
    for speed in speeds if len(speeds) > 1 else ():
        rows += [[f"{name} (paper)", f"{speed:g}", *pick(scores)]
                 for (name, s), scores in TABLE2.items() if s == speed]
        rows += [[name, f"{speed:g}", *(mean_text(only(method["cases"], speed), m, method["notes"])
                                        for m in columns)] for name, method in methods.items()]
    if rows:
        out.append(table("Table 2: by camera speed", ["Method", "Camera Speed", *map(heading, columns)], rows,
                         "(paper): on 40 of the clips."))

    camera = [m for m in CAMERA if m in known]
    rows = [[name, f"{speed:g}", str(mean(only(method["cases"], speed), "RotErr")[2]),
             *(mean_text(only(method["cases"], speed), m) for m in camera)]
            for speed in speeds for name, method in methods.items()]
    out.append(table("Cameras, with and without alignment",
                     ["Method", "Speed", "Cases", *map(heading, camera)], rows,
                     "TransErr aligns position, rotation and scale; position and rotation error nothing.",
                     "Scale ratio: length of the estimated over that of the target path; above 1, too far."))
    rows = [[f"{n} {trajectories.PATHS[n - 1]}", name,
             *(mean_text(only(method["cases"], None, n), m) for m in camera)]
            for n in paths for name, method in methods.items()]
    out.append(table("By path, all speeds", ["Path", "Method", *map(heading, camera)], rows))

    for a, b in itertools.combinations(methods, 2):
        for speed in [*speeds, None] if len(speeds) > 1 else [None]:
            out.append(comparison(methods, a, b, known, speed))
    why = lambda scores: [scores["failed"]] if "failed" in scores else scores.get("incomplete", {}).values()
    rows = [[name, case, reason] for name, method in methods.items()
            for case, scores in method["cases"].items() for reason in why(scores)]
    out.append(table(f"Failed: {len(rows)}", ["Method", "Case", "Why"], rows,
                     "Means leave out what failed. Comparisons use the cases that both methods have."))
    return out


def comparison(methods, a, b, metrics, speed=None):
    """Table of `compare` for the methods named a and b."""
    rows = []
    for metric in metrics:
        x = compare(only(methods[a]["cases"], speed), only(methods[b]["cases"], speed), metric)
        if x:
            title = heading(metric) if METRICS[metric][1] else f"{METRICS[metric][0]}, distance from 1 ↓"
            bounds = f"[{x['interval'][0]:+.4f}, {x['interval'][1]:+.4f}]" if x["interval"] else ""
            relative = "" if x["relative"] is None else f"{100 * x['relative']:+.1f} %"
            rows.append([title, str(x["cases"]), text_of(x["a"]), text_of(x["b"]), f"{x['difference']:+.4f}",
                         bounds, relative, f"{100 * x['improved']:.0f} %"])
    return table(f"{b} against {a}, " + (f"speed {speed:g}" if speed else "all speeds"),
                 ["Metric", "Cases", a, b, "Difference", "95 % interval", "Relative", "Cases improved"], rows,
                 *([] if rows else ["They have no case in common."]))


def markdown(tables):
    """Tables -> Markdown."""
    cell = lambda text: text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    line = lambda cells: "| " + " | ".join(map(cell, cells)) + " |"
    lines = []
    for t in tables:
        lines += [f"## {t['title']}", ""]
        if t["rows"]:
            lines += [line(t["header"]), "|" + "---|" * len(t["header"]), *map(line, t["rows"]), ""]
        lines += [f"- {note}" for note in t["notes"]] + [""] * bool(t["notes"])
    return "\n".join(lines)


# ---- the page ----

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for every eye
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d1d1f; background: #fff; margin: 2em auto;
       max-width: 1240px; padding: 0 1em }
h2, h3 { margin-top: 1.6em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 4px 8px; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom: 2px solid #888; vertical-align: bottom }
.words { text-align: left }
small { white-space: nowrap; color: #555 }
.note { color: #555; font-size: 13px; margin: 4px 0 }
figure { display: inline-block; margin: 4px }
video { max-width: 100%; display: block; background: #000; margin: 8px 0 }
svg { font: 11px system-ui, sans-serif; fill: #333 }
"""
POLICY = "default-src 'none'; media-src data:; style-src 'unsafe-inline'"
esc = html.escape


def html_table(t):
    """A table -> HTML, all text escaped; words to the left, numbers to the right with intervals below."""
    columns = [[cell for cell in column if cell] for column in zip(*t["rows"])]
    words = [bool(column) and all(re.match(r"[^-+\d\[]", cell) for cell in column) for column in columns]

    def row(tag, cells):
        kinds = (' class="words"' if word else "" for word in words)
        shown = (re.sub(r" (\[.*\])$", r"<br><small>\1</small>", esc(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, shown)) + "</tr>"

    body = row("th", t["header"]) + "".join(row("td", cells) for cells in t["rows"])
    parts = [f"<h3>{esc(t['title'])}</h3>"] if t["title"] else []
    parts += [f'<div class="wide"><table>{body}</table></div>'] if t["rows"] else []
    return "".join(parts + [f'<p class="note">{esc(note)}</p>' for note in t["notes"]])


def ticks(low, high):
    """Two to five round numbers from low to high."""
    raw = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(f for f in (1, 2, 5, 10) if f * step >= raw)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def widen(low, high, least):
    return (low, high) if high - low >= least else ((low + high - least) / 2, (low + high + least) / 2)


def chart(title, series, x_label, y_label, least=0.0, equal=False, size=(340, 230), strokes=()):
    """SVG of lines [(label, colour, x (n,), y (n,), SVG attributes)]; an empty label is in no legend.

    least: shortest y axis, so that jitter about a constant looks flat; equal: one scale, and `least`, for
    both axes; strokes: [(colour, x1, y1, x2, y2)].
    """
    W, H = size
    left, right, top, bottom = 56, W - 10, 26, H - (50 if any(s[0] for s in series) else 36)
    ends = []
    for k in (0, 1):
        points = np.concatenate([*(np.asarray(s[2 + k], float) for s in series),
                                 [v for s in strokes for v in (s[1 + k], s[3 + k])]])
        low, high, size = points.min(), points.max(), abs(points).max()
        constant = (0.2 * size or 1) if high - low <= 1e-6 * size else 0  # rounding would fill the axis
        ends.append(widen(low, high, max(constant, least if k or equal else 0)))
    if equal:
        sides = right - left, bottom - top
        scale = 1.05 * max((high - low) / side for (low, high), side in zip(ends, sides))
        ends = [widen(*end, scale * side) for end, side in zip(ends, sides)]
    (x0, x1), (y0, y1) = ends
    px = lambda x: f"{left + (x - x0) / (x1 - x0) * (right - left):.1f}"
    py = lambda y: f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}"
    text = lambda x, y, words, more="": f'<text x="{x}" y="{y}" {more}>{esc(words)}</text>'
    parts = [f'<svg width="{W}" height="{H}" viewBox="0 0 {W} {H}" role="img" aria-label="{esc(title)}">',
             text(left, 15, title, 'font-weight="600"'), text(right, 15, y_label, 'text-anchor="end"'),
             text(right, bottom + 28, x_label, 'text-anchor="end"')]
    for t in ticks(x0, x1):
        parts += [f'<path d="M{px(t)},{top}V{bottom}" stroke="#eee"/>',
                  text(px(t), bottom + 14, f"{t:.5g}", 'text-anchor="middle"')]
    for t in ticks(y0, y1):
        parts += [f'<path d="M{left},{py(t)}H{right}" stroke="#eee"/>',
                  text(left - 4, float(py(t)) + 4, f"{t:.5g}", 'text-anchor="end"')]
    at = left
    for label, colour, x, y, style in series:
        points = " ".join(f"{px(a)},{py(b)}" for a, b in zip(x, y))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
        if label:
            parts += [f'<rect x="{at}" y="{H - 11}" width="12" height="3" fill="{colour}"/>',
                      text(at + 16, H - 6, label[:24])]
            at += 30 + 6 * len(label[:24])
    parts += [f'<path d="M{px(a)},{py(b)}L{px(c)},{py(d)}" stroke="{colour}"/>'
              for colour, a, b, c, d in strokes]
    return "".join(parts) + "</svg>"


def path_charts(paths):
    """Camera paths [(label, c2w (T, 4, 4))], the target first -> two SVGs: from above, and height over
    frames.

    From above: x to the right, z (forward) up; strokes show where cameras look at start, middle and end.
    """
    paths = [(label, trajectories.relative(c2w)) for label, c2w in paths]
    reach = 0.12 * max(0.2, *(np.ptp(c2w[:, [0, 2], 3], axis=0).max() for _, c2w in paths))
    above, height, looks = [], [], []
    for k, (label, c2w) in enumerate(paths):
        colour = COLOURS[(k - 1) % len(COLOURS)] if k else "#555"
        style = 'stroke-width="1.8"' if k else 'stroke-width="5" opacity="0.4"'
        above.append((label, colour, c2w[:, 0, 3], c2w[:, 2, 3], style))
        height.append((label, colour, np.arange(len(c2w)), -c2w[:, 1, 3], style))
        for i in (0, len(c2w) // 2, len(c2w) - 1):
            (x, z), (dx, dz) = c2w[i, [0, 2], 3], reach * c2w[i, [0, 2], 2]
            looks.append((colour, x, z, x + dx, z + dz))
    return (chart("From above", above, "x, metres", "z, metres", 0.2, True, (340, 300), looks),
            chart("Height", height, "frame", "metres", 0.2, False, (340, 300)))


def read_log(path):
    """A training log, one JSON object a line -> list of dicts. A last line cut short (the run may still be
    writing) is left out; ValueError naming any other line that is none."""
    records, lines = [], Path(path).read_text(errors="replace").strip().split("\n")
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif i < len(lines) - 1:
            raise ValueError(f"{path}, line {i + 1}: expected a JSON object, found {line[:40]!r}")
    return records


def curves(records):
    """Training log -> HTML: a chart per numeric key, as logged (thin) and smoothed, grouped by what stands
    before a key's first slash. What is no finite number (the mean of rewards that all failed) is left out."""
    number = lambda x: type(x) in (int, float) and math.isfinite(x)
    groups = {}
    for n, record in enumerate(records):
        at = record.get("iteration", n)
        for key, x in record.items():
            if key != "iteration" and number(x) and number(at):
                group = key.split("/")[0] if "/" in key else "the run"
                groups.setdefault(group, {}).setdefault(key, []).append((at, x))
    parts = []
    for group, keys in groups.items():
        parts.append(f"<h3>{esc(group)}</h3>")
        for key, points in keys.items():
            x, y = np.array(points, float).T
            width = 2 * (len(y) // 40) + 1
            smooth = np.convolve(np.pad(y, width // 2, mode="edge"), np.full(width, 1 / width), "valid")
            lines = [("", COLOURS[0], x, y, 'opacity="0.35"'),
                     ("", COLOURS[0], x, smooth, 'stroke-width="1.8"')]
            parts.append(f"<figure>{chart(key.split('/', 1)[-1], lines, 'iteration', '')}</figure>")
    return "".join(parts)


def side_by_side(videos, height=240):
    """[(label, file)] -> HTML of one looping video, `height` lines at most, unreadable ones named below."""
    shown, labels, notes, rate = [], [], [], 24.0
    for label, path in videos:
        try:
            h, w = read_video(path, frames=1)[0].shape[1:3]
            size = (h, w) if h <= height else (height, 2 * round(w * height / h / 2))
            video, rate = read_video(path, size=size)
            shown.append(video)
            labels.append(label)
        except (ValueError, OSError) as error:
            notes.append(f'<p class="note">{esc(str(error))}</p>')
    if not shown:
        return "".join(notes)
    tall = max(v.shape[1] for v in shown)  # videos made elsewhere may have another size
    shown = [np.pad(v, ((0, 0), (0, tall - v.shape[1]), (0, 0), (0, 0))) for v in shown]
    with tempfile.TemporaryDirectory() as folder:
        write_video(f"{folder}/grid.mp4", grid(shown, labels), rate)
        content = base64.b64encode(Path(f"{folder}/grid.mp4").read_bytes()).decode()
    return (f'<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{content}"></video>'
            + "".join(notes))


def chosen(out, methods, cases=()):
    """What the report shows of single cases (see write): those named, or else those of the last
    method's best, median and worst change of position error against the first."""
    a, b = (methods[name]["cases"] for name in (next(iter(methods)), list(methods)[-1]))
    if not cases:
        score = lambda scores, case: scores.get(case, {}).get("position")
        both = {case: score(b, case) - score(a, case) * (a is not b) for case in b
                if score(a, case) is not None and score(b, case) is not None}
        order = sorted(both, key=both.get)
        cases = [order[i] for i in sorted({0, len(order) // 2, len(order) - 1})] if order else []
    shown = []
    metrics = [m for m in CAMERA if any(b[case].get(m) is not None for case in cases)]
    for case in cases:
        clip, number, speed = split_case(case)
        videos, paths, rows = [("source", out / "sources" / f"{clip}.mp4")], [], []
        for method, results in methods.items():
            scores, poses = results["cases"].get(case, {"failed": ""}), out / method / "poses" / f"{case}.npz"
            rows.append([method, *(text_of(scores.get(m)) for m in metrics)])
            videos.append((method, Path(scores.get("video", ""))))
            if "failed" not in scores:
                paths.append((method, read_path(poses)))
        if paths:
            file = out / "targets" / f"{case}.npz"
            target = trajectories.recammaster(number, len(paths[0][1]), speed)
            paths.insert(0, ("target", read_path(file) if file.exists() else target))
        shown.append({"title": f"{clip}, {trajectories.PATHS[number - 1]}, speed {speed:g}", "paths": paths,
                      "videos": [(label, path) for label, path in videos if path.is_file()],
                      "scores": table("", ["Method", *map(heading, metrics)], rows)})
    return shown


def write(path, title, tables, log="", cases=()):
    """The page. log: a training log's file, or empty; cases: dicts of title, videos [(label, file)], paths
    [(label, c2w (T, 4, 4))] with the target's first, and scores, a table. ValueError, OSError: a bad log."""
    parts = [f"<h1>{esc(title)}</h1>", *map(html_table, tables), "<h2>Cases</h2>" if cases else ""]
    for case in cases:
        parts += [f"<h3>{esc(case['title'])}</h3>", side_by_side(case["videos"]), html_table(case["scores"])]
        parts += [f"<figure>{svg}</figure>" for svg in (path_charts(case["paths"]) if case["paths"] else ())]
    parts += ["<h2>Training</h2>", curves(read_log(log))] if log else []
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>'
            f'<body>{"".join(parts)}</body></html>\n')
    write_file(path, page.encode())


def finish(out, config, methods):
    """Write results.json, tables.md, report.html of {method: {"cases", "notes"}}; print the main tables."""
    for method in methods.values():
        for scores in method["cases"].values():
            scores.pop("made", None)
    write_json(out / "results.json", {"protocol": PROTOCOL, "settings": dataclasses.asdict(config),
                                      "methods": methods})
    all_tables = tables(methods)
    write_file(out / "tables.md", markdown(all_tables).encode())
    write(out / "report.html", f"Evaluation: {', '.join(methods)}", all_tables, config.log,
                 chosen(out, methods, items(config.show)))
    print(markdown([t for t in all_tables if not t["title"].startswith("By path")]))
    print(f"{out}: results.json, tables.md, report.html")
