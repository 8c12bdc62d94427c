"""Prompts in API form on the embedded model."""

from __future__ import annotations

from typing import Any

FILES = {
    "model": "longcat_nano_bf16.safetensors",
    "text": "longcat_nano_umt5_bf16.safetensors",
    "vae": "longcat_nano_vae_bf16.safetensors",
}
FPS = 15


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def text_to_video(prompt: str, *, seed: int = 0, steps: int = 50, frames: int = 33, **sampler: Any) -> dict[str, Any]:
    """The whole chain, saved by node "save"; the sampler is node "sampler"."""
    return {
        "model": node("LongCatModelLoader", model_name=FILES["model"], weight_dtype="default"),
        "text": node("LongCatTextEncoderLoader", text_encoder_name=FILES["text"], device="default"),
        "vae": node("VAELoader", vae_name=FILES["vae"]),
        "positive": node("CLIPTextEncode", text=prompt, clip=["text", 0]),
        "negative": node("CLIPTextEncode", text="", clip=["text", 0]),
        "latent": node("EmptyHunyuanLatentVideo", width=96, height=64, length=frames, batch_size=1),
        "sampler": node(
            "LongCatSampler",
            **{
                "model": ["model", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": steps,
                "guidance": 4.0,
                "mode": "base",
                **sampler,
            },
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "video": node("CreateVideo", images=["decode", 0], fps=FPS),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="video/longcat", format="mp4", codec="h264"),
    }


def long_video(prompts: str, folder: str, *, steps: int, **settings: Any) -> dict[str, Any]:
    """Node "long" makes segments of 9 frames in a folder of the output folder; they are saved by node "save"."""
    whole = text_to_video("")
    inputs = {"width": 96, "height": 64, "length": 9, "overlap": 5, "seed": 1, "steps": steps, "guidance": 4.0}
    inputs |= {"segments": 0, "mode": "base", "hand_off": "frames", "negative_prompt": "", "folder": folder}
    inputs |= {"prompts": prompts, "model": ["model", 0], "clip": ["text", 0], "vae": ["vae", 0], **settings}
    kept = {name: whole[name] for name in ("model", "text", "vae", "video", "save")}
    kept["video"]["inputs"]["images"] = ["long", 0]
    return kept | {"long": node("LongCatLongVideo", **inputs)}
