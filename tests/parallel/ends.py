"""A group that tests end: `python -m tests.parallel.ends` prints the processes of its workers, and then waits.

`torchrun -m tests.parallel.ends sum` starts all of them, and ends by itself.
"""

from __future__ import annotations

import signal
import sys

import torch

from longcat_core.parallel.devices import devices_of
from longcat_core.parallel.group import Group
from longcat_core.parallel.start import release, start
from longcat_core.parallel.torchrun import torchrun_rank, torchrun_size
from longcat_core.parallel.worker import join

from ..support.ranks import SERVE
from .work import do, process_of, sum_of_shares, waits


def run(group: Group) -> None:
    if sys.argv[1:] == ["sum"]:
        print(do(group, sum_of_shares, [1.0]).tolist(), flush=True)
        return
    print(*do(group, process_of), flush=True)
    do(group, waits)


if __name__ == "__main__":
    if torchrun_rank():
        join()
        sys.exit()
    # A shell lets its background jobs ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if sys.argv[1:] != ["nothing"]:
            with start(devices_of(None if torchrun_size() else 2, torch.device("cpu")), SERVE) as group:
                run(group)
        release()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
