"""The values of each axis of the matrix, and its cells: all pairs of values rather than the whole product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from allpairspy import AllPairs

from longcat_core.optimize.switches import Optimizations

# Sampler that drives the MODEL. The long nodes sample by themselves, as LongCat Sampler does.
LONGCAT, KSAMPLER, CUSTOM = "LongCat Sampler", "KSampler", "SamplerCustomAdvanced"
SAMPLERS = (LONGCAT, KSAMPLER, CUSTOM)

DYNAMIC, STATIC, HELD, NOVRAM, CPU = "dynamic VRAM", "--disable-dynamic-vram", "held to 12 GB", "--novram", "--cpu"
MODES = (DYNAMIC, STATIC, HELD, NOVRAM)

T2V, I2V, CONTINUATION = "T2V", "I2V", "continuation"
REFINE, LONG, REFINE_LONG = "refine", "long video", "refine long"
TASKS = (T2V, I2V, CONTINUATION, REFINE, LONG, REFINE_LONG)
LONG_TASKS = (LONG, REFINE_LONG)

NONE = "none"
# Each switch of LongCat Optimizations that can be set by itself -> its value away from the default.
SWITCHES = {
    "fused_qkv": False,
    "fused_ffn": False,
    "text_mode": "padded",
    "attention": "sdpa",
    "compile": "blocks",
    "explicit_fp32": False,
    "gradient_checkpointing": True,
    "reuse_text": False,
    "reuse_modulation": False,
    "fused_step": False,
    "fp8": False,
    "fused_kernels": False,
    "split_guidance": True,
    "fused_text": False,
}
assert SWITCHES.keys() == {field.name for field in fields(Optimizations)}
LORA, BYPASS, COMPILE = "LoraLoaderModelOnly", "LoraLoaderBypassModelOnly", "TorchCompileModel"
EASY, LAZY, SPARSE, STEP = "EasyCache", "LazyCache", "Block-Sparse", "Step Cache"
PATCHES = (NONE, LORA, BYPASS, COMPILE, EASY, LAZY, SPARSE, STEP)
EXTRAS = (*PATCHES, *(f"{name}={value}".lower() for name, value in SWITCHES.items()))


@dataclass(frozen=True)
class Cell:
    """One prompt: a value of each axis."""

    weights: str
    sampler: str
    mode: str
    extra: str
    task: str

    @property
    def name(self) -> str:
        return " / ".join((self.weights, self.sampler, self.mode, self.extra, self.task))


def possible(task: str, sampler: str) -> bool:
    """The long nodes sample by themselves."""
    return task not in LONG_TASKS or sampler == LONGCAT


def pairs(weights: Sequence[str], modes: Sequence[str]) -> list[Cell]:
    """Cells in which every possible pair of values of two axes occurs."""
    axes = [list(weights), list(EXTRAS), list(TASKS), list(modes), list(SAMPLERS)]

    def allowed(row: list[str]) -> bool:
        return len(row) < len(axes) or possible(row[2], row[4])

    return [Cell(form, sampler, mode, extra, task) for form, extra, task, mode, sampler in AllPairs(axes, allowed)]


def first_cells(modes: Sequence[str]) -> list[Cell]:
    """The plainest video in every VRAM mode with every sampler, which is what a short run tries."""
    return [Cell("bf16", sampler, mode, NONE, T2V) for mode in modes for sampler in SAMPLERS]
