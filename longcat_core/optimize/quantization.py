"""8-bit linear layers: weights in e4m3 with a scale for each row, activations quantized row by row at run time.

y[m, n] = sx[m] * sw[n] * sum_k x8[m, k] * w8[n, k] + bias[n], with scales that map the largest value of a row to 448,
e4m3's largest. Lossy; `longcat bench exactness` and `policies` measure the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LongCatError
from ..model.transformer import LongCatTransformer
from .kernels import elementwise as kernels
from .kernels.elementwise import Quantized, quantize_rows
from .operators import operator
from .requirement import Inputs, Requirement, trial

# The projections of a block; modulation, embeddings and the final layer are fp32 islands. The text's keys and values
# are computed once, so 8 bits save only memory there.
LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj", "ffn.gate_up", "ffn.down")
# Those that an avatar has besides; they are quantized where their counterparts for text are. The weight of its keys and
# values is a fifth as large as the text's, and its error is larger.
AUDIO_LAYERS = ("audio_attn.q", "audio_attn.proj")


@dataclass(frozen=True)
class Policy:
    """What becomes 8-bit: `layers` of every block, except `keep_first` and `keep_last` blocks at the two ends."""

    layers: Sequence[str] = LAYERS
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.layers) - set(LAYERS))
        if unknown:
            raise LongCatError(f"cannot quantize layers {', '.join(unknown)}; choose from {', '.join(LAYERS)}")
        if self.keep_first < 0 or self.keep_last < 0:
            raise LongCatError(f"cannot keep {self.keep_first} first and {self.keep_last} last blocks; give 0 or more")

    def names(self, depth: int, audio: bool = False) -> list[str]:
        """Full names of the layers in a network of `depth` blocks. audio: it is an avatar's."""
        heard = [layer for layer in AUDIO_LAYERS if audio and layer.replace("audio", "cross") in self.layers]
        blocks = range(self.keep_first, depth - self.keep_last)
        return [f"blocks.{i}.{layer}" for i in blocks for layer in (*self.layers, *heard)]


NEEDS = Requirement((8, 9), dtypes=None, head_dims=None, backward=False)


@cache
def missing(device: torch.device) -> str:
    """Why `device` cannot multiply 8-bit rows with scales, or ""; products are then computed in wider precision."""

    def run() -> tuple[Tensor, Tensor]:
        ones = torch.ones(16, 16, device=device)
        one, scale = ones.to(torch.float8_e4m3fn), ones[:, :1].contiguous()
        out = torch._scaled_mm(one, one.t(), scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.float(), 16 * ones

    return NEEDS.why_not(Inputs(device, torch.float8_e4m3fn, 0, False)) or trial(run, 0)


class Fp8Linear(nn.Module):
    """A linear layer with e4m3 weights: x [.., in] in 16 bits or fp32, or already quantized -> [.., out] in its dtype.

    weight [out, in] e4m3; weight_scale [out, 1] fp32; bias [out] or None. With fp8=False the weights are dequantized
    and multiplied in x's precision. `dtype`: of the output if x is quantized. It has no backward pass.
    """

    # `optimize.fused` chooses how such layers multiply, and may quantize their input.
    eight_bit = takes_quantized = True

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype or torch.get_default_dtype()
        self.run_on(weight.device)

    @classmethod
    def of(cls, layer: nn.Linear) -> Fp8Linear:
        """A plain linear layer quantized. Raises LongCatError for sizes that 8-bit products do not take."""
        check_sizes(*layer.weight.shape)
        with torch.no_grad():
            bias = None if layer.bias is None else layer.bias.detach()
            return cls(*quantize_rows(layer.weight.detach()), bias, layer.weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        # Weights and scales move but are not cast; .to(dtype) casts the bias and the output.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        for name in ("weight", "weight_scale"):
            moved = getattr(self, name).data.to(probe.device)
            setattr(self, name, nn.Parameter(moved, requires_grad=False))
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        self.dtype = probe.dtype
        self.run_on(probe.device)
        return self

    def run_on(self, device: torch.device) -> None:
        """Choose how to multiply on `device`, where the weights may not lie yet."""
        # Decided here, because a graph must not run the trial.
        self.native = not missing(device)

    def forward(self, x: Tensor | Quantized, fp8: bool = True) -> Tensor:
        dtype = self.dtype if isinstance(x, Quantized) else x.dtype
        return quantized_linear(x, self.weight, self.weight_scale, self.bias, dtype, fp8=fp8, native=self.native)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def dequantized(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantized e4m3 weight [out, in] with weight_scale [out, 1] fp32, in `dtype`."""
    return (weight.float() * weight_scale).to(dtype)


def quantized_linear(
    x: Tensor | Quantized,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fp8: bool,
    native: bool,
) -> Tensor:
    """x [.., in], quantized here unless it already is, times weight [out, in] e4m3 -> [.., out] in `dtype`.

    weight_scale [out, 1] fp32; bias [out] or None. fp8=False: the dequantized weight in x's precision. native: see
    `scaled_product`. Raises LongCatError if x needs gradients.
    """
    if not isinstance(x, Quantized):
        if torch.is_grad_enabled() and x.requires_grad:
            raise LongCatError("8-bit layers have no backward pass; train the network in bf16, without fp8")
        if not fp8:
            return F.linear(x, dequantized(weight, weight_scale, x.dtype), None if bias is None else bias.to(x.dtype))
        # In a compiled graph quantizing is fused with the operation that computed x.
        own = not torch.compiler.is_compiling() and kernels.usable(x)
        x = kernels.quantize(x) if own else Quantized(*quantize_rows(x))
    return scaled_product(x, weight, weight_scale, bias, dtype, native)


# A scale is stored as this many e4m3 numbers of four bits each, which survive a cast to any wider float.
_DIGITS = 8


def scale_rows(rows: int, columns: int) -> int:
    """How many rows `with_scales` adds to a weight [rows, columns]."""
    return math.ceil(_DIGITS * rows / columns)


def with_scales(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """weight [out, in] e4m3 and its scales [out, 1] fp32 as one e4m3 tensor [out + `scale_rows`, in].

    For an owner that moves, stores and restores one tensor per layer. It may also be cast to a wider float and back.
    """
    return torch.cat((weight, scales_as_rows(weight_scale, weight.shape[1]).to(weight.dtype)))


def scales_as_rows(weight_scale: Tensor, columns: int) -> Tensor:
    """The rows that `with_scales` adds: scales [out, 1] fp32 as e4m3 [`scale_rows`, columns]."""
    shifts = torch.arange(0, 32, 32 // _DIGITS, device=weight_scale.device, dtype=torch.int32)
    digits = (weight_scale.contiguous().view(torch.int32) >> shifts) & 15
    room = scale_rows(len(weight_scale), columns) * columns
    return F.pad(digits.flatten(), (0, room - digits.numel())).view(-1, columns).float().to(torch.float8_e4m3fn)


@operator("packed_scales", lambda packed, rows: packed.new_empty((rows, 1), dtype=torch.float32))
def _packed_scales(packed: Tensor, rows: int) -> Tensor:
    # An operator, because Triton does not compile e4m3 to whole numbers, which a graph would have it do.
    digits = packed[rows:].flatten()[: _DIGITS * rows].view(rows, _DIGITS).to(torch.int32)
    shifts = torch.arange(0, 32, 32 // _DIGITS, device=packed.device, dtype=torch.int32)
    return (digits << shifts).sum(1, keepdim=True, dtype=torch.int32).view(torch.float32)


def without_scales(packed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The weight [rows, in], in packed's dtype, and its scales [rows, 1] fp32: the reverse of `with_scales`."""
    return packed[:rows], _packed_scales(packed, rows)


def check_sizes(rows: int, columns: int) -> None:
    """Raise LongCatError unless 8-bit GEMMs support a weight [rows, columns]."""
    if rows % 16 or columns % 16:
        raise LongCatError(
            f"a weight of {rows}x{columns} cannot be quantized to fp8: both must be multiples of 16; load without fp8"
        )


def scaled_product(
    x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, native: bool
) -> Tensor:
    """x [.., in] times weight [out, in] e4m3 with weight_scale [out, 1] fp32, plus bias [out] -> [.., out] in dtype.

    native: by the GPU's 8-bit GEMM; otherwise with the same numbers in fp32.
    """
    shape = (*x.values.shape[:-1], weight.shape[0])
    values, scales = x.values.flatten(0, -2), x.scales.reshape(-1, 1)
    if not native:
        # Products of two e4m3 numbers are exact in fp32.
        out = F.linear(values.float(), weight.float()) * scales * weight_scale.t()
        return (out if bias is None else out + bias.float()).to(dtype).view(shape)
    # With a scale per row the output is always bf16.
    bias = None if bias is None else bias.to(torch.bfloat16)
    out = torch._scaled_mm(
        *(values, weight.t(), scales, weight_scale.t()), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out.to(dtype).view(shape)


def quantize(model: LongCatTransformer, policy: Policy | None = None) -> int:
    """Convert the layers that `policy` names to 8 bits, in place; returns the number of bytes saved.

    Layer by layer, so that at most one layer is held twice. 8-bit layers do not change. Raises LongCatError for layers
    that are not plain linear ones (merge LoRAs first) and for sizes that do not fit; the model does not change then.
    """
    names = (policy or Policy()).names(len(model.blocks), model.config.audio is not None)
    layers: dict[str, nn.Linear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, Fp8Linear):
            continue
        if type(layer) is not nn.Linear:
            raise LongCatError(f"{name} is a {type(layer).__name__} and cannot be quantized; merge LoRAs first")
        check_sizes(*layer.weight.shape)
        layers[name] = layer
    saved = 0
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        new = Fp8Linear.of(layer)
        saved += layer.weight.nbytes - new.weight.nbytes - new.weight_scale.nbytes
        setattr(model.get_submodule(parent), child, new)
        del layer.weight
    return saved


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the 8-bit layers of a network."""
    return [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]


def policies(depth: int) -> dict[str, Policy]:
    """Policies to compare: all layers, each kind by itself, all but one kind, and all but the outer blocks."""
    found = {"all": Policy()}
    for layer in LAYERS:
        found[f"only {layer}"] = Policy((layer,))
    for layer in LAYERS:
        found[f"all but {layer}"] = Policy(tuple(other for other in LAYERS if other != layer))
    if depth > 2:
        found["all but the first and last block"] = Policy(keep_first=1, keep_last=1)
    return found
