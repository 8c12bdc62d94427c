"""Folders of the long nodes: patterns in their names, links to other disks, and files that get lost."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest


class Prompt:
    def __init__(self, nodes):
        self.nodes = nodes

    def get_original_prompt(self):
        return self.nodes

    def get_node(self, name):
        return self.nodes[name]


NODES = {
    "1": {"class_type": "KSampler", "inputs": {"seed": 7, "on": True}, "_meta": {"title": "KSampler"}},
    "2": {"class_type": "LongCatSampler", "inputs": {"mode": "a/b:c", "seed": ["9", 0]}, "_meta": {"title": "My one"}},
    "3": {"class_type": "KSampler", "inputs": {"seed": 8}, "_meta": {"title": "Other"}},
}


@pytest.fixture
def write(comfy, monkeypatch):
    class At(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.setattr(comfy.node("folders"), "datetime", At)
    workflow = {"nodes": [{"id": 3, "properties": {"Node name for S&R": "Mine"}}, {"id": 1, "properties": {}}]}
    hidden = type("Hidden", (), {"dynprompt": Prompt(NODES), "extra_pnginfo": {"workflow": workflow}})
    return lambda name: comfy.node("folders").written_out(name, hidden, 832, 480)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("longcat/%date:yyyy-MM-dd%", "longcat/2026-03-04"),
        ("%date%/x", "2026-03-04/x"),
        ("%date:yy/M/d hh:m:ss%", "26/3/4 05:6:07"),
        ("%year%-%month%-%day% %hour%.%minute%.%second%", "2026-03-04 05.06.07"),
        ("%width%x%height%", "832x480"),
        ("%KSampler.seed%", "7"),
        ("%Mine.seed%/%Other.seed%", "8/8"),
        ("%My one.mode%", "a_b_c"),
        ("%KSampler.on%", "true"),
        ("100% sure, 50%", "100% sure, 50%"),
        ("%nothing%", "%nothing%"),
    ],
)
def test_patterns_are_those_of_save_video(write, name, written):
    assert write(name) == written


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("%Nobody.seed%", "no node 'Nobody' with a widget 'seed'; name the node by its title"),
        ("%KSampler.nothing%", "no node 'KSampler' with a widget 'nothing'"),
        ("%My one.seed%", "which is connected; name an input that is set"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(comfy, write, name, said):
    with pytest.raises(comfy.core("errors").LongCatError, match=said):
        write(name)


def output(comfy) -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


def test_links_inside_the_output_folder_are_followed_and_names_do_not_lead_out(comfy, tmp_path):
    find, error = comfy.node("folders").output_folder, comfy.core("errors").LongCatError
    (output(comfy) / "disk").symlink_to(tmp_path, target_is_directory=True)
    assert find("disk") == output(comfy) / "disk" and find("disk/a/b").parent.parent.samefile(tmp_path)
    assert find("a/../b") == output(comfy) / "b" and find(str(output(comfy) / "c")) == output(comfy) / "c"
    for name in ("disk/../../x", str(tmp_path), "..", "disk/../.."):
        with pytest.raises(error, match="not inside ComfyUI's output folder"):
            find(name)


def test_a_value_of_a_pattern_does_not_lead_out(comfy, write, monkeypatch):
    monkeypatch.setitem(NODES["1"]["inputs"], "seed", "../../..")
    name = write("longcat/%KSampler.seed%")
    assert comfy.node("folders").output_folder(name).is_relative_to(output(comfy) / "longcat")


def test_a_node_runs_again_once_a_file_that_it_put_out_is_gone(comfy, tmp_path):
    kept = comfy.node("folders").Delivered
    key = kept.key("node 1", {"folder": "x", "model": ["2", 0]})
    assert key == kept.key("node 1", {"model": None, "folder": "x"}) != kept.key("node 1", {"folder": "y"})
    file = tmp_path / "frames.mkv"
    file.write_bytes(b"1")
    assert kept.fingerprint(key) == 0
    kept.remember(key, [file])
    assert kept.fingerprint(key) == kept.fingerprint(key) == 0
    file.unlink()
    assert kept.fingerprint(key) == kept.fingerprint(key) == 1
    file.write_bytes(b"1")
    kept.remember(key, [file])
    assert kept.fingerprint(key) == 1
    file.write_bytes(b"12")
    assert kept.fingerprint(key) == 2
    for number in range(2 * kept.MOST):
        kept.remember(f"other {number}", [])
    assert len(kept._kept) == kept.MOST


def test_a_disk_without_room_is_refused_unless_the_folder_is_begun(comfy, tmp_path):
    check, error = comfy.node("folders").check_room, comfy.core("errors").LongCatError
    check(tmp_path / "a" / "b", 1 << 10)
    with pytest.raises(error, match=r"a segment may take 1,152,921,504\.6 GB, but the disk .* free; free some space"):
        check(tmp_path / "a" / "b", 1 << 60)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    check(tmp_path / "a", 1 << 60)
