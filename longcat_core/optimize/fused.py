"""The operations of the network as it runs: in PyTorch under the switches, or by our Triton kernels.

`TorchOps` adds to `model.ops.PlainOps` everything that works without Triton: an attention backend, slices of fused
weights, autocast regions, dequantized 8-bit layers, and a feed-forward cut into pieces. `FusedOps` replaces the
element-wise regions with Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, autocast, nn

from ..model.config import ModelConfig
from ..model.layers import LayerNorm, RMSNorm, gated, modulate
from ..model.ops import Activations, Once, PlainOps, Rope, attend_with_bias, by_frames
from ..model.text import BlockText, Packing, TextForm, TextTokens
from .attention import Kernels
from .copies import contiguous
from .kernels import elementwise
from .kernels.elementwise import Quantized
from .kernels.text_attention import refuses as text_refuses
from .kernels.text_attention import text_attention
from .operators import AttendVarlen, Varlen


class OpSwitches(NamedTuple):
    """The constants of a block's forward pass; every combination has a graph of its own if blocks are compiled.

    pieces: number of runs of frames into which the feed-forward and the final layer cut each sample; 0: no cut.
    fused_text: attention to text by `kernels.text_attention`, in `FusedOps` only. For the others see `Optimizations`.
    """

    fused_qkv: bool = True
    fused_ffn: bool = True
    explicit_fp32: bool = True
    fp8: bool = True
    pieces: int = 0
    fused_text: bool = False


def sliceable(layer: nn.Module, x: Tensor) -> bool:
    """Whether a slice of the layer's weight may multiply x by itself.

    Layers of another class than `nn.Linear`, streamed, quantized or patched by their owner, must run whole.
    """
    return type(layer) is nn.Linear


def takes_quantized(layer: nn.Module) -> bool:
    """Whether the layer accepts input that is already quantized row by row."""
    return getattr(layer, "takes_quantized", False)


def _sliced(layer: Any, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """One GEMM per slice of the fused weight, so that switching does not need other weights."""
    biases = (None,) * parts if layer.bias is None else layer.bias.chunk(parts)
    return tuple(F.linear(x, w, b) for w, b in zip(layer.weight.chunk(parts), biases, strict=True))


class TorchOps(PlainOps):
    """`PlainOps` under the switches, in PyTorch: the same mathematics."""

    def __init__(
        self,
        kernels: Kernels,
        switches: OpSwitches | None = None,
        sliceable: Callable[[nn.Module, Tensor], bool] = sliceable,
    ) -> None:
        """sliceable: whether a slice of a layer's weight may be used by itself; see the function above."""
        self.kernels, self.switches, self.sliceable = kernels, switches or OpSwitches(), sliceable

    def _key(self) -> tuple:
        return type(self), self.kernels, self.switches, self.sliceable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchOps) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def with_kernels(self, **kernels: Any) -> TorchOps:
        """The same with other kernels."""
        other = copy(self)
        other.kernels = self.kernels._replace(**kernels)
        return other

    def fp32_region(self, device: torch.device) -> AbstractContextManager:
        # Autocast to fp32 exists on CUDA only; elsewhere both settings of the switch use explicit casts.
        explicit = self.switches.explicit_fp32 or device.type != "cuda"
        return nullcontext() if explicit else autocast("cuda", dtype=torch.float32)

    def linear(self, layer: nn.Module, x: Activations) -> Tensor:
        wide = not self.switches.fp8 and getattr(layer, "eight_bit", False)
        return layer(x, fp8=False) if wide else layer(x)

    def project(self, layer: nn.Module, x: Activations, parts: int) -> tuple[Tensor, ...]:
        whole = self.switches.fused_qkv or not self.sliceable(layer, x)
        return super().project(layer, x, parts) if whole else _sliced(layer, x, parts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, reader: nn.Module | None = None) -> Activations:
        return self.kernels.attend(q, k, v).flatten(-2)

    def text_form(self, text: TextTokens, batch: int) -> TextForm:
        bias, packing, length = text.bias, None, None
        if self.kernels.text is not None and text.pad_counts is not None and not self.switches.fused_text:
            # Padding that is written out needs no bias, which only slow kernels support.
            length, bias = text.length, None
        elif bias is not None:
            full = text.expand(batch)
            bias = full.bias
            packed = self.kernels.varlen is not None and full.lengths is not None and min(full.lengths) > 0
            packing = pack_text(full) if packed and not self.switches.fused_text else None

        def rows(rows: Tensor) -> Tensor:
            rows = rows if length is None else unfold_padding(rows, length)
            return rows.expand(batch, *rows.shape[1:]).contiguous()

        return TextForm(rows, bias, packing)

    def attend_text(
        self, q: Tensor, norm: RMSNorm, k: Tensor, v: Tensor, text: BlockText, reader: nn.Module
    ) -> Activations:
        q = self.norm_rope(q, norm, None)
        if text.packing is not None and self.kernels.varlen is not None:
            out = attend_packed(self.kernels.varlen, q, k, v, text.packing)
        elif text.bias is not None:
            out = attend_with_bias(q, k, v, text.bias)
        else:
            out = (self.kernels.text or self.kernels.attend)(q, k, v)
        return out.flatten(-2)

    def attend_frames(
        self, q: Tensor, norm: RMSNorm, rope: Rope | None, k: Tensor, v: Tensor, reader: nn.Module
    ) -> Activations:
        q, frames = self.norm_rope(q, norm, rope), self.kernels.frames
        out = attend_by_frames(self.kernels, q, k, v) if frames is None else frames(q, k, v)
        return out.view(-1, q.shape[1] // k.shape[1], q.shape[-2] * q.shape[-1])

    def class_maps(self, q: Tensor, k: Tensor, classes: Tensor) -> Tensor:
        return super().class_maps(q, self._whole(k), classes)

    def class_bounds(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return super().class_bounds(self._whole(maps[None])[0])

    def _whole(self, rows: Tensor) -> Tensor:
        return rows if self.kernels.whole is None else self.kernels.whole(rows)

    def swiglu(self, gate_up: nn.Module, down: nn.Module, x: Activations) -> Tensor:
        if self.switches.fused_ffn or not self.sliceable(gate_up, x):
            return super().swiglu(gate_up, down, x)
        gate, up = _sliced(gate_up, x, 2)
        return self.linear(down, F.silu(gate) * up)

    def feed_forward(self, x: Tensor, h: Activations, gate: Tensor, gate_up: nn.Module, down: nn.Module) -> Tensor:
        if not self.switches.pieces:
            return self._add(x, self.swiglu(gate_up, down, h), gate)
        outs = []
        for piece in cut(x, self.switches.pieces):
            tokens, update = part(x, *piece), self.swiglu(gate_up, down, part(h, *piece))
            out = self._add(tokens, update, part(gate, *piece))
            if torch.compiler.is_compiling():
                # A graph must not write into slices; the compiler places the pieces in the result.
                outs.append(out.flatten(0, 2))
            elif out is not tokens:
                tokens.copy_(out)
            del tokens, update, out
        return torch.cat(outs).view_as(x) if outs else x

    def _add(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """x + gate * update, as a new tensor or in x."""
        with self.fp32_region(x.device):
            return gated(x, update, gate)

    def modulated_fp32(self, x: Tensor, scale: Tensor, shift: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.switches.pieces:
            return super().modulated_fp32(x, scale, shift, project)
        # Uncut, this would be the largest tensor of the forward pass.
        outs = []
        for piece in cut(x, self.switches.pieces):
            h = modulate(part(x, *piece).float(), part(shift, *piece), part(scale, *piece))
            outs.append(project(h).flatten(0, 2))
        return torch.cat(outs).view(*x.shape[:3], -1)


def attend_by_frames(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of frames to keys of their own: q [B, T*S, ..], k and v [B or 1, T, M, ..] -> as q, contiguous."""
    # Not every kernel returns what is contiguous, and of one frame a reshape alone would leave it so.
    return (kernels.text or kernels.attend)(*by_frames(q, k, v)).contiguous().view(q.shape)


class FusedOps(TorchOps):
    """`TorchOps` with Triton kernels for the element-wise regions: on CUDA, in 16 bits, without gradients.

    Kernels read parameters of norms through `Norm.affine`, never as an owner stores them.
    """

    def _quantized(self, reader: nn.Module | None) -> bool:
        """Whether the layer that reads a result accepts 8-bit rows."""
        return self.switches.fp8 and reader is not None and takes_quantized(reader)

    def norm_modulate(
        self,
        x: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        reader: nn.Module | None,
    ) -> tuple[Tensor, Activations]:
        fp8 = self._quantized(reader)
        return elementwise.residual_norm(x, update, gate, scale, shift, one_plus=True, fp8=fp8)

    def residual_norm(
        self, x: Tensor, update: Once[Tensor], gate: Tensor | None, norm: LayerNorm, skip: int, reader: nn.Module
    ) -> tuple[Tensor, Activations]:
        weight, bias = norm.affine(x.device, torch.float32, elementwise.READ)
        x, h = elementwise.residual_norm(x, update.take(), gate, weight, bias, fp8=self._quantized(reader))
        if not skip:
            return x, h
        # The norm of few frames too many costs less than PyTorch's copies in fp32. Of one sample the rest is a view.
        if isinstance(h, Quantized):
            return x, Quantized(*(rows[:, skip:].contiguous() for rows in h))
        return x, h[:, skip:].contiguous()

    def norm_rope(self, x: Tensor, norm: RMSNorm, rope: Rope | None) -> Tensor:
        (weight,) = norm.affine(x.device, x.dtype)
        return elementwise.norm_rope(x, weight, rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, reader: nn.Module | None = None) -> Activations:
        if torch.compiler.is_compiling():
            # In graphs the kernel is a custom operator with a 16-bit output.
            return super().attend(q, k, v)
        eight_bit = self._quantized(reader)
        if self.kernels.quantized and eight_bit:
            return self.kernels.quantized(q, k, v)
        # Some kernels leave a head's tokens side by side.
        out = self.kernels.attend(q, k, v)
        return elementwise.quantize_heads(out) if eight_bit else contiguous(out).flatten(-2)

    def attend_text(
        self, q: Tensor, norm: RMSNorm, k: Tensor, v: Tensor, text: BlockText, reader: nn.Module
    ) -> Activations:
        if not self.switches.fused_text:
            return super().attend_text(q, norm, k, v, text, reader)
        (weight,) = norm.affine(q.device, q.dtype)
        return text_attention(q, weight, k, v, text.bias, fp8=self._quantized(reader))

    def attend_frames(
        self, q: Tensor, norm: RMSNorm, rope: Rope | None, k: Tensor, v: Tensor, reader: nn.Module
    ) -> Activations:
        arranged = self.kernels.frames is not None
        if arranged or not self.switches.fused_text or rope is not None or text_refuses(q.shape[-1], k.shape[2]):
            return super().attend_frames(q, norm, rope, k, v, reader)
        (weight,) = norm.affine(q.device, q.dtype)
        q, k, v = by_frames(q, k, v)
        return text_attention(q, weight, k, v, None, fp8=self._quantized(reader))

    def swiglu(self, gate_up: nn.Module, down: nn.Module, x: Activations) -> Tensor:
        if not self.switches.fused_ffn and self.sliceable(gate_up, x):
            return super().swiglu(gate_up, down, x)
        product = elementwise.gated_product(self.linear(gate_up, x), fp8=self._quantized(down))
        return self.linear(down, product)

    def _add(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super()._add(x, update, gate)
        return elementwise.residual_(x, update, gate)


# FFN intermediates of less than this are not worth cutting.
_WHOLE_FFN_BYTES = 1 << 28
# gate and up are 5.4 times as wide as a token; a quarter of the tokens at a time takes less than self-attention does.
_PARTS = 4


def ffn_pieces(config: ModelConfig, batch: int, frames: int, spatial: int, itemsize: int) -> int:
    """`OpSwitches.pieces` for tokens [batch, frames, spatial, C] without gradients."""
    if 2 * config.ffn_hidden * itemsize * batch * frames * spatial <= _WHOLE_FFN_BYTES:
        return 0
    return min(frames, math.ceil(_PARTS / batch))


def cut(x: Tensor, pieces: int) -> list[tuple[int, int, int]]:
    """(sample, first frame, frame past the last) of every piece of x [B, T, S, C], each contiguous if x is."""
    frames = x.shape[1]
    bounds = [(frames * i // pieces, frames * (i + 1) // pieces) for i in range(pieces)]
    return [(b, *bound) for b in range(x.shape[0]) for bound in bounds]


def part(x: Activations, sample: int, start: int, stop: int) -> Activations:
    """One piece of tokens [B, T, S, C], or of a modulation [B or 1, T or 1, 1, C] that samples or frames share."""
    if isinstance(x, Quantized):
        return Quantized(*(part(tensor, sample, start, stop) for tensor in x))
    x = x[sample : sample + 1] if x.shape[0] > 1 else x
    return x[:, start:stop] if x.shape[1] > 1 else x


def unfold_padding(rows: Tensor, length: int) -> Tensor:
    """Rows [B, M, ...] whose last one stands for all padding, written out to `length` positions.

    Real tokens are fewer than M: the last row and anything between it and the real tokens is padding.
    """
    last = rows[:, -1:]
    return torch.cat((rows[:, :-1], last.expand(-1, length - rows.shape[1] + 1, *last.shape[2:])), dim=1)


def pack_text(text: TextTokens) -> Packing:
    """Where the real tokens of each sample lie, for a kernel that takes sequences of different lengths."""
    width, device, lengths = text.tokens.shape[1], text.tokens.device, text.lengths or []
    rows = torch.cat([torch.arange(b * width, b * width + n) for b, n in enumerate(lengths)])
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    log_counts = None if text.pad_counts is None else text.pad_counts.float().log()
    return Packing(rows.to(device), ends, log_counts)


def attend_packed(varlen: AttendVarlen, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attend to the real tokens only, then add the padding key by means of the log-sum-exp.

    With weights w = exp(logit): (sum w_i v_i + n w_p v_p) / (sum w_i + n w_p) is a blend of the attended output and
    v_p by sigmoid(ln n + logit_p - lse).
    """
    batch, tokens, heads, dim = q.shape
    ends = torch.arange(0, (batch + 1) * tokens, tokens, device=q.device, dtype=torch.int32)
    # The longest text uses every row except the padding's.
    longest = k.shape[1] - (0 if packing.log_counts is None else 1)
    keys, values = (x.flatten(0, 1)[packing.rows] for x in (k, v))
    out, lse = varlen(q.flatten(0, 1), keys, values, Varlen(ends, packing.ends, tokens, longest))
    out = out.view(batch, tokens, heads, dim)
    if packing.log_counts is None:
        return out
    k_pad, v_pad = k[:, -1:], v[:, -1:]
    logit = (q.float() * k_pad.float()).sum(-1) * dim**-0.5
    lse = lse.view(heads, batch, tokens).permute(1, 2, 0)
    weight = torch.sigmoid(packing.log_counts[:, None, None] + logit - lse)[..., None]
    return torch.lerp(out.float(), v_pad.float().expand_as(out), weight).to(q.dtype)
