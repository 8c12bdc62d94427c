"""The `longcat` commands that work on checkpoint files. PyTorch is imported when one runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LongCatError
from .options import add_options

if TYPE_CHECKING:
    from ..checkpoints.convert import LayerError


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="a checkpoint of any form: file or folder")
    parser.add_argument("destination", type=Path, metavar="DST", help="the .safetensors file to write")
    add_options(parser, "convert")


def convert(args: argparse.Namespace) -> int:
    """`longcat convert`: the file is read back and measured before it gets its name."""
    from ..checkpoints import convert as conversion

    if args.report is not None:
        _check_report(args.report, args.source)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise LongCatError("the progress bar needs tqdm; run: pip install 'longcat-video[headless]'") from error

    # A small model is done before anyone could read a bar.
    with tqdm(unit="tensor", dynamic_ncols=True, delay=1, leave=False) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.set_description("writing" if done <= of // 2 else "checking", refresh=False)
            bar.update()

        errors = conversion.convert(args.source, args.destination, args.to, progress)
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


def _check_report(path: Path, source: Path) -> None:
    """Raise LongCatError unless a report can be written to `path` without damage to the source."""
    from ..files.places import check_place, check_suffix

    check_suffix(path, (".json",), "report")
    check_place(path)
    if path.exists() and source.is_dir() and path.resolve().is_relative_to(source.resolve()):
        raise LongCatError(f"report {path} would replace a file in the source's folder; give another name to --report")


def _write_report(path: Path, errors: list[LayerError]) -> None:
    from dataclasses import asdict

    from ..files.atomic import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps([asdict(error) for error in errors], indent=1) + "\n", encoding="utf-8")


# Name -> options, what runs, and a line of help.
TASKS = {"convert": (add_convert, convert, "Write a checkpoint of any form as bf16, ComfyUI fp8 or INT8.")}
