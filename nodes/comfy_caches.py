"""What a LongCat Guider computes once for a sampling: keys of clean frames, and texts with their keys."""

from __future__ import annotations

import comfy.model_management
import torch
from torch import Tensor

from ..longcat_core.generate.text import MAX_LENGTH
from ..longcat_core.model.kv_cache import KVCache
from ..longcat_core.model.text import TextMode, TextTokens, fold_padding, real_tokens
from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.execution import Execution

# Keys of transformer_options under which the network finds them.
CONDITIONING_CACHE_KEY = "longcat_conditioning_cache"
TEXT_CACHE_KEY = "longcat_text_cache"


class ConditioningCache:
    """Keys and values of the clean frames of one generation, computed at its first step.

    A LongCat Guider puts one into transformer_options for the time it samples. Other clean frames (a context window
    further on) are computed again; several GPUs have one each.
    """

    def __init__(self, exact: bool) -> None:
        """exact: whether guidance's sums run over the clean frames too, as they do without a cache."""
        self.exact = exact
        self.caches: dict[torch.device, tuple[Tensor, KVCache]] = {}

    def get(self, execution: Execution, latents: Tensor, room: int, kernels: Kernels | None) -> KVCache:
        """The cache of `latents` [B, C, n, H, W]. room: bytes that must stay free on the device besides the cache."""
        if bool((latents == latents[:1]).all()):
            latents = latents[:1]
        known = self.caches.pop(latents.device, None)
        if known is None or known[0].shape != latents.shape or not torch.equal(known[0], latents):
            del known
            size = execution.new_kv_cache(*latents.shape[2:], batch=latents.shape[0], device="meta").nbytes
            free = comfy.model_management.get_free_memory(latents.device)
            home = latents.device if free > size + room else torch.device("cpu")
            known = latents.clone(), execution.fill_kv_cache(latents, home, kernels)
        self.caches[latents.device] = known
        return known[1]


class TextCache:
    """Texts of one generation with their keys and values in every block, for a LongCat Guider's sampling.

    ComfyUI hands over the same text at every step as another tensor: it is recognized by its content.
    """

    SIZE = 4

    def __init__(self) -> None:
        self.texts: list[tuple[Tensor, TextMode, TextTokens]] = []

    def get(self, execution: Execution, context: Tensor) -> TextTokens:
        """Text [B, L, caption] as `read_text` arranges it for this execution."""
        mode = execution.optimizations.text_mode
        for known, known_mode, text in self.texts:
            same = known.shape == context.shape and known.device == context.device and known.dtype == context.dtype
            if same and known_mode == mode and torch.equal(known, context):
                return text
        text = read_text(execution, context)
        self.texts = [*self.texts[1 - self.SIZE :], (context.clone(), mode, text)]
        return text


def read_text(execution: Execution, context: Tensor) -> TextTokens:
    """Text [B, L, caption], padded with zero rows, as `Execution.embed_text` arranges it."""
    real, length = real_tokens(context), max(MAX_LENGTH, context.shape[1])
    exact = execution.optimizations.text_mode == "exact" and execution.config.text_tokens_zero_pad
    if exact and torch.compiler.is_compiling():
        # The same without reading the number of tokens back from the device.
        return fold_padding(context, real, execution.network.embed_tokens, length)
    return execution.embed_text(context, real, length)
