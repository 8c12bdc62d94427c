"""What ComfyUI loads: the bundled model's folders, the registration of LongCat-Video, and the nodes."""

from __future__ import annotations

import importlib
import logging

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..longcat_core.generate.paths import NANO_WEIGHTS
from . import comfy_lora, comfy_model, former

# One module for each family of nodes, which lists its classes in NODES.
FAMILIES = (
    "loaders",
    "optimizations",
    "sampling",
    "empty_latent",
    "sample",
    "vae_decode",
    "conditioning",
    "refine",
    "long_video",
    "block_sparse",
    "sparse",
    "step_cache",
    "benchmark",
    "fidelity",
    "calibrate",
)


class LongCatExtension(ComfyExtension):
    async def on_load(self) -> None:
        await former.offer_replacements(former.RENAMED)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load, which ComfyUI 0.8 never calls.
        for kind in ("diffusion_models", "vae", "text_encoders"):
            folder_paths.add_model_folder_path(kind, str(NANO_WEIGHTS / kind))
        comfy_model.register()
        comfy_lora.register()
        former.renew_prompts(former.RENAMED)
        nodes: list[type[io.ComfyNode]] = []
        for family in FAMILIES:
            try:
                module = importlib.import_module(f".{family}", __package__)
            except ImportError as error:
                # A missing dependency of one family must not hide the others.
                logging.warning("LongCat: the nodes of %s are left out: %s", family, error)
                continue
            nodes += module.NODES
        return nodes
