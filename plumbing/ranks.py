"""Many processes, signals and the clock. With one process, each function is what it is for one."""
import ctypes
import hashlib
import os
import signal
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist


def connect(backend, timeout):
    """init_process_group for the rank and world size that torchrun names; timeout in seconds.

    torchrun's store outlives a restart, and in it the addresses of processes that are gone, which torch
    (2.13) may take for the new ones. So all goes under a name that only this start knows: rank 0 draws it,
    and tells whoever asks, under a name of the asker's own. TimeoutError names the ranks that do not come.
    """
    if dist.is_torchelastic_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: not to go on when torchrun is killed
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    mine, patience = uuid.uuid4().hex, min(timeout, 1800)
    end, missing = time.monotonic() + patience, set(range(1, ranks)) if rank == 0 else {0}
    name = mine if rank == 0 else None
    if rank > 0:
        store.set(f"asks/{rank}", mine)
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"rank {', '.join(map(str, sorted(missing)))} did not start in {patience:g} s")
        time.sleep(0.01)  # and look again, not wait in the store: so signals are heard
        if rank == 0:
            for r in missing:
                if store.check([f"asks/{r}"]):  # perhaps one that is gone asked: then the new one still will
                    store.set("told/" + store.get(f"asks/{r}").decode(), name)
            missing = {r for r in missing if not store.check([f"{name}/{r}"])}
        elif store.check([f"told/{mine}"]):
            name, missing = store.get(f"told/{mine}").decode(), ()
            store.set(f"{name}/{rank}", "heard")
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=timeout))


def rank_of():
    """(this process's rank, number of ranks), as torchrun names them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def launch(on_gpu, threads, timeout):
    """This rank's device, and the meeting of all ranks; threads: of the CPU (0: torch's choice)."""
    device = torch.device("cpu")
    if on_gpu and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
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
            raise RuntimeError(f"{what}: weights of rank {', '.join(map(str, odd))} differ from rank 0's")


def lost_contact(error):
    """Whether a RuntimeError is of a collective, which other ranks did not come to."""
    return "gloo" in str(error) or isinstance(error, dist.DistError)


def absent(wait=3):
    """After a collective failed: the ranks that do not come here in `wait` seconds, as they ended or hang.
    Known under torchrun, whose store outlives them."""
    store, ranks = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    try:
        store.set(f"came/{dist.get_rank()}", "")
        time.sleep(wait)
        return [str(rank) for rank in ranks if not store.check([f"came/{rank}"])]
    except dist.DistError:  # the store is gone too
        return []


# ---- signals and time ----

class Clock:
    """Seconds since the last call, by phase; waits for the device, so that no phase is blamed for another."""
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
    """SIGINT and SIGTERM raise Stop, but between `hold` and `release` they wait for the release.

    held: whether a half-done update is going on, so that the weights are of no iteration.
    """
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.held = False
        self.waiting = False
        for signum in self.SIGNALS:
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
    """From here on no signal matters; one that came during a collective is raised here, and dropped."""
    for signum in 2 * Interrupts.SIGNALS:
        try:
            signal.signal(signum, signal.SIG_IGN)
        except Stop:
            pass


# ---- the end of a process ----

def say_why(error):
    """One line for an error that ends the run; with DEBUG set, its traceback instead."""
    deafen()  # torchrun sends a signal while this still finds out who is gone
    if os.environ.get("DEBUG"):
        raise error
    known = dist.is_initialized() and dist.is_torchelastic_launched()
    gone = absent() if known and lost_contact(error) else []
    why = f"rank {', '.join(gone)} ended or hangs: " if gone else ""
    print(f"error: {why}{str(error).splitlines()[0]}", file=sys.stderr)


def end_process(code):
    """Exit at once where the communication's threads, or ranks that wait, would keep the process or abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code or rank_of()[1] > 1:
        os._exit(code)
