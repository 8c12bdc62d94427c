"""The operations that the network is written against, defined in plain PyTorch.

A block asks an `Ops` for attention, attention to text, norms, SwiGLU and gated residuals. `PlainOps` says what each of
them must compute. Everything that makes the network fast, sparse, quantized or distributed is a subclass that replaces
some of the methods and is installed from outside; tests compare it with `PlainOps`.

Shapes: x, update [B, T, S, C] with S = H*W; gate, scale, shift [B or 1, T or 1, 1, C] fp32; q, k, v [B, N, heads,
head_dim]. `reader` is the linear layer that reads a result: an `Ops` may hand the result over in a form that only this
layer takes, such as 8-bit rows with scales.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerNorm, RMSNorm, gated, modulate
from .rope import apply_rope
from .text import BlockText, TextForm, TextTokens

# A tensor [.., C], or what the layer that reads it takes in its place.
Activations = Any
Rope = tuple[Tensor, Tensor]
T = TypeVar("T")


class Once(Generic[T]):
    """Holds activations for their only reader, which takes them out so that they are freed while it runs."""

    def __init__(self, value: T) -> None:
        self.value: Any = value

    def take(self) -> T:
        value, self.value = self.value, None
        return value


class PlainOps:
    """The definition of every operation, in plain PyTorch, on any device, with gradients."""

    def fp32_region(self, device: torch.device) -> AbstractContextManager:
        """The context in which the fp32 islands (time embedding, modulation, norms, gates) are computed."""
        return nullcontext()

    def linear(self, layer: nn.Module, x: Activations) -> Tensor:
        """layer(x): [.., C_in] -> [.., C_out]."""
        return layer(x)

    def project(self, layer: nn.Module, x: Activations, parts: int) -> tuple[Tensor, ...]:
        """`parts` equal slices of a fused projection of x [.., C_in], each [.., C_out/parts]."""
        return self.linear(layer, x).chunk(parts, dim=-1)

    def norm_modulate(
        self,
        x: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        reader: nn.Module | None,
    ) -> tuple[Tensor, Activations]:
        """x + gate * update (no update: x; no gate: 1), and LayerNorm of that, times 1 + scale, plus shift."""
        with self.fp32_region(x.device):
            if update is not None:
                x = x + update if gate is None else gated(x, update, gate)
            return x, modulate(x, shift, scale)

    def residual_norm(
        self, x: Tensor, update: Once[Tensor], gate: Tensor | None, norm: LayerNorm, skip: int, reader: nn.Module
    ) -> tuple[Tensor, Activations]:
        """x + gate * update (no gate: 1), and `norm` of that without its first `skip` frames."""
        with self.fp32_region(x.device):
            x = x + update.take() if gate is None else gated(x, update.take(), gate)
        return x, norm(x[:, skip:])

    def norm_rope(self, x: Tensor, norm: RMSNorm, rope: Rope | None) -> Tensor:
        """RMSNorm over head_dim, then RoPE by tables [N, head_dim/2] (None: the norm alone). x may be overwritten."""
        x = norm(x)
        return x if rope is None else apply_rope(x, *rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, reader: nn.Module | None = None) -> Activations:
        """softmax(q k^T / sqrt(head_dim)) v without a mask: q [B, Nq, ..], k and v [B, Nk, ..] -> [B, Nq, C]."""
        return attend_with_bias(q, k, v, None).flatten(-2)

    def text_form(self, text: TextTokens, batch: int) -> TextForm:
        """How `attend_text` reads a text of 1 or `batch` samples."""
        full = text.expand(batch)
        return TextForm(lambda rows: rows.expand(batch, *rows.shape[1:]).contiguous(), full.bias)

    def attend_text(
        self, q: Tensor, norm: RMSNorm, k: Tensor, v: Tensor, text: BlockText, reader: nn.Module
    ) -> Activations:
        """Attention of norm(q) [B, N, ..] over a text's keys and values [B, M, ..], with its bias -> [B, N, C]."""
        return attend_with_bias(self.norm_rope(q, norm, None), k, v, text.bias).flatten(-2)

    def attend_frames(
        self, q: Tensor, norm: RMSNorm, rope: Rope | None, k: Tensor, v: Tensor, reader: nn.Module
    ) -> Activations:
        """Attention of each frame to its own keys and values: k, v [B or 1, T, M, ..], q [B, T*S, ..] -> [B*T, S, C].

        q is normed and rotated by tables [T*S, head_dim/2] (None: the norm alone). It may be overwritten.
        """
        q = self.norm_rope(q, norm, rope)
        return attend_with_bias(*by_frames(q, k, v), None).flatten(-2)

    def class_maps(self, q: Tensor, k: Tensor, classes: Tensor) -> Tensor:
        """How much q [B, N, ..] attends to each class of the tokens of k [B, S, ..] -> [B, N, K] fp32.

        classes [S, K], 0 or 1: the mean weight of a class's tokens, averaged over heads. An attention whose values have
        a column for each class, so that no weights are stored. It is exact under every `Ops`, because the largest of
        near numbers is taken.
        """
        columns = F.pad(classes.to(q.dtype), (0, max(0, q.shape[-1] - classes.shape[1])))
        values = columns[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
        sums = attend_with_bias(q, k, values, None)[..., : classes.shape[1]].float().mean(2)
        return sums / classes.float().sum(0)

    def class_bounds(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most [K] of class maps [N, K] of all noisy tokens."""
        return maps.amin(0), maps.amax(0)

    def swiglu(self, gate_up: nn.Module, down: nn.Module, x: Activations) -> Tensor:
        """down(silu(gate) * up) with gate and up the halves of gate_up(x) (arXiv 2002.05202)."""
        gate, up = self.linear(gate_up, x).chunk(2, dim=-1)
        return self.linear(down, F.silu(gate) * up)

    def feed_forward(self, x: Tensor, h: Activations, gate: Tensor, gate_up: nn.Module, down: nn.Module) -> Tensor:
        """x + gate * swiglu(h). Without gradients the result may be written into x."""
        update = self.swiglu(gate_up, down, h)
        with self.fp32_region(x.device):
            return gated(x, update, gate)

    def modulated_fp32(self, x: Tensor, scale: Tensor, shift: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """project(LayerNorm(x) * (1 + scale) + shift), all in fp32: the final layer. -> [B, T, S, C_out] fp32."""
        return project(modulate(x.float(), shift, scale))


def by_frames(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T*S, ..], k and v [B or 1, T, M, ..] with frames as samples: [B*T, S, ..] and [B*T, M, ..]."""
    k, v = (x.expand(q.shape[0], *x.shape[1:]).flatten(0, 1) for x in (k, v))
    return q.unflatten(1, (k.shape[0] // q.shape[0], -1)).flatten(0, 1), k, v


Ops = PlainOps
PLAIN = PlainOps()


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """SDPA over [B, N, heads, head_dim] with a bias [B, 1, 1, M] on the logits, or None."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
