"""The `longcat` commands about the bundled model: score-nano, lesson-nano, train-nano."""

from __future__ import annotations

import argparse

from ..nano import adherence
from ..nano.lesson import write_lesson


def score(args: argparse.Namespace) -> int:
    skipped = {name: getattr(args, name) for name in ("guidance_until", "step_cache", "step_cache_kind")}
    return adherence.run(args.prompts, args.steps, args.guidance, args.lora, args.lesson, skipped)


def lesson(args: argparse.Namespace) -> int:
    write_lesson(args.folder, args.clips)
    print(f"{args.folder}: {args.clips} clips with captions")
    return 0


def train(args: argparse.Namespace) -> int:
    if args.size == "nano":
        from ..nano.train import run
    else:
        from ..nano.mini.recipe import run

    return run(args) or 0
