"""LongCat Sparse Attention: what headless sparse attention does, under LongCat Sampler and stock samplers."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from .golden_avatar import Avatar

STEPS = 4
# 5x16x16 tokens.
SIZE = {"width": 256, "height": 256, "length": 17}


@pytest.fixture
def latent(comfy):
    return comfy("EmptyHunyuanLatentVideo", **SIZE, batch_size=1)


@pytest.fixture
def seen(comfy, monkeypatch):
    """Share of the steps that is done, of every sparse pass."""
    passes, found = comfy.core("optimize.sparse.passes"), []
    make = passes.SparsePass

    def recorded(settings, backend, dense, progress, *more):
        found.append(progress)
        return make(settings, backend, dense, progress, *more)

    monkeypatch.setattr(passes, "SparsePass", recorded)
    return found


def test_equals_headless_sparse_attention(comfy, model, network, prompts, latent, sample, seen):
    sparse = comfy("LongCatSparseAttention", model=model, density=0.3, dense_steps=0.25)
    got = model.model.process_latent_in(sample(latent, model=sparse, steps=STEPS, seed=2))
    assert seen == [0.25, 0.5, 0.75]
    sampling, schedules = comfy.core("sampling.sampler"), comfy.core("sampling.schedules")
    noise = comfy.core("sampling.conditioning").seeded_noise(tuple(got.shape), 2)
    texts = [prompts[name][0][0] for name in ("positive", "negative")]
    masks = [(text != 0).any(-1) for text in texts]

    def expected(settings):
        network.sparse = settings
        try:
            return sampling.sample(
                network, noise, schedules.make_schedule("base", STEPS), texts[0], masks[0],
                negative_context=texts[1], negative_mask=masks[1],
            )  # fmt: skip
        finally:
            network.sparse = None

    same = expected(comfy.core("optimize.sparse.settings").Sparse(0.3, dense_steps=0.25))
    assert (got - same).abs().max() <= 1e-3 < (got - expected(None)).abs().max()


def test_stock_samplers_know_how_far_they_are(comfy, model, prompts, latent, seen):
    inputs = {"latent_image": latent, **prompts, "seed": 1, "steps": STEPS, "cfg": 4.0, "denoise": 1.0}
    inputs |= {"sampler_name": "euler", "scheduler": "simple"}
    dense = comfy("KSampler", model=model, **inputs)["samples"]
    assert not seen
    sparse = comfy("LongCatSparseAttention", model=model, density=0.3, dense_steps=0.5)
    some = comfy("KSampler", model=sparse, **inputs)["samples"]
    assert seen == [0.5, 0.75]
    assert not torch.equal(some, dense) and some.isfinite().all()
    assert torch.equal(comfy("KSampler", model=model, **inputs)["samples"], dense), (
        "the MODEL that came in is as it was"
    )
    off = comfy("LongCatSparseAttention", model=sparse, density=1.0)
    assert torch.equal(comfy("KSampler", model=off, **inputs)["samples"], dense)
    assert len(seen) == 2


def test_an_override_takes_its_place_and_says_so(comfy, model, latent, sample, seen, caplog):
    calls = []

    def override(attend, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block_index"])
        return attend(*args, **kwargs)

    sparse = comfy("LongCatSparseAttention", model=model, density=0.3, dense_steps=0.0)
    sparse.model_options["transformer_options"]["optimized_attention_override"] = override
    with caplog.at_level(logging.WARNING):
        sample(latent, model=sparse, steps=2)
    assert calls == [*range(model.model.diffusion_model.config.depth)] * 2 and not seen
    assert caplog.text.count("an attention override set by another node takes the place of sparse attention") == 1


def test_a_calibration_is_read_and_checked(comfy, model):
    import folder_paths

    error = comfy.core("errors").LongCatError
    calibration = comfy.core("generate.calibration")
    config = model.model.diffusion_model.config
    densities = (tuple((0.1 + layer / 100,) * config.num_heads for layer in range(config.depth)),)
    found = calibration.Calibration(
        calibration.FORMAT, calibration.VERSION, calibration.calibrated(model.model.diffusion_model),
        calibration.Settings(0.1, "base", 10, 4.0, 33, 64, 96, 0, 0.3, 64, True, 0), (1.0,), densities,
        (calibration.Point(0.1, 0.05, 0.2, 0.9),), (0.5,) * config.depth, 1.5, None, "2026-11-28", {}, ("a",),
    )  # fmt: skip
    root = calibration.Path(folder_paths.get_output_directory())
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"sparse-{os.getpid()}.json"
    calibration.write_calibration(path, found)
    try:
        for name in (path.name, str(path)):
            out = comfy("LongCatSparseAttention", model=model, density=0.5, calibration=name, kernel="plain")
            settings = out.model_options["transformer_options"]["longcat_sparse"]
            assert settings == found.sparse(kernel="plain") and settings.dense_steps == 0.3
        marks = tuple(tuple(mark + 1 for mark in row) for row in found.model.marks)
        other = calibration.replace(found, model=calibration.replace(found.model, marks=marks))
        calibration.write_calibration(path, other)
        with pytest.raises(error, match="is of other weights than this model's"):
            comfy("LongCatSparseAttention", model=model, density=0.5, calibration=path.name)
    finally:
        path.unlink()
    with pytest.raises(error, match="is not inside ComfyUI's output folder"):
        comfy("LongCatSparseAttention", model=model, density=0.5, calibration="../elsewhere.json")


def test_people_see_that_it_is_on(comfy, model, latent, sample, caplog):
    # A setting is logged once in a process, so no other test may use this one.
    words = "density 0.31, dense steps 0.45, kernel plain"
    sparse = comfy("LongCatSparseAttention", model=model, density=0.31, dense_steps=0.45)
    switched, report = comfy("LongCatOptimizations", model=sparse)
    assert f"attention: auto (where attention is not sparse)\nsparse attention: {words}\n" in report
    assert "sparse" not in comfy("LongCatOptimizations", model=model)[1]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            sample(latent, model=switched, steps=1)
    assert caplog.text.count(f"sparse attention: {words}") == 1
    _, report = comfy("LongCatBenchmark", model=model, model_b=sparse, latent_image=latent, steps=1, guidance=1.0)
    (row,) = (line for line in report.splitlines() if line.startswith("| attention |"))
    assert row.endswith(f"; sparse: {words} |")


def test_an_avatar_with_a_reference(comfy, seen):
    """The reference frame, with an overlap, is in front of 7x16x16 tokens; the core computes the same."""
    avatar, core = Avatar(comfy, "v1_5"), comfy.core
    avatar.shape = 1, 16, 7, 32, 32
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 16, 2, 32, 32, generator=generator)
    shown = avatar.model.model.process_latent_out(torch.randn(1, 16, 1, 32, 32, generator=generator))
    reference = core("sampling.avatar").ReferenceFrame(shown, core("model.kv_cache").Reference(4, 1))
    sparse = comfy("LongCatSparseAttention", model=avatar.model, density=0.1, dense_steps=0.5)
    audio = avatar.audio()
    given = avatar.conds(audio, reference), avatar.latent(clean)
    got = avatar.sampled(*given, sparse, steps=2)
    assert seen == [0.5]
    avatar.network.sparse = core("optimize.sparse.settings").Sparse(0.1, dense_steps=0.5)
    same = avatar.expected(audio, clean, reference, steps=2)
    # Attention of random weights hardly depends on what it attends to.
    assert (got - same).abs().max() <= 2e-5 < (got - avatar.sampled(*given, steps=2)).abs().max()
