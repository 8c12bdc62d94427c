"""Text for cross-attention: embedded tokens, the ways of reading their padding, and what one block attends to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LongCatError
from .audio_tokens import AudioTokens, BlockAudio

# `exact`: as the checkpoint defines it, with padding folded into one key; `packed`: padding is dropped; `padded`: every
# position is attended to.
TextMode = Literal["exact", "packed", "padded"]


@dataclass
class TextTokens:
    """Embedded text, arranged for one of the cross-attention modes.

    tokens: [B, M, C] in the network's dtype.
    bias: [B, 1, 1, M] fp32 added to the logits (0, ln(count) on the key that stands for `count` padding tokens,
        -inf on filler), or None where every row is attended as it is.
    lengths: real tokens of each sample, which stand first, or None where they do not or were not counted.
    pad_counts: [B] padding tokens that the last row stands for, or None: it is a token like the others.
    length: positions of the text with all that padding, or None.
    audio: what the avatar network hears with this text, of one video or as many as there are texts.
    cached: keys and values of each block, which `optimize.text_keys` keeps here for the next step.
    """

    tokens: Tensor
    bias: Tensor | None = None
    lengths: list[int] | None = None
    pad_counts: Tensor | None = None
    length: int | None = None
    audio: AudioTokens | None = None
    cached: Any = field(default=None, compare=False, repr=False)

    def expand(self, batch: int) -> TextTokens:
        """One text for a batch of videos; a text per video stays as it is."""
        if self.tokens.shape[0] == batch:
            return self
        return replace(
            self,
            tokens=self.tokens.expand(batch, -1, -1),
            bias=None if self.bias is None else self.bias.expand(batch, -1, -1, -1),
            lengths=None if self.lengths is None else self.lengths * batch,
            pad_counts=None if self.pad_counts is None else self.pad_counts.expand(batch),
            cached=None,
        )


class Packing(NamedTuple):
    """Real tokens of a batch of texts, laid end to end.

    rows: [sum of lengths] int64, their rows among all rows of all texts; ends: [B+1] int32 running totals of the
    lengths; log_counts: [B] fp32, ln of the number of padding tokens that each text's last row stands for, or None.
    """

    rows: Tensor
    ends: Tensor
    log_counts: Tensor | None


class BlockText(NamedTuple):
    """What one block attends to; tensors only, since numbers would tie a compiled block to one prompt's length.

    tokens [B, M, C], or the block's own keys and values, each [B, M, heads, head_dim]; bias and packing as above.
    audio: what an avatar's block hears besides.
    """

    tokens: Tensor | None
    keys: tuple[Tensor, Tensor] | None
    bias: Tensor | None = None
    packing: Packing | None = None
    audio: BlockAudio | None = None


# Block i's text, or None: that block has no cross-attention (a pass that fills a KV cache).
Texts = Callable[[int], BlockText | None]


class TextForm(NamedTuple):
    """The form in which an `Ops` reads a text. rows: maps [b, M, ...] rows of the text to [B, M', ...] in that form."""

    rows: Callable[[Tensor], Tensor]
    bias: Tensor | None = None
    packing: Packing | None = None

    def tokens(self, tokens: Tensor) -> BlockText:
        """Text tokens [b, M, C], from which every block computes its own keys and values."""
        return BlockText(self.rows(tokens), None, self.bias, self.packing)

    def keys(self, keys: Tensor, values: Tensor) -> BlockText:
        """Keys and values [b, M, heads, head_dim] that one block has computed already."""
        return BlockText(None, (self.rows(keys), self.rows(values)), self.bias, self.packing)


def real_tokens(context: Tensor) -> Tensor:
    """Which rows of text [B, L, caption] are tokens, [B, L] bool: encoders leave zeros where they pad."""
    return (context != 0).any(-1)


def trim_text(context: Tensor, limit: int) -> Tensor:
    """Text [B, L, caption] without the zero rows at its end, at most `limit` and at least one row."""
    used = real_tokens(context).any(0).nonzero()
    return context[:, : min(limit, int(used[-1]) + 1 if len(used) else 1)]


def arrange_text(
    context: Tensor,
    mask: Tensor | None,
    mode: TextMode,
    zero_pad: bool,
    embed: Callable[[Tensor], Tensor],
    length: int | None = None,
) -> TextTokens:
    """Arrange and embed text for cross-attention.

    context [B, L, caption], mask [B, L] (non-zero: a real token); without a mask every token counts as real. embed
    maps [.., caption] to [.., C]. length: how many tokens the text has with all its padding, at least L; None: L.

    With `zero_pad` (the released model) a padding token is attended as a zero vector: all of them then share one key
    and one value, and n equal keys weigh as much as one whose logit is raised by ln(n).
    """
    length = context.shape[1] if length is None else length
    if mask is None:
        return TextTokens(embed(context))
    real = mask.to(context.device) != 0
    if mode == "padded":
        pad = length - context.shape[1]
        y, real = F.pad(embed(context), (0, 0, 0, pad)), F.pad(real, (0, pad))
        if zero_pad:
            return TextTokens(y * real[..., None].to(y.dtype))
    counts = real.sum(1)
    lengths = counts.tolist()
    fold = zero_pad and mode == "exact"
    if not fold and min(lengths) == 0:
        raise LongCatError(f"text row {lengths.index(0)} has no token; give at least the end-of-text token")
    if mode == "padded":
        bias = torch.where(real, 0.0, -math.inf).to(torch.float32)[:, None, None]
        return TextTokens(y, bias)

    # Real tokens first, in order, and only they are embedded.
    order = torch.argsort(real.to(torch.int8), dim=1, descending=True, stable=True)[:, : max(lengths)]
    context = torch.gather(context, 1, order[..., None].expand(-1, -1, context.shape[-1]))
    real = torch.arange(context.shape[1], device=real.device)[None] < counts[:, None]
    return replace(fold_padding(context, real, embed, length if fold else None), lengths=lengths)


def fold_padding(context: Tensor, real: Tensor, embed: Callable[[Tensor], Tensor], length: int | None) -> TextTokens:
    """Embed context [B, L, caption] with real [B, L] bool and fold its padding, up to `length` tokens, into one key.

    The key is a zero token at the end, its logit raised by ln(count). length None: padding is dropped. Nothing here
    reads a value back from the device, so that it can be captured in a graph.
    """
    y = embed(context)
    y = y * real[..., None].to(y.dtype)
    bias = torch.where(real, 0.0, -math.inf).to(torch.float32)
    pad_counts = None
    if length is not None:
        pad_counts = length - real.sum(1)
        # log(0) = -inf: a sample without padding has no padding key.
        bias = torch.cat((bias, pad_counts[:, None].float().log()), dim=1)
        y = F.pad(y, (0, 0, 0, 1))
    return TextTokens(y, bias[:, None, None], pad_counts=pad_counts, length=length)
