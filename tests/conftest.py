"""One thread in every process, since sums are rounded alike then only; the repository root on the path."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
