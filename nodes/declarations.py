"""The name, inputs and outputs of each node. Options come from the table in `longcat_core/generate/options.py`.

Does not import ComfyUI. `inputs.schema` turns a declaration into ComfyUI's schema, `docs/build.py` into a help page.
"""

from __future__ import annotations

from dataclasses import replace

from ..longcat_core.generate.options import FRAME_MULTIPLE
from ..longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from .avatar_declarations import AVATAR_NODES
from .fields import Node, Socket, long_text, own, shared
from .widgets import (
    BATCH_SIZE,
    CHUNKS,
    CLIP,
    CONTINUATION,
    DOUBLE_RATE,
    FIRST_SEED,
    GIVEN_SIZES,
    GUIDANCE,
    GUIDANCE_UNTIL,
    HEIGHT,
    KV_CACHE,
    LONG_MODES,
    LOSSY_CHANGE,
    MODE,
    MODEL,
    NEGATIVE,
    POSITIVE,
    REFINED_SIZES,
    SAMPLES,
    SEED,
    SPEAKING,
    SPEED,
    STEPS,
    VAE,
    WIDTH,
    clip_rate,
    folder,
    switches,
)

# Where a node stands in the prompt that it runs in.
PLACE = ("unique_id", "dynprompt")
NODES: dict[str, Node] = {
    "LongCatModelLoader": Node(
        "LongCat Model Loader",
        "Loads LongCat-Video as a native MODEL, from one file or from the official folder of shards.",
        (
            own("model_name", "choice", "LongCat-Video's transformer in ComfyUI's diffusion_models folders: one "
                 "safetensors or GGUF file, or the official dit folder. longcat_nano and longcat_nano_avatar "
                 "are the small test models that come with the pack"),
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
        (MODEL, *switches()),
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
            MODEL,
            POSITIVE,
            NEGATIVE,
            Socket("latent_image", "Latent", "Empty LongCat Latent for text to video, LongCat Image to Video or "
                   "LongCat Video Continuation; for mode refine the latent of a video"),
            SEED,
            STEPS,
            GUIDANCE,
            MODE,
            KV_CACHE,
            GUIDANCE_UNTIL,
            SPEED,
        ),
        (Socket("", "Latent", "for VAE Decode with the Wan 2.1 VAE"),),
    ),
    "LongCatScheduler": Node(
        "LongCat Scheduler",
        "Computes the noise levels of LongCat-Video's own schedules, for SamplerCustomAdvanced.",
        (
            replace(MODEL, help="LongCat-Video; the shift is always 12, or 7 for an avatar 1.5, even after "
                    "ModelSamplingSD3"),
            MODE,
            STEPS,
        ),
        (Socket("", "Sigmas", "noise levels that end in 0"),),
    ),
    "LongCatGuider": Node(
        "LongCat Guider",
        "Applies CFG-zero guidance as LongCat-Video's own pipeline does, for SamplerCustomAdvanced. The stock "
        "CFGZeroStar node computes something else; do not use it on the same model.",
        (MODEL, POSITIVE, NEGATIVE, GUIDANCE, KV_CACHE, GUIDANCE_UNTIL),
        (Socket("", "Guider", "for SamplerCustomAdvanced"),),
    ),
    "LongCatEmptyLatent": Node(
        "Empty LongCat Latent",
        "Sets the size and the length of a video from text, for LongCat Sampler and for stock samplers. The stock "
        "Empty HunyuanVideo 1.0 Latent makes the same latent.",
        (WIDTH, HEIGHT, shared("frames", name="length"), BATCH_SIZE),
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
    "LongCatSampleSpeech": Node(
        "LongCat Sample Speech",
        "Gives a picture of one or two faces and sounds like speech, made on the spot, to try the nano avatar without "
        "files of your own.",
        (own("scene", "choice", "who is in the picture, in the words of a prompt for the nano avatar",
             next(iter(SPEAKING)), choices=tuple(SPEAKING)),),
        (
            Socket("image", "Image", "the faces with closed mouths, 96x64, for LongCat Avatar and LongCat Avatar Long "
                   "Video"),
            Socket("audio", "Audio", "what the first person says, 2.9 seconds"),
            Socket("audio_2", "Audio", "what the second person says, 2.9 seconds"),
        ),
    ),
    "LongCatVAEDecode": Node(
        "LongCat VAE Decode",
        "Decodes the latents of a video a few frames at a time, with the pack's own decoder and the VAE's weights, "
        "and encodes the file of its VIDEO meanwhile. Memory does not grow with the video's length.",
        (
            Socket("samples", "Latent", "latents of a video, from a sampler"),
            replace(VAE, help="the Wan 2.1 VAE. ComfyUI's own decoder decodes with any other, and a note says so"),
            shared("fps", help="frame rate of the video"),
        ),
        (
            Socket("images", "Image", "all frames"),
            Socket("video", "Video", "the same frames as a VIDEO for Save Video, which copies the finished H.264 file. "
                    "With no connection here, no file is made"),
        ),
        hidden=PLACE,
    ),
    "LongCatImageToVideo": Node(
        "LongCat Image to Video",
        "Makes a latent whose first frame is the image, for LongCat Sampler and for stock samplers.",
        (VAE, Socket("image", "Image", "a single image, the first frame"),
         *GIVEN_SIZES),
        (Socket("", "Latent", "with a noise_mask that keeps the first frame"),),
    ),
    "LongCatVideoContinuation": Node(
        "LongCat Video Continuation",
        "Makes a latent that starts with the last frames of a clip, for LongCat Sampler (preferably mode enhance_hf) "
        "and for stock samplers.",
        (
            VAE,
            Socket("video", "Image,Video", "the clip to continue: a video, or frames, which do not say their frame "
                   "rate, so set or connect fps"),
            shared("cond_frames"),
            *GIVEN_SIZES,
            clip_rate("fps", "video", "15 per second, LongCat-Video's rate"),
        ),
        (Socket("", "Latent", "with a noise_mask that keeps the frames of the clip"),),
    ),
    "LongCatRefine": Node(
        "LongCat Refine",
        "Enlarges a finished video and doubles its frame rate, as the latent for LongCat Sampler in mode refine, with "
        "the refinement LoRA on the model.",
        (
            VAE,
            Socket("video", "Image", "frames to refine, at most 93 at a time, for instance from VAE Decode or Get "
                   "Video Components"),
            DOUBLE_RATE,
            *REFINED_SIZES,
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
            MODEL,
            CLIP,
            VAE,
            long_text(own("prompts", "text", "one prompt per line, one line per segment; further segments use the last "
                       "line. If you change a line, its segment and all later ones are made beside the old ones", "")),
            long_text(shared("negative_prompt", default=DEFAULT_NEGATIVE_PROMPT)),
            shared("segments", "long", help="number of segments; 0: one for each prompt. The first segment of 93 "
                "frames lasts 6.2 s, and each further one adds 5.3 s", default=3, shown="", least=0),
            WIDTH,
            HEIGHT,
            shared("frames", "long", name="length", least=1 + FRAME_MULTIPLE),
            shared("overlap", "long"),
            FIRST_SEED,
            shared("steps", help="number of denoising steps: 50, or 16 for distilled", shown=""),
            GUIDANCE,
            own("mode", "choice", "schedule of the first segment and of the others. distilled: 16 steps, guidance 1, "
                 "with the cfg_step LoRA. base: for LongCat-nano", CONTINUATION, choices=tuple(LONG_MODES)),
            shared("hand_off", "long", advanced=True),
            folder("longcat/long-video"),
            KV_CACHE,
            Socket("begin_with", "Image,Video", "a single image becomes the first frame; a clip is continued from its "
                   "last overlap frames. Both are scaled and cropped to width and height", optional=True),
            shared("fps", help="frame rate of the files in the folder, and at which the frames of a clip in begin_with "
                   "are taken", optional=True, advanced=True),
            clip_rate("begin_fps", "begin_with", "as many per second as fps says"),
            LOSSY_CHANGE,
            GUIDANCE_UNTIL,
            SPEED,
        ),
        (
            Socket("images", "Image", "all frames; frames that two segments share appear once. Built only if "
                   "connected: a long video may not fit into memory"),
            Socket("report", "String", "the segments, and how the color changes at the joins"),
            Socket("video", "Video", "the same frames for Save Video, read from the folder one by one, so that a video "
                   "of any length needs little memory"),
        ),
        hidden=(*PLACE, "extra_pnginfo"),
    ),
    "LongCatRefineLongVideo": Node(
        "LongCat Refine Long Video",
        "Runs LongCat Refine, LongCat Sampler and VAE Decode on a video of any length, in pieces, each conditioned on "
        "the refined end of the previous one. Every finished piece is saved.",
        (
            replace(MODEL, help="LongCat-Video with the refinement LoRA, and for speed with LongCat Block-Sparse "
                    "Attention"),
            CLIP,
            VAE,
            Socket("video", "Image,Video", "a video or all of its frames, for instance video of LongCat Long Video, "
                   "which is read piece by piece"),
            long_text(shared("prompt", "refine", help="prompt of the input video, or empty, which is how LongCat-Video "
                      "refines long videos", shown="")),
            FIRST_SEED,
            shared("steps", "refine"),
            DOUBLE_RATE,
            *REFINED_SIZES,
            shared("piece", "refine", advanced=True),
            shared("overlap", "refine", advanced=True),
            folder("longcat/refined"),
            shared("fps", help="frame rate of the input frames, on which only the output fps depends; a video has its "
                   "own", optional=True),
            LOSSY_CHANGE,
        ),
        (
            Socket("images", "Image", "all refined frames. Built only if connected: a long video may not fit into "
                   "memory"),
            Socket("fps", "Float", "frame rate of the refined video"),
            Socket("video", "Video", "the refined video with its sound for Save Video, which reads frame by frame"),
        ),
        hidden=(*PLACE, "extra_pnginfo"),
    ),
    "LongCatBlockSparseAttention": Node(
        "LongCat Block-Sparse Attention",
        "Lets each small block of tokens attend only to the few blocks that matter most to it, as LongCat-Video does "
        "when it refines to 720p. Faster on large videos; the result differs from that of full attention.",
        (
            replace(MODEL, help="LongCat-Video, for refining with the refinement LoRA"),
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
        (MODEL,
            own("density", "number", "share of the blocks that are computed exactly, not calibrated; 1: full attention",
                0.15, least=0.0, most=1.0, step=0.01, digits=3),
            own("calibration", "text", "file of LongCat Calibrate in the output folder; it replaces density and "
                "dense_steps", "", optional=True),
            shared("dense_steps", "calibrate", optional=True, advanced=True),
            shared("sparse_kernel", name="kernel", optional=True, advanced=True)),
        (Socket("", "Model", "for LongCat Sampler and for stock samplers"),),
    ),
    "LongCatMultiGPU": Node(
        "LongCat Multi-GPU",
        "Shares every step between several GPUs of this machine, with the same result. The first run starts a process "
        "for each further GPU; they stay until ComfyUI ends.",
        (MODEL,
            own("gpus", "choice", "how many GPUs; auto: as many like the one that ComfyUI uses as make the video "
                "faster, calculated from what they exchange in a second. The log says how they share the work", "auto",
                choices=("auto", "1", "2", "4", "8"))),
        (Socket("", "Model", "for LongCat Sampler and for stock samplers"),),
    ),
    "LongCatMultiGPUTest": Node(
        "LongCat Multi-GPU Test",
        "Runs a tiny random model on several GPUs and on one, compares the results, and measures the links between the "
        "GPUs. A fault is an error that names the GPU and a remedy.",
        (own("gpus", "choice", "how many GPUs to compare; auto: all that are like the one that ComfyUI uses", "auto",
             choices=("auto", "2", "4", "8")),),
        (Socket("report", "String", "the GPUs, their links and the result of each check"),),
        shows=True,
    ),
    "LongCatStepCache": Node(
        "LongCat Step Cache",
        "Skips steps whose output can be predicted from the last two. At 0.05 about twice as fast. Most videos change "
        "slightly, a few visibly: of 8 videos of LongCat-mini the one in the middle had a PSNR of 43 dB against all "
        "steps, the farthest 33 dB.",
        (
            MODEL,
            shared("step_cache", name="threshold", default=0.05, help="how much the output may change in total, "
                "relative to itself, before a step is computed again: 0.03 is conservative, 0.05 is the middle "
                "(8 LongCat-mini videos: median 43 dB, farthest 33 dB), 0.1 is aggressive (34 and 26 dB), 0 computes "
                "every step"),
        ),
        (Socket("", "Model", "for LongCat Sampler and for stock samplers"),),
    ),
    "LongCatBenchmark": Node(
        "LongCat Benchmark",
        "Times a few denoising steps of LongCat-Video with two settings on this machine, in turns, plots the times "
        "with their range, and says whether the settings can be distinguished.",
        (
            replace(MODEL, help="A: LongCat-Video, with or without LongCat Optimizations"),
            Socket("latent_image", "Latent", "sets the size of the video, for instance Empty LongCat Latent; "
                   "conditioning frames from a LongCat node are kept"),
            shared("steps", default=3, most=20, shown="", help="number of timed steps for each setting, with one more "
                "step before each turn; the median counts, and fewer than 3 allow no verdict"),
            GUIDANCE,
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
            replace(MODEL, help="A, the reference: LongCat-Video with settings that you trust"),
            Socket("model_b", "Model", "B: the same model with LongCat Step Cache, LongCat Optimizations, a LoRA, "
                   "another weight dtype or other patches"),
            replace(VAE, help="the Wan 2.1 VAE, which decodes both"),
            POSITIVE,
            NEGATIVE,
            Socket("latent_image", "Latent", "as for LongCat Sampler; conditioning frames are the same in both "
                   "videos and are not compared"),
            SEED,
            STEPS,
            GUIDANCE,
            MODE,
            own("noise_floor", "switch", "sample A again with another exact attention kernel, to show how far apart "
                 "two correct runs are; takes as long as A", True),
            KV_CACHE,
            replace(GUIDANCE_UNTIL, row=replace(GUIDANCE_UNTIL.row, help="share of the steps, from the first on, that "
                    "have guidance in B; A has it in all")),
            replace(SPEED, row=replace(SPEED.row, help="set of lossy options for B, on a copy of its MODEL, as in "
                    "LongCat Sampler; with one MODEL as A and B it shows what the word costs")),
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
            replace(MODEL, help="LongCat-Video or its avatar with the LoRAs that you use, without LongCat Step Cache "
                    "and without block-sparse attention"),
            POSITIVE,
            NEGATIVE,
            Socket("latent_image", "Latent", "as for LongCat Sampler, in the size that you generate; conditioning "
                   "frames are always attended to exactly"),
            SEED,
            shared("steps", "calibrate", default=10, shown="", help="number of denoising steps: 10, or 16 for "
                   "distilled; fewer than for a video will do"),
            GUIDANCE,
            MODE,
            shared("budget", "calibrate"),
            shared("dense_steps", "calibrate", advanced=True),
            own("file", "text", "name of the file inside ComfyUI's output folder; a name that is taken gets a number",
                "longcat/calibration.json"),
            KV_CACHE,
        ),
        (
            Socket("calibration", "String", "path of the file"),
            Socket("report", "String", "the densities and the expected speed-up; LongCat Fidelity shows what they "
                   "change in a video"),
        ),
        shows=True,
    ),
    **AVATAR_NODES,
}  # fmt: skip
