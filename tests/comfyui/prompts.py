"""Prompts in API form on the embedded model."""

from __future__ import annotations

from typing import Any

from ..support.talking import ANSWER, AVATAR, EAR, FACE, HEIGHT, SPEECH, WIDTH

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


# Of a segment of the tiny avatar.
AVATAR_SIZE = {"resolution": "custom", "width": WIDTH, "height": HEIGHT, "length": 17, "overlap": 5}


def avatar(prompt: str, *, image: bool = True, people: int = 1, segment: int = 0, **sampler: Any) -> dict[str, Any]:
    """One segment of the tiny avatar (`support.talking`), with its sound saved by node "save"."""
    whole = text_to_video(prompt, steps=8, guidance=1.0, mode="distilled", **sampler)
    for name in ("positive", "negative"):
        whole["sampler"]["inputs"][name] = ["latent", ("positive", "negative").index(name)]
    whole["sampler"]["inputs"]["latent_image"] = ["latent", 2]
    whole["model"]["inputs"]["model_name"] = AVATAR
    size = {name: AVATAR_SIZE[name] for name in ("length", "overlap")}
    given = {"positive": ["positive", 0], "negative": ["negative", 0], "vae": ["vae", 0], "voices": ["voices", 0]}
    made = whole | {
        "ear": node("LongCatAudioEncoderLoader", audio_encoder_name=EAR),
        "audio": node("LoadAudio", audio=SPEECH),
        "voices": node("LongCatEncodeAudio", audio_encoder=["ear", 0], audio=["audio", 0], **size),
        "latent": node("LongCatAvatar", **given, **AVATAR_SIZE, segment=segment, audio_guidance=1.0),
        "video": node("CreateVideo", images=["decode", 0], audio=["latent", 3], fps=["latent", 4]),
    }
    if image:
        made["image"] = node("LoadImage", image=FACE)
        made["latent"]["inputs"]["image"] = ["image", 0]
    if people == 2:
        made["boxes"] = node("LongCatAvatarBoxes", image=["image", 0], **BOXES)
        made["audio_2"] = node("LoadAudio", audio=ANSWER)
        made["voices"]["inputs"] |= {"audio_2": ["audio_2", 0], "order": "together"}
        made["latent"]["inputs"] |= {"person_1": ["boxes", 0], "person_2": ["boxes", 1]}
    return made


BOXES = {"left_1": 5, "top_1": 10, "right_1": 45, "bottom_1": 90, "left_2": 55, "top_2": 10, "right_2": 95,
         "bottom_2": 90}  # fmt: skip


def avatar_long(prompts: str, folder: str, **settings: Any) -> dict[str, Any]:
    """Node "long" makes the tiny avatar say the whole sound, saved by node "save"."""
    whole = avatar("")
    inputs = {"model": ["model", 0], "clip": ["text", 0], "vae": ["vae", 0], "audio_encoder": ["ear", 0]}
    inputs |= {"audio": ["audio", 0], "image": ["image", 0], "prompts": prompts, "negative_prompt": "", **AVATAR_SIZE}
    inputs |= {"segments": 0, "seed": 1, "steps": 8, "guidance": 1.0, "audio_guidance": 1.0, "mode": "distilled"}
    kept = {name: whole[name] for name in ("model", "text", "vae", "ear", "audio", "image", "save")}
    kept["save"]["inputs"]["video"] = ["long", 2]
    return kept | {"long": node("LongCatAvatarLongVideo", **inputs | {"folder": folder, **settings})}
