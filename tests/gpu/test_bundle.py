"""The parts that carry ComfyUI to a machine without a network."""

from __future__ import annotations

import tarfile

import pytest

from . import bundle


@pytest.fixture
def parts(tmp_path):
    """A folder of parts of 700 bytes; inside is one file, site/module.py."""
    (tmp_path / "root" / "site").mkdir(parents=True)
    (tmp_path / "root" / "site" / "module.py").write_bytes(bytes(range(256)) * 20)
    whole = tmp_path / "whole.tar.xz"
    with tarfile.open(whole, "w:xz", preset=0) as archive:
        archive.add(tmp_path / "root", arcname=".")
    folder = tmp_path / "parts"
    folder.mkdir()
    assert len(bundle.split(whole, folder, 100)) > 2
    return folder


def test_parts_give_the_files_back(parts, tmp_path):
    bundle.unpack(parts, tmp_path / "there")
    assert (tmp_path / "there" / "site" / "module.py").read_bytes() == bytes(range(256)) * 20


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_a_part_that_did_not_arrive_whole_is_named(parts, tmp_path, fault):
    part = parts / "part-01"
    part.unlink() if fault == "missing" else part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(SystemExit, match=f"part-01 is {fault}"):
        bundle.unpack(parts, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_packages_come_with_what_they_require_and_their_extras(monkeypatch, tmp_path):
    requires = {
        "kernel": ["dsl", "torch", "windows-only; sys_platform == 'win32'"],
        "front": ["dsl[cu13]>=2", "nvidia-cublas"],
        "dsl": ["base", "libs-cu13; extra == 'cu13'", "libs-cu12; extra == 'cu12'"],
    }
    monkeypatch.setattr(bundle, "_wheel", lambda requirement, folder, python: folder)
    monkeypatch.setattr(bundle, "_requires", lambda wheel: requires.get(wheel.name, []))
    wheels = bundle.download(["kernel==4", "front", "there"], tmp_path, "3.12", {"there"})
    assert sorted(wheel.name for wheel in wheels) == ["base", "dsl", "front", "kernel", "libs-cu13"]
