"""LongCat Multi-GPU: a MODEL whose every step is shared between several GPUs."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..longcat_core.parallel.devices import devices_of
from .comfy_network import GPUS_KEY
from .inputs import LongCatNode
from .models import require_longcat, with_option

NAME = "LongCat Multi-GPU"


class MultiGPU(LongCatNode):
    ID = "LongCatMultiGPU"

    @classmethod
    def execute(cls, model, gpus: str) -> io.NodeOutput:
        require_longcat(model, NAME)
        wanted = gpus if gpus == "auto" else int(gpus)
        if len(devices_of(wanted, model.load_device)) == 1:
            logging.info("%s: the work stays on one GPU", NAME)
            wanted = None
        return io.NodeOutput(with_option(model, GPUS_KEY, wanted))


NODES = [MultiGPU]
