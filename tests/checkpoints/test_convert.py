"""`longcat convert`: any form to any other, measured, checked, whole or not at all."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from longcat_core.checkpoints import convert, reader
from longcat_core.checkpoints.load import load_transformer, open_checkpoint
from longcat_core.cli import main as cli
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files import places
from longcat_core.files.safetensors_io import (
    read_header,
    read_metadata,
    read_tensors,
    stream_safetensors,
    write_safetensors,
)
from longcat_core.generate.options import CHECKPOINT_FORMS
from longcat_core.optimize.quantization import Policy

from .written_forms import State, comfyui, fastvideo, fp8_scaled, is_matrix, write_gguf

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DIT = GOLDEN / "dit.safetensors"


@pytest.fixture(scope="module")
def golden() -> State:
    return read_tensors(DIT)


def output(path: Path) -> torch.Tensor:
    given = read_tensors(GOLDEN / "forward.safetensors")
    with torch.no_grad():
        return load_transformer(path)(given["x"], given["t"], given["context"], given["mask"])


def error(path: Path, name: str = "t2v.out") -> float:
    wanted = read_tensors(GOLDEN / "forward.safetensors")[name]
    return ((output(path) - wanted).abs().max() / wanted.std()).item()


def test_the_command_offers_every_form():
    assert set(CHECKPOINT_FORMS) == set(convert.TARGETS)


@pytest.fixture(params=["fp32", "comfyui fp8", "fastvideo bf16", "int8", "gguf"])
def source(request, tmp_path: Path, golden: State) -> Path:
    path = tmp_path / "source"
    if request.param == "gguf":
        write_gguf(
            path, comfyui(golden), {name: "Q8_0" for name, tensor in comfyui(golden).items() if is_matrix(name, tensor)}
        )
        return path
    states = {
        "fp32": lambda: golden,
        "comfyui fp8": lambda: fp8_scaled(comfyui(golden)),
        "fastvideo bf16": lambda: {name: tensor.bfloat16() for name, tensor in fastvideo(golden).items()},
        "int8": lambda: read_tensors(GOLDEN / "dit_int8.safetensors"),
    }
    write_safetensors(path, states[request.param]())
    return path


@pytest.mark.parametrize("to", convert.TARGETS)
def test_any_form_to_any_other(tmp_path, source, to):
    """The written network is the source's, rounded as the form says; the reported errors are the true ones."""
    path = tmp_path / "new.safetensors"
    errors = {row.name: row for row in convert.convert(source, path, to)}
    wanted, given = load_transformer(source).state_dict(), load_transformer(path).state_dict()
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == open_checkpoint(source).config
    for name, value in wanted.items():
        module, _, kind = name.rpartition(".")
        small = kind == "weight" and convert.TARGETS[to].small(module)
        if not small:
            assert torch.equal(given[name], value.bfloat16().float())
        for part, one, other in zip(
            checkpoint.parts(name),
            value.chunk(len(checkpoint.parts(name))),
            given[name].chunk(len(checkpoint.parts(name))),
            strict=True,
        ):
            off = (other - one).float()
            assert errors[part.name].relative == pytest.approx((off.norm() / one.norm()).item(), abs=1e-9)
            assert errors[part.name].largest == pytest.approx((off.abs().max() / one.abs().max()).item(), abs=1e-9)
            assert errors[part.name].relative < (0.03 if to == "comfyui-fp8" else 0.01 if small else 0.003)
    assert len(errors) == sum(len(checkpoint.parts(name)) for name in wanted)


def test_bf16_numbers_do_not_change(tmp_path, golden):
    source = tmp_path / "source.safetensors"
    write_safetensors(source, {name: tensor.bfloat16() for name, tensor in comfyui(golden).items()})
    errors = convert.convert(source, tmp_path / "new.safetensors", "bf16")
    assert not any(row.largest for row in errors)
    new = read_tensors(tmp_path / "new.safetensors")
    assert new.keys() == golden.keys()
    assert all(torch.equal(new[name], tensor.bfloat16()) for name, tensor in golden.items())


def test_fp8_numbers_do_not_change(tmp_path, golden):
    source = tmp_path / "source.safetensors"
    write_safetensors(source, fp8_scaled(comfyui(golden)))
    errors = convert.convert(source, tmp_path / "new.safetensors", "comfyui-fp8")
    assert max(row.relative for row in errors) < 1e-6


def test_int8_equals_the_official_file(tmp_path):
    """Numbers and scales of the golden file, which the public code made; the rest is bf16 here, fp32 there."""
    convert.convert(DIT, tmp_path / "new.safetensors", "int8")
    new, wanted = read_tensors(tmp_path / "new.safetensors"), read_tensors(GOLDEN / "dit_int8.safetensors")
    assert new.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dtype == torch.int8:
            assert new[name].dtype == torch.int8 and torch.equal(new[name], tensor)
        elif name.endswith("_scale"):
            assert torch.equal(new[name], tensor)
        else:
            assert torch.equal(new[name], tensor.bfloat16())
    assert error(tmp_path / "new.safetensors", "int8.out") < 0.02


def test_comfyui_fp8_is_what_comfyui_takes(tmp_path, golden):
    path = tmp_path / "new.safetensors"
    convert.convert(DIT, path, "comfyui-fp8")
    header = read_header(path)
    assert header.pop("scaled_fp8") == (torch.float8_e4m3fn, (2,))
    scales = {name for name in header if name.endswith(".scale_weight")}
    assert header.keys() - scales == comfyui(golden).keys()
    for name, tensor in comfyui(golden).items():
        small = is_matrix(name, tensor)
        assert header[name] == (torch.float8_e4m3fn if small else torch.bfloat16, tuple(tensor.shape))
        assert (name.replace("weight", "scale_weight") in scales) == small
    assert all(header[name] == (torch.float32, ()) for name in scales)
    assert 1e-3 < error(path) < 0.1
    # As 8-bit layers they keep what was written.
    assert load_transformer(path, fp8=Policy()).blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("flag", [True, False])
def test_settings_without_a_shape_are_kept(tmp_path, golden, flag):
    source = tmp_path / "source.safetensors"
    write_safetensors(source, golden, {"config": json.dumps({"text_tokens_zero_pad": flag})})
    convert.convert(source, tmp_path / "new.safetensors", "int8")
    assert open_checkpoint(tmp_path / "new.safetensors").config.text_tokens_zero_pad is flag
    assert json.loads(read_metadata(tmp_path / "new.safetensors")["config"])["hidden_size"] == 64


# Whole or not at all


def refused(said: str, *arguments: str | Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().rpartition("\r")[2]
    assert said in message and message.count("\n") == 0, message


def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, golden, capsys, monkeypatch):
    source = tmp_path / "source.safetensors"
    write_safetensors(source, golden)
    folder = tmp_path / "dit"
    folder.mkdir()
    write_safetensors(folder / "shard.safetensors", golden)
    notes = folder / "notes.json"
    notes.write_text("{}", encoding="utf-8")
    (tmp_path / "link.json").symlink_to(notes)
    os.link(notes, tmp_path / "hard.json")
    (tmp_path / "to-notes.safetensors").symlink_to(notes)
    (tmp_path / "to-new.json").symlink_to("new.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "taken.safetensors").mkdir()
    (tmp_path / "folder.json").mkdir()
    os.link(source, tmp_path / "link.safetensors")
    bad = tmp_path / "nan.safetensors"
    write_safetensors(bad, golden | {"blocks.0.ffn.w2.weight": golden["blocks.0.ffn.w2.weight"] * float("nan")})
    new, before = tmp_path / "new.safetensors", source.read_bytes()
    for said, *arguments in (
        ("--to", source, new),
        ("invalid choice", source, new, "--to", "int4"),
        ("does not exist; give", tmp_path / "nothing", new, "--to", "int8"),
        ("is the source itself; give another name", source, source, "--to", "int8"),
        ("is the source itself", source, tmp_path / "link.safetensors", "--to", "int8"),
        ("is the source itself", tmp_path / ".." / tmp_path.name / source.name, source, "--to", "int8"),
        ("among the source's own files", folder, folder / "new.safetensors", "--to", "int8"),
        ("new.bin' must end in .safetensors", source, tmp_path / "new.bin", "--to", "int8"),
        ("is a folder", source, tmp_path / "taken.safetensors", "--to", "int8"),
        ("does not exist; create it", source, tmp_path / "no" / "new.safetensors", "--to", "int8"),
        ("has NaN or infinite values in blocks.0.ffn.down.weight", bad, new, "--to", "bf16"),
        ("holds LoRA, not", GOLDEN / "lora.safetensors", new, "--to", "bf16"),
        ("report.txt' must end in .json", source, new, "--to", "bf16", "--report", tmp_path / "report.txt"),
        ("folder.json is a folder", source, new, "--to", "bf16", "--report", tmp_path / "folder.json"),
        ("/proc/r.json: /proc takes no file of that name", source, new, "--to", "bf16", "--report", "/proc/r.json"),
        ("in the source's folder", folder, new, "--to", "bf16", "--report", notes),
        ("does not exist; create it", source, new, "--to", "bf16", "--report", tmp_path / "no" / "r.json"),
        ("is notes.json in the source's folder", folder, new, "--to", "bf16", "--report", tmp_path / "link.json"),
        ("is notes.json in the source's folder", folder, new, "--to", "bf16", "--report", tmp_path / "hard.json"),
        ("is notes.json in the source's folder", folder, tmp_path / "to-notes.safetensors", "--to", "bf16"),
        ("is config.json in the source's folder", source, new, "--to", "bf16", "--report", tmp_path / "config.json"),
        ("leads to", source, new, "--to", "bf16", "--report", tmp_path / "to-new.json"),
    ):
        files = sorted(tmp_path.rglob("*"))
        refused(said, *arguments, capsys=capsys)
        assert sorted(tmp_path.rglob("*")) == files
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: usage(10, 5, 200_000))
    refused("MB free; make room", source, new, "--to", "int8", capsys=capsys)
    assert source.read_bytes() == before


def test_a_faulty_disk_is_noticed_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"old")
    rows = reader.Reader.rows

    def faulty(self: reader.Reader, name: str, *args: int) -> torch.Tensor:
        tensor = rows(self, name, *args)
        return tensor * 2 if name == "blocks.1.ffn.w2.weight_scale" else tensor

    monkeypatch.setattr(reader.Reader, "rows", faulty)
    with pytest.raises(CheckpointError, match=r"reads back with another blocks\.1\.ffn\.w2\.weight_scale than was"):
        convert.convert(DIT, path, "int8")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_the_command_reports(tmp_path, capsys):
    path, report = tmp_path / "new.safetensors", tmp_path / "errors.json"
    report.write_text("old")
    old = tmp_path / "old.json"
    os.link(report, old)
    assert cli.main(["convert", str(DIT), str(path), "--to", "comfyui-fp8", "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert old.read_text() == "old", "the report is renamed into its place, not written over"
    line = next(line for line in out.splitlines() if line.startswith("ffn.gate_up.weight"))
    assert "e-02" in line and ".ffn.w" in line
    assert out.splitlines()[-1].startswith(f"{path}: comfyui-fp8, ")
    rows = json.loads(report.read_text())
    assert {"name", "kind", "relative", "largest"} == rows[0].keys()
    assert len(rows) == len(comfyui(read_tensors(DIT)))
    assert cli.main(["convert", str(path), str(tmp_path / "again.safetensors"), "--to", "comfyui-fp8"]) == 0


# Files written piece by piece


def test_streamed_files_are_ordinary_ones(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3).bfloat16().T,
        "c": torch.tensor(2.5),
        "d": torch.ones(7).to(torch.float8_e4m3fn),
        "e": torch.empty(0, 4),
    }
    header = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    stream_safetensors(path, header, reversed(tensors.items()), {"note": "größe"})
    assert read_header(path) == header and read_metadata(path) == {"note": "größe"}
    back = read_tensors(path)
    assert all(torch.equal(back[name].float(), tensor.float()) for name, tensor in tensors.items())
    for wrong in ({"a": tensors["a"]}, tensors | {"a": tensors["a"].int()}):
        with pytest.raises(ValueError, match="announced"):
            stream_safetensors(tmp_path / "y.safetensors", header, iter(wrong.items()))
    with pytest.raises(LongCatError, match=r"could not be written \(No such file"):
        stream_safetensors(tmp_path / "no" / "y.safetensors", header, tensors.items())

    def check(written: Path) -> None:
        assert read_header(written) == header
        raise LongCatError("no")

    with pytest.raises(LongCatError, match="no"):
        stream_safetensors(path, header, tensors.items(), check=check)
    assert os.listdir(tmp_path) == ["x.safetensors"] and read_metadata(path)
