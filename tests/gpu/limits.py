"""How far a video may lie from the CPU's of the same prompt, setting by setting, and which cells are refused."""

from __future__ import annotations

from .cells import EASY, LAZY, SPARSE, STEP, Cell

# Least PSNR in dB over all frames.
#
# ROUNDING: the CPU computes in fp32, the card in bf16, over up to 16 steps.
ROUNDING = 25.0
# Cache decisions and block choices compare numbers with a threshold; rounding may tip one, which changes a whole step.
TIPPED = 20.0
# Products with activations in 8 or 4 bits, where the card has them and the CPU does not.
PRODUCTS = 20.0
LIMITS = {EASY: TIPPED, LAZY: TIPPED, SPARSE: TIPPED, STEP: TIPPED}
WEIGHTS = {
    "fp8 rowwise": PRODUCTS,
    "scaled fp8, rowwise": PRODUCTS,
    "GGUF Q8_0, rowwise": PRODUCTS,
    "UNETLoader fp8_e4m3fn_fast": PRODUCTS,
    "comfy_quant fp8": PRODUCTS,
    "scaled fp8": PRODUCTS,
    "int8_tensorwise": PRODUCTS,
    "int8 convrot": PRODUCTS,
    "nvfp4": PRODUCTS,
    "mxfp8": PRODUCTS,
    "convrot_w4a4": PRODUCTS,
    "asym_w4a8_int8": PRODUCTS,
}
STOCK: dict[str, float] = {"TrainLoraNode": TIPPED}


def limit(cell: Cell) -> float:
    """The least PSNR in dB at which a cell's video is right."""
    return min(LIMITS.get(cell.extra, ROUNDING), WEIGHTS.get(cell.weights, ROUNDING))


def refusal(cell: Cell) -> str:
    """A part of the sentence with which a cell is refused; empty if it must run."""
    return ""
