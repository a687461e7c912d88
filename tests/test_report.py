"""evaluation/report.py: means and intervals, comparisons in pairs, the paper's tables, three lines."""
import math

import numpy as np
import pytest
from conftest import refused

from evaluation import report
from evaluation.cases import case_digest, case_name, is_same_case
from evaluation.report import interval, mean, paired
from trajectories import recammaster


def cases(scores, metric="position"):
    """{(clip, path): score or None for a failed case} -> {case: scores}"""
    return {case_name(clip, n, 1.0): {"failed": "no cameras"} if x is None else {metric: x}
            for (clip, n), x in scores.items()}


def test_an_interval_is_that_of_clip_means():
    """50 clips of 10 cases that differ by clip only: the error is sd / sqrt(50), not sqrt(500)."""
    rng = np.random.default_rng(0)
    by_clip = rng.standard_normal(50)
    x, clips = np.repeat(by_clip, 10), np.repeat(np.arange(50), 10)
    low, high = interval(x, clips)
    assert high - low == pytest.approx(2 * 1.96 * by_clip.std() / math.sqrt(50), rel=0.1)
    assert low < by_clip.mean() < high
    assert interval(np.full(4, 7.0), list("aabb")) == (7, 7) and interval(x, ["a"] * 500) is None


def test_means_and_comparisons_leave_out_what_failed_or_does_not_apply():
    """A mean is of the cases that have the score, a comparison of those where both have it."""
    a = cases({("x", 1): 1.0, ("x", 2): 2.0, ("y", 1): 3.0, ("y", 2): None})
    b = cases({("x", 1): 0.5, ("x", 2): 2.5, ("y", 1): None, ("y", 2): 9.0, ("z", 1): 9.0})
    assert mean(a | {case_name("y", 3, 1.0): {"position": None}}, "position")[::2] == (2, 3)
    assert mean(a, "RotErr") == (None, None, 0)
    assert paired(a, b, "position") == {
        "cases": 2, "a": 1.5, "b": 1.5, "difference": 0, "improved": 1, "movable": 2, "relative": 0,
        "interval": None, "relative_interval": None}
    assert paired(a, {}, "position") is None


@pytest.mark.parametrize("metric, path, a, b, improved, movable, difference", [
    ("TransErr", 5, 0.02, 0.01, 1, 1, -0.01), ("TransErr", 1, 0.0, 0.0, 0, 0, 0),
    ("Dyn-MEt3R", 1, 0.3, 0.4, 1, 1, 0.1), ("scale", 5, 1.3, 0.9, 1, 1, -0.2),
    ("scale", 5, 0.9, 1.2, 0, 1, 0.1)])
def test_what_counts_as_improved(metric, path, a, b, improved, movable, difference):
    """Lower or higher is better, a scale nearer to 1; no TransErr of a pure rotation, always 0."""
    found = paired(cases({("x", path): a}, metric), cases({("x", path): b}, metric), metric)
    assert (found["improved"], found["movable"]) == (improved, movable)
    assert found["difference"] == pytest.approx(difference)
    assert found["relative"] is None or found["relative"] == pytest.approx(difference / found["a"])


def test_a_relative_interval_is_that_of_the_ratio():
    """Every case 20 % better: the interval is that one number, however different the cases are."""
    a = cases({(clip, 5): x for clip, x in zip("abcd", (1.0, 2.0, 5.0, 9.0))})
    found = paired(a, {case: {"position": 0.8 * x["position"]} for case, x in a.items()}, "position")
    assert found["relative_interval"] == pytest.approx((-0.2, -0.2)) and found["interval"][0] < -1
    tiny = {case: {"position": 1e-17} for case in a}
    assert paired(tiny, a, "position")["relative"] is None  # no share of what is rounding


def test_digests_tell_sources_and_paths_apart():
    """A grey level here and there, and rounding, are no difference: so far machines disagree."""
    rng = np.random.default_rng(0)
    video, path = rng.integers(1, 255, (9, 24, 40, 3)).astype(np.uint8), recammaster(9, 9)
    flipped = (video + rng.choice([-1, 0, 0, 0, 1], video.shape)).astype(np.uint8)
    assert is_same_case(case_digest(video, path), case_digest(flipped, path + 1e-9))
    for other in (video[::-1], path), (video // 2, path), (path,), (video, recammaster(9, 9, 1.5)):
        assert not is_same_case(case_digest(video, path), case_digest(*other))
    assert not is_same_case(case_digest(0 * video), case_digest(0 * video + 255))


# ---- tables ----

def two_methods():
    """Base and tuned on 3 clips, three paths, two speeds; one failed case each."""
    methods = {}
    for k, name in enumerate(("base", "tuned")):
        found = {}
        for i, case in enumerate(case_name(c, n, s) for c in "abc" for n in (1, 5, 9) for s in (1.0, 2.0)):
            x = 0.02 - 0.005 * k + 1e-4 * (i % 7)
            moves = "camera_1" not in case
            found[case] = {"TransErr": x * moves, "TransErr_moving": x if moves else None,
                           "RotErr": 100 * x, "position": x, "rotation": x}
        found["c_camera_9_speed_2"] = {"failed": f"why | {name}\n"}
        methods[name] = {"cases": found, "notes": {"VBench": "not installed: VBench (why)"}}
    return methods


def tables(methods, **how):
    """{title: table}, all as wide as their headers."""
    made = report.tables(methods, **how)
    assert all(len(row) == len(t["header"]) for t in made for row in t["rows"])
    return {t["title"]: t for t in made}


def test_tables_hold_our_rows_then_the_papers():
    """What no method has is no column, and why stands below once; each table by its own cases."""
    made = tables(two_methods())
    first = made["Table 1: 3 paths at speed 1"]
    assert first["header"] == ["Method", "Type", "TransErr ↓", "RotErr (deg) ↓"]
    assert first["rows"][0][1] == "here, 9 of 9 cases" and first["rows"][-1][0] == "Geo-Align (paper)"
    assert first["notes"].count("not installed: VBench (why)") == 1
    second = made["Table 2: by camera speed"]["rows"]
    papers = ("ReDirector (paper)", "Geo-Align (paper)")
    assert [row[:2] for row in second] == [[x, s] for s in "12" for x in ("base", "tuned", *papers)]
    camera = made["Cameras, with and without alignment"]
    row = dict(zip(camera["header"], camera["rows"][0]))
    every, moving = (float(row[f"TransErr{x} ↓"].split()[0]) for x in ("", ", paths that move"))
    assert every == pytest.approx(moving * 2 / 3, abs=1e-4)  # of three paths one cannot move
    against = [made[f"tuned against base, {s}"]["rows"] for s in ("speed 1", "all speeds")]
    assert [rows[0][1] for rows in against] == ["9", "17"] and against[1][0][-1] == "11 of 11"
    text = report.markdown([made["Failed: 2"]])  # each in its own row and column
    assert "\n| base | c_camera_9_speed_2 | why \\| base  |\n" in text
    assert not any("(paper)" in str(t) for t in report.tables(two_methods(), paper=False))


def test_table_3_has_the_papers_rows_and_ours():
    """A run's row is told by the rewards it was trained with; geometry alone is none of them."""
    cases = {"x_camera_9_speed_1": {"TransErr": 0.1, "RotErr": 1.0, "position": 0.3}}
    methods = {name: {"cases": cases, "notes": {}, "rewards": spec} for name, spec in (
        ("base", ""), ("a", "trans=0,vq=1"), ("b", "trans=1, vq=1,my.py:f=0.5"), ("c", "trans=1,rot=1"))}
    rows = tables(methods)["Table 3: rewards, at speed 1"]["rows"]
    assert [row[1] for row in rows] == ["base", "a", "b", "", "", ""]


def test_three_lines():
    """Closed forms: half the position error in every case, rotation as it was, two decibels."""
    a = {case_name(clip, 5, 1.0): {"position": x, "rotation": 2.0, "PSNR": 20.0}
         for clip, x in (("a", 0.1), ("b", 0.3))}
    b = {case: {"position": x["position"] / 2, "rotation": 2.0, "PSNR": 22.0} for case, x in a.items()}
    tuned = report.short("toy-iteration_000080")
    methods = {name: {"cases": x, "notes": {}} for name, x in (("base", a), (tuned, b))}
    lines = report.three_lines(methods, "base", "toy @ 80")
    assert lines == ["position error  0.200 -> 0.100 m (-50 % [-50, -50])",
                     "rotation error  2.00 -> 2.00 deg (+0 % [+0, +0])",
                     "image (PSNR)    20.0 -> 22.0 dB (+2.00 [+2.00, +2.00])"]
    assert report.three_lines(methods, "base", "base")[0] == "position error  0.200 m [0.100, 0.300]"
    assert report.lines_of_pairs(methods, [("base", tuned)]) == lines  # nothing to tell apart
    three = methods | {"other": methods[tuned]}
    assert report.lines_of_pairs(three, [("base", "other"), ("base", tuned)])[0] == "other against base:"


def test_most_cases_failed_is_no_success():
    bad = {f"a_camera_{n}_speed_1": {"failed": f"ViPE failed (exit code {n})"} for n in (1, 2, 3)}
    fine = {f"a_camera_{n}_speed_1": {"TransErr": 0.1} for n in (4, 5, 6)}
    report.check_failures({"base": {"cases": bad | fine}})
    del fine["a_camera_6_speed_1"]
    methods = {"base": {"cases": bad}, "other": {"cases": fine}}
    refused(lambda: report.check_failures(methods), "3 of 5 cases failed, 3 like this: ViPE", "code 1)")
