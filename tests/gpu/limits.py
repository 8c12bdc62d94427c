"""How far a video may lie from the CPU's of the same prompt, setting by setting, and which cells are refused."""

from __future__ import annotations

from .cells import EASY, LAZY, SPARSE, STEP, Cell

# Optional ones that decide what runs.
PACKAGES = frozenset({"gguf"})

# Least PSNR in dB over all frames.
#
# ROUNDING: the CPU computes in fp32, the card in bf16, over up to 16 steps.
ROUNDING = 25.0
# Cache decisions and block choices compare numbers with a threshold; rounding may tip one, which changes a whole step.
TIPPED = 20.0
# Products with activations in 8 or 4 bits, where the card has them and the CPU does not.
PRODUCTS = 19.0
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
WHY = {ROUNDING: "bf16 instead of fp32", TIPPED: "rounding may tip a decision", PRODUCTS: "activations in 8 or 4 bits"}
STOCK: dict[str, float] = {"TrainLoraNode": TIPPED}


def limit(cell: Cell) -> float:
    """The least PSNR in dB at which a cell's video is right."""
    return min(LIMITS.get(cell.extra, ROUNDING), WEIGHTS.get(cell.weights, ROUNDING))


def refusal(cell: Cell, packages: frozenset[str]) -> str:
    """A part of the sentence with which a cell is refused; empty if it must run. packages: which of PACKAGES
    ComfyUI's Python has."""
    if cell.weights.startswith("GGUF") and "gguf" not in packages:
        return "is a GGUF file, which needs a package; run: pip install gguf"
    return ""


def page() -> str:
    """The table of limits, for the report."""
    lines = [("everything else", ROUNDING), *LIMITS.items(), *WEIGHTS.items(), *STOCK.items()]
    rows = "\n".join(f"| {name} | {decibels:g} | {WHY[decibels]} |" for name, decibels in lines)
    return f"| setting | least PSNR in dB | because |\n| --- | --- | --- |\n{rows}"
