"""TODO"""
import ast
import dataclasses
import difflib
from pathlib import Path


def convert(kind, value, where):
    """value as a field's type: numbers, tuples, booleans as python writes them. ValueError says where."""
    if kind is str and isinstance(value, str):
        return value
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        pass
    number = lambda x: type(x) in (int, float) and abs(x) < 1e300  # no infinity, no NaN
    if kind is float and number(value):
        return float(value)
    if kind is tuple and type(value) in (list, tuple) and all(map(number, value)):
        return tuple(map(float, value))
    if type(value) is not kind or kind in (float, tuple):
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def parse(config_class, argv, default=None):
    """[file.py] --name=value ... -> config. Later wins. ValueError for unknown names (nearest one suggested),
    wrong types, or a file with anything but assignments of constants: it is read, never run."""
    fields = {f.name: f.type for f in dataclasses.fields(config_class)}
    files = [a for a in argv if not a.startswith("--")] or ([default] if default else [])
    settings = []
    if len(files) > 1:
        raise ValueError(f"one config file at most, found {' '.join(files)}")
    for file in files:
        try:
            tree = ast.parse(Path(file).read_text(), file)
        except FileNotFoundError:
            raise FileNotFoundError(f"{file}: no such config file; a setting is --name=value") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise ValueError(f"{file}: expected lines of name = value ({e})") from None
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
            raise ValueError(f"{where}: no setting {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        setattr(config, name, convert(fields[name], value, where))
    return config


def at_least_1(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")
