"""`longcat convert`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..checkpoints import convert as conversion
from ..checkpoints.convert import LayerError
from ..files.atomic import atomic_path
from ..files.places import check_place
from .console import Progress


def convert(args: argparse.Namespace) -> int:
    """Write a checkpoint in another form. The file is read back and measured before it gets its name."""
    if args.report is not None:
        conversion.check_report(args.report, args.source, args.destination)
        args.outputs.hold(args.report, "--report")
    check_place(args.destination)
    args.outputs.hold(args.destination, "DST")
    # A small model is done before anyone could read a bar.
    with Progress(delay=1, leave=False) as bar:

        def report(done: int, of: int) -> None:
            bar.count(done, of, "writing" if done <= of // 2 else "checking", "tensor")

        errors = conversion.convert(args.source, args.destination, args.to, report)
    if args.report is not None:
        _write_report(args.report, errors)
    print_errors(errors)
    size = args.destination.stat().st_size
    print(f"{args.destination}: {args.to}, {size / 1e9:.3g} GB, {len(errors)} tensors read back and equal")
    return 0


def print_errors(errors: list[LayerError]) -> None:
    """Print a line for each kind of tensor that lost precision, all blocks together, and the worst tensor's name."""
    kinds: dict[str, list[LayerError]] = {}
    for error in errors:
        kinds.setdefault(error.kind, []).append(error)
    lossy = {kind: rows for kind, rows in kinds.items() if any(row.largest for row in rows)}
    if not lossy:
        print("every number equals the source's")
        return
    width = max(len(kind) for kind in lossy)
    print(f"{'':<{width}}  relative error  largest  worst")
    for kind, rows in lossy.items():
        worst = max(rows, key=lambda row: row.relative)
        mean = sum(row.relative for row in rows) / len(rows)
        largest = max(row.largest for row in rows)
        print(f"{kind:<{width}}  {mean:>14.2e}  {largest:.1e}  {worst.relative:.2e} {worst.name}")


def _write_report(path: Path, errors: list[LayerError]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([asdict(error) for error in errors], indent=1) + "\n", encoding="utf-8")
