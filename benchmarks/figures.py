"""The README's pictures, from an evaluation and from training logs: `python -m benchmarks.figures`.

    python -m benchmarks.figures cases out/toy/evaluation    last frames: source, map, true view, base, after
    python -m benchmarks.figures curves out/seed0,out/seed1 --evaluation=out/e24   validation rewards of
                                                             several runs, and their held-out errors
    python -m benchmarks.figures tables out/toy/evaluation   errors by frame, image by quarter of cases
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from data.camera_files import read_path
from data.draw import draw_paths, grid
from data.video import read_video
from evaluation.page import read_log
from evaluation.report import paired, short
from plumbing.files import read_json, write_file
from plumbing.settings import run_command

RANKS = (0.1, 0.5, 0.9)  # of the cases that move, by their position error's change: most, median, least
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


@dataclass
class Cases:
    """`python -m benchmarks.figures cases EVALUATION`"""
    evaluation: str = "out/toy/evaluation"  # folder that an evaluation of the toy wrote
    out: str = "assets/toy.png"             # the picture


@dataclass
class Curves:
    """`python -m benchmarks.figures curves RUN,RUN`"""
    runs: str = "out/toy"                   # folders of runs, comma-separated
    rewards: str = "trans,rot"              # a chart for each, side by side
    evaluation: str = ""                    # folder of an evaluation of these runs: a chart more
    out: str = "assets/curves.svg"          # the picture


@dataclass
class Tables:
    """`python -m benchmarks.figures tables EVALUATION`"""
    evaluation: str = "out/toy/evaluation"  # folder that an evaluation of the toy wrote


def chosen_cases(results):
    """Names of the base's and the tuned method, and cases at speed 1 that move, at RANKS of how much their
    position error changed."""
    base, tuned = list(results["methods"])[:2]
    before = results["methods"][base]["cases"]
    after = results["methods"][tuned]["cases"]
    moving = [case for case, scores in before.items() if scores["speed"] == 1 and scores["scale"] is not None]
    moving.sort(key=lambda case: after[case]["position"] / before[case]["position"])
    return base, tuned, [moving[int(rank * (len(moving) - 1))] for rank in RANKS]


def draw_cases(config):
    """Rows of last frames: source, the asked path on a map, true view, base, after."""
    folder = Path(config.evaluation)
    results = read_json(folder / "results.json")
    base, tuned, cases = chosen_cases(results)
    rows = []
    for case in cases:
        scores = [results["methods"][method]["cases"][case] for method in (base, tuned)]
        target = read_path(folder / "targets" / f"{case}.npz")
        source = read_video(folder / "sources" / f"{scores[0]['clip']}.mp4")[0][-1:]
        black = np.zeros_like(source[:, :min(source.shape[1:3]), :min(source.shape[1:3])]).repeat(3, 1).repeat(3, 2)
        map_of_path = draw_paths(black, [target[-1:], target])[:, -source.shape[1]:, -source.shape[1]:]
        panels = [source, map_of_path, read_video(folder / "truth" / f"{case}.mp4")[0][-1:]]
        panels += [read_video(folder / method / "videos" / f"{case}.mp4")[0][-1:] for method in (base, tuned)]
        off = [f"{s['position']:.2f} m, {s['rotation']:.1f} deg off" for s in scores]
        labels = ["source", scores[0]["path"].replace("_", " "), "true view", f"base: {off[0]}", f"after: {off[1]}"]
        rows.append(grid(panels, labels)[0])
    write_png(config.out, np.concatenate(rows))
    print(f"{config.out}: {', '.join(cases)} of {short(tuned)}")


def write_png(path, picture):
    """uint8 (H, W, 3) -> a PNG file."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt = "rgb24"
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    write_file(path, b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()]))


def draw_curves(config):
    """Charts of validation rewards against iterations, a line for each run."""
    logs = [read_log(run) for run in config.runs.split(",")]
    names = config.rewards.split(",")
    parts = []
    for column, name in enumerate(names):
        series = []
        for log in logs:
            found = [(r["iteration"], r[f"valid/{name}"]) for r in log if f"valid/{name}" in r]
            series.append(np.array(found).T)
        parts.append(chart(f"valid/{name}", series, 20 + 380 * column))
    columns = len(names)
    if config.evaluation:
        parts.append(held_out(read_json(Path(config.evaluation) / "results.json")["methods"], 20 + 380 * columns))
        columns += 1
    size = f'viewBox="0 0 {380 * columns + 20} 240" font-family="sans-serif" font-size="12"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="white"/>'
    write_file(config.out, (svg + "".join(parts) + "</svg>\n").encode())
    print(config.out)


def chart(title, series, left):
    """One chart, 340 wide, as SVG elements; series: [(x, y)]."""
    x_end = max(x.max() for x, _ in series)
    low = min(y.min() for _, y in series)
    high = max(y.max() for _, y in series)
    px = lambda x: left + 45 + 295 * x / x_end
    py = lambda y: 200 - 165 * (y - low) / (high - low)
    out = [f'<text x="{left + 45}" y="18" font-weight="bold">{title}</text>']
    for y in (low, high):
        out.append(f'<text x="{left + 40}" y="{py(y) + 4:.0f}" text-anchor="end">{y:.3f}</text>')
        out.append(f'<path d="M{px(0)},{py(y):.1f}H{px(x_end)}" stroke="#ddd"/>')
    for k, (x, y) in enumerate(series):
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y))
        colour = COLOURS[k % len(COLOURS)]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    out.append(f'<text x="{px(0):.0f}" y="220">0</text>')
    out.append(f'<text x="{px(x_end):.0f}" y="220" text-anchor="end">iteration {x_end:.0f}</text>')
    return "".join(out)


def held_out(methods, left):
    """Changes of the first method's errors by each other, in per cent with 95 % intervals, as SVG elements.

    methods: of an evaluation's results.json, the base first. Colours as in `chart`: one for each method.
    """
    base, *others = methods
    metrics = {"position": "position error", "rotation": "rotation error"}
    found = {metric: [paired(methods[base]["cases"], methods[name]["cases"], metric) for name in others]
             for metric in metrics}
    if any(x["relative_interval"] is None for rows in found.values() for x in rows):
        raise ValueError("evaluation: intervals need at least two rooms")
    low = min(x["relative_interval"][0] for rows in found.values() for x in rows)
    high = max(0, *(x["relative_interval"][1] for rows in found.values() for x in rows))
    px = lambda x: left + 45 + 295 * (x - low) / (high - low)
    out = [f'<text x="{left + 45}" y="18" font-weight="bold">held-out errors against the base, 95 %</text>',
           f'<path d="M{px(0):.1f},35V200" stroke="#888"/><text x="{px(0):.0f}" y="220" text-anchor="end">0</text>',
           f'<text x="{px(low):.0f}" y="220">{100 * low:.0f} %</text>']
    for row, (metric, label) in enumerate(metrics.items()):
        top = 55 + 75 * row
        out.append(f'<text x="{left + 45}" y="{top - 6}">{label}</text>')
        for k, x in enumerate(found[metric]):
            y = top + 6 + 14 * k
            start, end = (px(bound) for bound in x["relative_interval"])
            colour = COLOURS[k % len(COLOURS)]
            out.append(f'<path d="M{start:.1f},{y}H{end:.1f}" stroke="{colour}" stroke-width="2"/>')
            out.append(f'<circle cx="{px(x["relative"]):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return "".join(out)


def print_tables(config):
    """Of each method against the base, speed by speed: how many moving cases improve, how far the
    scale ratio is from 1, the image's change by quarter of the cases (sorted by the base's), and
    the position error's change by frame of those that move."""
    folder = Path(config.evaluation)
    methods = read_json(folder / "results.json")["methods"]
    base, *others = methods
    before = methods[base]["cases"]
    for speed in sorted({scores["speed"] for scores in before.values()}):
        cases = [case for case, scores in before.items() if scores["speed"] == speed]
        moving = [case for case in cases if before[case]["scale"] is not None]
        by_image = sorted(cases, key=lambda case: before[case]["PSNR"])
        error = by_frame(folder, base, moving)
        print(f"speed {speed:g}, {len(moving)} of {len(cases)} cases move")
        print("  base, position error by frame, m: " + " ".join(f"{x:.3f}" for x in error))
        for name in others:
            after = methods[name]["cases"]
            nearer = [after[case]["position"] < before[case]["position"] for case in moving]
            off_before, off_after = (np.mean([abs(1 - scores[case]["scale"]) for case in moving])
                                     for scores in (before, after))
            gained = [np.mean([after[case]["PSNR"] - before[case]["PSNR"] for case in quarter])
                      for quarter in np.array_split(np.array(by_image), 4)]
            changes = by_frame(folder, name, moving) / error - 1
            print(f"  {short(name)}: {np.mean(nearer):.0%} of the moving cases improve")
            print(f"    scale ratio, distance from 1: {off_before:.3f} -> {off_after:.3f} "
                  f"({off_after / off_before - 1:+.0%})")
            print("    PSNR by quarter, worst base first: " + " ".join(f"{x:+.2f}" for x in gained))
            print("    position error by frame: " + " ".join(f"{x:+.0%}" for x in changes))


def by_frame(folder, method, cases):
    """Mean position error of frames 1 to T-1 over cases -> (T-1,) metres; both paths are relative
    to their first frame."""
    errors = []
    for case in cases:
        found = read_path(folder / method / "poses" / f"{case}.npz")
        asked = read_path(folder / "targets" / f"{case}.npz")
        errors.append(np.linalg.norm(found[1:, :3, 3] - asked[1:, :3, 3], axis=1))
    return np.mean(errors, 0)


if __name__ == "__main__":
    commands = {"cases": (Cases, draw_cases, "evaluation"), "curves": (Curves, draw_curves, "runs"),
                "tables": (Tables, print_tables, "evaluation")}
    run_command("benchmarks.figures", __doc__, commands, sys.argv[1:])
