"""`longcat verify` on the golden data of LongCat-Video-Avatar 1.0 and 1.5."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.measure.golden import Case, Golden, check
from longcat_core.measure.verify import run_verify
from longcat_core.measure.verify_avatar import SCHEDULES, avatar_cases

DATA = Path(__file__).parents[1] / "data" / "golden-avatar"
GOLDEN = {"1.0": Golden(DATA / "v1_0"), "1.5": Golden(DATA / "v1_5")}
CASES = [(version, case) for version, golden in GOLDEN.items() for case in avatar_cases(golden)]
INPUTS = (".wave", ".noise")


@pytest.mark.parametrize(("version", "case"), CASES, ids=[f"{version} {case.name}" for version, case in CASES])
def test_golden_case(version, case):
    row = check(case, GOLDEN[version])
    assert row.verdict == "pass" and row.error <= case.tolerance == (1e-4 if ".mel" in case.name else 2e-5)


@pytest.mark.parametrize("version", GOLDEN)
def test_every_tensor_of_the_folder_is_a_case_or_an_input(version):
    folder, names = DATA / f"v{version.replace('.', '_')}", {case.name for case in avatar_cases(GOLDEN[version])}
    assert GOLDEN[version].version == version
    outputs = {k.removesuffix(".out") for k in read_tensors(folder / "forward.safetensors") if k.endswith(".out")}
    maps = {k for k in read_tensors(folder / "forward.safetensors") if k.endswith((".maps", ".masks"))}
    assert outputs - {"kv.cond_out"} | maps <= names and "kv.cond_out" in names
    latents = {k.removesuffix(".latents") for k in read_tensors(folder / "generate.safetensors") if "latents" in k}
    assert {f"generate {k}" for k in latents if not k.endswith(".tail")} <= names
    assert {f"vae encode {k.removesuffix('.tail')}" for k in latents if k.endswith(".tail")} <= names
    stored = {k.rsplit(".", 1)[0] for k in read_tensors(folder / "schedule.safetensors")}
    assert {f"{k}.sigmas" for k in stored} <= names and set(SCHEDULES) <= {k.split(".")[0] for k in stored}
    heard = {k for k in read_tensors(folder / "audio.safetensors") if not k.endswith(INPUTS)}
    assert heard and heard <= names


def test_wrong_output_fails_and_the_others_pass(tmp_path, capsys):
    folder = Path(shutil.copytree(DATA / "v1_5", tmp_path / "golden-avatar" / "v1_5"))
    shutil.copytree(DATA.parent / "golden", tmp_path / "golden")
    file = folder / "forward.safetensors"
    tensors = read_tensors(file)
    tensors["duo.ai2v.maps"] = tensors["duo.ai2v.maps"] + 1e-4
    del tensors["avc.skip.out"]
    write_safetensors(file, tensors)
    (folder / "schedule.safetensors").unlink()
    assert run_verify(folder) == 1
    table = capsys.readouterr().out.splitlines()
    failed = {line[:46].strip() for line in table[:-1] if "fail" in line.split("  ")[-1]}
    schedules = {case.name for case in avatar_cases(Golden(folder)) if case.name.endswith((".timesteps", ".sigmas"))}
    assert failed == {"avc.skip", "duo.ai2v.maps"} | schedules


def test_a_video_autoencoder_that_is_missing_is_named(tmp_path):
    golden = Golden(Path(shutil.copytree(DATA / "v1_0", tmp_path / "own" / "v1_0")))
    case = next(case for case in avatar_cases(golden) if case.name == "vae encode image")
    assert isinstance(case, Case) and "vae.safetensors" in check(case, golden).verdict
