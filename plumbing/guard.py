"""What stands between a run and a reward of a user's: it may fail, but it changes nothing outside
of itself."""
import ast
import importlib.util
import inspect
import os
import random
import signal
import sys
import sysconfig
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.files import digest
from plumbing.ranks import Interrupts, Stop


# ---- a user's file ----

def load_function(path, name):
    """Function `name` of (videos, scene) in a python file -> (it, bytes of its code and of what it
    imports).

    FileNotFoundError, or ValueError that names the file, whatever the file does when it is run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; a reward of your own is "
                                "my_file.py:function=weight")
    content = Path(path).read_bytes()
    module = types.ModuleType(f"reward_{digest(str(Path(path).resolve()).encode())[:8]}")
    module.__file__ = str(Path(path).resolve())
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    with as_it_was(path), errors_named(path):
        exec(compile(content, module.__file__, "exec"), module.__dict__)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: expected a function {name}(videos, scene), found none")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        raise ValueError(f"{path}: expected {name}(videos, scene), "
                         f"found {name}{inspect.signature(function)}") from None
    except ValueError:
        pass  # written in C, which has no signature to look at
    helpers = {}
    find_helpers(content, "", helpers)
    return function, content + b"".join(helpers[file] for file in sorted(helpers))


def find_helpers(content, package, found):
    """Adds to `found`, file -> bytes, the python files that code imports, and those that these
    import.

    Installed packages and python's own modules don't count; package: the code's own, for relative
    imports.
    """
    names = set()
    for line in ast.walk(ast.parse(content)):
        if isinstance(line, ast.Import):
            names |= {alias.name for alias in line.names}
        elif isinstance(line, ast.ImportFrom):
            base = package.rsplit(".", line.level - 1)[0] + "." if line.level else ""
            base = f"{base}{line.module or ''}".strip(".")
            names |= {base, *(f"{base}.{alias.name}" for alias in line.names)}
    places = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = {sysconfig.get_path(name) for name in places}
    for name in sorted(names):
        module = sys.modules.get(name)
        try:
            spec = importlib.util.find_spec(name) if module is None else None
        except (ImportError, ValueError, AttributeError):
            spec = None
        file = getattr(module, "__file__", None) or getattr(spec, "origin", None) or ""
        inside = any(file.startswith(folder + os.sep) for folder in installed)
        if file.endswith(".py") and not inside and file not in found and Path(file).is_file():
            found[file] = Path(file).read_bytes()
            is_package = Path(file).name == "__init__.py"
            find_helpers(found[file], name if is_package else name.rpartition(".")[0], found)


# ---- a call ----

class Failed(Exception):
    """A reward failed for the videos it was given. reason: why; out_of_memory: the error, if it was
    that."""
    def __init__(self, reason, out_of_memory=None):
        super().__init__(reason)
        self.reason = reason
        self.out_of_memory = out_of_memory


def call(reward, names, videos, scene):
    """A reward's scores of n videos, name -> (n,) float; it gets copies of them and of the scene's
    n rows.

    Failed where it raises for these videos. ValueError where it is itself wrong: it returns other
    names or shapes or infinities, changes what it was given, ends the program, or raises an error
    of code, as TypeError.
    """
    fields = {name: x for name, x in vars(scene).items() if torch.is_tensor(x)}
    own_fields = {name: x.clone() for name, x in fields.items()}
    own_videos = videos.clone()
    own_scene = replace(scene, **own_fields)
    what = f"reward {', '.join(names)}"
    with errors_named(what):
        try:
            scores = reward(own_videos, own_scene)
        except (TypeError, NameError, AttributeError, ImportError, OSError):
            raise
        except Exception as error:
            is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            raise Failed(words(error), error if is_memory else None) from error
    pairs = [(own_videos, videos)] + [(own_fields[name], x) for name, x in fields.items()]
    if not all(same_bytes(own, x) for own, x in pairs):
        raise ValueError(f"{what}: changed its videos or scene in place")
    with errors_named(what):
        return checked(scores, names, len(videos))


def same_bytes(a, b):
    """Whether two tensors are bitwise equal, NaN too; also after changes through numpy or another
    library."""
    # flattened into new memory: torch sees no bytes in an expanded tensor of one element, whose
    # stride is 0
    a, b = (torch.cat([x.detach().reshape(-1)]).view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and torch.equal(a, b)


def checked(scores, names, n):
    """What a reward returned for n videos as name -> (n,); ValueError where it is not what was
    expected."""
    if torch.is_tensor(scores) and len(names) == 1:
        scores = {names[0]: scores}
    if not isinstance(scores, dict) or set(scores) != set(names):
        found = sorted(map(str, scores)) if isinstance(scores, dict) else type(scores).__name__
        raise ValueError(f"expected a tensor, or tensors named {sorted(names)}, found {found}")
    for name, x in scores.items():
        if not torch.is_tensor(x) or x.shape != (n,) or not x.is_floating_point() or x.is_meta:
            found = f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"{name}: expected float scores ({n},), one per video, found {found}")
        if x.float().isinf().any():
            raise ValueError(f"{name}: expected finite scores or NaN, found {x.tolist()}")
    return scores


@contextmanager
def errors_named(what):
    """Whatever a user's code raises, SystemExit and KeyboardInterrupt too, becomes a ValueError
    naming it."""
    try:
        yield
    except (Stop, Failed):
        raise
    except ValueError as error:
        raise ValueError(f"{what}: {words(error).removeprefix('ValueError: ')}") from error
    except BaseException as error:
        raise ValueError(f"{what}: {words(error)}") from error


def words(error):
    """An exception's kind and first line, even where it cannot say itself."""
    try:
        text = str(error).strip().splitlines()
    except Exception:
        text = []
    return f"{type(error).__name__}: {text[0][:500]}" if text else type(error).__name__


# ---- global switches ----

def working_directory():
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def restore_environment(was):
    os.environ.clear()
    os.environ.update(was)


def restore_handlers(was):
    for signum, handler in zip(Interrupts.SIGNALS, was):
        signal.signal(signum, handler)


SWITCHES = {  # name: (how to read it, how to set it)
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (lambda: str(torch.get_default_device()),
                               lambda was: torch.set_default_device(None if was == "cpu" else was)),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": (torch.are_deterministic_algorithms_enabled,
                                         torch.use_deterministic_algorithms),
    "torch's matmul precision": (torch.get_float32_matmul_precision,
                                 torch.set_float32_matmul_precision),
    "numpy's error handling": (np.geterr, lambda was: np.seterr(**was)),
    "the working directory": (working_directory, lambda was: os.chdir(was) if was else None),
    "the environment": (lambda: dict(os.environ), restore_environment),
    "signal handlers": (lambda: [signal.getsignal(signum) for signum in Interrupts.SIGNALS],
                        restore_handlers)}
WARNED = set()  # (whose, which switch): said once


@contextmanager
def as_it_was(whose):
    """Restores, after a user's code, the global switches it changed, with a warning for each."""
    before = {name: read() for name, (read, _) in SWITCHES.items()}
    try:
        yield
    finally:
        for name, (read, restore) in SWITCHES.items():
            if read() == before[name]:
                continue
            restore(before[name])
            if (whose, name) not in WARNED:
                WARNED.add((whose, name))
                tqdm.write(f"warning: {whose} changed {name}; set back", sys.stderr)


def seed_everything(*key):
    """Seeds torch's, numpy's and random's global generators, so that a user's code repeats itself
    on resume."""
    seed = int(digest(repr(key).encode())[:15], 16)
    torch.manual_seed(seed)
    np.random.seed(seed % 2 ** 32)
    random.seed(seed)
