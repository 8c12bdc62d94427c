"""Inputs that several nodes share, and the choices that nodes have of their own. Does not import ComfyUI."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args, get_type_hints

from ..longcat_core.generate.options import FRAME_MULTIPLE, SCHEDULES, option
from ..longcat_core.generate.speeds import prices_in_words
from ..longcat_core.nano.avatar import world
from ..longcat_core.nano.world import Actor, Scene, caption
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.buckets import BUCKETS
from .fields import Socket, Widget, own, shared

CUSTOM, TWICE = "custom", "twice the size"
CONTINUATION = "base, then enhance_hf"
# Mode of LongCat Long Video -> schedules of the first segment and of the others.
LONG_MODES = {CONTINUATION: ("base", "enhance_hf"), "base": ("base", "base"), "distilled": ("distilled", "distilled")}
# Frames, rows and columns of tokens; a token covers 16x16 pixels of one latent frame.
CHUNKS = {"4x4x4": (4, 4, 4), "4x4x8": (4, 4, 8), "8x4x4": (8, 4, 4)}
MODES = (*SCHEDULES, "refine")
# What LongCat Sample Clip shows, under the prompt for it.
SAMPLES = {
    caption(scene): scene
    for scene in (
        Scene("gray", (Actor("circle", "red", "right"),)),
        Scene("black", (Actor("square", "yellow", "up"),)),
        Scene("blue", (Actor("triangle", "white", "left"), Actor("cross", "orange", "down"))),
    )
}

# What LongCat Sample Speech shows, likewise.
SPEAKING = {
    world.caption(scene): scene
    for scene in (
        world.Scene("blue", (world.Face("circle", "red"),)),
        world.Scene("black", (world.Face("square", "orange"),)),
        world.Scene("gray", (world.Face("circle", "red"), world.Face("square", "green"))),
        world.Scene("white", (world.Face("square", "cyan"), world.Face("circle", "yellow", talks=False))),
    )
}

# Of LongCat-Video-Avatar.
VERSIONS = ("1.0", "1.5")
MODEL = Socket("model", "Model", "LongCat-Video")
VAE = Socket("vae", "Vae", "the Wan 2.1 VAE")
CLIP = Socket("clip", "Clip", "UMT5, from LongCat Text Encoder Loader or from Load CLIP of type wan")
POSITIVE = Socket("positive", "Conditioning", "prompt: what the video shows")
NEGATIVE = Socket("negative", "Conditioning", "negative prompt: what the video should avoid; not used at guidance 1")
MODE = own(
    "mode",
    "choice",
    "noise schedule. base: 50 steps, guidance 4. distilled: 16 steps, guidance 1, with the cfg_step LoRA. enhance_hf: "
    "base with finer late steps, for continuation. refine: base from noise level 0.5 on, guidance 1, with the "
    "refinement LoRA",
    MODES[0],
    choices=MODES,
)
# 64 bits, as in ComfyUI's own nodes.
SEED = replace(shared("seed", most=2**64 - 1), new_seed=True)
# Not drawn again after each run: with a new seed, a run would not resume the saved segments.
FIRST_SEED = replace(shared("seed", "refine", help="seed of the first piece's noise; later pieces count up from it. "
                          "Another seed begins another take"), new_seed=False)  # fmt: skip
# The schedule "distilled" of an avatar of one version, beside that of any model; 1.5 has no other number of steps.
DISTILLED_OLDER, DISTILLED_NEWER = {f"distilled {VERSIONS[0]}": (16, 50)}, {f"distilled {VERSIONS[1]}": (8, 8)}
STEPS = shared(
    "steps",
    help="number of denoising steps: 50, or 16 for distilled, which is exactly 8 of an avatar 1.5. For 50 steps, "
    "enhance_hf evaluates the model 56 times and refine 5 times",
    shown="",
    schedules=option("steps").schedules | DISTILLED_NEWER,
)
GUIDANCE = shared(
    "guidance",
    help="CFG-zero scale: 4, or 1 for distilled and refine; 1 turns guidance off and takes half the time",
    shown="",
)
KV_CACHE = shared("kv_cache", optional=True, advanced=True)
GUIDANCE_UNTIL = shared("guidance_until", optional=True, advanced=True)
SPEED = shared(
    "speed",
    optional=True,
    help=f"exact, or a set of lossy options that was measured: {prices_in_words()}. It works on a copy of the MODEL. "
    "Nodes in front that set the same (LongCat Sparse Attention, LongCat Step Cache, LongCat Optimizations) and a "
    "guidance_until below 1 take precedence; fp8 of a set takes a MODEL that was loaded with weight_dtype fp8 rowwise",
)
WIDTH, HEIGHT = shared("width"), shared("height")
LENGTH = shared("frames", name="length", least=1 + FRAME_MULTIPLE)
BATCH_SIZE = own("batch_size", "whole", "number of videos generated together, each from its own noise", 1, least=1,
                  most=64, optional=True, advanced=True)  # fmt: skip
DOUBLE_RATE = own("double_rate", "switch", "double the frame rate as well; off: enlarge the picture only", True)


def _sizes(choices: tuple[str, ...], help: str, width: Widget, height: Widget) -> tuple[Widget, ...]:
    """resolution, width and height; the first choice is the default, and `custom` is added."""
    sides = (replace(side, row=replace(side.row, help=f"{side.row.help}; only for resolution custom"),
                     only_for=("resolution", CUSTOM)) for side in (width, height))  # fmt: skip
    help = f"{help}. custom: width and height below"
    return own("resolution", "choice", help, choices[0], choices=(*choices, CUSTOM)), *sides


GIVEN_SIZES = (
    *_sizes(
        tuple(BUCKETS),
        "480p or 720p: the trained size that is closest in aspect ratio; what does not fit is cropped evenly",
        WIDTH,
        HEIGHT,
    ),
    LENGTH,
    BATCH_SIZE,
)
REFINED_SIZES = _sizes(
    ("720p", TWICE),
    "720p: the 720p size that is closest in aspect ratio. twice the size: for LongCat-nano",
    *(
        replace(side, row=replace(side.row, default=pixels, nano=None))
        for side, pixels in ((WIDTH, 1280), (HEIGHT, 704))
    ),
)


def clip_rate(name: str, clip: str, taken: str) -> Widget:
    """The frame rate of the frames that are connected to `clip`; taken: at which rate they are used."""
    return shared(
        "fps",
        name=name,
        optional=True,
        least=0.1,
        most=1000.0,
        help=f"frame rate of {clip} if it is frames, for instance the fps of Get Video Components; they are taken by "
        f"their time, {taken}",
    )


LOSSY_CHANGE = shared("lossy_change", "long", optional=True, advanced=True)


def folder(default: str) -> Widget:
    return own("folder", "text", "folder inside ComfyUI's output folder that keeps every finished piece; queue the "
                "same workflow again to resume, even after a crash. Other settings begin another take in it. "
                "%date:yyyy-MM-dd% and %Node.widget% may be in it, as in Save Video's filename_prefix; with a time in "
                "it, no run resumes", default)  # fmt: skip


_OPTIMIZATIONS = {
    "fused_qkv": "compute q, k and v in one matrix product instead of three; exact",
    "fused_ffn": "compute the FFN's gate and up projections in one matrix product instead of two; exact",
    "text_mode": "how to treat the text's padding. exact: as one text token, which is as fast as dropping it and gives "
    "the released model's result. padded: token by token, the same result but slower. packed: dropped, which changes "
    "the released model's result",
    "attention": "attention backend. auto: the fastest exact one. cudnn-fp8 and sage are faster and lossy",
    "compile": "what to compile with torch.compile. blocks: the transformer blocks; the first step takes about a "
    "minute longer, later steps are faster",
    "explicit_fp32": "compute norms and gates in fp32 by explicit casts; off: by autocast, as public implementations "
    "do",
    "gradient_checkpointing": "for training only: recompute activations in the backward pass, with less memory and "
    "more time",
    "reuse_text": "compute the text's keys and values once for each prompt instead of at every step, under LongCat "
    "Sampler and LongCat Guider; exact",
    "reuse_modulation": "compute the timestep's modulation once for all frames and both halves of guidance; exact",
    "fused_step": "compile guidance into one function where compile is on, under LongCat Sampler and LongCat Guider",
    "fp8": "compute layers that were quantized to fp8 in 8-bit matrix products; off: the same weights in 16-bit "
    "products",
    "fused_kernels": "run norms, RoPE, gates and activations in our Triton kernels, on CUDA and in 16 bits; the same "
    "mathematics with different rounding",
    "split_guidance": "run the two halves of guidance one after the other: half the memory for activations, at about "
    "the same speed for large videos. Off: ComfyUI decides by its own estimate",
    "fused_text": "run attention to the text in our Triton kernel, on CUDA and in 16 bits, unless the prompt is very "
    "long; the same mathematics with different rounding",
    "exchange": "how GPUs that share the tokens of a video, under LongCat Multi-GPU, send them to each other. exact: "
    "into each other's memory where they reach it, else by messages. int8: by messages of half the size, lossy",
}
# What people choose by themselves; the other switches are on wherever they help.
_CHOSEN = ("attention", "compile", "fp8", "fused_kernels", "split_guidance")
# Added after workflows with this node had been saved without them.
_ADDED = (
    *("reuse_text", "reuse_modulation", "fused_step", "fp8", "fused_kernels", "split_guidance", "fused_text"),
    "exchange",
)


def switches() -> tuple[Widget, ...]:
    """One input for each optimization, in the order of its fields."""
    kinds = get_type_hints(Optimizations)
    return tuple(
        own(field.name, "switch" if kinds[field.name] is bool else "choice", _OPTIMIZATIONS[field.name], field.default,
             choices=get_args(kinds[field.name]), optional=field.name in _ADDED, advanced=field.name not in _CHOSEN)
        for field in fields(Optimizations)
    )  # fmt: skip
