"""What ComfyUI calls when it reads anybody's model or LoRA: recognizes LongCat-Video's, and hands on all others; and
when it unloads all models.

Registered when ComfyUI starts, so it imports nothing heavy before a file is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..longcat_core.errors import CheckpointError
from ..longcat_core.model.config import ModelConfig
from ..longcat_core.nano.colors import is_nano
from ..longcat_core.sampling.schedules import SHIFT, shift_of
from .comfy_latents import LongCatLatents, NanoLatents
from .host import running_workers
from .lora_files import KeyMap, remember

if TYPE_CHECKING:
    from .comfy_model import LongCatVideo

IMAGE_MODEL = "longcat_video"
SOURCE = "the checkpoint"
# A tensor of LongCat-Video in any form.
EVERY_FORM = "blocks.0.ffn.w1.weight"


class LongCatConfig(comfy.supported_models_base.BASE):
    unet_config = {"image_model": IMAGE_MODEL}  # noqa: RUF012 - ComfyUI reads these off the class
    unet_extra_config = {}  # noqa: RUF012
    sampling_settings = {"shift": SHIFT, "multiplier": 1000}  # noqa: RUF012
    latent_format = LongCatLatents
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012
    vae_key_prefix = ["vae."]  # noqa: RUF012
    text_encoder_key_prefix = ["text_encoders."]  # noqa: RUF012

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        config = self.model_config()
        if is_nano(config):
            self.latent_format = NanoLatents()
        if config.audio is not None:
            self.sampling_settings = {**self.sampling_settings, "shift": shift_of(config.audio)}

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> LongCatVideo:
        from . import comfy_fp8
        from .comfy_model import LongCatVideo

        if self.custom_operations is comfy_fp8.Rowwise:
            # A request, not a set of operations: the network decides which layers become 8-bit.
            self.custom_operations = None
            self.unet_config = {**self.unet_config, "fp8": True}
        # ComfyUI runs nodes in inference mode, whose tensors cannot have gradients; training nodes need them.
        with torch.inference_mode(False):
            return LongCatVideo(self, device=device)

    def inpaint_model(self) -> bool:
        return False

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.unet_config)

    def clip_target(self, state_dict: Mapping[str, Tensor]) -> Any:
        from .loaders import target_in

        return target_in(state_dict, self.text_encoder_key_prefix[0])

    def process_unet_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        from .comfy_weights import from_checkpoint

        return from_checkpoint(state_dict, self.model_config(), rowwise=bool(self.unet_config.get("fp8")))

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        from .comfy_weights import to_official

        named = to_official(state_dict, self.model_config())
        return comfy.utils.state_dict_prefix_replace(named, {"": "model.diffusion_model."})


def detect(
    state_dict: Mapping[str, Tensor], prefix: str = "", metadata: Mapping[str, str] | None = None
) -> dict | None:
    """The unet_config of a LongCat-Video checkpoint of any form, or None for any other file.

    Since PixArt and Wan share some names, all names of the form's signature must be there, and the patch embedding must
    be a video's.
    """
    from ..longcat_core.checkpoints.formats import FORMATS
    from ..longcat_core.checkpoints.formats import detect as detect_form

    if not any(_is_video(state_dict, f"{prefix}{form.outer['patch_embed'][0]}") for form in FORMATS):
        return None
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    try:
        form, lead = detect_form(names, SOURCE)
    except CheckpointError:
        return None
    if lead or not all(any(name.startswith(mark) for name in names) for mark in form.signature):
        return None
    from ..longcat_core.checkpoints.load import described_config
    from .comfy_weights import logical_shapes

    shapes = logical_shapes({name: state_dict[prefix + name] for name in names}, form)
    config = described_config(form, shapes, metadata or {}, SOURCE)
    return {"image_model": IMAGE_MODEL, **config.to_dict()}


def _is_video(state_dict: Mapping[str, Tensor], module: str) -> bool:
    embedding = state_dict.get(f"{module}.weight")
    return embedding is not None and embedding.ndim == 5


def register() -> None:
    """Make ComfyUI's own loaders recognize LongCat-Video and its LoRAs, and let its unloading reach other GPUs;
    registering again, as a second copy of the pack does, replaces the wrappers."""
    models = comfy.supported_models.models
    models[:] = [model for model in models if model.unet_config.get("image_model") != IMAGE_MODEL]
    models.append(LongCatConfig)
    others, find_keys, load, read, unload = (
        getattr(function, "longcat_wraps", function)
        for function in (
            comfy.model_detection.detect_unet_config,
            comfy.lora.model_lora_keys_unet,
            comfy.lora.load_lora,
            comfy.utils.load_torch_file,
            comfy.model_management.unload_all_models,
        )
    )

    def detect_unet_config(state_dict, key_prefix, metadata=None):
        # Ours first: ComfyUI's own detection takes official LongCat names for another model's.
        found = detect(state_dict, key_prefix, metadata)
        return others(state_dict, key_prefix, metadata=metadata) if found is None else found

    def model_lora_keys_unet(model, key_map=None):
        found = find_keys(model, {} if key_map is None else key_map)
        if not isinstance(getattr(model, "model_config", None), LongCatConfig):
            return found
        from .comfy_lora import add_names

        return add_names(model, found)

    def load_lora(lora, to_load, log_missing=True):
        if not isinstance(to_load, KeyMap):
            return load(lora, to_load, log_missing)
        from .comfy_lora import check, convert

        lora = convert(lora, to_load.shapes)
        loaded = load(lora, to_load, False)
        check(lora, to_load, loaded)
        return loaded

    def load_torch_file(ckpt, *args, **kwargs):
        found = read(ckpt, *args, **kwargs)
        tensors = found[0] if isinstance(found, tuple) else found
        remember(tensors, ckpt)
        if isinstance(tensors, dict) and any(str(name).endswith(EVERY_FORM) for name in tensors):
            from .comfy_reading import mark

            mark(tensors, ckpt)
        return found

    def unload_all_models():
        # Weights on other GPUs are in processes that ComfyUI does not know.
        if (workers := running_workers()) is not None:
            workers.end()
        return unload()

    for module, function, original in (
        (comfy.model_detection, detect_unet_config, others),
        (comfy.lora, model_lora_keys_unet, find_keys),
        (comfy.lora, load_lora, load),
        (comfy.utils, load_torch_file, read),
        (comfy.model_management, unload_all_models, unload),
    ):
        function.longcat_wraps = original
        setattr(module, function.__name__, function)
