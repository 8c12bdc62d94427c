"""Pages of Markdown with pictures beside them, which --page writes and writes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LongCatError
from ..files.atomic import atomic_path
from ..files.places import check_place, check_suffix
from .outputs import Outputs

if TYPE_CHECKING:
    from PIL import Image


def prefix_of(page: Path) -> str:
    """What the names of the pictures beside a page begin with."""
    return f"{page.stem}-"


def hold_page(page: Path, title: str, pictures: Sequence[str], command: str, outputs: Outputs) -> None:
    """Check a page and its pictures, and hold their names. title: its first line; command: that writes such pages.

    Raises LongCatError if they cannot be written, or would replace what is not ours.
    """
    check_suffix(page, (".md",), "page")
    paths = [page, *(page.with_name(prefix_of(page) + name) for name in pictures)]
    there = b""
    if page.is_file():
        with open(page, "rb") as file:
            there = file.read(len(title))
    for path in paths:
        if path.exists() and there != title.encode():
            raise LongCatError(f"{path} already exists and is not from longcat {command}; choose another with --page")
    for path in paths:
        check_place(path, 1 << 23)
    for path in paths:
        outputs.hold(path, "--page")


def write_page(path: Path, text: str, pictures: Mapping[str, Image.Image], prefix: str = "") -> None:
    """Write the pictures and the page, which is last. prefix: of the pictures' names."""
    for name, picture in pictures.items():
        with atomic_path(path.with_name(prefix + name)) as temporary:
            picture.save(temporary, format="PNG")
    with atomic_path(path) as temporary:
        # Names in the command may have bytes that are not UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
