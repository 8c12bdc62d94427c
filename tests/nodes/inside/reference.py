"""Run by a Python that has the headless extras: the encoded prompt and every case's latents, into one file.

python reference.py REPOSITORY CASES_FILE OUTPUT.safetensors
"""

from __future__ import annotations

import runpy
import sys

repository, cases_file, output = sys.argv[1:]
sys.path.insert(0, repository)

from safetensors.torch import save_file  # noqa: E402

from longcat_core.generate.pipeline import Pipeline  # noqa: E402
from longcat_core.generate.request import GenerateRequest  # noqa: E402

cases = runpy.run_path(cases_file)
pipeline = Pipeline.load()
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
text, _ = pipeline.text_encoder.encode([cases["PROMPT"]])
save_file(latents | {"prompt": text}, output)
