"""What people see: charts, drawn paths, grids of videos, and a page that stands alone, in a browser."""
import base64
import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

import trajectories
from conftest import refused
from data.draw import draw_paths, grid, text_mask, upscale
from data.video import read_video, write_video
from evaluation import page
from evaluation.compare import Curves, draw_curves, finish_run
from evaluation.report import table
from scenes import put

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def grey(level, frames=5, height=96, width=96):
    return np.full((frames, height, width, 3), level, np.uint8)


def points(svg):
    """Polylines of an SVG -> list of (n, 2) pixel positions."""
    return [np.array([[float(v) for v in p.split(",")] for p in line.split()])
            for line in re.findall(r'points="([^"]*)"', svg)]


def write_log(folder, records, end=""):
    put(folder / "log.jsonl", "".join(json.dumps(x) + "\n" for x in records) + end)
    return str(folder)


# ---- charts ----

def test_a_chart_is_linear_and_a_smoothed_line_is_a_line():
    """x and y have a scale each, y upwards; the running mean of a line is that line."""
    x, y = np.arange(200.0), 2 + 0.01 * np.arange(200)
    assert np.abs(page.smooth(y) - y)[5:-5].max() < 1e-9
    line, = points(page.chart("t", [("c0", x, y ** 2)], "", "", size=(300, 200)))
    assert (line >= 0).all() and (line <= [300, 200]).all()
    for k, (values, sign) in enumerate(((x, 1), (y ** 2, -1))):
        fit = np.polyfit(values, line[:, k], 1)
        assert fit[0] * sign > 0 and np.abs(np.polyval(fit, values) - line[:, k]).max() < 0.06
    assert page.ticks(-3e-7, 5e-7) == pytest.approx([-2e-7, 0, 2e-7, 4e-7])  # round, and few
    assert page.ticks(0.9991, 0.9993) == pytest.approx([0.9991, 0.99915, 0.9992, 0.99925, 0.9993])


def test_a_path_is_drawn_from_above_and_from_the_side():
    """x to the right, forward up, at one scale; height and tilts grow upwards; jitter looks flat."""
    c2w = np.tile(np.eye(4), (5, 1, 1))
    c2w[:, :3, 3] = np.arange(5)[:, None] * [0.1, -0.2, 0.3]
    above, height, *_ = points(page.path_charts([("target", c2w)]))
    step = np.diff(above, axis=0)
    assert (step[:, 0] > 0).all() and step[:, 1] == pytest.approx(-3 * step[:, 0], abs=0.5)
    assert (np.diff(height[:, 1]) < 0).all()
    for name, right, up in (("pan_right", 20, 0), ("pan_left", -20, 0), ("tilt_up", 0, 10)):
        found = [angles[-1] for angles in page.turns(trajectories.recammaster(name))]
        assert found == pytest.approx([right, up], abs=0.3)
    c2w[:, :3, 3] = 1e-4 * np.random.default_rng(0).standard_normal((5, 3))
    constant = page.chart("t", [("c0", [0, 1], [3.0, 3.0 + 1e-9])], "", "")
    flat = points(page.path_charts([("target", c2w)]) + constant)
    assert all(np.ptp(line[:, 1]) < 2 for line in flat)


# ---- videos ----

def test_paths_are_drawn_where_the_cameras_are():
    """One metre to the right is drawn to the right, in the lower right corner; a look forward, up."""
    c2w = np.tile(np.eye(4), (9, 1, 1))
    video = grey(0, 9, 150, 200)
    up = draw_paths(video, [c2w])[0, -50:, -50:].astype(int).sum(-1)
    assert up[:24, 24:26].sum() > 2 * up[27:40, 24:26].sum()
    c2w[:, 0, 3] = np.linspace(0, 1, 9)
    out = draw_paths(video, [c2w])
    assert not video.any() and not out[:, :100].any() and not out[:, :, :150].any()
    rows = out[:, -25:-15, -50:].sum((1, 3)).astype(float) ** 4  # (9, 50)
    assert (np.diff(rows @ np.arange(50) / rows.sum(1)) > 1).all()


def test_videos_stand_side_by_side_under_their_captions():
    """A shorter one holds its last frame; a letter that is not in the font shows as ?."""
    a, b = upscale(grey(40, 5, 48, 64), 2), grey(50, 3, 96, 128)
    b[2] = 90
    out = grid([a, b], ["left", "a caption that is much too long for one line"])
    assert len(out) == 5 and out.shape[2] == 2 * 128 + 4 and out[:, :-96].max() == 235
    assert (out[:, -96:, :128] == a).all() and (out[:, -96:, 132:] == b[[0, 1, 2, 2, 2]]).all()
    assert (text_mask("é") == text_mask("?")).all() and (text_mask("a") != text_mask("b")).any()


def first_video(text, folder):
    """The page's first video: frames, rate."""
    content = re.search(r"video/mp4;base64,([^\"]*)", text)[1]
    return read_video(put(folder / "back.mp4", base64.b64decode(content)))


def a_case(folder, title="c", shown=("source", "base", "none", "tuned")):
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


def write_samples(folder, iterations):
    """A run's samples of three panels, source, base and now, the last one brighter each time."""
    put(folder / "panels.json", ["source", "base", "now"])
    for i in iterations:
        panels = [grey(x, 5, 32, width) for x, width in ((30, 48), (0, 4), (60, 48), (0, 4), (100 + i, 48))]
        write_video(folder / f"iteration_{i:06d}.mp4", np.concatenate(panels, 2), 8)


def test_samples_become_a_strip_over_iterations(tmp_path):
    """Source and base once, then what the policy made at each iteration, cut from the last panel."""
    assert page.strip(tmp_path) == ""
    write_samples(tmp_path / "samples", (0, 20, 40))
    frames, fps = first_video(page.strip(tmp_path / "samples"), tmp_path)
    assert fps == 8 and frames.shape[2] == 5 * 48 + 4 * 4
    assert np.abs(frames[0, -8, 24::52].mean(-1) - [30, 60, 100, 120, 140]).max() < 4


def test_what_is_drawn_of_a_log():
    """Constants are a line of text, no loss is drawn; several logs share a chart and a scale."""
    records = [{"iteration": 5 * i, "window": [1, 2], "loss": i, "skipped": 0, "grad_norm": i, "note": "x",
                "reward/mine": i, "valid/trans": -i, "reward/rot": math.nan, "seconds/rollout": i}
               for i in range(4)]
    text = page.curves({"toy": records})
    assert re.findall(r"<figcaption>(.*?) <span>(.*?)</span>", text) == [
        ("trans", "metres"), ("mine", "its own unit"), ("grad_norm", "norm"), ("rollout", "seconds")]
    assert "Constant: skipped = 0." in text and page.LOSS in text and page.curves({"x": []}) == ""
    logs = {f"a name of many words {k}": [{"iteration": i, "reward/x": i + k} for i in range(3)]
            for k in (1, 2)}
    text = page.curves(logs)
    assert text.count("<figure>") == 1 and all(f"{label}</li>" in text for label in logs)
    first, second = points(text)[1::2]
    assert first[1:, 1] == pytest.approx(second[:-1, 1])


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
        write_log(tmp_path / run, [{"iteration": 0, "reward/trans": -1}], '{"iteration": 1, "rew')
        put(tmp_path / run / "iteration_000010/state.json", {"config": {"lr": lr, "members": 8}})
    out = str(tmp_path / "page.html")
    draw_curves(Curves(f"{tmp_path / 'a'},{tmp_path / 'b'}", out))
    assert capsys.readouterr().out.splitlines() == ["a: 1 iterations", "b: 1 iterations", out]
    text = (tmp_path / "page.html").read_text()
    assert "<td>0.0001</td><td>0.0002</td>" in text and "members" not in text
    refused(lambda: draw_curves(Curves()), "expected a log.jsonl")
    refused(lambda: grid([np.zeros((1, 8, 8, 3), np.uint8)], []), "1 videos, 0 labels")
    assert page.distinct(["x/a", "y/a"]) == ["x/a", "y/a"]  # the shortest names that differ
    assert page.distinct(["toy/evaluation/results.json", "b/log.jsonl"]) == ["toy", "b"]


# ---- the whole page ----

EVIL = "<script>alert('&')</script>\""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The text of a page of all there is, with names that hold anything."""
    folder = tmp_path_factory.mktemp("page")
    for run in "ab":
        write_log(folder / run, [{"iteration": i, "valid/trans": -1 / (i + 1), f"a/{EVIL}": i, EVIL: 1,
                                  "loss": 1e-9 * i, "seconds/rollout": 1 + i % 3} for i in range(30)])
    write_samples(folder / "a/samples", (0, 10, 20))
    wide = table(EVIL, [EVIL] + 20 * ["a heading"], [["m"] + 20 * ["1.0000 [0.5000, 1.5000]"]], EVIL)
    page.write(folder / "report.html", EVIL, [
        page.html_lines([EVIL]), page.cases([a_case(folder, EVIL), a_case(folder, f"2 {EVIL}")]),
        page.training(f"{folder / 'a'},{folder / 'b/log.jsonl'}"),
        page.section("Tables", page.html_table(wide)), page.html_facts({EVIL: EVIL})])
    return (folder / "report.html").read_text()


def test_a_page_escapes_loads_nothing_and_is_for_everybody(whole):
    """Names may hold anything; a phone's width, headings in order, tables that scroll by keyboard."""
    assert "<script" not in whole and whole.count(html.escape(EVIL)) >= 13
    assert not re.search(r'https?:|url\(|@import|javascript:|(src|poster|href)="(?!data:)', whole)
    assert "default-src 'none'" in whole and 'name="viewport"' in whole
    levels = [int(level) for level in re.findall(r"<h([1-6])", whole)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) == 1
    wide = re.findall(r'<\w+ class="(?:wide|lines)"[^>]*>', whole)
    assert wide and all('tabindex="0" role="region"' in tag for tag in wide)
    shown = [tag for tag in re.findall("<(?:video|svg)[^>]*>", whole) if "aria-hidden" not in tag]
    assert shown and all('aria-label="' in tag for tag in shown)


PROBE = """<!doctype html>{}<pre id="probe"></pre><script>onload = async () => {{
  const found = [];
  for (const frame of document.querySelectorAll('iframe')) {{
    const inside = frame.contentDocument, of = frame.contentWindow.performance, played = [];
    for (const video of inside.querySelectorAll('video')) {{
      await video.play(); played.push(video.error === null && video.videoWidth > 0 && !!video.poster); }}
    const asked = of.getEntriesByType('resource').filter(x => !x.name.startsWith('data:'));
    found.push(inside.documentElement.scrollWidth <= frame.width, asked.length, ...played); }}
  probe.textContent = JSON.stringify(found); }}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(whole, tmp_path):
    """On a screen and a phone: nothing is wider, requested or complained of; videos play."""
    frames = "".join(f'<iframe width="{x}" srcdoc="{html.escape(whole)}"></iframe>' for x in (1400, 390))
    (tmp_path / "probe.html").write_text(PROBE.format(frames))
    flags = ("--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --mute-audio --dump-dom "
             "--enable-logging=stderr --virtual-time-budget=20000").split()
    done = subprocess.run([CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}",
                           (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=600)
    assert json.loads(re.search(r'id="probe">(.*?)</pre>', done.stdout)[1]) == 2 * [True, 0, True, True]
    assert "CONSOLE" not in done.stderr
