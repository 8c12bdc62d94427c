"""LongCat Sparse Attention: a MODEL whose self-attention computes a share of its blocks exactly."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..longcat_core.generate.calibration import check_fits, read_calibration
from ..longcat_core.optimize.sparse.choose import check_sparse
from ..longcat_core.optimize.sparse.settings import Sparse
from .checks import check_ranges
from .comfy_network import SPARSE_KEY
from .folders import output_folder
from .inputs import LongCatNode
from .models import require_longcat, with_option

NAME = "LongCat Sparse Attention"


class SparseAttention(LongCatNode):
    ID = "LongCatSparseAttention"

    @classmethod
    def validate_inputs(cls, density=None, dense_steps=None, kernel=None) -> bool:
        check_ranges(cls.ID, {"density": density, "dense_steps": dense_steps})
        if kernel is not None:
            check_sparse(kernel)
        return True

    @classmethod
    def execute(cls, model, density: float, calibration="", dense_steps=0.2, kernel="auto") -> io.NodeOutput:
        require_longcat(model, NAME)
        check_sparse(kernel)
        if calibration.strip():
            path = output_folder(calibration.strip())
            found = read_calibration(path)
            check_fits(found, model.model.diffusion_model, str(path))
            return io.NodeOutput(with_option(model, SPARSE_KEY, found.sparse(kernel=kernel)))
        if density == 1:
            # Full attention, also under a speed that would have it sparse.
            return io.NodeOutput(with_option(model, SPARSE_KEY, None))
        settings = Sparse(density, dense_steps=dense_steps, kernel=kernel)
        logging.info("%s: density %g is not calibrated for this model; LongCat Calibrate does that", NAME, density)
        return io.NodeOutput(with_option(model, SPARSE_KEY, settings))


NODES = [SparseAttention]
