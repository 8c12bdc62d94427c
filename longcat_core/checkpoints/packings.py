"""How matrices are packed into bytes, scaled by blocks or rotated, and how they are multiplied out.

Layouts: https://github.com/Comfy-Org/comfy-kitchen (comfy_kitchen/tensor) and, of what files hold beside them,
https://github.com/Comfy-Org/comfy-quants (docs/formats). Everything is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Settings = Mapping[str, Any]
# Rows as stored, and which of the matrix they are -> their numbers [rows, columns] fp32.
Unpack = Callable[[Tensor, slice], Tensor]

E4M3, I8, U8 = torch.float8_e4m3fn, torch.int8, torch.uint8
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Older versions of PyTorch lack it, where `files` reads its bytes.
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
# The numbers that the bits of E2M1 stand for; the fourth bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The rows and columns of a tile of block scales.
# https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
TILE = (128, 4)
# Numbers that share a scale, and rows of a tile, in svdquant_w4a4.
SVD_GROUP, SVD_ROWS = 64, 128


@dataclass(frozen=True)
class Packing:
    """One format. dtypes: of the weight. beside: suffix of a tensor beside it -> its dtypes; optional: those that may
    be missing. Tensors whose scales must be above 0 are in `positive`. multiple: of what writers pad both sides to.

    measure: shape of the weight as stored, settings, shapes beside -> the matrix's shape, and the shapes that the
    tensors beside it must have. block: settings -> how many columns are scaled or rotated together. refused:
    settings -> what in them cannot be read, or None.
    """

    dtypes: tuple[torch.dtype, ...]
    beside: Mapping[str, tuple[torch.dtype, ...]]
    measure: Callable[[Shape, Settings, Mapping[str, Shape]], tuple[Shape, dict[str, Shape]]]
    open: Callable[[Shape, Settings, dict[str, Tensor]], Unpack]
    optional: tuple[str, ...] = ()
    positive: tuple[str, ...] = ("weight_scale",)
    multiple: int = 1
    block: Callable[[Settings], int] = lambda settings: 1
    refused: Callable[[Settings], str | None] = lambda settings: None


# Numbers in bytes


def nibbles(rows: Tensor, high_first: bool = False) -> Tensor:
    """Bytes [rows, n] -> the two numbers of 4 bits in each, [rows, 2 n] uint8."""
    low, high = rows.view(U8) & 15, rows.view(U8) >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def signed(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits in two's complement -> fp32."""
    return (numbers ^ 8).float() - 8


def by_groups(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """values [rows, columns] times scales [rows, columns / group]."""
    return (values.unflatten(1, (-1, group)) * scales[..., None]).flatten(1)


# Block scales


def tiled(shape: Shape, block: int) -> Shape:
    """The shape of the stored scales of blocks of a matrix, which fill whole tiles."""
    rows, columns = shape
    return ceil(rows / TILE[0]) * TILE[0], ceil(columns / block / TILE[1]) * TILE[1]


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in the order of tiles -> [rows, columns]. A tile holds row r, column c at [r % 32, r // 32, c]."""
    down, across = ceil(rows / TILE[0]), ceil(columns / TILE[1])
    tiles = scales.reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * TILE[0], across * TILE[1])[:rows, :columns]


# Rotation


def rotation(size: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix [size, size] of ConvRot (arXiv 2512.03673), its own inverse; size: a power of 4."""
    four = 1 - 2 * torch.eye(4, device=device).flip(0)
    found = torch.ones(1, 1, device=device)
    while len(found) < size:
        found = torch.kron(found, four)
    return found / size**0.5


def unrotated(rows: Tensor, group: int) -> Tensor:
    """Undo the rotation of every group of columns. Exact for whole numbers up to 127, whose sums fp32 holds."""
    return (rows.float().unflatten(1, (-1, group)) @ rotation(group, rows.device)).flatten(1)


def _group(settings: Settings) -> int:
    return settings.get("convrot_groupsize", 256)


def _turns(settings: Settings) -> str | None:
    group = _group(settings)
    fine = isinstance(group, int) and 4 <= group <= 4096 and group & (group - 1) == 0 and group.bit_length() % 2
    return None if fine else f"a rotation of {group} columns"


def _columns(settings: Settings, default: int) -> int:
    group = settings.get("group_size", default)
    return group if isinstance(group, int) and group > 0 else 0


# The formats


def _measure_nvfp4(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    shape = (stored[0], 2 * stored[1])
    return shape, {"weight_scale": tiled(shape, 16), "weight_scale_2": (), "pre_quant_scale": shape[1:]}


def _open_nvfp4(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    scales = beside["weight_scale"].view(E4M3).float()
    scales = beside["weight_scale_2"].float().reshape(()) * untiled(scales, shape[0], shape[1] // 16)
    numbers = torch.tensor([*E2M1, *(-number for number in E2M1)], device=scales.device)
    smooth = beside.get("pre_quant_scale")

    def unpack(rows: Tensor, at: slice) -> Tensor:
        out = by_groups(numbers[nibbles(rows, high_first=True).int()], scales[at], 16)
        return out if smooth is None else out * smooth.float()

    return unpack


def _measure_mxfp8(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    return stored, {"weight_scale": tiled(stored, 32)}


def _open_mxfp8(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    exponents = untiled(beside["weight_scale"].view(U8), shape[0], shape[1] // 32)
    # As bits of fp32; 0 stands for a block of zeros.
    scales = (exponents.int() << 23).view(torch.float32)
    return lambda rows, at: by_groups(rows.view(E4M3).float(), scales[at], 32)


def _measure_int8(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    return stored, {"weight_scale": () if prod(beside["weight_scale"]) == 1 else stored[:1]}


def _open_int8(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    scale = beside["weight_scale"].float().reshape(-1, 1).expand(shape[0], 1)
    return lambda rows, at: unrotated(rows.view(I8), _group(settings)) * scale[at]


def _measure_w4a4(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    return (stored[0], 2 * stored[1]), {"weight_scale": stored[:1]}


def _open_w4a4(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    scale = beside["weight_scale"].float().reshape(-1, 1)
    return lambda rows, at: unrotated(signed(nibbles(rows)), _group(settings)) * scale[at]


def _measure_w4a8(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    groups = beside["weight_s_rel"][-1] if beside["weight_s_rel"] else 0
    columns = groups * _columns(settings, 16)
    if not columns or stored[1] * 8 not in (columns * 4, columns * 6):
        raise ValueError("weight_s_rel")
    shapes = {"weight_s_rel": (stored[0], groups), "weight_s_channel": stored[:1], "weight_codebook": (16,)}
    return (stored[0], columns), shapes | {"weight_correction": (groups, stored[0])}


def _open_w4a8(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    group, columns = _columns(settings, 16), shape[1]
    scales = beside["weight_s_rel"]
    scales = (scales.view(E4M3) if scales.dtype == U8 else scales).float()
    channel = beside["weight_s_channel"].float()[:, None]
    book, correction = beside.get("weight_codebook"), beside.get("weight_correction")

    def unpack(rows: Tensor, at: slice) -> Tensor:
        codes, middle = nibbles(rows[:, : columns // 2]), 8
        if rows.shape[1] > columns // 2:
            # The two high bits of four numbers in a byte.
            high = rows[:, columns // 2 :].view(U8)
            codes, middle = codes | torch.stack([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)], -1).flatten(1), 32
        values = codes.float() - middle if book is None else book.float()[codes.int()]
        # The grid on which the format multiplies.
        out = by_groups(values, scales[at], group).round().clamp(-127, 127)
        out = unrotated(out, _group(settings)) * channel[at]
        if correction is not None:
            offsets = correction.float().t()[at].repeat_interleave(group, 1)
            out += unrotated(offsets, _group(settings))
        return out

    return unpack


def _measure_svdquant(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    tiles = len(stored) == 4
    if tiles and stored[2:] != (SVD_ROWS // 4, 2 * SVD_GROUP):
        raise ValueError("weight")
    rows, columns = (stored[0] * SVD_ROWS, stored[1] * SVD_GROUP) if tiles else (stored[0], 2 * stored[1])
    rank = beside["proj_down"][-1] if beside["proj_down"] else 0
    groups = columns // SVD_GROUP
    shapes: dict[str, Shape] = {
        "weight_scale": (stored[0], groups, SVD_ROWS) if tiles else (groups, rows),
        "proj_up": (stored[0], rank, SVD_ROWS) if tiles else (rows, rank),
        "proj_down": (columns, rank),
        "smooth_factor": (columns,),
    }
    return (rows, columns), shapes


def _open_svdquant(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    scales, up = beside["weight_scale"].float(), beside["proj_up"].float()
    if scales.ndim == 3:
        scales, up = scales.transpose(1, 2).flatten(0, 1), up.transpose(1, 2).flatten(0, 1)
    else:
        scales = scales.t()
    down, smooth = beside["proj_down"].float().t(), beside["smooth_factor"].float()

    def unpack(rows: Tensor, at: slice) -> Tensor:
        if rows.ndim == 4:
            # [tiles, groups, 32 x 4 rows, 32 bytes]
            tiles = rows.unflatten(3, (4, SVD_GROUP // 2)).permute(0, 2, 3, 1, 4)
            rows = tiles.reshape(-1, shape[1] // 2)
        out, low = by_groups(signed(nibbles(rows)), scales[at], SVD_GROUP), up[at] @ down
        # Which input the branch of low rank takes; the residual always takes the one that was smoothed.
        if settings.get("lowrank_branch_input_basis") == "post_smoothing":
            return (out + low) / smooth
        return out / smooth + low

    return unpack


def _refused_svdquant(settings: Settings) -> str | None:
    if settings.get("act_unsigned"):
        return "unsigned inputs"
    basis = settings.get("lowrank_branch_input_basis", "raw")
    return None if basis in ("raw", "post_smoothing") else f"the basis {basis}"


def _measure_awq(stored: Shape, settings: Settings, beside: Mapping[str, Shape]) -> tuple[Shape, dict[str, Shape]]:
    group = _columns(settings, 64)
    scales = (2 * stored[1] // group, stored[0])
    return (stored[0], 2 * stored[1]), {"weight_scale": scales, "weight_zero": scales}


def _open_awq(shape: Shape, settings: Settings, beside: dict[str, Tensor]) -> Unpack:
    scales, zeros = (beside[name].float().t() for name in ("weight_scale", "weight_zero"))
    group = _columns(settings, 64)

    def unpack(rows: Tensor, at: slice) -> Tensor:
        return by_groups(nibbles(rows).float() - 8, scales[at], group) + zeros[at].repeat_interleave(group, 1)

    return unpack


def _grouped(settings: Settings) -> str | None:
    return None if _columns(settings, 1) else f"groups of {settings['group_size']} columns"


# The format's name in a description is the same without the rotation.
ROTATED = "int8_tensorwise, rotated"
PACKINGS: dict[str, Packing] = {
    "nvfp4": Packing(
        (U8, I8),
        {"weight_scale": (E4M3, U8), "weight_scale_2": FLOATS, "pre_quant_scale": FLOATS},
        _measure_nvfp4,
        _open_nvfp4,
        optional=("pre_quant_scale",),
        positive=("weight_scale_2",),
        multiple=16,
        block=lambda settings: 16,
    ),
    "mxfp8": Packing(
        (E4M3, U8),
        {"weight_scale": (E8M0, U8)},
        _measure_mxfp8,
        _open_mxfp8,
        positive=(),
        multiple=32,
        block=lambda settings: 32,
    ),
    ROTATED: Packing((I8,), {"weight_scale": FLOATS}, _measure_int8, _open_int8, block=_group, refused=_turns),
    "convrot_w4a4": Packing(
        (I8, U8), {"weight_scale": FLOATS}, _measure_w4a4, _open_w4a4, block=_group, refused=_turns
    ),
    "asym_w4a8_int8": Packing(
        (I8, U8),
        {
            "weight_s_rel": (E4M3, U8, *FLOATS),
            "weight_s_channel": FLOATS,
            "weight_codebook": FLOATS,
            "weight_correction": FLOATS,
        },
        _measure_w4a8,
        _open_w4a8,
        optional=("weight_codebook", "weight_correction"),
        positive=("weight_s_channel",),
        block=_group,
        refused=lambda settings: _grouped(settings) or _turns(settings),
    ),
    "svdquant_w4a4": Packing(
        (I8, U8),
        {"weight_scale": FLOATS, "proj_down": FLOATS, "proj_up": FLOATS, "smooth_factor": FLOATS},
        _measure_svdquant,
        _open_svdquant,
        positive=(),
        block=lambda settings: SVD_GROUP,
        refused=_refused_svdquant,
    ),
    "awq_w4a16": Packing(
        (I8, U8),
        {"weight_scale": FLOATS, "weight_zero": FLOATS},
        _measure_awq,
        _open_awq,
        positive=(),
        block=lambda settings: _columns(settings, 64),
        refused=_grouped,
    ),
}
# What comfy-kitchen itself calls tensors that other writers name as above.
ALIASES = {
    "weight_zeros": "weight_zero",
    "weight_proj_down": "proj_down",
    "weight_proj_up": "proj_up",
    "weight_smooth_factor": "smooth_factor",
}


def packing_of(settings: Settings) -> str | None:
    """The format of `PACKINGS` that a description means, or None."""
    kind = settings.get("format")
    if kind == "int8_tensorwise":
        return ROTATED if settings.get("convrot") else None
    return kind if kind in PACKINGS else None
