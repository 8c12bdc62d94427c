"""The `longcat` command that trains a LoRA. PyTorch is imported when it runs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import LongCatError
from .console import device_of, dtype_of, notes_from_warnings, progress
from .generate import paths_of
from .options import add_options


def add_train_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="clips and pictures, a .txt caption beside each")
    add_options(parser, "train-lora")


def train_lora(args: argparse.Namespace) -> int:
    """`longcat train-lora`: everything is checked before a model is loaded, and the same command resumes."""
    from ..generate.opened import open_model
    from ..optimize.compilation import why_not
    from ..optimize.switches import Optimizations
    from ..training import lora as training
    from ..training.clips import find_clips

    paths = paths_of(args)
    height, width = args.size or (paths.defaults.height, paths.defaults.width)
    recipe = training.Recipe(
        height,
        width,
        paths.defaults.frames if args.frames is None else args.frames,
        rank=args.rank,
        alpha=args.alpha,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        layers=training.LAYERS if args.layers is None else tuple(name.strip() for name in args.layers.split(",")),
        caption_dropout=args.caption_dropout,
        cond_share=args.cond_share,
        shift=args.shift,
        seed=args.seed,
        gradient_checkpointing=not args.no_gradient_checkpointing,
        save_every=args.save_every,
    )
    # Reading the clips takes long, so their output's name is checked before.
    training.check_output(args.output)
    model = open_model(paths, attention=args.attention)
    device = device_of(args.device)
    if args.compile == "blocks" and (reason := why_not(device)):
        raise LongCatError(f"--compile blocks does not work here: {reason}; leave it out")
    optimizations = Optimizations(
        attention=args.attention, compile=args.compile, gradient_checkpointing=recipe.gradient_checkpointing
    )
    clips = find_clips(args.folder, recipe.frames)

    started, smooth = time.monotonic(), None
    with notes_from_warnings(), progress() as bar:

        def report(what: str, done: int, of: int, loss: float | None) -> None:
            nonlocal smooth
            if loss is not None:
                smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.count(done, of, what if loss is None else f"{what}, loss {smooth:.4f}")

        file = training.train_lora(
            *(model, clips, recipe, args.output),
            dtype=dtype_of(args.dtype, device),
            device=device,
            optimizations=optimizations,
            report=report,
        )
    if smooth is None:
        print(f"{args.output}: already has its {file.done} steps; give more --steps to train further")
        return 0
    print(
        f"{args.output}: rank {recipe.rank}, {file.done} steps on {len(clips)} clips, loss {smooth:.4f}, "
        f"in {time.monotonic() - started:.1f} s"
    )
    return 0


# Name -> options, what runs, and a line of help.
TASKS = {"train-lora": (add_train_lora, train_lora, "Train a LoRA on a folder of clips and captions.")}
