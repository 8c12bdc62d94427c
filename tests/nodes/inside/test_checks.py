"""What is refused when Run is pressed, before any node runs; connected inputs are not known then."""

from __future__ import annotations

import asyncio
import os

import pytest

# A node -> inputs that are refused, and the words.
REFUSED = {
    "LongCatLongVideo": [
        ({"prompts": " \n "}, "the prompt is empty"),
        ({"segments": 1, "prompts": "a\nb"}, "2 prompts are more than the 1 segments"),
        ({"segments": -1}, "segments -1 is out of range; give at least 0"),
        ({"length": 10}, "10 frames are not of the form 4k"),
        ({"length": 9, "overlap": 13}, "9 frames that share 13 leave nothing new"),
        ({"overlap": 6}, "overlap: 6 frames are not of the form 4k"),
        ({"width": 100}, "width 100 is not a multiple of 16"),
        ({"height": 8000}, "height 8000 is out of range"),
        ({"steps": 60, "mode": "distilled"}, "60 steps are out of range; the distilled schedule takes 1 to 50"),
        ({"mode": "fast"}, "mode is 'fast'; choose one of"),
        ({"guidance": 99.0}, "guidance 99"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"folder": ""}, "not inside ComfyUI's output folder"),
        ({"folder": "%date%/../../x"}, "not inside ComfyUI's output folder"),
        ({"folder": "%KSampler.seed%/../../../x"}, "not inside ComfyUI's output folder"),
    ],
    "LongCatRefineLongVideo": [
        ({"folder": "../x"}, "not inside ComfyUI's output folder"),
        ({"piece": 9, "overlap": 9}, "pieces of 9 frames that share 9 leave nothing new"),
        ({"steps": 0}, "0 steps are out of range"),
        ({"resolution": "custom", "width": 100}, "width 100"),
        ({"resolution": "1080p"}, "resolution is '1080p'"),
    ],
    "LongCatVideoContinuation": [
        ({"length": 13, "cond_frames": 13}, "length 13 leaves nothing to generate after 13 given frames"),
        ({"cond_frames": 6}, "cond_frames: 6 frames are not of the form"),
        ({"length": 12}, "length: 12 frames are not of the form"),
        ({"resolution": "custom", "height": 50}, "height 50"),
    ],
    "LongCatImageToVideo": [({"length": 12}, "length: 12"), ({"resolution": "custom", "width": 8}, "width 8")],
    "LongCatEmptyLatent": [({"length": 12}, "length: 12"), ({"width": 100}, "width 100")],
    "LongCatRefine": [({"resolution": "custom", "width": 100}, "width 100")],
    "LongCatSampler": [
        ({"steps": 60, "mode": "distilled"}, "60 steps are out of range"),
        ({"mode": "x"}, "mode is 'x'"),
    ],
    "LongCatScheduler": [({"steps": 60, "mode": "distilled"}, "60 steps are out of range")],
    "LongCatFidelity": [({"steps": 2000, "mode": "base"}, "steps 2000 is out of range; give at least 1 and at most")],
    "LongCatSparseAttention": [
        ({"density": 1.5}, "density 1.5 is out of range; give at least 0 and at most 1"),
        ({"dense_steps": -0.1}, "dense_steps -0.1 is out of range"),
        ({"kernel": "quick"}, "sparse kernel 'quick' is unavailable"),
    ],
    "LongCatCalibrate": [
        ({"steps": 60, "mode": "distilled"}, "60 steps are out of range"),
        ({"budget": 0.0}, "budget 0 is out of range; give at least 0.001 and at most 1"),
        ({"dense_steps": 1.0}, "leaves none of 10 to calibrate"),
        ({"file": "../elsewhere.json"}, "is not inside ComfyUI's output folder"),
        ({"file": "notes.txt"}, "must end in .json"),
    ],
}
CASES = [(node, inputs, said) for node, cases in REFUSED.items() for inputs, said in cases]


def prompt_of(comfy, node: str, inputs: dict) -> dict:
    """The node with its defaults, its sockets unconnected, and something that shows its first output."""
    schema = comfy.mappings[node].define_schema()
    widgets = {field.id: field.default for field in schema.inputs if getattr(field, "default", None) is not None}
    if node == "LongCatLongVideo":
        widgets["prompts"] = "a red circle"
    return {"class_type": node, "inputs": widgets | {"folder": "checked"} | inputs}


def validate(comfy, node: str, inputs: dict) -> list[str]:
    """The words of ComfyUI's own validation about a node in the middle of a prompt, without those about sockets."""
    import execution

    async def run():
        prompt = {
            "1": prompt_of(comfy, node, inputs),
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        }
        validated: dict = {}
        checks = [name for name in dir(execution) if name == "validate_inputs"]
        assert checks
        await execution.validate_inputs("id", prompt, "2", validated)
        return validated["1"][1]

    asyncio.run(load_any(comfy))
    return [error["details"] for error in asyncio.run(run()) if error["type"] != "required_input_missing"]


async def load_any(comfy):
    import nodes

    if "PreviewAny" not in comfy.mappings:
        path = os.path.join(os.environ["COMFYUI_PATH"], "comfy_extras", "nodes_preview_any.py")
        assert await nodes.load_custom_node(path, module_parent="comfy_extras")


@pytest.mark.parametrize(("node", "inputs", "said"), CASES, ids=[f"{node}-{said[:20]}" for node, _, said in CASES])
def test_refused_in_one_sentence(comfy, node, inputs, said):
    found = validate(comfy, node, inputs)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize("node", REFUSED)
def test_defaults_are_accepted(comfy, node):
    assert validate(comfy, node, {}) == []


@pytest.mark.parametrize("node", REFUSED)
def test_what_is_connected_is_not_known_yet(comfy, node):
    """Each input by itself, and all of them at once, without a value as ComfyUI passes what is connected."""
    kind = comfy.mappings[node]
    schema = kind.define_schema()
    known = {field.id: field.default for field in schema.inputs if getattr(field, "default", None) is not None}
    known |= {"prompts": "a red circle"} if node == "LongCatLongVideo" else {}
    names = kind.validate_inputs.__func__.__code__.co_varnames[1 : kind.validate_inputs.__func__.__code__.co_argcount]
    assert kind.validate_inputs()
    for unknown in names:
        assert kind.validate_inputs(**{name: None if name == unknown else known.get(name) for name in names}), unknown


def test_a_folder_that_cannot_be_used_is_refused_before_the_long_video_runs(comfy):
    import folder_paths

    place = os.path.join(folder_paths.get_output_directory(), "a-file")
    with open(place, "w"):
        pass
    for node in ("LongCatLongVideo", "LongCatRefineLongVideo"):
        for folder in ("a-file", "a-file/inside"):
            (said,) = validate(comfy, node, {"folder": folder})
            assert "a-file" in said and "; name a" in said
