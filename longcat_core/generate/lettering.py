"""Text in any script on a picture: each character in the first font that has it.

Pillow's own font has little more than the letters of English. For others the fonts of the machine are searched.
What no font has is written as its code, \\u5b57, because boxes would make all such texts the same.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..files.media.opening import package

# Fonts of many scripts, which are tried before others.
_LARGE = re.compile(
    r"noto.*cjk|source.?han|wqy|wenquanyi|droid.*fallback|msyh|simhei|simsun|pingfang|hiragino|arial.?uni|malgun|"
    r"meiryo|yugoth|unifont|noto.?sans|dejavu|freesans|segoeui|arial",
    re.IGNORECASE,
)
_STYLED = re.compile(r"bold|italic|oblique|mono|serif|narrow|condensed|light|thin|black", re.IGNORECASE)
_SUFFIXES = (".ttf", ".otf", ".ttc")
# Fonts that are opened at most in the search for a character.
MAX_FONTS = 2000
# Categories of characters that mark or join others.
_JOINED = ("Mn", "Mc", "Me", "Cf")
# In no font: by its outline a missing character is known.
_MISSING = "\U0010fffe"


class Lettering:
    """Measure and draw text of one size, in pixels. lacking: characters that no font has, in the order of their use."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._fonts: list[Any] = [package("PIL.ImageFont").load_default(size=size)]
        self._more = _system_fonts()
        self._known: dict[str, Any] = {}
        self.lacking: list[str] = []

    def measure(self, text: str) -> float:
        """The width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, pen: Any, place: tuple[float, float], text: str, fill: tuple[int, int, int]) -> None:
        """Draw a line with its upper left corner at `place`. pen: a Pillow ImageDraw."""
        x, y = place
        base = y + self._fonts[0].getmetrics()[0]
        for font, run in self._runs(text):
            pen.text((x, base), run, fill=fill, font=font, anchor="ls")
            x += font.getlength(run)

    def shown(self, text: str) -> str:
        """`text` with its missing characters as codes."""
        signs, coded = [], False
        for sign in text:
            coded = coded if unicodedata.category(sign) in _JOINED else self._font(sign) is None
            signs.append(_code(sign) if coded else sign)
        return "".join(signs)

    def _runs(self, text: str) -> Iterator[tuple[Any, str]]:
        font, fonts = self._fonts[0], []
        for sign in text:
            # What joins or marks other characters stays with them.
            font = font if unicodedata.category(sign) in _JOINED else self._font(sign) or self._fonts[0]
            fonts.append((font, sign))
        for _, run in groupby(fonts, key=lambda pair: id(pair[0])):
            pairs = list(run)
            yield pairs[0][0], "".join(sign for _, sign in pairs)

    def _font(self, sign: str) -> Any:
        """The font for a character, None if no font has it."""
        if sign not in self._known:
            found = next((font for font in self._fonts if _has(font, sign)), None)
            while found is None and (path := next(self._more, None)):
                try:
                    font = package("PIL.ImageFont").truetype(str(path), self._size)
                except (OSError, ValueError):
                    # Bitmap fonts, as of emoji, have sizes of their own.
                    continue
                if _has(font, sign):
                    self._fonts.append(font)
                    found = font
            self._known[sign] = found
            if found is None:
                self.lacking.append(sign)
        return self._known[sign]


def _has(font: Any, sign: str) -> bool:
    if unicodedata.category(sign) in (*_JOINED, "Zs"):
        return True
    shape, missing = font.getmask(sign), font.getmask(_MISSING)
    return shape.size != missing.size or bytes(shape) != bytes(missing)


def _code(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def _system_fonts() -> Iterator[Path]:
    """The font files of this machine, those of many scripts first."""
    home = Path.home()
    folders = {
        "darwin": ("/System/Library/Fonts", "/Library/Fonts", home / "Library/Fonts"),
        "win32": (
            Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts",
            home / "AppData/Local/Microsoft/Windows/Fonts",
        ),
    }.get(sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", home / ".local/share/fonts", home / ".fonts"))
    found = []
    for folder in folders:
        for place, _, names in os.walk(folder):
            found += [Path(place, name) for name in names if name.lower().endswith(_SUFFIXES)]
    found.sort(key=lambda path: (not _LARGE.search(path.name), bool(_STYLED.search(path.name)), str(path)))
    yield from found[:MAX_FONTS]


def wrap(text: str, measure: Callable[[str], float], width: float, most: int | None = None) -> list[str]:
    """Lines of `text`, at most `width` wide; a word is broken only if it does not fit on a line.

    most: of the lines; of a longer text the last one ends in "...".
    """
    lines, line = [], ""
    for word in text.split():
        start = 0
        while (count := fitting(word, measure, width, start)) < len(word) - start:
            lines += [line] if line else []
            lines, line, start = [*lines, word[start : start + max(1, count)]], "", start + max(1, count)
            if most is not None and len(lines) > most:
                break
        joined = f"{line} {word[start:]}".strip()
        if measure(joined) > width:
            lines, joined = [*lines, line], word[start:]
        line = joined
        if most is not None and len(lines) > most:
            break
    lines += [line] if line else []
    if most is not None and len(lines) > most:
        end = fitting(lines[most - 1], lambda words: measure(f"{words} ..."), width)
        lines = [*lines[: most - 1], f"{lines[most - 1][:end]} ..."]
    return lines


def fitting(text: str, measure: Callable[[str], float], width: float, start: int = 0) -> int:
    """How many characters of text[start:] are at most `width` wide together."""
    # No more is measured than a few times what fits, so that a long text takes no longer than its lines.
    reach = 16
    while reach < len(text) - start and measure(text[start : start + reach]) <= width:
        reach *= 2
    low, high = 0, min(reach, len(text) - start)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(text[start : start + middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low
