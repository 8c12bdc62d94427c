"""The rows of docs/comfyui.md's table of stock nodes that no axis of the matrix has, as prompts in every VRAM mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..comfyui.prompts import FPS, node
from .cells import KSAMPLER, LONGCAT, NONE, T2V, Cell
from .graphs import FEW, SEED, SIZE, Prompt, custom, nano, relinked
from .weights import AXIS

WINDOWS = {
    "context_length": 9,
    "context_overlap": 4,
    "context_schedule": "standard_static",
    "context_stride": 1,
    "closed_loop": False,
    "fuse_method": "pyramid",
    "dim": 2,
    "freenoise": False,
    "cond_retain_index_list": "",
    "latent_retain_index_list": "",
    "split_conds_to_windows": False,
    "causal_window_fix": True,
}
SKIPPED = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0}
TRAINED = {"training_dtype": "fp32", "lora_dtype": "fp32", "steps": 2, "learning_rate": 0.01, "rank": 4}
TRAINED |= {"batch_size": 1, "grad_accumulation_steps": 1, "optimizer": "AdamW", "loss_function": "MSE", "seed": SEED}
TRAINED |= {"algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1, "existing_lora": "[None]"}
TRAINED |= dict.fromkeys(("quantized_backward", "offloading", "bucket_mode", "bypass_mode"), False)
SAVED = "diffusion_models/matrix_saved"


def plain(folder: str, sampler: str = KSAMPLER) -> Prompt:
    """A video from text in a few steps."""
    prompt = nano(Cell("bf16", sampler, "", NONE, T2V), AXIS["bf16"].node(), folder)
    for part in prompt.values():
        if "steps" in part["inputs"]:
            part["inputs"]["steps"] = FEW
    return prompt


def with_model(folder: str, sampler: str, kind: str, **inputs: Any) -> Prompt:
    """The same with a patch on the MODEL."""
    prompt = relinked(plain(folder, sampler), ["model", 0], ["patched", 0])
    return prompt | {"patched": node(kind, model=["model", 0], **inputs)}


def cfg_guider(folder: str) -> Prompt:
    prompt = plain(folder)
    texts = {"positive": ["positive", 0], "negative": ["negative", 0]}
    return prompt | custom(
        node("CFGGuider", model=["model", 0], **texts, cfg=4.0),
        node("BasicScheduler", model=["model", 0], scheduler="simple", steps=FEW, denoise=1.0),
    )


def model_save(folder: str) -> tuple[Prompt, Prompt]:
    """Saved by the first prompt, read back by the second."""
    save = {"model": AXIS["bf16"].node(), "saved": node("ModelSave", model=["model", 0], filename_prefix=SAVED)}
    prompt = plain(folder, LONGCAT)
    name = f"{SAVED.partition('/')[2]}_00001_.safetensors"
    prompt["model"] = node("UNETLoader", unet_name=name, weight_dtype="default")
    return save, prompt


def train(folder: str) -> tuple[Prompt, Prompt]:
    """Two steps of training on a latent, after sampling; then a video with the LoRA that came of it."""
    prompt = plain(folder)
    train = node("TrainLoraNode", model=["model", 0], latents=["sampler", 0], positive=["positive", 0], **TRAINED)
    again = {**prompt["sampler"], "inputs": {**prompt["sampler"]["inputs"], "model": ["with", 0]}}
    return (
        plain(folder),
        prompt
        | {
            "train": train,
            "with": node("LoraModelLoader", model=["model", 0], lora=["train", 0], strength_model=1.0, bypass=False),
            "again": again,
            "decode": node("VAEDecode", samples=["again", 0], vae=["vae", 0]),
        },
    )


def tiled(folder: str) -> Prompt:
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    return plain(folder) | {"decode": node("VAEDecodeTiled", samples=["sampler", 0], vae=["vae", 0], **tiles)}


def saved_video(folder: str) -> Prompt:
    return plain(folder) | {
        "video": node("CreateVideo", images=["decode", 0], fps=FPS),
        "save": node("SaveVideo", video=["video", 0], filename_prefix=folder, format="mp4", codec="h264"),
    }


# Row -> prompts, run in order; the video of the last one's node "save" is compared.
ROWS: dict[str, Callable[[str], Prompt | tuple[Prompt, ...]]] = {
    "CFGGuider, BasicScheduler": cfg_guider,
    # Other noise levels than LongCat's shift of 12 gives. At 3, six steps end in a gray video, on a CPU too.
    "ModelSamplingSD3": lambda folder: with_model(folder, KSAMPLER, "ModelSamplingSD3", shift=8.0),
    "CFGZeroStar": lambda folder: with_model(folder, KSAMPLER, "CFGZeroStar"),
    "ContextWindowsManual": lambda folder: long_enough(with_model(folder, KSAMPLER, "ContextWindowsManual", **WINDOWS)),
    "SkipLayerGuidanceDiT": lambda folder: with_model(
        folder, KSAMPLER, "SkipLayerGuidanceDiT", double_layers="2", single_layers="", **SKIPPED
    ),
    "ModelSave": model_save,
    "TrainLoraNode": train,
    "VAEDecodeTiled": tiled,
    "CreateVideo, SaveVideo": saved_video,
}


def long_enough(prompt: Prompt) -> Prompt:
    """With more latent frames than a context window has."""
    return prompt | {"latent": node("EmptyHunyuanLatentVideo", **SIZE, length=45, batch_size=1)}


def prompts(row: str, folder: str) -> tuple[Prompt, ...]:
    made = ROWS[row](folder)
    return made if isinstance(made, tuple) else (made,)
