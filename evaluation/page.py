"""The page that a run or an evaluation shows: one HTML file that stands alone.

Charts are inline SVG, videos and their posters base64; the page's own policy forbids it to load
anything or to run a script. Sections are strings of HTML, made here from tables (report.py), logs,
videos and camera paths.
"""
import base64
import html
import io
import json
import math
import re
import tempfile
from pathlib import Path

import av
import numpy as np

import trajectories
from data.draw import draw_paths, grid
from data.video import read_video, write_video
from plumbing.files import write_file

# Okabe and Ito's hues, which every eye tells apart: dark on white, light on black (contrast > 4.5)
COLOURS = (("#0060b0", "#6db3f8"), ("#b04600", "#ff9d5c"), ("#007050", "#4fd0a0"),
           ("#a33a7a", "#f29ac8"), ("#755800", "#e0c050"), ("#5a54c4", "#aaa6ff"))
INK = {  # name -> light, dark
    "paper": ("#ffffff", "#16181b"), "ink": ("#1d1d1f", "#e8e8ea"), "faint": ("#595959", "#a8a8ad"),
    "rule": ("#dddddd", "#3a3d42"), "target": ("#6e6e6e", "#9a9aa0"),
    **{f"c{i}": pair for i, pair in enumerate(COLOURS)}}
STYLE = (":root { color-scheme: light dark; "
         + "".join(f"--{k}: {x[0]}; " for k, x in INK.items()) + "}\n"
         "@media (prefers-color-scheme: dark) { :root { "
         + "".join(f"--{k}: {x[1]}; " for k, x in INK.items()) + "} }\n" +
         """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 1.5em auto; max-width: 1280px; padding: 0 16px; overflow-wrap: break-word }
h1 { font-size: 1.6em; line-height: 1.25 }
h2 { font-size: 1.3em; margin: 2em 0 .4em; border-bottom: 1px solid var(--rule) }
h3 { font-size: 1.05em; margin: 1.4em 0 .3em }
.lines { font: 15px/1.6 ui-monospace, monospace; white-space: pre; overflow-x: auto; margin: 0 }
.wide { overflow-x: auto; margin: 4px 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--rule);
         vertical-align: top }
th { border-bottom: 2px solid var(--faint); vertical-align: bottom }
.words { text-align: left }
small { white-space: nowrap; color: var(--faint) }
.note { color: var(--faint); font-size: 14px; margin: 4px 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr));
          gap: 12px 16px }
figure { margin: 0; min-width: 0 }
figcaption { font-size: 14px; font-weight: 600 }
figcaption span { font-weight: 400; color: var(--faint) }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; list-style: none; padding: 0;
          margin: 8px 0; font-size: 14px }
.legend svg { width: 28px; height: 10px; margin-right: 6px; vertical-align: middle }
.player { overflow-x: auto }
video { width: 100%; min-width: 560px; height: auto; display: block; background: #000;
        margin: 8px 0 }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; display: block }
.legend svg { display: inline-block }
svg text { fill: var(--faint) }
svg polyline, svg path { fill: none; stroke-width: 1.8 }
.grid { stroke: var(--rule); stroke-width: 1 }
.thin { stroke-width: 1; opacity: .35 }
.target { stroke: var(--target); stroke-width: 5; stroke-opacity: .55 }
""" + "".join(f".c{i} {{ stroke: var(--c{i}) }}\n" for i in range(len(COLOURS))) + """
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 4px 16px;
     font-size: 14px }
dt { color: var(--faint) }
dd { margin: 0; min-width: 0 }
@media (max-width: 600px) {
    dl { grid-template-columns: 1fr }
    .lines { font-size: 10.5px; white-space: pre-wrap } }
""")
POLICY = "default-src 'none'; media-src data:; img-src data:; style-src 'unsafe-inline'"
esc = html.escape


def rgb(colour):
    """"#6db3f8" -> (109, 179, 248)"""
    return tuple(bytes.fromhex(colour[1:]))


# ---- the whole page ----

def write(path, title, sections):
    """Write the page: a title, and sections of HTML one below the other."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    phone = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    text = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}{phone}'
            f'<title>{esc(title)}</title><style>{STYLE}</style></head>'
            f'<body><main><h1>{esc(title)}</h1>{"".join(sections)}</main></body></html>\n')
    write_file(path, text.encode(errors="xmlcharrefreplace"))


def section(title, *parts):
    """Parts of HTML under a heading; nothing where they are all empty."""
    body = "".join(parts)
    return f"<h2>{esc(title)}</h2>{body}" if body else ""


def html_lines(texts):
    """Lines of text as they stand in the terminal."""
    text = esc("\n".join(texts))
    return f'<pre class="lines" tabindex="0" role="region" aria-label="result">{text}</pre>'


def note(text):
    return f'<p class="note">{esc(text)}</p>'


def html_facts(found):
    """{name: text} -> a list of them."""
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{esc(text)}</dd>" for name, text in found.items())
    return section("This run", f"<dl>{rows}</dl>" if rows else "")


def html_table(t):
    """A table (report.table) -> HTML, all text escaped; words to the left, numbers to the right
    with their intervals below. It scrolls sideways by itself, by keyboard too."""
    columns = [[cell for cell in column if cell] for column in zip(*t["rows"])]
    is_word = lambda cell: re.match(r"[^-+\d\[–]", cell) or re.search(r"[^\W\d_]{3}", cell)
    words = [bool(column) and all(map(is_word, column)) for column in columns]

    def row(tag, cells):
        kinds = (' class="words"' if word else "" for word in words)
        shown = (re.sub(r" (\[.*\])$", r"<br><small>\1</small>", esc(cell)) for cell in cells)
        parts = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, shown))
        return f"<tr>{''.join(parts)}</tr>"

    parts = [f"<h3>{esc(t['title'])}</h3>"] if t["title"] else []
    if t["rows"]:
        body = row("th", t["header"]) + "".join(row("td", cells) for cells in t["rows"])
        name = esc(t["title"] or "scores")
        parts.append(f'<div class="wide" tabindex="0" role="region" aria-label="{name}">'
                     f'<table>{body}</table></div>')
    return "".join(parts + [note(text) for text in t["notes"]])


# ---- charts ----

def ticks(low, high):
    """Two to five round numbers from low to high."""
    raw = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(f for f in (1, 2, 5, 10) if f * step >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def widen(low, high, least):
    """The range from low to high, widened about its middle where it is shorter than `least`."""
    if high - low >= least:
        return low, high
    return (low + high - least) / 2, (low + high + least) / 2


def chart(title, series, x_unit, y_unit, least=0.0, equal=False, size=(340, 220), strokes=()):
    """A figure of lines [(CSS classes, x (n,), y (n,))].

    least: shortest y axis, so that jitter about a constant looks flat; equal: one scale, and
    `least`, for both axes; strokes: [(CSS classes, x1, y1, x2, y2)].
    """
    width, height = size
    left = 52
    right = width - 12
    top = 8
    bottom = height - 34
    ends = []
    for k in (0, 1):
        points = np.concatenate([*(np.asarray(s[1 + k], float) for s in series),
                                 [v for s in strokes for v in (s[1 + k], s[3 + k])]])
        low = points.min()
        high = points.max()
        largest = abs(points).max()
        constant = 0  # of a constant series: its rounding is not drawn large
        if high - low <= 1e-6 * largest:
            constant = 0.2 * largest or 1
        ends.append(widen(low, high, max(constant, least if k or equal else 0)))
    if equal:
        sides = right - left, bottom - top
        scale = 1.05 * max((high - low) / side for (low, high), side in zip(ends, sides))
        ends = [widen(*end, scale * side) for end, side in zip(ends, sides)]
    (x0, x1), (y0, y1) = ends
    px = lambda x: f"{left + (x - x0) / (x1 - x0) * (right - left):.1f}"
    py = lambda y: f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}"

    def text(x, y, words, anchor):
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{esc(words)}</text>'

    parts = [text(right, bottom + 28, x_unit, "end")]
    for t in ticks(x0, x1):
        parts.append(f'<path class="grid" d="M{px(t)},{top}V{bottom}"/>')
        parts.append(text(px(t), bottom + 14, f"{t:.5g}", "middle"))
    for t in ticks(y0, y1):
        parts.append(f'<path class="grid" d="M{left},{py(t)}H{right}"/>')
        parts.append(text(left - 4, float(py(t)) + 4, f"{t:.5g}", "end"))
    for kind, x, y in series:
        points = " ".join(f"{px(a)},{py(b)}" for a, b in zip(x, y))
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
    parts += [f'<path class="{kind}" d="M{px(a)},{py(b)}L{px(c)},{py(d)}"/>'
              for kind, a, b, c, d in strokes]
    unit = f" <span>{esc(y_unit)}</span>" if y_unit else ""
    label = esc(f"{title}, {y_unit}, over {x_unit}")
    return (f'<figure><figcaption>{esc(title)}{unit}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
            f'{"".join(parts)}</svg></figure>')


def colour_of(k):
    """The CSS class of the k-th line."""
    return f"c{k % len(COLOURS)}"


def legend(entries):
    """[(CSS classes, name)] -> a list of the lines as they are drawn, each with its whole name."""
    swatch = '<svg viewBox="0 0 28 10" aria-hidden="true"><path class="{}" d="M0,5H28"/></svg>'
    items = "".join(f"<li>{swatch.format(kind)}{esc(name)}</li>" for kind, name in entries)
    return f'<ul class="legend">{items}</ul>'


# ---- camera paths ----

def turns(c2w):
    """c2w (T, 4, 4), OpenCV -> degrees to the right (T,) and upwards (T,) that each camera
    looks."""
    x, y, z = c2w[:, :3, 2].T  # where it looks
    return np.degrees(np.unwrap(np.arctan2(x, z))), np.degrees(np.arctan2(-y, np.hypot(x, z)))


def path_charts(paths):
    """Camera paths [(name, c2w (T, 4, 4))], the target first -> charts from above (x to the right,
    forward upwards; strokes show where cameras look at start, middle and end), of height, and of
    both rotations."""
    paths = [(name, trajectories.relative(np.asarray(c2w))) for name, c2w in paths]
    reach = 0.12 * max(0.2, *(np.ptp(c2w[:, [0, 2], 3], axis=0).max() for _, c2w in paths))
    above = []
    height = []
    right = []
    up = []
    looks = []
    names = []
    for k, (name, c2w) in enumerate(paths):
        kind = colour_of(k - 1) if k else "target"
        names.append((kind, name))
        frames = np.arange(len(c2w))
        above.append((kind, c2w[:, 0, 3], c2w[:, 2, 3]))
        height.append((kind, frames, -c2w[:, 1, 3]))
        to_right, upwards = turns(c2w)
        right.append((kind, frames, to_right))
        up.append((kind, frames, upwards))
        for i in (0, len(c2w) // 2, len(c2w) - 1):
            x, z = c2w[i, [0, 2], 3]
            dx, dz = reach * c2w[i, [0, 2], 2]
            looks.append((kind, x, z, x + dx, z + dz))
    return legend(names) + '<div class="charts">' + "".join([
        chart("From above", above, "metres to the right", "metres forward", 0.2, True, (340, 300),
              looks),
        chart("Height", height, "frame", "metres", 0.2, size=(340, 300)),
        chart("Turned right", right, "frame", "degrees", 4, size=(340, 300)),
        chart("Turned upwards", up, "frame", "degrees", 4, size=(340, 300))]) + "</div>"


# ---- videos ----

def jpeg(frame):
    """uint8 (H, W, 3) -> the bytes of a picture file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", 1)
        stream.height, stream.width = frame.shape[:2]
        stream.pix_fmt = "yuvj420p"
        stream.options = {"qscale": "4"}
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def video(frames, fps, name):
    """uint8 (T, H, W, 3) -> HTML of a video with a poster; it plays over and over once it is
    started."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)))
    with tempfile.TemporaryDirectory() as folder:
        write_video(f"{folder}/video.mp4", frames, fps)
        content = base64.b64encode(Path(f"{folder}/video.mp4").read_bytes()).decode()
    poster = base64.b64encode(jpeg(frames[-1])).decode()  # the last frame: there paths have parted
    height, width = frames.shape[1:3]
    return (f'<div class="player"><video controls loop muted playsinline preload="auto" '
            f'width="{width}" height="{height}" aria-label="{esc(name)}" '
            f'poster="data:image/jpeg;base64,{poster}" '
            f'src="data:video/mp4;base64,{content}"></video></div>')


def below(rows):
    """Videos uint8 (T_i, H_i, W_i, 3), one below the other; a shorter one holds its last frame."""
    length = max(len(row) for row in rows)
    width = max(row.shape[2] for row in rows)
    padded = []
    for row in rows:
        row = row[np.minimum(np.arange(length), len(row) - 1)]
        edges = ((0, 0), (0, 4), (0, width - row.shape[2]), (0, 0))
        padded.append(np.pad(row, edges, constant_values=20))
    return np.concatenate(padded, 1)


def read_panel(path, most):
    """A video, `most` lines at most -> uint8 (T, H, W, 3), fps."""
    h, w = read_video(path, frames=1)[0].shape[1:3]
    size = None if h <= most else (most, 2 * round(w * most / h / 2))
    return read_video(path, size=size)


def panels(case):
    """One case's videos side by side, each method's with its own path (in its colour) and the
    target's (white) drawn in -> uint8 (T, H, W, 3) or None, fps, and a note on each that cannot be
    read."""
    paths = dict(case["paths"][1:])  # the first is the target's
    methods = list(paths)
    most = 240 if len(case["videos"]) < 10 else 120  # wider than 4,096 pixels plays on few devices
    shown = []
    labels = []
    notes = []
    fps = 24.0
    for label, file in case["videos"]:
        try:
            frames, fps = read_panel(file, most)
        except (ValueError, OSError) as error:
            notes.append(note(str(error)))
            continue
        if label in methods:
            drawn = [case["paths"][0][1], paths[label]]
            colours = ((255, 255, 255), rgb(COLOURS[methods.index(label) % len(COLOURS)][1]))
            frames = draw_paths(frames, drawn, colours)
        shown.append(frames)
        labels.append(label)
    if not shown:
        return None, fps, notes
    labels[0] = f"{case['short']}: {labels[0]}"
    tall = max(frames.shape[1] for frames in shown)  # videos made elsewhere may have another size
    shown = [np.pad(x, ((0, 0), (0, tall - x.shape[1]), (0, 0), (0, 0))) for x in shown]
    return grid(shown, labels), fps, notes


def cases(found):
    """Single cases -> HTML: one video of them all, so that one control plays all, then paths and
    scores of each. found: dicts of title, short (title), videos [(label, file)], paths [(label, c2w
    (T, 4, 4))] with the target's first, and scores, a table."""
    rows = {}
    notes = []
    rest = []
    for case in found:
        row, fps, unread = panels(case)
        notes += unread
        if row is not None:
            rows.setdefault(fps, []).append(row)  # of several rates, a video of each
        rest += [f"<h3>{esc(case['title'])}</h3>", html_table(case["scores"])]
        rest += [path_charts(case["paths"])] if case["paths"] else []
    videos = []
    for fps, of_rate in rows.items():
        for k in range(0, len(of_rate), 4):  # more than four rows are too high for a screen
            videos.append(video(below(of_rate[k:k + 4]), fps, "the cases, side by side"))
    words = "White: the path asked for; in colour: the camera found in the video. Seen from above."
    return section("Cases", *videos, note(words) if videos else "", *notes, *rest)


# ---- training logs ----

UNITS = {
    "trans": "metres", "rot": "radians", "vq": "standard deviations", "mq": "standard deviations",
    "ta": "standard deviations", "hpsv3": "HPSv3's own unit", "sharpness": "log ratio",
    "flicker": "share of full scale", "exposure": "share of pixels",
    "colour": "share of full scale", "ratio_error": "largest |r - 1|", "grad_norm": "norm",
    "grad_rms": "root mean square", "update_rms": "share of the learning rate",
    "clip_fraction": "share of ratios", "advantage_std": "standard deviation",
    "evaluations": "network rows", "failed": "videos", "skipped": "updates in a row"}
GROUPS = {  # what stands before a key's first slash -> heading, in the order of the page
    "valid": "Validation rewards (higher is better)",
    "reward": "Rewards, mean of all videos (higher is better)",
    "spread": "Spread of rewards inside a group",
    "": "The update",
    "seconds": "Seconds of an iteration",
    "failed": "Failed videos"}
LOSS = ("The loss is not drawn: its value is about zero by construction (the advantages of a group "
        "add up to zero, and the ratio starts at 1). Only its gradient teaches.")


def find_log(path):
    """A training log's file from itself or from its run's folder; FileNotFoundError where there is
    none."""
    file = Path(path, "log.jsonl") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such training log, expected a log.jsonl or a run's "
                                "folder")
    return file


def read_log(path):
    """A training log, one JSON object a line -> list of dicts. A last line cut short (the run may
    still be writing) is left out; ValueError naming any other line that is none."""
    records = []
    rows = find_log(path).read_text(errors="replace").strip().split("\n")
    for i, line in enumerate(rows):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif i < len(rows) - 1:
            raise ValueError(f"{path}, line {i + 1}: expected a JSON object, found {line[:40]!r}")
    return records


def distinct(paths):
    """Files or folders -> the shortest ends of their folders' names that tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    parts = [part[:-1] if part[-1] in ("log.jsonl", "results.json") else part for part in parts]
    parts = [part[:-1] if part[-1] == "evaluation" and len(part) > 2 else part for part in parts]
    for k in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-k:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def series_of(records):
    """A log's finite numbers: {key: (iterations (n,), values (n,))}."""
    number = lambda x: type(x) in (int, float) and math.isfinite(x)
    found = {}
    for n, record in enumerate(records):
        at = record.get("iteration", n)
        for key, x in record.items():
            if key != "iteration" and number(x) and number(at):
                found.setdefault(key, []).append((at, x))
    return {key: np.array(points, float).T for key, points in found.items()}


def smooth(y):
    """Running mean over a twentieth of the run."""
    width = 2 * (len(y) // 40) + 1
    return np.convolve(np.pad(y, width // 2, mode="edge"), np.full(width, 1 / width), "valid")


def thinned(x, y):
    """About 400 of the points at most, evenly: more cannot be seen."""
    step = max(1, len(x) // 400)
    return x[::step], y[::step]


def curves(logs):
    """Training logs {name: records} -> HTML: a chart for each number that changes, as logged (thin)
    and smoothed, all logs in each; what stays constant as one line of text."""
    runs = {name: series_of(records) for name, records in logs.items()}
    groups = {}
    constant = []
    for key in dict.fromkeys(key for run in runs.values() for key in run):
        values = np.concatenate([run[key][1] for run in runs.values() if key in run])
        group, _, name = key.rpartition("/")
        if key == "loss":
            continue
        if np.ptp(values) == 0:
            constant.append(f"{key} = {values[0]:.5g}")
        else:
            groups.setdefault(group, []).append((name, key))
    parts = []
    if len(runs) > 1 and groups:
        parts.append(legend([(colour_of(k), name) for k, name in enumerate(runs)]))
    known = [group for group in GROUPS if group in groups]
    for group in known + [group for group in groups if group not in GROUPS]:
        parts.append(f'<h3>{esc(GROUPS.get(group, group))}</h3><div class="charts">')
        for name, key in groups[group]:
            lines = []
            for k, run in enumerate(runs.values()):
                if key in run:
                    x, y = run[key]
                    lines.append((f"{colour_of(k)} thin", *thinned(x, y)))
                    lines.append((colour_of(k), *thinned(x, smooth(y))))
            own = "its own unit" if group in ("valid", "reward", "spread") else ""
            unit = {"seconds": "seconds", "failed": "videos"}.get(group) or UNITS.get(name, own)
            parts.append(chart(name, lines, "iteration", unit))
        parts.append("</div>")
    parts += [note("Constant: " + ", ".join(constant) + ".")] if constant else []
    parts += [note(LOSS)] if any("loss" in run for run in runs.values()) else []
    return "".join(parts)


def strip(folder):
    """The samples of a run, of `folder` -> HTML of one video: source, true view where there is one,
    base, and what the policy made at some iterations from the first to the last. "" where there are
    none.

    A sample's panels are of one width and called as panels.json says
    (evaluation/generate.demonstration).
    """
    try:
        names = json.loads((folder / "panels.json").read_text())
    except (OSError, ValueError):
        return ""
    files = sorted(folder.glob("iteration_??????.mp4"))
    picked = sorted({round(i) for i in np.linspace(0, len(files) - 1, 6)}) if files else []
    columns = []
    labels = []
    fps = 24.0
    for n, k in enumerate(picked):
        try:
            frames, fps = read_video(files[k])
        except (ValueError, OSError):
            continue  # the run may still be writing it
        width = (frames.shape[2] + 4) // len(names)
        step = math.ceil(width / 360)  # as many columns as a strip has would be too wide
        split = [frames[:, ::step, i * width:i * width + width - 4:step] for i in range(len(names))]
        if not columns:
            columns += split[:-1]
            labels += names[:-1]
        columns.append(split[-1])
        labels.append(f"iteration {int(files[k].stem[-6:])}")
    if not columns:
        return ""
    return video(grid(columns, labels), fps, "samples over the iterations")


def training(text):
    """The section on training logs, comma-separated files or folders of runs: curves of all,
    samples of each. ValueError, OSError: a bad log."""
    files = [find_log(x.strip()) for x in text.split(",") if x.strip()]
    if not files:
        return ""
    names = distinct(files)
    logs = {name: read_log(file) for name, file in zip(names, files)}
    samples = []
    for name, file in zip(names, files):
        player = strip(file.parent / "samples")
        samples += [f"<h3>Samples of {esc(name)}</h3>", player] if player else []
    return section("Training", curves(logs), *samples)
