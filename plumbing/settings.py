"""Settings of every command: a dataclass, filled from a file of `name = value` lines and from
--name=value.

A program has one or more commands, each a dataclass of settings and a function of it:
    run_command("evaluate.py", __doc__, {"evaluate": (Evaluate, evaluate, None), ...}, sys.argv[1:])
"""
import ast
import dataclasses
import difflib
import inspect
import math
import os
import signal
import sys
import traceback
from pathlib import Path

from plumbing.ranks import lost_contact, steady_streams, words_of


class Folder(str):
    """A setting that says where: made absolute when read, whatever directory a reward changes to
    later."""


def convert(kind, value, where):
    """value as a field's type: numbers, tuples, booleans as python writes them. ValueError says
    where."""
    if kind in (str, Folder) and isinstance(value, str):
        return value
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    if kind is float and is_number(value):
        return float(value)
    if kind is tuple and type(value) in (list, tuple) and all(map(is_number, value)):
        return tuple(map(float, value))
    if type(value) is not kind or kind in (float, tuple) or kind is int and abs(value) >= 1 << 63:
        raise ValueError(f"{where}: expected {kind.__name__.lower()}, found {value!r:.200}")
    return value


def is_number(x):
    """No infinity, no NaN, nothing that only a float cannot hold."""
    return type(x) in (int, float) and abs(x) < 1e300


def read_settings(file):
    """A file's lines of name = value -> [(where, name, value)]. It is parsed, never run.

    ValueError for anything but assignments of constants, and a docstring.
    """
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such config file; a setting is --name=value") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file}: expected lines of name = value ({error})") from None
    settings = []
    for line in tree.body:
        where = f"{file}, line {line.lineno}"
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a docstring
        names = line.targets if isinstance(line, ast.Assign) else []
        if len(names) != 1 or not isinstance(names[0], ast.Name):
            raise ValueError(f"{where}: expected name = value")
        try:
            settings.append((where, names[0].id, ast.literal_eval(line.value)))
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ValueError(f"{where}: expected a constant") from None
    return settings


def parse(config_class, argv, default=None):
    """[file.py] --name=value ... -> config; later wins. default: the file where argv names none.

    ValueError for unknown names (the nearest one is suggested), wrong types, or a file of anything
    else.
    """
    fields = {f.name: f.type for f in dataclasses.fields(config_class)}
    files = [a for a in argv if not a.startswith("--")] or ([default] if default else [])
    if len(files) > 1:
        raise ValueError(f"one config file at most, found {' '.join(files)}")
    settings = [setting for file in files for setting in read_settings(file)]
    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            if not equals and fields.get(name) is not bool:
                raise ValueError(f"{arg}: expected --name=value")
            settings.append((arg, name, value if equals else True))
    config = config_class()
    for where, name, value in settings:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: no setting {name!r}{hint}")
        value = convert(fields[name], value, where)
        if fields[name] is Folder and not value and getattr(config_class, name):
            raise ValueError(f"{where}: expected a folder, found nothing")
        if "\0" in str(value):
            raise ValueError(f"{where}: expected text without null characters")
        if fields[name] is Folder and value != value.strip():
            raise ValueError(f"{where}: expected a folder without blanks around its name")
        setattr(config, name, value)
    for name, kind in fields.items():
        if kind is Folder and getattr(config, name):
            setattr(config, name, os.path.abspath(getattr(config, name)))
    return config


def at_least_1(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")


def at_most(config, **most):
    """ValueError for a setting beyond what makes sense, lest memory or threads run out."""
    for name, limit in most.items():
        if getattr(config, name) > limit:
            raise ValueError(f"{name}: expected at most {limit}, found {getattr(config, name)}")


def read_rewards(text, known):
    """"trans=1,my.py:f=0.5" -> {"trans": 1.0, "f": 0.5}, and files of one's own {"f": "my.py"}.

    known: names that need no file. ValueError for another without one, a bad weight, a name twice.
    """
    weights = {}
    files = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, weight = item.rpartition("=")
        path, _, name = key.rpartition(":")
        if path:
            files[name] = path
        if bool(path) == (name in known):  # ours have no path, others need one
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"rewards: expected name=weight with a name of {', '.join(known)} "
                             f"or another as my.py:name, found {item!r}{hint}")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or name in weights:
            raise ValueError(f"rewards: expected each name once with a number, found {item!r}")
        weights[name] = value
    if not weights:
        raise ValueError("rewards: expected at least one name=weight, found none")
    return weights, files


# ---- commands ----

def help_text(doc, settings):
    """A program's docstring, then a command's settings with their comments, inherited ones too."""
    kinds = [kind for kind in settings.__mro__ if dataclasses.is_dataclass(kind)]
    sources = [inspect.getsource(kind).partition("class ")[2].partition("\n")[2] for kind in kinds]
    return "\n".join([doc, *sources])


def choose_command(commands, argv):
    """([command name] ... of argv, its settings): (settings, function). ValueError for an unknown
    name.

    commands: name -> (dataclass of settings, function of them, the setting that may be given
    plainly: as an argument without --name=, or None). The first is meant where argv names none. A
    dataclass's FILE is the file of settings that is read where none is named.
    """
    named = bool(argv) and argv[0] in commands
    name = argv[0] if named else next(iter(commands))
    settings, function, plain_name = commands[name]
    plain = []
    flags = []
    for argument in argv[1:] if named else argv:
        is_flag = argument.startswith("--") or argument.endswith(".py")  # a .py file holds settings
        (flags if is_flag else plain).append(argument)
    if plain and plain_name:
        flags.append(f"--{plain_name}={','.join(plain)}")
    elif plain:
        near = difflib.get_close_matches(plain[0], commands, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected {', '.join(commands)}"
        raise ValueError(f"no command {plain[0]!r}{hint}")
    return parse(settings, flags, getattr(settings, "FILE", None)), function


def run_command(program, doc, commands, argv):
    """Run what argv asks for. Whatever fails ends with one line and exit code 1; --help shows the
    settings.

    DEBUG set: with the traceback before it.
    """
    steady_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as plumbing.early left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "--help" in argv or "-h" in argv:
        named = next((a for a in argv if a in commands), next(iter(commands)))
        print(help_text(doc, commands[named][0]))
        return
    try:
        settings, function = choose_command(commands, argv)
        function(settings)
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; the same command goes on from here")
    except Exception as error:
        if os.environ.get("DEBUG"):
            traceback.print_exc()
        lost = "another rank ended: " if lost_contact(error) else ""
        sys.exit(f"{program}: {lost}{words_of(error)}")
