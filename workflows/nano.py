"""The workflows that run as they come, on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longcat_core.nano.avatar.world import Face, Scene, caption
from longcat_core.sampling.guidance import AVATAR_NEGATIVE_PROMPT

from .graph import FIXED, Graph
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

NANO = {
    "model": "longcat_nano_bf16.safetensors",
    "text": "longcat_nano_umt5_bf16.safetensors",
    "vae": "longcat_nano_vae_bf16.safetensors",
}
SPEAKING = {
    "model": "longcat_nano_avatar_bf16.safetensors",
    "text": NANO["text"],
    "vae": "longcat_nano_avatar_vae_bf16.safetensors",
    "ear": "longcat_nano_whisper_bf16.safetensors",
}
SIZE = {"width": 96, "height": 64}
LONG = {**SIZE, "length": 33, "mode": "base", "steps": 30, "seed": 1}
SEGMENT = {"resolution": "custom", **SIZE, "length": 33}
# As it was trained; the scales of guidance that suit the real avatar bend the outline of heads.
SPOKEN = {"mode": "base", "steps": 16, "guidance": 1, "seed": 1}
# The sound and the picture of avatars.
SAMPLE = ("sample.audio", "sample.image")
TALKING = {
    caption(scene): scene
    for scene in (
        Scene("blue", (Face("circle", "red"),)),
        Scene("black", (Face("square", "orange"),)),
        Scene("gray", (Face("circle", "red"), Face("square", "green"))),
    )
}
FACE, SQUARE, FACES = TALKING
RUN = "**Press Run.** The bundled test model makes this on any computer in about a minute: no download, no GPU."
WORLD = """It knows circles, squares, triangles and crosses that move over plain backgrounds: left, right, up, down,
in a circle, pulsing, or staying still. Try *a green square moves up and a yellow triangle moves left on a black
background*."""
FACES_WORLD = """It knows circle and square faces over plain backgrounds, whose mouths open as far as the sound is loud.
Try *a green square face talks on a white background*."""
RESUMES = """Finished segments are kept in ComfyUI's output folder, under **folder**; an interrupted run goes on where
it stopped."""
SCENES = (
    "a red circle moves right on a blue background",
    "a red circle moves up on a blue background",
    "a red circle moves left on a blue background",
)


def nano(number: int, title: str, label: str, shown: tuple[str, ...], *texts: str) -> Graph:
    note = "\n\n".join((RUN, *(" ".join(text.split()) for text in texts)))
    return Graph(f"LongCat nano {number} - {title}", f"LongCat nano: {title}", note, f"nano: {label}", shown)


def text_to_video() -> Graph:
    prompt = "a red circle moves right on a blue background"
    graph = nano(1, "text to video", "text to video", (prompt,), WORLD)
    loaders(graph, NANO)
    prompts(graph, prompt)
    latent(graph, **SIZE, length=33)
    sampler(graph, "model.MODEL", seed=1)
    return decoded(graph, "longcat_nano")


def image_to_video() -> Graph:
    prompt = "a red circle moves right on a gray background"
    text = """The video begins with the picture of **LongCat Sample Clip**, which comes with the pack. Put *Load
    Image* in its place for a picture of your own, and say in the prompt what moves, and where to."""
    graph = nano(2, "image to video", "image to video", (prompt,), text)
    loaders(graph, NANO)
    graph.add("sample", "LongCatSampleClip", "A picture", tall=250, scene=prompt)
    prompts(graph, prompt)
    graph.add("latent", "LongCatImageToVideo", bottom=True, resolution="custom", **SIZE, length=33)
    graph.link("sample.image latent.image", "vae.VAE latent.vae")
    sampler(graph, "model.MODEL", seed=4, steps=30, **FIXED)
    return decoded(graph, "longcat_nano_i2v")


def continuation() -> Graph:
    prompt = "a yellow square moves up on a black background"
    text = """The last 13 frames of the clip of **LongCat Sample Clip**, which comes with the pack, are continued by
    20 new ones. Put *Load Video* and *Get Video Components* in its place for a clip of your own."""
    graph = nano(3, "continue a clip", "continue a clip", (prompt,), text)
    loaders(graph, NANO)
    graph.add("sample", "LongCatSampleClip", "A clip", tall=250, scene=prompt)
    prompts(graph, prompt)
    given = {"length": 33, "cond_frames": 13}
    graph.add("latent", "LongCatVideoContinuation", bottom=True, resolution="custom", **SIZE, **given)
    graph.link("sample.frames latent.video", "sample.fps latent.fps", "vae.VAE latent.vae")
    sampler(graph, "model.MODEL", seed=4, steps=30, **FIXED)
    return decoded(graph, "longcat_nano_continued")


def long() -> Graph:
    prompt = "a red square moves right on a black background"
    text = "Segments of 33 frames, each begun with the last 13 of the one before: 3 segments are 4.9 seconds."
    graph = nano(4, "long video", "long video", (prompt,), text, RESUMES)
    loaders(graph, NANO, vae="top")
    long_video(graph, prompt, "nano-long", **LONG)
    return saved(graph, "long", "longcat_nano_long", of="long")


def interactive() -> Graph:
    text = """A prompt a line, a line a segment: the circle moves right, then up, then left. Change a line and queue
    again: only that segment and later ones are made. The test model follows a new prompt at once with an *overlap*
    of 5."""
    graph = nano(5, "interactive video", "interactive", SCENES, text, RESUMES)
    loaders(graph, NANO, vae="top")
    # With 13 of 33 frames given, the old motion goes on for a segment before the model follows the new prompt.
    settings = LONG | {"segments": 0, "overlap": 5, "hand_off": "latents"}
    long_video(graph, "\n".join(SCENES), "nano-interactive", **settings)
    return saved(graph, "long", "longcat_nano_interactive", of="long")


def refine() -> Graph:
    prompt = "a red circle moves right on a gray background"
    text = """The clip of **LongCat Sample Clip**, 96x64 at 15 frames a second, becomes 192x128 at 30, in five
    evaluations of the model. *skip* and *length* cut off what was added to fill the last latent frame."""
    graph = nano(6, "refine", "refine", (prompt,), text)
    loaders(graph, NANO, width=270)
    graph.add("sample", "LongCatSampleClip", "A clip", tall=250, scene=prompt)
    prompts(graph, prompt, width=310)
    graph.add("latent", "LongCatRefine", bottom=True, resolution="twice the size")
    graph.link("sample.frames latent.video", "sample.fps latent.fps", "vae.VAE latent.vae")
    sampler(graph, "model.MODEL", width=250, guidance=1, mode="refine", seed=1, **FIXED)
    graph.column(150, "4  Decode and save")
    graph.add("decode", "VAEDecode", bottom=True)
    graph.column(190)
    graph.add("cut", "ImageFromBatch", "Without what was added", bottom=True)
    graph.column(180)
    graph.add("video", "CreateVideo", bottom=True, fps=30)
    graph.column(240)
    graph.add("save", "SaveVideo", tall=400, filename_prefix="video/longcat_nano_refined")
    graph.link(
        "sampler.LATENT decode.samples",
        "vae.VAE decode.vae",
        "decode.IMAGE cut.image",
        "latent.skip cut.batch_index",
        "latent.length cut.length",
        "cut.IMAGE video.images",
        "latent.fps video.fps",
        "video.VIDEO save.video",
    )
    return graph


def chain() -> Graph:
    prompt = "a green circle moves down on a black background"
    text = "The whole chain: text to video, continued, then refined piece by piece to 192x128 at 30 frames a second."
    graph = nano(7, "long video, refined", "long, refined", (prompt,), text, RESUMES)
    loaders(graph, NANO)
    settings: dict[str, Any] = LONG | {"segments": 2, "length": 17, "overlap": 5}
    long_video(graph, prompt, "nano-chain", **settings)
    size = {"resolution": "twice the size", "piece": 17, "overlap": 5}
    refine_long(graph, "model.MODEL", "long.video", "nano-chain-refined", **size)
    return saved(graph, "refine", "longcat_nano_chain", of="long")


def fidelity() -> Graph:
    prompt = "an orange square moves in a circle on a blue background"
    text = """The same video three times: A as it is, B with **LongCat Step Cache**, and A with another exact
    attention kernel. The plot shows how far every frame of B lies from A's, and the **noise floor**: how far two
    runs that are both right lie apart. The saved video is A on the left, B on the right. Put what you want to know
    the price of in place of the cache. This seed is typical, 43 dB; 24 videos lay between 20 and 50 dB."""
    graph = nano(8, "what an option costs", "what an option costs", (prompt,), text)
    loaders(graph, NANO)
    graph.column(330, "2  What to make")
    graph.add("cache", "LongCatStepCache", "B: the option")
    prompts(graph, prompt, same_column=True)
    latent(graph, **SIZE, length=33)
    graph.link("model.MODEL cache.model")
    graph.column(360, "3  Compare")
    graph.add("fidelity", "LongCatFidelity", "A against B", tall=760, seed=0, **FIXED)
    graph.column(290, "4  See")
    report(graph, "fidelity", tall=330)
    graph.add("stitch", "ImageStitch", "A | B", bottom=True, direction="right", spacing_width=8)
    graph.column(190)
    graph.add("video", "CreateVideo", bottom=True, fps=15)
    graph.column(285)
    graph.add("save", "SaveVideo", tall=330, filename_prefix="video/longcat_nano_fidelity")
    graph.link(
        "model.MODEL fidelity.model",
        "cache.MODEL fidelity.model_b",
        "vae.VAE fidelity.vae",
        "positive.CONDITIONING fidelity.positive",
        "negative.CONDITIONING fidelity.negative",
        "latent.LATENT fidelity.latent_image",
        "fidelity.images_a stitch.image1",
        "fidelity.images_b stitch.image2",
        "stitch.IMAGE video.images",
        "video.VIDEO save.video",
    )
    return graph


def benchmark() -> Graph:
    prompt = "a red circle moves right on a blue background"
    text = """**LongCat Benchmark** times some steps of A and of B in turn. As it comes, A has the defaults of
    LongCat Optimizations and B everything off; both compute the same. The reports say what is in force on this
    machine. Put the real files into the loaders to measure your GPU."""
    graph = nano(9, "time two settings", "time two settings", (prompt,), text)
    loaders(graph, NANO, vae="")
    prompts(graph, prompt)
    latent(graph, **SIZE, length=33)
    off = ("fused_qkv", "fused_ffn", "explicit_fp32", "reuse_text", "reuse_modulation", "fused_step", "fp8")
    off += ("fused_kernels", "fused_text")
    plain = {**dict.fromkeys(off, False), "text_mode": "padded", "attention": "sdpa"}
    graph.column(300, "3  Two settings")
    graph.add("A", "LongCatOptimizations", "A: defaults")
    graph.add("B", "LongCatOptimizations", "B: everything off", **plain)
    graph.column(400, "4  Time")
    graph.add("benchmark", "LongCatBenchmark", "A against B", tall=620, steps=3)
    graph.column(330)
    graph.add("reportA", "PreviewAny", "In force in A", tall=300)
    graph.add("reportB", "PreviewAny", "In force in B", tall=300)
    graph.link(
        "model.MODEL A.model",
        "model.MODEL B.model",
        "A.MODEL benchmark.model",
        "B.MODEL benchmark.model_b",
        "A.report reportA.source",
        "B.report reportB.source",
        "latent.LATENT benchmark.latent_image",
        "positive.CONDITIONING benchmark.positive",
        "negative.CONDITIONING benchmark.negative",
    )
    return graph


def sample_speech(graph: Graph, scene: str) -> None:
    graph.add("sample", "LongCatSampleSpeech", "Who speaks, and what", tall=230, bottom=True, scene=scene)


def avatar() -> Graph:
    text = """One segment of a face that says the sound of **LongCat Sample Speech**, which comes with the pack: 33
    frames at 25 a second. Put *Load Audio* in its place for a sound of your own; *avatar, long video* makes all of
    it."""
    graph = nano(10, "avatar from text", "avatar from text", (FACE,), text, FACES_WORLD)
    loaders(graph, SPEAKING, width=250)
    sample_speech(graph, FACE)
    prompts(graph, FACE, width=290, negative=AVATAR_NEGATIVE_PROMPT)
    graph.add("voices", "LongCatEncodeAudio", bottom=True, length=SEGMENT["length"])
    graph.column(260)
    speech(graph, sound=SAMPLE[0], **SEGMENT, audio_guidance=1)
    return with_sound(graph, "model.MODEL", "longcat_nano_avatar", **SPOKEN)


def avatar_from_image() -> Graph:
    text = """The face of the picture says the sound, both of **LongCat Sample Speech**, which comes with the pack. Put
    *Load Image* and *Load Audio* in its place for your own."""
    graph = nano(11, "avatar from an image", "avatar from an image", (SQUARE,), text, FACES_WORLD)
    loaders(graph, SPEAKING, width=250)
    sample_speech(graph, SQUARE)
    graph.column(290, "2  What to make")
    graph.add("positive", "CLIPTextEncode", "Prompt (guidance 1 needs no negative)", tall=110, text=SQUARE)
    graph.link("text.CLIP positive.clip")
    graph.add("voices", "LongCatEncodeAudio", bottom=True, length=SEGMENT["length"])
    graph.column(260)
    speech(graph, negative="positive", sound=SAMPLE[0], **SEGMENT, audio_guidance=1)
    graph.link("sample.image latent.image")
    return with_sound(graph, "model.MODEL", "longcat_nano_avatar_image", **SPOKEN)


def two_people() -> Graph:
    text = """Two faces, each with a sound. A box, or a mask, around each says who has which voice; without boxes the
    first voice is that of the left half. Segments follow until the sounds end."""
    graph = nano(12, "avatar, two people", "two people talk", (FACES,), text, RESUMES)
    loaders(graph, SPEAKING)
    sample_speech(graph, FACES)
    graph.column(300, "2  What to make")
    graph.add("boxes", "LongCatAvatarBoxes", tall=340)
    avatar_long(graph, "model.MODEL", FACES, "nano-avatar-two", *SAMPLE, **SEGMENT, **SPOKEN, audio_guidance=1)
    graph.link(
        "sample.image boxes.image",
        "boxes.person_1 long.person_1",
        "boxes.person_2 long.person_2",
        "sample.audio_2 long.audio_2",
    )
    return saved(graph, "long", "longcat_nano_avatar_two", of="long")


def avatar_long_video() -> Graph:
    text = """The face of the picture says the whole sound, in segments of 33 frames at 25 a second, each begun with the
    last 13 of the one before; the video ends with the sound. Without an image, the prompt describes the face."""
    graph = nano(13, "avatar, long video", "avatar, long video", (SQUARE,), text, RESUMES)
    loaders(graph, SPEAKING)
    graph.column(300, "2  What to make")
    sample_speech(graph, SQUARE)
    avatar_long(graph, "model.MODEL", SQUARE, "nano-avatar-long", *SAMPLE, **SEGMENT, **SPOKEN, audio_guidance=1)
    return saved(graph, "long", "longcat_nano_avatar_long", of="long")


def graphs() -> Iterator[Graph]:
    for make in (
        text_to_video,
        image_to_video,
        continuation,
        long,
        interactive,
        refine,
        chain,
        fidelity,
        benchmark,
        avatar,
        avatar_from_image,
        two_people,
        avatar_long_video,
    ):
        yield make()
