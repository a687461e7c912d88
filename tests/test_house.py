"""The house: what lies at the top, who imports whom, and that each folder says what is in it."""
import ast
import importlib
import re
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from conftest import ROOT

METHOD = ("model", "sampler", "rewards", "trajectories", "grpo", "train", "evaluate")
FOLDERS = ("data", "pretrained", "toy", "evaluation", "plumbing", "benchmarks", "config", "assets", "tests")
# A room may import from itself and from those before it.
ROOMS = ("plumbing", "trajectories", "pretrained", "model", "sampler", "grpo", "rewards", "data", "toy",
         "evaluation", "train", "evaluate", "benchmarks")


def tracked():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def product_files():
    files = [ROOT / f"{name}.py" for name in METHOD]
    for room in ROOMS:
        files += sorted((ROOT / room).glob("*.py"))
    return files


def imports(file):
    """Dotted names of the project's modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found
            if (ROOT / f"{name.replace('.', '/')}.py").is_file()}


def test_the_top_shows_the_seven_files_and_the_folders():
    top = {Path(name).parts[0] for name in tracked() if not name.startswith(".")}
    assert {name for name in top if name.endswith(".py")} == {f"{name}.py" for name in METHOD}
    others = {"README.md", "LICENSE", "CITATION.cff", "requirements.txt", "requirements-dev.txt"}
    assert top - {f"{name}.py" for name in METHOD} - others == set(FOLDERS)


def test_no_import_goes_up_or_in_a_circle():
    graph = {}
    for file in product_files():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        graph[module] = imports(file)
        mine = ROOMS.index(module.split(".")[0])
        for other in graph[module]:
            assert ROOMS.index(other.split(".")[0]) <= mine, f"{module} imports {other}, which lies above"
    while graph:  # leaves are taken away until none is left
        leaves = [module for module, others in graph.items() if not others & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for module in leaves:
            del graph[module]


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f not in ("config", "assets", "tests")])
def test_each_folder_says_what_is_in_it(folder):
    """In a README or a package docstring of ten lines at most that names every file."""
    doc = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert len(doc.splitlines()) <= 10
    for file in (ROOT / folder).glob("*.py"):
        assert file.stem == "__init__" or file.stem in doc, f"{folder}/__init__.py does not name {file.stem}"


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
