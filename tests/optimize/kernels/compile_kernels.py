"""Compiles attention kernels, block-sparse and to text, to machine code without a GPU; prints a line of JSON for each.

Run as a program: Triton's interpreter, which the other tests turn on, accepts what its compiler does not.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "0"

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longcat_core.optimize.kernels import block_sparse as kernels
from longcat_core.optimize.kernels import cudnn_fp8 as fp8_attention
from longcat_core.optimize.kernels import (
    elementwise,
    put,
    row_scales,
    sparse_choose,
    sparse_fp8,
    sparse_tail,
    text_attention,
)


def build(
    kernel,
    capability: tuple[int, int],
    types: dict[str, str],
    tiles: kernels.Tiles | sparse_tail.TailTiles,
    **constants,
) -> None:
    names = kernel.arg_names
    wide = ("pointer", "tokens", "stride", "heads", "sample")
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # What the launcher sees of real tensors: addresses and strides are multiples of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types.get(name, "").startswith("*") or name.endswith(wide)
        },
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    built = compile(source, target=target, options=options)
    row = {"kernel": kernel.fn.__name__, "capability": capability, "shared": built.metadata.shared}
    row["wanted"] = tiles.shared_bytes(128)
    row |= {"tma": "cp.async.bulk.tensor" in built.asm["ptx"], "wgmma": "wgmma" in built.asm["ptx"]}
    print(json.dumps(row | {"bytes": len(built.asm["cubin"])}), flush=True)


def main() -> None:
    half = "*bf16"
    lists = dict.fromkeys(("indices", "counts", "sizes"), "*i32")
    for capability in ((8, 9), (9, 0)):
        for q_chunk, k_chunk, padded in ((64, 64, True), (128, 128, False), (128, 64, False), (64, 64, False)):
            tiles = kernels.choose_tiles(capability, q_chunk, k_chunk)
            tile = f"tensordesc<bf16[{tiles.columns}, 128]>" if tiles.tma else half
            build(
                kernels._attend,
                capability,
                {"q": half, "k": tile, "v": tile, "out": half, "sums": "*fp32", **lists, "scale": "fp32"},
                tiles,
                Q_CHUNK=q_chunk,
                K_CHUNK=k_chunk,
                ROWS=tiles.rows,
                COLUMNS=tiles.columns,
                DIM=128,
                PADDED=padded,
                TMA=tiles.tma,
                SUMS=q_chunk == k_chunk == 64,
                RAGGED=q_chunk == k_chunk == 64,
            )
        rows, columns = text_attention.ROWS, text_attention.COLUMNS
        for out, fp8 in ((half, False), ("*fp8e4nv", True)):
            types = dict.fromkeys(("q", "weight", "k", "v"), half) | {"out": out, "bias": "*fp32", "scales": "*fp32"}
            types |= {"scale": "fp32", "eps": "fp32"}
            build(
                text_attention._text_attention,
                capability,
                types,
                kernels.Tiles(rows, columns, text_attention.WARPS, text_attention.STAGES, False),
                BIAS=True,
                FP8=fp8,
                ROWS=rows,
                COLUMNS=columns,
                DIM=128,
            )
            build(
                text_attention._short_text_attention,
                capability,
                types,
                kernels.Tiles(text_attention.SHORT_ROWS, 128, text_attention.SHORT_WARPS, 1, False),
                BIAS=True,
                FP8=fp8,
                ROWS=text_attention.SHORT_ROWS,
                TILES=text_attention.SHORT_TILES,
                KEYS=text_attention.SHORT,
                DIM=128,
            )
    parts = {"CHUNK": fp8_attention.CHUNK, "ROWS": fp8_attention.ROWS}
    extent = {"x": half, "largest": "*fp32", "sums": "*fp32"}
    build(fp8_attention._fp8_attention_extent, (9, 0), extent, tiles, DIM=128, **parts)
    packed = {"x": half, "mean": "*fp32", "scale": "*fp32", "out": "*fp8e4nv"}
    for centered in (False, True):
        rows = fp8_attention.ROWS
        build(fp8_attention._fp8_attention_pack, (9, 0), packed, tiles, CENTERED=centered, ROWS=rows, DIM=128)
    back = {"x": "*fp8e4nv", "scale": "*fp32", "out": half}
    build(fp8_attention._fp8_attention_unpack, (9, 0), back, tiles, SIZE=fp8_attention.SIZE)
    types = {"x": half, "scales": "*fp32", "values": "*i8", "out": half}
    for kernel in (row_scales._pack_rows, row_scales._unpack_rows):
        build(kernel, (8, 9), types, tiles, ROWS=row_scales.ROWS, DIM=128)
    for capability in ((8, 9), (9, 0)):
        types = {f"{way}_{which}": half for way in ("to", "of") for which in "abc"}
        build(put._put_rows, capability, types, tiles, ROWS=put.TILE // 512, WIDTH=512)
    tensors = ("q", "means_k", "means_v", "rest_k", "rest_v", "exact", "out")
    types = dict.fromkeys(tensors, half) | {"mask": "*u8", "sums": "*fp32", "scale": "fp32"}
    for capability, query_block in (((8, 9), 64), ((9, 0), 64), ((9, 0), 128)):
        tail = sparse_tail.choose_tail_tiles(capability)
        tile = dict.fromkeys(("means_k", "means_v"), f"tensordesc<bf16[{tail.columns}, 128]>") if tail.tma else {}
        shape = {"ROWS": tail.rows, "COLUMNS": tail.columns, "DIM": 128}
        what = {"TAIL": True, "REST": True, "TMA": tail.tma, "Q_BLOCK": query_block}
        build(sparse_tail._sparse_tail, capability, types | tile, tail, **shape, **what)
    types = {"x": half, "out": half}
    build(sparse_choose._sparse_mean, (9, 0), types, tail, TOKENS=128, PART=64, DIM=128)
    types = dict.fromkeys(("keep", "indices", "counts"), "*i32") | {"scores": "*i16", "mask": "*u8"}
    build(sparse_choose._sparse_choose, (9, 0), types, tail, WIDTH=1024)
    parts = {"ROWS": sparse_fp8.ROWS, "DIM": 128}
    types = {"k": half, "v": half, "sums": "*fp32", "largest": "*fp32"}
    build(sparse_fp8._sparse_fp8_extents, (9, 0), types, tail, CHUNK=sparse_fp8.CHUNK, **parts)
    types = {"x": half, "v": half, "mean": "*fp32", "out": "*fp8e4nv", "scales": "*fp32", "scale": "*fp32"}
    for group in (1, sparse_fp8.GROUP):
        build(sparse_fp8._sparse_fp8_rows, (9, 0), types, tail, CENTERED=group > 1, GROUP=group, **parts)
    build(sparse_fp8._sparse_fp8_columns, (9, 0), types, tail, **parts)
    types = {"x": half, "scales": "*fp32", "out": "*fp8e4nv"}
    build(elementwise._quantize, (9, 0), types, tiles, DIM=128, WIDTH=4096)
    types = {"x": half, "sizes": "*i32", "out": half}
    build(kernels._pool, (9, 0), types, tiles, CHUNK=128, PART=64, DIM=128)
    build(kernels._top_k, (9, 0), {"scores": "*i16", "sizes": "*i32", "out": "*i32"}, tiles, PADDED=True, WIDTH=4096)


if __name__ == "__main__":
    main()
