"""evaluation/page.py: charts, videos and a page that stands alone, also in a real browser."""
import base64
import json
import math
import re

from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, Browser

import trajectories
from data.video import read_video, write_video
from evaluation import page
from evaluation.compare import Curves, draw_curves, finish_run, lines_of_run
from evaluation.report import table


class Page(HTMLParser):
    """Collects tags, and checks that they nest."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def written(tmp_path, *sections, title="T"):
    page.write(tmp_path / "report.html", title, sections)
    text = (tmp_path / "report.html").read_text()
    parsed = Page(text)
    assert not parsed.open
    return text, parsed


def a_case(videos, paths=(), title="c", rows=()):
    return {"title": title, "short": title, "videos": videos, "paths": list(paths),
            "scores": table("", ["Method", "x"], list(rows))}


def straight(scale=1.0, frames=5):
    """A path to the front."""
    return trajectories.scale_motion(trajectories.recammaster("zoom_in", frames), scale, 1)


def small_page(tmp_path):
    """A page of all there is: lines, two cases with videos, curves of two runs, samples, a table,
    facts."""
    for name, level in (("source", 40), ("base", 120), ("tuned", 200)):
        write_video(tmp_path / f"{name}.mp4", np.full((5, 48, 64, 3), level, np.uint8), 8)
    videos = [(name, tmp_path / f"{name}.mp4") for name in ("source", "base", "tuned")]
    paths = [("target", straight()), ("base", straight(0.5)), ("tuned", straight(0.9))]
    cases = [a_case(videos, paths, title, [["base", "1.0 [0.5, 1.5]"]]) for title in ("Best: one", "Worst: two")]
    for run in "ab":
        (tmp_path / run / "samples").mkdir(parents=True)
        rows = [{"iteration": i, "valid/trans": -1 / (i + 1), "reward/trans": -2 / (i + 1), "loss": 1e-9 * i,
                 "skipped": 0, "seconds/rollout": 1 + i % 3} for i in range(30)]
        (tmp_path / run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a/samples/panels.json").write_text('["source", "base", "now"]')
    for i in (0, 10, 20):
        panels = np.full((5, 60, 3 * 64 + 8, 3), 10 * i, np.uint8)
        write_video(tmp_path / f"a/samples/iteration_{i:06d}.mp4", panels, 8)
    wide = table("Wide", ["Method"] + 20 * ["a heading"], [["m"] + 20 * ["1.0000 [0.5000, 1.5000]"]], "note")
    return written(tmp_path, page.html_lines(["position error  1 -> 2 m"]), page.cases(cases),
                   page.training(f"{tmp_path / 'a'},{tmp_path / 'b/log.jsonl'}"),
                   page.section("Tables", page.html_table(wide)), page.html_facts({"date": "today"}))


# ---- the whole page ----

def test_page_escapes_and_loads_nothing(tmp_path):
    evil = "<script>alert('&')</script>\""
    (tmp_path / "log").write_text("".join(json.dumps({"iteration": i, evil: i, f"a/{evil}": i, f"b{evil}": 1})
                                          + "\n" for i in (0, 1)))
    case = a_case([(evil, tmp_path / "none.mp4")], [(evil, straight())], evil, [[evil, evil]])
    text, parsed = written(tmp_path, page.html_lines([evil]), page.cases([case]), page.training(str(tmp_path / "log")),
                           page.html_table(table(evil, [evil], [[evil]], evil)), page.html_facts({evil: evil}), title=evil)
    known = ("html head meta title style body main h1 h2 h3 div table tr th td p figure figcaption span svg text "
             "path polyline ul li pre dl dt dd")
    assert {tag for tag, _ in parsed.tags} <= set(known.split())
    assert "".join(parsed.text).count(evil) >= 13
    assert not re.search(r"https?:|src=|url\(|@import|javascript:", text)
    assert any("default-src 'none'" in attrs.get("content", "") for _, attrs in parsed.tags)


def test_page_for_everybody(tmp_path):
    """A phone's width, headings in order, tables that scroll by keyboard, whole names in the
    legend."""
    text, parsed = small_page(tmp_path)
    assert any(attrs.get("name") == "viewport" for _, attrs in parsed.tags)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) == 1
    wide = [attrs for _, attrs in parsed.tags if attrs.get("class") in ("wide", "lines")]
    assert wide and all(attrs["tabindex"] == "0" and attrs["role"] == "region" for attrs in wide)
    assert all(attrs.get("aria-label") for tag, attrs in parsed.tags if tag in ("video", "svg")
               and "aria-hidden" not in attrs)
    assert "prefers-color-scheme: dark" in text


def contrast(a, b):
    """WCAG's contrast of two colours "#rrggbb"."""
    def light(colour):
        x = np.array(page.rgb(colour)) / 255
        return np.where(x <= 0.03928, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [0, 1])
def test_contrast_of_at_least_4_5(dark):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for name, pair in page.INK.items():
        if name not in ("paper", "rule"):  # rules are decoration
            assert contrast(pair[dark], page.INK["paper"][dark]) >= 4.5, name


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(tmp_path):
    """Nothing is requested, nothing said on the console, every video plays, nothing is wider than
    the page."""
    small_page(tmp_path)
    browser = Browser(tmp_path / "profile")
    try:
        for width in (1400, 390):
            browser.open(tmp_path / "report.html", width, dark=width < 1000)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            played = browser.evaluate("""Promise.all([...document.querySelectorAll('video')].map(async video => {
                await video.play(); return [video.error === null, video.videoWidth > 0, !!video.poster] }))""")
            assert played == 2 * [[True, True, True]]
            asked = [event["params"]["request"]["url"] for event in browser.happened("Network.requestWillBeSent")]
            assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
            assert browser.happened("Log.entryAdded", "Runtime.consoleAPICalled",
                                    "Runtime.exceptionThrown") == []
    finally:
        browser.close()


# ---- videos ----

def first_video(text, folder):
    """The page's first video: frames, rate."""
    (folder / "back.mp4").write_bytes(base64.b64decode(re.search(r"video/mp4;base64,([^\"]*)", text)[1]))
    return read_video(folder / "back.mp4")


def test_all_cases_play_in_one_video(tmp_path):
    """Side by side, case below case, at their rate, paths drawn in; one that cannot be read is
    named."""
    for name, level in (("source", 40), ("base", 120), ("tuned", 200)):
        write_video(tmp_path / f"{name}.mp4", np.full((5, 96, 96, 3), level, np.uint8), 8)
    (tmp_path / "broken.mp4").write_bytes(b"x" * 100)
    videos = [(name, tmp_path / f"{name}.mp4") for name in ("source", "base", "broken", "tuned")]
    paths = [("target", straight()), ("base", straight(0.5))]
    text = page.cases([a_case(videos, paths), a_case(videos[:1] + videos[3:])])
    assert text.count("<video") == 1 and "broken.mp4" in text
    frames, fps = first_video(text, tmp_path)
    assert len(frames) == 5 and fps == 8 and frames.shape[2] == 3 * 96 + 8
    upper = frames.shape[1] // 2 - 60
    assert np.abs(frames[2, upper, [40, 140, 240]].mean(-1) - [40, 120, 200]).max() < 4
    assert np.abs(frames[2, -60, [40, 140, 240]].mean(-1) - [40, 200, 20]).max() < 4
    inset = frames[4, frames.shape[1] // 2 - 36:frames.shape[1] // 2 - 4, 164:196].astype(int)
    white = (inset.min(-1) > 180).any()  # the target's path; the base's is blue
    assert white and (inset[..., 2] - inset[..., 0] > 60).any()
    assert page.jpeg(frames[0])[:3] == b"\xff\xd8\xff"


def test_large_videos_are_scaled_down(tmp_path):
    write_video(tmp_path / "v.mp4", np.zeros((2, 480, 640, 3), np.uint8), 24)
    assert page.read_panel(tmp_path / "v.mp4", 240)[0].shape == (2, 240, 320, 3)


def test_samples_become_a_strip_over_iterations(tmp_path):
    """source and base once, then what the policy made at each iteration, cut from the samples' last
    panel."""
    assert page.strip(tmp_path) == ""
    (tmp_path / "panels.json").write_text('["source", "base", "now"]')
    for i in (0, 20, 40):
        panels = [np.full((5, 32, 48, 3), level, np.uint8) for level in (30, 60, 100 + i)]
        gap = np.zeros((5, 32, 4, 3), np.uint8)
        write_video(tmp_path / f"iteration_{i:06d}.mp4",
                    np.concatenate([panels[0], gap, panels[1], gap, panels[2]], 2), 8)
    frames, fps = first_video(page.strip(tmp_path), tmp_path)
    assert fps == 8 and frames.shape[2] == 5 * 48 + 4 * 4
    assert np.abs(frames[0, -8, 24::52].mean(-1) - [30, 60, 100, 120, 140]).max() < 4


# ---- charts ----

def points(svg):
    """Polylines of an SVG -> list of (n, 2) pixel positions."""
    return [np.array([[float(v) for v in p.split(",")] for p in line.split()])
            for line in re.findall(r'points="([^"]*)"', svg)]


def test_chart_is_linear_and_inside():
    x, y = np.arange(10.0), np.arange(10.0) ** 2
    line, = points(page.chart("t", [("c0", x, y)], "", "", size=(300, 200)))
    fit = [np.polyfit(v, line[:, k], 1) for k, v in enumerate((x, y))]
    assert fit[0][0] > 0 > fit[1][0]  # SVG's y points down
    assert np.abs(np.polyval(fit[0], x) - line[:, 0]).max() < 0.06
    assert (line >= 0).all() and (line <= [300, 200]).all()


def test_path_seen_from_above():
    """x to the right, forward up, both at one scale; height grows upwards (camera y points
    down)."""
    c2w = np.tile(np.eye(4), (5, 1, 1))
    c2w[:, 0, 3], c2w[:, 1, 3], c2w[:, 2, 3] = np.arange(5) * 0.1, -np.arange(5) * 0.2, np.arange(5) * 0.3
    above, height, *_ = points(page.path_charts([("target", c2w)]))
    step = np.diff(above, axis=0)
    assert (step[:, 0] > 0).all() and step[:, 1] == pytest.approx(-3 * step[:, 0], abs=0.5)
    assert (np.diff(height[:, 1]) < 0).all()


@pytest.mark.parametrize("name, right, up", [
    ("pan_right", 20, 0), ("pan_left", -20, 0), ("tilt_up", 0, 10), ("tilt_down", 0, -10), ("zoom_in", 0, 0)])
def test_rotations_are_drawn_with_their_sign(name, right, up):
    """A pan is a dot from above; the ten paths' last angles are known."""
    to_right, upwards = page.turns(trajectories.recammaster(name))
    assert to_right[-1] == pytest.approx(right, abs=0.3) and upwards[-1] == pytest.approx(up, abs=0.3)


def test_jitter_about_a_constant_looks_flat():
    c2w = np.tile(np.eye(4), (9, 1, 1))
    c2w[:, :3, 3] = 1e-4 * np.random.default_rng(0).standard_normal((9, 3))
    for line in points(page.path_charts([("target", c2w)])):
        assert np.ptp(line[:, 1]) < 2  # pixels
    flat, = points(page.chart("t", [("c0", [0, 1], [3.0, 3.0 + 1e-9])], "", ""))
    assert np.ptp(flat[:, 1]) < 0.2


@pytest.mark.parametrize("low, high", [(0, 1), (-3e-7, 5e-7), (12, 9000), (0.9991, 0.9993), (-1, -0.5)])
def test_ticks_are_round_and_few(low, high):
    found = np.array(page.ticks(low, high))
    assert 2 <= len(found) <= 6
    assert (found >= low - 1e-9 * abs(low)).all() and (found <= high + 1e-9 * abs(high)).all()
    mantissa = np.diff(found)[0] / 10 ** np.floor(np.log10(np.diff(found)[0]) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_evaluation_paths_can_be_drawn():
    for n in range(1, 11):
        paths = [("target", trajectories.recammaster(n)), ("base", trajectories.recammaster(n, 49))]
        text = page.path_charts(paths)
        assert Page(text).open == [] and "nan" not in text and "inf" not in text


# ---- training logs ----

def test_log_may_end_in_the_middle_of_a_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"iteration": 0, "loss": 1}\n{"iteration": 1, "lo')
    assert page.read_log(log) == page.read_log(tmp_path) == [{"iteration": 0, "loss": 1}]
    for text in ('{"a": 1}\nnonsense\n{"a": 2}\n', '{"a": 1}\n[1]\n{"a": 2}\n'):
        log.write_text(text)
        with pytest.raises(ValueError, match=r"log.jsonl, line 2: expected a JSON object"):
            page.read_log(log)
    log.write_text("")
    assert page.read_log(log) == [] and page.curves({"x": []}) == ""
    with pytest.raises(FileNotFoundError, match="none: no such training log"):
        page.read_log(tmp_path / "none")


def test_rewards_come_first_constants_are_a_line_and_the_loss_is_explained():
    records = [{"iteration": 5 * i, "window": [1, 2], "loss": i, "ok": True, "skipped": 0, "grad_norm": i,
                "reward/trans": -i, "reward/mine": i, "valid/trans": -i, "reward/rot": math.nan,
                "seconds/rollout": i, "note": "x"} for i in range(4)]
    text = page.curves({"toy": records})
    assert [h.split(",")[0].split(" (")[0] for h in re.findall(r"<h3>(.*?)</h3>", text)] == [
        "Validation rewards", "Rewards", "The update", "Seconds of an iteration"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [
        f"{name} <span>{unit}</span>" for name, unit in (
            ("trans", "metres"), ("trans", "metres"), ("mine", "its own unit"), ("grad_norm", "norm"),
            ("rollout", "seconds"))]
    assert "Constant: skipped = 0." in text and page.LOSS in text
    raw = points(text)[0]
    assert len(raw) == 4 and np.diff(raw[:, 0]) == pytest.approx(np.diff(raw[:, 0])[0], abs=0.11)


def test_several_logs_are_drawn_over_each_other():
    """One chart, a colour each, on one scale; names whole, however long."""
    name = "a name of many words that no legend may cut to the same twenty-four characters"
    logs = {f"{name} {k}": [{"iteration": i, "reward/x": i + k} for i in range(3)] for k in (1, 2)}
    text = page.curves(logs)
    assert text.count("<figure>") == 1 and all(f"{label}</li>" in text for label in logs)
    first, second = points(text)[1::2]
    assert first[1:, 1] == pytest.approx(second[:-1, 1])


def test_a_smoothed_line_is_a_line():
    x, y = np.arange(200.0), 2 + 0.01 * np.arange(200)
    assert np.abs(page.smooth(y) - y)[5:-5].max() < 1e-9
    raw, smooth = points(page.chart("a", [("c0 thin", x, y), ("c0", x, page.smooth(y))], "", ""))
    assert raw.shape == smooth.shape and np.abs(raw - smooth)[5:-5].max() < 0.11


def test_the_end_of_a_run_without_an_evaluation(tmp_path, capsys):
    """By validation from the first to the last; by ten iterations' means where there is none."""
    records = [{"iteration": i, "valid/trans": -0.2 + 0.005 * i, "reward/rot": -math.radians(3 if i < 10 else 2)}
               for i in range(21)]
    lines = lines_of_run(records)
    assert lines == ["position error  0.200 -> 0.100 m (validation, trans)",
                     "rotation error  3.00 -> 2.00 deg (reward, rot)",
                     "image           no such reward in this run"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finish_run(tmp_path)
    assert capsys.readouterr().out.splitlines() == [*lines, str(tmp_path / "report.html")]
    assert lines[0] in (tmp_path / "report.html").read_text().replace("&gt;", ">")


def test_curves_of_runs_tell_what_differs_between_them(tmp_path, capsys):
    for run, lr in (("a", 1e-4), ("b", 2e-4)):
        (tmp_path / run / "iteration_000010").mkdir(parents=True)
        (tmp_path / run / "log.jsonl").write_text('{"iteration": 0, "reward/trans": -1}\n{"iteration": 1, "rew')
        state = {"config": {"lr": lr, "members": 8}}
        (tmp_path / run / "iteration_000010/state.json").write_text(json.dumps(state))
    draw_curves(Curves(f"{tmp_path / 'a'},{tmp_path / 'b'}", str(tmp_path / "page.html")))
    assert capsys.readouterr().out.splitlines() == ["a: 1 iterations", "b: 1 iterations",
                                                    str(tmp_path / "page.html")]
    text = (tmp_path / "page.html").read_text()
    assert "<td>0.0001</td><td>0.0002</td>" in text and "members" not in text
    with pytest.raises(ValueError, match="expected a log.jsonl"):
        draw_curves(Curves())


@pytest.mark.parametrize("paths, names", [
    (["out/a/log.jsonl", "out/b/log.jsonl"], ["a", "b"]), (["x/a", "y/a"], ["x/a", "y/a"]),
    (["out/toy/evaluation/results.json", "seed1/results.json"], ["toy", "seed1"])])
def test_runs_are_called_by_what_tells_them_apart(paths, names):
    assert page.distinct(paths) == names


def test_a_long_log_is_drawn_in_a_second(tmp_path):
    """Not by the clock: by the size of what is drawn."""
    records = [{"iteration": i, "reward/x": math.sin(i)} for i in range(20000)]
    assert max(map(len, points(page.curves({"x": records})))) < 900
