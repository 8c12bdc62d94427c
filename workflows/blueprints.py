"""The subgraphs in ComfyUI's node search: text to video, and long video refined, each as one node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .graph import Graph
from .parts import latent, loaders, prompts
from .real import CAT, FILES, MODELS, lora
from .weights import REFINEMENT


@dataclass
class Blueprint:
    """graph: what is inside. inputs: name outside -> the inputs "node.name" that it sets. outputs: "node.name" each."""

    graph: Graph
    description: str
    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]


NAMES = {
    "model_name": ("model.model_name",),
    "text_encoder_name": ("text.text_encoder_name",),
    "vae_name": ("vae.vae_name",),
}


def text_to_video() -> Blueprint:
    graph = Graph("LongCat Text to Video", "", "", "", ())
    loaders(graph, FILES, models=MODELS)
    prompts(graph, CAT)
    latent(graph, width=832, height=480, length=93)
    graph.column(290)
    graph.add("sampler", "LongCatSampler")
    graph.column(200)
    graph.add("decode", "LongCatVAEDecode", bottom=True, fps=15)
    graph.link(
        "model.MODEL sampler.model",
        "positive.CONDITIONING sampler.positive",
        "negative.CONDITIONING sampler.negative",
        "latent.LATENT sampler.latent_image",
        "sampler.LATENT decode.samples",
        "vae.VAE decode.vae",
    )
    inputs = {
        "prompt": ("positive.text",),
        "negative_prompt": ("negative.text",),
        "width": ("latent.width",),
        "height": ("latent.height",),
        "length": ("latent.length",),
        "seed": ("sampler.seed",),
        "steps": ("sampler.steps",),
        "guidance": ("sampler.guidance",),
        "mode": ("sampler.mode",),
        **NAMES,
    }
    text = "Makes a video from a prompt with LongCat-Video: 832x480, 93 frames at 15 a second, 50 steps."
    return Blueprint(graph, text, inputs, ("decode.video",))


def long_video_refined() -> Blueprint:
    graph = Graph("LongCat Long Video, Refined", "", "", "", ())
    loaders(graph, FILES, models=MODELS)
    graph.column(400)
    lora(graph, REFINEMENT)
    graph.add("long", "LongCatLongVideo", prompts=CAT, folder="longcat/long-video")
    graph.link("model.MODEL long.model", "text.CLIP long.clip", "vae.VAE long.vae")
    graph.column(290)
    graph.add("sparse", "LongCatBlockSparseAttention")
    graph.column(340)
    graph.add("refine", "LongCatRefineLongVideo", folder="longcat/long-video-720p")
    graph.link(
        "lora.MODEL sparse.model",
        "sparse.MODEL refine.model",
        "text.CLIP refine.clip",
        "vae.VAE refine.vae",
        "long.video refine.video",
    )
    inputs = {
        "prompts": ("long.prompts",),
        "segments": ("long.segments",),
        "width": ("long.width",),
        "height": ("long.height",),
        "length": ("long.length",),
        "seed": ("long.seed",),
        "steps": ("long.steps",),
        "mode": ("long.mode",),
        "resolution": ("refine.resolution",),
        "folder": ("long.folder",),
        "refined_folder": ("refine.folder",),
        **NAMES,
        "refinement_lora": ("lora.lora_name",),
    }
    text = (
        "Makes a video of several segments from one prompt, or one prompt for each, and refines it to 1280x704 at 30 "
        "frames a second. What is finished is kept in the two folders; the same settings resume."
    )
    return Blueprint(graph, text, inputs, ("refine.video", "long.report"))


def blueprints() -> Iterator[Blueprint]:
    yield text_to_video()
    yield long_video_refined()
