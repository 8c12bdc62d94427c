"""A `longcat generate` by stages, in a process of its own, and another video of the pipeline that it loaded.

`longcat bench run` starts `python -m longcat_core.cli.timed JOB`, where JOB is a file with a JSON object. began: the
time.monotonic() of that moment, which all processes of a machine share; commands: the words of each command; results:
the file to write. The second command gets the pipeline of the first one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ..benchmark.stages import StageClock
from .leaving import leave_at_once
from .main import build_parser, main


def run(job: dict[str, Any]) -> int:
    """Run the commands; the exit code of the first one that fails, or 0."""
    from ..generate.pipeline import Pipeline
    from . import models

    kept: list[Pipeline] = []

    def load(*args: Any, **options: Any) -> Pipeline:
        if not kept:
            kept.append(Pipeline.load(*args, **options))
        return kept[0]

    models.load_pipeline = load
    rows, ended = [], job["began"]
    for words in job["commands"]:
        clock = StageClock(ended)
        if code := main(words, clock):
            return code
        ended = time.monotonic()
        rows.append(clock.row(ended))
    found = {"rows": rows, "ended": ended, "inputs": inputs_of(job["commands"][0], kept[0])}
    Path(job["results"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


def inputs_of(words: list[str], pipeline: Any) -> dict[str, Any]:
    """What a command made, as files of results have it."""
    from ..benchmark.workload import Size
    from .generate import request_of
    from .models import paths_of

    args = build_parser(words).parse_args(words)
    request = request_of(args, args.prompt).filled(paths_of(args).defaults)
    size = Size(request.height, request.width, request.frames, 1 if request.guidance_scale == 1 else 2)
    config = pipeline.model.config
    return {
        "model": args.model or "nano",
        "size": str(size),
        "tokens": size.tokens(config),
        "batch": size.batch,
        "steps": request.steps,
        "blocks": config.depth,
        "hidden_size": config.hidden_size,
        "dtype": str(pipeline.model.compute_dtype).removeprefix("torch."),
        "fp8": args.fp8,
    }


if __name__ == "__main__":
    # As the command does.
    codes = leave_at_once()
    codes.append(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    sys.exit(codes[0])
