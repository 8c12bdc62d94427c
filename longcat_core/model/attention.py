"""Self-attention over the video's tokens and cross-attention from them to a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .layers import RMSNorm
from .ops import Activations, Once, Ops, Rope
from .rope import apply_rope
from .text import BlockText

# Receives k (before RoPE) and v, each [B, N, heads, head_dim], of a pass that fills a KV cache.
Keep = Callable[[Tensor, Tensor], None]
# Receives the rotated q [B, N, heads, head_dim] of noisy tokens and k of the first frame, cached or not.
Look = Callable[[Tensor, Tensor], None]


class Groups(NamedTuple):
    """Which frames see which in self-attention; whole numbers only, because compiled blocks hold them as constants.

    clean: frames at the front of x that see only clean frames. reference: how many of the clean frames, at the front of
    the cached ones or else of x, see only each other and are not seen by the other clean frames. hidden: the noisy
    frames (first, past the last), counted from the first noisy one, that do not see the reference frames.
    """

    clean: int = 0
    reference: int = 0
    hidden: tuple[int, int] = (0, 0)

    def reads(self, frames: int, spatial: int, cached: bool) -> list[tuple[slice, slice]]:
        """(queries, keys) of every attention of `frames` frames of `spatial` tokens, in the order of the queries.

        cached: whether clean frames stand in front of the keys; the queries then have none. The last ends are open.
        """
        apart, clean = 0 if cached else self.reference, self.clean
        first, past = clean + self.hidden[0], clean + self.hidden[1]
        reads: list[tuple[int, int, int, int | None]] = [(0, apart, 0, apart), (apart, clean, apart, clean)]
        if first < past:
            reads += [(clean, first, 0, None), (first, past, self.reference, None), (past, frames, 0, None)]
        else:
            reads += [(clean, frames, 0, None)]
        found = []
        for begin, end, key, last in reads:
            if begin < end:
                keys = slice(key * spatial, None if last is None else last * spatial)
                found.append((slice(begin * spatial, end * spatial), keys))
        return found


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens; clean frames see only each other (see `Groups`).

    Weights: qkv [3C, C] laid out as (3, heads, head_dim), proj [C, C], both with bias; q_norm, k_norm [head_dim].
    """

    def __init__(self, dim: int, num_heads: int, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.num_heads = num_heads
        self.qkv = operations.Linear(dim, 3 * dim, **kwargs)
        self.q_norm = RMSNorm(dim // num_heads, operations=operations, **kwargs)
        self.k_norm = RMSNorm(dim // num_heads, operations=operations, **kwargs)
        self.proj = operations.Linear(dim, dim, **kwargs)

    def forward(
        self,
        inputs: Once[Activations],
        rope: Rope,
        groups: Groups,
        sizes: tuple[int, int],
        cached: tuple[Tensor, Tensor] | None,
        ops: Ops,
        keep: Keep | None = None,
        look: Look | None = None,
    ) -> Tensor:
        """inputs: x [B, T, S, C] -> [B, N, C] with N = T*S.

        rope: tables for these N tokens. sizes: T and S. cached: rotated keys and the values of clean tokens that stand
        in front of x, or None. keep, look: see there.
        """
        parts = ops.project(self.qkv, inputs.take(), 3)
        q, k, v = (part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for part in parts)
        del parts
        if keep is None:
            q, k = ops.norm_rope(q, self.q_norm, rope), ops.norm_rope(k, self.k_norm, rope)
        else:
            # A cache keeps keys between norm and RoPE, as the definition has them.
            q, k = apply_rope(self.q_norm(q), *rope), self.k_norm(k)
            keep(k, v)
            k = apply_rope(k, *rope)
        if cached is not None:
            k, v = torch.cat((cached[0], k), dim=1), torch.cat((cached[1], v), dim=1)
        if look is not None:
            look(q[:, groups.clean * sizes[1] :], k[:, : sizes[1]])
        if cached is None and groups == Groups():
            out = ops.attend(q, k, v, self.proj)
        else:
            outs = []
            # Not a comprehension, which would capture what is deleted below.
            for own, seen in groups.reads(*sizes, cached is not None):
                outs.append(ops.attend(q[:, own], k[:, seen], v[:, seen]))
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
            del outs
        del q, k, v
        return ops.linear(self.proj, out)


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens, without RoPE.

    Weights: q [C, C], kv [2C, source] laid out as (2, heads, head_dim), proj [C, C], all with bias; norms [head_dim].
    source: channels of what is attended to; None: C.
    """

    def __init__(
        self, dim: int, num_heads: int, source: int | None = None, *, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.num_heads = num_heads
        self.q = operations.Linear(dim, dim, **kwargs)
        self.kv = operations.Linear(source or dim, 2 * dim, **kwargs)
        self.q_norm = RMSNorm(dim // num_heads, operations=operations, **kwargs)
        self.k_norm = RMSNorm(dim // num_heads, operations=operations, **kwargs)
        self.proj = operations.Linear(dim, dim, **kwargs)

    def keys_values(self, tokens: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """Keys and values [.., M, heads, head_dim] of tokens [.., M, source], on which alone they depend."""
        k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in ops.project(self.kv, tokens, 2))
        return self.k_norm(k), v

    def forward(self, inputs: Once[Activations], text: BlockText, ops: Ops) -> Tensor:
        """inputs: x [B, T, S, C], which attends to text -> [B, T*S, C]."""
        q = ops.linear(self.q, inputs.take()).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        # A text has tokens or keys.
        k, v = text.keys or self.keys_values(cast(Tensor, text.tokens), ops)
        return ops.linear(self.proj, ops.attend_text(q, self.q_norm, k, v, text, self.proj))
