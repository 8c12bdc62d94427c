"""Each block's keys and values of a text, computed once for all steps (`Optimizations.reuse_text`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ..model.block import Block
from ..model.ops import Ops
from ..model.text import BlockText, TextForm, TextTokens


class NoText:
    """A pass without cross-attention."""

    def __call__(self, i: int) -> None:
        return None

    def need_weights(self, i: int) -> bool:
        """Whether block i's text is computed by the block's weights."""
        return False


class TokenTexts:
    """Every block computes keys and values from the text's tokens."""

    def __init__(self, text: TextTokens, form: TextForm) -> None:
        self.text = form.tokens(text.tokens)

    def __call__(self, i: int) -> BlockText:
        return self.text

    def need_weights(self, i: int) -> bool:
        return True


class CachedTexts:
    """Keys and values stay with the text until the weights that produce them change."""

    def __init__(self, text: TextTokens, form: TextForm, blocks: Sequence[Block], ops: Ops, switches: Hashable) -> None:
        """switches: what keys and values depend on besides the weights and the text."""
        self.text, self.form, self.blocks, self.ops = text, form, blocks, ops
        weights = [parameter for block in blocks for parameter in block.cross_attn.parameters()]
        stamp = (text.tokens.device, text.tokens.dtype, switches, *map(_version, weights))
        if text.cached is None or text.cached[0] != stamp:
            # The weights are held too: a new tensor in the place of a freed one would have its id.
            text.cached = stamp, {}, weights
        self.cached: dict[int, tuple[Tensor, Tensor]] = text.cached[1]

    def __call__(self, i: int) -> BlockText:
        if i not in self.cached:
            self.cached[i] = self.blocks[i].cross_attn.keys_values(self.text.tokens, self.ops)
        return self.form.keys(*self.cached[i])

    def need_weights(self, i: int) -> bool:
        return i not in self.cached


def _version(parameter: Tensor) -> tuple[int, int]:
    # Inference tensors have no version counter; they are replaced, not written to.
    return id(parameter), 0 if parameter.is_inference() else parameter._version
