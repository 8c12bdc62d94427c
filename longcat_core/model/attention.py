"""Self-attention with conditioning frames, and cross-attention to text of varying length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LongCatError
from ..optimize.attention import AttendVarlen, Kernels, Varlen
from ..optimize.kernels.elementwise import norm_rope
from ..optimize.kernels.text_attention import text_attention
from .config import TextMode
from .rope import apply_rope


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in fp32, cast back, then times the weight (in that order)."""

    def __init__(self, dim: int, eps: float = 1e-6, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        del x32
        return normed.to(x.dtype) * self.weight.to(device=x.device, dtype=x.dtype)


def sliceable(layer: nn.Module, x: Tensor) -> bool:
    """Whether a slice of the layer's weight may multiply x alone.

    Layers that are more than a plain nn.Linear (streamed, quantised or patched by their owner) must run whole.
    """
    return type(layer) is nn.Linear


def takes_quantised(layer: nn.Module) -> bool:
    """Whether the layer's input may come as e4m3 already, row by row."""
    return getattr(layer, "takes_quantised", False)


def project(layer: nn.Module, x: Any, parts: int, fused: bool) -> tuple[Tensor, ...]:
    """`parts` equal slices of a fused projection of x [..., C_in], each [..., C_out/parts].

    Unfused runs one GEMM per slice of the same weight, so the switch needs no other weights.
    """
    if fused:
        return layer(x).chunk(parts, dim=-1)
    biases = (None,) * parts if layer.bias is None else layer.bias.chunk(parts)
    return tuple(F.linear(x, w, b) for w, b in zip(layer.weight.chunk(parts), biases, strict=True))


@dataclass
class TextTokens:
    """Embedded text, arranged for one of the cross-attention modes.

    tokens: [B, M, C] in the network's dtype.
    bias: [B, 1, 1, M] fp32 added to the logits (0, ln(count) on the key that stands for `count` padding tokens,
        -inf on filler), or None where every row is attended as it is.
    lengths: real tokens of each sample, which stand first, or None where they do not or nobody counted.
    pad_counts: [B] padding tokens that the last row stands for, or None: no row does.
    length: positions that the text has with all that padding, or None.
    kept: what `LongCatTransformer` keeps here for the next step: of which weights, keys and values by block, and those
        weights.
    """

    tokens: Tensor
    bias: Tensor | None = None
    lengths: list[int] | None = None
    pad_counts: Tensor | None = None
    length: int | None = None
    kept: tuple[Any, dict[int, tuple[Tensor, Tensor]], list[Tensor]] | None = field(
        default=None, compare=False, repr=False
    )

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
            kept=None,
        )

    def packing(self) -> Packing:
        """Where the real tokens of each sample lie, for a kernel that takes sequences of different lengths."""
        width, device = self.tokens.shape[1], self.tokens.device
        rows = torch.cat([torch.arange(b * width, b * width + n) for b, n in enumerate(self.lengths)])
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)
        log_counts = None if self.pad_counts is None else self.pad_counts.float().log()
        return Packing(rows.to(device), ends, log_counts)


class Packing(NamedTuple):
    """Real tokens of a batch of texts in one row after the other.

    rows: [sum of lengths] int64, their places in the texts laid end to end; ends: [B+1] int32 running totals of the
    lengths; log_counts: [B] fp32, ln of how many padding tokens the last row of each text stands for, or None.
    """

    rows: Tensor
    ends: Tensor
    log_counts: Tensor | None


class BlockText(NamedTuple):
    """What one block attends to; tensors only, since numbers would tie a compiled block to one prompt's length.

    tokens [B, M, C], or the block's own keys [B, M, heads, head_dim] with values alike; bias and packing as above.
    """

    tokens: Tensor | None
    keys: tuple[Tensor, Tensor] | None
    bias: Tensor | None = None
    packing: Packing | None = None


def unfold_padding(rows: Tensor, length: int) -> Tensor:
    """Rows [B, M, ...] whose last one stands for all padding, written out to `length` positions.

    Real tokens are fewer than M, whatever stands between them and the last row is padding as well.
    """
    last = rows[:, -1:]
    return torch.cat((rows[:, :-1], last.expand(-1, length - rows.shape[1] + 1, *last.shape[2:])), dim=1)


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
    text = fold_padding(context, real, embed, length if fold else None)
    return replace(text, lengths=lengths)


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


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens; conditioning tokens see only each other.

    Weights: qkv [3C, C] laid out as (3, heads, head_dim), proj [C, C], both with bias; q_norm, k_norm [head_dim].
    """

    def __init__(self, dim: int, num_heads: int, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.num_heads = num_heads
        self.qkv = operations.Linear(dim, 3 * dim, **kwargs)
        self.q_norm = RMSNorm(dim // num_heads, **kwargs)
        self.k_norm = RMSNorm(dim // num_heads, **kwargs)
        self.proj = operations.Linear(dim, dim, **kwargs)
        self.sliceable = getattr(operations, "sliceable", sliceable)

    def forward(
        self,
        inputs: list[Any],
        rope: tuple[Tensor, Tensor],
        num_cond_tokens: int,
        cached: tuple[Tensor, Tensor] | None,
        how: Any,
        kernels: Kernels,
        keep: Any = None,
    ) -> Tensor:
        """inputs: a list of x [B, T, S, C] alone, which is taken out of it -> [B, N, C] with N = T*S.

        rope: tables for these N tokens. num_cond_tokens: how many of x's first tokens are conditioning tokens.
        cached: rotated keys and the values of conditioning tokens that stand in front of x, or None. how: the block's.
        keep: called with k (before RoPE) and v, each [B, N, heads, head_dim], to fill a cache.
        """
        x = inputs.pop()
        fused = how.fused_qkv or not self.sliceable(self.qkv, x)
        q, k, v = (part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for part in project(self.qkv, x, 3, fused))
        del x
        if how.fused_kernels and keep is None:
            q, k = (
                norm_rope(part, norm.weight.to(part.device), rope)
                for part, norm in ((q, self.q_norm), (k, self.k_norm))
            )
        else:
            q = apply_rope(self.q_norm(q), *rope)
            k = self.k_norm(k)
            if keep is not None:
                keep(k, v)
            k = apply_rope(k, *rope)
        attend = kernels.attend
        if cached is not None:
            out = attend(q, torch.cat((cached[0], k), dim=1), torch.cat((cached[1], v), dim=1))
        elif num_cond_tokens:
            n = num_cond_tokens
            out = torch.cat((attend(q[:, :n], k[:, :n], v[:, :n]), attend(q[:, n:], k, v)), dim=1)
        elif (
            kernels.quantised and how.fused_kernels and takes_quantised(self.proj) and not torch.compiler.is_compiling()
        ):
            # In graphs the kernel stands as an operator, which gives 16 bits.
            out = kernels.quantised(q, k, v)
        else:
            out = attend(q, k, v)
        del q, k, v
        return self.proj(out.flatten(-2) if isinstance(out, Tensor) else out)


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens, without RoPE.

    Weights: q [C, C], kv [2C, C] laid out as (2, heads, head_dim), proj [C, C], all with bias; norms [head_dim].
    """

    def __init__(self, dim: int, num_heads: int, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.num_heads = num_heads
        self.q = operations.Linear(dim, dim, **kwargs)
        self.kv = operations.Linear(dim, 2 * dim, **kwargs)
        self.q_norm = RMSNorm(dim // num_heads, **kwargs)
        self.k_norm = RMSNorm(dim // num_heads, **kwargs)
        self.proj = operations.Linear(dim, dim, **kwargs)
        self.sliceable = getattr(operations, "sliceable", sliceable)

    def keys_values(self, tokens: Tensor, fused: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, heads, head_dim] of text tokens [B, M, C]; they depend on the text alone."""
        fused = fused or not self.sliceable(self.kv, tokens)
        k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in project(self.kv, tokens, 2, fused))
        return self.k_norm(k), v

    def forward(self, inputs: list[Any], text: BlockText, how: Any, kernels: Kernels) -> Tensor:
        """inputs: as SelfAttention has them; x [B, T, S, C] attends to text; returns [B, T*S, C]. how: the block's."""
        q = self.q(inputs.pop()).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        k, v = self.keys_values(text.tokens, how.fused_qkv) if text.keys is None else text.keys
        if how.fused_text:
            fp8 = takes_quantised(self.proj)
            return self.proj(text_attention(q, self.q_norm.weight.to(q.device), k, v, text.bias, fp8=fp8))
        q = norm_rope(q, self.q_norm.weight.to(q.device), None) if how.fused_kernels else self.q_norm(q)
        if text.packing is not None:
            out = attend_packed(kernels.varlen, q, k, v, text.packing)
        elif text.bias is not None:
            out = _attend_biased(q, k, v, text.bias)
        else:
            out = (kernels.text or kernels.attend)(q, k, v)
        return self.proj(out.flatten(-2))


def _attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2)


def attend_packed(varlen: AttendVarlen, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attend to the real tokens alone, then add the padding key from the log-sum-exp.

    With weights w = exp(logit): (sum w_i v_i + n w_p v_p) / (sum w_i + n w_p) is a blend of the attended output and
    v_p by sigmoid(ln n + logit_p - lse).
    """
    batch, tokens, heads, dim = q.shape
    ends = torch.arange(0, (batch + 1) * tokens, tokens, device=q.device, dtype=torch.int32)
    # The longest text has every row but the padding's.
    longest = k.shape[1] - (0 if packing.log_counts is None else 1)
    real = (x.flatten(0, 1)[packing.rows] for x in (k, v))
    out, lse = varlen(q.flatten(0, 1), *real, Varlen(ends, packing.ends, tokens, longest))
    out = out.view(batch, tokens, heads, dim)
    if packing.log_counts is None:
        return out
    k_pad, v_pad = k[:, -1:], v[:, -1:]
    logit = (q.float() * k_pad.float()).sum(-1) * dim**-0.5
    lse = lse.view(heads, batch, tokens).permute(1, 2, 0)
    weight = torch.sigmoid(packing.log_counts[:, None, None] + logit - lse)[..., None]
    return torch.lerp(out.float(), v_pad.float().expand_as(out), weight).to(q.dtype)
