"""The workflows of the real weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longcat_core.generate.speeds import prices_in_words
from longcat_core.sampling.guidance import AVATAR_NEGATIVE_PROMPT

from .graph import Graph
from .parts import (
    avatar_long,
    decoded,
    latent,
    loaders,
    long_video,
    prompts,
    refine_long,
    report,
    sampler,
    saved,
    speech,
    with_sound,
)
from .weights import (
    AVATAR,
    BASE,
    BF16,
    DISTILL,
    DMD,
    FP8,
    OFFICIAL,
    REFINEMENT,
    TALKING,
    TEXT,
    VAE,
    WHISPER,
    Weight,
    table,
)

FILES = {"model": FP8.name, "text": TEXT.name, "vae": VAE.name}
MODELS = {"model": (FP8.model, BF16.model), "text": (TEXT.model,), "vae": (VAE.model,)}
SPEAKING = {"model": AVATAR.name, "text": TEXT.name, "vae": VAE.name, "ear": WHISPER.name}
SPEAKING_MODELS = {"model": (AVATAR.model,), "text": (TEXT.model,), "vae": (VAE.model,), "ear": (WHISPER.model,)}
CAT = "A ginger cat walks through tall grass towards the camera, golden evening light, shallow depth of field."
SAILS = """A small sailing boat leaves a quiet harbour at sunrise, gentle waves, camera follows from behind.
The boat reaches the open sea, the wind freshens and the sails fill, spray over the bow.
Dolphins appear beside the boat and leap through the waves in bright sunlight.
The boat turns towards a rocky island with a white lighthouse, clouds gather on the horizon."""
ELSEWHERE = f"""The page offers the files that are missing; put them there and press R. The folder dit of
[meituan-longcat/LongCat-Video]({OFFICIAL}) works in place of the single file, as
diffusion_models/LongCat-Video/dit."""
BESIDE = f"""The page offers missing files; the official folder [base_model]({OFFICIAL}-Avatar-1.5) works too, as
diffusion_models/LongCat-Video-Avatar-1.5/base_model."""
WOMAN = (
    "A woman in a dark green blouse sits at a desk by a window and talks to the camera, her hands resting on the desk. "
    "Static camera, soft daylight, a bookshelf out of focus behind her."
)
COUPLE = (
    "Two people sit side by side at a table in a bright studio and talk with each other. Static camera, they turn to "
    "each other and smile now and then."
)
# What mode distilled of the sampler is for an avatar 1.5.
DISTILLED = {"steps": 8, "guidance": 1, "mode": "distilled"}
SEGMENTS = """Segments of 93 frames, each begun with the last 13 of the one before: 3 are 16.9 seconds. Finished ones
are kept in ComfyUI's output folder, under **folder**; an interrupted run goes on where it stopped."""


def real(number: int, title: str, label: str, shown: Sequence[str], text: str, *more: Weight) -> Graph:
    note = "\n\n".join((" ".join(text.split()), table((*BASE, *more)), " ".join(ELSEWHERE.split())))
    return Graph(f"LongCat real {number} - {title}", f"LongCat: {title}", note, label, tuple(shown))


def talking(number: int, title: str, label: str, shown: Sequence[str], text: str) -> Graph:
    # One paragraph, since these templates are tall.
    note = "\n\n".join((" ".join(f"{text} {BESIDE}".split()), table(TALKING)))
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


def avatar() -> Graph:
    text = """One segment of a person who says the loaded sound: 832x480, 93 frames at 25 a second (3.7 seconds), 8
    steps with the DMD LoRA. Load speech without music. **segment** of LongCat Avatar says which part of the sound it
    is; *avatar, long video* makes all of it."""
    shown = ("a red circle pulses on a white background",)
    graph = talking(11, "avatar from text", "avatar from text", shown, text)
    loaders(graph, SPEAKING, width=250, models=SPEAKING_MODELS)
    graph.add("audio", "LoadAudio", bottom=True)
    graph.column(290, "2  What to make")
    lora(graph, DMD)
    prompts(graph, WOMAN, same_column=True, negative=AVATAR_NEGATIVE_PROMPT)
    graph.add("voices", "LongCatEncodeAudio", bottom=True)
    graph.column(260)
    speech(graph, audio_guidance=1)
    return with_sound(graph, "lora.MODEL", "longcat_avatar", **DISTILLED)


def avatar_from_image() -> Graph:
    # Guidance 1 reads no negative prompt, and one more node would not fit on the screen.
    text = "The person says the sound: 93 frames, 8 steps."
    shown = ("a green circle pulses on a black background",)
    graph = talking(12, "avatar from an image", "avatar from an image", shown, text)
    loaders(graph, SPEAKING, width=250, models=SPEAKING_MODELS)
    graph.add("audio", "LoadAudio", bottom=True)
    graph.column(290, "2  What to make")
    graph.add("image", "LoadImage", tall=250, image="example.png")
    graph.add("positive", "CLIPTextEncode", "Prompt (guidance 1 needs no negative)", text=WOMAN)
    graph.add("voices", "LongCatEncodeAudio", bottom=True)
    graph.link("text.CLIP positive.clip")
    graph.column(260)
    lora(graph, DMD)
    speech(graph, negative="positive", audio_guidance=1)
    graph.link("image.IMAGE latent.image")
    return with_sound(graph, "lora.MODEL", "longcat_avatar_image", **DISTILLED)


def two_people() -> Graph:
    text = """Two people of an image, each with a sound: **together** starts both at once, **in turn** one after the
    other. A box, or a mask, around each whole person says who has which voice. Segments follow until the sound ends."""
    shown = ("a red circle pulses and a blue square pulses on a gray background",)
    graph = talking(13, "avatar, two people", "two people talk", shown, text)
    loaders(graph, SPEAKING, width=260, models=SPEAKING_MODELS)
    graph.column(280, "2  What to make")
    lora(graph, DMD)
    graph.add("image", "LoadImage", tall=300, bottom=True, image="example.png")
    graph.column(270)
    graph.add("boxes", "LongCatAvatarBoxes", tall=340)
    graph.add("audio_2", "LoadAudio", "What person 2 says", bottom=True)
    graph.add("audio", "LoadAudio", "What person 1 says", bottom=True)
    avatar_long(graph, "lora.MODEL", COUPLE, "avatar-two", **DISTILLED, audio_guidance=1)
    graph.link(
        "image.IMAGE boxes.image",
        "boxes.person_1 long.person_1",
        "boxes.person_2 long.person_2",
        "audio_2.AUDIO long.audio_2",
    )
    return saved(graph, "long", "longcat_avatar_two", of="long")


def avatar_long_video() -> Graph:
    text = """The person of the image says the whole sound, in segments of 93 frames at 25 a second, each begun with the
    last 13 of the one before; the video ends with the sound. Finished segments are kept in ComfyUI's output folder,
    under **folder**; an interrupted run goes on where it stopped. A prompt a line is a prompt a segment. Without an
    image, the prompt describes the person."""
    shown = ("a blue circle pulses on a white background",)
    graph = talking(14, "avatar, long video", "avatar, long video", shown, text)
    loaders(graph, SPEAKING, models=SPEAKING_MODELS)
    graph.add("audio", "LoadAudio", bottom=True)
    graph.column(300, "2  What to make")
    lora(graph, DMD)
    graph.add("image", "LoadImage", tall=300, bottom=True, image="example.png")
    avatar_long(graph, "lora.MODEL", WOMAN, "avatar-long", **DISTILLED, audio_guidance=1)
    return saved(graph, "long", "longcat_avatar_long", of="long")


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
        avatar,
        avatar_from_image,
        two_people,
        avatar_long_video,
    ):
        yield make()
