"""How people find a node: its place, other names for the search, what is folded away; and the empty latent."""

from __future__ import annotations

import inspect
from typing import Any

import pytest


@pytest.fixture(scope="module")
def declared(comfy) -> dict[str, dict[str, Any]]:
    """What /object_info says of our nodes."""
    ours = {name: kind for name, kind in comfy.mappings.items() if kind.__module__.startswith(f"{comfy.pack}.")}
    return {name: vars(kind.GET_SCHEMA().get_v1_info(kind)) for name, kind in ours.items()}


def inputs_of(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: spec[1] for group in node["input"].values() for name, spec in group.items() if len(spec) > 1}


def test_every_node_has_a_place_and_other_names(comfy, declared):
    places = comfy.node("finding").PLACES
    assert declared.keys() == places.keys() == comfy.node("declarations").NODES.keys()
    from comfy_api.latest import io

    known = "search_aliases" in inspect.signature(io.Schema).parameters
    for name, node in declared.items():
        assert node["category"].startswith("LongCat/") and places[name].aliases
        assert len(set(places[name].aliases)) == len(places[name].aliases)
        if known:
            assert tuple(node["search_aliases"]) == places[name].aliases
            assert node["essentials_category"] == places[name].essentials


def test_what_few_people_need_is_folded_away(declared):
    """In both versions: as an argument of inputs it is new, as a setting of a widget it is not."""
    sampler, switches = inputs_of(declared["LongCatSampler"]), inputs_of(declared["LongCatOptimizations"])
    assert sampler["kv_cache"]["advanced"] is True and "advanced" not in sampler["steps"]
    assert {name for name, spec in switches.items() if name != "model" and "advanced" not in spec} == {
        "attention",
        "compile",
        "fp8",
        "fused_kernels",
        "split_guidance",
    }


def test_page_gets_the_defaults_of_every_mode_from_the_table(declared):
    sets = inputs_of(declared["LongCatSampler"])["mode"]["longcat"]["sets"]
    assert sets["base"] == {"steps": {"default": 50, "most": 1000}, "guidance": {"default": 4.0, "most": 30.0}}
    steps, guidance = {"default": 16, "most": 50}, {"default": 1.0, "most": 1.0}
    # Of avatars, which LongCat Long Video does not take.
    newer = {"of": {"1.5": {"default": 8, "most": 8}}}
    assert sets["distilled"] == {"steps": steps | newer, "guidance": guidance}
    assert sets["refine"]["guidance"] == {"default": 1.0, "most": 1.0} and sets["enhance_hf"] == sets["base"]
    assert set(inputs_of(declared["LongCatScheduler"])["mode"]["longcat"]["sets"]["base"]) == {"steps"}
    assert inputs_of(declared["LongCatLongVideo"])["mode"]["longcat"]["sets"]["distilled"] == {
        "steps": steps,
        "guidance": guidance,
    }


def test_page_learns_when_a_size_counts(declared):
    for node in ("LongCatImageToVideo", "LongCatVideoContinuation", "LongCatRefine", "LongCatRefineLongVideo"):
        shown = {name for name, spec in inputs_of(declared[node]).items() if "only_for" in spec.get("longcat", {})}
        assert shown == {"width", "height"}
        assert inputs_of(declared[node])["width"]["longcat"]["only_for"] == {"resolution": "custom"}
    assert "longcat" not in inputs_of(declared["LongCatLongVideo"])["width"]


def test_empty_latent_has_the_models_own_defaults(comfy):
    latent = comfy("LongCatEmptyLatent")["samples"]
    assert latent.shape == (1, 16, 24, 60, 104) and not latent.any()
    stock = comfy("EmptyHunyuanLatentVideo", width=96, height=64, length=33, batch_size=2)["samples"]
    assert comfy("LongCatEmptyLatent", width=96, height=64, length=33, batch_size=2)["samples"].equal(stock)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 94}, "length: 94 frames are not of the form 4k\\+1; the nearest are 93 and 97"),
        ({"width": 840}, "width 840 is not a multiple of 16; the nearest one is 848"),
        ({"height": 8}, "height 8 is out of range"),
    ],
)
def test_empty_latent_names_what_is_wrong(comfy, sizes, message):
    with pytest.raises(comfy.core("errors").LongCatError, match=message):
        comfy("LongCatEmptyLatent", **sizes)
