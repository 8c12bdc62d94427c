"""What is generated both headless and in ComfyUI. Read by two Pythons: nothing but numpy here."""

from __future__ import annotations

import numpy as np

PROMPT = "a red circle moves right on a blue background"
NEGATIVE = "a green square stands still on a white background"
HEIGHT, WIDTH, FRAMES = 64, 96, 33
COND_FRAMES = 13

# name -> arguments of GenerateRequest beside prompt, size and given frames; `given`: frames of `clip` at the front.
CASES = {
    "text": {"seed": 7, "steps": 6, "guidance_scale": 4.0, "schedule": "base"},
    "distilled": {"seed": 3, "steps": 4, "guidance_scale": 1.0, "schedule": "distilled"},
    "image": {"seed": 11, "steps": 6, "guidance_scale": 4.0, "schedule": "base", "given": 1},
    "image_uncached": {
        "seed": 11,
        "steps": 6,
        "guidance_scale": 4.0,
        "schedule": "base",
        "given": 1,
        "kv_cache": "off",
    },
    "clip": {"seed": 5, "steps": 4, "guidance_scale": 3.0, "schedule": "enhance_hf", "given": 17},
    "clip_uncached": {
        "seed": 5,
        "steps": 4,
        "guidance_scale": 3.0,
        "schedule": "enhance_hf",
        "given": 17,
        "kv_cache": "off",
    },
    "clip_official": {
        "seed": 5,
        "steps": 4,
        "guidance_scale": 3.0,
        "schedule": "enhance_hf",
        "given": 17,
        "kv_cache": "official",
    },
}


def clip(frames: int = 17, height: int = 70, width: int = 110) -> np.ndarray:
    """A disc that moves over a plain ground, uint8 [F, H, W, 3]; not of the model's size, so that it is resized."""
    rows, columns = np.mgrid[:height, :width]
    video = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        inside = (rows - height // 2) ** 2 + (columns - 25 - 3 * i) ** 2 < 15**2
        video[i] = np.where(inside[..., None], (220, 40, 30), (30, 60, 200))
    return video
