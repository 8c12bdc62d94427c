"""A rank 0 that tests end: `python -m tests.parallel.ends` prints the processes of its workers, and then waits."""

from __future__ import annotations

import sys

import torch

from longcat_core.parallel.start import start

from ..support.ranks import SERVE
from .work import do, process_of, waits

if __name__ == "__main__":
    try:
        with start([torch.device("cpu")] * 2, SERVE) as group:
            print(*do(group, process_of), flush=True)
            do(group, waits)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
