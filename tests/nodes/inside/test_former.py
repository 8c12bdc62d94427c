"""Prompts of earlier versions: an input that was a switch, one that is gone, and a node under another id."""

from __future__ import annotations

import asyncio

import pytest


@pytest.fixture
def former(comfy):
    return comfy.node("former")


def renew(former, kind: str, **inputs):
    prompt = {"1": {"class_type": kind, "inputs": inputs}}
    former.renewed(prompt, former.RENAMED)
    return prompt["1"]["inputs"]


@pytest.mark.parametrize("kind", ["LongCatSampler", "LongCatGuider"])
def test_a_switch_that_became_a_choice(former, kind):
    assert renew(former, kind, kv_cache=True, guidance=1)["kv_cache"] == "exact"
    assert renew(former, kind, kv_cache=False) == {"kv_cache": "off"}
    assert renew(former, kind, kv_cache="official") == {"kv_cache": "official"}
    assert renew(former, "KSampler", kv_cache=True) == {"kv_cache": True}


def test_a_prompt_that_is_not_one_is_left_to_comfyui(former):
    prompt = {"1": None, "2": {"class_type": "LongCatSampler"}, "3": {"class_type": 5, "inputs": []}}
    former.renewed(prompt, former.RENAMED)
    assert prompt == {"1": None, "2": {"class_type": "LongCatSampler"}, "3": {"class_type": 5, "inputs": []}}


def test_a_node_under_its_old_id(former):
    new = former.Renamed("LongCatGuider", {"guidance": "cfg", "kv_cache": "cache"}, ("cfg", "cache"))
    prompt = {"1": {"class_type": "OldGuider", "inputs": {"cfg": 3.5, "cache": True, "more": 1}}}
    former.renewed(prompt, {"OldGuider": new})
    assert prompt["1"] == {"class_type": "LongCatGuider", "inputs": {"guidance": 3.5, "kv_cache": "exact"}}


def test_every_new_name_is_declared(comfy, former):
    declared = comfy.node("declarations").NODES
    inputs = {node_id: {field.name for field in node.inputs} for node_id, node in declared.items()}
    assert all(new.inputs.keys() == inputs[new.id] for new in former.RENAMED.values())
    assert all(name in inputs[node_id] for node_id, name in (*former.VALUES, *former.REMOVED))


def test_page_offers_a_replacement_where_comfyui_can(comfy, former, monkeypatch):
    """ComfyUI 0.8 has no such offer, and nothing happens there."""
    from comfy_api.latest import ComfyAPI, io

    offered = []

    async def register(replacement):
        offered.append(replacement.as_dict())

    can = hasattr(io, "NodeReplace")
    if can:
        monkeypatch.setattr(ComfyAPI().node_replacement, "register", register, raising=False)
    new = former.Renamed("LongCatGuider", {"guidance": "cfg"}, ("cfg",))
    asyncio.run(former.offer_replacements({"OldGuider": new}))
    assert len(offered) == can
    for each in offered:
        assert (each["new_node_id"], each["old_node_id"]) == ("LongCatGuider", "OldGuider")
        assert each["input_mapping"] == [{"new_id": "guidance", "old_id": "cfg"}] and each["old_widget_ids"] == ["cfg"]
        assert each["output_mapping"] == [{"new_idx": 0, "old_idx": 0}]
