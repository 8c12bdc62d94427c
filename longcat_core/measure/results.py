"""Files of results: their content, the machine that they come from, and tables as text."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import LongCatError
from ..files.atomic import atomic_path
from ..files.records import read_record

SCHEMA = 1
PACKAGES = ("triton", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend", "sageattention", "xformers")


def _command(*words: str) -> str:
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and software that a measurement depends on."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = _command("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
            "driver": query.splitlines()[0] if query else "",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


@cache
def commit() -> str:
    """The commit of this checkout, with a + if tracked files differ from it; empty outside a checkout.

    LONGCAT_COMMIT in the environment overrides it, for copies without the repository's history.
    """
    if given := os.environ.get("LONGCAT_COMMIT"):
        return given
    found = _command("git", "rev-parse", "--short=12", "HEAD")
    return found + ("+" if found and _command("git", "status", "--porcelain", "--untracked-files=no") else "")


def command() -> str:
    """The command line that runs, as a shell takes it."""
    return "longcat " + shlex.join(sys.argv[1:])


def written(date: str, command: str, commit: str) -> str:
    """Markdown: when, from which commit and by which command a page was written. date: ISO 8601."""
    return f"Written on {date[:10]}{f', commit {commit}' if commit else ''} by\n\n    {command}"


def machine_line(found: dict[str, Any]) -> str:
    """What `machine` found, in a few words."""
    where = found.get("gpu") or f"{found.get('cpu', 'an unknown CPU')}, {found.get('cores', 'some')} cores"
    return f"{where}, PyTorch {found.get('torch', 'of an unknown version')}"


def say(sentence: str) -> None:
    """Print a line at once: a run that is cut off must have shown how far it got."""
    print(sentence, flush=True)


class ResultsFile:
    """One file of results, rewritten after every row, so that an interrupted run loses nothing."""

    def __init__(self, kind: str, folder: Path, device: torch.device, inputs: dict[str, Any], name: str = "") -> None:
        """name: of the file; default: the kind."""
        self.name = name or kind
        self.path = folder / f"{self.name}.json"
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "name": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "machine": machine(device),
            "commit": commit(),
            "inputs": inputs,
            "rows": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # NaN and infinity, which JSON lacks, become null.
        content = json.loads(json.dumps(self.content), parse_constant=lambda _: None)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with atomic_path(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read one file of results. Raises LongCatError for any other file."""
    content = read_record(path, dict[str, Any], "a file of results", "run longcat bench again")
    rows = content.get("rows")
    if content.get("schema") != SCHEMA or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LongCatError(f"{path} is not a file of results of this version; run longcat bench again")
    return content


def name_of(results: dict[str, Any]) -> str:
    """The name of the files of these results: results of one kind, such as profiles of several paths, differ in it."""
    return results.get("name", results["kind"])


# --- tables ----------------------------------------------------------------------------------------------------------


def shown(value: Any, digits: int = 2) -> str:
    """The text of a table's cell; unknown values are a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        if 0 < abs(value) < 10**-digits:
            return f"{value:.2e}"
        return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, *([shown(value).replace("|", "/") for value in row] for row in rows)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join((table[0], "|" + " --- |" * len(header), *table[1:]))


def aligned(text: str) -> str:
    """Markdown for a terminal: the columns of its tables are padded."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("|"):
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in paragraph.splitlines()]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            rows[1] = ["-" * width for width in widths]
            padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
            paragraph = "\n".join("  ".join(row).rstrip() for row in padded)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
