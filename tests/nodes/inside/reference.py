"""Run by a Python that has the headless extras: the encoded prompt and every case's latents, into one file.

python reference.py REPOSITORY CASES_FILE OUTPUT.safetensors
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace

repository, cases_file, output = sys.argv[1:]
sys.path.insert(0, repository)

from safetensors.torch import save_file  # noqa: E402

from longcat_core.generate.pipeline import Pipeline  # noqa: E402
from longcat_core.generate.request import GenerateRequest  # noqa: E402

cases = runpy.run_path(cases_file)
pipeline, eight_bit = Pipeline.load(), Pipeline.load(fp8=True)
latents = {}
for name, values in cases["CASES"].items():
    given = values.get("given")
    arguments = {key: value for key, value in values.items() if key != "given"}
    request = GenerateRequest(
        cases["PROMPT"],
        cases["NEGATIVE"],
        height=cases["HEIGHT"],
        width=cases["WIDTH"],
        frames=cases["FRAMES"],
        num_cond_frames=cases["COND_FRAMES"],
        given=cases["clip"](given) if given else None,
        **arguments,
    )
    latents[name] = pipeline.generate(request).latents
    if name == "text":
        # One evaluation: a number on the edge between two of e4m3, which falls the other way for another order of a
        # sum, changes all that comes after.
        one = replace(request, steps=1, guidance_scale=1.0)
        latents["fp8"], latents["not fp8"] = eight_bit.generate(one).latents, pipeline.generate(one).latents
text, _ = pipeline.text_encoder.encode([cases["PROMPT"]])
save_file(latents | {"prompt": text}, output)
