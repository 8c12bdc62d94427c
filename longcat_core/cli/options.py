"""Rows of the table of options as arguments of commands."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

from ..errors import LongCatError
from ..generate.options import GUIDANCE, HEADINGS, SEVERAL, Option, of_command
from ..parallel.torchrun import torchrun_size
from .console import given, lora, number, path, size, whole

CONVERTERS = {"whole": whole, "number": number, "size": size, "path": path, "lora": lora}


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        raise LongCatError(f"{message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, command: str, *headings: str, without: Collection[str] = ()) -> None:
    """Add a command's options, all or those under these headings, each heading a group of --help. without: names of
    options that are left out."""
    groups: dict[str, Any] = {"": parser}
    for row in of_command(command, *headings):
        if row.name in without:
            continue
        if row.heading not in groups:
            groups[row.heading] = parser.add_argument_group(HEADINGS.get(row.heading, row.heading))
        flags = [row.short, row.flag] if row.short else [row.flag]
        groups[row.heading].add_argument(*flags, help=help_of(row), **_settings(row))


def given_flags(argv: Sequence[str]) -> set[str]:
    """The options that the words of a command name."""
    return {word.partition("=")[0] for word in argv if word.startswith("-")}


def without_effect(
    args: argparse.Namespace, there: Collection[str], argv: Sequence[str] | None = None
) -> Iterator[str]:
    """A note for each option that was given although what it works on is missing.

    there: what the run has that is not an option; see `Option.needs`. argv: what was given, if not `args.argv`.
    """
    given = given_flags(args.argv if argv is None else argv)
    # torchrun starts as many processes as --gpus would.
    several = torchrun_size() or getattr(args, "gpus", None) not in (None, "1")
    there = (*there, *[SEVERAL] * bool(several))
    # A scale of 1 is an option that was given, and no guidance.
    options = vars(args).keys() - {GUIDANCE}
    for row in of_command(args.command):
        for need in row.needs if row.flag in given else ():
            names = [(name, f"--{name}".replace("_", "-") if name in options else name) for name in need.split(" or ")]
            if not any(name in there or (name in options and getattr(args, name)) for name, _ in names):
                yield f"{row.flag} has no effect without {' or '.join(shown for _, shown in names)}"


def help_of(row: Option) -> str:
    """Its sentence and its defaults, as argparse wants them: a percent sign is doubled."""
    defaults = [row.default_words()]
    if row.nano is not None and row.default_words(nano=True) != defaults[0]:
        defaults.append(f"nano {row.default_words(nano=True)}")
    text = f"{row.help} (default: {'; '.join(defaults)})" if any(defaults) else row.help
    return text.replace("%", "%%")


def _settings(row: Option) -> dict[str, Any]:
    if row.kind == "switch":
        return {"action": "store_true"}
    settings: dict[str, Any] = {"default": None if row.filled else row.default, "metavar": row.metavar}
    if row.kind in CONVERTERS:
        settings["type"] = CONVERTERS[row.kind]
    elif row.kind == "text" and row.metavar != "TEXT":
        # A prompt may be empty.
        settings["type"] = given
    if row.choices:
        settings["choices"] = row.choices
    if row.repeated:
        settings["action"] = "append"
    if row.required:
        settings["required"] = True
    return settings
