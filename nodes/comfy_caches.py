"""What a LongCat Guider computes once for a sampling run: keys and values of conditioning frames and of texts."""

from __future__ import annotations

import comfy.model_management
import torch
from torch import Tensor

from ..longcat_core.generate.text import MAX_LENGTH
from ..longcat_core.model.kv_cache import KVCache
from ..longcat_core.model.text import TextMode, TextTokens, fold_padding, real_tokens
from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.execution import AroundBlock, Execution

# Keys of transformer_options under which the network finds these caches.
CONDITIONING_CACHE_KEY = "longcat_conditioning_cache"
TEXT_CACHE_KEY = "longcat_text_cache"


class ConditioningCache:
    """Keys and values of the conditioning frames of one run, computed at its first step.

    A LongCat Guider puts one into transformer_options while it samples. Other conditioning frames, as in the next
    context window, replace them. Each GPU has its own.
    """

    def __init__(self, exact: bool) -> None:
        """exact: whether guidance sums over the conditioning frames too, as it does without a cache."""
        self.exact = exact
        self.caches: dict[torch.device, tuple[Tensor, KVCache]] = {}

    def get(
        self,
        execution: Execution,
        latents: Tensor,
        activations: int,
        kernels: Kernels | None,
        around_block: AroundBlock | None,
    ) -> KVCache:
        """The cache of conditioning frames `latents` [B, C, n, H, W]; in CPU memory if the device cannot also hold
        `activations` bytes. kernels, around_block: of the pass that fills it."""
        if bool((latents == latents[:1]).all()):
            latents = latents[:1]
        cached = self.caches.pop(latents.device, None)
        if cached is None or cached[0].shape != latents.shape or not torch.equal(cached[0], latents):
            del cached
            size = execution.new_kv_cache(*latents.shape[2:], batch=latents.shape[0], device="meta").nbytes
            free = comfy.model_management.get_free_memory(latents.device)
            home = latents.device if free > size + activations else torch.device("cpu")
            cached = latents.clone(), execution.fill_kv_cache(latents, home, kernels, around_block)
        self.caches[latents.device] = cached
        return cached[1]


class TextCache:
    """Texts of one run of a LongCat Guider, with their keys and values in every block.

    At every step ComfyUI passes the same text as a new tensor, so texts are compared by their values.
    """

    SIZE = 4

    def __init__(self) -> None:
        self.texts: list[tuple[Tensor, TextMode, TextTokens]] = []

    def get(self, execution: Execution, context: Tensor) -> TextTokens:
        """Text [B, L, caption] as `read_text` arranges it for this execution."""
        mode = execution.optimizations.text_mode
        for cached, cached_mode, text in self.texts:
            alike = cached.shape == context.shape and cached.device == context.device and cached.dtype == context.dtype
            if alike and cached_mode == mode and torch.equal(cached, context):
                return text
        text = read_text(execution, context)
        self.texts = [*self.texts[1 - self.SIZE :], (context.clone(), mode, text)]
        return text


def read_text(execution: Execution, context: Tensor) -> TextTokens:
    """Text [B, L, caption], padded with zero rows, as `Execution.embed_text` arranges it."""
    real, length = real_tokens(context), max(MAX_LENGTH, context.shape[1])
    exact = execution.optimizations.text_mode == "exact" and execution.config.text_tokens_zero_pad
    if exact and torch.compiler.is_compiling():
        # The same result without reading the number of tokens back from the device, which would break the graph.
        return fold_padding(context, real, execution.network.embed_tokens, length)
    return execution.embed_text(context, real, length)
