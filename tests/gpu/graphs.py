"""The prompt of a cell in API form: ComfyUI's nodes and the pack's, on the embedded model's text encoder and VAE."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from longcat_core.optimize.switches import Optimizations

from ..comfyui.prompts import FPS, node, text_to_video
from .cells import (
    BYPASS,
    COMPILE,
    CONTINUATION,
    EASY,
    I2V,
    KSAMPLER,
    LAZY,
    LONG,
    LONGCAT,
    LORA,
    NONE,
    REFINE,
    REFINE_LONG,
    SPARSE,
    STEP,
    SWITCHES,
    T2V,
    Cell,
)

Prompt = dict[str, dict[str, Any]]

SCENE = "a red circle moves right on a gray background"
LORA_FILE = "matrix_lora.safetensors"
SIZE = {"width": 96, "height": 64}
FRAMES, GIVEN, SEED = 17, 5, 1
# A video from text is scored, which takes a clear picture; other tasks are compared only.
STEPS = {T2V: 16}
FEW = 6
CACHE = {"reuse_threshold": 0.3, "start_percent": 0.15, "end_percent": 1.0, "verbose": False}


def patched(extra: str) -> dict[str, Any] | None:
    """The node "patched" that changes the MODEL of node "model"; None for none."""
    model = ["model", 0]
    if extra in (LORA, BYPASS):
        return node(extra, model=model, lora_name=LORA_FILE, strength_model=1.0)
    if extra == COMPILE:
        return node(extra, model=model, backend="inductor")
    if extra in (EASY, LAZY):
        return node(extra, model=model, **CACHE)
    if extra == SPARSE:
        return node("LongCatBlockSparseAttention", model=model, sparsity=0.5, cdf_threshold=0.0, chunk="4x4x4")
    if extra == STEP:
        return node("LongCatStepCache", model=model, threshold=0.05)
    if extra != NONE:
        name = extra.partition("=")[0]
        return node("LongCatOptimizations", model=model, **asdict(Optimizations()) | {name: SWITCHES[name]})
    return None


def sampled(cell: Cell, steps: int, *, refine: bool = False) -> Prompt:
    """The nodes that turn ["latent", 0] into ["sampler", 0]."""
    guidance, mode = (1.0, "refine") if refine else (4.0, "base")
    prompts = {"positive": ["positive", 0], "negative": ["negative", 0]}
    model = {"model": ["patched", 0]}
    if cell.sampler == LONGCAT:
        inputs = {**model, **prompts, "latent_image": ["latent", 0], "seed": SEED, "steps": steps}
        return {"sampler": node("LongCatSampler", **inputs, guidance=guidance, mode=mode)}
    if cell.sampler == KSAMPLER:
        inputs = {**model, **prompts, "latent_image": ["latent", 0], "seed": SEED, "cfg": guidance}
        inputs |= {"sampler_name": "euler", "scheduler": "simple"}
        # In mode refine, steps count those of the whole schedule, of which the second half is computed.
        inputs |= {"steps": steps // 2, "denoise": 0.5} if refine else {"steps": steps, "denoise": 1.0}
        return {"sampler": node("KSampler", **inputs)}
    return custom(
        node("LongCatGuider", **model, **prompts, guidance=guidance),
        node("LongCatScheduler", **model, mode=mode, steps=steps),
    )


def custom(guider: dict[str, Any], sigmas: dict[str, Any]) -> Prompt:
    """SamplerCustomAdvanced on the node "latent", by euler."""
    return {
        "noise": node("RandomNoise", noise_seed=SEED),
        "guider": guider,
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": sigmas,
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }


def latent(task: str) -> Prompt:
    """The node "latent" of a task, and what it is made from."""
    clip = {"clip": node("LongCatSampleClip", scene=SCENE)}
    if task == T2V:
        return {"latent": node("EmptyHunyuanLatentVideo", **SIZE, length=FRAMES, batch_size=1)}
    if task == I2V:
        inputs = {"image": ["clip", 0], "resolution": "custom", **SIZE, "length": FRAMES}
        return clip | {"latent": node("LongCatImageToVideo", vae=["vae", 0], **inputs)}
    if task == CONTINUATION:
        inputs = {"video": ["clip", 1], "cond_frames": GIVEN, "resolution": "custom", **SIZE, "length": FRAMES}
        return clip | {"latent": node("LongCatVideoContinuation", vae=["vae", 0], **inputs, fps=float(FPS))}
    short = {"short": node("ImageFromBatch", image=["clip", 1], batch_index=0, length=9)}
    inputs = {"video": ["short", 0], "double_rate": True, "resolution": "custom", **SIZE, "fps": float(FPS)}
    return clip | short | {"latent": node("LongCatRefine", vae=["vae", 0], **inputs)}


def watched(images: list[Any], name: str) -> Prompt:
    """Node "save" keeps every frame without loss."""
    options = {"fps": float(FPS), "lossless": True, "quality": 80, "method": "fastest"}
    return {"save": node("SaveAnimatedWEBP", images=images, filename_prefix=name, **options)}


def nano(cell: Cell, loader: dict[str, Any], folder: str) -> Prompt:
    """The prompt of a cell. loader: the node that loads its weights; folder: where a long video is kept, new for each
    run, because finished pieces are not made again."""
    base = text_to_video(SCENE)
    prompt = {name: base[name] for name in ("text", "vae", "positive", "negative")} | {"model": loader}
    change = patched(cell.extra)
    prompt |= {"patched": change} if change else {}
    if cell.task == LONG:
        inputs = {**SIZE, "length": 9, "overlap": 5, "seed": SEED, "steps": FEW, "guidance": 4.0, "segments": 2}
        inputs |= {"mode": "base", "hand_off": "frames", "negative_prompt": "", "prompts": SCENE, "folder": folder}
        shared = {"model": ["patched", 0], "clip": ["text", 0], "vae": ["vae", 0]}
        prompt |= {"long": node("LongCatLongVideo", **shared, **inputs)} | watched(["long", 0], folder)
    elif cell.task == REFINE_LONG:
        inputs = {"seed": SEED, "steps": 12, "double_rate": True, "resolution": "custom", **SIZE, "prompt": ""}
        inputs |= {"piece": 9, "overlap": 5, "folder": folder, "fps": float(FPS)}
        shared = {"model": ["patched", 0], "clip": ["text", 0], "vae": ["vae", 0], "video": ["short", 0]}
        prompt |= {
            "clip": node("LongCatSampleClip", scene=SCENE),
            "short": node("ImageFromBatch", image=["clip", 1], batch_index=0, length=13),
            "long": node("LongCatRefineLongVideo", **shared, **inputs),
        } | watched(["long", 0], folder)
    else:
        refine = cell.task == REFINE
        steps = 12 if refine else STEPS.get(cell.task, FEW)
        prompt |= latent(cell.task) | sampled(cell, steps, refine=refine)
        prompt |= {"decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])}
        prompt |= watched(["decode", 0], folder)
    return prompt if change else relinked(prompt, ["patched", 0], ["model", 0])


def relinked(prompt: Prompt, old: list[Any], new: list[Any]) -> Prompt:
    """The prompt with every link to `old` led to `new`."""
    return {
        name: {**part, "inputs": {key: new if value == old else value for key, value in part["inputs"].items()}}
        for name, part in prompt.items()
    }
