"""The values of each axis of the matrix, and its cells: pairs of values rather than the whole product."""

from __future__ import annotations

from collections import Counter
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
# The exchange has no effect on one GPU.
assert SWITCHES.keys() == {field.name for field in fields(Optimizations)} - {"exchange"}
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


# Weights that every patch meets: full precision, ComfyUI's cast, our 8-bit layers, one of comfy-kitchen's.
WITH_PATCHES = ("bf16", "weight_dtype fp8_e4m3fn", "fp8 rowwise", "int8 convrot")
COVERED = (
    "Pairs that are covered: weights with VRAM mode and sampler; patch with VRAM mode, sampler and the weights "
    f"{', '.join(WITH_PATCHES)}; task with VRAM mode and sampler. Each of the weights and each patch meets four of the "
    "six tasks; other weights run without a patch."
)


def possible(task: str, sampler: str) -> bool:
    """The long nodes sample by themselves."""
    return task not in LONG_TASKS or sampler == LONGCAT


def pairs(weights: Sequence[str], modes: Sequence[str]) -> list[Cell]:
    """Cells with all pairs of COVERED."""
    plain = [(*row, NONE) for row in AllPairs([list(weights), list(modes), list(SAMPLERS)])]
    chosen = [name for name in WITH_PATCHES if name in weights]
    axes = [list(EXTRAS[1:]), chosen, list(modes), list(SAMPLERS)]
    rows = plain + [(form, mode, sampler, extra) for extra, form, mode, sampler in AllPairs(axes)]
    used: Counter[tuple[str, str]] = Counter()
    cells = []
    for form, mode, sampler, extra in rows:
        # What a task has met least comes next, so that tasks are spread evenly over weights, patches and modes.
        met = {"weights": form, "mode": mode, "extra": extra, "sampler": sampler}
        task = min(
            (task for task in TASKS if possible(task, sampler)),
            key=lambda task: (
                used[task, met["weights" if extra == NONE else "extra"]],
                used[task, mode] + used[task, sampler],
                used[task, form],
            ),
        )
        used.update((task, value) for value in met.values())
        cells.append(Cell(form, sampler, mode, extra, task))
    # A run that is cut short has met some of all; the first rows of each kind have the most pairs.
    return evenly(cells[: len(plain)], cells[len(plain) :])


def evenly(*kinds: Sequence[Cell]) -> list[Cell]:
    """All cells, each kind in its order and spread over the whole list."""
    placed = [((number + 0.5) / len(kind), cell) for kind in kinds for number, cell in enumerate(kind)]
    return [cell for _, cell in sorted(placed, key=lambda entry: entry[0])]


def first_cells(modes: Sequence[str]) -> list[Cell]:
    """The plainest video in every VRAM mode with every sampler, which is what a short run tries."""
    return [Cell("bf16", sampler, mode, NONE, T2V) for mode in modes for sampler in SAMPLERS]
