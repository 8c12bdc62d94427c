"""Where ComfyUI's menu lists a node, and the words under which its search finds it. Does not import ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass

ROOT = "LongCat"
LOADERS, SAMPLING, LATENTS = f"{ROOT}/loaders", f"{ROOT}/sampling", f"{ROOT}/latents"
AVATAR, LONG, SPEED, MEASURING = f"{ROOT}/avatar", f"{ROOT}/long video", f"{ROOT}/speed and memory", f"{ROOT}/measuring"
# Groups of the Essentials tab, by the names that stock nodes use.
GENERATION, TOOLS = "Video Generation", "Video Tools"


@dataclass(frozen=True)
class Place:
    """category: the path in the Add Node menu. aliases: what else people search for. essentials: a group of the
    Essentials tab, or None."""

    category: str
    aliases: tuple[str, ...]
    essentials: str | None = None


_TEXT = ("t2v", "txt2vid", "text2video", "text to video")
_IMAGE = ("i2v", "img2vid", "image2video", "image to video", "animate image", "start image", "first frame")
_EXTEND = ("v2v", "video extend", "extend video", "video continuation", "continue video")
_UPSCALE = ("upscale video", "video upscale", "super resolution", "enhance video", "720p")
_RATE = ("frame interpolation", "double fps", "30 fps")
_MAKER = ("meituan",)
_TALKING = ("longcat avatar", "talking head", "lip sync", "lipsync", "audio driven")
_NANO = ("longcat nano", "longcat-nano")

PLACES: dict[str, Place] = {
    "LongCatModelLoader": Place(
        LOADERS,
        (*_MAKER, *_NANO, "load longcat", "longcat video", "load diffusion model", "unet loader", "checkpoint", "dit",
         "gguf", "fp8", *_TEXT),
        GENERATION,
    ),
    "LongCatTextEncoderLoader": Place(
        LOADERS, (*_MAKER, *_NANO, "load clip", "clip loader", "umt5", "umt5-xxl", "t5", "text encoder"), GENERATION
    ),
    "LongCatEmptyLatent": Place(
        LATENTS,
        (*_MAKER, *_NANO, *_TEXT, "empty latent", "empty video latent", "empty hunyuan latent video", "resolution"),
        GENERATION,
    ),
    "LongCatSampleClip": Place(LATENTS, (*_NANO, "example image", "example clip", "test image", "test clip", "demo")),
    "LongCatSampleSpeech": Place(
        LATENTS, (*_NANO, "example audio", "example speech", "test audio", "test speech", "example face", "demo")
    ),
    "LongCatVAEDecode": Place(
        LATENTS, (*_MAKER, *_NANO, "vae decode", "decode latent", "latent to video", "stream", "low vram"), TOOLS
    ),
    "LongCatImageToVideo": Place(LATENTS, (*_MAKER, *_NANO, *_IMAGE), GENERATION),
    "LongCatVideoContinuation": Place(
        LATENTS, (*_MAKER, *_NANO, *_EXTEND, "video to video", "last frames"), GENERATION
    ),
    "LongCatRefine": Place(LATENTS, (*_MAKER, *_NANO, *_UPSCALE, *_RATE, "refine video", "second stage"), TOOLS),
    "LongCatSampler": Place(
        SAMPLING,
        (*_MAKER, *_NANO, *_TEXT, *_IMAGE[:4], "v2v", "ksampler", "sampler", "distilled", "cfg zero", "cfg-zero*"),
        GENERATION,
    ),
    "LongCatScheduler": Place(
        SAMPLING, (*_MAKER, "sigmas", "noise schedule", "basic scheduler", "distilled", "enhance_hf")
    ),
    "LongCatGuider": Place(SAMPLING, (*_MAKER, "cfg zero", "cfg-zero*", "cfgzerostar", "cfg guider", "guidance")),
    "LongCatLongVideo": Place(
        LONG,
        (*_MAKER, *_NANO, *_TEXT, *_IMAGE[:4], *_EXTEND, "long video", "minutes", "infinite video", "segments",
         "interactive video", "prompt schedule", "resume"),
        GENERATION,
    ),
    "LongCatRefineLongVideo": Place(
        LONG, (*_MAKER, *_NANO, *_UPSCALE, *_RATE, "v2v", "refine video", "second stage", "resume"), TOOLS
    ),
    "LongCatAudioEncoderLoader": Place(
        LOADERS, (*_MAKER, *_TALKING, "load audio encoder", "whisper", "wav2vec2"), GENERATION
    ),
    "LongCatEncodeAudio": Place(
        AVATAR, (*_MAKER, *_TALKING, "audio encoder encode", "whisper", "wav2vec2", "speech", "voice"), GENERATION
    ),
    "LongCatAvatar": Place(
        AVATAR,
        (*_MAKER, *_TALKING, "infinitetalk", "multitalk", "s2v", "speech to video", "audio to video"),
        GENERATION,
    ),
    "LongCatAvatarLongVideo": Place(
        AVATAR,
        (*_MAKER, *_TALKING, "infinitetalk", "multitalk", "s2v", "audio to video", "long video", "resume"),
        GENERATION,
    ),
    "LongCatAvatarBoxes": Place(AVATAR, (*_MAKER, *_TALKING, "bbox", "bounding box", "two people", "mask")),
    "LongCatOptimizations": Place(
        SPEED,
        (*_MAKER, "speed up", "faster", "torch compile", "sage attention", "flash attention", "triton", "fp8",
         "low vram", "split guidance"),
    ),
    "LongCatBlockSparseAttention": Place(
        SPEED, (*_MAKER, "sparse attention", "bsa", "block sparse", "sparge", "radial attention", "speed up", "faster")
    ),
    "LongCatSparseAttention": Place(
        SPEED,
        (*_MAKER, "sparse attention", "sparsity", "density", "calibration", "sol-attn", "sparge", "radial attention",
         "speed up", "faster"),
    ),
    "LongCatMultiGPU": Place(
        SPEED,
        (*_MAKER, "multi gpu", "multigpu", "parallel", "distributed", "sequence parallel", "xdit", "raylight",
         "faster"),
    ),
    "LongCatMultiGPUTest": Place(
        SPEED, (*_MAKER, "multi gpu", "multigpu", "parallel", "self test", "nccl", "nvlink", "bandwidth")
    ),
    "LongCatStepCache": Place(
        SPEED,
        (*_MAKER, "teacache", "tea cache", "easycache", "magcache", "first block cache", "fbcache", "skip steps",
         "speed up", "faster"),
    ),
    "LongCatBenchmark": Place(
        MEASURING, (*_MAKER, "benchmark", "speed test", "seconds per step", "it/s", "time", "profile", "compare speed")
    ),
    "LongCatFidelity": Place(
        MEASURING,
        (*_MAKER, "psnr", "ssim", "compare videos", "compare settings", "quality", "side by side", "noise floor"),
    ),
    "LongCatCalibrate": Place(
        MEASURING, (*_MAKER, "calibration", "sparse attention", "sparsity", "density", "speed up", "faster")
    ),
}  # fmt: skip
