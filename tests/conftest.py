"""What all tests share: one thread in every process, since sums are rounded alike then only; the
repository root on the path; signals as they were; how a refusal is read."""
import functools
import math
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from sampler import schedule  # noqa: E402


HANDLERS = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def signals():
    """A run of train.py within a fixture or test hears SIGINT and SIGTERM, and leaves them deaf."""
    def put_back():
        for s, handler in HANDLERS.items():
            signal.signal(s, handler)
    put_back()
    yield
    put_back()


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """policy -> a folder of tiny random weights in its official layout, written once: not to be changed."""
    import tiny_weights
    return functools.cache(lambda policy: tiny_weights.write(tmp_path_factory.mktemp(policy), policy=policy))


def refused(call, *words, error=ValueError):
    """The message of the error that call() raises: one line that holds every word."""
    with pytest.raises(error) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# ---- a small policy for the sampler and the objective ----

SHAPE = 4, 2, 3, 2  # of a latent
CURES = {"tau": {"tau": 0.45}, "t_max": {"tau": None, "t_max": "second"}}  # of sigma_t, infinite at t = 1


def cure(name, sigmas):
    """sde_step's options that keep its noise finite at t = 1; t_max is the schedule's second value."""
    return {key: float(sigmas[1]) if x == "second" else x for key, x in CURES[name].items()}


class Labels:
    """A condition as the sampler knows it: it slices and concatenates, here a label of 3 numbers per row."""
    def __init__(self, y):
        self.y = y

    def __getitem__(self, rows):
        return Labels(self.y[rows])

    @staticmethod
    def cat(conditions):
        return Labels(torch.cat([condition.y for condition in conditions]))


class Net(torch.nn.Module):
    """A small nonlinear policy; counts the rows it sees and its largest call."""
    def __init__(self, shape=SHAPE, seed=0, width=32):
        super().__init__()
        size = math.prod(shape)
        self.a = torch.nn.Parameter(normal(size + 4, width, seed=seed) / (size + 4) ** 0.5)
        self.b = torch.nn.Parameter(normal(width, size, seed=seed + 50) / width ** 0.5)
        self.rows = 0
        self.largest = 0

    def forward(self, x, t, condition):
        self.rows += len(x)
        self.largest = max(self.largest, len(x))
        y = condition.y.repeat_interleave(len(x) // len(condition.y), 0)
        h = torch.cat([x.flatten(1), y, t.reshape(-1, 1).expand(len(x), 1)], 1).to(self.a.dtype)
        return (torch.tanh(h @ self.a) @ self.b).view(x.shape)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def setting(C=3, steps=8, shift=5.0, seed=0):
    """Policy, condition of C rows, and the arguments that every rollout needs."""
    given = {"sigmas": schedule(steps, shift), "shape": SHAPE, "seed": seed,
             "condition_ids": list(range(10, 10 + C))}
    return Net(seed=seed), Labels(normal(C, 3, seed=100 + seed)), given


def close(a, b, tolerance=1e-5):
    """Equal up to a share of the largest element."""
    assert a.shape == b.shape
    assert not a.numel() or (a - b).abs().max() <= tolerance * b.abs().max()


def gaussian(t, mean, std):
    """For data N(mean, std^2) per element: a, b of the exact velocity v = E[eps - x_0 | x_t] = a x + b."""
    a = (t - (1 - t) * std ** 2) / ((1 - t) ** 2 * std ** 2 + t ** 2)
    return a, -mean - a * (1 - t) * mean
