"""What the registry's package holds: every tracked file that .comfyignore does not name."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _git(*arguments: str) -> list[str]:
    run = subprocess.run(["git", *arguments, "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def tracked() -> list[str]:
    """All tracked files, with / between folders."""
    return _git("ls-files")


def packed() -> list[str]:
    """The files of the package."""
    return sorted({*tracked()} - {*_git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")})


def copy(names: list[str], folder: Path) -> Path:
    """Copy these files of the repository into a new folder, as an installer unpacks them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def tool(name: str) -> str | None:
    """A command of tools.txt, where `make test-registry` installs it; None, with a warning, if it is missing."""
    found = ROOT / ".venv-registry" / ("Scripts" if os.name == "nt" else "bin") / name
    if found.is_file():
        return str(found)
    warnings.warn(f"the pack is not checked by {name}: make test-registry installs it", stacklevel=2)
    return None
