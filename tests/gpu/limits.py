"""How far a video may lie from the CPU's, setting by setting, and which cells are refused with which sentence.

The CPU's video is that of the bf16 file in fp32. Measured on a CPU with the headless core, videos from text of 6 and 16
steps, two seeds, in dB: bf16 arithmetic 27 to 34, fp8 rowwise 19 to 24, one projection of one of the six blocks lost
17 to 19. In the rows, forms and switches act on all blocks, so that a wrong layout, scale or order costs more than
that one projection.
"""

from __future__ import annotations

from .cells import BYPASS, EASY, LAZY, LORA, SPARSE, STEP, Cell

# Optional packages that decide what runs.
PACKAGES = frozenset({"gguf"})

# Least PSNR in dB over all frames -> why it is not higher.
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


# --- The wide network ------------------------------------------------------------------------------------------------
#
# Norm of the difference over the norm, of latents after two steps in bf16, at most. Measured on a CPU with the headless
# core, three blocks of width 512 with the gain of the real width: exact attention by another kernel 0.014 (0.015
# against ComfyUI on an H100). One layer's share of the LoRA lost 0.35, one layer lost 0.70.
SAME, MERGED, BESIDE, TIPPED_8_BIT, COARSE = 0.03, 0.05, 0.06, 0.12, 0.3
WIDE_WHY = {
    SAME: "sums in another order",
    MERGED: "another kernel 0.033, because the LoRA doubles the weights; merged in fp16, as ComfyUI does with streamed "
    "weights, instead of fp32 0.037",
    BESIDE: "a LoRA beside the weights instead of merged into them 0.041",
    TIPPED_8_BIT: "fp8 rowwise by another kernel 0.108, because a last bit of an activation tips its rounding to 8 "
    "bits; fp8_e4m3fn_fast with activations in 8 bits or, with dynamic VRAM, which casts weights at use, in 16 bits "
    "0.104",
    COARSE: "weights of 8 bits, or blocks of attention left out, against the core's bf16",
}


def wide_limit(weights: str, extra: str, *, against_core: bool) -> float:
    """The most by which latents of the wide network may be off. against_core: from the headless core's instead of those
    of another VRAM mode."""
    if weights == "fp8 rowwise":
        return TIPPED_8_BIT
    if extra == SPARSE or (against_core and weights != "bf16"):
        return COARSE
    if weights == "UNETLoader fp8_e4m3fn_fast":
        return TIPPED_8_BIT
    return {LORA: MERGED, BYPASS: BESIDE}.get(extra, SAME)


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
    wide = "\n".join(f"| {most:g} | {why} |" for most, why in WIDE_WHY.items())
    return (
        f"| setting | least PSNR in dB | because |\n| --- | --- | --- |\n{rows}\n\n"
        f"| most that latents of the wide network are off | because |\n| --- | --- |\n{wide}"
    )
