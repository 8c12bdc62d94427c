"""Self-attention over the video's tokens and cross-attention from them to a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers import RMSNorm
from .ops import Activations, Once, Ops, Rope
from .rope import apply_rope
from .text import BlockText

# Receives k (before RoPE) and v, each [B, N, heads, head_dim], of a pass that fills a KV cache.
Keep = Callable[[Tensor, Tensor], None]


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens; conditioning tokens see only each other.

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
        num_cond_tokens: int,
        cached: tuple[Tensor, Tensor] | None,
        ops: Ops,
        keep: Keep | None = None,
    ) -> Tensor:
        """inputs: x [B, T, S, C] -> [B, N, C] with N = T*S.

        rope: tables for these N tokens. num_cond_tokens: how many of x's first tokens are conditioning tokens.
        cached: rotated keys and the values of conditioning tokens that stand in front of x, or None.
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
            out = ops.attend(q, torch.cat((cached[0], k), dim=1), torch.cat((cached[1], v), dim=1))
        elif num_cond_tokens:
            n = num_cond_tokens
            out = torch.cat((ops.attend(q[:, :n], k[:, :n], v[:, :n]), ops.attend(q[:, n:], k, v)), dim=1)
        else:
            out = ops.attend(q, k, v, self.proj)
        del q, k, v
        return ops.linear(self.proj, out)


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
        self.q_norm = RMSNorm(dim // num_heads, operations=operations, **kwargs)
        self.k_norm = RMSNorm(dim // num_heads, operations=operations, **kwargs)
        self.proj = operations.Linear(dim, dim, **kwargs)

    def keys_values(self, tokens: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, heads, head_dim] of text tokens [B, M, C]; they depend on the text alone."""
        k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in ops.project(self.kv, tokens, 2))
        return self.k_norm(k), v

    def forward(self, inputs: Once[Activations], text: BlockText, ops: Ops) -> Tensor:
        """inputs: x [B, T, S, C], which attends to text -> [B, T*S, C]."""
        q = ops.linear(self.q, inputs.take()).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        # A text has tokens or keys.
        k, v = text.keys or self.keys_values(cast(Tensor, text.tokens), ops)
        return ops.linear(self.proj, ops.attend_text(q, self.q_norm, k, v, text, self.proj))
