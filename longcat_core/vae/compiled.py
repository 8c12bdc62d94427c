"""The VAE's stages under torch.compile: one graph for each stage, and one more for clips of other sizes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from ..optimize.compilation import Regional
from .network import Decoder, Encoder, run_stage

STAGE = Regional(run_stage, "a stage of the VAE", slow=False)


def compiled_stage(
    coder: Encoder | Decoder, number: int, x: Tensor, kept: Sequence[Tensor | None], first: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """`run_stage`, compiled."""
    there = tuple(None if frames is None else frames.shape[1] for frames in kept)
    sizes = [(x, (2, 3) if x.shape[1] == 1 else (1, 2, 3))]
    sizes += [(frames, (2, 3)) for frames in kept if frames is not None]
    result: tuple[Tensor, list[Tensor | None]] = STAGE(
        *(coder, number, x, list(kept), first),
        kind=(type(coder), x.shape[-1], number, len(x), x.shape[1] == 1, first, there, x.dtype, x.device),
        size=x.shape[1:4],
        sized=sizes,
        announce=lambda sentence: warnings.warn(sentence, stacklevel=2),
    )
    return result
