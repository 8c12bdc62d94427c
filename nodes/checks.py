"""What is known of a node's inputs before anything runs, so that it is refused when Run is pressed.

ComfyUI calls `validate_inputs` with the inputs that a node names there, None for those that are connected. The sentence
is raised, not returned: the page puts an exception's words into its message, and of a returned text only that some
value was rejected, once for each input that is named. Naming an input turns ComfyUI's own check of its range off, so
`check_ranges` does that first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..longcat_core.errors import LongCatError, check_choice
from ..longcat_core.generate.options import words
from ..longcat_core.generate.request import check_frames, check_side
from ..longcat_core.sampling.conditioning import TEMPORAL_FACTOR, latent_frames
from ..longcat_core.sampling.schedules import make_schedule
from .declarations import NODES
from .fields import Widget
from .widgets import CUSTOM


def check_ranges(node: str, values: Mapping[str, Any]) -> None:
    """Raise LongCatError for a value outside its input's range or choices."""
    for field in NODES[node].inputs:
        value = values.get(field.name)
        if value is None or not isinstance(field, Widget):
            continue
        row = field.row
        if row.kind == "choice" and row.choices:
            check_choice(row.name, value, row.choices)
        if row.kind in ("whole", "number"):
            low, high = (row.least is not None and value < row.least), (row.most is not None and value > row.most)
            if low or high:
                limits = " and ".join(
                    f"{word} {words(limit)}" for word, limit in (("at least", row.least), ("at most", row.most))
                    if limit is not None
                )  # fmt: skip
                raise LongCatError(f"{row.name} {words(value)} is out of range; give {limits}")


def check_steps(steps: int | None, mode: str | None) -> None:
    """Raise LongCatError if the schedule of this mode does not take this number of steps."""
    if steps is not None and mode is not None:
        make_schedule(mode, steps)


def check_size(width: int | None, height: int | None, resolution: str | None = CUSTOM, of: str = "") -> None:
    """Raise LongCatError for sides that the model does not take, if they are used. of: whose sides, if given frames."""
    for name, side in (("width", width), ("height", height)):
        if resolution == CUSTOM and side is not None:
            check_side(f"{of}{name}", side)


def check_length(length: int | None, given: int | None = 0) -> None:
    """Raise LongCatError unless length is 4k+1 and leaves frames to generate after the `given` ones."""
    if given:
        latent_frames(given, "cond_frames")
    if length is None:
        return
    check_frames(length, "length")
    if given and length <= given:
        raise LongCatError(
            f"length {length} leaves nothing to generate after {given} given frames; ask for at least "
            f"{given + TEMPORAL_FACTOR}"
        )
