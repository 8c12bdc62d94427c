"""The Python path of a process that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

# A folder of packages that ComfyUI's Python finds before its own: other versions of them beside the same checkout.
PACKAGES = "COMFYUI_PACKAGES"


def python_path(*folders: Path, inherited: bool = True) -> dict[str, str]:
    """PYTHONPATH as a variable of an environment, if anything is in it: folders first, then, if inherited, what is
    there already, where a machine without a network has its packages."""
    there = os.environ.get("PYTHONPATH") if inherited else None
    path = os.pathsep.join([*map(str, folders), *filter(None, [there])])
    return {"PYTHONPATH": path} if path else {}


def comfyui_packages() -> list[Path]:
    """The folder that COMFYUI_PACKAGES names, if it is set. FileNotFoundError if that lacks."""
    given = os.environ.get(PACKAGES)
    if not given:
        return []
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; set {PACKAGES} to one that pip install --target made")
    return [folder]
