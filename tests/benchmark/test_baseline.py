"""The baseline computes what the network computes, on the network's own weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_core.benchmark.baseline import BaselineTransformer
from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")


@pytest.fixture(scope="module")
def data():
    return read_tensors(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def model():
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG)


def run(model, data, out, timestep="t", mask=True):
    baseline = BaselineTransformer(model)
    baseline.prepare(data["x"].shape)
    with torch.no_grad():
        given = baseline(data["x"], data[timestep], data["context"], data["mask"] if mask else None)
    return ((given - data[out]).abs().max() / data[out].std()).item()


def test_the_public_models_output(model, data):
    assert run(model, data, "t2v.out") < 2e-5
    assert run(model, data, "nomask.out", mask=False) < 2e-5


def test_text_without_its_padding(data):
    model = load_transformer(GOLDEN / "dit.safetensors", config=replace(CONFIG, text_tokens_zero_pad=False))
    assert run(model, data, "skip_padding.out") < 2e-5


def test_timesteps_per_frame_as_the_network_takes_them(model, data):
    timestep = torch.linspace(100, 900, data["x"].shape[2]).expand(data["x"].shape[0], -1)
    baseline = BaselineTransformer(model)
    baseline.prepare(data["x"].shape)
    with torch.no_grad():
        given = baseline(data["x"], timestep, data["context"], data["mask"])
        expected = model(data["x"], timestep, data["context"], data["mask"])
    assert ((given - expected).abs().max() / expected.std()).item() < 2e-5


def test_no_weight_is_copied(model):
    baseline = BaselineTransformer(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(p.untyped_storage().data_ptr() in own for p in baseline.parameters() if p.numel())
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in baseline.parameters()) == count
    assert not any(p.requires_grad for p in baseline.parameters())


def test_layers_that_are_not_plain_are_refused(model):
    other = load_transformer(GOLDEN / "dit.safetensors", config=CONFIG)
    layer = other.blocks[0].attn.qkv
    other.blocks[0].attn.qkv = type("Quantized", (torch.nn.Linear,), {})(layer.in_features, layer.out_features)
    with pytest.raises(LongCatError, match="before the model is quantized"):
        BaselineTransformer(other)
