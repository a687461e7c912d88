"""evaluation/report.py: means and intervals, paired comparisons, three lines, tables."""
import dataclasses
import math
import time

import numpy as np
import pytest

from evaluation import report
from evaluation.cases import case_digest, case_name, is_same_case, split_case
from evaluation.report import interval, mean, paired
from trajectories import recammaster


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
    found = paired(a, b, "position")
    assert (found["cases"], found["a"], found["b"], found["difference"]) == (2, 1.5, 1.5, 0)
    assert found["improved"] == 1 and found["movable"] == 2 and found["relative"] == 0
    assert found["interval"] is None and found["relative_interval"] is None
    assert paired(a, {}, "position") is None


@pytest.mark.parametrize("metric, a, b, improved", [
    ("TransErr", 0.02, 0.01, 1), ("TransErr", 0.0, 0.0, 0), ("aesthetic_quality", 0.5, 0.6, 1),
    ("MEt3R", 0.3, 0.4, 0), ("Dyn-MEt3R", 0.3, 0.4, 1), ("scale", 1.3, 0.9, 1), ("scale", 0.9, 1.2, 0)])
def test_what_counts_as_improved(metric, a, b, improved):
    found = paired(cases({("x", 1): a}, metric), cases({("x", 1): b}, metric), metric)
    assert found["improved"] == improved
    if metric == "scale":
        assert found["difference"] == pytest.approx(abs(b - 1) - abs(a - 1))
    assert found["relative"] is None or found["relative"] == pytest.approx(found["difference"] / found["a"])


def test_a_relative_interval_is_that_of_the_ratio():
    """Every case 20 % better: the interval is that one number, however different the cases are."""
    a = cases({(clip, 5): x for clip, x in zip("abcd", (1.0, 2.0, 5.0, 9.0))})
    b = {name: {"position": 0.8 * case["position"]} for name, case in a.items()}
    found = paired(a, b, "position")
    assert found["relative_interval"] == pytest.approx((-0.2, -0.2)) and found["interval"][0] < -1
    tiny = {name: {"position": 1e-17} for name in a}
    assert paired(tiny, a, "position")["relative"] is None  # no share of what is rounding


def test_cases_that_cannot_move_do_not_count_as_not_improved():
    """TransErr is 0 on pure rotations whatever the estimate: 1 of 1, not 1 of 2."""
    a, b = (cases({("x", 1): 0.0, ("x", 5): x}, "TransErr") for x in (0.2, 0.1))
    assert [paired(a, b, "TransErr")[k] for k in ("improved", "movable", "cases")] == [1, 1, 2]


def test_digests_tell_sources_and_paths_apart():
    """A grey level here and there, and rounding, are no difference: machines render so."""
    rng = np.random.default_rng(0)
    video = rng.integers(1, 255, (9, 24, 40, 3)).astype(np.uint8)
    flipped = video + rng.choice([-1, 0, 0, 0, 1], video.shape).astype(np.int8)
    path = recammaster(9, 9)
    digest = case_digest(video, path)
    assert is_same_case(digest, case_digest(flipped.astype(np.uint8), path + 1e-9))
    for other in (case_digest(video[::-1], path), case_digest(video // 2, path), case_digest(path),
                  case_digest(video, recammaster(9, 9, 1.5)), case_digest(255 * (video > 300), path), None, "x"):
        assert not is_same_case(digest, other)
    black, white = np.zeros_like(video), np.full_like(video, 255)
    assert not is_same_case(case_digest(black), case_digest(white))


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


def test_tables_hold_our_rows_then_the_papers():
    """What no method has is no column; why, stands below once."""
    made = {t["title"]: t for t in report.tables(two_methods())}
    first = made["Table 1: 3 paths at speed 1"]
    assert first["header"] == ["Method", "Type", "TransErr ↓", "RotErr (deg) ↓"]
    assert [row[0] for row in first["rows"]] == [
        "base", "tuned", "CogNVS (paper)", "TrajectoryCrafter (paper)", "ReCamMaster (paper)",
        "ReDirector (paper)", "Geo-Align (paper)"]
    assert first["rows"][0][1] == "here, 9 of 9 cases" and first["rows"][6][2:] == ["0.0129", "1.3645"]
    assert first["notes"].count("not installed: VBench (no such program)") == 1
    second = made["Table 2: by camera speed"]["rows"]
    assert [row[:2] for row in second] == [
        [name, s] for s in "12" for name in ("base", "tuned", "ReDirector (paper)", "Geo-Align (paper)")]
    assert second[7][-2:] == ["0.0153", "1.8821"]
    assert all(len(row) == len(t["header"]) for t in made.values() for row in t["rows"])
    toy = report.markdown(report.tables(two_methods(), paper=False))
    assert "(paper)" not in toy and "VBench" in toy


def test_the_papers_row_is_whole_where_every_score_is_there():
    methods = {"A": {"cases": {case_name("a", 9, 1.0): {m: 0.5 for m in report.PAPER}}, "notes": {}}}
    row = report.tables(methods)[0]["rows"][-1]
    assert " ".join(row[2:]) == "0.9151 0.9179 0.5168 0.6842 0.9548 0.9862 0.8573 0.3077 0.0129 1.3645"


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_no_column_is_lost_where_one_method_has_no_score(which):
    methods = two_methods()
    methods[which]["cases"] = {name: {"failed": "x"} for name in methods[which]["cases"]}
    made = {t["title"]: t for t in report.tables(methods)}
    camera = made["Cameras, with and without alignment"]
    assert "Position error (m) ↓" in camera["header"]
    dashes = [row for row in camera["rows"] if row[-1] == "–"]
    assert [row[0] for row in dashes] == [which, which]
    assert made["tuned against base, all speeds"]["notes"] == ["No case has a score from both."]
    assert report.three_lines(methods, "base", "tuned")[0] == "position error  no case has it from both"


@pytest.mark.parametrize("rewards, kind", [
    ("", "no RL"), (None, None), ("trans=1,rot=1", None), ("trans=0,vq=1", "video quality reward"),
    ("trans=1, rot=1, vq=1,my.py:f=0.5", "full reward"), ("sharpness=0.01", "video quality reward")])
def test_runs_are_rows_of_table_3_by_their_rewards(rewards, kind):
    assert report.ablated(rewards) == kind


def test_table_3_has_the_papers_rows_and_ours():
    methods = {name: {"cases": {"bear_camera_9_speed_1": {"TransErr": x, "RotErr": 1.0, "position": x}}, "notes": {},
                      "rewards": rewards}
               for name, x, rewards in (("base", 0.3, ""), ("a", 0.2, "vq=1"), ("b", 0.1, "trans=1,vq=1"))}
    found = {t["title"]: t for t in report.tables(methods)}["Table 3: rewards, at speed 1"]
    rows = [dict(zip(found["header"], row)) for row in found["rows"]]
    kinds = ["no RL", "video quality reward", "full reward"]
    assert [row["Reward"] for row in rows] == [*kinds, *(f"{kind} (paper)" for kind in kinds)]
    assert [row["Method"] for row in rows] == ["base", "a", "b", "", "", ""]
    assert rows[5]["TransErr ↓"] == "0.0140" and rows[4]["RotErr (deg) ↓"] == "1.6082"
    assert rows[2]["TransErr ↓"] == rows[2]["Position error (m) ↓"] == "0.1000"
    assert "140 iterations on 16 GPUs" in found["notes"][0]
    del methods["a"]
    assert not any(t["title"].startswith("Table 3") for t in report.tables(methods))


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
    against = [t for t in made if "against" in t["title"]]
    assert [t["title"] for t in against] == [
        "tuned against base, speed 1", "tuned against base, speed 2", "tuned against base, all speeds"]
    assert against[-1]["rows"][0][:2] == ["TransErr ↓", "17"] and against[-1]["rows"][0][-1] == "11 of 11"


def test_tables_where_everything_failed():
    methods = {name: {"cases": cases({("a", 1): None}), "notes": {}} for name in ("base", "tuned")}
    made = report.tables(methods)
    assert made[-1]["title"] == "Failed: 2" and report.markdown(made)
    assert report.extremes(methods["base"]["cases"], methods["tuned"]["cases"]) == {}


def test_markdown_keeps_columns_apart():
    text = report.markdown([report.table("T", ["a", "b"], [["x|y", "line\nbreak"]], "note")])
    assert text == "## T\n\n| a | b |\n|---|---|\n| x\\|y | line break |\n\n- note\n"


# ---- three lines ----

def test_three_lines():
    """Closed forms: half the position error in every case, rotation as it was, two decibels."""
    a = {case_name(clip, 5, 1.0): {"position": x, "rotation": 2.0, "PSNR": 20.0}
         for clip, x in (("a", 0.1), ("b", 0.3))}
    b = {name: {"position": x["position"] / 2, "rotation": 2.0, "PSNR": 22.0} for name, x in a.items()}
    methods = {name: {"cases": x, "notes": {}} for name, x in (("base", a), ("toy @ 80", b))}
    lines = report.three_lines(methods, "base", "toy @ 80")
    assert lines == ["position error  0.200 -> 0.100 m (-50 % [-50, -50])",
                     "rotation error  2.00 -> 2.00 deg (+0 % [+0, +0])",
                     "image (PSNR)    20.0 -> 22.0 dB (+2.00 [+2.00, +2.00])"]
    assert report.three_lines(methods, "base", "base")[0] == "position error  0.200 m [0.100, 0.300]"
    assert report.lines_of_pairs(methods, [("base", "toy @ 80")]) == lines  # nothing to tell apart
    three = methods | {"run-with-a-long-name @ 80": methods["toy @ 80"]}
    lines = report.lines_of_pairs(three, [("base", name) for name in list(three)[1:]])
    assert lines[4] == "run-with-a-long-name @ 80 against base:" and len(lines) == 8
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name, shown", [
    ("toy-iteration_000080", "toy @ 80"), ("base", "base"), ("mine", "mine"), ("a-iteration_x", "a-iteration_x")])
def test_short_names(name, shown):
    assert report.short(name) == shown


def test_best_median_and_worst_are_of_all_speeds():
    a = {case_name("a", 5, s): {"position": 1.0} for s in (1.0, 1.5, 2.0)} | {case_name("b", 5, 1.0): {}}
    b = {name: {"position": x} for name, x in zip(a, (1.2, 0.5, 0.9, 0.1))}
    assert report.extremes(a, b) == {
        f"{which} of 3 cases by change of position error": case_name("a", 5, speed)
        for which, speed in (("Best", 1.5), ("Median", 2.0), ("Worst", 1.0))}
    assert list(report.extremes(b, b).values())[0] == case_name("b", 5, 1.0)


def test_facts_of_a_run(monkeypatch):
    @dataclasses.dataclass
    class Settings:
        seed: int = 0
        rooms: int = 8

    monkeypatch.setattr(time, "time", lambda: 161.0)
    found = report.facts(Settings(rooms=2), 100.0)
    assert found["settings that differ from the default"] == "rooms = 2" and found["seed"] == "0"
    assert found["wall time"] == "61 s (of this call)" and {"date", "commit", "device"} <= set(found)


def test_most_cases_failed_is_no_success():
    cases = {f"a_camera_{n}_speed_1": {"failed": f"ViPE failed (exit code {n})"} for n in (1, 2, 3)}
    fine = {f"a_camera_{n}_speed_1": {"TransErr": 0.1} for n in (4, 5, 6)}
    report.check_failures({"base": {"cases": cases | fine}})
    with pytest.raises(ValueError, match=r"3 of 5 cases failed, 3 like this: ViPE failed \(exit code 1\)"):
        report.check_failures({"base": {"cases": cases}, "other": {"cases": dict(list(fine.items())[:2])}})
