"""report.py: means and intervals, paired comparisons, tables, and a page that stands alone."""
import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from evaluation import report
import trajectories
from data.video import read_video, write_video
from evaluation.cases import case_name, split_case
from evaluation.report import compare, interval, mean


def cases(scores, metric="position"):
    """{(clip, path): score or None for a failed case} -> {case: scores}"""
    return {case_name(clip, n, 1.0): {"failed": "no cameras"} if x is None else {metric: x}
            for (clip, n), x in scores.items()}


# ---- names and numbers ----

@pytest.mark.parametrize("case", [("bear", 1, 1.0), ("a_camera_3_speed_2", 10, 1.5), ("x y", 9, 0.25)])
def test_case_names_can_be_read_back(case):
    assert split_case(case_name(*case)) == case


@pytest.mark.parametrize("name", [
    "bear", "bear_camera_0_speed_1", "bear_camera_11_speed_1", "_camera_1_speed_1",
    "bear_camera_1_speed_fast", "bear_camera_1_speed_1_x"])
def test_other_names_are_no_cases(name):
    assert split_case(name) is None


def test_interval_is_that_of_clip_means():
    """50 clips of 10 cases whose scores differ by clip only: the standard error is sd / sqrt(50), not
    sqrt(500)."""
    rng = np.random.default_rng(0)
    by_clip = rng.standard_normal(50)
    low, high = interval(np.repeat(by_clip, 10), np.repeat(np.arange(50), 10))
    wanted = 2 * 1.96 * by_clip.std() / math.sqrt(50)
    assert high - low == pytest.approx(wanted, rel=0.1) and low < by_clip.mean() < high


def test_interval_needs_two_clips_and_is_repeatable():
    assert interval(np.arange(5.0), ["a"] * 5) is None
    assert interval(np.arange(4.0), list("aabb")) == interval(np.arange(4.0), list("aabb"))
    assert interval(np.full(4, 7.0), list("aabb")) == (7, 7)


def test_interval_does_not_depend_on_the_order_of_cases():
    x, clips = np.random.default_rng(1).random(12), np.repeat(["a", "b", "c"], 4)
    order = np.random.default_rng(2).permutation(12)
    assert interval(x, clips) == pytest.approx(interval(x[order], clips[order]), abs=1e-12)


def test_mean_leaves_out_what_failed_or_does_not_apply():
    found = cases({("a", 1): 1.0, ("a", 2): None, ("b", 1): 4.0})
    found[case_name("b", 2, 1.0)] = {"position": None}
    assert mean(found, "position")[::2] == (2.5, 2)
    assert mean(found, "RotErr") == (None, None, 0)


def test_comparison_on_the_common_subset():
    a = cases({("x", 1): 1.0, ("x", 2): 2.0, ("y", 1): 3.0, ("y", 2): None})
    b = cases({("x", 1): 0.5, ("x", 2): 2.5, ("y", 1): None, ("y", 2): 9.0, ("z", 1): 9.0})
    found = compare(a, b, "position")
    assert (found["cases"], found["a"], found["b"], found["difference"]) == (2, 1.5, 1.5, 0)
    assert found["improved"] == 0.5 and found["relative"] == 0 and found["interval"] is None
    assert compare(a, {}, "position") is None


@pytest.mark.parametrize("metric, a, b, improved", [
    ("TransErr", 0.02, 0.01, 1), ("TransErr", 0.0, 0.0, 0), ("aesthetic_quality", 0.5, 0.6, 1),
    ("MEt3R", 0.3, 0.4, 0), ("Dyn-MEt3R", 0.3, 0.4, 1), ("scale", 1.3, 0.9, 1), ("scale", 0.9, 1.2, 0)])
def test_what_counts_as_improved(metric, a, b, improved):
    found = compare(cases({("x", 1): a}, metric), cases({("x", 1): b}, metric), metric)
    assert found["improved"] == improved
    if metric == "scale":
        assert found["difference"] == pytest.approx(abs(b - 1) - abs(a - 1))
    assert found["relative"] is None or found["relative"] == pytest.approx(found["difference"] / found["a"])


# ---- tables ----

def two_methods():
    """Base and tuned on 3 clips, three paths, two speeds; one failed case each."""
    rng = np.random.default_rng(0)
    methods = {}
    for k, name in enumerate(("base", "tuned")):
        found = {}
        for clip in "abc":
            for n in (1, 5, 9):
                for speed in (1.0, 2.0):
                    x = 0.02 - 0.005 * k + 0.001 * rng.standard_normal()
                    found[case_name(clip, n, speed)] = {
                        "TransErr": 0.0 if n == 1 else x, "TransErr_moving": None if n == 1 else x,
                        "RotErr": 100 * x, "position": x, "rotation": x, "scale": None if n == 1 else 1 + x}
        found[case_name("c", 9, 2.0)] = {"failed": f"why | {name}"}
        methods[name] = {"cases": found, "notes": {"VBench": "not installed: VBench (no such program)"}}
    return methods


def test_tables_hold_the_papers_rows_and_ours():
    made = {t["title"]: t for t in report.tables(two_methods())}
    first = made["Table 1: 3 paths at speed 1"]
    assert [row[0] for row in first["rows"]] == [
        "CogNVS (paper)", "TrajectoryCrafter (paper)", "ReCamMaster (paper)", "ReDirector (paper)",
        "Geo-Align (paper)", "base", "tuned"]
    assert first["header"] == [
        "Method", "Type", "Subject Consistency ↑", "Background Consistency ↑", "Aesthetic Quality ↑",
        "Imaging Quality ↑", "Temporal Flickering ↑", "Motion Smoothness ↑", "Dyn-MEt3R ↑", "MEt3R ↓",
        "TransErr ↓", "RotErr (deg) ↓"]
    ours = "0.9151 0.9179 0.5168 0.6842 0.9548 0.9862 0.8573 0.3077 0.0129 1.3645"
    assert " ".join(first["rows"][4][2:]) == ours
    assert first["rows"][5][1] == "here, 9 of 9 cases"
    assert first["rows"][5][2:8] == ["not installed: VBench"] * 6
    assert "not installed: VBench (no such program)" in first["notes"]
    second = made["Table 2: by camera speed"]["rows"]
    assert [row[:2] for row in second] == [
        [name, s] for s in "12" for name in ("ReDirector (paper)", "Geo-Align (paper)", "base", "tuned")]
    assert second[5][-2:] == ["0.0153", "1.8821"]
    assert all(len(row) == len(t["header"]) for t in made.values() for row in t["rows"])


def test_transerr_is_given_with_and_without_pure_rotations():
    methods = two_methods()
    camera = next(t for t in report.tables(methods) if t["title"].startswith("Cameras"))
    row = dict(zip(camera["header"], camera["rows"][0]))
    all_three, moving = (float(row[key].split()[0]) for key in ("TransErr ↓", "TransErr, paths that move ↓"))
    assert all_three == pytest.approx(moving * 2 / 3, abs=1e-4)


def test_failures_are_counted_and_listed():
    made = report.tables(two_methods())
    failed = made[-1]
    assert failed["title"] == "Failed: 2"
    assert failed["rows"] == [[m, "c_camera_9_speed_2", f"why | {m}"] for m in ("base", "tuned")]
    assert [t["title"] for t in made if "against" in t["title"]] == [
        "tuned against base, speed 1", "tuned against base, speed 2", "tuned against base, all speeds"]
    assert made[-2]["rows"][0][:2] == ["TransErr ↓", "17"]


def test_tables_where_everything_failed():
    methods = {name: {"cases": cases({("a", 1): None}), "notes": {}} for name in ("base", "tuned")}
    made = report.tables(methods)
    assert made[-1]["title"] == "Failed: 2" and "no case in common" in made[-2]["notes"][0]
    report.markdown(made)


def test_markdown_keeps_columns_apart():
    text = report.markdown([report.table("T", ["a", "b"], [["x|y", "line\nbreak"]], "note")])
    assert text == "## T\n\n| a | b |\n|---|---|\n| x\\|y | line break |\n\n- note\n"


# ---- the page ----

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


def page(tmp_path, **options):
    report.write(tmp_path / "report.html", **{"title": "T", "tables": [], **options})
    text = (tmp_path / "report.html").read_text()
    parsed = Page(text)
    assert not parsed.open
    return text, parsed


def test_page_escapes_and_loads_nothing(tmp_path):
    evil = "<script>alert('&')</script>\""
    (tmp_path / "log").write_text(json.dumps({"iteration": 0, evil: 1.0, f"a/{evil}": 2}) + "\n")
    path = np.tile(np.eye(4), (5, 1, 1))
    t = report.table(evil, [evil], [[evil]], evil)
    case = {"title": evil, "videos": [(evil, tmp_path / "none.mp4")], "paths": [(evil, path)], "scores": t}
    text, parsed = page(tmp_path, title=evil, tables=[t], log=tmp_path / "log", cases=[case])
    known = "html head meta title style body h1 h2 h3 div table tr th td p figure svg text path polyline rect"
    assert {tag for tag, _ in parsed.tags} <= set(known.split())
    assert "".join(parsed.text).count(evil) >= 8
    assert not re.search(r"https?:|src=|url\(|@import|javascript:", text)
    assert any("default-src 'none'" in attrs.get("content", "") for _, attrs in parsed.tags)


def test_videos_are_in_the_page(tmp_path):
    """Side by side, in order, at the films' rate; one that cannot be read is named."""
    for name, level in (("source", 40), ("base", 120), ("tuned", 200)):
        write_video(tmp_path / f"{name}.mp4", np.full((5, 32, 48, 3), level, np.uint8), 8)
    (tmp_path / "broken.mp4").write_bytes(b"x" * 100)
    videos = [(name, tmp_path / f"{name}.mp4") for name in ("source", "base", "broken", "tuned")]
    case = {"title": "c", "videos": videos, "paths": [], "scores": report.table("", [], [])}
    text, parsed = page(tmp_path, cases=[case])
    source = next(attrs["src"] for tag, attrs in parsed.tags if tag == "video")
    assert source.startswith("data:video/mp4;base64,") and "broken.mp4" in "".join(parsed.text)
    (tmp_path / "back.mp4").write_bytes(base64.b64decode(source.split(",")[1]))
    back, fps = read_video(tmp_path / "back.mp4")
    assert len(back) == 5 and fps == 8 and back.shape[2] == 3 * 48 + 8
    middle = back[2, -16, [24, 76, 128]].mean(-1)
    assert np.abs(middle - [40, 120, 200]).max() < 4


def test_large_videos_are_scaled_down(tmp_path):
    write_video(tmp_path / "v.mp4", np.zeros((2, 480, 640, 3), np.uint8), 24)
    text = report.side_by_side([("v", tmp_path / "v.mp4")])
    (tmp_path / "back.mp4").write_bytes(base64.b64decode(re.search(r"base64,([^\"]*)", text)[1]))
    assert read_video(tmp_path / "back.mp4")[0].shape[2] == 320


def points(svg):
    """Polylines of an SVG -> list of (n, 2) pixel positions."""
    return [np.array([[float(v) for v in p.split(",")] for p in line.split()])
            for line in re.findall(r'points="([^"]*)"', svg)]


def test_chart_is_linear_and_inside():
    x, y = np.arange(10.0), np.arange(10.0) ** 2
    line, = points(report.chart("t", [("a", "#000", x, y, "")], "", "", size=(300, 200)))
    fit = [np.polyfit(v, line[:, k], 1) for k, v in enumerate((x, y))]
    assert fit[0][0] > 0 > fit[1][0]  # SVG's y points down
    assert np.abs(np.polyval(fit[0], x) - line[:, 0]).max() < 0.06
    assert (line >= 0).all() and (line <= [300, 200]).all()


def test_path_seen_from_above():
    """x to the right, forward up, both at one scale; height grows upwards (camera y points down)."""
    c2w = np.tile(np.eye(4), (5, 1, 1))
    c2w[:, 0, 3], c2w[:, 1, 3], c2w[:, 2, 3] = np.arange(5) * 0.1, -np.arange(5) * 0.2, np.arange(5) * 0.3
    above, height = (points(svg)[0] for svg in report.path_charts([("target", c2w)]))
    step = np.diff(above, axis=0)
    assert (step[:, 0] > 0).all() and step[:, 1] == pytest.approx(-3 * step[:, 0], abs=0.5)
    assert (np.diff(height[:, 1]) < 0).all()


def test_jitter_about_a_constant_looks_flat():
    c2w = np.tile(np.eye(4), (9, 1, 1))
    c2w[:, :3, 3] = 1e-4 * np.random.default_rng(0).standard_normal((9, 3))
    for svg in report.path_charts([("target", c2w)]):
        assert np.ptp(points(svg)[0][:, 1]) < 2  # pixels
    flat, = points(report.chart("t", [("", "#000", [0, 1], [3.0, 3.0 + 1e-9], "")], "", ""))
    assert np.ptp(flat[:, 1]) < 0.2


@pytest.mark.parametrize("low, high", [(0, 1), (-3e-7, 5e-7), (12, 9000), (0.9991, 0.9993), (-1, -0.5)])
def test_ticks_are_round_and_few(low, high):
    found = np.array(report.ticks(low, high))
    assert 2 <= len(found) <= 6
    assert (found >= low - 1e-9 * abs(low)).all() and (found <= high + 1e-9 * abs(high)).all()
    mantissa = np.diff(found)[0] / 10 ** np.floor(np.log10(np.diff(found)[0]) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_log_may_end_in_the_middle_of_a_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"iteration": 0, "loss": 1}\n{"iteration": 1, "lo')
    assert report.read_log(log) == [{"iteration": 0, "loss": 1}]
    for text in ('{"a": 1}\nnonsense\n{"a": 2}\n', '{"a": 1}\n[1]\n{"a": 2}\n'):
        log.write_text(text)
        with pytest.raises(ValueError, match=r"log.jsonl, line 2: expected a JSON object"):
            report.read_log(log)
    log.write_text("")
    assert report.read_log(log) == [] and report.curves([]) == ""


def test_every_number_of_the_log_is_drawn():
    records = [{"iteration": 5 * i, "window": [1, 2], "loss": i, "ok": True, "reward/trans": -i,
                "reward/rot": math.nan, "seconds/rollout": 0.5, "note": "x"} for i in range(4)]
    text = report.curves(records)
    assert re.findall(r"<h3>(.*?)</h3>", text) == ["the run", "reward", "seconds"]
    assert re.findall(r'aria-label="(.*?)"', text) == ["loss", "trans", "rollout"]
    raw = points(text)[0]
    assert len(raw) == 4 and np.diff(raw[:, 0]) == pytest.approx(np.diff(raw[:, 0])[0], abs=0.11)


def test_a_smoothed_constant_is_constant():
    raw, smooth = points(report.curves([{"a": 2.0} for _ in range(200)]))
    assert raw.shape == smooth.shape and np.abs(raw - smooth).max() < 0.11


def test_evaluation_paths_can_be_drawn():
    for n in range(1, 11):
        paths = [("target", trajectories.recammaster(n)), ("base", trajectories.recammaster(n, 49))]
        for svg in report.path_charts(paths):
            assert Page(svg).open == [] and "nan" not in svg and "inf" not in svg
