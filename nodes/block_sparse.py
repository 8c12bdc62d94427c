"""LongCat Block-Sparse Attention: a MODEL whose self-attention leaves out what matters least."""

from __future__ import annotations

from comfy_api.latest import io

from ..longcat_core.optimize.block_sparse import BlockSparse
from .comfy_model import BLOCK_SPARSE_KEY
from .loaders import CATEGORY
from .sampling import _require_longcat

# Frames, rows and columns of tokens; a token is one latent frame of 16x16 pixels.
CHUNKS = {"4x4x4": (4, 4, 4), "4x4x8": (4, 4, 8), "8x4x4": (8, 4, 4)}


class BlockSparseAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LongCatBlockSparseAttention",
            display_name="LongCat Block-Sparse Attention",
            category=CATEGORY,
            description="Every small box of the video attends to the few boxes that matter most to it, which is how "
            "LongCat-Video refines to 720p. Faster on large videos; another result than full attention.",
            inputs=[
                io.Model.Input("model", tooltip="LongCat-Video, for refining with the refinement LoRA."),
                io.Float.Input(
                    "sparsity",
                    default=0.9375,
                    min=0.0,
                    max=1.0,
                    # The page shows as many digits as the step has.
                    step=0.0005,
                    round=0.0001,
                    tooltip="The share of boxes that is left out; 0.9375 as released, 0: full attention.",
                ),
                io.Float.Input(
                    "cdf_threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Above 0: keep boxes until they hold this share of the attention, if that is more than "
                    "sparsity keeps.",
                ),
                io.Combo.Input(
                    "chunk",
                    options=list(CHUNKS),
                    default="4x4x4",
                    tooltip="Size of a box in tokens: frames, rows, columns. 4x4x4 as released.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For LongCat Sampler (mode refine) and for stock samplers.")],
        )

    @classmethod
    def execute(cls, model, sparsity: float, cdf_threshold: float, chunk: str) -> io.NodeOutput:
        _require_longcat(model, "LongCat Block-Sparse Attention")
        settings = None
        if sparsity > 0:
            settings = BlockSparse(sparsity, cdf_threshold or None, CHUNKS[chunk])
        model = model.clone()
        model.model_options.setdefault("transformer_options", {})[BLOCK_SPARSE_KEY] = settings
        return io.NodeOutput(model)


NODES = [BlockSparseAttention]
