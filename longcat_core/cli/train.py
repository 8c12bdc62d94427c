"""`longcat train-lora`."""

from __future__ import annotations

import argparse
import time

from ..errors import LongCatError
from ..generate.opened import open_model
from ..optimize.compilation import why_not
from ..optimize.switches import Optimizations
from ..training import lora as training
from ..training.clips import find_clips, notes
from .console import note, notes_from_warnings
from .models import device_of, dtype_of, paths_of

# Options that the recipe takes as they are.
RECIPE = ("rank", "alpha", "steps", "batch", "learning_rate", "caption_dropout", "cond_share", "shift", "seed",
          "save_every")  # fmt: skip


def train_lora(args: argparse.Namespace) -> int:
    """Train a LoRA. Everything is checked before a model is loaded, and the same command resumes."""
    paths = paths_of(args)
    height, width = args.size or (paths.defaults.height, paths.defaults.width)
    recipe = training.Recipe(
        height,
        width,
        paths.defaults.frames if args.frames is None else args.frames,
        layers=training.LAYERS if args.layers is None else tuple(name.strip() for name in args.layers.split(",")),
        gradient_checkpointing=not args.no_gradient_checkpointing,
        **{name: getattr(args, name) for name in RECIPE},
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
    for sentence in notes(args.folder, clips):
        note(sentence)

    started, smooth = time.monotonic(), None
    with notes_from_warnings(), args.bar as bar:

        def report(what: str, done: int, of: int, loss: float | None) -> None:
            nonlocal smooth
            if loss is not None:
                smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            label = what if loss is None else f"{what}, loss {smooth:.4f}"
            bar.count(done, of, label, "clip" if loss is None else "step")

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
