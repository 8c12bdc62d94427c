"""One transformer block and the final layer; tokens are [B, T, H*W, C] throughout."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CrossAttention, Groups, Keep, SelfAttention
from .config import ModelConfig
from .layers import LayerNorm, linear_fp32
from .ops import Once, Ops, Rope
from .text import BlockText


class FeedForward(nn.Module):
    """The weights of a SwiGLU (arXiv 2002.05202), without biases; gate and up are one weight. `Ops` computes it."""

    def __init__(self, dim: int, hidden: int, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.gate_up = operations.Linear(dim, 2 * hidden, bias=False, dtype=dtype, device=device)
        self.down = operations.Linear(hidden, dim, bias=False, dtype=dtype, device=device)


class Block(nn.Module):
    """Self-attention, cross-attention to text and SwiGLU, the first and last under adaLN modulation."""

    def __init__(self, config: ModelConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"operations": operations, "dtype": dtype, "device": device}
        dim, heads = config.hidden_size, config.num_heads
        self.modulation = operations.Linear(config.adaln_dim, 6 * dim, dtype=dtype, device=device)
        self.attn = SelfAttention(dim, heads, **kwargs)
        self.cross_norm = LayerNorm(dim, **kwargs)
        self.cross_attn = CrossAttention(dim, heads, **kwargs)
        self.ffn = FeedForward(dim, config.ffn_hidden, **kwargs)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)

    def forward(
        self,
        x: Tensor,
        temb: Tensor,
        text: BlockText | None,
        rope: Rope,
        cached: tuple[Tensor, Tensor] | None,
        ops: Ops,
        groups: Groups = Groups(),  # noqa: B008 (a constant)
        keep: Keep | None = None,
    ) -> Tensor:
        """x [B, T, S, C] -> the same shape.

        temb [B or 1, T or 1, adaLN] fp32. text None: no cross-attention (filling a cache). cached: rotated keys and
        values of clean frames in front of x. groups: clean frames at the front of x and what sees what. keep: see
        `SelfAttention`.
        """
        with ops.fp32_region(x.device):
            modulation = self.linear_fp32(self.modulation, F.silu(temb))[:, :, None]
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
        x, h = ops.norm_modulate(x, None, None, scale_a, shift_a, self.attn.qkv)
        inputs = Once(h)
        del h
        beside = None if text is None else self._beside(temb, text, groups, ops)
        look = getattr(beside, "look", None)
        update = Once(self.attn(inputs, rope, groups, (x.shape[1], x.shape[2]), cached, ops, keep, look).view_as(x))
        gate: Tensor | None = gate_a
        if text is not None:
            x, update, gate = self._cross(x, update, gate_a, text, groups.clean, beside, ops)
        x, h = ops.norm_modulate(x, update.take(), gate, scale_f, shift_f, self.ffn.gate_up)
        return ops.feed_forward(x, h, gate_f, self.ffn.gate_up, self.ffn.down)

    def _beside(self, temb: Tensor, text: BlockText, groups: Groups, ops: Ops) -> Any:
        """What `_cross` of a larger block needs besides; its `look`, if it has one, watches self-attention."""
        return None

    def _cross(
        self, x: Tensor, update: Once[Tensor], gate: Tensor, text: BlockText, clean: int, beside: Any, ops: Ops
    ) -> tuple[Tensor, Once[Tensor], Tensor | None]:
        """x + gate * update, and what its noisy frames take from the text, with its gate (None: 1).

        Clean frames take nothing.
        """
        x, h = ops.residual_norm(x, update, gate, self.cross_norm, clean, self.cross_attn.q)
        inputs = Once(h)
        del h
        out = self.cross_attn(inputs, text, ops).view_as(x[:, clean:])
        return x, Once(behind_clean(out, clean)), None


def behind_clean(out: Tensor, clean: int) -> Tensor:
    """What noisy frames take, [B, T, S, C], with zeros for the clean frames in front."""
    return F.pad(out, (0, 0, 0, 0, clean, 0)) if clean else out


def run_block(block: Block, *args: Any) -> Tensor:
    """block(*args), as the function that is compiled, recomputed or wrapped in place of the block."""
    return block(*args)


class FinalLayer(nn.Module):
    """adaLN and the projection to latents' patches, all in fp32."""

    def __init__(self, config: ModelConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.modulation = operations.Linear(config.adaln_dim, 2 * dim, dtype=dtype, device=device)
        patch = math.prod(config.patch_size) * config.out_channels
        self.linear = operations.Linear(dim, patch, dtype=dtype, device=device)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)

    def forward(self, x: Tensor, temb: Tensor, ops: Ops) -> Tensor:
        """x [B, T, S, C], temb [B or 1, T or 1, adaLN] fp32 -> [B, T, S, patch * C_out] fp32."""
        with ops.fp32_region(x.device):
            shift, scale = self.linear_fp32(self.modulation, F.silu(temb))[:, :, None].chunk(2, dim=-1)
            return ops.modulated_fp32(x, scale, shift, lambda h: self.linear_fp32(self.linear, h))
