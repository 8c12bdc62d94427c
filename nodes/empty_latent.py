"""Empty LongCat Latent: the size and the length of a video from text, as a LATENT."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..longcat_core.sampling.conditioning import latent_shape
from .checks import check_length, check_size
from .inputs import LongCatNode


class EmptyLatent(LongCatNode):
    ID = "LongCatEmptyLatent"

    @classmethod
    def validate_inputs(cls, width=None, height=None, length=None) -> bool:
        check_size(width, height)
        check_length(length)
        return True

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int = 1) -> io.NodeOutput:
        cls.validate_inputs(width, height, length)
        shape = (batch_size, *latent_shape(length, height, width))
        return io.NodeOutput({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())})


NODES = [EmptyLatent]
