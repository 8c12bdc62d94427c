"""The files of the real weights: one table for README, for the notes in the workflows and for the page's downloads.

Names and sizes are those of the repositories on Hugging Face; memory figures are from docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KIJAI = "https://huggingface.co/Kijai/LongCat-Video_comfy/resolve/main/"
COMFY = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
WAN = "https://huggingface.co/Kijai/WanVideo_comfy/resolve/main/"
OFFICIAL = "https://huggingface.co/meituan-longcat/LongCat-Video"


@dataclass(frozen=True)
class Weight:
    """directory: the folder in ComfyUI's `models`. gigabytes: of the file, in 10^9 bytes. suits: cards, in words."""

    name: str
    directory: str
    url: str
    gigabytes: float
    suits: str

    @property
    def model(self) -> dict[str, str]:
        """The entry of a node's `properties.models`."""
        return {"name": self.name, "url": self.url, "directory": self.directory}


def _weight(name: str, directory: str, root: str, gigabytes: float, suits: str) -> Weight:
    return Weight(name, directory, f"{root}{name}", gigabytes, suits)


FP8 = _weight(
    "LongCat_TI2V_comfy_fp8_e4m3fn_scaled_KJ.safetensors",
    "diffusion_models",
    KIJAI,
    15.5,
    "24 GB and more; 16 and 12 GB with parts in RAM",
)
BF16 = _weight(
    "LongCat_TI2V_comfy_bf16.safetensors",
    "diffusion_models",
    KIJAI,
    27.2,
    "in place of the file above: 32 GB and more; 24, 16 and 12 GB with parts in RAM",
)
TEXT = _weight(
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "text_encoders",
    f"{COMFY}text_encoders/",
    6.74,
    "any; used before the model",
)
VAE = _weight("wan_2.1_vae.safetensors", "vae", f"{COMFY}vae/", 0.25, "any")
DISTILL = _weight(
    "LongCat_distill_lora_alpha64_bf16.safetensors", "loras", KIJAI, 1.26, "any; for 16 steps in place of 50"
)
REFINEMENT = _weight(
    "LongCat_refinement_lora_rank128_bf16.safetensors", "loras", KIJAI, 2.47, "any; for refining to 720p"
)
AVATAR = _weight(
    "LongCat-Avatar-15_bf16.safetensors",
    "diffusion_models",
    f"{WAN}LongCat/",
    31.7,
    "for avatars: 40 GB and more; less with parts in RAM or as fp8 rowwise",
)
DMD = _weight(
    "LongCat-Avatar-15_dmd_distill_lora_rank128_bf16.safetensors",
    "loras",
    f"{WAN}LongCat/",
    1.26,
    "any; for avatars in 8 steps",
)
WHISPER = _weight(
    "whisper_large_v3_encoder_fp16.safetensors",
    "audio_encoders",
    f"{WAN}HuMo/",
    1.7,
    "any; for avatars, used before the model",
)
BASE = (FP8, BF16, TEXT, VAE)
TALKING = (TEXT, VAE, AVATAR, DMD, WHISPER)
ALL = (*BASE, DISTILL, REFINEMENT, AVATAR, DMD, WHISPER)


def table(weights: Iterable[Weight]) -> str:
    """A Markdown table: file with its link, size, folder in `models`, cards."""
    rows = ["| file | size | folder in models | card |", "| --- | --- | --- | --- |"]
    rows += [f"| [{w.name}]({w.url}) | {w.gigabytes:g} GB | {w.directory} | {w.suits} |" for w in weights]
    return "\n".join(rows)
