"""How far a video may lie from the CPU's of the same prompt, setting by setting, and which cells are refused."""

from __future__ import annotations

from .cells import Cell

# dB. The CPU computes in fp32, the card in bf16.
ROUNDING = 25.0


def limit(cell: Cell) -> float:
    """The least PSNR in dB at which a cell's video is right."""
    return ROUNDING


def refusal(cell: Cell) -> str:
    """A part of the sentence with which a cell is refused; empty if it must run."""
    return ""
