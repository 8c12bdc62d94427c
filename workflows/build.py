"""Writes workflows/*.json through ComfyUI's own page, and their pictures.

    python -m workflows.build        # from the pack's folder; wants a checkout and Chromium

The graphs are told here by node and socket names; the page knows the rest of the file format.
"""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT
from tests.comfyui.browser import Page, open_page
from tests.comfyui.server import PACK, Installation, Server

WORKFLOWS = PACK / "workflows"
FIXED = {"control_after_generate": "fixed"}
# Tall enough for the preview that appears below the widgets.
SAMPLER = (300, 500)
COLUMNS = {"note": -430, "load": 0, "prompt": 350, "sample": 810, "save": 1150}
NANO = {
    "model": "longcat_nano_bf16.safetensors",
    "text": "longcat_nano_umt5_bf16.safetensors",
    "vae": "longcat_nano_vae_bf16.safetensors",
}
REAL = {"model": "LongCat-Video/dit", "text": "umt5_xxl_fp16.safetensors", "vae": "wan_2.1_vae.safetensors"}
NANO_PROMPT = "a red circle moves right on a blue background"
CAT = "A ginger cat walks through tall grass towards the camera, golden evening light, shallow depth of field."

NANO_NOTE = """## LongCat nano: text to video

Press **Run**. This is the small test model that comes with the pack: no download, no GPU, some seconds on a CPU.
It knows one world only: circles, squares, triangles and crosses that move over plain backgrounds.

Say what the scene is, for example
*a green square moves up and a yellow triangle moves left on a black background*.
Motions: left, right, up, down, in a circle, pulses, stays still.

Size 96x64, 33 frames, 50 steps and guidance 4 are what it was trained for."""

# A list: the columns of a table are as wide as their longest word, and what overhangs the note is cut off.
FILES_NOTE = """## {title}

**Files**, into ComfyUI's folder `models`:

- `diffusion_models/LongCat-Video/dit`: the whole folder `dit` of
  [meituan-longcat/LongCat-Video](https://huggingface.co/meituan-longcat/LongCat-Video)
- `text_encoders/umt5_xxl_fp16.safetensors` and `vae/wan_2.1_vae.safetensors`: from `split_files` of
  [Comfy-Org/Wan_2.1_ComfyUI_repackaged](https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged)
{files}
Then press R.

{text}"""
LORA_ROW = "- `loras/cfg_step_lora.safetensors`: from `lora` of LongCat-Video\n"
REFINEMENT_ROW = "- `loras/refinement_lora.safetensors`: from `lora` of LongCat-Video\n"
LONG_TEXT = """Segments of 93 frames, each begun with the last 13 of the one before: 3 segments are 16.9 seconds.

Every finished segment is kept in ComfyUI's output folder, under the name in **folder**. Interrupted, or crashed? Queue
again: it goes on where it was. Another seed or size wants another folder."""
NANO_TEXT = """Press **Run**. The small test model that comes with the pack makes it on a CPU: no download, no GPU."""
SAILS = """A small sailing boat leaves a quiet harbour at sunrise, gentle waves, camera follows from behind.
The boat reaches the open sea, the wind freshens and the sails fill, spray over the bow.
Dolphins appear beside the boat and leap through the waves in bright sunlight.
The boat turns towards a rocky island with a white lighthouse, clouds gather on the horizon."""
NANO_SCENES = """a red circle moves right on a blue background
a red circle moves up on a blue background
a red circle moves left on a blue background"""

# Prompts (a segment each) and label of each workflow's picture, in the order of `graphs`.
PICTURES = (
    (NANO_PROMPT, "nano: text to video"),
    ("a green square moves up on a black background", "text to video 480p"),
    ("a yellow triangle moves left on a brown background", "distilled, 16 steps"),
    ("a purple circle pulses on a gray background", "image to video"),
    ("an orange cross moves down on a blue background", "video continuation"),
    ("a cyan square moves in a circle on a black background", "optimizations A | B"),
    ("a white triangle moves right on a green background", "long video"),
    (
        "a yellow circle moves right on a black background\na yellow circle moves up on a black background",
        "interactive",
    ),
    ("a purple cross moves in a circle on a white background", "refine to 720p"),
    ("a cyan circle moves right on a brown background", "long, then 720p"),
    ("a white cross moves down on a green background", "nano: image to video"),
    ("a yellow square moves right on a gray background", "nano: continuation"),
    ("a red square moves right on a black background", "nano: long video"),
    (NANO_SCENES, "nano: interactive"),
    ("a yellow triangle pulses on a blue background", "nano: refine"),
    ("a green circle moves down on a black background", "nano: long, refined"),
    ("an orange square moves in a circle on a blue background", "what an option costs"),
)

BUILD = """({nodes, links, groups}) => {
  const graph = window.app.graph, made = {};
  graph.clear();
  for (const spec of nodes) {
    const node = window.LiteGraph.createNode(spec.type);
    if (!node) throw new Error('no node type ' + spec.type);
    graph.add(node);
    node.pos = spec.pos;
    if (spec.title) node.title = spec.title;
    for (const [name, value] of Object.entries(spec.widgets)) {
      const widget = name ? node.widgets.find(w => w.name === name) : node.widgets[0];
      if (!widget) throw new Error(spec.type + ' has no widget ' + name);
      widget.value = value;
    }
    const size = node.computeSize();
    node.setSize([Math.max(size[0], spec.size[0]), Math.max(size[1], spec.size[1])]);
    made[spec.key] = node;
  }
  for (const [from, output, to, input] of links) {
    const source = made[from].outputs.findIndex(slot => slot.name === output);
    const target = made[to].inputs.findIndex(slot => slot.name === input);
    if (source < 0 || target < 0) throw new Error(`no link ${from}.${output} - ${to}.${input}`);
    made[from].connect(source, made[to], target);
  }
  for (const [title, keys, color] of groups) {
    const boxes = keys.map(key => [made[key].pos, made[key].size]);
    const left = Math.min(...boxes.map(([p]) => p[0])) - 15, top = Math.min(...boxes.map(([p]) => p[1])) - 80;
    const right = Math.max(...boxes.map(([p, s]) => p[0] + s[0])) + 15;
    const bottom = Math.max(...boxes.map(([p, s]) => p[1] + s[1])) + 15;
    const group = new window.LiteGraph.LGraphGroup(title);
    group.pos = [left, top];
    group.size = [right - left, bottom - top];
    group.color = color;
    graph.add(group);
  }
  graph.setDirtyCanvas(true, true);
}"""


@dataclass
class Graph:
    """A workflow in the making. name: file name and title in the template browser."""

    name: str
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)
    groups: list[tuple[str, list[str], str]] = field(default_factory=list)

    def add(self, key: str, type: str, column: str | float, y: float, size=(300, 60), title="", **widgets: Any) -> None:
        x = COLUMNS.get(column, column)
        widgets = {"" if name == "text_" else name: value for name, value in widgets.items()}
        spec = {"key": key, "type": type, "pos": [x, y], "size": list(size), "title": title, "widgets": widgets}
        self.nodes.append(spec)

    def link(self, *wires: str) -> None:
        """Each wire "node.OUTPUT node.input"."""
        for wire in wires:
            (source, output), (target, name) = (end.split(".") for end in wire.split(" "))
            self.links.append((source, output, target, name))

    def group(self, title: str, *keys: str, color: str = "#3f789e") -> None:
        self.groups.append((title, list(keys), color))


def base(name: str, files: dict[str, str], prompt: str, note: str) -> Graph:
    """Loaders, prompts, VAE Decode and Save Video, still without a latent and a sampler."""
    graph = Graph(name)
    graph.add("note", "MarkdownNote", "note", 0, (370, 460), "Read me", text_=note)
    graph.add("model", "LongCatModelLoader", "load", 0, (310, 90), model_name=files["model"])
    graph.add("text", "LongCatTextEncoderLoader", "load", 160, (310, 90), text_encoder_name=files["text"])
    graph.add("vae", "VAELoader", "load", 320, (310, 60), vae_name=files["vae"])
    graph.add("positive", "CLIPTextEncode", "prompt", 0, (420, 150), "Prompt", text=prompt)
    graph.add("negative", "CLIPTextEncode", "prompt", 220, (420, 150), "Negative prompt", text=DEFAULT_NEGATIVE_PROMPT)
    graph.link("text.CLIP positive.clip", "text.CLIP negative.clip")
    graph.group("1  Model files", "model", "text", "vae")
    return graph


def finish(graph: Graph, prefix: str, **sampler: Any) -> Graph:
    """Sampler, decoding and saving, for a graph with a node `latent`."""
    graph.add("sampler", "LongCatSampler", "sample", 0, SAMPLER, **sampler)
    graph.add("decode", "VAEDecode", "save", 0, (300, 50))
    graph.add("video", "CreateVideo", "save", 120, (300, 80), fps=15)
    graph.add("save", "SaveVideo", "save", 270, (380, 400), filename_prefix=prefix)
    graph.link(
        "positive.CONDITIONING sampler.positive",
        "negative.CONDITIONING sampler.negative",
        "latent.LATENT sampler.latent_image",
        "sampler.LATENT decode.samples",
        "vae.VAE decode.vae",
        "decode.IMAGE video.images",
        "video.VIDEO save.video",
    )
    graph.group("3  Sample", "sampler")
    graph.group("4  Decode and save", "decode", "video", "save")
    return graph


def text_latent(graph: Graph, width: int, height: int, length: int) -> None:
    graph.add("latent", "EmptyHunyuanLatentVideo", "prompt", 440, (420, 130), width=width, height=height, length=length)
    graph.group("2  What to make", "positive", "negative", "latent")


def nano() -> Graph:
    graph = base("LongCat nano - text to video", NANO, NANO_PROMPT, NANO_NOTE)
    text_latent(graph, 96, 64, 33)
    graph.link("model.MODEL sampler.model")
    return finish(graph, "video/longcat_nano", seed=1)


def text_to_video() -> Graph:
    title = "LongCat-Video - text to video 480p"
    note = FILES_NOTE.format(
        title=title,
        files="",
        text="832x480, 93 frames at 15 fps (6 seconds), 50 steps, guidance 4: the settings of the model card.",
    )
    graph = base(title, REAL, CAT, note)
    text_latent(graph, 832, 480, 93)
    graph.link("model.MODEL sampler.model")
    return finish(graph, "video/longcat")


def distilled() -> Graph:
    title = "LongCat-Video - text to video 480p, distilled 16 steps"
    text = "The step LoRA does in 16 steps at guidance 1 what else takes 50 at guidance 4: six times fewer evaluations."
    graph = base(title, REAL, CAT, FILES_NOTE.format(title=title, files=LORA_ROW, text=text))
    graph.add(
        "lora", "LoraLoaderModelOnly", "load", 450, (310, 80), lora_name="cfg_step_lora.safetensors", strength_model=1
    )
    graph.groups[0][1].append("lora")
    text_latent(graph, 832, 480, 93)
    graph.link("model.MODEL lora.model", "lora.MODEL sampler.model")
    return finish(graph, "video/longcat_distilled", steps=16, guidance=1, mode="distilled")


def image_to_video() -> Graph:
    title = "LongCat-Video - image to video 480p"
    text = (
        "Load an image: it becomes the first frame, cut to the 480p size nearest in shape.\n"
        "The latent also works with stock samplers (KSampler, SamplerCustomAdvanced)."
    )
    graph = base(title, REAL, CAT, FILES_NOTE.format(title=title, files="", text=text))
    graph.add("image", "LoadImage", "load", 480, (310, 320), image="example.png")
    graph.add("latent", "LongCatImageToVideo", "prompt", 440, (420, 200))
    graph.group("2  What to make", "positive", "negative", "latent")
    graph.groups[0][1].append("image")
    graph.link("vae.VAE latent.vae", "image.IMAGE latent.image", "model.MODEL sampler.model")
    return finish(graph, "video/longcat_i2v")


def continuation() -> Graph:
    title = "LongCat-Video - video continuation 480p"
    text = (
        "Load a clip of at least 0.9 s: its last 13 frames at 15 per second are given, 80 new ones follow.\n"
        "The saved video begins with the given frames."
    )
    graph = base(title, REAL, CAT, FILES_NOTE.format(title=title, files="", text=text))
    graph.add("clip", "LoadVideo", "load", 480, (310, 300))
    graph.add("frames", "GetVideoComponents", "load", 860, (310, 80))
    graph.add("latent", "LongCatVideoContinuation", "prompt", 440, (420, 244))
    graph.group("2  What to make", "positive", "negative", "latent")
    graph.groups[0][1].extend(("clip", "frames"))
    graph.link(
        "clip.VIDEO frames.video",
        "frames.images latent.video",
        "frames.fps latent.fps",
        "vae.VAE latent.vae",
        "model.MODEL sampler.model",
    )
    return finish(graph, "video/longcat_continued", mode="enhance_hf")


def side_by_side() -> Graph:
    title = "LongCat - optimizations side by side"
    note = """## Optimizations, A against B

Two samplers with the same seed and prompt, the model of each with other switches. Left in the video is A, right is B;
the reports say what was in force on this machine, the benchmark how long a step takes.

As it comes, A has the defaults and B everything off and plain padded text. Both are exact: the videos should look the
same.
The test model runs on a CPU; put the real files into the loaders to try a GPU."""
    graph = base(title, NANO, NANO_PROMPT, note)
    graph.nodes[0] |= {"pos": [0, 650], "size": [770, 260]}
    text_latent(graph, 96, 64, 33)
    off = ("fused_qkv", "fused_ffn", "explicit_fp32", "reuse_text", "reuse_modulation", "fused_step", "fused_kernels")
    plain = {**dict.fromkeys((*off, "fp8"), False), "text_mode": "padded", "attention": "sdpa"}
    for i, (name, switches) in enumerate((("A", {}), ("B", plain))):
        y, x = 860 * i, COLUMNS["sample"]
        graph.add(f"opt{name}", "LongCatOptimizations", x, y, (320, 400), f"Optimizations {name}", **switches)
        graph.add(f"report{name}", "PreviewAny", x, y + 470, (320, 270), f"In force in {name}")
        graph.add(f"sampler{name}", "LongCatSampler", x + 360, y, SAMPLER, f"Sampler {name}", seed=1, **FIXED)
        graph.add(f"decode{name}", "VAEDecode", x + 360, y + 570, (300, 50), f"Decode {name}")
        graph.link(
            f"model.MODEL opt{name}.model",
            f"opt{name}.MODEL sampler{name}.model",
            f"opt{name}.report report{name}.source",
            f"positive.CONDITIONING sampler{name}.positive",
            f"negative.CONDITIONING sampler{name}.negative",
            f"latent.LATENT sampler{name}.latent_image",
            f"sampler{name}.LATENT decode{name}.samples",
            f"vae.VAE decode{name}.vae",
        )
        graph.group(name, f"opt{name}", f"report{name}", f"sampler{name}", f"decode{name}")
    x = COLUMNS["sample"] + 710
    graph.add("stitch", "ImageStitch", x, 0, (320, 150), "A | B", direction="right", spacing_width=8)
    graph.add("video", "CreateVideo", x, 230, (320, 80), fps=15)
    graph.add("save", "SaveVideo", x, 380, (420, 420), filename_prefix="video/longcat_a_b")
    graph.link(
        "decodeA.IMAGE stitch.image1",
        "decodeB.IMAGE stitch.image2",
        "stitch.IMAGE video.images",
        "video.VIDEO save.video",
    )
    graph.group("Compare", "stitch", "video", "save")
    graph.add("benchmark", "LongCatBenchmark", x, 1000, (420, 620), "A against B, timed", steps=2)
    graph.link(
        "optA.MODEL benchmark.model",
        "optB.MODEL benchmark.model_b",
        "latent.LATENT benchmark.latent_image",
        "positive.CONDITIONING benchmark.positive",
        "negative.CONDITIONING benchmark.negative",
    )
    graph.group("Time", "benchmark")
    return graph


def long_base(title: str, files: dict[str, str], note: str, prompts: str, prefix: str, **settings: Any) -> Graph:
    """Loaders and LongCat Long Video, with its report, still without what becomes of its frames."""
    graph = Graph(title)
    graph.add("note", "MarkdownNote", "note", 0, (370, 520), "Read me", text_=note)
    graph.add("model", "LongCatModelLoader", "load", 0, (310, 90), model_name=files["model"])
    graph.add("text", "LongCatTextEncoderLoader", "load", 160, (310, 90), text_encoder_name=files["text"])
    graph.add("vae", "VAELoader", "load", 320, (310, 60), vae_name=files["vae"])
    graph.group("1  Model files", "model", "text", "vae")
    folder = {"folder": f"longcat/{prefix}"}
    graph.add("long", "LongCatLongVideo", "prompt", 0, (420, 900), prompts=prompts, **folder | settings)
    graph.link("model.MODEL long.model", "text.CLIP long.clip", "vae.VAE long.vae")
    graph.group("2  What to make", "long")
    graph.add("report", "PreviewAny", "load", 480, (310, 330), "Segments and joins")
    graph.link("long.report report.source")
    return graph


def save(graph: Graph, images: str, x: float, prefix: str, fps: str = "", number: int = 3) -> Graph:
    """Create Video and Save Video for `images`, a socket; fps: a socket, or "" for 15."""
    graph.add("video", "CreateVideo", x, 0, (300, 80), fps=15)
    graph.add("save", "SaveVideo", x, 150, (420, 440), filename_prefix=f"video/{prefix}")
    graph.link(f"{images} video.images", "video.VIDEO save.video", *([f"{fps} video.fps"] if fps else ()))
    graph.group(f"{number}  Save", "video", "save")
    return graph


NANO_LONG = {"width": 96, "height": 64, "length": 33, "mode": "base"}


def long_video() -> Graph:
    title = "LongCat-Video - long video 480p"
    note = FILES_NOTE.format(title=title, files="", text=LONG_TEXT)
    return save(long_base(title, REAL, note, CAT, "long-video"), "long.images", 830, "longcat_long")


def interactive() -> Graph:
    title = "LongCat-Video - interactive video 480p"
    text = (
        "A prompt a line, a line a segment. Change line k and queue again: only segment k and later ones are made anew."
    )
    text = f"{text}\n\n{LONG_TEXT}"
    graph = long_base(
        title, REAL, FILES_NOTE.format(title=title, files="", text=text), SAILS, "interactive", segments=0
    )
    return save(graph, "long.images", 830, "longcat_interactive")


def refining() -> Graph:
    title = "LongCat-Video - refine to 720p"
    text = (
        "Load a finished video of at most 93 frames: it becomes 1280x704 at twice the frame rate, in five evaluations "
        "of the model.\nWhat *skip* and *length* cut off is padding. For longer videos: LongCat Refine Long Video."
    )
    graph = base(title, REAL, "", FILES_NOTE.format(title=title, files=REFINEMENT_ROW, text=text))
    lora = {"lora_name": "refinement_lora.safetensors", "strength_model": 1}
    graph.add("lora", "LoraLoaderModelOnly", "load", 450, (310, 80), **lora)
    graph.add("sparse", "LongCatBlockSparseAttention", "load", 610, (310, 130))
    graph.add("clip", "LoadVideo", "load", 820, (310, 300))
    graph.groups[0][1].extend(("lora", "sparse", "clip"))
    graph.add("frames", "GetVideoComponents", "prompt", 440, (420, 80))
    graph.link("clip.VIDEO frames.video", "model.MODEL lora.model", "lora.MODEL sparse.model")
    refined(graph, "frames.images", "sparse.MODEL", "longcat_720p", "frames.fps")
    graph.link("frames.audio video.audio")
    return graph


def refined(graph: Graph, images: str, model: str, prefix: str, fps: str = "", **size: Any) -> Graph:
    """LongCat Refine, LongCat Sampler, VAE Decode, the padding cut off, saved."""
    graph.add("latent", "LongCatRefine", "prompt", 640, (420, 250), **size)
    graph.group("2  What to refine", "positive", "negative", "latent", *(["frames"] if fps else []))
    graph.add("sampler", "LongCatSampler", "sample", 0, SAMPLER, guidance=1, mode="refine")
    graph.add("decode", "VAEDecode", "save", 0, (300, 50))
    graph.add("cut", "ImageFromBatch", "save", 120, (300, 90), "Without the padding")
    graph.add("video", "CreateVideo", "save", 290, (300, 80), fps=30)
    graph.add("save", "SaveVideo", "save", 440, (420, 440), filename_prefix=f"video/{prefix}")
    graph.link(
        "vae.VAE latent.vae",
        f"{images} latent.video",
        *([f"{fps} latent.fps"] if fps else ()),
        f"{model} sampler.model",
        "positive.CONDITIONING sampler.positive",
        "negative.CONDITIONING sampler.negative",
        "latent.LATENT sampler.latent_image",
        "sampler.LATENT decode.samples",
        "vae.VAE decode.vae",
        "decode.IMAGE cut.image",
        "latent.skip cut.batch_index",
        "latent.length cut.length",
        "cut.IMAGE video.images",
        "latent.fps video.fps",
        "video.VIDEO save.video",
    )
    graph.group("3  Sample", "sampler")
    graph.group("4  Decode and save", "decode", "cut", "video", "save")
    return graph


def chain() -> Graph:
    title = "LongCat-Video - long video, refined to 720p"
    text = (
        "The whole chain: text to video, continued segment by segment, then refined piece by piece to 1280x704 at 30 "
        f"fps.\n\n{LONG_TEXT}"
    )
    note = FILES_NOTE.format(title=title, files=REFINEMENT_ROW, text=text)
    graph = long_base(title, REAL, note, CAT, "long-video")
    lora = {"lora_name": "refinement_lora.safetensors", "strength_model": 1}
    graph.add("lora", "LoraLoaderModelOnly", 830, 0, (340, 80), **lora)
    graph.add("sparse", "LongCatBlockSparseAttention", 830, 160, (340, 130))
    graph.link("model.MODEL lora.model", "lora.MODEL sparse.model")
    return refined_long(graph, "sparse.MODEL", "long-video-720p", "longcat_long_720p")


def refined_long(graph: Graph, model: str, folder: str, prefix: str, **settings: Any) -> Graph:
    settings = {"folder": f"longcat/{folder}"} | settings
    above = [node["key"] for node in graph.nodes if node["key"] in ("lora", "sparse")]
    graph.add("refine", "LongCatRefineLongVideo", 830, 380 if above else 0, (340, 700), **settings)
    graph.link(f"{model} refine.model", "text.CLIP refine.clip", "vae.VAE refine.vae", "long.images refine.video")
    graph.group("3  Refine", *above, "refine")
    return save(graph, "refine.images", 1210, prefix, "refine.fps", 4)


def nano_given(title: str, text: str, prompt: str, prefix: str, kind: str, cond: dict[str, Any]) -> Graph:
    """A clip, and a second one that begins with its last frame, or its last frames."""
    graph = base(title, NANO, prompt, nano_note(title, text))
    size = {"width": 96, "height": 64, "length": 17}
    graph.add("empty", "EmptyHunyuanLatentVideo", "load", 480, (310, 130), **size)
    graph.add("first", "LongCatSampler", "load", 700, SAMPLER, "A first clip", seed=3, steps=30, **FIXED)
    graph.add("frames", "VAEDecode", "prompt", 440, (420, 50), "Its frames")
    graph.link(
        "model.MODEL first.model",
        "positive.CONDITIONING first.positive",
        "negative.CONDITIONING first.negative",
        "empty.LATENT first.latent_image",
        "first.LATENT frames.samples",
        "vae.VAE frames.vae",
    )
    graph.group("A first clip", "empty", "first")
    source = "frames.IMAGE"
    if kind == "LongCatImageToVideo":
        graph.add("last", "ImageFromBatch", "prompt", 560, (420, 90), "Its last frame", batch_index=16, length=1)
        graph.link("frames.IMAGE last.image")
        source = "last.IMAGE"
    graph.add("latent", kind, "prompt", 740, (420, 220), resolution="custom", **size | {"length": 33} | cond)
    image = "image" if kind == "LongCatImageToVideo" else "video"
    graph.link("vae.VAE latent.vae", f"{source} latent.{image}", "model.MODEL sampler.model")
    keys = [node["key"] for node in graph.nodes if node["key"] in ("positive", "negative", "frames", "last", "latent")]
    graph.group("2  What to make", *keys)
    return finish(graph, f"video/{prefix}", seed=4, steps=30, **FIXED)


def nano_image() -> Graph:
    title = "LongCat nano - image to video"
    text = "A first clip is made, and its last frame is the image that the saved video begins with."
    prompt = "a white cross moves down on a green background"
    return nano_given(title, text, prompt, "longcat_nano_i2v", "LongCatImageToVideo", {})


def nano_continuation() -> Graph:
    title = "LongCat nano - video continuation"
    text = "A first clip is made, and its last 13 frames are continued by 20 new ones."
    prompt = "a yellow square moves right on a gray background"
    return nano_given(title, text, prompt, "longcat_nano_continued", "LongCatVideoContinuation", {"cond_frames": 13})


def nano_note(title: str, text: str) -> str:
    return f"## {title.replace(' - ', ': ')}\n\n{NANO_TEXT}\n\n{text}"


def nano_long() -> Graph:
    title = "LongCat nano - long video"
    note = nano_note(title, LONG_TEXT.replace("93 frames", "33 frames").replace("16.9", "4.9"))
    prompt = "a red square moves right on a black background"
    graph = long_base(title, NANO, note, prompt, "nano-long", steps=30, **NANO_LONG)
    return save(graph, "long.images", 830, "longcat_nano_long")


def nano_interactive() -> Graph:
    title = "LongCat nano - interactive video"
    text = (
        "A prompt a line, a line a segment: the circle moves right, then up, then left. This small model follows a new "
        "prompt at once with an *overlap* of 5."
    )
    # With 13 of 33 frames given, the old motion goes on for a segment before the model follows the new prompt.
    settings = {"segments": 0, "steps": 30, "seed": 1, "overlap": 5, "hand_off": "latents"} | NANO_LONG
    graph = long_base(title, NANO, nano_note(title, text), NANO_SCENES, "nano-interactive", **settings)
    return save(graph, "long.images", 830, "longcat_nano_interactive")


def nano_refine() -> Graph:
    title = "LongCat nano - refine"
    text = "Text to video, 96x64 at 15 fps, and its second stage: 192x128 at 30 fps, in five evaluations of the model."
    graph = base(title, NANO, "a yellow triangle pulses on a blue background", nano_note(title, text))
    graph.add("empty", "EmptyHunyuanLatentVideo", "load", 480, (310, 130), width=96, height=64, length=17)
    graph.add("first", "LongCatSampler", "load", 700, SAMPLER, "First stage", seed=1, steps=30, **FIXED)
    graph.add("frames", "VAEDecode", "prompt", 440, (420, 50), "Frames of the first stage")
    graph.link(
        "model.MODEL first.model",
        "positive.CONDITIONING first.positive",
        "negative.CONDITIONING first.negative",
        "empty.LATENT first.latent_image",
        "first.LATENT frames.samples",
        "vae.VAE frames.vae",
    )
    graph.group("First stage", "empty", "first")
    return refined(graph, "frames.IMAGE", "model.MODEL", "longcat_nano_refined", resolution="twice the size")


def nano_chain() -> Graph:
    title = "LongCat nano - long video, refined"
    text = "The whole chain: text to video, continued, then refined piece by piece to 192x128 at 30 fps."
    prompt = "a green circle moves down on a black background"
    long = NANO_LONG | {"segments": 2, "length": 17, "overlap": 5, "steps": 30, "seed": 1}
    graph = long_base(title, NANO, nano_note(title, text), prompt, "nano-chain", **long)
    size = {"resolution": "twice the size", "piece": 17, "overlap": 5}
    return refined_long(graph, "model.MODEL", "nano-chain-refined", "longcat_nano_chain", **size)


def nano_fidelity() -> Graph:
    title = "LongCat nano - what an option costs"
    text = """The same video three times: A as it is, B with **LongCat Step Cache**, and A once more with another exact
attention kernel. The plot shows how far every frame of B lies from A's, and the **noise floor**: how far two runs that
are both right lie apart. The saved video is A on the left, B on the right.

Put what you want to know the price of in the place of LongCat Step Cache: LongCat Optimizations, a LoRA, another weight
dtype. With the real files in the loaders it tells of your machine."""
    graph = base(title, NANO, "an orange square moves in a circle on a blue background", nano_note(title, text))
    graph.nodes[0] |= {"pos": [0, 670], "size": [770, 260]}
    text_latent(graph, 96, 64, 33)
    graph.add("cache", "LongCatStepCache", "load", 480, (310, 80), "B: the option")
    x = COLUMNS["sample"]
    graph.add("fidelity", "LongCatFidelity", x, 0, (400, 960), "A against B", seed=1, **FIXED)
    graph.add("report", "PreviewAny", x + 440, 0, (400, 420), "Report")
    graph.add("stitch", "ImageStitch", x + 440, 510, (320, 150), "A | B", direction="right", spacing_width=8)
    graph.add("video", "CreateVideo", x + 440, 740, (320, 80), fps=15)
    graph.add("save", "SaveVideo", x + 880, 0, (420, 420), filename_prefix="video/longcat_nano_fidelity")
    graph.link(
        "model.MODEL cache.model",
        "model.MODEL fidelity.model",
        "cache.MODEL fidelity.model_b",
        "vae.VAE fidelity.vae",
        "positive.CONDITIONING fidelity.positive",
        "negative.CONDITIONING fidelity.negative",
        "latent.LATENT fidelity.latent_image",
        "fidelity.report report.source",
        "fidelity.images_a stitch.image1",
        "fidelity.images_b stitch.image2",
        "stitch.IMAGE video.images",
        "video.VIDEO save.video",
    )
    graph.group("The option", "cache")
    graph.group("3  Compare", "fidelity")
    graph.group("4  See", "report", "stitch", "video", "save")
    return graph


def graphs() -> Iterator[Graph]:
    for make in (
        nano,
        text_to_video,
        distilled,
        image_to_video,
        continuation,
        side_by_side,
        long_video,
        interactive,
        refining,
        chain,
        nano_image,
        nano_continuation,
        nano_long,
        nano_interactive,
        nano_refine,
        nano_chain,
        nano_fidelity,
    ):
        yield make()


def build(page: Page, graph: Graph) -> dict[str, Any]:
    """The workflow file of a graph."""
    page.tab.evaluate(BUILD, {"nodes": graph.nodes, "links": graph.links, "groups": graph.groups})
    page.settle(1000)
    file = page.graph()
    # Not the page's random ones, so that building again changes nothing.
    file["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"longcat-video/{graph.name}"))
    for i, group in enumerate(file["groups"]):
        group["id"] = i + 1
    # The first node right of the page's side bar and below its menu; all of it on a screen 1600 pixels wide.
    left = min(node["pos"][0] for node in graph.nodes)
    file["extra"] = {"ds": {"scale": 0.7, "offset": [100 - left, 230]}}
    return file


def picture(video: np.ndarray, label: str) -> Image.Image:
    """A square for the template browser: one large frame of video [F, H, W, 3], three small ones, a label."""
    side, strip = 512, 114
    sheet = Image.new("RGB", (side, side), (24, 24, 28))
    frames = [Image.fromarray(video[i]) for i in np.linspace(0, len(video) - 1, 4).astype(int)]
    sheet.paste(frames[2].resize((side, 342), Image.Resampling.BICUBIC), (0, 0))
    for i, frame in enumerate((frames[0], frames[1], frames[3])):
        sheet.paste(frame.resize((side // 3 - 4, strip), Image.Resampling.BICUBIC), (2 + i * side // 3, 348))
    draw = ImageDraw.Draw(sheet)
    draw.text((side / 2, 487), label, fill=(235, 235, 235), font=ImageFont.load_default(34), anchor="mm")
    return sheet


def pictures(folder: Path) -> None:
    """Write the .jpg of every workflow: videos of the embedded model."""
    pipeline = Pipeline.load()
    for i, (graph, (prompts, label)) in enumerate(zip(graphs(), PICTURES, strict=True)):
        video = None
        for prompt in prompts.splitlines():
            given = None if video is None else video[-13:]
            more = pipeline.generate(GenerateRequest(prompt, seed=i + 1, given=given)).frames
            video = more if video is None else np.concatenate((video, more[13:]))
        picture(video, label).save(folder / f"{graph.name}.jpg", quality=88)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else WORKFLOWS
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base_folder, Server(Installation.find(), Path(base_folder)) as server:
        for graph in graphs():
            # A page each: a page gives new nodes the values of earlier ones of the same number.
            with open_page(server.url) as page:
                text = json.dumps(build(page, graph), indent=1, ensure_ascii=False)
            (folder / f"{graph.name}.json").write_text(text + "\n", encoding="utf-8")
            print(graph.name)
    pictures(folder)


if __name__ == "__main__":
    main()
