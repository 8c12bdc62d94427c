"""What of a speed's set fits: options that the user gives win, and what the machine or the video does not allow is left
out, with the reason. Nothing fails because of a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..checkpoints.load import empty_parameters
from ..errors import LongCatError, check_choice
from ..model.config import ModelConfig
from ..optimize import attention
from ..optimize.quantization import Policy, check_sizes, missing
from ..optimize.requirement import Inputs
from ..optimize.sparse.choose import only_plain
from ..optimize.sparse.passes import MIN_BLOCKS
from ..optimize.sparse.settings import BLOCK, Sparse
from .speeds import EXACT, SPEEDS, Speed, SpeedSet, joined, set_of

# Fields of a request that a word decides where they are None, and their exact values.
EXACT_VALUES: Mapping[str, Any] = MappingProxyType({"sparse": None, "step_cache": 0.0, "guidance_until": 1.0})
# Options of a set that are decided as a model is loaded.
OF_LOADING = ("fp8", "attention")
_NAMES = {"sparse": "sparse attention", "step_cache": "step cache", "guidance_until": "guidance until"}


@dataclass(frozen=True)
class Loaded:
    """How a model is loaded. inputs: what its attention gets. given: options that the user gave. reasons: why options
    of the word are not there, by name."""

    inputs: Inputs
    fp8: bool = False
    attention: str = "auto"
    given: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


def fit_loading(
    speed: Speed, schedule: str, inputs: Inputs, config: ModelConfig, fp8: bool | None, backend: str | None
) -> Loaded:
    """How to load a network of this config under a word. fp8, backend: what the user gave, or None."""
    wanted, reasons = set_of(speed, schedule, config.audio is not None), {}
    given = tuple(name for name, value in zip(OF_LOADING, (fp8, backend), strict=True) if value is not None)
    if fp8 is None and wanted.fp8 and (reason := missing(inputs.device) or _odd_sizes(config)):
        reasons["fp8"] = reason
    if backend is None and wanted.attention != "auto" and (reason := attention.why_not(wanted.attention, inputs)):
        reasons["attention"] = reason
    return Loaded(
        inputs,
        fp8 if fp8 is not None else wanted.fp8 and "fp8" not in reasons,
        backend if backend is not None else "auto" if "attention" in reasons else wanted.attention,
        given,
        reasons,
    )


def _odd_sizes(config: ModelConfig) -> str:
    """Why the layers of a network cannot become 8-bit, or ""."""
    parameters = empty_parameters(config)
    try:
        for name in Policy().names(1, config.audio is not None):
            check_sizes(*parameters[f"{name}.weight"].shape)
    except LongCatError as error:
        return str(error).partition(";")[0]
    return ""


def _of_loading(wanted: SpeedSet, loaded: Loaded) -> tuple[dict[str, str], set[str]]:
    """Options of a set that the loaded model lacks, and why; and those in whose place the user gave others."""
    differ = {name for name in OF_LOADING if name in wanted.options and getattr(loaded, name) != getattr(wanted, name)}
    own = differ.intersection(loaded.given)
    why = "the model was loaded without it"
    return {name: loaded.reasons.get(name, why) for name in OF_LOADING if name in differ - own}, own


def loading_notes(speed: Speed, schedule: str, loaded: Loaded) -> list[str]:
    """`speed_notes` for a task in which a word decides how the model is loaded, and nothing else."""
    wanted = set_of(speed, schedule)
    return speed_notes(speed, wanted, *_of_loading(wanted, loaded))


@dataclass(frozen=True)
class Chosen:
    """What a word made of a request.

    values: of the fields that were not given. left: options of the set that are left out, and why. given: options of
    the set in whose place the user gave others.
    """

    speed: Speed
    wanted: SpeedSet
    values: Mapping[str, Any]
    left: Mapping[str, str]
    given: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """One sentence about what is in force and its price; none for exact."""
        return speed_notes(self.speed, self.wanted, self.left, self.given)


def fit_request(
    speed: Speed,
    given: Collection[str],
    *,
    schedule: str,
    guided: bool,
    tokens: int,
    kernel: str,
    loaded: Loaded | None,
    avatar: bool = False,
) -> Chosen:
    """What a word makes of a request. given: its fields that the user set. tokens: to generate. kernel: of sparse
    attention. loaded: how the model is loaded; None: unknown, as if the machine had everything. avatar: of a network
    that hears."""
    wanted = set_of(speed, schedule, avatar)
    left, own = ({}, set()) if loaded is None else _of_loading(wanted, loaded)
    given = {*given, *own}
    if "sparse" in wanted.options and "sparse" not in given:
        if tokens < MIN_BLOCKS * BLOCK:
            left["sparse"] = f"the video has {tokens} tokens to generate, fewer than {MIN_BLOCKS * BLOCK}"
        elif loaded is not None and kernel == "auto" and (reason := only_plain(loaded.inputs)):
            left["sparse"] = reason
    if "guidance_until" in wanted.options and "guidance_until" not in given and not guided:
        left["guidance_until"] = "the video has no guidance"
    values = dict(EXACT_VALUES) | {name: value for name, value in wanted.options.items() if name in EXACT_VALUES}
    if "sparse" in wanted.options:
        values["sparse"] = Sparse(wanted.options["sparse"], dense_steps=wanted.dense_steps)
    values |= {name: EXACT_VALUES[name] for name in left if name in EXACT_VALUES}
    values = {name: value for name, value in values.items() if name not in given}
    return Chosen(speed, wanted, values, left, tuple(name for name in wanted.options if name in given))


def speed_notes(speed: Speed, wanted: SpeedSet, left: Mapping[str, str], given: Collection[str] = ()) -> list[str]:
    """One sentence about what of a word's set is in force, and its price; none for exact.

    left: options that are left out, and why. given: options of the user's own in place of the set's.
    """
    if not wanted.options:
        return [] if speed == EXACT else [f"speed {speed} sets nothing lossy for this schedule yet"]
    out = joined([f"{_NAMES.get(name, name)} ({reason})" for name, reason in left.items()])
    own = joined([_NAMES.get(name, name) for name in wanted.options if name in given])
    used = wanted.in_words(tuple(name for name in wanted.options if name not in left and name not in given))
    parts = [f"speed {speed} sets {used or 'nothing here'}"]
    parts += [f"it leaves out {out}"] if out else []
    parts += [f"your own {own} {'take' if ' and ' in own else 'takes'} precedence"] if own else []
    price = wanted.price
    assert price is not None, "a set with options has a price"
    if not out and not own:
        parts.append(f"{price.in_words()} ({price.measured()})")
    elif used:
        parts.append(f"the whole set is {price.in_words()}")
    return ["; ".join(parts)]


def check_speed(speed: object) -> None:
    """Raise LongCatError unless `speed` is one of the words."""
    check_choice("speed", speed, SPEEDS)
