"""A seeded minute of the fuzzer: a file is read, or refused in a sentence. `make fuzz` runs it for an hour."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# As many as take a few seconds each. Fixed, so that every run tries the same files.
CASES = {
    "transformer": 60,
    "shards": 100,
    "gguf": 60,
    "lora": 60,
    "vae": 15,
    "text_encoder": 15,
    "text_folder": 25,
    "prompts": 100,
    "picture": 60,
    "video": 25,
    "sound": 40,
    "audio_encoder": 25,
    "training": 100,
    "segments": 60,
    "calibration": 200,
}


def fuzz(*args: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.fuzz", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize("reader", CASES)
def test_mutated_files_are_read_or_refused(reader: str) -> None:
    run = fuzz("--reader", reader, "--cases", str(CASES[reader]), "--seed", "0")
    # A crash ends without findings; the last line on stderr names its case.
    assert run.returncode == 0, run.stdout + run.stderr[-500:]
    assert run.stdout == "nothing found (seed 0)\n"


def test_every_reader_is_fuzzed_and_the_fuzzer_finds_faults(tmp_path: Path) -> None:
    from .support.fuzz import READERS, Reader, fault_of

    assert READERS.keys() == CASES.keys()

    def fails(folder: Path) -> None:
        raise KeyError(folder)

    def grows(folder: Path) -> None:
        bytearray(500_000_000)[::4096] = b"1" * 122071

    def read_as_other_numbers(folder: Path) -> None:
        raise AssertionError("other numbers")

    for read, said in ((fails, "KeyError at"), (grows, "MB for"), (read_as_other_numbers, "other numbers")):
        assert re.search(said, fault_of(Reader(lambda folder: None, (), read), tmp_path))
