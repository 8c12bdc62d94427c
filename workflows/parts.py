"""Parts that several workflows share: loaders, prompts, sampling, saving, long video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT

from .graph import Graph


def loaders(
    graph: Graph,
    files: Mapping[str, str],
    width: float = 300,
    vae: str = "bottom",
    models: Mapping[str, Sequence[dict[str, str]]] = MappingProxyType({}),
) -> None:
    """The first column. vae: where its loader is, "top", "bottom" or "" for none. models: per loader, its downloads.

    files: those of an avatar name an audio encoder too.
    """
    graph.column(width, "1  Model files")
    graph.add("model", "LongCatModelLoader", model_name=files["model"], models=models.get("model", ()))
    graph.add("text", "LongCatTextEncoderLoader", text_encoder_name=files["text"], models=models.get("text", ()))
    if "ear" in files:
        graph.add("ear", "LongCatAudioEncoderLoader", audio_encoder_name=files["ear"], models=models.get("ear", ()))
    if vae:
        graph.add("vae", "VAELoader", bottom=vae == "bottom", vae_name=files["vae"], models=models.get("vae", ()))


def prompts(
    graph: Graph,
    prompt: str,
    width: float = 360,
    same_column: bool = False,
    negative: str = DEFAULT_NEGATIVE_PROMPT,
) -> None:
    if not same_column:
        graph.column(width, "2  What to make")
    graph.add("positive", "CLIPTextEncode", "Prompt", tall=110, text=prompt)
    graph.add("negative", "CLIPTextEncode", "Negative prompt", tall=150, text=negative)
    graph.link("text.CLIP positive.clip", "text.CLIP negative.clip")


def speech(graph: Graph, negative: str = "negative", sound: str = "audio.AUDIO", **settings: Any) -> None:
    """The conditioning of an avatar, in the last column. negative: the node of the negative prompt."""
    graph.add("latent", "LongCatAvatar", bottom=True, **settings)
    graph.link(
        "ear.AUDIO_ENCODER voices.audio_encoder",
        f"{sound} voices.audio",
        "vae.VAE latent.vae",
        "voices.voices latent.voices",
        "positive.CONDITIONING latent.positive",
        f"{negative}.CONDITIONING latent.negative",
    )


def with_sound(graph: Graph, model: str, prefix: str, **settings: Any) -> Graph:
    """LongCat Sampler behind LongCat Avatar, and the video with the sound of its segment."""
    graph.column(240, "3  Sample")
    graph.add("sampler", "LongCatSampler", tall=460, **settings)
    graph.column(225, "4  Decode and save")
    graph.add("decode", "LongCatVAEDecode", bottom=True, fps=25)
    graph.column(225)
    graph.add("video", "CreateVideo", bottom=True, fps=25)
    graph.column(260)
    graph.add("save", "SaveVideo", tall=400, filename_prefix=f"video/{prefix}")
    graph.link(
        f"{model} sampler.model",
        "latent.positive sampler.positive",
        "latent.negative sampler.negative",
        "latent.latent sampler.latent_image",
        "sampler.LATENT decode.samples",
        "vae.VAE decode.vae",
        "decode.images video.images",
        "latent.audio video.audio",
        "video.VIDEO save.video",
    )
    return graph


def latent(graph: Graph, **size: int) -> None:
    graph.add("latent", "LongCatEmptyLatent", bottom=True, **size)


def sampler(graph: Graph, model: str, width: float = 270, **settings: Any) -> None:
    graph.column(width, "3  Sample")
    # Tall enough for the preview that appears below the widgets.
    graph.add("sampler", "LongCatSampler", tall=460, **settings)
    graph.link(
        f"{model} sampler.model",
        "positive.CONDITIONING sampler.positive",
        "negative.CONDITIONING sampler.negative",
        "latent.LATENT sampler.latent_image",
    )


def decoded(graph: Graph, prefix: str, save_width: float = 350) -> Graph:
    """LongCat VAE Decode, which writes the file meanwhile, and Save Video behind the sampler."""
    graph.column(160, "4  Decode and save")
    graph.add("decode", "LongCatVAEDecode", bottom=True, fps=15)
    graph.column(save_width)
    graph.add("save", "SaveVideo", tall=400, filename_prefix=f"video/{prefix}")
    graph.link("sampler.LATENT decode.samples", "vae.VAE decode.vae", "decode.video save.video")
    return graph


def long_video(graph: Graph, prompts: str, folder: str, same_column: bool = False, **settings: Any) -> None:
    if not same_column:
        graph.column(400, "2  What to make")
    graph.add("long", "LongCatLongVideo", prompts=prompts, folder=f"longcat/{folder}", **settings)
    graph.link("model.MODEL long.model", "text.CLIP long.clip", "vae.VAE long.vae")


def avatar_long(
    graph: Graph,
    model: str,
    prompts: str,
    folder: str,
    sound: str = "audio.AUDIO",
    image: str = "image.IMAGE",
    **settings: Any,
) -> None:
    graph.column(400)
    graph.add("long", "LongCatAvatarLongVideo", prompts=prompts, folder=f"longcat/{folder}", **settings)
    graph.link(
        f"{model} long.model",
        "text.CLIP long.clip",
        "vae.VAE long.vae",
        "ear.AUDIO_ENCODER long.audio_encoder",
        f"{sound} long.audio",
        f"{image} long.image",
    )


def refine_long(graph: Graph, model: str, video: str, folder: str, **settings: Any) -> None:
    graph.column(340, "3  Refine")
    graph.add("refine", "LongCatRefineLongVideo", folder=f"longcat/{folder}", **settings)
    graph.link(f"{model} refine.model", "text.CLIP refine.clip", "vae.VAE refine.vae", f"{video} refine.video")


def report(graph: Graph, source: str, title: str = "Report", tall: float = 300, **place: bool) -> None:
    graph.add("report", "PreviewAny", title, tall=tall, **place)
    graph.link(f"{source}.report report.source")


def saved(graph: Graph, source: str, prefix: str, of: str = "") -> Graph:
    """Save Video for the VIDEO of `source`, and the report of `of`."""
    graph.column(420, "4  Save" if source == "refine" else "3  Save")
    graph.add("save", "SaveVideo", tall=400, filename_prefix=f"video/{prefix}")
    graph.link(f"{source}.video save.video")
    if of:
        report(graph, of, "Segments and joins")
    return graph
