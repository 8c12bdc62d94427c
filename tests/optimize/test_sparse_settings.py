"""Settings of sparse attention: what they refuse, and the density of each step, layer and head."""

from __future__ import annotations

import numpy as np
import pytest

from longcat_core.errors import LongCatError
from longcat_core.optimize.sparse.settings import SPARSE_KERNELS, Densities, Sparse, kept

# Two ranges of steps, three layers, two heads.
TWO_RANGES = Densities((0.5, 1.0), (((0.1, 0.2),) * 3, ((0.3, 1.0), (0.4, 0.0), (0.5, 0.6))))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"density": 1.5}, "density is 1.5; it must lie between 0 and 1"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": "0.5"}, "density is 0.5"),
        ({"density": True}, "density is True"),
        ({"dense_steps": -0.1}, "dense_steps is -0.1"),
        ({"densities": [[0.5]]}, "densities cannot be of type list"),
        ({"dense_layers": 3}, "dense_layers is 3"),
        ({"dense_layers": (0, -1)}, "counted from 0"),
        ({"tail": 1}, "tail cannot be of type int"),
        ({"query_block": 96}, "query_block is 96; choose one of 64, 128"),
        ({"query_block": 128, "kernel": "cudnn-fp8"}, "'cudnn-fp8' has query blocks of 64 tokens"),
        ({"kernel": "sol", "densities": Densities((1.0,), (((0.1, 0.2),),))}, "'sol' takes one density for all heads"),
        ({"kernel": "flash"}, "kernel is 'flash'; choose one of auto, fa4"),
    ],
)
def test_settings_refuse(settings, sentence):
    with pytest.raises(LongCatError, match=sentence):
        Sparse(**settings)


def test_query_blocks_are_as_large_as_the_kernel_takes():
    found = {kernel: Sparse(kernel=kernel).queries for kernel in SPARSE_KERNELS}
    assert found == {kernel: 64 if kernel in ("cudnn", "cudnn-fp8", "sol") else 128 for kernel in SPARSE_KERNELS}
    assert Sparse(query_block=64).queries == 64


@pytest.mark.parametrize(
    ("ends", "values", "sentence"),
    [
        ((1.0,), (((0.5, 1.01),),), "a density is 1.01"),
        ((0.5,), (((0.5,),),), "the last must be 1"),
        ((0.5, 0.5, 1.0), (((0.5,),),) * 3, "must ascend"),
        ((0.5, 1.0), (((0.5,),),), "1 ranges of steps and 2 ends"),
        ((1.0,), (((0.5, 0.5), (0.5,)),), "lists of different lengths"),
        ((0.5, 1.0), (((0.5,),), ((0.5,), (0.5,))), "lists of different lengths"),
        ((1.0,), ((),), "list of layers"),
        ((1.0,), (0.5,), "list of layers"),
        ((), (), "ends of densities must be a list"),
        ((1.5,), (((0.5,),),), "an end of densities is 1.5"),
    ],
)
def test_densities_refuse(ends, values, sentence):
    with pytest.raises(LongCatError, match=sentence):
        Densities(ends, values)


def test_lists_and_numbers_of_numpy_become_plain():
    densities = Densities([1], [[[1, np.float32(0.5)]]])
    assert densities == Densities((1.0,), (((1.0, 0.5),),))
    assert hash(densities) == hash(Densities((1.0,), (((1.0, 0.5),),)))
    settings = Sparse(np.float64(0.5), dense_layers=[4, 2, 2])
    assert type(settings.density) is float and settings.dense_layers == (2, 4)


def test_settings_must_fit_the_network():
    Sparse(densities=TWO_RANGES, dense_layers=(2,)).check(3, 2)
    for layers, heads in ((2, 2), (3, 4)):
        with pytest.raises(LongCatError, match=f"the network has {layers} of {heads}; calibrate"):
            Sparse(densities=TWO_RANGES).check(layers, heads)
    with pytest.raises(LongCatError, match="has layer 3; the network has layers 0 to 2"):
        Sparse(dense_layers=(0, 3)).check(3, 2)


def test_density_of_a_step_and_layer():
    settings = Sparse(densities=TWO_RANGES, dense_layers=(1,))
    assert [settings.of(progress, 0, 2) for progress in (0.0, 0.49, 0.5, 0.99)] == [(0.1, 0.2)] * 2 + [(0.3, 1.0)] * 2
    # Of an unknown share of the steps the last range decides.
    assert settings.of(None, 2, 2) == (0.5, 0.6)
    assert settings.of(0.7, 1, 2) == (1.0, 1.0)
    assert Sparse(0.25).of(None, 5, 3) == (0.25,) * 3


def test_first_steps_are_dense():
    assert [Sparse(dense_steps=0.2).dense_at(p) for p in (None, 0.0, 0.19, 0.2, 0.9)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert not Sparse(dense_steps=0.0).dense_at(0.0)
    assert Sparse(dense_steps=1.0).dense_at(0.999) and Sparse(dense_steps=1.0).dense_at(None)


def test_kept_blocks_of_a_head():
    assert kept((0.0, 0.15, 0.5, 1.0), 100) == [1, 15, 50, 100]
    assert kept((0.0, 1.0), 0) == [0, 0]
