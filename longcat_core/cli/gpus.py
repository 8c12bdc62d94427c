"""`longcat test-gpus`: whether several GPUs compute what one does."""

from __future__ import annotations

import argparse

from ..errors import LongCatError
from ..parallel.devices import devices_of
from ..parallel.self_test import check_several, report
from ..parallel.start import start
from .console import notes_from_warnings
from .models import device_of, gpus_of


def test_gpus(args: argparse.Namespace) -> int:
    """Print the checks as they end; 1 if one fails."""
    devices = devices_of(gpus_of(args), device_of(args.device))
    check_several(devices)
    failed = False
    with notes_from_warnings(), start(devices) as group:
        try:
            for line, failed in report(group):
                print(f"failed: {line}" if failed else line, flush=True)
        except LongCatError as error:
            # Of a rank that has ended or does not answer.
            failed = True
            print(f"failed: {error}", flush=True)
    return 1 if failed else 0
