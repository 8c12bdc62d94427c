"""LongCat Block-Sparse Attention on the MODEL: what it changes, under which samplers, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch


def error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.std())


def test_it_acts_on_the_model_that_comes_out(comfy, model, sample, empty):
    plain = sample(empty)
    sparse = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5)
    out = sample(empty, sparse)
    assert out.isfinite().all() and error(plain, out) > 1e-2
    assert torch.equal(plain, sample(empty)), "the model itself stays as it is"
    none = comfy("LongCatBlockSparseAttention", model=sparse, sparsity=0.0)
    assert torch.equal(plain, sample(empty, none))


def test_nothing_left_out_is_full_attention(comfy, model, sample, empty, clip_latent, monkeypatch):
    """Boxes that overhang the grid, given frames with and without their cache."""
    whole = comfy("LongCatBlockSparseAttention", model=model, sparsity=1.0, cdf_threshold=1.0, chunk="4x4x8")
    for latent, more in ((empty, {}), (clip_latent, {}), (clip_latent, {"kv_cache": "off"})):
        assert error(sample(latent, **more), sample(latent, whole, **more)) <= 1e-3


def test_stock_sampler(comfy, model, prompts, empty):
    sparse = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5)
    settings = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    outs = [comfy("KSampler", model=m, latent_image=empty, **settings, **prompts)["samples"] for m in (model, sparse)]
    assert error(*outs) > 1e-2 and outs[1].isfinite().all()


def test_with_other_switches(comfy, model, sample, empty):
    sparse = comfy("LongCatBlockSparseAttention", model=model, sparsity=0.5)
    switched, _ = comfy("LongCatOptimizations", model=sparse, fused_qkv=False, text_mode="padded")
    assert error(sample(empty, sparse), sample(empty, switched)) <= 1e-3


def test_other_models_are_refused(comfy, model):
    other = model.clone()
    other.model = torch.nn.Linear(1, 1)
    with pytest.raises(comfy.core("errors").LongCatError, match="LongCat Block-Sparse Attention got a Linear"):
        comfy("LongCatBlockSparseAttention", model=other)
