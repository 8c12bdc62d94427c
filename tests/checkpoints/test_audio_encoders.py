"""Audio encoders in every form that is in use, recognized by their tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.audio_encoders import open_audio_encoder
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.audio import audio_encoder_of, load_audio_encoder

DATA = Path(__file__).parents[1] / "data" / "golden-avatar"
FOLDERS = {"wav2vec2": DATA / "v1_0", "whisper": DATA / "v1_5"}
POSITIONS = "encoder.pos_conv_embed.conv"
WAVE = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
State = dict[str, Tensor]


def golden(kind: str) -> tuple[State, Path]:
    return read_tensors(FOLDERS[kind] / f"{kind}.safetensors"), FOLDERS[kind] / f"{kind}_config.json"


def embed(path: Path, config: Path | None = None) -> Tensor:
    return load_audio_encoder(path, opened=open_audio_encoder(path, config)).embed(WAVE)


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): tensor for name, tensor in state.items()}


def parametrized(state: State) -> State:
    return renamed(
        state,
        lambda name: name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ),
    )


def multiplied(state: State) -> State:
    conv = torch.nn.Conv1d(24, 24, 16, groups=2)
    conv = torch.nn.utils.parametrizations.weight_norm(conv, dim=2)
    conv.load_state_dict(
        {name.rpartition("conv.")[2]: t for name, t in parametrized(state).items() if POSITIONS in name}
    )
    rest = {name: tensor for name, tensor in state.items() if "weight_" not in name}
    return rest | {f"{POSITIONS}.weight": conv.weight.detach()}


def in_training(state: State) -> State:
    return renamed(state, "wav2vec2.{}".format) | {
        "wav2vec2.masked_spec_embed": torch.zeros(24),
        "quantizer.codevectors": torch.zeros(1, 4, 4),
    }


def whole(state: State) -> State:
    decoder = {"embed_positions.weight": torch.zeros(8, 16), "layers.0.fc1.weight": torch.zeros(32, 16)}
    return renamed(state, "model.{}".format) | renamed(decoder, "model.decoder.{}".format)


FORMS: dict[str, tuple[str, Callable[[State], State]]] = {
    "wav2vec2 parametrized": ("wav2vec2", parametrized),
    "wav2vec2 multiplied": ("wav2vec2", multiplied),
    "wav2vec2 in training": ("wav2vec2", in_training),
    "Whisper whole": ("whisper", whole),
    "Whisper without a prefix": ("whisper", lambda state: renamed(state, lambda name: name.removeprefix("encoder."))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_encoder(tmp_path: Path, form: str) -> None:
    kind, change = FORMS[form]
    state, config = golden(kind)
    write_safetensors(tmp_path / "a.safetensors", change(state))
    wanted = embed(FOLDERS[kind] / f"{kind}.safetensors", config)
    assert torch.allclose(embed(tmp_path / "a.safetensors", config), wanted, atol=1e-5)


def test_tensors_that_another_program_has_read() -> None:
    state, config = golden("whisper")
    # ComfyUI's encoder has its filters among the tensors.
    state |= {"feature_extractor.mel_spectrogram.spectrogram.window": torch.zeros(400)}
    opened = open_audio_encoder(Path("the audio encoder"), config, state)
    found = load_audio_encoder("", opened=opened)
    assert torch.equal(found.embed(WAVE), embed(FOLDERS["whisper"] / "whisper.safetensors", config))
    with pytest.raises(CheckpointError, match="the audio encoder has 16 channels, which 0 heads do not divide"):
        audio_encoder_of(state)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_in_the_official_root_and_half_the_precision(tmp_path: Path, kind: str) -> None:
    state, config = golden(kind)
    folder = tmp_path / {"wav2vec2": "chinese-wav2vec2-base", "whisper": "whisper-large-v3"}[kind]
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    write_safetensors(folder / "model.safetensors", {name: tensor.half() for name, tensor in state.items()})
    # Another precision of the same model.
    write_safetensors(folder / "model.fp32-00001-of-00002.safetensors", {"a": torch.zeros(1)})
    wanted = embed(FOLDERS[kind] / f"{kind}.safetensors", config)
    found = load_audio_encoder(tmp_path)
    assert next(found.model.parameters()).dtype == torch.float32
    assert torch.allclose(found.embed(WAVE), wanted, atol=0.02)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_single_file_may_say_its_heads(tmp_path: Path, kind: str) -> None:
    state, config = golden(kind)
    write_safetensors(tmp_path / "a.safetensors", state, {"config": json.dumps({"heads": 2})})
    assert torch.equal(embed(tmp_path / "a.safetensors"), embed(FOLDERS[kind] / f"{kind}.safetensors", config))
    write_safetensors(tmp_path / "b.safetensors", state)
    with pytest.raises(CheckpointError, match=r"channels, which 0 heads do not divide; give its folder"):
        open_audio_encoder(tmp_path / "b.safetensors")


def test_other_models_are_refused(tmp_path: Path) -> None:
    speech, config = golden("wav2vec2")
    hears, other = golden("whisper")
    # The large wav2vec2 has norms and biases in all convolutions.
    large = speech | {"feature_extractor.conv_layers.0.conv.bias": torch.zeros(20)}
    short = {name: tensor for name, tensor in hears.items() if ".layers.31." not in name}
    for state, beside, sentence in (
        ({"blocks.0.weight": torch.zeros(1)}, None, "is not a wav2vec2 or Whisper encoder"),
        (speech, other, r"describes a whisper of 16 channels, the files beside it hold a wav2vec2 of 24"),
        (large, config, "holds unknown tensors: feature_extractor.conv_layers.0.conv.bias"),
        (short, other, "has 31 layers, which do not make four equal groups"),
        ({n: t for n, t in hears.items() if n != "encoder.layers.3.fc2.bias"}, other, "lacks: layers.3.fc2.bias"),
        (hears | {"encoder.conv1.bias": torch.full((16,), torch.nan)}, other, "has NaN or infinite values"),
        (
            {n: t for n, t in speech.items() if "weight_g" not in n},
            config,
            r"lacks: encoder.pos_conv_embed.conv.weight",
        ),
    ):
        write_safetensors(tmp_path / "a.safetensors", state)
        with pytest.raises(CheckpointError, match=sentence):
            embed(tmp_path / "a.safetensors", beside)
    with pytest.raises(CheckpointError, match=r"no \.safetensors file; give chinese-wav2vec2-base"):
        (tmp_path / "empty").mkdir()
        open_audio_encoder(tmp_path / "empty")
