"""What a run keeps in its folder, and how it goes on from there.

    iteration_000010/self_attn.safetensors   the trained weights
    iteration_000010/optimizer.safetensors   AdamW's moments
    iteration_000010/state.json              iteration, settings, checksums of the two
    log.jsonl                                a line for each iteration
    lock                                     empty; locked while a run goes on

`trained` is name -> parameter, of those that train; `made` all settings, and own rewards' checksums if any.
"""
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from plumbing.files import digest, write_file
from plumbing.ranks import rank_of

WEIGHTS, MOMENTS = "self_attn.safetensors", "optimizer.safetensors"
METADATA = "geo_align"  # key of what a file of weights says of itself; one key, since their order is not kept


def differing(made, now):
    """"name = before, now after; ..." of the settings `now` that differ from `made`, "" if none do."""
    return "; ".join(f"{k} = {made.get(k)!r}, now {x!r}" for k, x in now.items() if made.get(k) != x)


def lock_folder(out, patience=30):
    """Keeps a run's folder for this process until it ends in whatever way, or closes what is returned. Waits
    `patience` seconds for a run that is about to end; ValueError where it does not."""
    import fcntl  # not on Windows
    out.mkdir(parents=True, exist_ok=True)
    file, end = open(out / "lock", "a"), None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if end is None:
                end = time.monotonic() + patience
                print(f"{out}: another run is writing there; waiting {patience} s", file=sys.stderr)
            if time.monotonic() >= end:
                raise ValueError(f"{out}: another run is writing there; wait for it or choose another --out")
            time.sleep(0.2)
            continue
        except OSError:  # a file system without locks
            pass
        return file


def save_checkpoint(out, iteration, trained, optimizer, made, norms=()):
    """Everything a run needs to go on, whole or not at all: written beside, then renamed."""
    moments = {f"{key}.{name}": optimizer.state[p][key].detach().cpu()
               for name, p in trained.items() for key in optimizer.state[p]}
    about = {"what": "self-attention trained by Geo-Align, to lay over its base", "iteration": iteration,
             "settings": {name: x for name, x in made.items() if name not in ("out", "iterations")}}
    files = {WEIGHTS: save({name: p.detach().cpu().contiguous() for name, p in trained.items()},
                           {METADATA: json.dumps(about)}),
             MOMENTS: save(moments)}
    state = {"iteration": iteration, "config": made, "gradient norms": list(norms),
             "digests": {name: digest(content) for name, content in files.items()}}
    files["state.json"] = json.dumps(state, indent=1).encode()
    final = out / f"iteration_{iteration:06d}"
    temporary = out / "checkpoint.tmp"  # always the same: a killed run leaves one at most
    shutil.rmtree(temporary, ignore_errors=True)
    for name, content in files.items():
        write_file(temporary / name, content)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    kept = [f for f in sorted(out.glob("iteration_??????")) if f <= final]  # later ones were unreadable
    for old in kept[:-made["keep"]]:
        shutil.rmtree(old)


def load_checkpoint(folder, trained, optimizer, made, free):
    """Restore weights and optimiser from a checkpoint; returns its iteration. ValueError where it is damaged,
    OSError where unreadable, RuntimeError where it was made with other settings than now, but for `free`."""
    state = json.loads((folder / "state.json").read_text())
    if int(folder.name[-6:]) != state["iteration"]:
        raise ValueError(f"state.json: iteration {state['iteration']!r}")
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS, MOMENTS)}
    for name, content in files.items():
        if digest(content) != state["digests"][name]:
            raise ValueError(f"{folder / name}: checksum differs")
    now = json.loads(json.dumps(made))
    state["config"].setdefault("code of rewards", now.get("code of rewards"))  # older ones don't tell
    if differ := differing(state["config"], {k: x for k, x in now.items() if k not in free}):
        raise RuntimeError(f"{folder}: made with {differ}; choose another --out or the same settings")
    weights, moments = load_file(folder / WEIGHTS), load_file(folder / MOMENTS)
    if {name: x.shape for name, x in weights.items()} != {name: p.shape for name, p in trained.items()}:
        raise ValueError(f"{folder}: other parameters than this model's")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
            mine = {key: moments.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {key: x if key == "step" else x.to(p.device)
                                  for key, x in mine.items() if x is not None}
    return state["iteration"]


def resume(out, trained, optimizer, made, free):
    """Iterations already done: the newest readable checkpoint's, 0 without any. Damaged ones are skipped,
    loudly."""
    for folder in sorted(out.glob("iteration_??????"), reverse=True):
        try:
            return load_checkpoint(folder, trained, optimizer, made, free)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError,
                SafetensorError) as e:
            print(f"warning: {folder}: skipped, {e}", file=sys.stderr)
    return 0


def iteration_of(line):
    """The iteration that a line of log.jsonl tells of, -1 where it is damaged."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return -1


def open_log(path, iteration):
    """log.jsonl, opened for appending, without damaged lines and those from `iteration` on, which an
    interrupted run left."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if 0 <= iteration_of(line) < iteration
            or iteration_of(line) == iteration and '"loss"' not in line]  # a note on the weights so far
    write_file(path, "".join(line + "\n" for line in kept).encode())
    return open(path, "a")


def damaged(file):
    """Whether the state.json beside a checkpoint's file, if there is one, has another checksum for it."""
    state = file.with_name("state.json")
    try:
        wanted = json.loads(state.read_text())["digests"][file.name] if state.is_file() else None
        return wanted not in (None, digest(file.read_bytes()))
    except (ValueError, LookupError, TypeError, RecursionError):
        return True


def find_checkpoint(path):
    """A checkpoint's file from itself, its folder, or a run's folder (then the newest that is whole)."""
    path = Path(path)
    files = [path, path / WEIGHTS, *sorted(path.glob(f"iteration_??????/{WEIGHTS}"))[::-1]]
    files = [f for f in files if f.is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: no checkpoint, expected a file or a folder of train.py's")
    for file in files:
        if not damaged(file):
            return file
        print(f"warning: {file}: skipped, its checksum is not state.json's", file=sys.stderr)
    raise ValueError(f"{path}: no checkpoint that is whole")


def read_norms(out, iteration):
    """Gradient norms of the last updates before an iteration, which the loop clips by; [] at the start."""
    if iteration == 0:
        return []
    state = json.loads((out / f"iteration_{iteration:06d}/state.json").read_text())
    return [float(x) for x in state.get("gradient norms", [])]


class Run:
    """A run's folder, from before its checkpoints are read until the process ends. Only rank 0 writes there.

    config: its settings, with FREE, the names of those that may change on resume; trained: name -> parameter;
    rewards: those with a `code` attribute, a user's own, may not change either.
    norms: of the last updates' gradients; records: the log's lines so far (rank 0).
    out: the folder; done: iterations whose updates the weights hold; saved: iterations of the last checkpoint.
    """

    def __init__(self, config, trained, optimizer, rewards):
        self.out = Path(config.out)
        self.trained = trained
        self.optimizer = optimizer
        self.made = dataclasses.asdict(config)
        code = {reward.names[0]: digest(reward.code) for reward in rewards if hasattr(reward, "code")}
        if code:
            self.made["code of rewards"] = code
        self.writes = rank_of()[0] == 0
        self.lock = lock_folder(self.out) if self.writes else None  # held until this process ends
        if dist.is_initialized():
            dist.barrier()  # nobody reads what a run that is ending still writes
        self.done = resume(self.out, trained, optimizer, self.made, config.FREE)
        self.saved = self.done
        self.norms = read_norms(self.out, self.done)
        self.file = open_log(self.out / "log.jsonl", self.done) if self.writes else None
        self.records = []
        if self.writes:
            lines = (self.out / "log.jsonl").read_text().splitlines()
            self.records = [json.loads(line) for line in lines]

    def log(self, record):
        """An iteration is done: its line in log.jsonl."""
        self.done = record["iteration"] + 1
        self.records.append(record)
        self.note(record)

    def note(self, record):
        """A line in log.jsonl."""
        if not self.writes:
            return
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from None

    def save(self):
        """A checkpoint of what is done."""
        if self.writes:
            save_checkpoint(self.out, self.done, self.trained, self.optimizer, self.made, self.norms)
        self.saved = self.done

    def save_rest(self):
        """Before the run ends in whatever way: a checkpoint of what is done and not yet saved."""
        if self.writes and self.done > self.saved:
            self.save()
        if self.writes and self.done:
            print(f"\nstopped after {self.done} iterations, saved; the same command goes on",
                  file=sys.stderr)
