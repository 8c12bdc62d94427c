"""CFG-zero: golden numbers, and what its definition implies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.files.safetensors_io import read_tensors
from longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT, cfg_zero, cfg_zero_scale

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def halves(batch: int = 2) -> Tensor:
    """A conditional and an unconditional output [2, B, C, T, H, W], not too far apart."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, batch, 16, 3, 4, 6, generator=generator)
    both[1] = 0.5 * both[0] + 0.8 * both[1]
    return both


def test_golden():
    data = read_tensors(GOLDEN / "generate.safetensors")
    out = cfg_zero(data["cfg.cond"], data["cfg.uncond"], 4.0)
    assert ((out - data["cfg.out"]).abs().max() / data["cfg.out"].std()).item() <= 2e-6
    scale = cfg_zero_scale(data["cfg.cond"], data["cfg.uncond"])
    torch.testing.assert_close(scale.flatten(), data["cfg.scale"].flatten(), rtol=1e-5, atol=0)


def test_the_rest_is_orthogonal_to_the_unconditional_half():
    cond, uncond = halves()
    scale = cfg_zero_scale(cond, uncond)
    assert scale.shape == (2, 1, 1, 1, 1)
    rest = cond - scale * uncond
    cosine = (rest * uncond).flatten(1).sum(1) / rest.flatten(1).norm(dim=1) / uncond.flatten(1).norm(dim=1)
    assert cosine.abs().max() < 1e-5


@pytest.mark.parametrize("factor", [0.1, 3.0, -2.0])
def test_size_and_sign_of_the_unconditional_half_do_not_matter(factor):
    cond, uncond = halves()
    torch.testing.assert_close(cfg_zero(cond, factor * uncond, 4.0), cfg_zero(cond, uncond, 4.0), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.1, 3.0, -1.0])
def test_both_halves_scaled_scale_the_result(factor):
    cond, uncond = halves()
    given = cfg_zero(factor * cond, factor * uncond, 4.0)
    torch.testing.assert_close(given, factor * cfg_zero(cond, uncond, 4.0), atol=1e-4, rtol=1e-5)


def test_scale_one_is_the_conditional_half_and_zero_the_scaled_other():
    cond, uncond = halves()
    torch.testing.assert_close(cfg_zero(cond, uncond, 1.0), cond)
    torch.testing.assert_close(cfg_zero(cond, uncond, 0.0), cfg_zero_scale(cond, uncond) * uncond)


def test_equal_halves_are_left_alone():
    cond, _ = halves()
    torch.testing.assert_close(cfg_zero(cond, cond, 7.0), cond, atol=1e-5, rtol=1e-5)


def test_samples_do_not_mix():
    cond, uncond = halves(3)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(cfg_zero(cond, uncond, 4.0)[row], cfg_zero(cond[row], uncond[row], 4.0))


def test_all_frames_count():
    cond, uncond = halves()
    assert (cfg_zero_scale(cond, uncond) - cfg_zero_scale(cond[:, :, 1:], uncond[:, :, 1:])).abs().min() > 1e-3


def test_a_zero_unconditional_half_gives_numbers():
    cond, uncond = halves()
    torch.testing.assert_close(cfg_zero(cond, 0 * uncond, 4.0), 4 * cond)


def test_the_default_negative_prompt_is_the_published_one():
    words = DEFAULT_NEGATIVE_PROMPT.split(", ")
    assert (words[0], words[-1], len(words)) == ("Bright tones", "walking backwards", 28)
