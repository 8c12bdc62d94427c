"""What a LongCat Guider computes once for a sampling run: keys and values of conditioning frames and of texts."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import torch
from torch import Tensor

from ..longcat_core.generate.text import MAX_LENGTH
from ..longcat_core.model.audio_tokens import AudioTokens
from ..longcat_core.model.kv_cache import KVCache, Reference
from ..longcat_core.model.text import TextMode, TextTokens, fold_padding, real_tokens
from ..longcat_core.optimize.attention import Kernels
from ..longcat_core.optimize.execution import AroundBlock, Execution
from .comfy_avatar import Heard

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
        self.caches: dict[torch.device, tuple[Tensor, Reference | None, KVCache]] = {}

    def get(
        self,
        execution: Execution,
        latents: Tensor,
        activations: int,
        kernels: Kernels | None,
        around_block: AroundBlock | None,
        reference: Reference | None = None,
    ) -> KVCache:
        """The cache of conditioning frames `latents` [B, C, n, H, W]; in CPU memory if the device cannot also hold
        `activations` bytes. kernels, around_block: of the pass that fills it. reference: the first is a reference
        frame."""
        if bool((latents == latents[:1]).all()):
            latents = latents[:1]
        cached = self.caches.pop(latents.device, None)
        same = cached is not None and cached[0].shape == latents.shape and cached[1] == reference
        if cached is None or not (same and torch.equal(cached[0], latents)):
            del cached
            size = execution.new_kv_cache(*latents.shape[2:], batch=latents.shape[0], device="meta").nbytes
            free = comfy.model_management.get_free_memory(latents.device)
            home = latents.device if free > size + activations else torch.device("cpu")
            filled = execution.fill_kv_cache(latents, home, kernels, around_block, reference)
            cached = latents.clone(), reference, filled
        self.caches[latents.device] = cached
        return cached[2]


class TextCache:
    """Texts of one run of a LongCat Guider and what is heard with them, with their keys and values in every block.

    At every step ComfyUI passes the same text as a new tensor, so texts are compared by their values.
    """

    SIZE = 4

    def __init__(self) -> None:
        self.texts: list[tuple[Tensor, TextMode, tuple[Heard, ...], TextTokens]] = []

    def get(self, execution: Execution, context: Tensor, heard: tuple[Heard, ...] = ()) -> TextTokens:
        """Text [B, L, caption] as `read_text` arranges it for this execution."""
        mode = execution.optimizations.text_mode
        for cached, cached_mode, before, text in self.texts:
            alike = cached.shape == context.shape and cached.device == context.device and cached.dtype == context.dtype
            same = len(before) == len(heard) and all(map(Heard.same, before, heard))
            if alike and same and cached_mode == mode and torch.equal(cached, context):
                return text
        text = read_text(execution, context, heard)
        self.texts = [*self.texts[1 - self.SIZE :], (context.clone(), mode, heard, text)]
        return text


def read_text(execution: Execution, context: Tensor, heard: tuple[Heard, ...] = ()) -> TextTokens:
    """Text [B, L, caption], padded with zero rows, as `Execution.embed_text` arranges it.

    heard: what an avatar hears with it, in each of as many equal parts of the batch.
    """
    text = _read_text(execution, context)
    return replace(text, audio=_read_audio(execution, heard, context)) if heard else text


def _read_audio(execution: Execution, heard: tuple[Heard, ...], context: Tensor) -> AudioTokens:
    found = []
    for audio, frames in heard:
        tokens = execution.embed_audio(audio.windows.to(context.device), audio.classes)
        found.append(tokens if frames is None else replace(tokens, tokens=tokens.tokens[:, list(frames)]))
    if len(found) == 1:
        return found[0]
    each = len(context) // len(found)
    return AudioTokens(torch.cat([one.tokens.expand(each, -1, -1, -1) for one in found]))


def _read_text(execution: Execution, context: Tensor) -> TextTokens:
    real, length = real_tokens(context), max(MAX_LENGTH, context.shape[1])
    exact = execution.optimizations.text_mode == "exact" and execution.config.text_tokens_zero_pad
    if exact and torch.compiler.is_compiling():
        # The same result without reading the number of tokens back from the device, which would break the graph.
        return fold_padding(context, real, execution.network.embed_tokens, length)
    return execution.embed_text(context, real, length)
