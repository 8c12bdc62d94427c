"""Calibrations: the file, what is refused, and which weights one belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_core.checkpoints.load import load_transformer, open_checkpoint
from longcat_core.checkpoints.lora import merge_lora
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.calibration import (
    Calibration,
    check_fits,
    notes,
    read_calibration,
    write_calibration,
)
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.model.config import ModelConfig
from longcat_core.model.transformer import LongCatTransformer
from longcat_core.optimize.quantization import Policy

from ..checkpoints.written_forms import comfyui, fp8_scaled, is_matrix, write_gguf
from ..support.calibrations import calibration_of
from ..support.tiny import GOLDEN, tiny_config

DIT = GOLDEN / "dit.safetensors"


@pytest.fixture
def found() -> Calibration:
    return calibration_of(open_checkpoint(DIT))


def test_a_file_holds_the_whole_calibration_in_short_lines(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    write_calibration(path, found)
    assert read_calibration(path) == found
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) < 400
    assert list(tmp_path.iterdir()) == [path]


def test_it_becomes_settings_of_sparse_attention(found: Calibration) -> None:
    changed = replace(found, settings=replace(found.settings, dense_steps=0.3, query_block=128, tail=False))
    sparse = changed.sparse(kernel="plain")
    assert (sparse.dense_steps, sparse.query_block, sparse.tail, sparse.kernel) == (0.3, 128, False, "plain")
    assert sparse.of(0.39, 1, found.model.heads) == found.densities[0][1]
    assert sparse.of(0.4, 0, found.model.heads) == found.densities[1][0]
    sparse.check(found.model.depth, found.model.heads)


def found_config() -> ModelConfig:
    return open_checkpoint(DIT).config


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="another"), "is a file of 'another'; give a file that longcat calibrate wrote"),
        (lambda c: c.update(version=2), "is a calibration of version 2 and this reads version 1"),
        (lambda c: c.pop("format"), "is not a calibration (format: Field required); give a file"),
        (lambda c: c.pop("ends"), "is not a whole calibration (ends: Field required)"),
        (lambda c: c["densities"][1][0].__setitem__(0, 1.5), "a density is 1.5; it must lie between 0 and 1"),
        (lambda c: c["densities"][1][0].__setitem__(0, -0.1), "a density is -0.1"),
        (lambda c: c["densities"][1][0].__setitem__(0, "0.1"), "densities.1.0.0: Input should be a valid number"),
        (lambda c: c["densities"][0].pop(), "different lengths"),
        (lambda c: c["densities"][0][0].pop(), "different lengths"),
        (lambda c: [layers.pop() for layers in c["densities"]], "1 layers of 2 heads with densities, but 2 of 2"),
        (lambda c: c["densities"].pop(), "1 ranges of steps and 2 ends"),
        (lambda c: c.update(ends=[0.4, 0.9]), "must ascend and the last must be 1"),
        (lambda c: c.update(ends=[1.0, 1.0]), "must ascend"),
        (lambda c: c.update(ends=[0.4, 1.5]), "an end of densities is 1.5"),
        (lambda c: c.update(ends=[]), "ends of densities must be a list"),
        (lambda c: c["settings"].update(dense_steps=3), "a share of 3 dense steps"),
        (lambda c: c["settings"].update(query_block=96), "a query block of 96 tokens"),
        (lambda c: c["settings"].update(schedule="slow"), "a schedule other than base, distilled, enhance_hf"),
        (lambda c: c.update(expected_speed_up=-3.0), "time or speed-up that is not above 0"),
        (lambda c: c["mass"].pop(), "1 layers with a share of the softmax, but 2 in all"),
        (lambda c: c.update(head_mass=[[0.5]]), "shares of the softmax of other layers and heads than 2 of 2"),
        (lambda c: c.update(best_mass=[[0.5, 0.5], [0.5]]), "shares of the softmax of other layers and heads"),
        (lambda c: c["model"]["marks"].pop(), "the marks of the model are not whole"),
        (lambda c: c["model"]["marks"][0].append(1.0), "the marks of the model are not whole"),
    ],
)
def test_other_content_is_refused_in_one_sentence(
    found: Calibration, tmp_path: Path, change: Change, said: str
) -> None:
    path = tmp_path / "found.json"
    write_calibration(path, found)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(LongCatError) as refused:
        read_calibration(path)
    assert said in str(refused.value) and str(refused.value).startswith(f"{path} is ")


@pytest.mark.parametrize("text", ["", "prompt", "[]", "{}", '{"format": 3, "version": 1}', "NaN", "[" * 10_000])
def test_what_is_not_a_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LongCatError, match=r"is not a calibration \(.+\); give a file that longcat calibrate wrote$"):
        read_calibration(path)
    with pytest.raises(LongCatError, match="does not exist"):
        read_calibration(tmp_path / "missing.json")
    with pytest.raises(LongCatError, match="is a folder"):
        read_calibration(tmp_path)


def test_it_belongs_to_weights_in_every_form(found: Calibration) -> None:
    check_fits(found, load_transformer(DIT))
    for dtype in (torch.bfloat16, torch.float16):
        check_fits(found, load_transformer(DIT, dtype=dtype))
    check_fits(found, load_transformer(DIT, dtype=torch.bfloat16, fp8=Policy()))
    check_fits(found, open_checkpoint(GOLDEN / "dit_int8.safetensors"))
    adapted = load_transformer(DIT)
    merge_lora(adapted, GOLDEN / "lora.safetensors")
    check_fits(found, adapted)


def test_it_belongs_to_the_same_weights_in_other_files(found: Calibration, tmp_path: Path) -> None:
    state = read_tensors(DIT)
    write_safetensors(tmp_path / "fp8.safetensors", fp8_scaled(comfyui(state)))
    matrices = {name: "Q8_0" for name, tensor in state.items() if is_matrix(name, tensor)}
    write_gguf(tmp_path / "q8.gguf", state, matrices)
    for name in ("fp8.safetensors", "q8.gguf"):
        check_fits(found, open_checkpoint(tmp_path / name, found_config()))


def test_it_is_refused_for_other_weights(found: Calibration) -> None:
    with pytest.raises(
        LongCatError, match=r"^mine\.json is of a model with 2 layers of 2 heads of 32 channels and this one has 6"
    ):
        check_fits(found, open_checkpoint(NANO_MODEL), "mine.json")
    torch.manual_seed(1)
    other = LongCatTransformer(tiny_config(depth=found.model.depth, num_heads=found.model.heads))
    with pytest.raises(LongCatError, match="is of other weights than this model's; run longcat calibrate"):
        check_fits(found, other)
    tuned = load_transformer(DIT)
    # Of a training that moves every number by a twentieth.
    for name, parameter in tuned.named_parameters():
        parameter.mul_(1.05 if "attn" in name else 1)
    with pytest.raises(LongCatError, match="is of other weights"):
        check_fits(found, tuned)


def test_notes_say_what_the_calibration_did_not_see(found: Calibration) -> None:
    assert notes(found, "c.json", schedule="base", guidance=4) == []
    assert notes(found, "c.json", schedule="enhance_hf", guidance=3) == []
    assert notes(found, "c.json", schedule="distilled", guidance=1) == [
        "c.json was measured with the base schedule, and this run's is distilled"
    ]
    assert notes(found, "c.json", schedule="base", guidance=1) == [
        "c.json was measured with guidance 4, and this run has no guidance"
    ]
