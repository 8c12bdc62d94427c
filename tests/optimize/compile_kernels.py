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

from longcat_core.optimize import block_sparse_kernel as kernels
from longcat_core.optimize import text_attention


def build(kernel, capability: tuple[int, int], types: dict[str, str], tiles: kernels.Tiles, **constants) -> None:
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
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers or None}
    built = compile(source, target=target, options=options)
    row = {"kernel": kernel.fn.__name__, "capability": capability, "shared": built.metadata.shared}
    row["wanted"] = tiles.shared_bytes(128)
    row |= {"tma": "cp.async.bulk.tensor" in built.asm["ptx"], "wgmma": "wgmma" in built.asm["ptx"]}
    print(json.dumps(row | {"bytes": len(built.asm["cubin"])}), flush=True)


def main() -> None:
    half = "*bf16"
    lists = dict.fromkeys(("indices", "counts", "sizes"), "*i32")
    for capability in ((8, 9), (9, 0)):
        for q_chunk, k_chunk, padded in ((64, 64, True), (128, 128, False), (128, 64, False)):
            tiles = kernels.choose_tiles(capability, q_chunk, k_chunk)
            tile = f"tensordesc<bf16[{tiles.columns}, 128]>" if tiles.tma else half
            build(
                kernels._attend,
                capability,
                {"q": half, "k": tile, "v": tile, "out": half, **lists, "scale": "fp32"},
                tiles,
                Q_CHUNK=q_chunk,
                K_CHUNK=k_chunk,
                ROWS=tiles.rows,
                COLUMNS=tiles.columns,
                DIM=128,
                PAIR=tiles.pair,
                PADDED=padded,
                TMA=tiles.tma,
            )
        rows, columns = text_attention.ROWS, text_attention.COLUMNS
        build(
            text_attention._text_attention,
            capability,
            {**dict.fromkeys(("q", "weight", "k", "v", "out"), half), "bias": "*fp32", "scale": "fp32", "eps": "fp32"},
            kernels.Tiles(rows, columns, 1, text_attention.WARPS, text_attention.STAGES, False),
            BIAS=True,
            ROWS=rows,
            COLUMNS=columns,
            DIM=128,
        )
    types = {"x": half, "sizes": "*i32", "out": half}
    build(kernels._pool, (9, 0), types, tiles, CHUNK=128, PART=64, DIM=128)
    build(kernels._top_k, (9, 0), {"scores": "*i16", "sizes": "*i32", "out": "*i32"}, tiles, PADDED=True, WIDTH=4096)


if __name__ == "__main__":
    main()
