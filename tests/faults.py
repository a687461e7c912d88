"""What happens to a training run when things go wrong; about ten minutes on one core.

    python tests/faults.py [WORD ...]      only the faults whose names hold one of the words

Prints a table, fault | what happened | ok, and exits with 1 if one is not. It trains in the toy
world for real, in processes that are killed and stopped. What needs no run of its
own is in test_train, _plumbing, _rewards.
"""
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--conditions=2", "--members=2", "--steps=4", "--first=2", "--rooms=0", "--save_every=2",
         "--sample_every=100000", "--rewards=trans=1,rot=1", "--validate=0",
         f"--weights={ROOT / 'toy/weights'}"]
FOREVER, SELDOM = "--iterations=100000", "--save_every=100000"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class Run:
    """A training run: its process, what it says, and what it leaves in its folder `out`."""

    def __init__(self, out):
        self.out = out
        self.err = Path(f"{out}.err")

    def start(self, *args, restarts=None):
        """One rank; or where `restarts` are given, two under torchrun. They hear signals, also where
        this program was told to ignore them."""
        def child():
            for signum in (SIGINT, SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
        launcher = [] if restarts is None else [*TORCHRUN, f"--max-restarts={restarts}"]
        command = [sys.executable, *launcher, ROOT / "train.py", *SMALL, f"--out={self.out}", *args]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.err, "a") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=err, stderr=err,
                                            preexec_fn=child)
        return self

    def until(self, ready, seconds=300):
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"it did not get that far (exit code {self.process.poll()})")
            time.sleep(0.002)

    def ended(self):
        return self.process.wait(timeout=300)

    def said(self, word):
        """The last line that holds `word`, from there on; empty without one."""
        lines = re.findall(f"{re.escape(word)}.*", self.err.read_text(errors="replace").replace("\r", "\n"))
        return lines[-1].strip() if lines else ""

    def resumed_at(self):
        """The iteration that it went on from, as it says; -1 before that."""
        found = re.findall(r"; (\d+) of \d+ iterations done in", self.err.read_text(errors="replace"))
        return int(found[-1]) if found else -1

    def logged(self):
        log = self.out / "log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def newest(self):
        return max((int(f.name[-6:]) for f in self.out.glob("iteration_??????")), default=0)

    def writing(self):
        """Whether a checkpoint is being written: a folder of a temporary name."""
        return any(path.is_dir() for path in self.out.glob(".geo-align-*.tmp"))

    def equals_undisturbed(self, iteration, restarts=None):
        """Whether weights and optimiser are bitwise those of a run that nothing befell."""
        straight = Run(self.out.with_name("straight"))
        code = straight.start(f"--iterations={iteration}", restarts=restarts).ended()
        files = [f"iteration_{iteration:06d}/{name}.safetensors" for name in ("self_attn", "optimizer")]
        same = [(self.out / f).read_bytes() == (straight.out / f).read_bytes() for f in files]
        return code == 0 and all(same)

    def workers(self):
        """{rank: process id} of the living processes that train; torchrun's own is -1."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.fsencode(f"--out={self.out}") in (folder / "cmdline").read_bytes().split(b"\0"):
                    rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + (folder / "environ").read_bytes())
                    found[int(rank[1]) if rank else -1] = int(folder.name)
            except OSError:
                pass  # it has ended
        return found


def killed(folder, times):
    """At random moments, it goes on from its newest checkpoint each time, loses two iterations at
    most, and ends where a run without interruption does, bit by bit."""
    run, g = Run(folder / "run"), random.Random(0)
    most, resumed = 0, 0
    for k in range(times):
        there = run.newest()
        run.err.write_text("")
        run.start(FOREVER).until(lambda: run.resumed_at() >= 0)
        resumed += run.resumed_at() == there and not run.said("going on from")
        if k % 2:  # while a checkpoint is written
            run.until(run.writing)
            time.sleep(g.uniform(0, 0.01))
        else:
            run.until(lambda: k % 4 == 2 or run.logged() > there)
            time.sleep(g.uniform(0, 1.5))
        run.process.kill()
        run.ended()
        most = max(most, run.logged() - run.newest())
    end = max(8, run.newest() + 1)
    equal = run.start(f"--iterations={end}").ended() == 0 and run.equals_undisturbed(end)
    return (f"{times} times; {resumed} resumed from the newest, {most} iterations lost at most; {end} "
            f"iterations bitwise equal to no interruption: {equal}",
            equal and resumed == times and most <= 2)


def wrong(folder, do, codes, after=2, saved=None, args=(FOREVER, SELDOM), restarts=0, says=(),
          also=lambda run: True):
    """Something befalls it after so many iterations; all its processes end, with one of these exit
    codes. saved: iterations; None: all that it logged; (): any; says: one of these words; also: what
    else must be."""
    run = Run(folder / "run").start(*args, restarts=restarts)
    run.until(lambda: run.logged() >= after)
    do(run)
    begun = time.monotonic()
    code = run.ended()
    while run.workers() and time.monotonic() < begun + 30:
        time.sleep(0.05)
    left = len(run.workers())
    words = next(filter(None, map(run.said, says)), "")
    wanted = run.logged() if saved is None else saved
    ok = [code in codes, saved == () or run.newest() == wanted, not left, words or not says, also(run)]
    return (f"exit code {code}, {run.newest()} of {run.logged()} iterations saved, {left} processes left; "
            f"{words[:60]}", all(ok))


def sent(signum, seconds=0):
    """A signal to the process that was started, so many seconds later."""
    return lambda run: [time.sleep(seconds), run.process.send_signal(signum)]


def lose(rank, signum, wait=18):
    """One of torchrun's workers is killed or hangs; the other has ended within `wait` seconds."""
    def do(run):
        other = run.workers()[1 - rank]
        os.kill(run.workers()[rank], signum)
        run.until(lambda: not wait or other not in run.workers().values(), wait)
    return do


ANY = range(-64, 256)  # exit codes: torchrun's own mean little
FAULTS = [
    ("random_kills", "kill -9 at 17 random moments", killed, dict(times=17)),
    ("hangup", "SIGHUP", wrong, dict(do=sent(SIGHUP), codes=(75,), restarts=None)),
    *[("early_signals", f"SIGINT after {x} s", wrong, dict(
        do=sent(SIGINT, x), after=0, codes=(-2, 75, 1), restarts=None,
        also=lambda run: not run.said("Traceback"))) for x in (0.6, 0.8, 1.0, 1.2, 1.5, 1.8)],
    ("signal_to_torchrun", "SIGTERM to torchrun", wrong, dict(do=sent(SIGTERM), codes=ANY)),
    ("dead_torchrun", "kill -9 of torchrun itself", wrong, dict(do=sent(SIGKILL), codes=(-9,))),
    ("restart", "kill -9 of a worker, --max-restarts=1", wrong, dict(
        args=["--iterations=12"], restarts=1, after=5, do=lose(1, SIGKILL, 0), codes=(0,),
        saved=12, also=lambda run: run.equals_undisturbed(12, restarts=0))),
    *[(name, what, wrong, dict(
        args=[FOREVER, "--timeout=8"], do=lose(rank, signum), codes=ANY, saved=(),
        says=[f"rank {rank} ended or hangs", f"(exitcode: -{int(signum)}) local_rank: {rank}"]))
      for name, what, rank, signum in (
          ("dead_rank", "rank 1 dies", 1, SIGKILL), ("hanging_rank", "rank 1 hangs", 1, SIGSTOP),
          ("hanging_rank_0", "rank 0 hangs", 0, SIGSTOP))]]


def main(words):
    bad, begun = [], time.monotonic()
    print("| fault | what happened | ok |\n|---|---|---|", flush=True)
    for name, title, harness, arguments in FAULTS:
        if words and not any(word in name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                what, ok = harness(Path(folder), **arguments)
            except (RuntimeError, subprocess.TimeoutExpired, KeyError, OSError) as error:
                what, ok = f"{type(error).__name__}: {error}", False
            finally:
                for pid in Run(Path(folder, "run")).workers().values():
                    os.kill(pid, SIGKILL)
        bad += [] if ok else [title]
        print(f"| {title} | {what} | {'yes' if ok else 'NO'} |", flush=True)
    print(f"\n{time.monotonic() - begun:.0f} s" + (f"; not ok: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
