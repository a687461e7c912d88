"""What a run keeps in its folder, and how it goes on from there.

    iteration_000010/self_attn.safetensors   the trained weights
    iteration_000010/optimizer.safetensors   AdamW's moments
    iteration_000010/state.json              iteration, settings, the run's name, checksums of the two
    log.jsonl                                a line for each iteration
    lock                                     empty; locked while a run goes on

`trained` is name -> parameter, of those that train; `made`: all settings, and digests of what the
run is fed.
"""
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save

from plumbing.files import (
    digest, digest_files, is_still, lock_folder, one_line, remove_leftovers, temporary_name, write_file)
from plumbing.ranks import compare_ranks, deafen, rank_of
from plumbing.tell import mirror_to

WEIGHTS = "self_attn.safetensors"
MOMENTS = "optimizer.safetensors"
STATE = "state.json"
FILES = (WEIGHTS, MOMENTS, STATE)
KEYS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of every parameter
PLACES = ("weights", "clips", "trajectories", "out")  # settings that say where: contents count
METADATA = "geo_align"  # key of what a file of weights says of itself; one key, as their order is not kept


def differing(made, now):
    """"name = before, now after; ..." of the settings `now` that differ from `made`, or ""."""
    changed = {name: x for name, x in now.items() if made.get(name) != x}
    return "; ".join(f"{name} = {made.get(name)!r}, now {x!r}" for name, x in changed.items())


# ---- checkpoints in a folder ----

def checkpoints(out):
    """[(iteration, folder)] of what is named and filled like a checkpoint, the newest last."""
    found = []
    for folder in out.iterdir() if out.is_dir() else ():
        match = re.fullmatch(r"iteration_(\d{6}|[1-9]\d{6,17})", folder.name)
        if match and any((folder / name).is_file() for name in FILES):
            found.append((int(match[1]), folder))
    return sorted(found)


def read_state(folder):
    """A checkpoint's state.json, a dict. ValueError where it is damaged, OSError where it cannot be
    read."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        wanted = {"iteration": int, "config": dict, "digests": dict}
        if not isinstance(state, dict):
            raise ValueError("expected an object")
        if any(type(state.get(key)) is not kind for key, kind in wanted.items()):
            raise ValueError(f"expected {', '.join(wanted)}")
        return state
    except FileNotFoundError:
        raise ValueError(f"{folder / STATE}: missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / STATE}: damaged ({one_line(error)})") from None


def read_tensors(folder, name, state):
    """One of a checkpoint's files: name -> tensor, all finite. ValueError where it is damaged."""
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{folder / name}: missing") from None
    if digest(content) != state["digests"].get(name):
        raise ValueError(f"{folder / name}: damaged, its checksum is not state.json's")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / name}: damaged ({one_line(error)})") from None
    for key, x in tensors.items():
        if not x.is_floating_point() or not x.isfinite().all():
            raise ValueError(f"{folder / name}: {key}: expected finite numbers")
    return tensors


def load_checkpoint(folder, trained, optimizer, made, free):
    """Restore weights and optimiser from a checkpoint; returns its iteration.

    ValueError where it is damaged, OSError where it cannot be read, RuntimeError where it was made
    with other settings or inputs than now, but for the settings named in `free`.
    """
    state = read_state(folder)
    if int(folder.name.removeprefix("iteration_")) != state["iteration"]:
        raise ValueError(f"{folder / STATE}: iteration {state['iteration']!r}")
    weights = read_tensors(folder, WEIGHTS, state)
    moments = read_tensors(folder, MOMENTS, state)
    now = json.loads(json.dumps(made))
    for key in now:
        if " of " in key:  # contents, which older checkpoints don't tell
            state["config"].setdefault(key, now[key])
    if differ := differing(state["config"], {k: x for k, x in now.items() if k not in free}):
        raise RuntimeError(f"{folder}: made with {differ}; choose another --out or the same settings")
    wanted = {name: (p.shape, p.dtype) for name, p in trained.items()}
    if {name: (x.shape, x.dtype) for name, x in weights.items()} != wanted:
        raise ValueError(f"{folder / WEIGHTS}: other parameters than this model's")
    wanted = {f"{key}.{name}": () if key == "step" else tuple(p.shape)
              for name, p in trained.items() for key in KEYS}
    if {name: tuple(x.shape) for name, x in moments.items()} != wanted:
        raise ValueError(f"{folder / MOMENTS}: other moments than this model's parameters have")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
            mine = {key: moments[f"{key}.{name}"] for key in KEYS}
            optimizer.state[p] = {key: x if key == "step" else x.to(p.device)
                                  for key, x in mine.items()}
    return state["iteration"]


def resume(out, trained, optimizer, made, free):
    """Iterations already done: the newest whole checkpoint's, 0 where there is none at all.

    Damaged ones are passed over with a warning. Where none is whole, nothing is begun over them:
    ValueError. OSError where one cannot be read now, which says nothing about what it holds.
    """
    damage = []
    for _, folder in reversed(checkpoints(out)):
        try:
            iteration = load_checkpoint(folder, trained, optimizer, made, free)
        except ValueError as error:
            damage.append(str(error))
            continue
        for why in damage:
            print(f"warning: {why}; going on from {folder.name}", file=sys.stderr)
        return iteration
    if damage:
        raise ValueError(f"{damage[0]}; no checkpoint is whole, and nothing is begun over them: "
                         "choose another --out or move them away")
    return 0


def save_checkpoint(out, iteration, trained, optimizer, made, norms=(), run="",
                    free=("out", "iterations")):
    """Everything a run needs to go on, whole or not at all: written beside, then renamed.

    norms: see Run; free: settings that the weights' metadata leaves out. Then removes the run's own
    checkpoints but for the newest made["keep"].
    """
    settings = {name: x for name, x in made.items() if name not in free}
    about = {"what": "what Geo-Align trained, to lay over its base", "iteration": iteration,
             "settings": settings}
    moments = {f"{key}.{name}": optimizer.state[p][key].detach().cpu()
               for name, p in trained.items() for key in optimizer.state[p]}
    weights = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
    files = {WEIGHTS: save(weights, {METADATA: json.dumps(about)}), MOMENTS: save(moments)}
    state = {"iteration": iteration, "run": run, "config": made, "gradient norms": list(norms),
             "digests": {name: digest(content) for name, content in files.items()}}
    files[STATE] = json.dumps(state, indent=1).encode()
    final = out / f"iteration_{iteration:06d}"
    temporary = temporary_name(out)
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            write_file(temporary / name, content)
        move_aside(final)
        os.replace(temporary, final)
    finally:
        remove_checkpoint(temporary)
    mine = [folder for n, folder in checkpoints(out) if n <= iteration and is_of(folder, run)]
    for old in mine[:-made["keep"]]:
        remove_checkpoint(old)


def is_of(folder, run):
    """Whether a run wrote this checkpoint, and nobody put anything into it."""
    try:
        return (not folder.is_symlink() and {file.name for file in folder.iterdir()} == {*FILES}
                and read_state(folder).get("run") == run)
    except (ValueError, OSError):
        return False


def remove_checkpoint(folder):
    """Removes a checkpoint's files and its folder; under another name first, lest a half-removed
    one is read."""
    if not folder.exists():
        return
    gone = temporary_name(folder.parent)
    os.replace(folder, gone)
    for name in FILES:
        (gone / name).unlink(missing_ok=True)
    gone.rmdir()


def move_aside(path):
    """Gives what stands where a file or folder must go another name, says so, and returns the name.
    """
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.old{number}{path.suffix}")):
        number += 1
    os.replace(path, aside)
    print(f"warning: {path}: was there, now {aside.name}", file=sys.stderr)
    return aside


def find_checkpoint(path):
    """A checkpoint's file from itself, its folder, or a run's folder (then the newest that is
    whole)."""
    path = Path(path)
    files = [path, path / WEIGHTS, *(folder / WEIGHTS for _, folder in reversed(checkpoints(path)))]
    files = [f for f in files if f.is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: no checkpoint, expected a file or a folder of train.py's")
    for file in files:
        if not damaged(file):
            return file
        print(f"warning: {file}: skipped, its checksum is not state.json's", file=sys.stderr)
    raise ValueError(f"{path}: no checkpoint that is whole")


def damaged(file):
    """Whether the state.json beside a checkpoint's file, if there is one, has another checksum for
    it."""
    if not file.with_name(STATE).is_file():
        return False
    try:
        wanted = read_state(file.parent)["digests"].get(file.name)
    except ValueError:
        return True
    return wanted not in (None, digest(file.read_bytes()))


# ---- the log ----

def iteration_of(line):
    """The iteration that a line of log.jsonl tells of, -1 where it is no such line."""
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return -1
    return iteration if type(iteration) is int else -1


def open_log(path, iteration):
    """log.jsonl, opened for appending, with the lines before `iteration` only: the others are made
    again.

    Nothing else is dropped but a last line that was cut short. Where lines of another program would
    be, or where a run begins anew over lines, the old file is moved aside.
    """
    if path.is_symlink() or path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file, or nothing")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    if lines and iteration_of(lines[-1]) < 0:
        lines.pop()  # what follows the last line break: nothing, or a line cut short by a kill
    numbers = [iteration_of(line) for line in lines]
    if min(numbers, default=0) < 0 or iteration == 0 and numbers:
        move_aside(path)
    kept = [line for line, number in zip(lines, numbers) if 0 <= number < iteration
            or number == iteration and '"loss"' not in line]  # a note on the weights so far
    write_file(path, "".join(line + "\n" for line in kept).encode())
    return open(path, "a", encoding="utf-8")


def finite(x):
    """A record as JSON can hold it: null for what is no finite number."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ---- a run ----

def what_is_made(config, rewards, inputs):
    """All settings, and digests of what may not change under the same name: name -> value.

    rewards: those with a `code` attribute are a user's own; inputs: name -> files.
    """
    made = dataclasses.asdict(config)
    made["rewards"] = re.sub(r"[^,\s]*/", "", made["rewards"])  # wherever a reward's file lies
    code = {reward.names[0]: digest(reward.code) for reward in rewards if hasattr(reward, "code")}
    if code:
        made["code of rewards"] = code
    for name, files in inputs.items():
        made[f"content of {name}"] = digest_files(files, quiet=rank_of()[0] > 0)
    return made


def read_norms(out, iteration):
    """Gradient norms of the last updates before an iteration; [] at the start."""
    if iteration == 0:
        return []
    norms = read_state(out / f"iteration_{iteration:06d}").get("gradient norms", [])
    fine = isinstance(norms, list) and all(type(x) in (int, float) and 0 <= x < math.inf for x in norms)
    if not fine:
        raise ValueError(f"{out}/iteration_{iteration:06d}/{STATE}: gradient norms: expected "
                         "finite numbers")
    return norms


class Run:
    """A run's folder, from before its checkpoints are read until the process ends. Only rank 0
    writes there.

    config: its settings, with FREE, the names of those that may change on resume; trained: name ->
    parameter; rewards, inputs: see what_is_made.

    out: the folder; done: iterations whose updates the weights hold; saved: iterations of the last
    checkpoint; skipped: updates left out in a row before `done`, during which nothing is saved;
    norms: of the last updates' gradients, which the loop clips by; records: the log's lines so far.
    """

    def __init__(self, config, trained, optimizer, rewards, inputs=None):
        self.out = Path(config.out).absolute()
        self.trained = trained
        self.optimizer = optimizer
        self.made = what_is_made(config, rewards, inputs or {})
        compare_ranks({key: x for key, x in self.made.items() if key not in PLACES})
        self.writes = rank_of()[0] == 0
        self.lock = lock_folder(self.out) if self.writes else None  # held until this process ends
        if dist.is_initialized():
            dist.barrier()  # nobody reads what a run that is ending still writes
        self.free = {*config.FREE, *PLACES}  # settings that may change on resume
        self.done = resume(self.out, trained, optimizer, self.made, self.free)
        self.saved = self.done
        self.norms = read_norms(self.out, self.done)
        self.norms_done = list(self.norms)  # those before `done`: the loop adds to the others
        self.records = []
        self.skipped = 0
        self.unlogged = False  # whether the last iteration's line could not be written
        if not self.writes:
            return
        self.name = uuid.uuid4().hex
        if self.done:
            self.name = read_state(self.out / f"iteration_{self.done:06d}").get("run", "")
        remove_leftovers(self.out, "samples")
        self.file = open_log(self.out / "log.jsonl", self.done)
        self.mirror = mirror_to(config.log_to, config.out)
        lines = (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        self.records = [json.loads(line) for line in lines]
        watched = (self.lock, self.out / "lock"), (self.file, self.out / "log.jsonl")
        # some network file systems number the same file anew each time
        self.watched = [(file, path) for file, path in watched if is_still(file, path)]

    def sample(self):
        """The file of the sample videos that show what is done."""
        return self.out / f"samples/iteration_{self.done:06d}.mp4"

    def lacks_sample(self):
        """Whether a run that begins, or that was killed between checkpoint and sample, has none
        that is due."""
        due = self.is_due(self.made["sample_every"])
        return self.done == 0 or due and not self.sample().exists()

    def is_due(self, every):
        """Whether something happens now that happens every so many iterations, and after the last."""
        return self.done % every == 0 or self.done == self.made["iterations"]

    def check_folder(self):
        """OSError where the folder, or its log, was removed or replaced while the run goes on."""
        for file, path in self.watched:
            if not is_still(file, path):
                raise OSError(f"{path}: removed or replaced while the run goes on")

    def log(self, record):
        """An iteration is done: its line in log.jsonl, and where log_to sends it."""
        self.done = record["iteration"] + 1
        self.skipped = record["skipped"]
        self.norms_done = list(self.norms)
        self.records.append(record)
        self.note(record)
        if self.writes:
            self.mirror(record)

    def note(self, record):
        """A line in log.jsonl."""
        if not self.writes:
            return
        try:
            self.check_folder()
            self.file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            self.unlogged = True
            raise OSError(error.errno, one_line(error), self.file.name) from None

    def save(self):
        """A checkpoint of what is done; none while updates are being skipped, so that a healthy one
        remains."""
        if self.skipped:
            return
        if self.writes:
            self.check_folder()
            save_checkpoint(self.out, self.done, self.trained, self.optimizer, self.made,
                            self.norms_done, self.name, self.free)
        self.saved = self.done

    def finish(self):
        """After the last iteration; RuntimeError where its update was left out, so that the run is
        not whole."""
        if self.skipped:
            raise RuntimeError(f"the last {self.skipped} updates were skipped, as their gradients were "
                               f"no numbers; {self.saved} of {self.done} iterations are saved")

    @contextmanager
    def saved_however_it_ends(self, interrupts):
        """Whatever ends the loop inside, what is done is saved, but not amid an update."""
        try:
            yield
        except BaseException:
            deafen()
            self.save_rest(interrupts.held)  # within an update the weights are of no iteration
            raise

    def save_rest(self, half_done):
        """Before the run ends in whatever way: a checkpoint of what is done and not yet saved.

        half_done: whether the weights are of no iteration, so that they cannot be. Where the folder
        is gone or full, the checkpoint goes to another, which is named.
        """
        if not self.writes or not self.done:
            return
        where = ""
        if self.done > self.saved and (self.unlogged or not half_done):
            try:
                self.save()
            except OSError as error:
                where = f" in {self.save_elsewhere(error)}"
        lost = "" if self.done == self.saved else f", {self.saved} of them"
        print(f"\nstopped after {self.done} iterations{lost}, saved{where}; the same command goes on",
              file=sys.stderr)

    def save_elsewhere(self, error):
        """A checkpoint beside the run's folder or among temporary files; OSError where that fails
        too."""
        for place in (self.out.parent, Path(tempfile.gettempdir())):
            try:
                folder = Path(tempfile.mkdtemp(prefix=f"{self.out.name}_rescued_", dir=place))
                save_checkpoint(folder, self.done, self.trained, self.optimizer, self.made,
                                self.norms_done, self.name, self.free)
                self.saved = self.done
                return folder
            except OSError:
                continue
        raise error
