"""Settings of sparse self-attention, and how dense it is at each step, layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, get_args

from ...errors import LongCatError, check_choice, check_type, is_number, is_whole, plain_fields

SparseKernel = Literal["auto", "fa4", "cudnn", "cudnn-fp8", "sol", "triton", "plain"]
SPARSE_KERNELS: tuple[SparseKernel, ...] = get_args(SparseKernel)
# Kernels that round queries, keys and values to 8 bits.
EIGHT_BIT = ("cudnn-fp8", "sol")
# Tokens of a key block.
BLOCK = 64
QUERY_BLOCKS = (BLOCK, 2 * BLOCK)
# Kernels whose query blocks have 64 tokens.
NARROW: tuple[SparseKernel, ...] = ("cudnn", "cudnn-fp8", "sol")


def _check_share(name: str, value: object) -> None:
    """Raise LongCatError unless `value` is a number from 0 to 1."""
    if not is_number(value) or not 0 <= float(value) <= 1:  # type: ignore[arg-type]
        raise LongCatError(f"{name} is {value}; it must lie between 0 and 1")


def _sequence(name: str, value: object, of: str) -> tuple[Any, ...]:
    """`value` as a tuple. Raises LongCatError unless it is a list or a tuple with something in it; of: its contents."""
    if not isinstance(value, list | tuple) or not value:
        raise LongCatError(f"{name} must be a list of {of}, with one at least")
    return tuple(value)


@dataclass(frozen=True)
class Densities:
    """The share of key blocks that each head of each layer keeps, for ranges of the steps; lists become tuples.

    ends: [ranges], the share of the steps at which each range ends, ascending; the last is 1. values: densities
    [ranges][layers][heads], 0..1.
    Raises LongCatError for other numbers and for lists of different lengths.
    """

    ends: tuple[float, ...]
    values: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        ends = _sequence("ends of densities", self.ends, "shares of the steps")
        for end in ends:
            _check_share("an end of densities", end)
        if list(ends) != sorted(set(ends)) or ends[-1] != 1:
            raise LongCatError(f"ends of densities are {list(ends)}; they must ascend and the last must be 1")
        ranges = []
        for layers in _sequence("densities", self.values, "ranges of steps"):
            heads = [
                _sequence("densities of a layer", row, "numbers") for row in _sequence("densities", layers, "layers")
            ]
            for value in (value for row in heads for value in row):
                _check_share("a density", value)
            ranges.append(tuple(tuple(float(value) for value in row) for row in heads))
        if len(ranges) != len(ends):
            raise LongCatError(f"densities have {len(ranges)} ranges of steps and {len(ends)} ends; give as many")
        if len({tuple(map(len, layers)) for layers in ranges}) != 1 or len({*map(len, ranges[0])}) != 1:
            raise LongCatError("densities have lists of different lengths; give a number for each layer and head")
        object.__setattr__(self, "ends", tuple(float(end) for end in ends))
        object.__setattr__(self, "values", tuple(ranges))

    @property
    def layers(self) -> int:
        return len(self.values[0])

    @property
    def heads(self) -> int:
        return len(self.values[0][0])

    @property
    def uniform(self) -> bool:
        """Whether all heads of a layer have one density."""
        return all(len(set(heads)) == 1 for layers in self.values for heads in layers)

    def at(self, progress: float | None) -> tuple[tuple[float, ...], ...]:
        """Densities [layers][heads] after this share of the steps, 0..1; None, unknown: those of the last range."""
        if progress is None:
            return self.values[-1]
        index = next((i for i, end in enumerate(self.ends) if progress < end), len(self.ends) - 1)
        return self.values[index]


@dataclass(frozen=True)
class Sparse:
    """Settings of sparse self-attention, which changes the output; see `optimize.sparse.plain` for what it computes.

    density
        The share of key blocks that every query block keeps, at every step, layer and head.
    densities
        The same for each range of steps, layer and head, in place of `density`; a calibration finds them.
    dense_steps
        The share of the steps, at the front, whose attention stays dense: the scene is decided there.
    dense_layers
        Layers whose attention stays dense, counted from 0.
    tail
        Whether blocks that are left out count as one key and one value each, their means; off: not at all.
    query_block
        Tokens of a query block, 64 or 128, all of which attend to the same key blocks. None: 128, which runs faster, or
        64 for a kernel that has no others.
    kernel
        `fa4` (FlashAttention-4), `cudnn`, `cudnn-fp8` (8 bits inside), `sol` (comfy-kitchen), `triton`, `plain`
        (PyTorch), or `auto`: the fastest exact one that runs.
    """

    density: float = 0.15
    densities: Densities | None = None
    dense_steps: float = 0.2
    dense_layers: tuple[int, ...] = ()
    tail: bool = True
    query_block: Literal[64, 128] | None = None
    kernel: SparseKernel = "auto"

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_share("sparse density", self.density)
        _check_share("sparse dense_steps", self.dense_steps)
        if self.densities is not None:
            check_type("sparse densities", self.densities, Densities, "a Densities object or None")
        layers = self.dense_layers
        if not isinstance(layers, list | tuple) or not all(is_whole(n) and n >= 0 for n in layers):
            raise LongCatError(f"sparse dense_layers is {layers}; it must be a list of layers, counted from 0")
        object.__setattr__(self, "dense_layers", tuple(sorted({int(n) for n in layers})))
        check_type("sparse tail", self.tail, bool, "True or False")
        block = self.query_block
        if block is not None and (not is_whole(block) or block not in QUERY_BLOCKS):
            raise LongCatError(f"sparse query_block is {block}; choose one of 64, 128")
        check_choice("sparse kernel", self.kernel, SPARSE_KERNELS)
        if self.kernel in NARROW and block not in (None, BLOCK):
            raise LongCatError(f"sparse kernel {self.kernel!r} has query blocks of 64 tokens; leave query_block out")
        if self.kernel == "sol" and self.densities is not None and not self.densities.uniform:
            raise LongCatError("sparse kernel 'sol' takes one density for all heads of a layer; choose another kernel")

    @property
    def queries(self) -> int:
        """Tokens of the query block in force."""
        return self.query_block or (BLOCK if self.kernel in NARROW else max(QUERY_BLOCKS))

    def check(self, layers: int, heads: int) -> None:
        """Raise LongCatError unless the settings fit a network with this many layers and heads."""
        if self.dense_layers and self.dense_layers[-1] >= layers:
            raise LongCatError(
                f"sparse dense_layers has layer {self.dense_layers[-1]}; the network has layers 0 to {layers - 1}"
            )
        found = self.densities
        if found is not None and (found.layers, found.heads) != (layers, heads):
            raise LongCatError(
                f"densities are for {found.layers} layers of {found.heads} heads, and the network has {layers} of "
                f"{heads}; calibrate it by itself"
            )

    def in_words(self) -> str:
        """What decides the output, in words: the density or a mark of the densities, and what differs from defaults."""
        found = f"density {self.density:g}"
        if self.densities is not None:
            found = f"densities {sha256(repr(self.densities).encode()).hexdigest()[:8]}"
        for name in ("dense_steps", "dense_layers", "tail", "query_block"):
            value, default = getattr(self, name), getattr(Sparse, name)
            if value != default:
                found += f", {name.replace('_', ' ')} {value}"
        return found if self.kernel not in EIGHT_BIT else f"{found}, {self.kernel}"

    def dense_at(self, progress: float | None) -> bool:
        """Whether all attention is dense after this share of the steps; None, unknown: only if every step is dense."""
        return self.dense_steps >= 1 if progress is None else progress < self.dense_steps

    def of(self, progress: float | None, layer: int, heads: int) -> tuple[float, ...]:
        """The density of each of a layer's heads after this share of the steps; 1: every block."""
        if layer in self.dense_layers:
            return (1.0,) * heads
        return (self.density,) * heads if self.densities is None else self.densities.at(progress)[layer]


def kept(densities: tuple[float, ...], blocks: int) -> list[int]:
    """How many of `blocks` key blocks each head keeps, at least one where there is one."""
    return [min(blocks, max(1, round(density * blocks))) for density in densities]
