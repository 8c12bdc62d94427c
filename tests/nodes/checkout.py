"""Where ComfyUI is, and the Python that runs it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).parents[2]
# Set in the process whose Python has ComfyUI's requirements: only there are the tests of `inside` collected.
INSIDE = "LONGCAT_TESTS_INSIDE_COMFYUI"


@dataclass(frozen=True)
class Checkout:
    path: Path
    python: Path

    @classmethod
    def find(cls) -> Checkout:
        """COMFYUI_PATH or where comfy-cli puts it; COMFYUI_PYTHON, ../venv or this Python. Else FileNotFoundError."""
        path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser().absolute()
        if not (path / "comfyui_version.py").is_file():
            raise FileNotFoundError(f"no ComfyUI checkout at {path}; set COMFYUI_PATH")
        given = os.environ.get("COMFYUI_PYTHON")
        venv = path.parent / "venv"
        choices = [given] if given else [venv / "bin" / "python", venv / "Scripts" / "python.exe", sys.executable]
        python = next((Path(choice) for choice in choices if Path(choice).is_file()), None)
        if python is None:
            raise FileNotFoundError(f"no Python at {given}; set COMFYUI_PYTHON to the one that runs ComfyUI")
        return cls(path, python)
