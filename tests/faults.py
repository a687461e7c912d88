"""What happens to a training run when things go wrong; about ten minutes on one core.

    python tests/faults.py [WORD ...]      only the scenarios whose names hold one of the words

Prints a table, scenario | what happened | ok, and exits with 1 if one is not. It trains in the toy world for
real, in processes that are killed, stopped and starved of disk. As root, full and read-only disks are mounts.
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

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--conditions=2", "--members=2", "--steps=4", "--first=2", "--rooms=0", "--sample_every=100000",
         "--save_every=2", "--rewards=trans=1,rot=1", "--validate=0"]
STARTED = []


# ---- runs ----

def start(out, *args, python=(), env=None, prepare=None, cwd=ROOT, stdout=None):
    """A training run as a process; what it says is appended to <out>.err. It hears signals, also where this
    program was told to ignore them."""
    def child():
        for signum in (signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        if prepare:
            prepare()
    with open(f"{out}.err", "a") as err:
        command = [sys.executable, *python, str(ROOT / "train.py"), *SMALL, f"--out={out}",
                   f"--weights={ROOT / 'toy/weights'}", *args]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {})
        process = subprocess.Popen(command, cwd=cwd, stdout=stdout or err, stderr=stdout or err,
                                   preexec_fn=child, env=env)
    STARTED.append(process)
    return process


def start_ranks(out, ranks, *args):
    """The processes of a run on so many ranks, without torchrun."""
    if ranks == 1:
        return [start(out, *args)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [start(out, *args, env=env | {"RANK": str(rank)}) for rank in range(ranks)]


def torchrun(out, *args, restarts=0):
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return start(out, *args, python=["-m", "torch.distributed.run", *options])


def said(out, word):
    """The last line of a run's words that holds `word`, from there on; empty without one."""
    lines = Path(f"{out}.err").read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((x[x.index(word):].strip() for x in reversed(lines) if word in x), "")


def resumed_at(out):
    """The iteration that the last start went on from, as it says."""
    found = re.findall(r"; (\d+) of \d+ iterations done in", Path(f"{out}.err").read_text(errors="replace"))
    return int(found[-1]) if found else None


def wait_for(ready, process, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end or process.poll() is not None:
            raise RuntimeError(f"the run did not get that far (exit code {process.poll()})")
        time.sleep(0.002)


def logged(out):
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def newest(out):
    return max((int(f.name[-6:]) for f in out.glob("iteration_??????")), default=0)


def writing(out):
    """Whether a checkpoint is being written: its folder has a temporary name, as files of the log have too."""
    return any(path.is_dir() for path in out.glob(".geo-align-*.tmp"))


def same(a, b, iteration):
    """Whether two runs' checkpoints of an iteration are bitwise equal, optimiser included."""
    files = [f"iteration_{iteration:06d}/{name}.safetensors" for name in ("self_attn", "optimizer")]
    return all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


def workers(out):
    """{rank: process id} of the living processes that train into `out`; torchrun's own is -1."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(f"--out={out}") in (folder / "cmdline").read_bytes().split(b"\0"):
                rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + (folder / "environ").read_bytes())
                found[int(rank[1]) if rank else -1] = int(folder.name)
        except OSError:
            pass  # it has ended
    return found


def straight(folder, iterations, ranks=1):
    """The undisturbed run, to compare with."""
    out = folder / f"straight_{iterations}_{ranks}"
    codes = [p.wait(timeout=300) for p in start_ranks(out, ranks, f"--iterations={iterations}")]
    if codes != [0] * ranks:
        raise RuntimeError(f"undisturbed run: {codes} {said(out, 'error')}")
    return out


# ---- scenarios: folder -> what happened, whether that is right ----

def exact_resume(folder, ranks=1):
    """8 iterations = 3, kill -9, 5"""
    out = folder / "exact"
    processes = start_ranks(out, ranks, "--iterations=8", "--save_every=1")
    wait_for(lambda: newest(out) == 3, processes[0])
    for process in processes:
        process.kill()
    killed = [p.wait() for p in processes] == [-9] * ranks
    codes = [p.wait(timeout=300) for p in start_ranks(out, ranks, "--iterations=8", "--save_every=1")]
    equal = same(out, straight(folder, 8, ranks), 8)
    return f"resumed at {resumed_at(out)}; bitwise equal: {equal}", killed and equal and not any(codes)


def exact_resume_2_ranks(folder):
    """the same on 2 ranks"""
    return exact_resume(folder, 2)


def random_kills(folder, ranks=1, points=17):
    """kill -9 at 17 random moments"""
    out, g, lost, during, resumed = folder / "kills", random.Random(ranks), 0, 0, 0
    for point in range(points):
        there, log = newest(out), Path(f"{out}.err")
        log.write_text("")
        processes = start_ranks(out, ranks, "--iterations=100000")
        wait_for(lambda: resumed_at(out) is not None, processes[0])
        resumed += resumed_at(out) == there and "going on from" not in log.read_text()
        if point % 2:  # while a checkpoint is written
            wait_for(lambda: writing(out), processes[0])  # what the last kill left is gone
            time.sleep(g.uniform(0, 0.01))
        else:
            wait_for(lambda: point % 4 or logged(out) > there, processes[0])
            time.sleep(g.uniform(0, 1.5))
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        during += writing(out)
        lost = max(lost, logged(out) - newest(out))
    end = newest(out) + 1
    codes = [p.wait(timeout=300) for p in start_ranks(out, ranks, f"--iterations={end}")]
    equal = same(out, straight(folder, end, ranks), end)
    return (f"{points} kills, {during} of them in a checkpoint; {resumed} resumed from the newest one, "
            f"{lost} iterations lost at most, one every 2; {end} iterations bitwise equal to "
            f"no kill: {equal}",
            resumed == points and lost <= 2 and equal and not any(codes) and during >= points // 4)


def random_kills_2_ranks(folder):
    """kill -9 of both ranks at 8 random moments"""
    return random_kills(folder, 2, 8)


def signals(folder):
    """SIGTERM and SIGINT at 8 random moments"""
    out, g, codes, seconds, kept = folder / "signals", random.Random(0), [], 0.0, True
    for k in range(8):
        Path(f"{out}.err").write_text("")
        there, process = newest(out), start(out, "--iterations=100000", "--save_every=100000")
        wait_for(lambda: resumed_at(out) is not None, process)
        wait_for(lambda: k % 4 == 3 or logged(out) > there, process)
        time.sleep(g.uniform(0.2, 1.2))
        process.send_signal((signal.SIGTERM, signal.SIGINT)[k % 2])
        begun = time.monotonic()
        codes.append(process.wait(timeout=60))
        seconds = max(seconds, time.monotonic() - begun)
        kept &= logged(out) == newest(out)
    end = newest(out) + 1
    start(out, f"--iterations={end}").wait(timeout=300)
    equal = same(out, straight(folder, end), end)
    return (f"exit codes {sorted(set(codes))} after {seconds:.1f} s at most, nothing lost; {end} iterations "
            f"bitwise equal to no signal: {equal}", set(codes) == {75} and seconds < 30 and kept and equal)


def signal_to_torchrun(folder):
    """SIGTERM to torchrun"""
    out = folder / "torchrun"
    process = torchrun(out, "--iterations=100000", "--save_every=100000")
    wait_for(lambda: logged(out) >= 2, process)
    process.terminate()
    begun = time.monotonic()
    process.wait(timeout=60)
    seconds = time.monotonic() - begun
    return (f"checkpoint of iteration {newest(out)} of {logged(out)}; all ended in {seconds:.1f} s, "
            f"{len(workers(out))} processes left",
            newest(out) == logged(out) and seconds < 30 and not workers(out))


def dead_torchrun(folder):
    """kill -9 of torchrun itself"""
    out = folder / "dead"
    process = torchrun(out, "--iterations=100000", "--save_every=100000")
    wait_for(lambda: logged(out) >= 3, process)
    process.kill()
    process.wait()
    begun = time.monotonic()
    while workers(out) and time.monotonic() < begun + 30:
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    return (f"checkpoint of iteration {newest(out)} of {logged(out)}; all ended in {seconds:.1f} s, "
            f"{len(workers(out))} processes left", newest(out) == logged(out) and not workers(out))


def restart(folder):
    """kill -9 of a worker, --max-restarts=1"""
    out = folder / "restart"
    process = torchrun(out, "--iterations=12", restarts=1)
    wait_for(lambda: logged(out) >= 5, process)
    os.kill(workers(out)[1], signal.SIGKILL)
    code = process.wait(timeout=120)
    equal = same(out, straight(folder, 12, 2), 12)
    why = f" ({said(out, 'exitcode')})" if code else ""
    return (f"went on by itself at {resumed_at(out)}, exit code {code}{why}; bitwise equal: {equal}",
            code == 0 and equal and logged(out) == 12)


def gone(folder, rank, signum, timeout=8):
    out = folder / f"gone_{rank}_{signum}"
    process = torchrun(out, "--iterations=100000", f"--timeout={timeout}")
    wait_for(lambda: logged(out) >= 2, process)
    other = workers(out)[1 - rank]
    os.kill(workers(out)[rank], signum)
    begun = time.monotonic()
    wait_for(lambda: other not in workers(out).values(), process)
    seconds = time.monotonic() - begun
    code = process.wait(timeout=60)
    named = said(out, f"rank {rank} ended or hangs") or said(out, f"(exitcode: -{signum}) local_rank: {rank}")
    left = f"{len(workers(out))} processes left"
    return (f"the other ended in {seconds:.1f} s: {named[:40].split(':')[0] or 'unnamed'}; {left}",
            bool(named) and seconds < timeout + 10 and code != 0 and not workers(out))


def dead_rank(folder):
    """rank 1 dies"""
    return gone(folder, 1, signal.SIGKILL)


def hanging_rank(folder):
    """rank 1 hangs (SIGSTOP), --timeout=8"""
    return gone(folder, 1, signal.SIGSTOP)


def hanging_rank_0(folder):
    """rank 0 hangs (SIGSTOP), --timeout=8"""
    return gone(folder, 0, signal.SIGSTOP)


def full_disk(folder):
    """the disk fills up"""
    out = folder / "full"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "none", out]
    mounted = os.geteuid() == 0 and not subprocess.run(mount).returncode
    try:
        start(out, "--iterations=4").wait(timeout=120)
        before = newest(out), (out / "iteration_000004/state.json").read_bytes(), logged(out)
        prepare = None
        if mounted:  # all but a little
            free = shutil.disk_usage(out).free
            (out / "other").write_bytes(bytes(max(0, free - (1 << 20))))
        else:  # no file larger than 1 MB stands in for it
            prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        code = start(out, "--iterations=8", prepare=prepare).wait(timeout=120)
        error = said(out, "error:").replace(f"{folder}/", "")
        kept = before[0] == newest(out) and before[1] == (out / "iteration_000004/state.json").read_bytes()
        (out / "other").unlink(missing_ok=True)
        again = start(out, "--iterations=8").wait(timeout=120)
        how = "tmpfs" if mounted else "RLIMIT_FSIZE"
        on = again == 0 and newest(out) == 8
        return (f"{how}: exit code {code}, {error}; earlier results intact: {kept}; "
                f"with room again it went on: {on}",
                code == 1 and ("space" in error or "large" in error) and kept and on)
    finally:
        if mounted:
            subprocess.run(["umount", out])


def read_only(folder):
    """the output folder is read-only"""
    out = folder / "read_only"
    start(out, "--iterations=2").wait(timeout=120)
    files = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    if os.geteuid():
        out.chmod(0o500)
    elif subprocess.run(["mount", "--bind", out, out]).returncode:
        return "skipped: root may write anywhere, and mounting is not allowed", True
    else:
        subprocess.run(["mount", "-o", "remount,ro,bind", out])
    try:
        code = start(out, "--iterations=4").wait(timeout=120)
    finally:
        subprocess.run(["umount", out]) if not os.geteuid() else out.chmod(0o700)
    error, kept = said(out, "error:").replace(f"{folder}/", ""), files == {f: f.read_bytes() for f in files}
    ok = code == 1 and "read_only/lock" in error and kept
    return f"exit code {code}, {error}; earlier results intact: {kept}", ok


# ---- rewards, streams and folders that turn bad ----

def mine(folder, body, head=""):
    """--rewards with a reward of a user's own, which is called `turn` times so far."""
    file = folder / "mine.py"
    file.write_text(f"import itertools, os, random, signal, sys\nimport numpy as np, torch\n{head}\n"
                    f"turns = itertools.count()\ndef f(videos, scene):\n    turn = next(turns)\n    {body}\n"
                    "    return videos.float().mean((1, 2, 3, 4))\n")
    return f"--rewards=trans=1,{file}:f=1"


def failing_rewards(folder):
    """a reward raises TypeError, SystemExit(0), KeyboardInterrupt, MemoryError in the third iteration"""
    held, words = 0, []
    for k, error in enumerate(("TypeError('x')", "SystemExit(0)", "KeyboardInterrupt", "MemoryError")):
        out = folder / f"failing_{k}"
        code = start(out, "--iterations=9", "--save_every=100", "--reward_batch=0",
                     mine(folder, f"if turn >= 2: raise {error}")).wait(timeout=300)
        said_so = said(out, "error:")
        traced = "Traceback" in Path(f"{out}.err").read_text()
        held += code == 1 and newest(out) == 2 and error.split("(")[0] in said_so and not traced
        words.append(said_so[:40])
    return f"{held} of 4: exit code 1, one line, two iterations saved", held == 4


def lucky_rewards(folder):
    """a reward draws from torch's, numpy's and random's generators; kill -9 and resume"""
    reward = mine(folder, "return torch.rand(len(videos)) + random.random() + np.random.rand()")
    straight, out = folder / "straight", folder / "lucky"
    codes = [start(straight, "--iterations=4", reward).wait(timeout=300)]
    process = start(out, "--iterations=100000", reward)
    wait_for(lambda: newest(out) == 2, process)
    process.kill()
    process.wait()
    codes += [start(out, f"--iterations={max(4, newest(out))}", reward).wait(timeout=300)]
    equal = same(out, straight, 4)
    return f"resumed at {resumed_at(out)}; bitwise equal: {equal}", equal and codes == [0, 0]


def switching_rewards(folder):
    """a reward changes the directory, default dtype, environment and signals; --out is relative"""
    reward = mine(folder, "os.chdir('/'); torch.set_default_dtype(torch.float64); os.environ['HOME'] = ''; "
                          "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    (folder / "here").mkdir()
    process = start(folder / "here/run", "--out=run", reward, "--iterations=100000", "--save_every=1000",
                    cwd=folder / "here")
    out = folder / "here/run"
    wait_for(lambda: logged(out) >= 2, process)
    process.terminate()
    code = process.wait(timeout=120)
    warned = Path(f"{out}.err").read_text().count("; set back")
    return (f"{warned} warnings, SIGTERM heard (exit code {code}), {newest(out)} of {logged(out)} iterations saved "
            f"where --out says", code == 75 and warned == 4 and newest(out) == logged(out) >= 2)


def streams(folder):
    """stdout and stderr closed, a pipe whose reader leaves, /dev/full, and ASCII with a name of other letters"""
    held = []
    pipe = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    pipe.wait()
    cases = {"closed": dict(prepare=lambda: [os.close(fd) for fd in (0, 1, 2)]), "pipe": dict(stdout=pipe.stdin),
             "full": dict(stdout=open("/dev/full", "w")),
             "f\u00fcr\udcff\n\x1b[1m": dict(env={"PYTHONIOENCODING": "ascii"})}
    for name, options in cases.items():
        out = folder / name
        code = start(out, "--iterations=2", **options).wait(timeout=300)
        whole = (out / "log.jsonl").read_text().count("\n") == 2 if (out / "log.jsonl").exists() else False
        held.append(code == 0 and newest(out) == 2 and whole)
    return f"{sum(held)} of 4 ran to the end, exit code 0, log and checkpoint whole", all(held)


def hangup(folder):
    """SIGHUP; and SIGHUP under nohup"""
    out, other = folder / "hangup", folder / "nohup"
    process = start(out, "--iterations=100000", "--save_every=100000")
    wait_for(lambda: logged(out) >= 2, process)
    process.send_signal(signal.SIGHUP)
    code = process.wait(timeout=120)
    nohup = start(other, "--iterations=5", prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: logged(other) >= 1, nohup)
    nohup.send_signal(signal.SIGHUP)
    return (f"exit code {code}, {newest(out)} of {logged(out)} saved; under nohup it goes on",
            code == 75 and newest(out) == logged(out) and nohup.wait(timeout=300) == 0)


def early_signals(folder):
    """SIGINT at 8 moments of the first two seconds"""
    g, loud, codes = random.Random(0), 0, set()
    for k in range(8):
        out = folder / f"early_{k}"
        process = start(out, "--iterations=100000")
        time.sleep(g.uniform(0.1, 2))
        process.send_signal(signal.SIGINT)
        codes.add(process.wait(timeout=120))
        loud += "Traceback" in Path(f"{out}.err").read_text()
    return f"exit codes {sorted(codes)}, {loud} tracebacks", loud <= 1 and codes <= {-2, 75, 1}


def removed_folder(folder):
    """the out folder, or its log, is removed while running"""
    held = []
    for k, remove in enumerate((shutil.rmtree, lambda out: (out / "log.jsonl").unlink(),
                                lambda out: out.rename(out.with_name("moved")))):
        out = folder / f"removed_{k}"
        process = start(out, "--iterations=100000", "--save_every=100000")
        wait_for(lambda: logged(out) >= 2, process)
        remove(out)
        code = process.wait(timeout=120)
        saved = [*folder.glob(f"removed_{k}_rescued_*/iteration_*/state.json")]
        named = bool(saved) and str(saved[0].parent.parent) in Path(f"{out}.err").read_text()
        held.append(code == 1 and named and "removed or replaced" in said(out, "error:"))
    return f"{sum(held)} of 3: exit code 1, the iterations saved beside, where is said", all(held)


def different_ranks(folder):
    """rank 1 has another lr, another reward file, another base"""
    weights = folder / "weights"
    shutil.copytree(ROOT / "toy/weights", weights)
    base = bytearray((weights / "toy_base.safetensors").read_bytes())
    base[-1] ^= 1
    (weights / "toy_base.safetensors").write_bytes(base)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    rewards = [mine(folder / name, "pass", f"x = {k}") for k, name in enumerate("ab")]
    cases = {"lr": ([], ["--lr=1e-3"]), "code of rewards": rewards, "content of weights": ([], [f"--weights={weights}"])}
    held = []
    for k, (what, args) in enumerate(cases.items()):
        out = folder / f"different_{k}"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
        processes = [start(out, "--iterations=2", *([own] if isinstance(own, str) else own), env=env | {"RANK": f"{r}"})
                     for r, own in enumerate(args)]
        codes = [process.wait(timeout=300) for process in processes]
        held.append(codes == [1, 1] and said(out, f"rank 1: {what}") != "" and not out.exists())
    return f"{sum(held)} of 3 named with the rank, nothing written", all(held)


def foreign_listener(folder):
    """another program listens on MASTER_PORT, --timeout=8"""
    out = folder / "foreign"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
        begun = time.monotonic()
        processes = [start(out, "--iterations=2", "--timeout=8", env=env | {"RANK": str(r)}) for r in (0, 1)]
        codes = [process.wait(timeout=120) for process in processes]
    seconds = time.monotonic() - begun
    return (f"exit codes {codes} after {seconds:.0f} s; {said(out, 'error:')[:60]}",
            codes == [1, 1] and seconds < 60 and "Traceback" not in Path(f"{out}.err").read_text())


SCENARIOS = (failing_rewards, lucky_rewards, switching_rewards, streams, hangup, early_signals, removed_folder,
             different_ranks, foreign_listener, exact_resume, exact_resume_2_ranks, random_kills, random_kills_2_ranks, signals,
             signal_to_torchrun, dead_torchrun, restart, dead_rank, hanging_rank, hanging_rank_0, full_disk,
             read_only)


def main(words):
    bad, begun = [], time.monotonic()
    print("| scenario | what happened | ok |\n|---|---|---|", flush=True)
    for scenario in SCENARIOS:
        if words and not any(word in scenario.__name__ for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                what, ok = scenario(Path(folder))
            except (RuntimeError, subprocess.TimeoutExpired, KeyError, OSError) as error:
                what, ok = f"{type(error).__name__}: {error}", False
            finally:
                for process in STARTED:
                    process.kill() if process.poll() is None else None
                for out in Path(folder).iterdir():
                    for pid in workers(out).values():
                        os.kill(pid, signal.SIGKILL)
        bad += [] if ok else [scenario.__name__]
        print(f"| {scenario.__doc__} | {what} | {'yes' if ok else 'NO'} |", flush=True)
    print(f"\n{time.monotonic() - begun:.0f} s" + (f"; not ok: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
