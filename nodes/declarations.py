"""The name, inputs and outputs of each node. Options come from the table in `longcat_core/generate/options.py`.

Does not import ComfyUI. `inputs.schema` turns a declaration into ComfyUI's schema, `docs/build.py` into a help page.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args, get_type_hints

from ..longcat_core.generate.options import FRAME_MULTIPLE, SCHEDULES
from ..longcat_core.nano.world import Actor, Scene, caption
from ..longcat_core.optimize.switches import Optimizations
from ..longcat_core.sampling.buckets import BUCKETS
from ..longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from .fields import Node, Socket, Widget, long_text, own, shared

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

_model = Socket("model", "Model", "LongCat-Video")
_vae = Socket("vae", "Vae", "the Wan 2.1 VAE")
_clip = Socket("clip", "Clip", "UMT5, from LongCat Text Encoder Loader or from Load CLIP of type wan")
_positive = Socket("positive", "Conditioning", "prompt: what the video shows")
_negative = Socket("negative", "Conditioning", "negative prompt: what the video should avoid; not used at guidance 1")
_mode = own(
    "mode",
    "choice",
    "noise schedule. base: 50 steps, guidance 4. distilled: 16 steps, guidance 1, with the cfg_step LoRA. enhance_hf: "
    "base with finer late steps, for continuation. refine: base from noise level 0.5 on, guidance 1, with the "
    "refinement LoRA",
    MODES[0],
    choices=MODES,
)
# 64 bits, as in ComfyUI's own nodes.
_seed = replace(shared("seed", most=2**64 - 1), new_seed=True)
# Not drawn again after each run: with a new seed, a run would not resume the saved segments.
_first_seed = replace(shared("seed", "refine", help="seed of the first piece's noise; later pieces count up from it. "
                          "Another seed begins another take"), new_seed=False)  # fmt: skip
_steps = shared(
    "steps",
    help="number of denoising steps: 50, or 16 for distilled. For 50 steps, enhance_hf evaluates the model 56 times "
    "and refine 5 times",
    shown="",
)
_guidance = shared(
    "guidance",
    help="CFG-zero scale: 4, or 1 for distilled and refine; 1 turns guidance off and takes half the time",
    shown="",
)
_kv_cache = shared("kv_cache", optional=True, advanced=True)
_guidance_until = shared("guidance_until", optional=True, advanced=True)
_width, _height = shared("width"), shared("height")
_length = shared("frames", name="length", least=1 + FRAME_MULTIPLE)
_batch_size = own("batch_size", "whole", "number of videos generated together, each from its own noise", 1, least=1,
                  most=64, optional=True, advanced=True)  # fmt: skip
_double_rate = own("double_rate", "switch", "double the frame rate as well; off: enlarge the picture only", True)


def _sizes(choices: tuple[str, ...], help: str, width: Widget, height: Widget) -> tuple[Widget, ...]:
    """resolution, width and height; the first choice is the default, and `custom` is added."""
    sides = (replace(side, row=replace(side.row, help=f"{side.row.help}; only for resolution custom"),
                     only_for=("resolution", CUSTOM)) for side in (width, height))  # fmt: skip
    help = f"{help}. custom: width and height below"
    return own("resolution", "choice", help, choices[0], choices=(*choices, CUSTOM)), *sides


_given_sizes = (
    *_sizes(
        tuple(BUCKETS),
        "480p or 720p: the trained size that is closest in aspect ratio; what does not fit is cropped evenly",
        _width,
        _height,
    ),
    _length,
    _batch_size,
)
_refined_sizes = _sizes(
    ("720p", TWICE),
    "720p: the 720p size that is closest in aspect ratio. twice the size: for LongCat-nano",
    *(
        replace(side, row=replace(side.row, default=pixels, nano=None))
        for side, pixels in ((_width, 1280), (_height, 704))
    ),
)


def _clip_rate(name: str, clip: str, taken: str) -> Widget:
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


_lossy_change = shared("lossy_change", "long", optional=True, advanced=True)


def _folder(default: str) -> Widget:
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
}
# What people choose by themselves; the other switches are on wherever they help.
_CHOSEN = ("attention", "compile", "fp8", "fused_kernels", "split_guidance")
# Added after workflows with this node had been saved without them.
_ADDED = ("reuse_text", "reuse_modulation", "fused_step", "fp8", "fused_kernels", "split_guidance", "fused_text")


def _switches() -> tuple[Widget, ...]:
    """One input for each optimization, in the order of its fields."""
    kinds = get_type_hints(Optimizations)
    return tuple(
        own(field.name, "switch" if kinds[field.name] is bool else "choice", _OPTIMIZATIONS[field.name], field.default,
             choices=get_args(kinds[field.name]), optional=field.name in _ADDED, advanced=field.name not in _CHOSEN)
        for field in fields(Optimizations)
    )  # fmt: skip


NODES: dict[str, Node] = {
    "LongCatModelLoader": Node(
        "LongCat Model Loader",
        "Loads LongCat-Video as a native MODEL, from one file or from the official folder of shards.",
        (
            own("model_name", "choice", "LongCat-Video's transformer in ComfyUI's diffusion_models folders: one "
                 "safetensors or GGUF file, or the official dit folder. longcat_nano is the small test model that "
                 "comes with the pack"),
            own("weight_dtype", "choice", "dtype of the weights. default: what suits the file and this machine. fp8 "
                 "rowwise: 8-bit weights and matrix products, half the memory of bf16 and faster on Ada, Hopper and "
                 "Blackwell, lossy. fp8_e4m3fn: half the memory, 16-bit products, lossy. fp32: for comparison",
                 "default"),
        ),
        (Socket("", "Model", "works with stock samplers, LoRA loaders and model patches"),),
    ),
    "LongCatTextEncoderLoader": Node(
        "LongCat Text Encoder Loader",
        "Loads a UMT5 text encoder of any size. For UMT5-XXL, Load CLIP of type wan does the same.",
        (
            own("text_encoder_name", "choice", "UMT5 encoder in ComfyUI's text_encoders folders: umt5_xxl for "
                 "LongCat-Video, longcat_nano_umt5 for LongCat-nano"),
            own("device", "choice", "where the text encoder runs; cpu is slower and needs no GPU memory", "default",
                 choices=("default", "cpu")),
        ),
        (Socket("", "Clip", "for CLIP Text Encode"),),
    ),
    "LongCatOptimizations": Node(
        "LongCat Optimizations",
        "Turns each optimization of LongCat-Video on or off, on a model that is already loaded. The input MODEL is not "
        "changed.",
        (_model, *_switches()),
        (
            Socket("", "Model", ""),
            Socket("report", "String", "what is active, and why something is not available"),
        ),
    ),
    "LongCatSampler": Node(
        "LongCat Sampler",
        "Generates a video from a prompt, an image or a clip as LongCat-Video's own pipeline does, with its schedules, "
        "Euler steps and CFG-zero guidance.",
        (
            _model,
            _positive,
            _negative,
            Socket("latent_image", "Latent", "Empty LongCat Latent for text to video, LongCat Image to Video or "
                   "LongCat Video Continuation; for mode refine the latent of a video"),
            _seed,
            _steps,
            _guidance,
            _mode,
            _kv_cache,
            _guidance_until,
        ),
        (Socket("", "Latent", "for VAE Decode with the Wan 2.1 VAE"),),
    ),
    "LongCatScheduler": Node(
        "LongCat Scheduler",
        "Computes the noise levels of LongCat-Video's own schedules, for SamplerCustomAdvanced.",
        (
            replace(_model, help="LongCat-Video; the shift is always 12, even after ModelSamplingSD3"),
            _mode,
            _steps,
        ),
        (Socket("", "Sigmas", "noise levels that end in 0"),),
    ),
    "LongCatGuider": Node(
        "LongCat Guider",
        "Applies CFG-zero guidance as LongCat-Video's own pipeline does, for SamplerCustomAdvanced. The stock "
        "CFGZeroStar node computes something else; do not use it on the same model.",
        (_model, _positive, _negative, _guidance, _kv_cache, _guidance_until),
        (Socket("", "Guider", "for SamplerCustomAdvanced"),),
    ),
    "LongCatEmptyLatent": Node(
        "Empty LongCat Latent",
        "Sets the size and the length of a video from text, for LongCat Sampler and for stock samplers. The stock "
        "Empty HunyuanVideo 1.0 Latent makes the same latent.",
        (_width, _height, shared("frames", name="length"), _batch_size),
        (Socket("", "Latent", "empty, for latent_image of LongCat Sampler"),),
    ),
    "LongCatSampleClip": Node(
        "LongCat Sample Clip",
        "Gives a short clip and its first picture, drawn on the spot, to try LongCat-nano without files of your own.",
        (own("scene", "choice", "what the clip shows, in the words of a prompt for LongCat-nano", next(iter(SAMPLES)),
             choices=tuple(SAMPLES)),),
        (
            Socket("image", "Image", "the first frame, for LongCat Image to Video"),
            Socket("frames", "Image", "all 33 frames, 96x64, for LongCat Video Continuation and LongCat Refine"),
            Socket("fps", "Float", "frames a second of the clip, 15"),
            Socket("video", "Video", "the clip as a VIDEO"),
        ),
    ),
    "LongCatImageToVideo": Node(
        "LongCat Image to Video",
        "Makes a latent whose first frame is the image, for LongCat Sampler and for stock samplers.",
        (_vae, Socket("image", "Image", "a single image, the first frame"),
         *_given_sizes),
        (Socket("", "Latent", "with a noise_mask that keeps the first frame"),),
    ),
    "LongCatVideoContinuation": Node(
        "LongCat Video Continuation",
        "Makes a latent that starts with the last frames of a clip, for LongCat Sampler (preferably mode enhance_hf) "
        "and for stock samplers.",
        (
            _vae,
            Socket("video", "Image,Video", "the clip to continue: a video, or frames, which do not say their frame "
                   "rate, so set or connect fps"),
            shared("cond_frames"),
            *_given_sizes,
            _clip_rate("fps", "video", "15 per second, LongCat-Video's rate"),
        ),
        (Socket("", "Latent", "with a noise_mask that keeps the frames of the clip"),),
    ),
    "LongCatRefine": Node(
        "LongCat Refine",
        "Enlarges a finished video and doubles its frame rate, as the latent for LongCat Sampler in mode refine, with "
        "the refinement LoRA on the model.",
        (
            _vae,
            Socket("video", "Image", "frames to refine, at most 93 at a time, for instance from VAE Decode or Get "
                   "Video Components"),
            _double_rate,
            *_refined_sizes,
            shared("fps", help="frame rate of the input video; only the output fps depends on it"),
            Socket("refined_before", "Image", "for a long video in pieces: the refined frames of the previous piece, "
                   "whose last ones replace the first ones of this piece", optional=True),
            shared("overlap", "refine", help="with refined_before: number of this piece's first frames that the "
                "previous piece also has", most=92, optional=True, advanced=True),
        ),
        (
            Socket("", "Latent", "for LongCat Sampler in mode refine, at guidance 1"),
            Socket("skip", "Int", "number of frames to drop from the start of the decoded video"),
            Socket("length", "Int", "number of new frames after those; the rest is padding"),
            Socket("fps", "Float", "frame rate of the refined video"),
        ),
    ),
    "LongCatLongVideo": Node(
        "LongCat Long Video",
        "Generates a long video in segments, each of which starts from the end of the previous one; with one prompt "
        "for each segment, an interactive video. Every finished segment is saved, and an interrupted run resumes from "
        "there.",
        (
            _model,
            _clip,
            _vae,
            long_text(own("prompts", "text", "one prompt per line, one line per segment; further segments use the last "
                       "line. If you change a line, its segment and all later ones are made beside the old ones", "")),
            long_text(shared("negative_prompt", default=DEFAULT_NEGATIVE_PROMPT)),
            shared("segments", "long", help="number of segments; 0: one for each prompt. The first segment of 93 "
                "frames lasts 6.2 s, and each further one adds 5.3 s", default=3, shown="", least=0),
            _width,
            _height,
            shared("frames", "long", name="length", least=1 + FRAME_MULTIPLE),
            shared("overlap", "long"),
            _first_seed,
            shared("steps", help="number of denoising steps: 50, or 16 for distilled", shown=""),
            _guidance,
            own("mode", "choice", "schedule of the first segment and of the others. distilled: 16 steps, guidance 1, "
                 "with the cfg_step LoRA. base: for LongCat-nano", CONTINUATION, choices=tuple(LONG_MODES)),
            shared("hand_off", "long", advanced=True),
            _folder("longcat/long-video"),
            _kv_cache,
            Socket("begin_with", "Image,Video", "a single image becomes the first frame; a clip is continued from its "
                   "last overlap frames. Both are scaled and cropped to width and height", optional=True),
            shared("fps", help="frame rate of the files in the folder, and at which the frames of a clip in begin_with "
                   "are taken", optional=True, advanced=True),
            _clip_rate("begin_fps", "begin_with", "as many per second as fps says"),
            _lossy_change,
            _guidance_until,
        ),
        (
            Socket("images", "Image", "all frames; frames that two segments share appear once. Built only if "
                   "connected: a long video may not fit into memory"),
            Socket("report", "String", "the segments, and how the color changes at the joins"),
            Socket("video", "Video", "the same frames for Save Video, read from the folder one by one, so that a video "
                   "of any length needs little memory"),
        ),
    ),
    "LongCatRefineLongVideo": Node(
        "LongCat Refine Long Video",
        "Runs LongCat Refine, LongCat Sampler and VAE Decode on a video of any length, in pieces, each conditioned on "
        "the refined end of the previous one. Every finished piece is saved.",
        (
            replace(_model, help="LongCat-Video with the refinement LoRA, and for speed with LongCat Block-Sparse "
                    "Attention"),
            _clip,
            _vae,
            Socket("video", "Image,Video", "a video or all of its frames, for instance video of LongCat Long Video, "
                   "which is read piece by piece"),
            long_text(shared("prompt", "refine", help="prompt of the input video, or empty, which is how LongCat-Video "
                      "refines long videos", shown="")),
            _first_seed,
            shared("steps", "refine"),
            _double_rate,
            *_refined_sizes,
            shared("piece", "refine", advanced=True),
            shared("overlap", "refine", advanced=True),
            _folder("longcat/refined"),
            shared("fps", help="frame rate of the input frames, on which only the output fps depends; a video has its "
                   "own", optional=True),
            _lossy_change,
        ),
        (
            Socket("images", "Image", "all refined frames. Built only if connected: a long video may not fit into "
                   "memory"),
            Socket("fps", "Float", "frame rate of the refined video"),
            Socket("video", "Video", "the refined video for Save Video, read from the folder frame by frame"),
        ),
    ),
    "LongCatBlockSparseAttention": Node(
        "LongCat Block-Sparse Attention",
        "Lets each small block of tokens attend only to the few blocks that matter most to it, as LongCat-Video does "
        "when it refines to 720p. Faster on large videos; the result differs from that of full attention.",
        (
            replace(_model, help="LongCat-Video, for refining with the refinement LoRA"),
            shared("sparsity", "refine", nano=None),
            own("cdf_threshold", "number", "above 0: keep blocks until they hold this share of the attention, if that "
                 "is more than sparsity keeps", 0.0, least=0.0, most=1.0, step=0.05, digits=3, advanced=True),
            own("chunk", "choice", "size of a block in tokens: frames, rows, columns; LongCat-Video uses 4x4x4",
                 "4x4x4", choices=tuple(CHUNKS), advanced=True),
        ),
        (Socket("", "Model", "for LongCat Sampler in mode refine and for stock samplers"),),
    ),
    "LongCatSparseAttention": Node(
        "LongCat Sparse Attention",
        "Computes some blocks of self-attention exactly and counts every other block as its mean. Faster, and lossy.",
        (_model,
            own("density", "number", "share of the blocks that are computed exactly, not calibrated; 1: full attention",
                0.15, least=0.0, most=1.0, step=0.01, digits=3),
            own("calibration", "text", "file of LongCat Calibrate in the output folder; it replaces density and "
                "dense_steps", "", optional=True),
            shared("dense_steps", "calibrate", optional=True, advanced=True),
            shared("sparse_kernel", name="kernel", optional=True, advanced=True)),
        (Socket("", "Model", "for LongCat Sampler and for stock samplers"),),
    ),
    "LongCatStepCache": Node(
        "LongCat Step Cache",
        "Skips steps whose output can be predicted from the last two. At 0.05 about twice as fast. Most videos change "
        "slightly, a few visibly: of 12 videos of LongCat-nano the one in the middle had a PSNR of 43 dB against all "
        "steps, the farthest 21 dB.",
        (
            _model,
            shared("step_cache", name="threshold", default=0.05, help="how much the output may change in total, "
                "relative to itself, before a step is computed again: 0.03 is conservative (12 nano videos: median "
                "47 dB, farthest 21 dB), 0.05 is the middle (43 and 21 dB), 0.12 is aggressive (33 and 23 dB), 0 "
                "computes every step"),
            shared("step_cache_kind", name="kind", optional=True, advanced=True, help="what is skipped. steps: whole "
                   "steps. blocks: all but the first sixth of the blocks, where those show that what the others add "
                   "can be predicted; it has thresholds of its own and takes more memory"),
        ),
        (Socket("", "Model", "for LongCat Sampler and for stock samplers"),),
    ),
    "LongCatBenchmark": Node(
        "LongCat Benchmark",
        "Times a few denoising steps of LongCat-Video with two settings on this machine, in turns, plots the times "
        "with their range, and says whether the settings can be distinguished.",
        (
            replace(_model, help="A: LongCat-Video, with or without LongCat Optimizations"),
            Socket("latent_image", "Latent", "sets the size of the video, for instance Empty LongCat Latent; "
                   "conditioning frames from a LongCat node are kept"),
            shared("steps", default=3, most=20, shown="", help="number of timed steps for each setting, with one more "
                "step before each turn; the median counts, and fewer than 3 allow no verdict"),
            _guidance,
            Socket("model_b", "Model", "B: the same model with other LongCat Optimizations, another dtype or other "
                   "patches. Not connected: A with every optimization off", optional=True),
            Socket("positive", "Conditioning", "prompt; not connected: random text of typical length", optional=True),
            Socket("negative", "Conditioning", "negative prompt; not connected: random text of typical length",
                   optional=True),
        ),
        (
            Socket("plot", "Image", ""),
            Socket("report", "String", "the figures with their range, and the switches in which A and B differ"),
        ),
        shows=True,
    ),
    "LongCatFidelity": Node(
        "LongCat Fidelity",
        "Samples one video with two settings of LongCat-Video and shows what the second one changes: PSNR and SSIM of "
        "every frame, frames side by side, and the noise floor.",
        (
            replace(_model, help="A, the reference: LongCat-Video with settings that you trust"),
            Socket("model_b", "Model", "B: the same model with LongCat Step Cache, LongCat Optimizations, a LoRA, "
                   "another weight dtype or other patches"),
            replace(_vae, help="the Wan 2.1 VAE, which decodes both"),
            _positive,
            _negative,
            Socket("latent_image", "Latent", "as for LongCat Sampler; conditioning frames are the same in both "
                   "videos and are not compared"),
            _seed,
            _steps,
            _guidance,
            _mode,
            own("noise_floor", "switch", "sample A again with another exact attention kernel, to show how far apart "
                 "two correct runs are; takes as long as A", True),
            _kv_cache,
        ),
        (
            Socket("plot", "Image", "PSNR and SSIM of every frame"),
            Socket("side_by_side", "Image", "frames of A and B, and their difference"),
            Socket("images_a", "Image", "the video of A"),
            Socket("images_b", "Image", "the video of B"),
            Socket("report", "String", "the figures and what they mean"),
        ),
        shows=True,
    ),
    "LongCatCalibrate": Node(
        "LongCat Calibrate",
        "Finds how sparse the attention of each head may be on the weights of this model, by sampling one video "
        "densely and measuring in some of its steps, and writes a calibration for sparse attention.",
        (
            replace(_model, help="LongCat-Video with the LoRAs that you use, without LongCat Step Cache and without "
                    "block-sparse attention"),
            _positive,
            _negative,
            Socket("latent_image", "Latent", "as for LongCat Sampler, in the size that you generate; conditioning "
                   "frames are always attended to exactly"),
            _seed,
            shared("steps", "calibrate", default=10, shown="", help="number of denoising steps: 10, or 16 for "
                   "distilled; fewer than for a video will do"),
            _guidance,
            _mode,
            shared("budget", "calibrate"),
            shared("dense_steps", "calibrate", advanced=True),
            own("file", "text", "name of the file inside ComfyUI's output folder; a name that is taken gets a number",
                "longcat/calibration.json"),
            _kv_cache,
        ),
        (
            Socket("calibration", "String", "path of the file"),
            Socket("report", "String", "the densities and the expected speed-up; LongCat Fidelity shows what they "
                   "change in a video"),
        ),
        shows=True,
    ),
}  # fmt: skip
