"""How far a video may lie from the CPU's, setting by setting, and which cells are refused with which sentence.

The CPU's video is that of the bf16 file in fp32. Measured on a CPU with the headless core, videos from text of 6 and 16
steps, two seeds, in dB: bf16 arithmetic 27 to 34, fp8 rowwise 19 to 24, one projection of one of the six blocks lost
17 to 19. In the rows, forms and switches act on all blocks, so that a wrong layout, scale or order costs more than
that one projection.
"""

from __future__ import annotations

from .cells import EASY, LAZY, SPARSE, STEP, Cell

# Optional packages that decide what runs.
PACKAGES = frozenset({"gguf"})

# Least PSNR in dB over all frames -> why it is no more.
ROUNDING, TIPPED, EIGHT, FOUR = 23.0, 18.0, 16.0, 13.0
WHY = {
    ROUNDING: "bf16 instead of fp32: 27 dB at least on a CPU",
    TIPPED: "rounding may tip the decision to skip a step or a block of attention",
    EIGHT: "weights or activations in 8 bits: 19 dB at least on a CPU, for fp8 rowwise",
    FOUR: "weights in 4 bits, or with 2 bits of mantissa: up to 5 times the error of 8 bits (0.137 for 0.027)",
}
PATCHES = {EASY: TIPPED, LAZY: TIPPED, SPARSE: TIPPED, STEP: TIPPED}
_EIGHT = ("fp8_e4m3fn", "rowwise", "scaled fp8", "plain e4m3", "comfy_quant fp8", "int8", "INT8", "mxfp8", "GGUF")
_FOUR = ("e5m2", "nvfp4", "w4a4", "w4a8", "awq")
STOCK: dict[str, float] = {"TrainLoraNode": TIPPED}


def weights_limit(weights: str) -> float:
    if any(part in weights for part in _FOUR):
        return FOUR
    return EIGHT if any(part in weights for part in _EIGHT) else ROUNDING


def limit(cell: Cell) -> float:
    """The least PSNR in dB at which a cell's video is right."""
    return min(PATCHES.get(cell.extra, ROUNDING), weights_limit(cell.weights))


def refusal(cell: Cell, packages: frozenset[str]) -> str:
    """A part of the sentence with which a cell is refused; empty if it must run. packages: which of PACKAGES
    ComfyUI's Python has."""
    if cell.weights.startswith("GGUF") and "gguf" not in packages:
        return "is a GGUF file, which needs a package; run: pip install gguf"
    return ""


def page() -> str:
    """The table of limits, for the report."""
    settings = {
        ROUNDING: "everything else",
        TIPPED: ", ".join([*PATCHES, *STOCK]),
        EIGHT: "weights with " + ", ".join(_EIGHT),
        FOUR: "weights with " + ", ".join(_FOUR),
    }
    rows = "\n".join(f"| {settings[dB]} | {dB:g} | {why} |" for dB, why in WHY.items())
    return f"| setting | least PSNR in dB | because |\n| --- | --- | --- |\n{rows}"
