"""Attention to text against its twin, in Triton's interpreter where there is no GPU (in fp16: it rounds bf16 down)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longcat_core.optimize.kernels import text_attention as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 3, 32


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def case(tokens: int, keys: int, samples: int = 2) -> tuple[Tensor, ...]:
    """q, the norm's weight, and k and v as slices of one projection."""
    q = randn(2, tokens, HEADS, DIM) * 3
    kv = randn(samples, keys, 2 * HEADS * DIM, seed=1)
    k, v = (x.unflatten(-1, (HEADS, DIM)) for x in kv.chunk(2, dim=-1))
    return q, 1 + randn(DIM, seed=2) / 4, k * 2, v


def folded(keys: int, samples: int = 2) -> Tensor:
    """The last key stands for many; of the first sample's, some before it for none."""
    bias = torch.zeros(samples, 1, 1, keys, device=DEVICE)
    bias[..., -1] = math.log(400)
    bias[0, ..., keys // 3 : -1] = -math.inf
    return bias


@pytest.mark.parametrize("keys", [1, 63, 64, 128, 130])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_definition(keys, biased):
    q, weight, k, v = case(150, keys)
    bias = folded(keys) if biased else None
    wanted = kernels.plain_text_attention(q, weight, k, v, bias)
    found = kernels.text_attention(q, weight, k, v, bias)
    assert found.data_ptr() == q.data_ptr(), "written in place"
    torch.testing.assert_close(found.float(), wanted.flatten(2), rtol=4e-3, atol=2e-3)


@pytest.mark.parametrize("keys", [1, 63, 130])
@pytest.mark.parametrize("samples", [1, 2])
def test_in_8_bits_under_one_scale(keys, samples):
    q, weight, k, v = case(150, keys, samples)
    v = v * 3 * torch.arange(1, samples + 1).view(-1, 1, 1, 1).to(v)
    bias = folded(keys, samples)
    wanted = kernels.plain_text_attention(q, weight, *(x.expand(2, -1, -1, -1) for x in (k, v)), bias).flatten(2)
    found = kernels.text_attention(q.clone(), weight, k, v, bias, fp8=True)
    assert found.values.shape == wanted.shape and found.scales.shape == (2, 150, 1)
    assert found.values.dtype == torch.float8_e4m3fn
    back = found.values.float() * found.scales
    # Four bits of each number, whatever its size; but for what the interpreter makes of numbers that round up to a
    # power of two (see test_kernels).
    right = found.values.float().abs().log2() % 1 != 0 if DEVICE.type == "cpu" else slice(None)
    torch.testing.assert_close(back[right], wanted[right], rtol=0.07, atol=float(wanted.abs().max()) / 2000)
    for sample in range(2):
        own = v[min(sample, samples - 1)].float().abs().max() / 448
        torch.testing.assert_close(found.scales[sample], own.expand(150, 1))


def test_one_text_for_all_videos():
    q, weight, k, v = case(20, 7, samples=1)
    bias = folded(7, samples=1)
    wanted = kernels.plain_text_attention(q, weight, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), bias).flatten(2)
    torch.testing.assert_close(kernels.text_attention(q, weight, k, v, bias).float(), wanted, rtol=4e-3, atol=2e-3)


def test_keys_that_count_nothing_may_fill_the_first_tile():
    q, weight, k, v = case(5, 140)
    bias = torch.zeros(2, 1, 1, 140, device=DEVICE)
    bias[..., :136] = -math.inf
    wanted = kernels.plain_text_attention(q, weight, k[:, 136:], v[:, 136:], None).flatten(2)
    torch.testing.assert_close(kernels.text_attention(q, weight, k, v, bias).float(), wanted, rtol=4e-3, atol=2e-3)


def test_what_it_refuses():
    assert kernels.refuses(128, 9) == kernels.refuses(64, kernels.LONGEST) == ""
    assert "not 96" in kernels.refuses(96, 9) and "these are 512" in kernels.refuses(128, 512)


def test_it_stands_in_a_graph_as_an_operator():
    q, weight, k, v = case(20, 7)
    bias = folded(7)
    compiled = torch.compile(kernels.text_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, weight, k, v, bias), kernels.text_attention(q.clone(), weight, k, v, bias))
    for given in (bias, None):
        checks = ("test_schema", "test_faketensor")
        for each in (kernels._text_attention_op, kernels._text_attention_fp8_op):
            torch.library.opcheck(each.operator, (q, weight, k, v, given), test_utils=checks)
