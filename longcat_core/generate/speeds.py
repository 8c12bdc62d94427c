"""What the words of `--speed` stand for: sets of lossy options, with the price that was measured for each.

The only place where sets and prices are written; help, notes and pages read them here. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Speed = Literal["exact", "near", "fast", "fastest"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)
EXACT: Speed = "exact"
# Kinds of sampling, whose sets may differ: with guidance in 50 steps, without it in 16, and the second stage; of an
# avatar, with guidance in 50 steps, and without it in 8.
BASE, DISTILLED, REFINE = "base", "distilled", "refine"
AVATAR, AVATAR_DISTILLED = "avatar", "avatar, distilled"
KINDS = BASE, DISTILLED, REFINE, AVATAR, AVATAR_DISTILLED


@dataclass(frozen=True)
class Price:
    """What a set costs and gains.

    psnr: against exact, in dB, of the video in the middle; floor: the same of a second exact kernel, the noise floor;
    model: measured with it. times: as fast as exact; timing: by what. date: of the measurement.
    """

    psnr: float
    floor: float
    model: str
    times: float
    timing: str
    date: str

    def in_words(self) -> str:
        """Short, for help and tables."""
        return f"{self.psnr:.3g} dB against exact, {self.times:.3g} times as fast"

    def measured(self) -> str:
        """How it was measured."""
        floor = f"two exact kernels are {self.floor:.3g} dB apart"
        return f"dB on {self.model}, where {floor}; times by {self.timing}; {self.date}"


@dataclass(frozen=True)
class SpeedSet:
    """Options by their names; what stays at its default is not in the set.

    price: None only for a set without options. sparse: density of sparse attention, after the first
    `dense_steps` of the steps. attention: only where the machine has it; otherwise the exact one.
    """

    price: Price | None
    fp8: bool = False
    attention: str = "auto"
    sparse: float | None = None
    dense_steps: float = 0.2
    step_cache: float = 0.0
    guidance_until: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """What it sets, by name; `dense_steps` belongs to `sparse`."""
        rest = ("price", "dense_steps")
        found = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in found.items() if name not in rest and value != default}

    def in_words(self, names: Iterator[str] | tuple[str, ...] | None = None) -> str:
        """These of its options, or all, in words; "" if it has none."""
        words = {
            "fp8": "fp8",
            "attention": f"attention {self.attention}",
            "sparse": f"sparse attention {self.sparse or 0:g} after {self.dense_steps:.0%} of the steps",
            "step_cache": f"step cache {self.step_cache:g}",
            "guidance_until": f"guidance until {self.guidance_until:g}",
        }
        return joined([words[name] for name in (self.options if names is None else names)])


_NOTHING = SpeedSet(None)
_MINI, _DATE = "LongCat-mini (8 videos, H200, bf16)", "2026-11-29"
_UNGUIDED = f"{_MINI}, without a step LoRA"
_REFINED = "LongCat-mini (4 videos, H200, bf16), without the refinement LoRA"
_STEPS = "steps of the released model's size on an H200"
_UNTIL = Price(49.1, 51.9, _MINI, 1.02, "evaluations of the network, 98 of 100", _DATE)
_CACHE = Price(42.9, 51.9, _MINI, 1.9, "computed steps, 26.4 of 50", _DATE)
_FP8_CACHE = Price(34.5, 51.9, _MINI, 3.2, f"{_STEPS}, of which 19.5 of 50 are computed", _DATE)
_FP8_CACHE_16 = Price(42.3, 54.3, _UNGUIDED, 1.4, f"{_STEPS}, of which 14.5 of 16 are computed", _DATE)
_FP8_ATTENTION = Price(34.7, 54.3, _UNGUIDED, 1.5, _STEPS, _DATE)
_FP8_REFINE = Price(52.6, 57.4, _REFINED, 1.6, _STEPS, _DATE)
_REFINING = SpeedSet(_FP8_REFINE, fp8=True)
_NANO, _NANO_8 = (f"the nano avatar (8 videos of two segments, {how}, CPU, bf16)" for how in ("guided", "distilled"))
_AVATAR_STEPS = "steps of the released avatar's size on an H200"
_AVATAR_3 = Price(48.9, 50.8, _NANO, 2.6, "computed steps, 38.9 of 100", _DATE)
_AVATAR_5 = Price(45.7, 50.8, _NANO, 3.3, "computed steps, 30.1 of 100", _DATE)
_AVATAR_FP8_10 = Price(35.2, 50.8, _NANO, 5.0, f"{_AVATAR_STEPS}, of which 24.8 of 100 are computed", _DATE)
_AVATAR_8_3 = Price(57.6, 52.8, _NANO_8, 1.28, "computed steps, 12.5 of 16", _DATE)
_AVATAR_8_5 = Price(48.6, 52.8, _NANO_8, 1.6, "computed steps, 9.9 of 16", _DATE)
_AVATAR_8_FP8_10 = Price(39.7, 52.8, _NANO_8, 2.2, f"{_AVATAR_STEPS}, of which 9 of 16 are computed", _DATE)
# Word -> kind of sampling -> set, chosen from docs/fidelity.md, docs/fidelity-distilled.md, docs/fidelity-avatar.md and
# docs/fidelity-avatar-distilled.md; docs/cli.md says why. No set has sparse attention: without a calibration it costs
# LongCat-mini more than anything else does.
SETS: dict[Speed, dict[str, SpeedSet]] = {
    "exact": dict.fromkeys(KINDS, _NOTHING),
    "near": {
        BASE: SpeedSet(_UNTIL, guidance_until=0.95),
        DISTILLED: _NOTHING,
        REFINE: _NOTHING,
        AVATAR: SpeedSet(_AVATAR_3, step_cache=0.03),
        AVATAR_DISTILLED: SpeedSet(_AVATAR_8_3, step_cache=0.03),
    },
    "fast": {
        BASE: SpeedSet(_CACHE, step_cache=0.05),
        DISTILLED: SpeedSet(_FP8_CACHE_16, fp8=True, step_cache=0.05),
        REFINE: _REFINING,
        AVATAR: SpeedSet(_AVATAR_5, step_cache=0.05),
        AVATAR_DISTILLED: SpeedSet(_AVATAR_8_5, step_cache=0.05),
    },
    "fastest": {
        BASE: SpeedSet(_FP8_CACHE, fp8=True, step_cache=0.1),
        DISTILLED: SpeedSet(_FP8_ATTENTION, fp8=True, attention="cudnn-fp8"),
        REFINE: _REFINING,
        AVATAR: SpeedSet(_AVATAR_FP8_10, fp8=True, step_cache=0.1),
        AVATAR_DISTILLED: SpeedSet(_AVATAR_8_FP8_10, fp8=True, step_cache=0.1),
    },
}


def set_of(speed: Speed, schedule: str, avatar: bool = False) -> SpeedSet:
    """The set of a word for a schedule. avatar: of a network that hears."""
    if avatar:
        return SETS[speed][AVATAR_DISTILLED if schedule == DISTILLED else AVATAR]
    return SETS[speed][schedule if schedule in (DISTILLED, REFINE) else BASE]


def joined(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def prices_in_words(kind: str = BASE) -> str:
    """The lossy words with their prices, for help."""
    found = []
    for speed in SPEEDS[1:]:
        price = SETS[speed][kind].price
        found.append(f"{speed} ({price.in_words() if price else 'as exact'})")
    return joined(found)
