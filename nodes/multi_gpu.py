"""LongCat Multi-GPU: a MODEL whose every step is shared between several GPUs; and a test of these."""

from __future__ import annotations

import logging

import comfy.model_management
from comfy_api.latest import io, ui

from ..longcat_core.errors import LongCatError
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


class MultiGPUTest(LongCatNode):
    ID = "LongCatMultiGPUTest"

    @classmethod
    def fingerprint_inputs(cls, **inputs: str) -> float:
        # Equal to nothing, so that it runs whenever it is queued.
        return float("nan")

    @classmethod
    def execute(cls, gpus: str) -> io.NodeOutput:
        # Imports torch.distributed.
        from ..longcat_core.parallel.self_test import check_several, report
        from .comfy_ranks import WORKERS

        devices = devices_of(gpus if gpus == "auto" else int(gpus), comfy.model_management.get_torch_device())
        check_several(devices)
        lines = []
        for line, failed in report(WORKERS.group(devices)):
            if failed:
                raise LongCatError(line)
            logging.info("%s Test: %s", NAME, line)
            lines.append(line)
            comfy.model_management.throw_exception_if_processing_interrupted()
        return io.NodeOutput("\n".join(lines), ui=ui.PreviewText("\n".join(lines)))


NODES = [MultiGPU, MultiGPUTest]
