"""What all tests share: one thread in every process, since sums are rounded alike then only; the
repository root on the path; signals as they were; how a refusal is read."""
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


@pytest.fixture(autouse=True)
def signals():
    """A run of train.py within a test hears SIGINT and SIGTERM, and leaves them deaf."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def refused(call, *words, error=ValueError):
    """The message of the error that call() raises: one line that holds every word."""
    with pytest.raises(error) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message
