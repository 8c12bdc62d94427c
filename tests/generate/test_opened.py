"""A model's files are opened once, however many parts of a run ask for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longcat_core.checkpoints import lora as lora_files
from longcat_core.cli import main as cli
from longcat_core.errors import LongCatError
from longcat_core.files import safetensors_io
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.opened import open_model
from longcat_core.generate.paths import NANO_MODEL, NANO_TEXT_ENCODER, NANO_VAE, ModelPaths
from longcat_core.generate.pipeline import Pipeline


@pytest.fixture
def paths(tmp_path: Path) -> ModelPaths:
    """The nano model, its transformer in a folder of two shards."""
    tensors, folder = read_tensors(NANO_MODEL), tmp_path / "dit"
    folder.mkdir()
    for number in range(2):
        shard = {name: tensors[name] for name in list(tensors)[number::2]}
        write_safetensors(folder / f"shard-{number}.safetensors", shard)
    return ModelPaths(folder, NANO_VAE, NANO_TEXT_ENCODER)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    rows, columns = read_tensors(NANO_MODEL)["blocks.0.attn.proj.weight"].shape
    name, file = "diffusion_model.blocks.0.attn.proj", tmp_path / "lora.safetensors"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, columns), f"{name}.lora_B.weight": torch.randn(rows, 2)}
    write_safetensors(file, tensors)
    return file


@pytest.fixture
def parsed(paths: ModelPaths, lora: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Header parses from here on, by name of the file."""
    counted: Counter[str] = Counter()
    parse = safetensors_io._layout

    def counting(path: Path) -> tuple:
        counted[path.name] += 1
        return parse(path)

    monkeypatch.setattr(safetensors_io, "_layout", counting)
    return counted


@pytest.fixture
def read(lora: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """LoRA files that are read from here on."""
    files: list[Path] = []
    open_file: Callable = lora_files.SafetensorsFile
    monkeypatch.setattr(lora_files, "SafetensorsFile", lambda path: files.append(Path(path)) or open_file(path))
    return files


FILES = ("shard-0.safetensors", "shard-1.safetensors", NANO_VAE.name, NANO_TEXT_ENCODER.name, "lora.safetensors")


@pytest.mark.parametrize("mode", ["merged", "runtime"])
def test_a_pipeline_parses_each_header_once(paths, lora, parsed, read, mode):
    loaded = Pipeline.load(paths, lora=[(lora, 0.5)], lora_mode=mode)
    assert parsed == dict.fromkeys(FILES, 1) and read == [lora]
    loaded.set_loras()
    assert parsed == dict.fromkeys(FILES, 1) and read == [lora]


def test_a_command_parses_each_header_once(paths, lora, parsed, read, tmp_path):
    where = ["--model", paths.model, "--vae", paths.vae, "--text-encoder", paths.text_encoder, "--lora", lora]
    how = ["--size", "16x32", "--frames", 5, "--steps", 1, "--guidance", 1, "--device", "cpu"]
    arguments = ["generate", "a red circle", *where, *how, "-o", tmp_path / "a.mkv"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    # Beside these there are files of the text cache.
    assert {name: parsed[name] for name in FILES} == dict.fromkeys(FILES, 1) and read == [lora]


def test_an_opened_model_loads_like_its_files(paths, lora):
    opened = open_model(paths, [(lora, 0.5)])
    one, other = Pipeline.load(opened), Pipeline.load(paths, lora=[(lora, 0.5)])
    state = other.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())
    with pytest.raises(LongCatError, match="has its LoRAs already; give them to open_model"):
        Pipeline.load(opened, lora=lora)


def test_what_needs_no_weights_is_refused_at_once(paths, lora, tmp_path):
    for arguments, said in (
        ((ModelPaths(tmp_path / "none", NANO_VAE, NANO_TEXT_ENCODER),), "model .*none does not exist"),
        ((paths, tmp_path / "none.safetensors"), "none.safetensors does not exist"),
        ((paths, lora, "magic"), "'magic'"),
        (("dit",), "paths cannot be of type str"),
    ):
        with pytest.raises(LongCatError, match=said):
            open_model(*arguments)


def test_an_official_folder_names_all_three_parts(tmp_path):
    for name in ("dit", "vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    found = ModelPaths.of(tmp_path)
    assert found == ModelPaths(tmp_path, tmp_path / "vae", tmp_path) and not found.is_nano
    assert ModelPaths.of(tmp_path, vae="v.safetensors").vae == Path("v.safetensors")
    found.check()
    assert ModelPaths.of().is_nano and ModelPaths().defaults.frames == 33
