"""What people see: charts, drawn paths, grids of videos, and a page that stands alone."""
import base64
import html
import json
import math
import re

import numpy as np

import trajectories
from data.video import read_video, write_video
from evaluation import page
from evaluation.compare import Curves, draw_curves, finish_run
from evaluation.report import table
from scenes import put


def grey(level, frames=5, height=96, width=96):
    return np.full((frames, height, width, 3), level, np.uint8)


def write_log(folder, records, end=""):
    put(folder / "log.jsonl", "".join(json.dumps(x) + "\n" for x in records) + end)
    return str(folder)


# ---- charts ----

# ---- videos ----

def first_video(text, folder):
    """The page's first video: frames, rate."""
    content = re.search(r"video/mp4;base64,([^\"]*)", text)[1]
    return read_video(put(folder / "back.mp4", base64.b64decode(content)))


EVIL = "<script>alert('&')</script>\""


def a_case(folder, title=EVIL, shown=("source", "base", "none", "tuned")):
    """A case as page.cases has it, of three grey videos and one that is not there."""
    for name, level in (("source", 40), ("base", 120), ("tuned", 200)):
        write_video(folder / f"{name}.mp4", grey(level), 8)
    path = trajectories.recammaster("zoom_in", 5)
    paths = [(name, trajectories.scale_motion(path, x, 1)) for name, x in (("target", 1), ("base", 0.5))]
    return {"title": title, "short": title, "videos": [(x, folder / f"{x}.mp4") for x in shown],
            "paths": paths, "scores": table("", ["Method", title], [[title, "1.0 [0.5, 1.5]"]])}


def test_all_cases_play_in_one_video(tmp_path):
    """The target's path is white, a method's has its colour; what cannot be read is named."""
    text = page.cases([a_case(tmp_path), a_case(tmp_path, shown=("source", "tuned"))])
    assert text.count("<video") == 1 and "none.mp4" in text
    assert "<video" not in page.cases([a_case(tmp_path, shown=("none",))])
    frames, fps = first_video(text, tmp_path)
    assert len(frames) == 5 and fps == 8 and frames.shape[2] == 3 * 96 + 8
    half = frames.shape[1] // 2
    assert np.abs(frames[2, half - 60, [40, 140, 240]].mean(-1) - [40, 120, 200]).max() < 4
    assert np.abs(frames[2, -60, [40, 140, 240]].mean(-1) - [40, 200, 20]).max() < 4
    inset = frames[4, half - 36:half - 4, 164:196].astype(int)
    assert (inset.min(-1) > 180).any() and (inset[..., 2] - inset[..., 0] > 60).any()
    write_video(tmp_path / "large.mp4", grey(0, 2, 480, 640), 24)
    assert page.read_panel(tmp_path / "large.mp4", 240)[0].shape == (2, 240, 320, 3)


def test_the_end_of_a_run_without_an_evaluation(tmp_path, capsys):
    """By validation from the first to the last; by ten iterations' means where there is none."""
    finish_run(write_log(tmp_path, [
        {"iteration": i, "valid/trans": -0.2 + 0.005 * i, "reward/rot": -math.radians(3 if i < 10 else 2)}
        for i in range(21)]))
    position, rotation, image, page_at = capsys.readouterr().out.splitlines()
    assert "0.200 -> 0.100 m (validation" in position and "3.00 -> 2.00 deg (reward" in rotation
    assert "no such reward" in image and page_at == str(tmp_path / "report.html")
    assert "0.200 -&gt; 0.100 m" in (tmp_path / "report.html").read_text()


def test_curves_of_runs_tell_what_differs_between_them(tmp_path, capsys):
    """Also while they go on, and a line of their logs is not whole yet."""
    for run, lr in (("a", 1e-4), ("b", 2e-4)):
        write_log(tmp_path / run, [{"iteration": i, "reward/trans": -i} for i in (0, 1)], '{"iteration": 2')
        put(tmp_path / run / "iteration_000010/state.json", {"config": {"lr": lr, "members": 8}})
    draw_curves(Curves(f"{tmp_path / 'a'},{tmp_path / 'b'}", str(tmp_path / "page.html")))
    assert capsys.readouterr().out.startswith("a: 2 iterations\nb: 2 iterations\n")
    text = (tmp_path / "page.html").read_text()
    assert "<td>0.0001</td><td>0.0002</td>" in text and "members" not in text


# ---- the whole page ----

def test_a_page_escapes_and_loads_nothing(tmp_path):
    """Names may hold anything."""
    write_log(tmp_path, [{"iteration": i, f"a/{EVIL}": i, EVIL: 1} for i in range(3)])
    page.write(tmp_path / "report.html", EVIL, [
        page.html_lines([EVIL]), page.cases([a_case(tmp_path)]), page.training(str(tmp_path)),
        page.section("Tables", page.html_table(table(EVIL, [EVIL], [[EVIL]], EVIL))),
        page.html_facts({EVIL: EVIL})])
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and text.count(html.escape(EVIL)) >= 13
    assert not re.search(r'https?:|url\(|@import|javascript:|(src|poster|href)="(?!data:)', text)
    assert "default-src 'none'" in text and 'name="viewport"' in text
