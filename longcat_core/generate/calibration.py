"""Calibrations: which share of the blocks each head of sparse attention needs, as a JSON file that people can share.

A calibration belongs to weights, in every form in which they are published. Files differ in names, dtypes and packing,
so a fingerprint of a file would refuse the same weights in another one. What all forms keep in 16 bits or more are the
norms of queries and keys and the biases of their projection: `marks` are some of these numbers, and two models are the
same if all marks agree within `LIKE`. LoRAs change neither, so a calibration holds with any LoRA, the distilled one
too; `notes` says where a run differs from what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.load import Checkpoint, read_parameter
from ..errors import LongCatError
from ..files.atomic import atomic_path
from ..files.places import check_place, check_suffix
from ..files.records import FiniteFloat, parse_record
from ..files.regular import read_bytes
from ..model.config import ModelConfig
from ..model.transformer import LongCatTransformer
from ..optimize.sparse.settings import QUERY_BLOCKS, Densities, Sparse
from .options import SCHEDULES

FORMAT, VERSION = "longcat calibration", 1
SUFFIXES = (".json",)
REMEDY = "run longcat calibrate on this model"
# A calibration of the released model has about 60 kB.
MAX_BYTES = 8 << 20
# Of each block: parameters, and how many of their numbers are marks.
MARKED = {"attn.q_norm.weight": 4, "attn.k_norm.weight": 4, "attn.qkv.bias": 8}
# Rounding to 16 bits changes a number by less than this share of it; the second: what a number near 0 may differ by.
LIKE, NEAR_ZERO = 0.01, 1e-5
# Of numbers in the file, whose meaning ends before these digits.
DIGITS = 4
Marks = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Calibrated:
    """The network that was measured. marks: see `marks_of`."""

    depth: int
    heads: int
    head_dim: int
    marks: tuple[tuple[FiniteFloat, ...], ...]


@dataclass(frozen=True)
class Settings:
    """What was measured.

    budget: error of the layers' attention, |sparse - exact| / |exact| behind its output projection, the root mean
    square of a range. dense_steps: share of the steps before the first range, which stay dense. given: conditioning
    frames. tail, query_block: see `Sparse`. lora: names of files that were added to the weights.
    """

    budget: FiniteFloat
    schedule: str
    steps: int
    guidance: FiniteFloat
    frames: int
    height: int
    width: int
    given: int
    dense_steps: FiniteFloat
    query_block: int
    tail: bool
    seed: int
    lora: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """How large the error of a layer's attention is if all heads have one density: the median over ranges and layers,
    and the 0.9 quantile. mass: share of the softmax in the blocks that are taken, mean."""

    density: FiniteFloat
    median: FiniteFloat
    high: FiniteFloat
    mass: FiniteFloat


@dataclass(frozen=True)
class VideoCheck:
    """A whole video with the result against the exact one. psnr, floor_psnr: in dB, None for identical frames, of the
    result and of the noise floor; floor: what the noise floor is; without one, why, and floor_psnr is None.
    dense_s, sparse_s: seconds of a step; speed_up: of all steps."""

    psnr: FiniteFloat | None
    floor_psnr: FiniteFloat | None
    floor: str
    dense_s: FiniteFloat
    sparse_s: FiniteFloat
    speed_up: FiniteFloat


@dataclass(frozen=True)
class Calibration:
    """The content of a file.

    ends: share of the steps at which each range ends, ascending, the last 1. densities: [ranges][layers][heads], shares
    of the blocks that are computed exactly. mass: [layers], see `Point`, at the density nearest to 0.15. head_mass: the
    same [layers][heads]; best_mass: the same of the blocks that hold the most of the softmax, which only the whole
    softmax would show; both are empty in files that were written before they existed.
    expected_speed_up: of a whole video, from the share of attention in a step and the densities.
    """

    format: str
    version: int
    model: Calibrated
    settings: Settings
    ends: tuple[FiniteFloat, ...]
    densities: tuple[tuple[tuple[FiniteFloat, ...], ...], ...]
    curve: tuple[Point, ...]
    mass: tuple[FiniteFloat, ...]
    expected_speed_up: FiniteFloat
    video: VideoCheck | None
    date: str
    machine: dict[str, Any]
    prompts: tuple[str, ...]
    head_mass: tuple[tuple[FiniteFloat, ...], ...] = ()
    best_mass: tuple[tuple[FiniteFloat, ...], ...] = ()

    @property
    def density(self) -> float:
        """Mean over ranges, layers and heads."""
        return torch.tensor(self.densities, dtype=torch.float64).mean().item()

    def price(self) -> str:
        """What it costs and gains, in words."""
        if (video := self.video) is None:
            return f"the calibration is expected to be {self.expected_speed_up:.2g} times as fast"
        far = "identical to exact" if video.psnr is None else f"{video.psnr:.3g} dB against exact"
        return f"the calibration was measured at {far}, {video.speed_up:.2g} times as fast"

    def sparse(self, **changes: Any) -> Sparse:
        """The settings of sparse attention that were found. changes: other fields, such as the kernel."""
        there = self.settings
        block: Any = there.query_block
        found = Densities(self.ends, self.densities)
        sparse = Sparse(densities=found, dense_steps=there.dense_steps, tail=there.tail, query_block=block)
        return replace(sparse, **changes)


@dataclass(frozen=True)
class _Kind:
    format: str
    version: int


# --- files -----------------------------------------------------------------------------------------------------------


def read_calibration(path: str | Path) -> Calibration:
    """Read and check a file. Raises LongCatError, one sentence, for anything else than a calibration of this version;
    whether it fits a model is left to `check_fits`."""
    content = read_bytes(path, "calibration", MAX_BYTES)
    found = parse_record(content, _Kind, f"{path}", "a calibration", "give a file that longcat calibrate wrote")
    if found.format != FORMAT:
        raise LongCatError(f"{path} is a file of {found.format!r}; give a file that longcat calibrate wrote")
    if found.version != VERSION:
        raise LongCatError(
            f"{path} is a calibration of version {found.version} and this reads version {VERSION}; {REMEDY}"
        )
    calibration = parse_record(content, Calibration, f"{path}", "a whole calibration", REMEDY)
    if fault := _fault(calibration):
        raise LongCatError(f"{path} is not a whole calibration ({fault}); {REMEDY}")
    return calibration


def _fault(found: Calibration) -> str:
    """What is wrong with the content, or ""."""
    depth, heads = found.model.depth, found.model.heads
    try:
        densities = Densities(found.ends, found.densities)
    except LongCatError as error:
        return str(error)
    if (densities.layers, densities.heads) != (depth, heads):
        return f"{densities.layers} layers of {densities.heads} heads with densities, but {depth} of {heads} in all"
    if not 0 <= found.settings.dense_steps <= 1:
        return f"a share of {found.settings.dense_steps:g} dense steps, which must lie between 0 and 1"
    if found.settings.query_block not in QUERY_BLOCKS:
        return f"a query block of {found.settings.query_block} tokens, which must have 64 or 128"
    for masses in (found.head_mass, found.best_mass):
        if masses and (len(masses), {*map(len, masses)}) != (depth, {heads}):
            return f"shares of the softmax of other layers and heads than {depth} of {heads}"
    if len(found.mass) != depth:
        return f"{len(found.mass)} layers with a share of the softmax, but {depth} in all"
    video, figures = found.video, [found.settings.budget, found.settings.steps, found.expected_speed_up]
    if min(*figures, *((video.dense_s, video.sparse_s, video.speed_up) if video else ())) <= 0:
        return "a budget, number of steps, time or speed-up that is not above 0"
    if found.settings.schedule not in SCHEDULES:
        return f"a schedule other than {', '.join(SCHEDULES)}"
    if len(found.model.marks) != depth or any(len(row) != sum(MARKED.values()) for row in found.model.marks):
        return "the marks of the model are not whole"
    return ""


def check_calibration_place(path: Path) -> None:
    """Raise LongCatError unless a calibration can be written to `path`."""
    check_calibration_suffix(path)
    check_place(path, 1 << 20)


def check_calibration_suffix(path: Path) -> None:
    """Raise LongCatError unless the name ends as a calibration's does."""
    check_suffix(path, SUFFIXES, "calibration")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file, whole or not at all."""
    text = json.dumps(asdict(calibration), ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(_wrapped(text), encoding="utf-8")


def _wrapped(text: str) -> str:
    """A line for each field and each layer, so that people can read and compare files."""
    lines = []
    for name, value in json.loads(text).items():
        inner = json.dumps(value, ensure_ascii=False)
        if name in ("densities", "model", "curve", "head_mass", "best_mass"):
            inner = inner.replace("], [", "],\n   [").replace("}, {", "},\n   {")
        lines.append(f" {json.dumps(name)}: {inner}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --- models ----------------------------------------------------------------------------------------------------------


def marks_of(model: LongCatTransformer | Checkpoint) -> Marks:
    """Numbers that tell weights from others and survive every published form, a row for each block.

    model: a network, or an opened checkpoint, of which only these small tensors are read.
    """
    config, read = model.config, _reader(model)
    return tuple(
        tuple(number for name, count in MARKED.items() for number in _some(read(f"blocks.{i}.{name}"), count))
        for i in range(config.depth)
    )


def _reader(model: LongCatTransformer | Checkpoint) -> Callable[[str], Tensor]:
    if isinstance(model, Checkpoint):
        return lambda name: read_parameter(model, name)

    def parameter(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        found: Tensor = getattr(model.get_submodule(module), kind)
        return found

    return parameter


def _some(values: Tensor, count: int) -> Iterator[float]:
    at = torch.linspace(0, values.numel() - 1, count).round().long()
    for value in values.detach().flatten().cpu().float()[at].tolist():
        yield float(f"{value:.{DIGITS}g}")


def check_fits(calibration: Calibration, model: LongCatTransformer | Checkpoint, name: str = "the calibration") -> None:
    """Raise LongCatError if the calibration belongs to other weights. name: the file, for the sentence."""
    config: ModelConfig = model.config
    measured, here = calibration.model, (config.depth, config.num_heads, config.head_dim)
    if (there := (measured.depth, measured.heads, measured.head_dim)) != here:
        words = (f"{depth} layers of {heads} heads of {size} channels" for depth, heads, size in (there, here))
        raise LongCatError(f"{name} is of a model with {next(words)} and this one has {next(words)}; {REMEDY}")
    if not same_weights(calibration.model.marks, marks_of(model)):
        raise LongCatError(f"{name} is of other weights than this model's; {REMEDY}")


def same_weights(one: Marks, other: Marks) -> bool:
    """Whether marks agree, up to rounding."""
    a, b = (torch.tensor(marks, dtype=torch.float64) for marks in (one, other))
    return a.shape == b.shape and torch.allclose(a, b, rtol=LIKE, atol=NEAR_ZERO)


def calibrated(model: LongCatTransformer | Checkpoint) -> Calibrated:
    """What a calibration says of the model that it was made with."""
    config: ModelConfig = model.config
    return Calibrated(config.depth, config.num_heads, config.head_dim, marks_of(model))


def notes(calibration: Calibration, name: str, *, schedule: str, guidance: float) -> list[str]:
    """Sentences on how a run differs from what the calibration `name` was measured with."""
    found, there = [], calibration.settings
    if (schedule == "distilled") != (there.schedule == "distilled"):
        found.append(f"{name} was measured with the {there.schedule} schedule, and this run's is {schedule}")
    elif guidance == 1 and there.guidance != 1:
        found.append(f"{name} was measured with guidance {there.guidance:g}, and this run has no guidance")
    return found
