"""`longcat verify`: passes on the golden folder, and cannot pass on a damaged one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.measure.golden import Golden, check, half_units
from longcat_core.measure.verify import SCHEDULES, cases, run_verify

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = [case.name for case in cases(2)]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(GOLDEN)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def change(file: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = read_tensors(file)
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    write_safetensors(file, tensors)


@pytest.mark.parametrize("case", list(cases(2)), ids=lambda case: case.name)
def test_golden_case(case, golden):
    row = check(case, golden)
    assert row.verdict == "pass"
    assert row.error <= case.tolerance == (2e-2 if case.name.startswith("bsa") else 2e-5)


def test_every_tensor_of_the_folder_is_a_case_or_an_input():
    outputs = {k for k in read_tensors(GOLDEN / "forward.safetensors") if k.endswith(".out")}
    assert {f"{name}.out" for name in NAMES} >= outputs - {"kv.cond_out"}
    latents = {k for k in read_tensors(GOLDEN / "generate.safetensors") if k.endswith(".latents")}
    assert {f"generate {k.removesuffix('.latents')}" for k in latents} <= set(NAMES)
    stored = {k.rsplit(".", 1)[0] for k in read_tensors(GOLDEN / "schedule.safetensors")}
    assert stored == {f"{name}.{steps}" for name, counts in SCHEDULES.items() for steps in counts}


def test_table_and_exit_code(capsys):
    assert run_verify(GOLDEN) == 0
    table = capsys.readouterr().out
    assert all(f"{name} " in table for name in NAMES)
    assert table.splitlines()[-1] == f"{len(NAMES)} passed, 0 failed"


def test_wrong_output_fails(copy, capsys):
    file = copy / "forward.safetensors"
    wrong = read_tensors(file)["i2v.out"] + 1e-3
    change(file, "i2v.out", wrong)
    assert run_verify(copy) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("fail")]
    assert [line.split()[0] for line in lines] == ["i2v"]


def test_nan_fails(copy):
    file = copy / "generate.safetensors"
    change(file, "cfg.out", torch.full_like(read_tensors(file)["cfg.out"], float("nan")))
    case = next(c for c in cases(2) if c.name == "cfg.out")
    assert check(case, Golden(copy)).verdict == "fail"


def test_missing_tensor_and_missing_file_fail(copy, capsys):
    change(copy / "forward.safetensors", "vc_cached.out", None)
    (copy / "bsa.safetensors").unlink()
    assert run_verify(copy) == 1
    table = capsys.readouterr().out
    assert "fail: no tensor vc_cached.out in the folder" in table
    lines = [line for line in table.splitlines() if line.startswith("bsa")]
    assert len(lines) >= 4 and all("fail" in line for line in lines)


def test_one_wrong_block_of_attention_fails(copy):
    """One of 64 tokens in one head is not what it should be, by what another choice of keys would change."""
    file = copy / "bsa.safetensors"
    wrong = read_tensors(file)["a.o"].clone()
    wrong[0, 0, 5] += wrong.float().std() / 10
    change(file, "a.o", wrong)
    case = next(c for c in cases(2) if c.name == "bsa a")
    row = check(case, Golden(copy))
    assert row.verdict == "fail" and row.error > 0.05


def test_rounding_is_no_error():
    numbers = torch.tensor([0.0, 1.0, 1.5, -3.0, 0.1, 300.0])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = numbers.to(dtype)
        units = half_units(rounded)
        up = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=dtype)).float() - rounded.float()
        assert torch.equal(units[1:], up[1:].abs() / 2)
        assert ((numbers - rounded.float()).abs() <= units).all()
        assert units[0] == 0
    assert not half_units(numbers).any() and not half_units(torch.tensor([5])).any()


def test_wrong_shape_fails(copy):
    file = copy / "schedule.safetensors"
    change(file, "base.12.sigmas", read_tensors(file)["base.12.sigmas"][:-1].clone())
    case = next(c for c in cases(2) if c.name == "base.12.sigmas")
    assert check(case, Golden(copy)).verdict == "fail: shape [13] instead of [12]"


def test_no_golden_folder(tmp_path, capsys):
    with pytest.raises(LongCatError, match="not a folder"):
        run_verify(tmp_path / "nothing")
    with pytest.raises(LongCatError, match="config"):
        run_verify(tmp_path)
    assert capsys.readouterr().out == ""
