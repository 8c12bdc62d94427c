"""The machine, the versions and the tree that a report speaks of."""

from __future__ import annotations

import hashlib
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longcat_core.measure.results import commit, machine

from ..comfyui.server import PACK, Installation
from .report import ABOUT, KEPT_OF

PACKAGES = ("torch", "triton", "comfy-kitchen", "comfy-aimdo")
# What two runs that belong together may differ in.
NOT_SAME = ("date", "commit", "driver", "cores", "cpu")


def tree() -> str:
    """A fingerprint of the pack's code and of the tests that judge it; a copy without its history has one too."""
    digest = hashlib.sha256()
    for folder in ("longcat_core", "nodes", "tests/gpu"):
        for path in sorted((PACK / folder).rglob("*.py")):
            digest.update(path.relative_to(PACK).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions(installation: Installation) -> dict[str, str]:
    """Versions of ComfyUI and of the packages in its Python that decide what runs there."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    command = [str(installation.python), "-c", code, *PACKAGES]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"ComfyUI": installation.version} | json.loads(text.splitlines()[-1])


def gather(device: torch.device, installation: Installation, output: Path) -> dict[str, Any]:
    """What is known before anything runs. What was planned stays from an earlier run of the same tree and machine."""
    here = machine(device)
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": commit(), "tree": tree(), "device": device.type}
    found |= {
        name: here[name] for name in ("gpu", "gpu_memory_gib", "driver", "python", "cores", "cpu") if name in here
    }
    found |= versions(installation)
    same = {name: value for name, value in found.items() if name not in NOT_SAME}
    found["identity"] = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
    return found | kept(output, found["identity"])


def write(about: dict[str, Any], output: Path) -> None:
    """Keep it in `output`, with what another run of the same tree and machine planned meanwhile."""
    about = kept(output, about["identity"]) | about
    (output / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def kept(output: Path, identity: str) -> dict[str, Any]:
    """What earlier runs of the same tree and machine planned."""
    path = output / ABOUT
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("identity") != identity:
        return {}
    return {name: before[name] for name in KEPT_OF if name in before}
