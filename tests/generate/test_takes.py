"""What is compared of settings: only what changes a result, in this version's words and in those of earlier ones."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest

from longcat_core.generate.takes import comparable, lossy_settings, matches, nearest
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.sparse.settings import Densities, Sparse
from longcat_core.optimize.switches import Optimizations

OWN = {"prompt": "a", "seed": 3, "guidance_scale": 4.0, "model": "0123456789abcdef"}
# As the command line and ComfyUI's nodes stored them, all at their defaults.
COMMAND = OWN | {
    "kv_cache": "exact",
    "step_cache": 0.0,
    "lora": None,
    "dtype": "float32",
    "fp8": False,
    "attention": "auto",
    "compile": "off",
    "device": "cpu",
}
NODES = OWN | {
    "kv_cache": "exact",
    "step_cache": 0.0,
    "dtype": "float32",
    "optimizations": "defaults",
    "block-sparse": None,
    "step cache": None,
    "wrappers": [],
    "injections": [],
}
SPARSE = BlockSparse(0.5, chunk=(2, 2, 2))


@pytest.mark.parametrize("old", [COMMAND, NODES], ids=["command", "nodes"])
def test_defaults_of_earlier_versions_are_those_of_today(old):
    assert comparable(old) == (OWN, {}) == comparable(OWN)


EXACT = {
    "attention": {"attention": "sdpa"},
    "compile": {"compile": "blocks"},
    "device": {"device": "cuda"},
    "kv_cache": {"kv_cache": "off"},
    "switches": {"optimizations": repr(Optimizations())},
    "all exact switches the other way": {
        "optimizations": repr(
            Optimizations(
                **{switch.name: not switch.default for switch in fields(Optimizations) if switch.type == "bool"}
                | {"compile": "blocks", "text_mode": "padded", "attention": "sdpa"}
            )
        )
    },
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_not_compared(name):
    assert matches(NODES | EXACT[name], OWN) and matches(COMMAND | EXACT[name], OWN)


def test_a_switch_that_a_later_version_adds_or_drops_does_not_matter():
    old = repr(Optimizations()).replace(", fused_text=True", "")
    assert old != repr(Optimizations()) and matches(NODES | {"optimizations": old}, OWN)
    new = repr(Optimizations()).replace(")", ", fused_more=True)")
    assert matches(NODES | {"optimizations": new}, OWN)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"dtype": "bfloat16"}, {"precision": "bfloat16"}),
        ({"fp8": True}, {"eight_bit": True}),
        ({"attention": "sage"}, {"switches": Optimizations(attention="sage")}),
        ({"optimizations": repr(Optimizations(attention="sage"))}, {"switches": Optimizations(attention="sage")}),
        ({"optimizations": repr(Optimizations(text_mode="packed"))}, {"switches": Optimizations(text_mode="packed")}),
        ({"step_cache": 0.05}, {"step_cache": 0.05}),
        ({"step cache": 0.05, "wrappers": ["longcat_step_cache"] * 2}, {"step_cache": 0.05}),
        ({"block_sparse": asdict(SPARSE)}, {"block_sparse": BlockSparse(0.5, chunk=(2, 2, 2), kernel="plain")}),
        ({"block-sparse": repr(SPARSE)}, {"block_sparse": SPARSE}),
        ({"block-sparse": repr(BlockSparse(None, 0.9, query_chunk=(4, 4, 8)))},
         {"block_sparse": BlockSparse(None, 0.9, query_chunk=(4, 4, 8))}),
    ],
)  # fmt: skip
def test_lossy_settings_of_earlier_versions_are_found_in_words(old, now):
    lossy = lossy_settings(**now)
    assert len(lossy) == 1 and all(isinstance(text, str) for text in lossy.values())
    for base in (COMMAND, NODES):
        assert comparable(base | old) == (OWN, lossy)
        assert matches(base | old, OWN | {"lossy": lossy}) and not matches(base | old, OWN)
        assert matches(base | old, OWN, any_lossy=True)


def test_words_of_lossy_settings():
    switches = Optimizations(attention="cudnn-fp8", text_mode="packed")
    assert lossy_settings() == {}
    assert lossy_settings(
        precision="bfloat16", switches=switches, step_cache=0.05, block_sparse=BlockSparse(), eight_bit=True
    ) == {
        "precision": "bfloat16",
        "attention": "cudnn-fp8",
        "text mode": "packed",
        "fp8": "on",
        "step cache": "0.05",
        "block-sparse": "sparsity 0.9375, chunk 4x4x4",
    }
    assert lossy_settings(switches=Optimizations(fp8=False), eight_bit=True) == {}
    assert lossy_settings(switches=Optimizations(exchange="int8")) == {"exchange": "int8"}
    assert lossy_settings(switches=Optimizations(exchange="messages")) == {}
    assert lossy_settings(guidance_until=0.6) == {"guidance until": "0.6"}
    assert lossy_settings(guidance_until=1.0) == {}


def test_words_of_sparse_attention():
    def words(sparse: Sparse) -> str:
        return lossy_settings(sparse=sparse)["sparse"]

    assert words(Sparse()) == words(Sparse(kernel="plain")) == "density 0.15"
    assert words(Sparse(0.3, dense_steps=0.0, tail=False)) == "density 0.3, dense steps 0.0, tail False"
    assert words(Sparse(0.3, dense_layers=(0, 2), query_block=64, kernel="cudnn-fp8")) == (
        "density 0.3, dense layers (0, 2), query block 64, cudnn-fp8"
    )
    one, other = (Sparse(densities=Densities((1.0,), (((share,),),))) for share in (0.1, 0.2))
    assert words(one).startswith("densities ") and words(one) != words(other)
    assert words(one) == words(replace(one, density=0.5)), "densities take its place"


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"model": "f" * 16},
        {"lora": "abc"},
        {"kv_cache": "official"},
        {"wrappers": ["of another pack"]},
        {"injections": ["x"]},
        # Not from this pack: kept as it is.
        {"optimizations": "all of it"},
        {"block-sparse": "much"},
    ],
)
def test_decisive_settings_must_match(other):
    for base in (COMMAND, NODES):
        assert not matches(base | other, OWN, any_lossy=True)
        assert matches(base | other, base | other)


def test_what_has_no_effect_on_this_segment_is_not_compared():
    later = OWN | {"overlap": 5, "hand_off": "frames", "kv_cache": "official"}
    assert matches(later, OWN | {"overlap": 9, "hand_off": "latents"}, first=True)
    assert not matches(later, OWN | {"overlap": 9, "hand_off": "frames"})
    given = {"given frames": "abc"}
    assert not matches(later | given, OWN | given, first=True), "its image is seen through the cache"
    alone = OWN | {"guidance_scale": 1.0}
    assert matches(alone | {"negative_prompt": "a"}, alone | {"negative_prompt": "b", "kv_cache": "official"})


@pytest.mark.parametrize("lossy", [None, 5, "x", ["y"], {"a": 1}])
def test_odd_records_do_no_harm(lossy):
    assert not matches(OWN | {"lossy": lossy}, OWN | {"lossy": {"fp8": "on"}})
    assert matches(OWN | {"lossy": lossy}, OWN) == (not isinstance(lossy, dict))


def test_the_nearest():
    there = [OWN | {"seed": 5, "steps": 9}, OWN | {"lossy": {"fp8": "on"}}, OWN | {"seed": 4}]
    assert nearest(there, OWN) == (1, "fp8 on there, none now", True)
    assert nearest(there, OWN | {"seed": 6}) == (2, "seed 4 there, 6 now", False)
    assert nearest([OWN], OWN | {"model": "f" * 16}) == (0, "another model", False)
