"""One transformer block and the final layer; tokens are [B, T, H*W, C] throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..optimize import attention as backends
from ..optimize.kernels import elementwise as fused_kernels
from ..optimize.kernels.elementwise import Quantised
from .attention import BlockText, CrossAttention, SelfAttention, project, sliceable, takes_quantised
from .config import ModelConfig


def linear_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in fp32 whatever its weights are stored in (the fp32 islands of the model)."""
    bias = None if layer.bias is None else layer.bias.float()
    out = F.linear(x.float(), layer.weight.float(), bias)
    # What optimize.adapters put beside the weight.
    change = getattr(layer, "lora_change", None)
    return out if change is None else out + change(x.float())


def fp32_region(x: Tensor, explicit: bool) -> AbstractContextManager:
    # Autocast to fp32 exists on CUDA only; elsewhere the explicit casts serve both settings of the switch.
    return nullcontext() if explicit or x.device.type != "cuda" else torch.autocast("cuda", dtype=torch.float32)


class How(NamedTuple):
    """The constants of a block's forward pass: each set of them is a graph where blocks are compiled.

    pieces: into how many runs of frames the FFN and the final layer cut each sample; 0: all samples at once.
    fused_kernels: element-wise work by `optimize.kernels`; the tensors must be such as these take.
    fused_text: attention to text by `optimize.text_attention`, under the same condition.
    """

    fused_qkv: bool = True
    fused_ffn: bool = True
    explicit_fp32: bool = True
    pieces: int = 0
    fused_kernels: bool = False
    fused_text: bool = False


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * (up x)), no biases; gate and up are one weight."""

    def __init__(self, dim: int, hidden: int, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.gate_up = operations.Linear(dim, 2 * hidden, bias=False, dtype=dtype, device=device)
        self.down = operations.Linear(hidden, dim, bias=False, dtype=dtype, device=device)
        self.sliceable = getattr(operations, "sliceable", sliceable)

    def forward(self, x: Tensor | Quantised, how: How) -> Tensor:
        whole = how.fused_ffn or not self.sliceable(self.gate_up, x)
        if how.fused_kernels and whole:
            return self.down(fused_kernels.gated_product(self.gate_up(x), fp8=takes_quantised(self.down)))
        gate, up = project(self.gate_up, x, 2, whole)
        return self.down(F.silu(gate) * up)


class LayerNorm(nn.Module):
    """LayerNorm over C in fp32, back in x's dtype; eps 1e-6. Weight and bias [C]."""

    def __init__(self, dim: int, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.to(device=x.device, dtype=torch.float32) for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift; fp32 inside, back in x's dtype.

    x [B, T, S, C]; shift, scale [B or 1, T or 1, 1, C] fp32.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    # In one operation, since each in between would be another copy of the tokens in fp32.
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, summed in fp32, back in x's dtype. x, update [B, T, S, C]; gate as `modulate` has it."""
    return torch.addcmul(x.float(), gate, update.float()).to(x.dtype)


# FFN intermediates of less than this are not worth cutting.
_WHOLE_FFN_BYTES = 1 << 28
# gate and up are 5.4 times the width of a token: a quarter of them at a time needs less than self-attention does.
_PARTS = 4


def ffn_pieces(config: ModelConfig, batch: int, frames: int, spatial: int, itemsize: int) -> int:
    """`How.pieces` for tokens [batch, frames, spatial, C] without gradients."""
    if 2 * config.ffn_hidden * itemsize * batch * frames * spatial <= _WHOLE_FFN_BYTES:
        return 0
    return min(frames, math.ceil(_PARTS / batch))


def cut(x: Tensor, pieces: int) -> list[tuple[int, int, int]]:
    """(sample, first frame, frame after the last) of every piece of x [B, T, S, C], each contiguous if x is."""
    frames = x.shape[1]
    bounds = [(frames * i // pieces, frames * (i + 1) // pieces) for i in range(pieces)]
    return [(b, *bound) for b in range(x.shape[0]) for bound in bounds]


def part(x: Tensor | Quantised, sample: int, start: int, stop: int) -> Tensor | Quantised:
    """One piece of tokens, or of a modulation [B or 1, T or 1, 1, C] that is shared by samples or frames."""
    if isinstance(x, Quantised):
        return Quantised(*(part(tensor, sample, start, stop) for tensor in x))
    x = x[sample : sample + 1] if x.shape[0] > 1 else x
    return x[:, start:stop] if x.shape[1] > 1 else x


class Block(nn.Module):
    """Self-attention, cross-attention to text and SwiGLU, the first and last under adaLN modulation."""

    def __init__(self, config: ModelConfig, *, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"operations": operations, "dtype": dtype, "device": device}
        dim, heads = config.hidden_size, config.num_heads
        self.modulation = operations.Linear(config.adaln_dim, 6 * dim, dtype=dtype, device=device)
        self.attn = SelfAttention(dim, heads, **kwargs)
        self.cross_norm = LayerNorm(dim, dtype=dtype, device=device)
        self.cross_attn = CrossAttention(dim, heads, **kwargs)
        self.ffn = FeedForward(dim, config.ffn_hidden, **kwargs)
        self.linear_fp32 = getattr(operations, "linear_fp32", linear_fp32)

    def forward(
        self,
        x: Tensor,
        temb: Tensor,
        text: BlockText | None,
        rope: tuple[Tensor, Tensor],
        cached: tuple[Tensor, Tensor] | None,
        kernels: backends.Kernels,
        how: How,
        num_cond_latents: int = 0,
        keep: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """x [B, T, S, C] -> the same shape.

        temb [B or 1, T or 1, adaLN] fp32. text None: no cross-attention (filling a cache). cached: rotated keys and
        values of clean frames in front of x. num_cond_latents: clean frames at the front of x. keep: see SelfAttention.
        """
        with fp32_region(x, how.explicit_fp32):
            modulation = self.linear_fp32(self.modulation, F.silu(temb))[:, :, None]
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
        x, h = self._normed(x, None, None, scale_a, shift_a, self.attn.qkv, how)
        # In a list, from which the last owner takes it: it is not needed beside the keys.
        inputs = [h]
        del h
        updates = [self.attn(inputs, rope, num_cond_latents * x.shape[2], cached, how, kernels, keep).view_as(x)]
        gate = gate_a
        if text is not None:
            x = self._cross(x, updates, gate_a, text, num_cond_latents, how, kernels)
            gate = None
        x, h = self._normed(x, updates.pop(), gate, scale_f, shift_f, self.ffn.gate_up, how)
        return self._feed_forward(x, h, gate_f, how)

    def _normed(
        self,
        x: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        layer: nn.Module,
        how: How,
    ) -> tuple[Tensor, Tensor | Quantised]:
        """x + gate * update, and its modulated norm as `layer` takes it. No update: x stays; no gate: 1."""
        if how.fused_kernels:
            quantised = takes_quantised(layer)
            return fused_kernels.residual_norm(x, update, gate, scale, shift, one_plus=True, fp8=quantised)
        if update is not None:
            with fp32_region(x, how.explicit_fp32):
                x = x + update if gate is None else gated(x, update, gate)
        with fp32_region(x, how.explicit_fp32):
            return x, modulate(x, shift, scale)

    def _cross(
        self,
        x: Tensor,
        updates: list[Tensor],
        gate: Tensor,
        text: BlockText,
        num_cond_latents: int,
        how: How,
        kernels: Any,
    ) -> Tensor:
        """x + gate * update; in place of the one update, what its noisy frames take from the text. Conditioning frames
        know nothing of it."""
        if how.fused_kernels and not num_cond_latents:
            norm, layer = self.cross_norm, self.cross_attn.q
            weight, bias = norm.weight.to(x.device), norm.bias.to(x.device)
            x, h = fused_kernels.residual_norm(x, updates.pop(), gate, weight, bias, fp8=takes_quantised(layer))
            # Alone in a list again: beside queries, keys and output nobody needs it. (`x, *inputs = ` would make it a
            # tuple within a compiled graph.)
            inputs = [h]
            del h
            updates.append(self.cross_attn(inputs, text, how, kernels).view_as(x))
            return x
        with fp32_region(x, how.explicit_fp32):
            x = gated(x, updates.pop(), gate)
        noisy = x[:, num_cond_latents:]
        out = self.cross_attn([self.cross_norm(noisy)], text, how, kernels).view_as(noisy)
        updates.append(F.pad(out, (0, 0, 0, 0, num_cond_latents, 0)) if num_cond_latents else out)
        return x

    def _feed_forward(self, x: Tensor, h: Tensor, gate: Tensor, how: How) -> Tensor:
        """x + gate * ffn(h). Without gradients and outside of graphs the result is written into x."""
        if not how.pieces:
            return self._gated(x, self.ffn(h, how), gate, how)
        outs = []
        for piece in cut(x, how.pieces):
            own, update = part(x, *piece), self.ffn(part(h, *piece), how)
            if how.fused_kernels and not torch.compiler.is_compiling():
                fused_kernels.residual_(own, update, part(gate, *piece))
                continue
            with fp32_region(x, how.explicit_fp32):
                out = gated(own, update, part(gate, *piece))
            # A graph must not write into slices; its compiler makes the pieces where they belong.
            outs.append(out.flatten(0, 2) if torch.compiler.is_compiling() else own.copy_(out))
        return torch.cat(outs).view_as(x) if torch.compiler.is_compiling() else x

    def _gated(self, x: Tensor, update: Tensor, gate: Tensor, how: How) -> Tensor:
        if how.fused_kernels and not torch.compiler.is_compiling():
            return fused_kernels.residual_(x, update, gate)
        with fp32_region(x, how.explicit_fp32):
            return gated(x, update, gate)


def run_block(block: Block, *args: Any) -> Tensor:
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

    def forward(self, x: Tensor, temb: Tensor, how: How) -> Tensor:
        """x [B, T, S, C], temb [B or 1, T or 1, adaLN] fp32 -> [B, T, S, patch * C_out] fp32."""
        with fp32_region(x, how.explicit_fp32):
            shift, scale = self.linear_fp32(self.modulation, F.silu(temb))[:, :, None].chunk(2, dim=-1)
            if not how.pieces:
                return self.linear_fp32(self.linear, modulate(x.float(), shift, scale))
            # In fp32 the whole would be the largest tensor of all.
            outs = []
            for piece in cut(x, how.pieces):
                h = modulate(part(x, *piece).float(), part(shift, *piece), part(scale, *piece))
                outs.append(self.linear_fp32(self.linear, h).flatten(0, 2))
            return torch.cat(outs).view(*x.shape[:3], -1)
