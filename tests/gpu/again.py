"""`--again`: results of an earlier run are kept, each with its commit and date; what failed, is wrong or lacks runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .about import PACKAGES
from .report import ABOUT, KEPT_OF, PARTS, ROWS, RUN, SPEED, read_rows

# What an earlier run must share.
SHARED = ("device", "gpu", "python", "ComfyUI", *PACKAGES)


def adopt(output: Path, machine: dict[str, Any]) -> None:
    """Put all results in `output` under this run's identity, those of another commit or day with theirs, and what was
    planned into `machine`.

    Raises SystemExit if nothing is there, or if it is of another machine or of other versions.
    """
    path = output / ABOUT
    if not path.exists():
        raise SystemExit(f"make test-gpu: {output} holds no earlier run; leave out --again, or name its folder")
    before = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in SHARED if before.get(name) != machine.get(name)]:
        said = ", ".join(f"{name} {before.get(name)} instead of {machine.get(name)}" for name in other)
        raise SystemExit(f"make test-gpu: the run in {output} has {said}; leave out --again")
    run = f"{before['commit'] or 'unknown'}, {before['date']}"
    mark = {} if run == f"{machine['commit'] or 'unknown'}, {machine['date']}" else {RUN: run}
    rows = read_rows(output, before["identity"]).values()
    lines = [json.dumps({"identity": machine["identity"]} | mark | row) + "\n" for row in rows]
    (output / ROWS).write_text("".join(lines), encoding="utf-8")
    for name, entries in [(SPEED, "rows"), *((f"{part}.json", "files") for part in PARTS)]:
        if (output / name).exists():
            found = json.loads((output / name).read_text(encoding="utf-8"))
            if found["identity"] == before["identity"]:
                found |= {"identity": machine["identity"], entries: [mark | entry for entry in found[entries]]}
                (output / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    machine |= {name: before[name] for name in KEPT_OF if name in before}
    path.write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")


def kept(output: Path, part: str) -> list[dict[str, Any]]:
    """The results of a part's files of tests in which nothing failed."""
    path = output / f"{part}.json"
    files = json.loads(path.read_text(encoding="utf-8"))["files"] if path.exists() else []
    return [file for file in files if not file["failures"]]
