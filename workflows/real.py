"""The workflows of the real weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longcat_core.generate.speeds import prices_in_words

from .graph import Graph
from .parts import decoded, latent, loaders, long_video, prompts, refine_long, report, sampler, saved
from .weights import BASE, BF16, DISTILL, FP8, OFFICIAL, REFINEMENT, TEXT, VAE, Weight, table

FILES = {"model": FP8.name, "text": TEXT.name, "vae": VAE.name}
MODELS = {"model": (FP8.model, BF16.model), "text": (TEXT.model,), "vae": (VAE.model,)}
CAT = "A ginger cat walks through tall grass towards the camera, golden evening light, shallow depth of field."
SAILS = """A small sailing boat leaves a quiet harbour at sunrise, gentle waves, camera follows from behind.
The boat reaches the open sea, the wind freshens and the sails fill, spray over the bow.
Dolphins appear beside the boat and leap through the waves in bright sunlight.
The boat turns towards a rocky island with a white lighthouse, clouds gather on the horizon."""
ELSEWHERE = f"""The page offers the files that are missing; put them there and press R. The folder dit of
[meituan-longcat/LongCat-Video]({OFFICIAL}) works in place of the single file, as
diffusion_models/LongCat-Video/dit."""
SEGMENTS = """Segments of 93 frames, each begun with the last 13 of the one before: 3 are 16.9 seconds. Finished ones
are kept in ComfyUI's output folder, under **folder**; an interrupted run goes on where it stopped."""


def real(number: int, title: str, label: str, shown: Sequence[str], text: str, *more: Weight) -> Graph:
    note = "\n\n".join((" ".join(text.split()), table((*BASE, *more)), " ".join(ELSEWHERE.split())))
    return Graph(f"LongCat real {number} - {title}", f"LongCat: {title}", note, label, tuple(shown))


def text_to_video() -> Graph:
    text = "832x480, 93 frames at 15 a second (6 seconds), 50 steps, guidance 4: the settings of the model card."
    shown = ("a green square moves up on a black background",)
    graph = real(1, "text to video 480p", "text to video 480p", shown, text)
    loaders(graph, FILES, models=MODELS)
    prompts(graph, CAT)
    latent(graph, width=832, height=480, length=93)
    sampler(graph, "model.MODEL")
    return decoded(graph, "longcat")


def distilled() -> Graph:
    text = "The step LoRA does in 16 steps at guidance 1 what else takes 50 at guidance 4: six times fewer evaluations."
    shown = ("a yellow triangle moves left on a brown background",)
    graph = real(2, "text to video 480p, 16 steps", "distilled, 16 steps", shown, text, DISTILL)
    loaders(graph, FILES, models=MODELS)
    graph.column(340, "2  What to make")
    lora(graph, DISTILL)
    prompts(graph, CAT, same_column=True)
    latent(graph, width=832, height=480, length=93)
    sampler(graph, "lora.MODEL", steps=16, guidance=1, mode="distilled")
    return decoded(graph, "longcat_distilled")


def image_to_video() -> Graph:
    text = """Load an image: it becomes the first frame, cut to the 480p size nearest in shape. The latent also
    works with stock samplers (KSampler, SamplerCustomAdvanced)."""
    shown = ("a purple circle pulses on a gray background",)
    graph = real(3, "image to video 480p", "image to video 480p", shown, text)
    loaders(graph, FILES, vae="top", models=MODELS)
    graph.add("image", "LoadImage", tall=300, bottom=True, image="example.png")
    prompts(graph, CAT)
    graph.add("latent", "LongCatImageToVideo", bottom=True)
    graph.link("vae.VAE latent.vae", "image.IMAGE latent.image")
    sampler(graph, "model.MODEL")
    return decoded(graph, "longcat_i2v")


def continuation() -> Graph:
    text = """Load a clip of at least 0.9 s: its last 13 frames at 15 a second are given, 80 new ones follow. The
    saved video begins with the given frames."""
    shown = ("an orange cross moves down on a blue background",)
    graph = real(4, "continue a clip 480p", "continue a clip", shown, text)
    loaders(graph, FILES, width=290, vae="top", models=MODELS)
    graph.add("clip", "LoadVideo", tall=200, bottom=True)
    prompts(graph, CAT, width=270)
    graph.add("frames", "GetVideoComponents", bottom=True)
    graph.column(250)
    graph.add("latent", "LongCatVideoContinuation", bottom=True)
    graph.link("clip.VIDEO frames.video", "frames.images latent.video", "frames.fps latent.fps", "vae.VAE latent.vae")
    sampler(graph, "model.MODEL", mode="enhance_hf", width=250)
    return decoded(graph, "longcat_continued", save_width=240)


def long() -> Graph:
    shown = ("a white triangle moves right on a green background",)
    graph = real(5, "long video 480p", "long video 480p", shown, SEGMENTS)
    loaders(graph, FILES, vae="top", models=MODELS)
    long_video(graph, CAT, "long-video")
    return saved(graph, "long", "longcat_long", of="long")


def interactive() -> Graph:
    text = "A prompt a line, a line a segment. Change one and queue again: that segment and later ones are made."
    shown = ("a yellow circle moves right on a black background", "a yellow circle moves up on a black background")
    graph = real(6, "interactive video 480p", "interactive 480p", shown, f"{text} {SEGMENTS}")
    loaders(graph, FILES, vae="top", models=MODELS)
    long_video(graph, SAILS, "interactive", segments=0)
    return saved(graph, "long", "longcat_interactive", of="long")


def lora(graph: Graph, weight: Weight) -> None:
    settings = {"lora_name": weight.name, "strength_model": 1, "models": (weight.model,)}
    graph.add("lora", "LoraLoaderModelOnly", **settings)
    graph.link("model.MODEL lora.model")


def refine() -> Graph:
    text = """Load a finished video of any length: it becomes 1280x704 at twice the frame rate, piece by piece, in
    five evaluations of the model for each piece. Its sound is kept."""
    shown = ("a purple cross moves in a circle on a white background",)
    graph = real(7, "refine to 720p", "refine to 720p", shown, text, REFINEMENT)
    loaders(graph, FILES, vae="top", models=MODELS)
    graph.column(320, "2  What to refine")
    lora(graph, REFINEMENT)
    graph.add("clip", "LoadVideo", tall=250, bottom=True)
    graph.column(250)
    graph.add("sparse", "LongCatBlockSparseAttention")
    graph.add("sound", "GetVideoComponents", "Its sound", bottom=True)
    graph.link("lora.MODEL sparse.model", "clip.VIDEO sound.video")
    refine_long(graph, "sparse.MODEL", "clip.VIDEO", "refined")
    graph.column(200, "4  Save")
    graph.add("video", "CreateVideo", bottom=True, fps=30)
    graph.column(320)
    graph.add("save", "SaveVideo", tall=330, filename_prefix="video/longcat_720p")
    # Not the node's VIDEO, which has no sound; Create Video takes the frames of a LongCat node one by one.
    graph.link(
        "refine.images video.images", "sound.audio video.audio", "refine.fps video.fps", "video.VIDEO save.video"
    )
    return graph


def chain() -> Graph:
    text = "The whole chain: text to video, continued, then refined piece by piece to 1280x704 at 30 frames a second."
    shown = ("a cyan circle moves right on a brown background",)
    graph = real(8, "long video, refined to 720p", "long, then 720p", shown, f"{text} {SEGMENTS}", REFINEMENT)
    loaders(graph, FILES, models=MODELS)
    graph.column(380, "2  What to make")
    lora(graph, REFINEMENT)
    long_video(graph, CAT, "long-video", same_column=True)
    graph.column(290)
    graph.add("sparse", "LongCatBlockSparseAttention")
    report(graph, "long", "Segments and joins", bottom=True)
    graph.link("lora.MODEL sparse.model")
    refine_long(graph, "sparse.MODEL", "long.video", "long-video-720p")
    return saved(graph, "refine", "longcat_long_720p")


def fast() -> Graph:
    text = f"""**speed** on LongCat Sampler stands for a set of lossy options that was measured: {prices_in_words()}.
    The console says what is in force. For fastest load with weight_dtype fp8 rowwise. LongCat Fidelity shows what a
    word changes in your own video."""
    shown = ("a red square moves left on a white background",)
    graph = real(9, "text to video 480p, fast", "480p, fast", shown, text)
    loaders(graph, FILES, models=MODELS)
    prompts(graph, CAT)
    latent(graph, width=832, height=480, length=93)
    sampler(graph, "model.MODEL", speed="fast")
    return decoded(graph, "longcat_fast")


def sparse() -> Graph:
    text = """**LongCat Sparse Attention** computes some blocks exactly, here 15 %, and counts every other block as its
    mean: faster at this size, and lossy. LongCat Calibrate finds for each head how many blocks it needs: put the name
    of its file into **calibration**. Videos of less than 1,024 tokens keep full attention."""
    shown = ("a blue circle moves up on a gray background",)
    graph = real(10, "text to video 480p, sparse attention", "sparse attention", shown, text)
    loaders(graph, FILES, models=MODELS)
    graph.column(340, "2  What to make")
    graph.add("sparse", "LongCatSparseAttention")
    graph.link("model.MODEL sparse.model")
    prompts(graph, CAT, same_column=True)
    latent(graph, width=832, height=480, length=93)
    sampler(graph, "sparse.MODEL")
    return decoded(graph, "longcat_sparse")


def graphs() -> Iterator[Graph]:
    for make in (
        text_to_video,
        distilled,
        image_to_video,
        continuation,
        long,
        interactive,
        refine,
        chain,
        fast,
        sparse,
    ):
        yield make()
