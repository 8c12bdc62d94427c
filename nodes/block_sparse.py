"""LongCat Block-Sparse Attention: a MODEL whose self-attention skips the blocks that matter least."""

from __future__ import annotations

from comfy_api.latest import io

from ..longcat_core.optimize.block_sparse import BlockSparse
from .comfy_network import BLOCK_SPARSE_KEY
from .inputs import LongCatNode
from .models import require_longcat, with_option
from .widgets import CHUNKS


class BlockSparseAttention(LongCatNode):
    ID = "LongCatBlockSparseAttention"

    @classmethod
    def execute(cls, model, sparsity: float, cdf_threshold: float, chunk: str) -> io.NodeOutput:
        require_longcat(model, "LongCat Block-Sparse Attention")
        settings = None
        if sparsity > 0:
            settings = BlockSparse(sparsity, cdf_threshold or None, CHUNKS[chunk])
        return io.NodeOutput(with_option(model, BLOCK_SPARSE_KEY, settings))


NODES = [BlockSparseAttention]
