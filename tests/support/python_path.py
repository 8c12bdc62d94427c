"""The Python path of a process that a test starts."""

from __future__ import annotations

import os
from pathlib import Path


def python_path(*folders: Path) -> dict[str, str]:
    """PYTHONPATH as a variable of an environment: folders first, then what is there already, where a machine without a
    network has its packages."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])}
