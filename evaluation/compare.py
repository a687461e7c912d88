"""Several evaluations together (`evaluate.py compare`), and several training runs (`evaluate.py
curves`)."""
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

from evaluation import page
from evaluation.cases import is_same_case, items
from evaluation.report import facts, short, table, trained_with, write_report
from evaluation.scores import read_results


@dataclass
class Compare:
    """python evaluate.py compare A B: their tables together, and in pairs on the cases that both
    have."""
    results: str = ""           # results.json, or folders of them or of runs, by commas or plainly
    out: str = "out/compare"    # folder for report.html and tables.md
    show: str = ""              # cases in the report, by commas; empty: best, median, worst change


@dataclass
class Curves:
    """python evaluate.py curves A B: training logs in one page, also while the runs go on."""
    logs: str = ""              # log.jsonl, or folders of runs, by commas or plainly
    out: str = "out/curves.html"  # the page


def compare(config):
    """Write tables and page of several results.json, and print three lines for each pair: first the
    runs against each other, then each against its base. ValueError where they are not
    comparable."""
    started = time.time()
    files = [find_results(path) for path in items(config.results)]
    if len({file.resolve() for file in files}) < 2:
        raise ValueError("compare: expected two different results.json, or their folders, or more")
    names = page.distinct(files)
    results = {name: read_results(file) for name, file in zip(names, files)}
    check_comparable(results)
    methods, last, base_of = named_methods(results, dict(zip(names, files)))
    cases = {case for method in methods.values() for case in method["cases"]}
    if unknown := [case for case in items(config.show) if case not in cases]:
        raise ValueError(f"show: no case {unknown[0]!r}, expected for example {min(cases)}")
    pairs = [(last[a], last[b]) for a, b in itertools.combinations(names, 2)]
    pairs += [(base_of[name], last[name]) for name in names if base_of[name] is not None]
    pairs = [(a, b) for a, b in pairs if a != b]
    pairs = pairs or [(last[names[0]], last[names[0]])]  # the same base twice
    paper = all(r.get("world") == "clips" for r in results.values())
    run = {}
    for name, r in results.items():
        run |= {f"{name}: {what}": text for what, text in r.get("run", {}).items()}
    write_report(Path(config.out), "Compared: " + ", ".join(names), methods, pairs, paper=paper,
                 asked=items(config.show), run=run | facts(config, started))


def find_results(path):
    """A results.json from itself, its folder, or a run's; FileNotFoundError where there is none."""
    files = [Path(path), Path(path, "results.json"), Path(path, "evaluation/results.json")]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no results.json there, expected one that evaluate.py "
                                "wrote")
    return file


def check_comparable(results):
    """ValueError where evaluations {name: results} have other estimators, no case in common, or one
    name for cases of different sources or true paths."""
    estimators = {r["settings"]["estimator"] for r in results.values()}
    if len(estimators) > 1:
        raise ValueError("compare: different estimators of cameras, "
                         f"{' and '.join(sorted(estimators))}")
    found = {}  # case -> evaluations that have it, and digests
    for name, r in results.items():
        for method in r["methods"].values():
            for case, scores in method["cases"].items():
                names, digests = found.setdefault(case, (set(), []))
                names.add(name)
                digests.append(scores.get("digest"))
    if not any(len(names) == len(results) for names, _ in found.values()):
        raise ValueError(f"compare: {' and '.join(results)} have no case in common")
    differ = [case for case, (names, digests) in found.items()
              if len(names) > 1 and not all(is_same_case(digests[0], x) for x in digests)]
    if differ:
        raise ValueError(f"compare: {len(differ)} cases of one name have different source videos "
                         f"or true paths in {' and '.join(results)}, {differ[0]} first; evaluate "
                         "both on the same")


def named_methods(results, files):
    """Evaluations {name: results} of files {name: results.json} -> all their methods under short
    names, bases first and one that evaluations share only once; {name: its last method}; {name: its
    base, or None}."""
    everyone = [short(method) for r in results.values() for method in r["methods"]]
    bases = {}
    others = {}
    last = {}
    base_of = {}
    for name, r in results.items():
        base_of[name] = None
        for method, content in r["methods"].items():
            content = content | {"folder": files[name].parent / method}
            label = short(method)
            if method == "base":
                label = next((known for known in bases if is_same(bases[known], content)), None)
                label = label or ("base" if not bases else f"{name}: base")
                base_of[name] = label
                larger = max(bases.get(label, content), content, key=lambda m: len(m["cases"]))
                bases[label] = larger
            else:
                label = label if everyone.count(label) == 1 else f"{name}: {label}"
                others[label] = content
            last[name] = label
    return bases | others, last, base_of


def is_same(a, b):
    """Whether two methods have the same scores in the cases of the one with fewer."""
    scores = lambda case: {k: x for k, x in case.items() if k not in ("video", "digest")}
    few, many = sorted((a["cases"], b["cases"]), key=len)
    return all(case in many and scores(few[case]) == scores(many[case]) for case in few)


def draw_curves(config):
    """Write a page with the curves and samples of training logs, and print its path."""
    started = time.time()
    if not items(config.logs):
        raise ValueError("curves: expected a log.jsonl or a run's folder, or several")
    logs = {page.find_log(path): page.read_log(path) for path in items(config.logs)}
    names = page.distinct(logs)
    done = [sum(any(key.startswith("reward/") for key in record) for record in records)
            for records in logs.values()]  # the last validation is a line of its own
    lines = [f"{name}: {count} iterations" for name, count in zip(names, done)]
    page.write(config.out, f"Training: {', '.join(names)}", [
        page.html_lines(lines), page.training(config.logs),
        settings_that_differ(dict(zip(names, logs))), page.html_facts(facts(config, started))])
    print("\n".join([*lines, config.out]))


def settings_that_differ(logs):
    """{name: log} of runs -> HTML of a table of the settings that are not the same in all of them,
    as their newest checkpoints say; "" where there is no such setting."""
    made = {}
    for name, log in logs.items():
        states = sorted(log.parent.glob("iteration_??????/state.json"))
        if states and trained_with(states[-1]):
            made[name] = trained_with(states[-1])
    rows = []
    for setting in dict.fromkeys(key for settings in made.values() for key in settings):
        values = [repr(settings.get(setting)) for settings in made.values()]
        if len(set(values)) > 1:
            rows.append([setting, *values])
    if not rows:
        return ""
    found = table("Settings that differ", ["Setting", *made], rows)
    return page.section("Runs", page.html_table(found))


# ---- the end of a run that has no evaluation ----

def finish_run(folder):
    """Write <folder>/report.html of a run's log and samples, and print three lines and its path."""
    folder = Path(folder)
    lines = lines_of_run(page.read_log(folder))
    page.write(folder / "report.html", f"Training: {page.distinct([folder])[0]}", [
        page.html_lines(lines), page.training(str(folder))])
    print("\n".join([*lines, str(folder / "report.html")]))


def lines_of_run(records):
    """Three lines on a training log, first to last: position, rotation, image. By the validation
    rewards, or where there are none, by the first and last ten iterations' rewards."""
    series = page.series_of(records)
    lines = []
    for label, names, unit, factor in (
            ("position error", ("trans",), "m", -1),
            ("rotation error", ("rot",), "deg", -180 / math.pi),
            ("image", ("hpsv3", "vq", "mq", "sharpness"), "", 1)):
        known = [key for name in names for key in (f"valid/{name}", f"reward/{name}")
                 if key in series]
        if not known:
            lines.append(f"{label:16}no such reward in this run")
            continue
        values = factor * series[known[0]][1]
        count = 1 if known[0].startswith("valid") else 10
        before = values[:count].mean()
        after = values[-count:].mean()
        what = known[0].replace("valid/", "validation, ").replace("reward/", "reward, ")
        lines.append(f"{label:16}{before:#.3g} -> {after:#.3g} {unit}".rstrip() + f" ({what})")
    return lines
