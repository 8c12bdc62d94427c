"""Folders of segments as tests look at them, copy them and damage them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(item.relative_to(path)): item.read_bytes() for item in sorted(path.glob("segment-*/*")) if item.is_file()
    }


def state(path: Path) -> dict[str, tuple[int, bytes | None]]:
    """Time of change and content of everything under a folder, and of the folder itself."""
    return {
        str(item): (item.lstat().st_mtime_ns, item.read_bytes() if item.is_file() else None)
        for item in (path, *path.rglob("*"))
    }


def copied(source: Path, path: Path) -> Path:
    """Without the lock, so that a test sees whether one was made."""
    return Path(shutil.copytree(source, path, ignore=shutil.ignore_patterns(".lock")))


def flipped(name: str) -> Callable[[Path], None]:
    def damage(segment: Path) -> None:
        content = bytearray((segment / name).read_bytes())
        content[len(content) // 2] ^= 4
        (segment / name).write_bytes(content)

    return damage
