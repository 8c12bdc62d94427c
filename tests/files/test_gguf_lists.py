"""Long lists of a GGUF file's metadata are those that the gguf package reads, in a fraction of its time and memory."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from longcat_core.errors import CheckpointError
from longcat_core.files.tensor_files import GgufFile

KINDS = gguf.GGUFValueType
LISTS = {
    "strings": ([f"word {i} \u5b57" for i in range(200)], KINDS.STRING),
    "few": (["a", ""], KINDS.STRING),
    "int8": ([i - 100 for i in range(200)], KINDS.INT8),
    "uint64": ([2**64 - 1 - i for i in range(200)], KINDS.UINT64),
    "float32": ([i / 4 for i in range(200)], KINDS.FLOAT32),
    "bool": ([i % 3 == 0 for i in range(200)], KINDS.BOOL),
}


def written(path: Path, lists: dict) -> Path:
    writer = gguf.GGUFWriter(str(path), "t5")
    for name, (values, kind) in lists.items():
        writer.add_key_value(name, values, KINDS.ARRAY, sub_type=kind)
    writer.add_bool("last", False)
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lists_equal_the_packages(tmp_path):
    path = written(tmp_path / "x.gguf", LISTS)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for name, (values, _) in LISTS.items():
        assert ours.values(name) == theirs.fields[name].contents() == values
    assert ours.values("none") == ours.values("general.architecture") == ours.values("last") == []
    assert ours.flag("last", True) is False and ours.flag("none", True) and ours.flag("strings", True)
    assert ours.rows("a").flatten().tolist() == list(range(12))


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = written(tmp_path / "x.gguf", {"strings": LISTS["strings"]})
    path.write_bytes(path.read_bytes().replace(b"word 77", b"\xff\xff\xff\xff\xff\xff\xff"))
    with pytest.raises(CheckpointError, match=r"x.gguf has a corrupt strings"):
        GgufFile(path).values("strings")
