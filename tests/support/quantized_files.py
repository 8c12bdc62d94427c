"""Models in the quantized forms of comfy-kitchen, packed as its files are.

`by_kitchen` writes with comfy-kitchen itself, `WRITERS` are our own plain ones, which need only PyTorch; svdquant and
AWQ have a layout in comfy-kitchen but no writer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
# Suffixes beside a module's name -> tensors, and the module's description.
Written = tuple[State, dict[str, Any]]

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
RANK = 8


def is_projection(name: str, tensor: Tensor) -> bool:
    """The weights that such files quantize: of the projections in blocks, also of a text encoder."""
    inside = re.search(r"(blocks?|layer)\.\d+\..*(attn|ffn|SelfAttention|DenseReluDense)\.", name)
    return tensor.ndim == 2 and name.endswith(".weight") and inside is not None and min(tensor.shape) >= 64


# Layouts


def tiles(scales: Tensor) -> Tensor:
    """Scales of blocks [rows, columns] in the tiles of 128 x 4 that tensor cores read."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    padded = torch.zeros(rows, columns)
    padded[: scales.shape[0], : scales.shape[1]] = scales.float()
    out = torch.empty(rows * columns)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = row // 128 * (columns // 4) + column // 4
    out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = padded
    return out.reshape(rows, columns)


def padded(weight: Tensor, multiple: int) -> Tensor:
    rows, columns = (-(-side // multiple) * multiple for side in weight.shape)
    return torch.nn.functional.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))


def bytes_of(numbers: Tensor, high_first: bool = False) -> Tensor:
    """Numbers of 4 bits, two in a byte."""
    even, odd = (numbers[..., i::2].int() & 15 for i in (0, 1))
    return ((even << 4 | odd) if high_first else (odd << 4 | even)).to(torch.uint8)


def group_of(columns: int) -> int:
    return next(size for size in (256, 64, 16, 4) if columns % size == 0)


def rotated(weight: Tensor, group: int) -> Tensor:
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).float() / 2
    turn = torch.eye(1)
    while len(turn) < group:
        turn = torch.kron(turn, four)
    return (weight.unflatten(1, (-1, group)) @ turn.T).flatten(1)


# Our own writers


def nvfp4(weight: Tensor) -> Written:
    weight = padded(weight, 16)
    whole = weight.abs().max() / (448 * 6)
    blocks = weight.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 / whole).clamp(max=448).to(E4M3)
    total = (whole * scale.float())[..., None]
    given = torch.where(total == 0, 0, blocks / total.clamp(min=1e-30)).clamp(-6, 6).flatten(1)
    index = (given.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (given < 0)
    tensors = {"weight": bytes_of(index, high_first=True), "weight_scale": tiles(scale).to(E4M3)}
    return tensors | {"weight_scale_2": whole}, {"format": "nvfp4"}


def mxfp8(weight: Tensor) -> Written:
    weight = padded(weight, 32)
    blocks = weight.unflatten(1, (-1, 32))
    largest = blocks.abs().amax(-1)
    exponent = torch.where(largest == 0, 0, (largest / 448).clamp(min=2**-126).log2().ceil() + 127)
    values = blocks / torch.where(largest == 0, 1, 2 ** (exponent - 127))[..., None]
    return {"weight": values.flatten(1).to(E4M3), "weight_scale": tiles(exponent).to(torch.uint8)}, {"format": "mxfp8"}


def int8(weight: Tensor, rows: bool = False, turned: bool = False) -> Written:
    group = group_of(weight.shape[1]) if turned else 1
    given = rotated(weight, group) if turned else weight
    scale = (given.abs().amax(1, keepdim=True) if rows else given.abs().max()) / 127
    about = {"convrot": True, "convrot_groupsize": group} if turned else {}
    values = (given / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, {"format": "int8_tensorwise"} | about


def convrot_w4a4(weight: Tensor) -> Written:
    group = group_of(weight.shape[1])
    given = rotated(weight, group)
    scale = given.abs().amax(1) / 7
    values = bytes_of((given / scale[:, None]).round()).view(torch.int8)
    return {"weight": values, "weight_scale": scale}, {"format": "convrot_w4a4", "convrot_groupsize": group}


def w4a8(weight: Tensor, bits: int = 4, book: bool = True, correction: bool = False) -> Written:
    turn = group_of(weight.shape[1])
    given = rotated(weight, turn).unflatten(1, (-1, 16))
    channel = given.abs().amax((1, 2)) / 127
    if correction:
        middle = (given.amax(-1) + given.amin(-1)) / 2
        given = given - middle[..., None]
    levels = torch.linspace(-1, 1, 16).sin() if book else torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)).float()
    scale = (given.abs().amax(-1) / channel[:, None] / levels.max()).to(E4M3)
    wanted = given / channel[:, None, None] / scale.float()[..., None].clamp(min=1e-30)
    codes = ((wanted[..., None] - levels).abs().argmin(-1) + (0 if book else 1)).flatten(1)
    packed = bytes_of(codes & 15)
    if bits == 6:
        high = sum((codes[:, i::4] >> 4) << 2 * i for i in range(4))
        packed = torch.cat([packed, high.to(torch.uint8)], 1)
    tensors = {"weight": packed.view(torch.int8), "weight_s_rel": scale, "weight_s_channel": channel}
    tensors |= {"weight_codebook": levels} if book else {}
    tensors |= {"weight_correction": middle.t().contiguous()} if correction else {}
    return tensors, {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": turn}


def svdquant(weight: Tensor, tiled: bool = False, basis: str = "raw") -> Written:
    """tiled: in tiles of 128 rows where they divide by it. basis: of the input of the low-rank branch."""
    smooth = weight.abs().amax(0).clamp(min=1e-3).sqrt()
    given = weight * smooth
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    up, down = u[:, :RANK] * s[:RANK], v[:RANK].T
    rest = (given - up @ down.T).unflatten(1, (-1, 64))
    scale = (rest.abs().amax(-1) / 7).bfloat16()
    values = bytes_of((rest / scale.float()[..., None]).round().clamp(-8, 7).flatten(1)).view(torch.int8)
    if basis == "raw":
        down = down / smooth[:, None]
    about = {"format": "svdquant_w4a4"} | ({} if basis == "raw" else {"lowrank_branch_input_basis": basis})
    out = {"proj_down": down.bfloat16(), "smooth_factor": smooth}
    rows, groups = scale.shape
    if not tiled or rows % 128:
        return out | {"weight": values, "weight_scale": scale.t(), "proj_up": up.bfloat16()}, about
    # [tiles, groups, 32, 4 rows x 32 bytes]
    tiles = values.reshape(rows // 128, 32, 4, groups, 32).permute(0, 3, 1, 2, 4)
    out["weight"] = tiles.reshape(rows // 128, groups, 32, 128)
    out["weight_scale"] = scale.reshape(rows // 128, 128, groups).transpose(1, 2)
    out["proj_up"] = up.bfloat16().reshape(rows // 128, 128, RANK).transpose(1, 2)
    return out, about | {"layout": "kitchen_tile_packed_w4a4"}


def awq(weight: Tensor) -> Written:
    groups = weight.unflatten(1, (-1, 64))
    least, most = groups.amin(-1), groups.amax(-1)
    scale = ((most - least) / 15).bfloat16().float()
    zero = (least + 8 * scale).bfloat16().float()
    codes = ((groups - zero[..., None]) / scale[..., None] + 8).round().clamp(0, 15).flatten(1)
    tensors = {"weight": bytes_of(codes).view(torch.int8), "weight_scale": scale.t(), "weight_zero": zero.t()}
    return tensors, {"format": "awq_w4a16", "group_size": 64}


def fp8(weight: Tensor) -> Written:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(E4M3), "weight_scale": scale}, {"format": "float8_e4m3fn"}


# One name for each form.
WRITERS: dict[str, Callable[[Tensor], Written]] = {
    "float8_e4m3fn": fp8,
    "int8_tensorwise": int8,
    "int8_tensorwise rows": lambda weight: int8(weight, rows=True),
    "int8 convrot": lambda weight: int8(weight, rows=True, turned=True),
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "convrot_w4a4": convrot_w4a4,
    "asym_w4a8_int8": w4a8,
    "asym_w4a8_int8 uniform": lambda weight: w4a8(weight, book=False),
    "asym_w4a8_int8 corrected": lambda weight: w4a8(weight, book=False, correction=True),
    "asym_w4a8_int8 of 6 bits": lambda weight: w4a8(weight, bits=6, book=False),
    "svdquant_w4a4": svdquant,
    "svdquant_w4a4 tiles": lambda weight: svdquant(weight, tiled=True),
    "svdquant_w4a4 smoothed branch": lambda weight: svdquant(weight, basis="post_smoothing"),
    "awq_w4a16": awq,
}
FORMS = tuple(WRITERS)
# The layout of comfy-kitchen that writes a form, and with what; group: the rotation's.
KITCHEN: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", lambda group: {"scale": "recalculate"}),
    "int8_tensorwise": ("TensorWiseINT8Layout", lambda group: {}),
    "int8_tensorwise rows": ("TensorWiseINT8Layout", lambda group: {"per_channel": True}),
    "int8 convrot": (
        "TensorWiseINT8Layout",
        lambda group: {"per_channel": True, "convrot": True, "convrot_groupsize": group},
    ),
    "nvfp4": ("TensorCoreNVFP4Layout", lambda group: {}),
    "mxfp8": ("TensorCoreMXFP8Layout", lambda group: {}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", lambda group: {"convrot_groupsize": group}),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", lambda group: {"convrot_groupsize": group}),
    "asym_w4a8_int8 uniform": ("AsymW4A8Int8Layout", lambda group: {"convrot_groupsize": group, "codebook": False}),
    "asym_w4a8_int8 corrected": ("AsymW4A8Int8Layout", lambda group: {"convrot_groupsize": group, "symmetric": False}),
    "asym_w4a8_int8 of 6 bits": ("AsymW4A8Int8Layout", lambda group: {"convrot_groupsize": group, "bits": 6}),
}


def has_kitchen(form: str) -> bool:
    """Whether comfy-kitchen is there and writes this form."""
    if form not in KITCHEN or find_spec("comfy_kitchen") is None:
        return False
    from comfy_kitchen.tensor import AsymW4A8Int8Layout

    return "6 bits" not in form or hasattr(AsymW4A8Int8Layout, "bits")


def by_kitchen(weight: Tensor, form: str) -> Written:
    """As comfy-kitchen writes it; the description as ComfyUI writes it."""
    from comfy_kitchen.tensor import QuantizedTensor

    layout, options = KITCHEN[form]
    group = group_of(weight.shape[1])
    given = QuantizedTensor.from_float(weight, layout, **options(group))
    about: dict[str, Any] = {"format": form.split()[0]}
    if form == "int8 convrot":
        about = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    elif "convrot" in form or "w4a8" in form:
        about["convrot_groupsize"] = group
    if "w4a8" in form:
        about["group_size"] = given.params.group_size
    return given.state_dict("weight"), about


def as_description(settings: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def quantized(
    state: State,
    form: str,
    *,
    kitchen: bool | None = None,
    quantizes: Callable[[str, Tensor], bool] = is_projection,
    metadata: bool = False,
) -> tuple[State, dict[str, str]]:
    """(tensors, metadata of the file) of a model whose weights that `quantizes` chooses are in a form of `FORMS`.

    kitchen: written by comfy-kitchen; None: where it can. metadata: described there instead of in tensors. Other
    tensors stay as they are. Names may be any; the columns of the weights must divide by 64.
    """
    out, described = {}, {}
    kitchen = has_kitchen(form) if kitchen is None else kitchen
    for name, tensor in state.items():
        if not quantizes(name, tensor):
            out[name] = tensor.contiguous()
            continue
        module, weight = name.removesuffix(".weight"), tensor.float()
        tensors, described[module] = by_kitchen(weight, form) if kitchen else WRITERS[form](weight)
        out |= {f"{module}.{suffix}": value.contiguous() for suffix, value in tensors.items()}
    if metadata:
        return out, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": described})}
    return out | {f"{module}.comfy_quant": as_description(about) for module, about in described.items()}, {}
