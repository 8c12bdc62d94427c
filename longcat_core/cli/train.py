"""The `longcat` command that trains a LoRA: its options and what it does. PyTorch is imported when it runs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import LongCatError
from .console import DTYPES, device_of, dtype_of, notes_from_warnings, number, progress, size, whole


def add_train_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="clips and pictures, a .txt caption beside each")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the LoRA, .safetensors; a state goes beside it",
    )
    group = parser.add_argument_group("what is learned")
    group.add_argument(
        "--size", type=size, metavar="HxW", help="clips are scaled and cropped to it (default: 480x832, nano 64x96)"
    )
    group.add_argument("--frames", type=whole, metavar="N", help="the first of each clip, 4k+1 (default: 93, nano 33)")
    group.add_argument("--rank", type=whole, default=16, metavar="N", help="default: %(default)s")
    group.add_argument("--alpha", type=number, metavar="X", help="the LoRA counts by alpha / rank (default: the rank)")
    group.add_argument(
        "--layers", metavar="NAME[,NAME]", help="attn.qkv, ffn.down, ... (default: all seven of a block)"
    )
    group = parser.add_argument_group("how")
    group.add_argument("--steps", type=whole, default=1000, metavar="N", help="default: %(default)s")
    group.add_argument("--batch", type=whole, default=1, metavar="N", help="clips a step (default: %(default)s)")
    group.add_argument("--learning-rate", type=number, default=1e-4, metavar="X", help="default: %(default)s")
    group.add_argument("--shift", type=number, default=12.0, metavar="X", help="of noise levels (default: %(default)g)")
    group.add_argument(
        "--caption-dropout", type=number, default=0.1, metavar="X", help="share without caption (default: %(default)s)"
    )
    group.add_argument(
        "--cond-share",
        type=number,
        default=0.25,
        metavar="X",
        help="share of steps with given first frames, so that image to video and continuation go on working "
        "(default: %(default)s)",
    )
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="default: %(default)s")
    group.add_argument("--save-every", type=whole, default=100, metavar="N", help="steps (default: %(default)s)")
    group.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="faster by about a third, for much more memory"
    )
    group = parser.add_argument_group("model (default: the embedded LongCat-nano)")
    group.add_argument("--model", metavar="PATH", help="LongCat-Video's folder, its dit folder, or a file of any form")
    group.add_argument("--vae", metavar="PATH", help="as longcat generate has it")
    group.add_argument("--text-encoder", metavar="PATH", help="likewise")
    # Gradients in float16 want a scale of their own.
    dtypes = [name for name in DTYPES if name != "float16"]
    group.add_argument("--dtype", choices=dtypes, default="auto", help="of the base; auto: as longcat generate")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--attention", default="auto", metavar="NAME", help="see longcat backends")
    group.add_argument("--compile", choices=("off", "blocks"), default="off", help="torch.compile of the blocks")


def train_lora(args: argparse.Namespace) -> int:
    """`longcat train-lora`: everything is checked before a model is loaded; the same command goes on where it was."""
    from ..generate.opened import open_model
    from ..generate.paths import ModelPaths
    from ..optimize.compilation import why_not
    from ..optimize.switches import Optimizations
    from ..training import lora as training
    from ..training.clips import find_clips

    paths = ModelPaths.of(args.model, args.vae, args.text_encoder)
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
        print(f"{args.output}: has its {file.done} steps already; ask for more --steps to go on")
        return 0
    print(
        f"{args.output}: rank {recipe.rank}, {file.done} steps on {len(clips)} clips, loss {smooth:.4f}, "
        f"in {time.monotonic() - started:.1f} s"
    )
    return 0


# Name -> options, what runs, and a line of help.
TASKS = {"train-lora": (add_train_lora, train_lora, "Train a LoRA on a folder of clips and captions.")}
