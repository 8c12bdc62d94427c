"""Node ids, inputs in order, defaults, choices and outputs: what workflows and scripts rely on."""

from __future__ import annotations

from typing import Any

from ...public_face import assert_frozen

# Listed here, because versions of ComfyUI differ in what else an input has.
KEYS = ("default", "min", "max", "step", "round", "multiline", "control_after_generate", "force_input", "socketless",
        "lazy", "display_mode", "multiselect", "dynamic_prompts")  # fmt: skip
FLAGS = ("is_output_node", "is_input_list", "is_deprecated", "is_experimental", "not_idempotent", "enable_expand")
# Choices that depend on the machine's files and attention backends.
OF_THE_MACHINE = (
    ("LongCatModelLoader", "model_name"),
    ("LongCatTextEncoderLoader", "text_encoder_name"),
    ("LongCatAudioEncoderLoader", "audio_encoder_name"),
    ("LongCatOptimizations", "attention"),
)


def described_input(node: str, field: Any) -> dict[str, Any]:
    found = {"id": field.id, "type": field.get_io_type(), "optional": bool(field.optional)}
    found |= {key: getattr(field, key) for key in KEYS if getattr(field, key, None) is not None}
    if getattr(field, "options", None) is not None:
        found["options"] = "of the machine" if (node, field.id) in OF_THE_MACHINE else list(field.options)
    return found


def described(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "inputs": [described_input(schema.node_id, field) for field in schema.inputs],
        "outputs": [
            {"name": output.display_name, "type": output.get_io_type(), "list": bool(output.is_output_list)}
            for output in schema.outputs
        ],
        "hidden": sorted(str(getattr(hidden, "value", hidden)) for hidden in schema.hidden or ()),
        "flags": [flag for flag in FLAGS if getattr(schema, flag, False)],
    }


def test_nodes_inputs_and_outputs(comfy):
    ours = [kind for kind in comfy.mappings.values() if kind.__module__.startswith(f"{comfy.pack}.")]
    schemas = [kind.define_schema() for kind in ours]
    assert_frozen("nodes", {schema.node_id: described(schema) for schema in schemas})


def test_settings_of_segments_that_nodes_write(comfy, model, clip, vae):
    """Folders of earlier code are continued only if these values, fingerprints of the weights included, are equal."""
    switched, _ = comfy("LongCatOptimizations", model=model)
    sparse = comfy("LongCatStepCache", model=comfy("LongCatBlockSparseAttention", model=switched))
    then = comfy.core("files.fingerprints").as_then
    found = {}
    for name, each in (("plain", model), ("with options", sparse)):
        engine = comfy.node("engine").ComfyEngine("LongCat", each, clip, vae, [""])
        settings = engine.settings()
        # What earlier code stored of the same model, whose folders are still found.
        earlier = {part: then(value) for part, value in settings.items()}
        found[name] = settings | {"lossy": engine.lossy(), "earlier": earlier}
    assert_frozen("node_settings", found)
