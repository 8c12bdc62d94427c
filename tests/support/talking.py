"""A tiny avatar of random weights with its audio encoder, as files, and what it is given: sounds and an image."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from longcat_core.checkpoints.formats import OFFICIAL
from longcat_core.checkpoints.load import official_state
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.nano.avatar.ear import save_ear
from longcat_core.nano.avatar.recipe import AUDIO
from longcat_core.optimize.optimized import OptimizedTransformer

from .clips import SOUND_RATE
from .sounds import sweep, write_sound
from .tiny import moving_clip, tiny_config

AVATAR, EAR = "tiny_avatar.safetensors", "tiny_whisper.safetensors"
SPEECH, ANSWER, FACE = "speech.wav", "answer.wav", "face.png"
SECONDS, HEIGHT, WIDTH = 1.5, 64, 96
# Of the bundled text encoder.
TEXT_CHANNELS = 128
CONFIG = tiny_config(caption_channels=TEXT_CHANNELS, audio=AUDIO)
# A LoRA of it that changes little.
TINY_LORA = {
    "diffusion_model.blocks.0.self_attn.o.lora_A.weight": torch.full((2, CONFIG.hidden_size), 1e-3),
    "diffusion_model.blocks.0.self_attn.o.lora_B.weight": torch.full((CONFIG.hidden_size, 2), 1e-3),
}


def write_avatar(models: Path, inputs: Path) -> None:
    """models: ComfyUI's folder of that name. inputs: where sounds and images are chosen from."""
    torch.manual_seed(0)
    network = OptimizedTransformer(CONFIG)
    weights, ears = models / "diffusion_models", models / "audio_encoders"
    for folder in (weights, ears):
        folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights / AVATAR, official_state(network, OFFICIAL))
    save_ear(ears / EAR)
    for sound, seconds in ((SPEECH, SECONDS), (ANSWER, SECONDS / 2)):
        write_sound(inputs / sound, sweep(seconds, 1, SOUND_RATE), "pcm_s16le")
    Image.fromarray(moving_clip(1, HEIGHT, WIDTH)[0]).save(inputs / FACE)
