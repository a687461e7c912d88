"""The house: what lies at the top, who imports whom, and that each folder says what is in it."""
import ast
import graphlib
import importlib
import re
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from conftest import ROOT

METHOD = {"model", "sampler", "rewards", "trajectories", "grpo", "train", "evaluate"}
FOLDERS = {"data", "pretrained", "toy", "evaluation", "plumbing", "benchmarks", "config", "assets", "tests"}
# A room may import from itself and from those before it.
ROOMS = ("plumbing", "trajectories", "pretrained", "model", "sampler", "grpo", "rewards", "data", "toy",
         "evaluation", "train", "evaluate", "benchmarks")


def imports(file):
    """Dotted names of all that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_the_top_shows_the_seven_files_and_the_folders():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in listed.stdout.split() if not name.startswith(".")}
    others = {"README.md", "LICENSE", "CITATION.cff", "requirements.txt", "requirements-dev.txt"}
    assert top == {f"{name}.py" for name in METHOD} | FOLDERS | others


def test_no_import_goes_up_or_in_a_circle():
    files = [file for room in ROOMS for file in (*ROOT.glob(f"{room}.py"), *(ROOT / room).glob("*.py"))]
    graph = {".".join(file.relative_to(ROOT).with_suffix("").parts): set(imports(file)) for file in files}
    for module, others in graph.items():
        others &= graph.keys()
        below = ROOMS[:ROOMS.index(module.split(".")[0]) + 1]
        above = [other for other in others if other.split(".")[0] not in below]
        assert not above, f"{module} imports {above}, which lie above"
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names a circle


def test_no_test_imports_a_test():
    files = {file.stem: set(imports(file)) for file in (ROOT / "tests").glob("test_*.py")}
    assert not {name: found for name, others in files.items() if (found := others & files.keys())}


@pytest.mark.parametrize("folder", sorted(FOLDERS - {"config", "assets", "tests"}))
def test_each_folder_says_what_is_in_it(folder):
    """In a package docstring of ten lines at most that names every file."""
    doc = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert len(doc.splitlines()) <= 10
    assert not {file.stem for file in (ROOT / folder).glob("*.py") if file.stem not in doc} - {"__init__"}


def test_the_seven_files_stay_readable():
    lines = [line for name in METHOD for line in (ROOT / f"{name}.py").read_text().splitlines()]
    assert len(lines) < 2300
    assert sum(len(line) > 100 for line in lines) < 0.05 * len(lines)


@pytest.mark.parametrize("readme", ["README.md", "toy/README.md", "pretrained/README.md",
                                    "evaluation/README.md", "benchmarks/README.md"])
def test_the_readmes_commands_exist(readme):
    """Every python and torchrun line names a file of ours, and settings that it has."""
    join = lambda code: re.sub(r"\\\n|\n(?=-)", " ", code[0])  # a command's own line breaks
    text = re.sub(r"```.*?```|`[^`]*`", join, (ROOT / readme).read_text(), flags=re.S)
    for line in re.findall(r"^(?:python|torchrun) [^#\n]*|`(?:python|torchrun) [^`]*`", text, re.M):
        named = re.search(r" -m ([a-z.]+)| ([a-z_/]+)\.py(?= |`|$)", line)
        if named is None or named[1] in ("venv", "pytest") or named[2] == "inference":  # ReDirector's own
            continue
        name = named[1] or named[2].replace("/", ".")
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), line
        if not name.startswith("tests."):
            kinds = [x for x in vars(importlib.import_module(name)).values() if is_dataclass(x)]
            known = {field.name for kind in kinds for field in fields(kind)}
            assert set(re.findall(r"--(\w+)=", line[named.end():])) <= known, line
