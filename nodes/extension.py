"""What ComfyUI loads: the bundled model's folders, the registration of LongCat-Video, and the nodes."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..longcat_core import nano
from . import former, registration, versions
from .deferred import deferred

# Not from generate.paths, which imports what requests need.
NANO_WEIGHTS = Path(nano.__file__).parent / "weights"
# One module for each family of nodes -> the nodes in its NODES.
FAMILIES = {
    "loaders": ("LongCatModelLoader", "LongCatTextEncoderLoader"),
    "optimizations": ("LongCatOptimizations",),
    "sampling": ("LongCatSampler", "LongCatScheduler", "LongCatGuider"),
    "empty_latent": ("LongCatEmptyLatent",),
    "sample": ("LongCatSampleClip", "LongCatSampleSpeech"),
    "vae_decode": ("LongCatVAEDecode",),
    "conditioning": ("LongCatImageToVideo", "LongCatVideoContinuation"),
    "refine": ("LongCatRefine",),
    "audio": ("LongCatAudioEncoderLoader", "LongCatEncodeAudio"),
    "avatar": ("LongCatAvatar", "LongCatAvatarBoxes"),
    "avatar_video": ("LongCatAvatarLongVideo",),
    "long_video": ("LongCatLongVideo", "LongCatRefineLongVideo"),
    "block_sparse": ("LongCatBlockSparseAttention",),
    "sparse": ("LongCatSparseAttention",),
    "multi_gpu": ("LongCatMultiGPU", "LongCatMultiGPUTest"),
    "step_cache": ("LongCatStepCache",),
    "benchmark": ("LongCatBenchmark",),
    "fidelity": ("LongCatFidelity",),
    "calibrate": ("LongCatCalibrate",),
}


class LongCatExtension(ComfyExtension):
    async def on_load(self) -> None:
        await former.offer_replacements(former.RENAMED)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load, which ComfyUI 0.8 never calls.
        for kind in ("diffusion_models", "vae", "text_encoders", "audio_encoders"):
            folder_paths.add_model_folder_path(kind, str(NANO_WEIGHTS / kind))
        registration.register()
        former.renew_prompts(former.RENAMED)
        versions.answer_page()
        return [deferred(family, node) for family, nodes in FAMILIES.items() for node in nodes]
