"""The locales have a text for every node, input and output, and the Chinese ones are Chinese."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .public_face import ROOT
from .test_options import DECLARED, PAGES

FINDING = PAGES.load("nodes.finding")
# Names that stay as they are in Chinese.
NAMES = {"CLIP", "VAE", "Latent", "Sigmas"}


def locale(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_english_is_that_of_the_schema():
    english = locale("en")
    assert english.keys() == DECLARED.keys()
    for node_id, node in DECLARED.items():
        assert (english[node_id]["display_name"], english[node_id]["description"]) == (node.name, node.description)
        found = {name: text.get("tooltip", "") for name, text in english[node_id]["inputs"].items()}
        assert found == {field.name: field.tooltip for field in node.inputs}


@pytest.mark.parametrize("node_id", DECLARED)
def test_chinese_lacks_nothing(node_id):
    node, chinese = DECLARED[node_id], locale("zh").get(node_id, {})
    lacking = [name for name in ("display_name", "description") if not chinese.get(name)]
    for field in node.inputs:
        text = chinese.get("inputs", {}).get(field.name, {})
        lacking += [f"{field.name} {part}" for part in ("name", "tooltip") if not text.get(part)]
    for number in range(len(node.outputs)):
        text = chinese.get("outputs", {}).get(str(number), {})
        lacking += [f"output {number} {part}" for part in ("name", "tooltip") if not text.get(part)]
    assert not lacking, f"docs/chinese.py has no {', '.join(lacking)} of {node_id}"


def test_chinese_has_nothing_that_is_gone():
    texts, inputs = PAGES.load("docs.chinese"), {name: node.inputs for name, node in DECLARED.items()}
    known = {field.name for fields in inputs.values() for field in fields}
    assert texts.NODES.keys() == texts.OUTPUTS.keys() == DECLARED.keys() and texts.INPUTS.keys() <= known
    for node_id, name in texts.INPUTS_OF:
        assert name in {field.name for field in inputs[node_id]}
    assert all(len(texts.OUTPUTS[node_id]) == len(node.outputs) for node_id, node in DECLARED.items())


def test_chinese_is_chinese():
    texts = PAGES.load("docs.chinese")
    pairs = [*texts.NODES.values(), *texts.INPUTS.values(), *texts.INPUTS_OF.values()]
    pairs += [text for outputs in texts.OUTPUTS.values() for text in outputs]
    for name, text in pairs:
        assert name in NAMES or re.search("[\u4e00-\u9fff]", name), name
        assert text.endswith("。") and len(re.findall("[\u4e00-\u9fff]", text)) >= 1, text
        # Half-width signs of punctuation between Chinese ones, as a machine writes them.
        assert not re.search("[\u4e00-\u9fff][,:;?!]", text), text


def test_every_category_has_a_chinese_name():
    parts = {part for place in FINDING.PLACES.values() for part in place.category.split("/")} - {FINDING.ROOT}
    assert parts == PAGES.load("docs.chinese").CATEGORIES.keys()


def test_nanos_default_stands_in_both_languages():
    texts = [locale(language)["LongCatImageToVideo"]["inputs"]["length"]["tooltip"] for language in ("en", "zh")]
    assert texts[0].endswith("For LongCat-nano: 33.") and texts[1].endswith("LongCat-nano：33。")
