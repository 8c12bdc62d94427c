"""LongCat Refine with LongCat Sampler is what the headless refinement does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

SIZE = {"resolution": "custom", "width": 96, "height": 64}
SAMPLING = {"steps": 12, "guidance": 1.0, "mode": "refine"}


@pytest.fixture
def headless_sample(comfy, monkeypatch):
    """Latents of every piece that headless refining samples."""
    pipeline = comfy.core("generate.pipeline")
    seen, sample = [], pipeline.sample

    def spy(*args, **kwargs):
        seen.append(sample(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(pipeline, "sample", spy)
    return seen


class ComfyVAE:
    """ComfyUI's VAE under the interface of the core's, so that only the refinement is compared."""

    def __init__(self, vae, model) -> None:
        self.vae, self.model, self.device = vae, model, vae.device

    def encode(self, video):
        latents = self.vae.encode((video[0].permute(1, 2, 3, 0) + 1) / 2)
        return self.model.model.process_latent_in(latents)

    def decode_in_any_case(self, latents, in_tiles):
        images = self.vae.decode(self.model.model.process_latent_out(latents))
        yield images if images.ndim == 5 else images[None]


@pytest.mark.parametrize("doubled", [True, False])
def test_equals_the_headless_refinement(comfy, model, vae, network, prompts, frames, sample, headless_sample, doubled):
    refining = comfy.core("generate.refine")
    video = frames[:9]
    pixels = video.mul(255).round().to(torch.uint8).numpy()
    context = prompts["positive"][0][0]

    class Text:
        def encode(self, texts):
            return context, (context != 0).any(-1)

    pipeline = comfy.core("generate.pipeline").Pipeline(
        network, ComfyVAE(vae, model), Text(), comfy.core("generate.request").NANO
    )
    request = refining.RefineRequest("x", seed=4, doubled=doubled, height=64, width=96, steps=12, piece=5, overlap=1)
    with torch.no_grad():
        expected = list(refining.refine(pipeline, pixels, request))
    before, got = None, []
    for number, (start, stop) in enumerate(refining.pieces(9, 5, 1)):
        more = {} if before is None else {"refined_before": before, "overlap": 1}
        latent, skip, length, fps = comfy(
            "LongCatRefine", vae=vae, video=video[start:stop], double_rate=doubled, **SIZE, **more
        )
        out = sample(latent, seed=4 + number, **SAMPLING)
        normalized = model.model.process_latent_in(out)
        assert (normalized - headless_sample[number]).abs().max() <= 1e-3
        images = comfy("VAEDecode", samples={"samples": out}, vae=vae)
        images = images[0] if images.ndim == 5 else images
        assert fps == (30 if doubled else 15) and skip + length <= len(images)
        before = images[: skip + length]
        got.append(images[skip : skip + length].mul(255).round().to(torch.uint8).numpy())
    assert [part.shape for part in got] == [part.shape for part in expected]
    differences = np.abs(np.concatenate(got).astype(int) - np.concatenate(expected).astype(int))
    assert differences.mean() < 0.1


def test_720p_is_the_default_and_nothing_is_lost(comfy, vae):
    image = torch.rand(1, 48, 80, 3)
    latent, skip, length, _ = comfy(
        "LongCatRefine", vae=vae, video=image, double_rate=False, resolution="twice the size"
    )
    assert latent["samples"].shape == (1, 16, 4, 12, 20) and (skip, length) == (0, 1)
    assert "noise_mask" not in latent


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"refined_before": torch.rand(3, 64, 96, 3), "overlap": 2}, "at least 4 of 64x96"),
        ({"refined_before": torch.rand(9, 32, 96, 3), "overlap": 2}, "9 frames of 32x96"),
        ({"refined_before": torch.rand(90, 64, 96, 3), "overlap": 5}, "fewer than the 10"),
        ({"width": 100}, "width 100"),
    ],
)
def test_bad_input(comfy, vae, frames, more, said):
    with pytest.raises(comfy.core("errors").LongCatError, match=said):
        comfy("LongCatRefine", vae=vae, video=frames[:5], double_rate=True, **SIZE | more)
