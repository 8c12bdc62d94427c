"""The ordinary tests and the nodes' own tests on a GPU: one process for each file of tests, several side by side.

A process that dies, or that spoils its CUDA context, takes no other file with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..comfyui.server import PACK, Installation
from ..nodes.checkout import INSIDE

TESTS, NODES = "tests", "nodes"
# They have a command of their own, or run inside a ComfyUI that this folder's matrix starts.
ELSEWHERE = ("comfyui", "registry", "nodes/inside")
# Seconds after which a file's process is ended.
LONGEST = 400
# Seconds after the deadline in which a file that was begun may end.
PATIENCE = 40
# Read by tests/nodes/inside/conftest.py: where ComfyUI computes in those tests.
DEVICE = "LONGCAT_TESTS_DEVICE"


@dataclass(frozen=True)
class FileResult:
    """Counts of one file of tests. failures: (test, last line of the error) of each that failed."""

    file: str
    passed: int
    skipped: int
    failures: list[tuple[str, str]]
    seconds: float


def files(part: str) -> list[Path]:
    """The files of tests of a part, the largest first, since they tend to take the longest."""
    folder = PACK / "tests"
    if part == NODES:
        found = list((folder / "nodes" / "inside").glob("test_*.py"))
    else:
        found = [
            path
            for path in folder.rglob("test_*.py")
            if not path.relative_to(folder).as_posix().startswith(tuple(f"{name}/" for name in ELSEWHERE))
            # Runs the files of the part `nodes`.
            and path.name != "test_in_comfyui.py"
        ]
    return sorted(found, key=lambda path: -path.stat().st_size)


def command(part: str, file: Path, report: Path) -> tuple[list[str], dict[str, str]]:
    """How a file is run, and in which environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-c", str(PACK / "pyproject.toml")]
    options += [f"--rootdir={PACK}", str(file)]
    if part == TESTS:
        return [sys.executable, "-m", "pytest", *options], environment
    installation = Installation.find()
    environment |= {INSIDE: "1", "COMFYUI_PATH": str(installation.path), "LONGCAT_PYTHON": sys.executable}
    # -P: the checkout's own nodes.py, not the folder of that name here, is what ComfyUI means by `nodes`.
    return [str(installation.python), "-P", "-m", "pytest", *options], environment


def read(report: Path) -> tuple[int, int, list[tuple[str, str]]]:
    """passed, skipped and failures of a JUnit file."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            lines = (bad[0].get("message") or bad[0].text or "").strip().splitlines() or ["no message"]
            failures.append((case.get("name", ""), lines[0][:300]))
        elif any(child.tag == "skipped" for child in case):
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures


def run_file(part: str, file: Path, device: str, deadline: float) -> FileResult:
    """Run one file of tests; a process that dies or takes too long is a failure of the file."""
    started, name = time.monotonic(), file.relative_to(PACK).as_posix()
    longest = min(LONGEST, deadline - started + PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line, environment = command(part, file, report)
        line.insert(-1, f"--basetemp={Path(folder) / 'tests'}")
        ran = None
        try:
            ran = subprocess.run(
                line, cwd=PACK if part == TESTS else folder, env=environment | {DEVICE: device}, timeout=longest,
                capture_output=True, text=True, errors="replace",
            )  # fmt: skip
            passed, skipped, failures = read(report)
        except subprocess.TimeoutExpired:
            passed, skipped, failures = 0, 0, [("", f"did not end within {longest:.0f} s")]
        except (OSError, ElementTree.ParseError):
            lines = (f"{ran.stdout}\n{ran.stderr}" if ran else "").strip().splitlines()
            # After a fatal error come the frames of every thread and then a list of all extension modules.
            fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines) - 3)
            passed, skipped, failures = 0, 0, [("", " | ".join(lines[fatal:][:8])[:900] or "no report")]
        # 5: nothing to run. Anything else without a failure is a process that broke off.
        if ran is not None and ran.returncode not in (0, 5) and not failures:
            failures = [("", f"exit code {ran.returncode}")]
    return FileResult(name, passed, skipped, failures, time.monotonic() - started)


def run(
    part: str, device: str, processes: int, deadline: float, without: frozenset[str] = frozenset()
) -> Iterator[FileResult]:
    """The results of a part's files as they end; files that were not begun by the deadline are left out, and those in
    `without`."""
    with ThreadPoolExecutor(processes) as pool:

        def one(file: Path) -> FileResult | None:
            return run_file(part, file, device, deadline) if time.monotonic() < deadline else None

        chosen = [file for file in files(part) if file.relative_to(PACK).as_posix() not in without]
        for future in as_completed([pool.submit(one, file) for file in chosen]):
            if (result := future.result()) is not None:
                yield result


def main(
    part: str,
    device: str,
    processes: int,
    deadline: float,
    output: Path,
    identity: str,
    before: Sequence[dict[str, Any]] = (),
) -> bool:
    """Run a part, print each file as it ends and keep the results in `output`; whether nothing failed. before: results
    of files that do not run again."""
    there, results = {file.relative_to(PACK).as_posix() for file in files(part)}, []
    before = [row for row in before if row["file"] in there]
    for result in run(part, device, processes, deadline, frozenset(row["file"] for row in before)):
        results.append(result)
        print(f"{part} {result.file}: {result.passed} passed, {result.skipped} skipped, "
              f"{len(result.failures)} failed, {result.seconds:.0f} s", flush=True)  # fmt: skip
        for test, said in result.failures:
            print(f"    FAILED {test}: {said}", flush=True)
        rows = sorted([*before, *map(asdict, results)], key=lambda row: row["file"])
        (output / f"{part}.json").write_text(
            json.dumps({"identity": identity, "files": rows, "of": len(there)}), encoding="utf-8"
        )
    ran = len(there) - len(before)
    print(f"{part}: {sum(row.passed for row in results)} passed, {sum(row.skipped for row in results)} skipped, "
          f"{sum(len(row.failures) for row in results)} failed in {len(results)} of {ran} files",
          flush=True)  # fmt: skip
    return len(results) == ran and not any(row.failures for row in results)
