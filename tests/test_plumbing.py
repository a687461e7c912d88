"""What a run keeps and claims: its folder, checkpoints, log and inputs; how ranks meet; what is said."""
import fcntl
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from safetensors.torch import load, save
from scenes import put

import train
from plumbing import checkpoint, files, ranks, tell
from plumbing.checkpoint import MOMENTS, STATE, WEIGHTS
from plumbing.settings import parse, run_command


class Policy:
    """One trained parameter, its optimiser after a step, and settings: what a checkpoint is made of."""
    def __init__(self, value=1.0):
        self.p = torch.nn.Parameter(torch.full((3,), value))
        self.made = {"lr": 1.0, "keep": 2}
        self.parts = {"p": self.p}, torch.optim.AdamW([self.p])
        self.p.sum().backward()
        self.parts[1].step()

    def save(self, out, iteration, run="mine"):
        checkpoint.save_checkpoint(out, iteration, *self.parts, self.made, run=run)
        return out / f"iteration_{iteration:06d}"

    def resume(self, out, **made):
        return checkpoint.resume(out, *self.parts, self.made | {"keep": 3} | made, ("keep",))

    def run(self, out, *args, rewards=(), inputs=None):
        return checkpoint.Run(parse(train.Config, [f"--out={out}", *args]), *self.parts, rewards, inputs)


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


# ---- files and folders ----

def test_nothing_of_others_is_removed_or_written_through_a_link(tmp_path):
    """A user's files stay, also those that look like leftovers; only our own leftovers go."""
    victim, out = tmp_path / "victim/file", tmp_path / "out"
    for file in victim, out / "a.tmp", out / "checkpoint.tmp/b", out / "samples/c.tmp":
        put(file, "theirs")
    before = tree(tmp_path)
    put(files.temporary_name(out) / "half", "")
    put(files.temporary_name(out / "samples"), "")
    files.remove_leftovers(out, "samples")
    assert tree(tmp_path) == before
    for name, target in ("log.jsonl", victim), ("links", victim.parent), ("lock", victim):
        (out / name).symlink_to(target)
        with pytest.raises((ValueError, OSError), match=name):
            checkpoint.open_log(out / name, 0) if name == "log.jsonl" else files.lock_folder(out)
        (out / name).unlink()
    assert victim.read_text() == "theirs"


def test_one_run_a_folder(tmp_path, monkeypatch, capsys):
    """Claimed before anything is read, till the run ends; no locks: said."""
    Policy().save(tmp_path, 2).joinpath(STATE).unlink()  # damage that is not looked at before the claim
    lock = files.lock_folder(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(checkpoint, "lock_folder", lambda folder: files.lock_folder(folder, patience=0.3))
    refused(lambda: Policy().run(tmp_path), "another process is writing there; wait for it or choose")
    assert tree(tmp_path) == before
    monkeypatch.undo()
    threading.Timer(0.3, lock.close).start()
    refused(lambda: Policy().run(tmp_path), "state.json: missing")
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.write(-1, b""))
    files.lock_folder(tmp_path).close()
    assert capsys.readouterr().err.count("this file system has no locks") == 1


# ---- checkpoints ----

def test_a_full_disk_spoils_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    Policy().save(tmp_path, 2)
    before = tree(tmp_path)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device, .* bytes"):
        Policy().save(tmp_path, 4)
    assert tree(tmp_path) == before and Policy().resume(tmp_path) == 2


def test_rotation_removes_only_what_this_run_wrote(tmp_path, capsys):
    """The newest of its own stay. What stands in a checkpoint's place is moved aside."""
    policy = Policy()
    (tmp_path / "iteration_000002").symlink_to(policy.save(tmp_path / "elsewhere", 2))
    policy.save(tmp_path, 3, run="another")
    put(policy.save(tmp_path, 4) / "notes.txt", "mine")  # a checkpoint with notes of a user
    before = tree(tmp_path)
    for iteration in (5, 999_999, 1_000_000, 6):
        policy.save(tmp_path, iteration)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert Policy().resume(tmp_path) == 1_000_000
    assert "iteration_000005" not in after and "iteration_000006" in after
    for iteration in (2, 4):
        policy.save(tmp_path, iteration)
        assert os.path.lexists(tmp_path / f"iteration_{iteration:06d}.old1")
    assert capsys.readouterr().err.count("was there, now iteration_00000") == 2


def forge(folder, name, change):
    """Changes a checkpoint's tensors, and makes state.json vouch for them."""
    (folder / name).write_bytes(save(change(load((folder / name).read_bytes()))))
    state = json.loads((folder / STATE).read_text())
    state["digests"][name] = files.digest((folder / name).read_bytes())
    put(folder / STATE, state)


@pytest.mark.parametrize("message, change", [
    ("self_attn.safetensors: missing", lambda f: (f / WEIGHTS).unlink()),
    ("state.json: missing", lambda f: (f / STATE).unlink()),
    ("optimizer.safetensors: damaged, its checksum", lambda f: (f / MOMENTS).write_bytes(b"")),
    ("state.json: damaged .expected an object", lambda f: (f / STATE).write_text("[]")),
    ("state.json: damaged .expected iteration", lambda f: (f / STATE).write_text("{}")),
    ("state.json: iteration 4", lambda f: f.rename(f.with_name("iteration_000005"))),
    ("other parameters", lambda f: forge(f, WEIGHTS, lambda x: {"p": x["p"].half()})),
    ("exp_avg.p: expected finite",
     lambda f: forge(f, MOMENTS, lambda x: x | {"exp_avg.p": x["exp_avg.p"] / 0})),
    ("other moments", lambda f: forge(f, MOMENTS, lambda x: {"step.p": x["step.p"]}))])
def test_a_bad_checkpoint_is_passed_over_or_refused(tmp_path, message, change, capsys):
    """The one before is gone on from; without one nothing is begun; no other settings."""
    change(Policy(2.0).save(tmp_path, 4))
    policy = Policy()
    before, kept = tree(tmp_path), policy.p.detach().clone()
    with pytest.raises(ValueError, match=f"{message}.*nothing is begun over them"):
        policy.resume(tmp_path)
    assert before == tree(tmp_path) and torch.equal(policy.p, kept)
    older = Policy(3.0)
    older.save(tmp_path, 2)
    assert policy.resume(tmp_path) == 2 and torch.equal(policy.p, older.p)
    assert "going on from iteration_000002" in capsys.readouterr().err
    refused(lambda: policy.resume(tmp_path, lr=2.0), "made with lr = 1.0, now 2.0", error=RuntimeError)


def test_what_is_damaged_is_not_evaluated(tmp_path, capsys):
    whole, cut = (Policy().save(tmp_path, n) for n in (2, 4))
    (cut / WEIGHTS).write_bytes(b"")
    assert checkpoint.find_checkpoint(tmp_path) == whole / WEIGHTS
    assert "iteration_000004/self_attn.safetensors: skipped, its checksum" in capsys.readouterr().err
    for path in cut, tmp_path / "none":
        refused(lambda: checkpoint.find_checkpoint(path), "no checkpoint", error=(ValueError, OSError))


LINE = '{"iteration": 0, "loss": 1}\n'


@pytest.mark.parametrize("text, iteration, kept, aside", [
    (LINE + '{"iteration": 1, "loss": 1}\n', 1, [0], False),  # 1 is made again
    (LINE + '{"iteration": 1, "lo', 1, [0], False),  # cut short by a kill
    (LINE + '{"iteration": 1}\n', 1, [0, 1], False),  # a note on the weights so far
    (LINE, 0, [], True),  # begun anew, over lines
    ('{"step": 0}\n' + LINE + "[" * 9999 + '\n{"iteration": true}\n', 1, [0], True)])  # another program's
def test_a_log_loses_no_line_but_those_made_again(tmp_path, text, iteration, kept, aside):
    log, moved = tmp_path / "log.jsonl", tmp_path / "log.old1.jsonl"
    log.write_text(text)
    checkpoint.open_log(log, iteration).close()
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == kept
    assert moved.exists() == aside and (not aside or moved.read_text() == text)


RECORD = {"loss": 1.0, "skipped": 0}


def test_what_is_done_is_saved_when_a_run_ends(tmp_path, capsys):
    """No half update, nor a skipped one; beside, where the folder was removed."""
    run = Policy().run(tmp_path / "out")
    run.log(RECORD | {"iteration": 0, "norm": float("nan"), "valid": {"x": [float("inf")]}})
    run.save_rest(half_done=True)
    run.log(RECORD | {"iteration": 1, "skipped": 1})
    run.save_rest(half_done=False)
    assert not list(tmp_path.glob("*/iteration_*"))
    assert capsys.readouterr().err.count("0 of them, saved;") == 2
    assert '"norm": null, "valid": {"x": [null]}' in (tmp_path / "out/log.jsonl").read_text()
    (tmp_path / "out").rename(tmp_path / "moved")
    refused(lambda: run.log(RECORD | {"iteration": 2}), "removed or replaced", error=OSError)
    run.save_rest(half_done=True)
    saved, = tmp_path.glob("out_rescued_*/iteration_000003/state.json")
    assert f"stopped after 3 iterations, saved in {saved.parent.parent}" in capsys.readouterr().err


def test_inputs_that_changed_under_the_same_name_are_noticed(tmp_path):
    """Weights and a reward's code, wherever they lie."""
    def run(weights, content, code, rewards="a/my.py:f=1"):
        put(tmp_path / weights, content)
        found = Policy().run(tmp_path / "out", f"--rewards={rewards}",
                             inputs={"weights": [tmp_path / weights]},
                             rewards=[SimpleNamespace(names=("f",), code=code)])
        found.log(RECORD | {"iteration": found.done})
        found.save()
        found.lock.close()
    run("1/base", b"base", b"1")
    run("2/base", b"base", b"1", rewards="/elsewhere/my.py:f=1")
    for content, code, what in (b"BASE", b"1", "content of weights"), (b"base", b"2", "code of rewards"):
        with pytest.raises(RuntimeError, match=f"made with {what} = "):
            run("2/base", content, code)


# ---- ranks ----

def test_ranks_are_compared(monkeypatch):
    """Settings and weights: the rank that differs is named."""
    def gather(found, mine):
        found[:] = [mine, mine, mine | {"lr": 3.0} if isinstance(mine, dict) else mine + 1]
    for name, act in (("is_initialized", lambda: True), ("get_world_size", lambda: 3), ("all_gather", gather),
                      ("all_gather_object", gather)):
        monkeypatch.setattr(ranks.dist, name, act)
    refused(lambda: ranks.compare_ranks({"lr": 1.0}), "rank 2: lr = 3.0, rank 0 has 1.0")
    refused(lambda: ranks.assert_ranks_agree([torch.ones(2)], "x"), "weights of rank 2", error=RuntimeError)
    ranks.compare_ranks({"lr": 3.0})


def test_ranks_meet_anew_in_a_store_that_outlives_them(monkeypatch):
    """As torchrun's does over a restart, whoever comes first; a rank that does not come is named."""
    store, met = torch.distributed.HashStore(), []
    rank_here = lambda: int(threading.current_thread().name)
    monkeypatch.setattr(ranks, "rendezvous", lambda patience: (store, rank_here(), 2))
    monkeypatch.setattr(ranks.dist, "PrefixStore", lambda name, store: name)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, store, **options: met.append(store))
    for order in "01", "10":
        threads = [threading.Thread(target=ranks.connect, args=("gloo", 300), name=rank) for rank in order]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert met[0] == met[1] != met[2] == met[3]
    for rank in 0, 1:
        monkeypatch.setattr(ranks, "rendezvous", lambda patience: (store, rank, 2))
        words = f"rank {1 - rank} did not start in 0.1 s"
        refused(lambda: ranks.connect("gloo", 0.1), words, error=TimeoutError)


def test_a_rank_that_torchrun_would_not_name(monkeypatch):
    for rank, world in ("", "0"), ("2", "2"), ("x", ""), ("1", ""):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        refused(ranks.rank_of, "expected 0 <= RANK < WORLD_SIZE")


@pytest.mark.parametrize("eps, rms, warnings", [(1e-15, 1.0, 0), (3e-6, 0.25, 1)])
def test_an_eps_that_swallows_the_step_is_said_once(capsys, eps, rms, warnings):
    """AdamW's first step is g / (|g| + eps) of lr; gradients are tiny at video size: log-probs are means."""
    p, said = torch.nn.Parameter(torch.zeros(100)), set()
    p.grad = torch.full((100,), 1e-6)
    optimizer = torch.optim.AdamW([p], 0.1, eps=eps)
    optimizer.step()
    found = tell.sizes([p], optimizer, p.grad.norm())
    assert found == pytest.approx({"grad_norm": 1e-5, "grad_rms": 1e-6, "update_rms": rms}, rel=1e-4)
    [tell.warn_of_eps(found, eps, said) for _ in range(2)]
    assert capsys.readouterr().err.count("below 10 times eps") == warnings


def test_an_interruption_ends_a_command_in_one_line():
    def stop(config):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match="program: interrupted"):
        run_command("program", "What it is for.", {"run": (train.Config, stop, None)}, [])


def test_errors_in_one_line_and_streams_that_break():
    assert ranks.words_of(KeyError("x\ny")).startswith(r"KeyError: 'x\ny' (DEBUG=1 shows where)")
    assert ranks.words_of(RuntimeError("first\nsecond")) == "first"
    fail = lambda *_: os.write(-1, b"")
    print("x", file=ranks.Steady(SimpleNamespace(write=fail, flush=fail)), flush=True)
