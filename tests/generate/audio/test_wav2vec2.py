"""The convolutions of wav2vec2 on a part of the sound at a time; its numbers are among the golden cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longcat_core.generate.audio import wav2vec2
from longcat_core.generate.audio.wav2vec2 import FIELD, HOP, Wav2Vec2, Wav2Vec2Config


@pytest.mark.parametrize("samples", [FIELD, FIELD + HOP - 1, FIELD + 8 * HOP, 20000])
def test_parts_equal_the_whole(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wav2vec2, "PIECE", 3)
    torch.manual_seed(0)
    model = Wav2Vec2(Wav2Vec2Config(8, 1, 1, 8, (6,) * 7, 4, 2)).feature_extractor
    with torch.no_grad():
        wave = torch.randn(1, samples) + 0.5
        model.conv_layers[0].layer_norm.weight.uniform_(0.5, 2)
        model.conv_layers[0].layer_norm.bias.uniform_(-1, 1)
        wanted = wave[:, None]
        for layer in model.conv_layers:
            wanted = F.gelu(layer.layer_norm(layer.conv(wanted)))
        assert torch.allclose(model(wave), wanted, atol=1e-5)
