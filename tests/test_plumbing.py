"""What a run keeps and claims: its folder, checkpoints, log and inputs; what ranks compare; what is printed."""
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load, save

import train
from plumbing import checkpoint, files, guard, ranks
from plumbing.checkpoint import MOMENTS, STATE, WEIGHTS
from plumbing.settings import parse


class Policy:
    """One trained parameter, its optimiser after a step, and settings: what a checkpoint is made of."""
    def __init__(self, value=1.0):
        self.p = torch.nn.Parameter(torch.full((3,), value))
        self.trained = {"p": self.p}
        self.optimizer = torch.optim.AdamW([self.p])
        self.p.sum().backward()
        self.optimizer.step()

    def save(self, out, iteration, run="mine", keep=2):
        checkpoint.save_checkpoint(out, iteration, self.trained, self.optimizer, {"lr": 1.0, "keep": keep}, run=run)
        return out / f"iteration_{iteration:06d}"

    def resume(self, out, **made):
        return checkpoint.resume(out, self.trained, self.optimizer, {"lr": 1.0, "keep": 2} | made, ("keep",))

    def run(self, out, *args):
        config = parse(train.Config, [f"--out={out}", *args])
        return checkpoint.Run(config, self.trained, self.optimizer, [])


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


# ---- files and folders ----

@pytest.mark.parametrize("name", ["x", 250 * "a", "\udcff\n", "a" * 255])
def test_a_file_of_any_name_is_written_whole(tmp_path, name):
    files.write_file(tmp_path / name, b"1")
    files.write_json(tmp_path / name, {name: 1})
    assert files.read_json(tmp_path / name) == {name: 1} and len(os.listdir(tmp_path)) == 1
    assert files.printable(name).isprintable() and files.printable("\x1b[2J\n\udcff") == r"\x1b[2J\n\udcff"


def test_nothing_is_written_through_links(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("theirs")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("log.jsonl", "x.json"):
        (out / name).symlink_to(victim / "file")
    files.write_json(out / "x.json", 1)
    assert not (out / "x.json").is_symlink()
    with pytest.raises(ValueError, match="log.jsonl: expected a file, or nothing"):
        checkpoint.open_log(out / "log.jsonl", 0)
    (out / "samples").symlink_to(victim)
    with pytest.raises(ValueError, match="samples: a link to another folder"):
        files.lock_folder(out)
    (out / "samples").unlink()
    (out / "lock").symlink_to(victim / "file")
    with pytest.raises(OSError):
        files.lock_folder(out)
    assert tree(victim) == {"file": b"theirs"}


def test_only_own_leftovers_are_removed(tmp_path):
    for name in ("a.tmp", ".x.tmp", "checkpoint.tmp/b", "samples/c.tmp"):
        files.write_file(tmp_path / name, b"")
    before = tree(tmp_path)
    (files.temporary_name(tmp_path)).mkdir()
    files.temporary_name(tmp_path / "samples").write_bytes(b"half")
    files.remove_leftovers(tmp_path, "samples")
    assert tree(tmp_path) == before


HOLD = """
import sys; sys.path.insert(0, {root!r})
from plumbing.files import lock_folder
try:
    lock = lock_folder(sys.argv[1], patience=0.3)
    print("mine", flush=True); sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def test_a_claim_outlives_closed_descriptors_and_a_removed_lock(tmp_path):
    def another():
        command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, input="").stdout
    lock = files.lock_folder(tmp_path)
    open(tmp_path / "lock").close()  # POSIX locks would be gone now
    assert "another process is writing there" in another()
    (tmp_path / "lock").unlink()
    assert not files.is_still(lock, tmp_path / "lock")
    lock.close()
    assert another() == "mine\n"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", refuse)
    files.lock_folder(tmp_path).close()
    assert capsys.readouterr().err.count("has no locks (Operation not supported)") == 1


def test_contents_tell_not_places(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        for name in ("x", "sub/y", "z"):
            files.write_file(tmp_path / folder / name, name.encode() * 100)
    found = [files.digest_files((tmp_path / folder).rglob("[xyz]")) for folder in ("a", "b")]
    assert found[0] == found[1]
    monkeypatch.setattr(files, "PIECE", 7)
    assert files.digest_files((tmp_path / "a").rglob("[xyz]")) != found[0]  # pieces count, so:
    whole = files.digest_files((tmp_path / "a").rglob("[xyz]"))
    content = bytearray((tmp_path / "a/sub/y").read_bytes())
    content[250] ^= 1  # one bit, the same size
    (tmp_path / "a/sub/y").write_bytes(content)
    assert files.digest_files((tmp_path / "a").rglob("[xyz]")) != whole
    (tmp_path / "b/z").rename(tmp_path / "b/w")
    assert files.digest_files((tmp_path / "b").rglob("[wxyz]")) != whole


# ---- checkpoints ----

def test_rotation_removes_only_what_this_run_wrote(tmp_path):
    policy = Policy()
    (tmp_path / "iteration_-old-1").mkdir()
    files.write_file(tmp_path / "iteration_000000/notes.txt", b"mine")  # not a checkpoint
    (tmp_path / "iteration_000001").write_text("a file")
    policy.save(tmp_path, 2, run="another")
    files.write_file(policy.save(tmp_path, 3) / "notes.txt", b"mine")  # a checkpoint with notes of a user
    linked = policy.save(tmp_path / "elsewhere", 4)
    (tmp_path / "iteration_000004").symlink_to(linked)
    before = tree(tmp_path)
    for iteration in (5, 6, 999_999, 1_000_000, 1_000_001):
        policy.save(tmp_path, iteration)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    new = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert new == {"iteration_1000000", "iteration_1000001"} and Policy().resume(tmp_path) == 1_000_001


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_stands_in_a_checkpoints_place_is_moved_aside(tmp_path, kind, capsys):
    place = tmp_path / "iteration_000002"
    (tmp_path / "theirs").mkdir()
    {"file": lambda: place.write_text("theirs"), "link": lambda: place.symlink_to(tmp_path / "theirs"),
     "folder": lambda: files.write_file(place / "notes.txt", b"theirs")}[kind]()
    Policy().save(tmp_path, 2)
    aside = tmp_path / "iteration_000002.old1"
    assert os.path.lexists(aside) and "was there, now iteration_000002.old1" in capsys.readouterr().err
    assert Policy().resume(tmp_path) == 2 and Policy().resume(tmp_path / "theirs") == 0


def forge(folder, name, change):
    """Changes a checkpoint's tensors, and makes state.json vouch for them."""
    tensors = load((folder / name).read_bytes())
    (folder / name).write_bytes(save(change(tensors)))
    state = json.loads((folder / STATE).read_text())
    state["digests"][name] = files.digest((folder / name).read_bytes())
    (folder / STATE).write_text(json.dumps(state))


BAD_CHECKPOINTS = {  # what is done to its folder -> what is said
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), "self_attn.safetensors: missing"),
    "missing state": (lambda f: (f / STATE).unlink(), "state.json: missing"),
    "cut": (lambda f: (f / MOMENTS).write_bytes(b""), "optimizer.safetensors: damaged"),
    "state of a list": (lambda f: (f / STATE).write_text("[]"), "state.json: damaged"),
    "other type": (lambda f: forge(f, WEIGHTS, lambda x: {"p": x["p"].half()}), "other parameters"),
    "integers": (lambda f: forge(f, WEIGHTS, lambda x: {"p": x["p"].long()}), "p: expected finite"),
    "no moments": (lambda f: forge(f, MOMENTS, lambda x: {}), "other moments"),
    "one moment": (lambda f: forge(f, MOMENTS, lambda x: {"step.p": x["step.p"]}), "other moments"),
    "NaN moments": (lambda f: forge(f, MOMENTS, lambda x: x | {"exp_avg.p": x["exp_avg.p"] * torch.nan}),
                    "exp_avg.p: expected finite"),
    "infinite weights": (lambda f: forge(f, WEIGHTS, lambda x: {"p": x["p"] / 0}), "p: expected finite"),
    "other shape": (lambda f: forge(f, WEIGHTS, lambda x: {"p": x["p"][:2]}), "other parameters")}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_passed_over_or_refused(tmp_path, kind, capsys):
    change, message = BAD_CHECKPOINTS[kind]
    change(Policy(2.0).save(tmp_path, 4))
    policy = Policy()
    before, kept = tree(tmp_path), policy.p.detach().clone()
    with pytest.raises(ValueError, match=f"(?s){message}.*nothing is begun over them") as found:
        policy.resume(tmp_path)
    assert "\n" not in str(found.value) and before == tree(tmp_path) and torch.equal(policy.p, kept)
    older = Policy(3.0)
    older.save(tmp_path, 2)
    assert policy.resume(tmp_path) == 2 and torch.equal(policy.p, older.p)
    assert message in capsys.readouterr().err


def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    policy = Policy()
    policy.save(tmp_path, 2)
    policy.save(tmp_path, 4)
    real = type(tmp_path).read_bytes

    def read_bytes(self):
        if self.parent.name == "iteration_000004":
            raise OSError(5, "Input/output error", str(self))
        return real(self)
    monkeypatch.setattr(type(tmp_path), "read_bytes", read_bytes)
    with pytest.raises(OSError, match="Input/output error.*iteration_000004"):
        policy.resume(tmp_path)


def test_a_path_that_is_no_utf8(tmp_path):
    out = tmp_path / "\udcff"
    Policy().save(out, 2)
    assert Policy().resume(out) == 2 and checkpoint.find_checkpoint(out).name == WEIGHTS


# ---- the log ----

@pytest.mark.parametrize("text, iteration, kept, aside", [
    ('{"iteration": 0, "loss": 1}\n{"iteration": 1, "loss": 1}\n', 1, [0], False),  # 1 is made again
    ('{"iteration": 0, "loss": 1}\n{"iteration": 1, "lo', 1, [0], False),  # cut short by a kill
    ('{"iteration": 0, "loss": 1}\n{"iteration": 1}\n', 1, [0, 1], False),  # a note on the weights so far
    ('{"iteration": 0, "loss": 1}\n', 0, [], True),  # begun anew, over lines
    ('{"step": 0}\n{"iteration": 0, "loss": 1}\n', 1, [0], True),  # another program's
    ("a user's notes\n", 0, [], True), ('{"iteration": -3, "loss": 1}\n', 1, [], True),
    ('{"iteration": true}\nnull\n[]\n', 3, [], True)])
def test_a_log_loses_no_line_but_those_made_again(tmp_path, text, iteration, kept, aside):
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    checkpoint.open_log(log, iteration).close()
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == kept
    moved = tmp_path / "log.old1.jsonl"
    assert moved.exists() == aside and (not aside or moved.read_text() == text)


def record(iteration, **more):
    return {"iteration": iteration, "loss": 1.0, "skipped": 0} | more


@pytest.mark.parametrize("remove", [
    lambda out: (out / "log.jsonl").unlink(), lambda out: out.rename(out.with_name("moved")),
    lambda out: (out / "lock").unlink()])
def test_a_folder_removed_while_running(tmp_path, remove, capsys):
    run = Policy().run(tmp_path / "out")
    run.log(record(0))
    remove(tmp_path / "out")
    with pytest.raises(OSError, match="removed or replaced while the run goes on"):
        run.log(record(1))
    run.save_rest(half_done=True)  # the weights are whole: only the log's line is missing
    saved, = tmp_path.glob("out_rescued_*/iteration_000002/state.json")
    assert f"stopped after 2 iterations, saved in {saved.parent.parent}" in capsys.readouterr().err


def test_half_an_update_and_a_skipped_one_are_not_saved(tmp_path, capsys):
    run = Policy().run(tmp_path)
    run.log(record(0))
    run.save_rest(half_done=True)
    run.log(record(1, skipped=1, grad_norm=float("nan"), valid={"x": [float("inf")]}))
    run.save()
    run.save_rest(half_done=False)
    assert not list(tmp_path.glob("iteration_*")) and "0 of them, saved" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="last 1 updates were skipped"):
        run.finish()
    line = (tmp_path / "log.jsonl").read_text().splitlines()[1]
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["grad_norm"] is None


def test_a_sample_that_a_kill_cost_is_made_again(tmp_path):
    run = Policy().run(tmp_path, "--sample_every=2", "--iterations=5")
    due = []
    for done in range(6):
        run.done = done
        due += [done] if run.lacks_sample() else []
    files.write_file(tmp_path / "samples/iteration_000004.mp4", b"")
    run.done = 4
    assert due == [0, 2, 4, 5] and not run.lacks_sample()


# ---- inputs ----

def test_inputs_that_changed_under_the_same_name_are_noticed(tmp_path):
    class Reward:
        names = ("f",)
        code = b"1"

    def run(weights, content, rewards="a/my.py:f=1", **options):
        files.write_file(tmp_path / weights / "base", content)
        config = parse(train.Config, [f"--out={tmp_path / 'out'}", f"--weights={tmp_path / weights}",
                                      f"--rewards={rewards}"])
        policy = Policy()
        run = checkpoint.Run(config, policy.trained, policy.optimizer, [Reward],
                             {"weights": [tmp_path / weights / "base"]})
        run.log(record(run.done))
        run.save()
        run.lock.close()
    run("w1", b"base")
    run("w2", b"base", rewards="/elsewhere/my.py:f=1")  # the same, elsewhere
    with pytest.raises(RuntimeError, match="made with content of weights = "):
        run("w2", b"BASE")
    Reward.code = b"2"
    with pytest.raises(RuntimeError, match="made with code of rewards = "):
        run("w1", b"base")


def test_ranks_are_compared(monkeypatch):
    everyone = [{"lr": 1.0, "x": 2}, {"lr": 1.0, "x": 2}, {"lr": 3.0, "x": 2}]
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 3)

    def all_gather_object(found, mine):
        found[:] = [mine | other for other in everyone]
    monkeypatch.setattr(ranks.dist, "all_gather_object", all_gather_object)
    with pytest.raises(ValueError, match=r"rank 2: lr = 3.0, rank 0 has 1.0"):
        ranks.compare_ranks({"lr": 1.0})
    del everyone[2]["lr"]
    ranks.compare_ranks({"lr": 1.0})


@pytest.mark.parametrize("named", [dict(WORLD_SIZE="0"), dict(RANK="-1"), dict(RANK="2", WORLD_SIZE="2"),
                                   dict(RANK="x"), dict(RANK="1")])
def test_a_rank_that_torchrun_would_not_name(monkeypatch, named):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, x in named.items():
        monkeypatch.setenv(name, x)
    with pytest.raises(ValueError, match="expected 0 <= RANK < WORLD_SIZE"):
        ranks.rank_of()


# ---- what is printed ----

def test_errors_in_one_line():
    assert ranks.words_of(ValueError("a\nb\x1b[2J")) == r"a\nb\x1b[2J"
    assert ranks.words_of(RuntimeError("first\nsecond")) == "first"
    assert ranks.words_of(KeyError("x")) == "KeyError: 'x' (DEBUG=1 shows where)"
    assert ranks.words_of(ZeroDivisionError()).startswith("ZeroDivisionError")
    assert ranks.words_of(guard.Failed("y")).startswith("Failed: y")


def test_a_stream_that_breaks_ends_nothing():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")
    stream = ranks.Steady(Broken())
    print("x", file=stream, flush=True)
    closed = io.StringIO()
    closed.close()
    print("x", file=ranks.Steady(closed))
    assert ranks.Steady(io.StringIO()).write("abc") == 3
