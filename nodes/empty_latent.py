"""Empty LongCat Latent: the size and the length of a video from text, as a LATENT."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..longcat_core.generate.request import check_frames, check_side
from ..longcat_core.sampling.conditioning import latent_shape
from .inputs import LongCatNode


class EmptyLatent(LongCatNode):
    ID = "LongCatEmptyLatent"

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int = 1) -> io.NodeOutput:
        check_frames(length, "length")
        check_side("width", width)
        check_side("height", height)
        shape = (batch_size, *latent_shape(length, height, width))
        return io.NodeOutput({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())})


NODES = [EmptyLatent]
