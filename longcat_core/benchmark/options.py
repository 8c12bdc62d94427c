"""The parts of `longcat bench` and their options. Nothing here imports PyTorch, so that --help does without."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What each part measures. Its record lies in the file of its name.
PARTS = {
    "backends": "Every attention backend at the model's shapes.",
    "paths": "The baselines, the exact path and fp8, side by side; the distilled model's steps.",
    "profile": "Kernels of one step by family, and the profiler's trace.",
    "exactness": "Error of every path against fp32, on the first blocks.",
    "memory": "Measured peak of a forward over the estimate.",
    "ablation": "Each optimization added in turn, and removed alone from the full set.",
    "policies": "Error of fp8 by the layers in it.",
    "training": "A training step with and without gradient checkpointing.",
    "scale": "Time and memory by the number of tokens.",
    "continuation": "A step with conditioning frames: their keys and values at every step, or from a KV cache.",
    "refine": "One evaluation of the refinement to 720p: dense and block-sparse attention, exact and fp8.",
    "sparse": "Sparse attention: every kernel by density, and steps with it beside dense ones.",
    "avatar": "One evaluation of an avatar: from an image and as a continuation, two speakers, fp8, smaller cards.",
    "gpus": "An evaluation on one GPU and on several: guidance, refining, decoding, exact and fp8.",
    "gpus_run": "A whole distilled video on one GPU and on several, decoding and its file included; exact and fp8.",
    "cards": "A step within the memory of smaller cards: 24, 16 and 12 GiB, exact and fp8.",
    "decode": "Decoding latents to frames at 480p and 720p, beside diffusers.",
    "load": "Loading a checkpoint, beside reading its file.",
    "recompiles": "Graphs of a block over steps, prompts, LoRAs, conditioning frames and sizes.",
}
# A part that loads no model of its own, and so is not one of `all`.
RUN = "run"
# What RUN leaves of ComfyUI's server.
COMFYUI_RUN = "comfyui_run"
# Whole runs of an avatar, also by itself.
AVATAR_RUN = "avatar_run"
AVATAR_RUN_SUMMARY = "From a sound to mp4: a run of longcat avatar of three segments, and the whole video by it."
RUN_SUMMARY = "Whole runs of longcat generate by stages, cold and warm, with its options."
FEW_BLOCKS = 4

Parse = Callable[[str], Any]


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    size: Parse,
    whole: Parse,
    number: Parse,
    dtypes: Any,
    generate: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add the options of every part. size, whole, number: how the command parses such values; generate: adds the
    options of `longcat generate` that RUN has."""
    parts = parser.add_subparsers(metavar="PART", required=True, dest="part")
    for name, summary in (*PARTS.items(), ("all", "All of these on one model, until the budget runs out.")):
        sub = parts.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        option = sub.add_argument
        option("--size", type=size, metavar="HxW",
               help="pixels (default: 480x832, for refine 704x1280; on a CPU 32x48 and 64x96)")  # fmt: skip
        option("--frames", type=whole, metavar="N",
               help="4k+1 (default: 93, for refine 189; on a CPU 5 and 29)")  # fmt: skip
        option("--batch", type=whole, default=2, choices=(1, 2), help="2: with guidance (default), 1: without")
        option("--steps", type=whole, default=50, metavar="N", help="steps of a whole video (default: 50)")
        option("--repeats", type=whole, default=3, metavar="N", help="timed calls, of which the median counts "
               "(default: 3)")  # fmt: skip
        option("--blocks", type=whole, metavar="N", help="blocks of the model (default: all)")
        option("--few-blocks", type=whole, default=FEW_BLOCKS, metavar="N",
               help="blocks for exactness, policies and training, and in `all` for all parts but backends, paths and "
               f"profile (default: {FEW_BLOCKS})")  # fmt: skip
        option("--model", metavar="NAME", help="nano, full-random or the path of a checkpoint (default: full-random; "
               "on a CPU nano)")  # fmt: skip
        option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        option("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
        option("--attention", default="auto", metavar="NAME",
               help="attention of the full set (see longcat backends)")  # fmt: skip
        option("--variant", default="exact", metavar="NAME", help="for profile: exact (default), fp8, fp8+8bit, "
               "plain, baseline, refine, refine+fp8, sparse or sparse+fp8")  # fmt: skip
        option("--parts", metavar="NAMES", help="for all: run only these parts, separated by commas")
        option("--no-fp8", action="store_true", help="leave fp8 out")
        option("--no-plots", action="store_true", help="write numbers only; `report` draws the plots later")
        option("--output", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: %(default)s")
        option("--budget", type=number, metavar="S", help="start nothing new after this many seconds")
    sub = parts.add_parser(RUN, help=RUN_SUMMARY, description=RUN_SUMMARY, allow_abbrev=False)
    add_own_of_run(sub, whole, number)
    generate(sub)
    sub = parts.add_parser(AVATAR_RUN, help=AVATAR_RUN_SUMMARY, description=AVATAR_RUN_SUMMARY, allow_abbrev=False)
    add_output(sub)
    sub.add_argument("words", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help="options of longcat avatar, after "
                     "those of this command: --audio, the model, the size")  # fmt: skip
    sub = parts.add_parser("report", help="Write the page of performance from results.", allow_abbrev=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders that bench wrote to (--output)")
    sub.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the page, for instance docs/performance.md"
    )


def add_own_of_run(parser: argparse.ArgumentParser, whole: Parse, number: Parse) -> None:
    """The options of RUN that are not those of `longcat generate`."""
    option = parser.add_argument
    option("--runs", type=whole, default=1, metavar="N", help="processes of each kind (default: 1)")
    option("--cards", type=number, nargs="+", default=[], metavar="GIB", help="also a run of few steps within each of "
           "these limits of the GPU's memory, such as 24 12")  # fmt: skip
    option("--comfyui", type=Path, metavar="DIR", help="measure ComfyUI's server instead, whose source is in this "
           "folder: its start, and two prompts of the pack's workflow")  # fmt: skip
    option("--comfyui-python", type=Path, metavar="FILE", help="Python that runs the server (default: that of the "
           "environment in or beside its folder)")  # fmt: skip
    option("--port", type=whole, metavar="N", help="port of the server (default: any that is free)")
    parser.add_argument("--no-plots", action="store_true", help="write numbers only; `report` draws the plots later")
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option --output of whole runs."""
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: %(default)s"
    )
