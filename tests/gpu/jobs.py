"""What a server has to do for one row of the report, and what its video is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import limits, stock
from .cells import BYPASS, COMPILE, CUSTOM, LONGCAT, LORA, NONE, SWITCHES, T2V, Cell
from .graphs import Prompt, nano
from .weights import AXIS, EXACT

PAIRS, STOCK, WIDE = "pairs", "stock", "wide"


@dataclass(frozen=True)
class Job:
    """One row. prompts: run in order on the server of `mode`; the video of the last one's node "save" counts.
    reference: the same on a CPU, under a key that rows with one video share. limit: the least PSNR against it in dB.
    refusal: a part of the sentence with which the row is expected to be refused, empty if it must run. scored: whether
    the scene is looked for in the video as well."""

    kind: str
    name: str
    mode: str
    prompts: tuple[Prompt, ...]
    key: tuple[str, ...]
    reference: tuple[Prompt, ...]
    limit: float
    refusal: str = ""
    scored: bool = False
    cell: Cell | None = None

    @property
    def nodes(self) -> list[str]:
        """The kinds of all nodes in the prompts."""
        return sorted({part["class_type"] for prompt in self.prompts for part in prompt.values()})


def counterpart(cell: Cell) -> Cell:
    """The cell whose video on the CPU this one is compared with. Weights are those of the file in full precision, exact
    switches are left out, a LoRA is patched into the weights, and SamplerCustomAdvanced gives what LongCat Sampler
    does."""
    extra = cell.extra
    if extra == COMPILE or extra.partition("=")[0] in SWITCHES:
        extra = NONE
    sampler = LONGCAT if cell.sampler == CUSTOM else cell.sampler
    return replace(cell, weights="bf16", sampler=sampler, mode="", extra=LORA if extra == BYPASS else extra)


def of_cell(cell: Cell, number: int, packages: frozenset[str] = limits.PACKAGES) -> Job:
    """packages: those of limits.PACKAGES that ComfyUI's Python has."""
    other = counterpart(cell)
    key = (other.sampler, other.extra, other.task)
    return Job(
        PAIRS,
        cell.name,
        cell.mode,
        (nano(cell, AXIS[cell.weights].node(), f"cell-{number}"),),
        key,
        (nano(other, AXIS[other.weights].node(), f"reference-{'-'.join(key)}".replace(" ", "_")),),
        limits.limit(cell),
        limits.refusal(cell, packages),
        # Coarse weights and lossy caches may lose what a few steps show.
        scored=cell.task == T2V and AXIS[cell.weights].numbers == EXACT,
        cell=cell,
    )


def of_stock(row: str, mode: str) -> Job:
    name = row.replace(", ", "-").lower()
    prompts = stock.prompts(row, f"stock-{name}")
    return Job(STOCK, f"{row} / {mode}", mode, prompts, ("stock", row), prompts, limits.STOCK.get(row, limits.ROUNDING))
