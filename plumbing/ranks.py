"""Many processes, signals and the clock. With one process, each function is what it is for one."""
import ctypes
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.files import digest_files, printable


def connect(backend, timeout):
    """init_process_group for the rank and world size that torchrun names; timeout in seconds.

    torchrun's store outlives a restart, and in it the addresses of processes that are gone, which
    torch (2.13) may take for the new ones. So all goes under a name that only this start knows:
    rank 0 draws it, and tells whoever asks, under a name of the asker's own. TimeoutError names the
    ranks that do not come.
    """
    if dist.is_torchelastic_launched() and sys.platform == "linux":
        # PR_SET_PDEATHSIG: not to go on when torchrun is killed
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    patience = min(timeout, 1800)
    store, rank, ranks = rendezvous(patience)
    mine = uuid.uuid4().hex
    name = mine if rank == 0 else None
    missing = set(range(1, ranks)) if rank == 0 else {0}
    end = time.monotonic() + patience
    if rank > 0:
        store.set(f"asks/{rank}", mine)
    while missing:
        if time.monotonic() > end:
            late = ", ".join(map(str, sorted(missing)))
            raise TimeoutError(f"rank {late} did not start in {patience:g} s")
        time.sleep(0.01)  # and look again, not wait in the store: so signals are heard
        if rank == 0:
            for r in missing:
                # perhaps one that is gone asked: then the new one still will
                if store.check([f"asks/{r}"]):
                    store.set("told/" + store.get(f"asks/{r}").decode(), name)
            missing = {r for r in missing if not store.check([f"{name}/{r}"])}
        elif store.check([f"told/{mine}"]):
            name = store.get(f"told/{mine}").decode()
            missing = ()
            store.set(f"{name}/{rank}", "heard")
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank,
                            world_size=ranks, timeout=timedelta(seconds=timeout))


def rendezvous(patience):
    """(store, rank, ranks) of torchrun's environment. TimeoutError where nobody, or a stranger,
    answers there.

    In a thread of its own, as torch may wait for a stranger's answer for ever, deaf to signals.
    """
    found = []

    def ask():
        try:
            found.append(next(dist.rendezvous("env://", timeout=timedelta(seconds=patience))))
        except Exception as error:
            found.append(error)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    end = time.monotonic() + patience
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.05)
    if not found:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TimeoutError(f"{where}: no rank 0 answered in {patience:g} s; does another program "
                           "listen there?")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def rank_of():
    """(this process's rank, number of ranks), as torchrun names them; ValueError for what it would
    not."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1}
    named = {name: os.environ.get(name) or default for name, default in defaults.items()}
    try:
        rank, ranks = map(int, named.values())
    except ValueError:
        rank = 0
        ranks = 0
    if not 0 <= rank < ranks:
        raise ValueError(f"RANK={named['RANK']}, WORLD_SIZE={named['WORLD_SIZE']}: expected "
                         "0 <= RANK < WORLD_SIZE, as torchrun sets them")
    return rank, ranks


def own_device():
    """This rank's GPU, which it uses from now on; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def launch(on_gpu, threads, timeout):
    """This rank's device, and the meeting of all ranks; threads: of the CPU (0: torch's choice)."""
    device = own_device() if on_gpu else torch.device("cpu")
    if threads:
        torch.set_num_threads(threads)
    if rank_of()[1] > 1:
        connect("nccl" if device.type == "cuda" else "gloo", timeout)
    return device


def mean(tensor):
    """All ranks' mean of a tensor; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor


def largest(tensor):
    """All ranks' elementwise maximum of a tensor; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather(tensor):
    """(n, ...) of every rank -> (ranks n, ...), in rank order."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def assert_ranks_agree(parameters, what):
    """RuntimeError, on every rank, where weights are not bitwise the same on all of them."""
    content = b"".join(p.detach().float().cpu().numpy().tobytes() for p in parameters)
    content = hashlib.blake2b(content, digest_size=7).digest()
    mine = torch.tensor([int.from_bytes(content, "big")], device=parameters[0].device)
    if dist.is_initialized():
        all_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        odd = [i for i, x in enumerate(all_ranks) if x != all_ranks[0]]
        if odd:
            odd = ", ".join(map(str, odd))
            raise RuntimeError(f"{what}: weights of rank {odd} differ from rank 0's")


def compare_ranks(made):
    """ValueError, on every rank, that names the rank and the setting where what is done differs
    from rank 0's.

    made: name -> value. The program's own files and torch's version are compared too.
    """
    if not dist.is_initialized():
        return
    root = Path(__file__).parent.parent
    files = [file for folder in (".", "data", "evaluation", "plumbing", "pretrained", "toy")
             for file in (root / folder).glob("*.py")]
    mine = made | {"torch": torch.__version__, "the program's files": digest_files(files)}
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for rank, other in enumerate(every):
        for name in every[0].keys() | other.keys():
            if other.get(name) != every[0].get(name):
                raise ValueError(f"rank {rank}: {name} = {other.get(name)!r}, rank 0 has "
                                 f"{every[0].get(name)!r}; all ranks need the same settings and "
                                 "files")


def lost_contact(error):
    """Whether an error is of a collective, which other ranks did not come to."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_gloo or isinstance(error, dist.DistError)


def absent(wait=3):
    """After a collective failed: the ranks that do not come here in `wait` seconds, as they ended
    or hang. Known under torchrun, whose store outlives them."""
    store = dist.distributed_c10d._get_default_store()
    ranks = range(dist.get_world_size())
    try:
        store.set(f"came/{dist.get_rank()}", "")
        time.sleep(wait)
        return [str(rank) for rank in ranks if not store.check([f"came/{rank}"])]
    except dist.DistError:  # the store is gone too
        return []


# ---- signals and time ----

class Clock:
    """Seconds since the last call, by phase; waits for the device, so that no phase is blamed for
    another."""
    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = time.perf_counter()

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now

    def record(self):
        """The seconds by phase, for the log."""
        return {f"seconds/{phase}": round(s, 4) for phase, s in self.seconds.items()}


class Stop(BaseException):
    """A signal asked the run to end: the step is abandoned, the last finished one saved."""


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP raise Stop, but between `hold` and `release` they wait for the
    release.

    held: whether a half-done update is going on, so that the weights are of no iteration. A signal
    that is ignored when the program starts, as nohup has it, stays ignored.
    """
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.held = False
        self.waiting = False
        for signum in self.SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._hear)

    def _hear(self, signum, frame):
        self.waiting = True
        if not self.held:
            raise Stop

    def hold(self):
        self.held = True

    def release(self):
        self.held = False
        if self.waiting:
            raise Stop


def deafen():
    """From here on no signal matters; one that came during a collective is raised here, and
    dropped."""
    for signum in 2 * Interrupts.SIGNALS:
        try:
            signal.signal(signum, signal.SIG_IGN)
        except Stop:
            pass


# ---- the ends of a process ----

class Steady:
    """A stream whose reader may go away: what cannot be written is dropped, and ends nothing."""
    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._try(self._stream.write, text)

    def flush(self):
        return self._try(self._stream.flush)

    def _try(self, act, *args):
        try:
            return act(*args)
        except BrokenPipeError:
            # or python's end complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except (OSError, ValueError):
            pass


def steady_streams():
    """From here on a closed, full or ASCII-only terminal ends nothing: names are escaped, the rest
    is dropped."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: or the next file opened would get what is printed
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Steady):
            setattr(sys, name, Steady(stream))


def run_to_end(main, argv):
    """A training program from its command line to its exit code: 0 done, 1 failed, 75 stopped by a
    signal."""
    steady_streams()
    try:
        main(argv)
        code = 0
    except Stop:
        code = 75
    except BaseException as error:
        say_why(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may wait in a collective that this one has left, and the communication's threads
    # may abort an interpreter that ends by itself.
    if code or rank_of()[1] > 1:
        os._exit(code)


def say_why(error):
    """One line for an error that ends the run; with DEBUG set, its traceback."""
    deafen()  # torchrun sends a signal while this still finds out who is gone
    if os.environ.get("DEBUG"):
        traceback.print_exception(error)
    known = dist.is_initialized() and dist.is_torchelastic_launched()
    gone = absent() if known and lost_contact(error) else []
    why = f"rank {', '.join(gone)} ended or hangs: " if gone else ""
    print(f"error: {why}{words_of(error)}", file=sys.stderr)


def words_of(error):
    """An error in one line: ours and the system's as they are, any other with its kind and where to
    look."""
    if isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError):
        return printable(error)
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, RuntimeError):
        return printable(first)
    return printable(f"{type(error).__name__}: {first} (DEBUG=1 shows where)")
