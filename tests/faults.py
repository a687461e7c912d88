"""What happens to a training run when things go wrong; about ten minutes on one core.

    python tests/faults.py [WORD ...]      only the faults whose names hold one of the words

Prints a table, fault | what happened | ok, and exits with 1 if one is not. It trains in the toy
world for real, in processes that are killed, stopped and starved of disk. As root, full and
read-only disks are mounts. What needs no run of its own is in test_train, _plumbing, _rewards.
"""
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--conditions=2", "--members=2", "--steps=4", "--first=2", "--rooms=0", "--save_every=2",
         "--sample_every=100000", "--rewards=trans=1,rot=1", "--validate=0"]
FOREVER, SELDOM = "--iterations=100000", "--save_every=100000"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
STARTED = []
LISTENER = socket.create_server(("127.0.0.1", 0))  # another program's


class Run:
    """A training run: its processes, what they say, and what they leave in their folder `out`."""

    def __init__(self, out):
        self.out = out
        self.err = Path(f"{out}.err")

    def start(self, *args, ranks=1, restarts=None, prepare=None, env=None, stdout=None):
        """So many ranks without torchrun; or with it, where `restarts` are given, two. They hear
        signals, also where this program was told to ignore them."""
        def child():
            for signum in (SIGINT, SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            if prepare:
                prepare()
        launcher = [] if restarts is None else [*TORCHRUN, f"--max-restarts={restarts}"]
        command = [sys.executable, *launcher, ROOT / "train.py", *SMALL, f"--out={self.out}",
                   f"--weights={ROOT / 'toy/weights'}", *args]
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                     "WORLD_SIZE": str(ranks)}
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (place if ranks > 1 else {}) | (env or {})
        with open(self.err, "a") as err:
            self.processes = [subprocess.Popen(
                command, cwd=ROOT, stdout=stdout or err, stderr=stdout or err, preexec_fn=child,
                env=os.environ | env | ({"RANK": str(rank)} if ranks > 1 else {})) for rank in range(ranks)]
        STARTED.extend(self.processes)
        return self

    def until(self, ready, seconds=300):
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end or self.processes[0].poll() is not None:
                raise RuntimeError(f"it did not get that far (exit code {self.processes[0].poll()})")
            time.sleep(0.002)

    def send(self, signum):
        for process in self.processes:
            process.send_signal(signum)

    def ended(self):
        return [process.wait(timeout=300) for process in self.processes]

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

    def equals_undisturbed(self, iteration, *args, ranks=1):
        """Whether weights and optimiser are bitwise those of a run that nothing befell."""
        straight = Run(self.out.with_name("straight"))
        codes = straight.start(f"--iterations={iteration}", *args, ranks=ranks).ended()
        files = [f"iteration_{iteration:06d}/{name}.safetensors" for name in ("self_attn", "optimizer")]
        same = [(self.out / f).read_bytes() == (straight.out / f).read_bytes() for f in files]
        return codes == [0] * ranks and all(same)

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


def own_reward(folder, body):
    """--rewards with a reward of a user's own, which was called `turn` times before."""
    (folder / "mine.py").write_text(
        f"import itertools, random\nimport numpy as np, torch\nturns = itertools.count()\n"
        f"def f(videos, scene):\n    turn = next(turns)\n    {body}\n"
        "    return videos.float().mean((1, 2, 3, 4))\n")
    return f"--rewards=trans=1,{folder / 'mine.py'}:f=1"


def interrupted(folder, times=1, ranks=1, signals=(SIGKILL,), code=-9, lost=2, reward="", args=()):
    """Stopped at random moments, it goes on from its newest checkpoint each time, loses `lost`
    iterations at most, and ends where a run without interruption does, bit by bit."""
    run, g = Run(folder / "run"), random.Random(ranks)
    args = [*args, own_reward(folder, reward)] if reward else args
    codes, seconds, most, during, resumed = set(), 0, 0, 0, 0
    for k in range(times):
        there = run.newest()
        run.err.write_text("")
        run.start(FOREVER, *args, ranks=ranks).until(lambda: run.resumed_at() >= 0)
        resumed += run.resumed_at() == there and not run.said("going on from")
        if code == -9 and k % 2:  # while a checkpoint is written
            run.until(run.writing)
            time.sleep(g.uniform(0, 0.01))
        else:
            run.until(lambda: k % 4 == 2 or run.logged() > there + 2 * (times == 1))
            time.sleep(g.uniform(0, 1.5))
        run.send(signals[k % len(signals)])
        begun = time.monotonic()
        codes |= set(run.ended())
        seconds = max(seconds, time.monotonic() - begun)
        during += run.writing()
        most = max(most, run.logged() - run.newest())
    end = max(8, run.newest() + 1)
    went_on = run.start(f"--iterations={end}", *args, ranks=ranks).ended() == [0] * ranks
    equal = went_on and run.equals_undisturbed(end, *args, ranks=ranks)
    ok = equal and resumed == times and most <= lost and codes == {code} and seconds < 30
    return (f"{times} times, {during} in a checkpoint, exit codes {codes} after {seconds:.1f} s at most; "
            f"{resumed} resumed from the newest, {most} iterations lost at most; {end} iterations bitwise "
            f"equal to no interruption: {equal}", ok and (code != -9 or during >= times // 4))


def wrong(folder, args=(FOREVER, SELDOM), options=dict, reward="", after=0, do=None, codes=(0,), saved=None,
          says=(), seconds=300, also=lambda run: True):
    """Something befalls it from the start, or after so many iterations; all its processes end in time
    with one of these exit codes. saved: iterations; None: all that it logged; (): any; says: one of these
    words; also: what else must be. Without torchrun there is no traceback."""
    run = Run(folder / "run")
    args = [*args, own_reward(folder, reward)] if reward else args
    options = options()
    run.start(*args, **options)
    if do:
        run.until(lambda: run.logged() >= after)
        do(run)
    begun = time.monotonic()
    found = run.ended()
    while run.workers() and time.monotonic() < begun + seconds:
        time.sleep(0.05)
    took, left = time.monotonic() - begun, len(run.workers())
    words = next(filter(None, map(run.said, says)), "")
    wanted = run.logged() if saved is None else saved
    ok = [set(found) <= set(codes), saved == () or run.newest() == wanted, took < seconds, not left,
          saved is not None or wanted >= after, words or not says, also(run),
          "restarts" in options or not run.said("Traceback")]
    return (f"exit codes {found} after {took:.1f} s, {run.newest()} of {run.logged()} iterations saved, {left} "
            f"processes left; {words.replace(f'{folder}/', '')[:60]}", all(ok))


def bad_disk(folder, mount, spoil, mend, instead, says):
    """It ends with one line, what was there stays, and with a good disk it goes on. Where nothing can be
    mounted, `instead` stands for a mount that is spoilt."""
    run = Run(folder / "run")
    run.out.mkdir()
    mounted = not os.geteuid() and not subprocess.run([*mount, run.out]).returncode
    if not (mounted or os.geteuid() or "tmpfs" in mount):
        return "skipped: root may write anywhere, and mounting is not allowed", True
    contents = lambda: {f: f.read_bytes() for f in run.out.glob("iteration_000004/*")}
    try:
        run.start("--iterations=4").ended()
        before = contents()
        spoil(run.out) if mounted else None
        code = run.start("--iterations=8", prepare=None if mounted else lambda: instead(run.out)).ended()
        error = run.said("error:").replace(f"{folder}/", "")
        kept = len(before) > 1 and before == contents()
        mend(run.out)
        on = run.start("--iterations=8").ended() == [0] and run.newest() == 8
        return (f"exit code {code}, {error}; earlier results intact: {kept}; then it went on: {on}",
                code == [1] and any(word in error for word in says) and kept and on)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", run.out])


TERM, KILL, HANGUP = (lambda run, signum=signum: run.send(signum) for signum in (SIGTERM, SIGKILL, SIGHUP))


def lose(rank, signum, wait=18):
    """One of torchrun's workers is killed or hangs; the other has ended within `wait` seconds."""
    def do(run):
        other = run.workers()[1 - rank]
        os.kill(run.workers()[rank], signum)
        run.until(lambda: not wait or other not in run.workers().values(), wait)
    return do


def left_pipe():
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def rescued(run):
    """Whether its iterations were saved beside, where is said."""
    saved = [*run.out.parent.glob("run_rescued_*/iteration_*/state.json")]
    return bool(saved) and run.said(str(saved[0].parent.parent)) != ""


AGENT = lambda: dict(restarts=0)
ANY = range(-64, 256)  # exit codes: torchrun's own mean little
FAULTS = [
    *[("failing_rewards", f"a reward raises {error} in the third iteration", wrong, dict(
        args=["--iterations=9", SELDOM, "--reward_batch=0"], reward=f"if turn >= 2: raise {error}",
        codes=(1,), saved=2, says=[error.split("(")[0]]))
      for error in ("TypeError('x')", "SystemExit(0)", "KeyboardInterrupt", "MemoryError")],
    ("lucky_rewards", "a reward draws from three generators; kill -9", interrupted, dict(
        reward="return torch.rand(len(videos)) + random.random() + np.random.rand()")),
    *[("streams", f"stdout and stderr: {what}", wrong, dict(args=["--iterations=2"], options=options, saved=2))
      for what, options in (
          ("closed", lambda: dict(prepare=lambda: [os.close(fd) for fd in (0, 1, 2)])),
          ("a pipe whose reader has left", lambda: dict(stdout=left_pipe())),
          ("/dev/full", lambda: dict(stdout=open("/dev/full", "w"))),
          ("ASCII", lambda: dict(env={"PYTHONIOENCODING": "ascii"})))],
    ("hangup", "SIGHUP", wrong, dict(after=2, do=HANGUP, codes=(75,))),
    ("hangup", "SIGHUP under nohup", wrong, dict(
        args=["--iterations=5"], after=1, do=HANGUP, saved=5,
        options=lambda: dict(prepare=lambda: signal.signal(SIGHUP, signal.SIG_IGN)))),
    *[("early_signals", f"SIGINT after {x} s", wrong, dict(
        do=lambda run, x=x: [time.sleep(x), run.send(SIGINT)], codes=(-2, 75, 1)))
      for x in (0.6, 0.8, 1.0, 1.2, 1.5, 1.8)],
    ("removed_folder", "the out folder is removed", wrong, dict(
        after=2, do=lambda run: shutil.rmtree(run.out), codes=(1,), saved=0, says=["removed or replaced"],
        also=rescued)),
    ("foreign_listener", "another program listens on MASTER_PORT", wrong, dict(
        args=["--iterations=2", "--timeout=8"], codes=(1,), saved=0, says=["error:"], seconds=60,
        options=lambda: dict(ranks=2, env={"MASTER_PORT": str(LISTENER.getsockname()[1])}))),
    ("exact_resume_2_ranks", "8 iterations = 3, kill -9, 5; 2 ranks", interrupted, dict(ranks=2)),
    ("random_kills", "kill -9 at 17 random moments", interrupted, dict(times=17)),
    ("random_kills_2_ranks", "kill -9 of both ranks at 8 of them", interrupted, dict(times=8, ranks=2)),
    ("signals", "SIGTERM and SIGINT at 8 random moments", interrupted, dict(
        times=8, signals=(SIGTERM, SIGINT), code=75, lost=0, args=[SELDOM])),
    ("signal_to_torchrun", "SIGTERM to torchrun", wrong, dict(
        options=AGENT, after=2, do=TERM, codes=ANY, seconds=30)),
    ("dead_torchrun", "kill -9 of torchrun itself", wrong, dict(
        options=AGENT, after=3, do=KILL, codes=(-9,), seconds=30)),
    ("restart", "kill -9 of a worker, --max-restarts=1", wrong, dict(
        args=["--iterations=12"], options=lambda: dict(restarts=1), after=5, do=lose(1, SIGKILL, 0),
        saved=12, also=lambda run: run.equals_undisturbed(12, ranks=2))),
    *[(name, what, wrong, dict(
        args=[FOREVER, "--timeout=8"], options=AGENT, after=2, do=lose(rank, signum), codes=ANY, saved=(),
        says=[f"rank {rank} ended or hangs", f"(exitcode: -{int(signum)}) local_rank: {rank}"]))
      for name, what, rank, signum in (
          ("dead_rank", "rank 1 dies", 1, SIGKILL), ("hanging_rank", "rank 1 hangs", 1, SIGSTOP),
          ("hanging_rank_0", "rank 0 hangs", 0, SIGSTOP))],
    ("full_disk", "the disk fills up", bad_disk, dict(
        mount=["mount", "-t", "tmpfs", "-o", "size=60m", "none"], says=["space", "large"],
        spoil=lambda out: (out / "other").write_bytes(bytes(shutil.disk_usage(out).free - (1 << 20))),
        mend=lambda out: (out / "other").unlink(missing_ok=True),
        instead=lambda out: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))),
    ("read_only", "the output folder is read-only", bad_disk, dict(
        mount=["sh", "-c", 'mount --bind "$0" "$0"'], says=["run/lock"],
        spoil=lambda out: subprocess.run(["mount", "-o", "remount,ro,bind", out]),
        mend=lambda out: out.chmod(0o700) if os.geteuid() else subprocess.run(
            ["mount", "-o", "remount,rw,bind", out]), instead=lambda out: out.chmod(0o500)))]


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
                for process in STARTED:
                    process.kill() if process.poll() is None else None
        bad += [] if ok else [title]
        print(f"| {title} | {what} | {'yes' if ok else 'NO'} |", flush=True)
    print(f"\n{time.monotonic() - begun:.0f} s" + (f"; not ok: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
