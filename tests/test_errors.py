"""What errors quote from files cannot move the cursor, fill the terminal or break the one line."""

from __future__ import annotations

import pytest

from longcat_core.errors import MAX_CHARACTERS, CheckpointError, LongCatError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red ball, 一只球", "a red ball, 一只球"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("take\n2\u2028b", r"take\n2\u2028b"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("caf\udce9.mp4", r"caf\udce9.mp4"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_control_characters_and_surrogates_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(CheckpointError(f"{text} is empty")) == f"{shown} is empty"


@pytest.mark.parametrize("sign", ["x", "\x1b"])
def test_a_long_sentence_keeps_its_beginning_and_its_end(sign: str) -> None:
    message = str(LongCatError("the name " + sign * 1_000_000 + " is unknown"))
    assert len(message) <= MAX_CHARACTERS
    assert message.startswith("the name ") and message.endswith(" is unknown") and " [...] " in message
