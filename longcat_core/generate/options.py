"""The table of options: one row each. The command line, the nodes, their help pages and the README read it.

Imports nothing heavy, so that `longcat --help` answers at once. `cli/options.py` turns rows into arguments of commands,
`nodes/declarations.py` into inputs of nodes, and `docs/build.py` into the tables of the pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .speeds import AVATAR, BASE, EXACT, SPEEDS, prices_in_words

Kind = Literal["whole", "number", "switch", "text", "choice", "size", "path", "lora"]

# A token is 2x2 latents, a latent 8x8 pixels; one latent frame stands for four frames.
SIDE_MULTIPLE, FRAME_MULTIPLE = 16, 4
MAX_SIDE = 4096
MAX_FRAMES = 2001
MAX_STEPS = 1000
MAX_GUIDANCE = 30.0
MAX_STEP_CACHE = 1.0
USEFUL_STEP_CACHE = 0.12
MAX_FPS = 120.0
# Frames per second of the videos that the models were trained on.
FPS = 15.0
MAX_SEED = 2**63 - 1
MAX_SEGMENTS = 999
SCHEDULES = ("base", "distilled", "enhance_hf")
KV_CACHE = ("exact", "official", "off")
HAND_OFFS = ("frames", "latents")
VOICE_MODES = ("para", "add")
LORA_MODES = ("merged", "runtime")
LOSSY_CHANGES = ("new take", "go on")
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILE = ("off", "blocks")
EXCHANGES = ("exact", "messages", "int8")
# Those of `optimize.sparse.settings`, which imports PyTorch's package.
SPARSE_KERNELS = ("auto", "fa4", "cudnn", "cudnn-fp8", "sol", "triton", "plain")
CHECKPOINT_FORMS = ("bf16", "comfyui-fp8", "int8")

WHAT, SAMPLING, MODEL, MEMORY, OUTPUT = "what is generated", "sampling", "model", "memory", "output"
COMPARED, REFINED, LEARNED, TRAINING = "what is compared", "what is refined", "what is learned", "training"
CALIBRATED, TESTED = "what is calibrated", "what is tested"
# What options work on that is not an option.
A_GPU, SEVERAL, GUIDANCE, MORE, TWO = "a GPU", "a second GPU", "guidance", "a second segment", "a second sound"
_GIVEN = f"image or video or {MORE}"
# What a heading of --help adds to its name.
HEADINGS = {
    MODEL: "model (default: the bundled LongCat-nano)",
    MEMORY: "memory (default: as little of this as the GPU's free memory requires)",
}


@dataclass(frozen=True)
class Option:
    """One row: `name` is `--name` of a command and, unless a node renames it, the name of a node's input.

    help: one sentence, without its final period. default: of the released model. nano: of the bundled model where that
    differs. filled: the command passes None and the request fills in the default, because it depends on the model or
    on other options. shown: words for the default where its value does not say enough. least, most, step: the range of
    a number. digits: decimals that a node rounds to. schedules: default and largest value that fits of the schedules
    where these differ. commands, heading: which commands list it, under which heading.
    common: it is in the README's table. needs: what it works on, all of which a run must have: options by their names,
    joined by "or" where one is enough, or A_GPU, SEVERAL, GUIDANCE, MORE, TWO.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None
    nano: Any = None
    filled: bool = False
    shown: str = ""
    least: float | None = None
    most: float | None = None
    step: float | None = None
    digits: int | None = None
    schedules: dict[str, tuple[float, float]] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    short: str = ""
    repeated: bool = False
    required: bool = False
    common: bool = False
    needs: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    heading: str = ""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def sentence(self) -> str:
        """`help` as a whole sentence."""
        return f"{self.help[0].upper()}{self.help[1:]}."

    def default_words(self, nano: bool = False) -> str:
        """The default of the released model or of nano as text; empty if it has none."""
        value = self.nano if nano and self.nano is not None else self.default
        if self.shown and not (nano and self.nano is not None):
            return self.shown
        if value is None or value == "":
            return ""
        return words(value)

    def range_words(self) -> str:
        """Which values it takes, in words; "" for text, files and switches."""
        if self.choices:
            return ", ".join(self.choices)
        if self.least is None and self.most is None:
            return ""
        most = "2^63 - 1" if self.most == MAX_SEED else "" if self.most is None else words(self.most)
        least = "" if self.least is None else words(self.least)
        found = f"{least} to {most}" if most and least else f"from {least}" if least else f"up to {most}"
        return found + (f", steps of {words(self.step)}" if self.step and self.kind == "whole" else "")


def words(value: Any) -> str:
    """A value as people write it: 480x832, 0.05, on."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "x".join(str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def of_command(command: str, *headings: str) -> list[Option]:
    """The rows of a command, of these headings or of all."""
    return [row for row in OPTIONS if command in row.commands and (not headings or row.heading in headings)]


def option(name: str, command: str = "generate") -> Option:
    """The row `name` of a command."""
    return next(row for row in of_command(command) if row.name == name)


def _group(heading: str, commands: tuple[str, ...], *rows: Option) -> Iterator[Option]:
    """The rows under a heading; `commands` have those that name none of their own."""
    for row in rows:
        yield replace(row, heading=heading, commands=row.commands or commands)


_Columns = dict[str, Any]
_side: _Columns = {"least": SIDE_MULTIPLE, "most": MAX_SIDE, "step": SIDE_MULTIPLE, "metavar": "N", "filled": True}
_frames: _Columns = {"default": 93, "nano": 33, "least": 1, "most": MAX_FRAMES, "step": FRAME_MULTIPLE,
                     "metavar": "N", "filled": True}  # fmt: skip
_given: _Columns = {"default": 13, "least": 1, "most": MAX_FRAMES - FRAME_MULTIPLE, "step": FRAME_MULTIPLE,
                    "metavar": "N"}  # fmt: skip
_size: _Columns = {"default": (480, 832), "nano": (64, 96), "metavar": "HxW"}
_steps: _Columns = {"default": 50, "least": 1, "most": MAX_STEPS, "metavar": "N"}
_guidance: _Columns = {"default": 4.0, "least": 0.0, "most": MAX_GUIDANCE, "step": 0.1, "digits": 2, "metavar": "X"}
_share: _Columns = {"least": 0.0, "most": 1.0, "metavar": "X"}
_suffixes = ".mp4, .mkv (lossless FFV1), .webp (lossless) or .gif"
_seed = Option("seed", "whole", "seed of the noise; the same seed gives the same video on the same machine with the "
               "same number of threads", 0, least=0, most=MAX_SEED, metavar="N", common=True)  # fmt: skip
_prompts_file = Option("prompts_file", "path", "text file with one prompt a line", metavar="FILE")
_lossy_change = Option("lossy_change", "choice", "what to do where a take in the folder differs in lossy settings "
                       "alone, such as 8-bit attention: begin a new take, or go on in that one", LOSSY_CHANGES[0],
                       choices=LOSSY_CHANGES, commands=("long", "avatar"))  # fmt: skip


def _speed_help(kind: str) -> str:
    return (
        f"exact, or a set of lossy options that was measured: {prices_in_words(kind)}; an option that is given takes "
        "precedence over the set's, and what this machine lacks is left out"
    )


_speed = Option("speed", "choice", _speed_help(BASE), EXACT, filled=True, choices=SPEEDS, common=True)
_versus = Option("versus", "text", "options of another setting, on top of the options outside --versus, such as "
                 '"--step-cache 0.05"; can be repeated', metavar="OPTIONS", repeated=True)  # fmt: skip

_VIDEOS = ("generate", "long", "compare")
_SAMPLED = (*_VIDEOS, "calibrate")
_SCORE = ("score-nano",)
_SHOWN = (*_SAMPLED, "avatar")
_SKIPPED = (*_VIDEOS, *_SCORE)
_BASE = (*_SAMPLED, "refine", *_SCORE)
_AVATAR = ("avatar",)
_MODELS = (*_BASE, *_AVATAR)
_WEIGHTS = (*_MODELS, "train-lora")
_SEVERAL = (*_VIDEOS, "refine", *_AVATAR)
_COMPARE, _REFINE, _TRAIN, _LONG = ("compare",), ("refine",), ("train-lora",), ("long",)
_CALIBRATE, _TEST = ("calibrate",), ("test-gpus",)
_SPEAKING = (*_AVATAR, *_CALIBRATE, *_COMPARE)

OPTIONS: tuple[Option, ...] = (
    *_group(
        COMPARED,
        _COMPARE,
        replace(_versus, required=True),
        replace(_versus, commands=_SCORE),
        Option("audio", "path", "sound that an avatar speaks while its settings are compared, of any audio or video "
               "file; --model is LongCat-Video-Avatar then, or the nano avatar if it is left out", metavar="FILE",
               repeated=True),
        Option("floor", "text", "exact attention backend that measures the noise floor, or off", "auto",
               shown="auto, another backend than A's", metavar="NAME"),
        Option("seeds", "whole", "number of seeds for every prompt, counting up from --seed", 1, least=1, most=1000,
               metavar="N"),
        _prompts_file,
    ),
    *_group(
        CALIBRATED,
        _CALIBRATE,
        Option("audio", "path", "sound that an avatar speaks while it is measured, of any audio or video file; "
               "MODEL is LongCat-Video-Avatar then, or the nano avatar if it is left out", metavar="FILE"),
        Option("budget", "number", "error that the attention of the layers may have: how far its output is from the "
               "exact one, as a share of the exact one, the root mean square of the layers", 0.1, least=0.001, most=1.0,
               step=0.01, digits=3, metavar="X"),
        Option("prompt", "text", "prompt of a video to measure; can be repeated", shown="two built-in ones",
               filled=True, repeated=True, metavar="TEXT"),
        _prompts_file,
        Option("steps", "whole", "number of steps of each video; fewer than usual will do", filled=True,
               shown="10; distilled 16", least=1, most=MAX_STEPS, metavar="N"),
        Option("dense_steps", "number", "share of the steps, at the front, whose attention stays dense", 0.2,
               step=0.05, digits=2, **_share),
        Option("no_video", "switch", "leave out the whole video that checks the result, and its noise floor"),
    ),
    *_group(
        TESTED,
        _TEST,
        Option("device", "text", "the first device: auto, cpu, cuda or cuda:N", "auto"),
        Option("gpus", "text", "number of GPUs to compare, or auto for all that are like the first one", "auto",
               metavar="N"),
    ),
    *_group(
        WHAT,
        _SAMPLED,
        Option("audio", "path", "sound that is spoken, of any audio or video file; give it twice for two people",
               metavar="FILE", repeated=True, required=True, commands=_AVATAR),
        Option("mode", "choice", "when two people speak: para, both from the beginning, or add, the second one after "
               "the first", VOICE_MODES[0], choices=VOICE_MODES, needs=(TWO,), commands=_AVATAR),
        Option("who", "choice", "who of the two people in the two halves of the image says the first --audio; with one "
               "--audio the other one stays silent", "left", filled=True, choices=("left", "right"),
               shown="left; with one --audio, a single person", needs=("image",), commands=_AVATAR),
        Option("box", "text", "where a person is, in pixels of the image from its top left corner, in the order of "
               "--audio; give it twice or more often, and those without an --audio stay silent",
               metavar="Y0,X0,Y1,X1", repeated=True, needs=("image",), commands=_AVATAR),
        Option("mask", "path", "picture of the image's size that is white where a person is, in place of --box",
               metavar="FILE", repeated=True, needs=("image",), commands=_AVATAR),
        replace(_prompts_file, commands=(*_LONG, *_AVATAR)),
        Option("segments", "whole", "number of segments, at most as many as the sound needs; the last prompt serves "
               "all segments beyond it", shown="as many as the sound needs", filled=True, least=1, most=MAX_SEGMENTS,
               metavar="N", commands=_AVATAR),
        replace(_prompts_file, help="text file with one prompt a line: a video for each, from one load of the models; "
                "the same command again makes those that are missing", commands=("generate",), common=True),
        Option("segments", "whole", "number of segments; the last prompt serves all segments beyond it",
               shown="one for each prompt", filled=True, least=1, most=MAX_SEGMENTS, metavar="N", commands=_LONG),
        Option("negative_prompt", "text", "what the video should avoid; it has no effect at guidance 1",
               shown="the model card's list", filled=True, metavar="TEXT", common=True, commands=_SHOWN),
        Option("size", "size", "height x width in pixels, multiples of 16; with an image or a clip the real model "
               "takes the 480p size nearest in shape", filled=True, common=True, commands=_SHOWN, **_size),
        Option("height", "whole", "height in pixels, a multiple of 16", 480, 64, commands=_SHOWN, **_side),
        Option("width", "whole", "width in pixels, a multiple of 16", 832, 96, commands=_SHOWN, **_side),
        Option("frames", "whole", "number of frames, 4k+1, including those of an image or a clip",
               commands=("generate", "compare", "calibrate"), common=True, **_frames),
        Option("frames", "whole", "number of frames in a segment, 4k+1", commands=(*_LONG, *_AVATAR), **_frames),
        Option("overlap", "whole", "number of frames, 4k+1, that a segment shares with the previous one; the real "
               "model was trained with 13", commands=(*_LONG, *_AVATAR), needs=(MORE,), **_given),
        Option("hand_off", "choice", "what the next segment starts from: frames, decoded and encoded again as in the "
               "public code, or the latents themselves, which saves the loss at each join", HAND_OFFS[0],
               choices=HAND_OFFS, commands=_LONG, needs=(MORE,)),
        Option("reference", "whole", "latent frame at which later segments place the first frame of the video, which "
               "they all see; 30 or -10 helps where movements repeat", 10, least=-MAX_FRAMES, most=MAX_FRAMES,
               metavar="N", needs=(MORE,), commands=_AVATAR),
        Option("skip", "whole", "number of latent frames on each side of --reference that do not see that frame, so "
               "that the video does not return to it; 0: all see it", 3, least=0, most=MAX_FRAMES, metavar="N",
               needs=(MORE,), commands=_AVATAR),
        replace(_seed, commands=_SHOWN),
        Option("image", "path", "image that the video starts from", metavar="FILE", commands=_SHOWN),
        Option("video", "path", "clip to continue", metavar="FILE"),
        Option("cond_frames", "whole", "number of frames at the clip's end to continue from, 4k+1; the real model was "
               "trained with 13", needs=("video",), **_given),
    ),
    *_group(
        REFINED,
        _REFINE,
        Option("prompt", "text", "prompt of the given video", "", shown="none", metavar="TEXT"),
        Option("size", "size", "height x width in pixels, multiples of 16", shown="the nearest 720p size", filled=True,
               nano="twice the video's size", metavar="HxW"),
        Option("sparsity", "number", "share of the blocks that block-sparse attention skips; 0 is full attention",
               0.9375, 0, filled=True, step=0.0005, digits=4, **_share),
        Option("spatial_only", "switch", "keep the frame rate, which is doubled otherwise"),
        replace(_seed, help="seed of the first piece's noise; later pieces count up from it", common=False),
        Option("steps", "whole", "number of steps of the base schedule, of which refining runs the late ones: 5 of "
               "50", **_steps),
        Option("piece", "whole", "number of frames refined at a time", 93, least=2, most=MAX_FRAMES, metavar="N"),
        Option("overlap", "whole", "number of frames that two pieces share", 13, least=1, most=MAX_FRAMES - 1,
               metavar="N"),
    ),
    *_group(
        LEARNED,
        _TRAIN,
        Option("size", "size", "height x width in pixels that clips are scaled and cropped to", filled=True, **_size),
        Option("frames", "whole", "number of frames to take from the start of each clip, 15 per second, 4k+1",
               **_frames),
        Option("rank", "whole", "rank of the LoRA", 16, least=1, most=1024, metavar="N"),
        Option("alpha", "number", "the LoRA is scaled by alpha / rank", shown="the rank", filled=True, least=1e-6,
               most=1e6, metavar="X"),
        Option("layers", "text", "layers to train, such as attn.qkv,ffn.down", shown="all seven of a block",
               filled=True, metavar="NAME[,NAME]"),
    ),
    *_group(
        TRAINING,
        _TRAIN,
        Option("steps", "whole", "number of training steps", 1000, least=1, most=1_000_000, metavar="N"),
        Option("batch", "whole", "number of clips in a step", 1, least=1, most=4096, metavar="N"),
        Option("learning_rate", "number", "learning rate of AdamW", 1e-4, least=1e-9, most=1.0, metavar="X"),
        Option("shift", "number", "shift of the noise levels; a larger one trains more on strong noise", 12.0,
               least=0.01, most=100.0, metavar="X"),
        Option("caption_dropout", "number", "share of the steps without a caption", 0.1, **_share),
        Option("cond_share", "number", "share of the steps that are given first frames, so that image to video and "
               "continuation keep working", 0.25, **_share),
        Option("seed", "whole", "seed of the data order, the noise and the LoRA's weights", 0, least=0, most=MAX_SEED,
               metavar="N"),
        Option("save_every", "whole", "number of steps between saves", 100, least=1, most=1_000_000,
               metavar="N"),
        Option("no_gradient_checkpointing", "switch", "train about a third faster, with much more memory"),
    ),
    *_group(
        SAMPLING,
        _VIDEOS,
        replace(_speed, commands=(*_VIDEOS, "refine", *_SCORE)),
        replace(_speed, help=_speed_help(AVATAR), commands=_AVATAR),
        Option("steps", "whole", "number of denoising steps", filled=True, shown="50; distilled 16", common=True,
               schedules={"distilled": (16, 50)}, **_steps),
        Option("steps", "whole", "number of denoising steps; distilled, version 1.5 takes exactly 8", filled=True,
               shown="50; distilled 16, or 8 for version 1.5", commands=_AVATAR, **_steps),
        Option("guidance", "number", "CFG scale; 1 turns guidance off and takes half the time", filled=True,
               commands=_SAMPLED,
               shown="4; distilled 1", common=True, schedules=dict.fromkeys(("distilled", "refine"), (1.0, 1.0)),
               **_guidance),
        Option("guidance", "number", "scale of the guidance by the text", filled=True, shown="4; distilled 1", nano=1.0,
               commands=_AVATAR, **_guidance),
        Option("audio_guidance", "number", "scale of the guidance by the sound; 3 to 5 is good for lips. With 1 for "
               "this and --guidance a step takes a third of the time", filled=True, shown="4; distilled 1",
               nano=1.0, needs=("audio",), commands=_SPEAKING, **_guidance),
        Option("steps", "whole", "number of denoising steps", commands=_SCORE, **_steps),
        Option("guidance", "number", "CFG scale; 1 turns guidance off", commands=_SCORE, **_guidance),
        Option("guidance_until", "number", "share of the steps, from the first on, that have guidance; the others take "
               "half the time without it, which is lossy", 1.0, filled=True, step=0.05, digits=2,
               needs=(GUIDANCE,), commands=(*_SKIPPED, *_AVATAR), **_share),
        Option("schedule", "text", f"noise schedule: {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}", "base", "base",
               filled=True, shown="base; enhance_hf to continue a clip", metavar="NAME",
               commands=_SHOWN),
        Option("distilled", "switch", "the distilled schedule with guidance 1: 8 steps for version 1.5, whose "
               "dmd_lora.safetensors it needs, or 16 for 1.0 with the step LoRA of LongCat-Video", commands=_AVATAR),
        Option("kv_cache", "choice", "how to compute the frames that later segments are given: once, or at every step "
               "(off), with the same result", KV_CACHE[0], choices=(KV_CACHE[0], KV_CACHE[-1]),
               needs=(f"image or {MORE}",), commands=_AVATAR),
        Option("distilled", "switch", "the distilled schedule with 16 steps and guidance 1; it needs the step LoRA",
               common=True, commands=_SAMPLED),
        Option("kv_cache", "choice", "how to compute the frames of an image or a clip: once, with the same result "
               "(exact); once, but left out of guidance's sums, as in the public code (official); or at every step "
               "(off)", KV_CACHE[0], choices=KV_CACHE, needs=(_GIVEN,), commands=_SAMPLED),
        Option("step_cache", "number", "skip steps whose output can be predicted, which is lossy: 0.03 is "
               "conservative, 0.05 skips about half (PSNR of 8 LongCat-mini videos: median 43 dB, farthest 33 dB), "
               "0.12 is aggressive, 0 skips none", 0.0, filled=True, least=0.0,
               most=MAX_STEP_CACHE, step=0.01, digits=3, metavar="X", commands=(*_SKIPPED, *_AVATAR)),
        Option("sparse", "text", "sparse attention, which is lossy: the share of the blocks that are computed exactly, "
               "such as 0.15, or the file that longcat calibrate wrote for this model; the first fifth of the "
               "steps and videos of less than 1024 tokens keep full attention", shown="full attention",
               metavar="X|FILE", common=True, commands=(*_SKIPPED, *_AVATAR)),
        Option("sparse_kernel", "choice", "kernel of sparse attention; cudnn-fp8 and sol compute in 8 bits, plain is "
               "slow and runs anywhere", SPARSE_KERNELS[0], choices=SPARSE_KERNELS, needs=("sparse",),
               commands=(*_SKIPPED, *_AVATAR)),
    ),
    *_group(
        MODEL,
        _MODELS,
        Option("model", "text", "LongCat-Video's folder, its dit folder, or a checkpoint of any published form",
               metavar="PATH", commands=(*_VIDEOS, "refine", "train-lora", *_SCORE), shown="LongCat-nano"),
        Option("model", "text", "folder of LongCat-Video-Avatar 1.5 or 1.0, or a checkpoint of its transformer of any "
               "published form", metavar="PATH", commands=_AVATAR, shown="the nano avatar"),
        Option("base", "text", "LongCat-Video's folder, for VAE and text encoder of an avatar", metavar="PATH",
               needs=("audio",), commands=_SPEAKING,
               shown="LongCat-Video beside the model's folder"),
        Option("audio_encoder", "text", "folder or file of the audio encoder: whisper-large-v3 (1.5) or "
               "chinese-wav2vec2-base (1.0)", metavar="PATH", needs=("audio",), commands=_SPEAKING,
               shown="in the model's folder"),
        Option("vae", "text", "folder or file of the VAE", shown="vae/ in the model's folder", metavar="PATH",
               commands=_WEIGHTS),
        Option("text_encoder", "text", "folder or file of the text encoder", metavar="PATH", commands=_WEIGHTS,
               shown="text_encoder/ and tokenizer/ in the model's folder"),
        Option("no_text_cache", "switch", "load the text encoder in any case; otherwise encodings of prompts, not the "
               "prompts, are kept on disk, and a prompt that was used before needs no text encoder",
               commands=(*_SAMPLED, "refine", *_AVATAR)),
        Option("lora", "lora", "a LoRA of any form, at strength 1 if not given; can be repeated", repeated=True,
               metavar="FILE[:STRENGTH]", common=True, commands=_BASE),
        Option("lora", "lora", "a LoRA of any form, at strength 1 if not given; can be repeated. Where "
               "dmd_lora.safetensors makes lips too red, 0.3 helps", repeated=True, metavar="FILE[:STRENGTH]",
               commands=_AVATAR),
        Option("lora_mode", "choice", "merge LoRAs into the weights, or keep them beside the weights at run time, "
               "which is slower and leaves the base's --fp8 weights as they are", LORA_MODES[0], choices=LORA_MODES,
               needs=("lora",)),
        Option("dtype", "choice", "precision of the computation; auto is bfloat16 on a GPU and float32 on a CPU",
               "auto", choices=DTYPES, common=True),
        Option("dtype", "choice", "precision of the base model; auto is bfloat16 on a GPU and float32 on a CPU",
               # Gradients in float16 need a scale of their own.
               "auto", choices=DTYPES[:-1], commands=_TRAIN),
        Option("fp8", "switch", "run the large layers in 8 bits: faster, half the memory, lossy", common=True),
        Option("device", "text", "device to run on: auto, cpu, cuda or cuda:N", "auto", commands=_WEIGHTS, common=True),
        Option("gpus", "text", "number of GPUs of this machine that share the work on one video, or auto for as "
               "many as make it faster; torchrun starts them on several machines", filled=True,
               shown="1; with torchrun its number", metavar="N", commands=_SEVERAL, common=True),
        Option("exchange", "choice", "how GPUs that share the tokens of a video send them to each other: exact, into "
               "each other's memory where they reach it, or by messages; int8: by messages of half the size, lossy",
               EXCHANGES[0], choices=EXCHANGES, needs=(SEVERAL,), commands=_SEVERAL),
        Option("attention", "text", "attention backend; longcat backends lists them", "auto", metavar="NAME",
               commands=_WEIGHTS),
        Option("compile", "choice", "torch.compile of the transformer blocks: the first step is slower, later steps "
               "are faster; auto compiles large models on a GPU without our Triton kernels", "auto",
               choices=("auto", *COMPILE)),
        Option("compile", "choice", "torch.compile of the transformer blocks", COMPILE[0], choices=COMPILE,
               commands=_TRAIN),
    ),
    *_group(
        MEMORY,
        _MODELS,
        Option("memory", "number", "limit on the GPU memory to use, in GiB", metavar="GIB", shown="all that is free"),
        Option("stream_blocks", "whole", "number of blocks whose weights stay in CPU memory and are prefetched", 0,
               least=0, metavar="N", needs=(A_GPU,)),
        Option("shard_blocks", "whole", "number of blocks of whose weights each of several GPUs holds a share; a block "
               "is gathered as it runs", 0, least=0, metavar="N", needs=(SEVERAL,), commands=_SEVERAL),
        Option("stream_text_encoder", "switch", "leave the text encoder in its file and read it block by block",
               needs=(A_GPU,)),
        Option("split_guidance", "switch", "run the two halves of guidance one after the other, with half the memory "
               "for activations", needs=(GUIDANCE,)),
        Option("offload_kv_cache", "switch", "keep the KV cache of the conditioning frames in CPU memory",
               needs=(A_GPU, _GIVEN), commands=(*_SAMPLED, "refine")),
        Option("offload_kv_cache", "switch", "keep the KV cache of the frames that a segment is given in CPU memory",
               needs=(A_GPU, f"image or {MORE}"), commands=_AVATAR),
        Option("tiled_vae", "switch", "run the VAE on tiles; seams may be visible"),
    ),
    *_group(
        OUTPUT,
        _VIDEOS,
        Option("output", "path", f"video to write: {_suffixes}; with --prompts-file a folder, or the name that each "
               "video has with its number", shown="longcat.mp4, or the next free name; for many FILE-videos/",
               metavar="FILE", short="-o", commands=("generate",), common=True),
        Option("output", "path", f"video to write: {_suffixes}", shown="longcat-long.mp4", metavar="FILE", short="-o",
               commands=_LONG),
        Option("output", "path", "video to write, with the sound: .mp4 or .mkv (lossless); .webp and .gif hold none",
               shown="longcat-avatar.mp4", metavar="FILE", short="-o", commands=_AVATAR),
        Option("output", "path", f"video to write: {_suffixes}", shown="VIDEO-refined.mp4", metavar="FILE", short="-o",
               commands=_REFINE),
        Option("output", "path", "a new or empty folder for report, pictures and videos", metavar="DIR", short="-o",
               shown="longcat-compare, or the next free name", commands=_COMPARE),
        Option("output", "path", "the LoRA to write, .safetensors; its training state is saved beside it",
               metavar="FILE", short="-o", required=True, commands=_TRAIN),
        Option("output", "path", "the calibration to write, .json", metavar="FILE", short="-o", commands=_CALIBRATE,
               shown="longcat-calibration.json, or the next free name"),
        Option("output", "path", "also write the numbers to this .json file", metavar="FILE", short="-o",
               commands=_SCORE),
        Option("contact_sheet", "path", "also write a .png with frames and prompt", metavar="FILE",
               commands=("generate",)),
        Option("folder", "path", "folder that keeps finished segments; run the same command again to resume",
               metavar="DIR", shown="the name of FILE and -segments", commands=(*_LONG, *_AVATAR)),
        Option("folder", "path", "folder that keeps finished pieces; run the same command again to resume",
               metavar="DIR", shown="none", commands=_REFINE),
        _lossy_change,
        replace(_lossy_change, commands=_REFINE, needs=("folder",)),
        Option("page", "path", "also write the report to this .md file, with its pictures beside it", metavar="FILE",
               commands=(*_COMPARE, *_CALIBRATE)),
        Option("fps", "number", "frame rate of the output file, and at which the frames of a clip are taken", FPS,
               least=1.0, most=MAX_FPS, step=0.5, digits=2, metavar="X"),
    ),
    *_group(
        "",
        (),
        Option("to", "choice", "bf16: official names, for ComfyUI and this command; comfyui-fp8: ComfyUI's names, with "
               "projections in e4m3 and a scale each; int8: the official INT8 form", choices=CHECKPOINT_FORMS,
               required=True, commands=("convert",)),
        Option("report", "path", "also write the error of every tensor to this .json file", metavar="FILE",
               commands=("convert",)),
        Option("size", "size", "height x width in pixels", (480, 832), metavar="HxW", commands=("plan",)),
        Option("frames", "whole", "number of frames, 4k+1", 93, least=1, most=MAX_FRAMES, step=FRAME_MULTIPLE,
               metavar="N", commands=("plan",)),
        Option("cond_frames", "whole", "number of conditioning frames, 4k+1, or 0", 0, least=0, metavar="N",
               commands=("plan",)),
        Option("no_guidance", "switch", "plan without guidance, as for distilled sampling and refining",
               commands=("plan",)),
        Option("prompts", "whole", "number of prompts", 64, least=2, metavar="N", commands=_SCORE),
        Option("lesson", "switch", "use prompts of the lesson that lesson-nano writes", commands=_SCORE),
        Option("avatar", "switch", "score an avatar, the bundled one or what train-nano --size avatar wrote: mouths "
               "against sounds; takes --model, --prompts, --steps, --device and -o", commands=_SCORE),
        Option("clips", "whole", "number of clips to write", 96, least=1, metavar="N", commands=("lesson-nano",)),
    ),
)  # fmt: skip
