"""The parts of a node's declaration: sockets, widgets and the node. Does not import ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..longcat_core.generate.options import Option, option, words


@dataclass(frozen=True)
class Socket:
    """An input or output that is connected. kind: its class in comfy_api's `io`, several separated by commas where an
    input takes one of them. help: without its final period."""

    name: str
    kind: str
    help: str
    optional: bool = False

    # Nothing is connected at first.
    default_words = ""

    @property
    def sentence(self) -> str:
        """`help` as a whole sentence."""
        return f"{self.help[0].upper()}{self.help[1:]}." if self.help else ""

    @property
    def tooltip(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Widget:
    """An input that is set on the node. new_seed: whether ComfyUI draws another value after each run; None if it is
    not a seed. advanced: few people need it, so the page folds it away. only_for: the input and the choice with which
    it is used at all."""

    row: Option
    optional: bool = False
    multiline: bool = False
    new_seed: bool | None = None
    advanced: bool = False
    only_for: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def sentence(self) -> str:
        return self.row.sentence

    @property
    def tooltip(self) -> str:
        """The sentence, and nano's default where it differs."""
        nano = "" if self.row.nano is None else f" For LongCat-nano: {words(self.row.nano)}."
        return self.sentence + nano

    @property
    def default_words(self) -> str:
        """Defaults of the released model and of nano, in words."""
        nano = "" if self.row.nano is None else f"; nano {words(self.row.nano)}"
        return self.row.default_words() + nano


@dataclass(frozen=True)
class Node:
    """One node. shows: whether it shows a picture itself, so that ComfyUI runs it without connected outputs. hidden:
    what it asks of the prompt that it runs in, by the names of `io.Hidden`."""

    name: str
    description: str
    inputs: tuple[Socket | Widget, ...]
    outputs: tuple[Socket, ...]
    shows: bool = False
    hidden: tuple[str, ...] = ()


def shared(
    name: str, command: str = "generate", /, *, optional: bool = False, advanced: bool = False, **changes: Any
) -> Widget:
    """The option `name` of a command as a node's input, with `changes` to its row, such as another name."""
    return Widget(replace(option(name, command), **changes), optional, advanced=advanced)


def own(
    name: str, kind: Any, help: str, default: Any = None, *, optional: bool = False, advanced: bool = False, **more: Any
) -> Widget:
    """An input of the node's own, which is not an option of any command."""
    return Widget(Option(name, kind, help, default, **more), optional, advanced=advanced)


def long_text(widget: Widget) -> Widget:
    """The widget as a text box of several lines."""
    return replace(widget, multiline=True)
