"""What encoders do besides the golden cases of `longcat verify`."""

from __future__ import annotations

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.generate.audio.encoder import NAMES
from longcat_core.model.config import AudioConfig

from .test_voices import encoder, noise


@pytest.fixture(scope="module", params=NAMES)
def encodes(request: pytest.FixtureRequest):
    return encoder(request.param)


def test_what_a_version_needs(encodes) -> None:
    wanted = {"1.0": (4, 24, 16, 32, 2), "1.5": (5, 16, 25, 25, 1)}[encodes.version]
    assert (encodes.groups, encodes.channels, encodes.fps, encodes.rate, encodes.stride) == wanted
    assert encodes.nbytes == sum(p.nbytes for p in encodes.model.parameters())


@pytest.mark.parametrize(("samples", "frames"), [(18560, {"1.0": 37, "1.5": 28}), (16000, {"1.0": 32, "1.5": 25})])
def test_a_frame_is_lost_where_the_product_falls_under_a_whole_number(encodes, samples: int, frames) -> None:
    wave = noise(2.0).samples[0].double()[:samples]
    assert len(encodes.embed(wave)) == frames[encodes.version]


def test_the_noise_floor_depends_on_the_seed_alone(encodes) -> None:
    wave, kept = noise(0.5).samples[0].double(), torch.random.get_rng_state()
    first, again, other = (encodes.embed(wave, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and torch.equal(torch.random.get_rng_state(), kept)
    # Version 1.5 hears none.
    assert torch.equal(first, other) == (encodes.version == "1.5")


def test_the_encoder_of_another_version_is_refused(encodes) -> None:
    encodes.check(AudioConfig(groups=encodes.groups, channels=encodes.channels))
    for config, sentence in (
        (AudioConfig(), r"the model takes 5 x 1280; give the audio encoder of its version, whisper-large-v3"),
        (AudioConfig(groups=12, channels=768), r"takes 12 x 768; give the audio encoder of its version, chinese-wav2"),
        (None, "does not hear audio; give LongCat-Video-Avatar"),
    ):
        with pytest.raises(LongCatError, match=sentence):
            encodes.check(config)


def test_embeddings_that_are_not_finite_are_refused(encodes) -> None:
    wave = noise(0.5).samples[0].double()
    wave[100] = torch.nan
    with pytest.raises(LongCatError, match="embeddings that are not finite"):
        encodes.embed(wave)


def test_a_sound_without_a_frame_is_refused(encodes) -> None:
    with pytest.raises(LongCatError, match="too short for an embedding"):
        encodes.embed(torch.zeros(400, dtype=torch.float64))
