"""Whole runs in ComfyUI's own server: its start, and two prompts of one of the pack's workflows, by stages.

The user's checkout is only read. The server works in a temporary folder that has this pack among its custom nodes and
links to the model's files, and it is gone at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import LongCatError
from ...generate.paths import ModelPaths
from ...generate.progress import COMPILING, DECODING, ENCODING, FIRST_STEP, LOADING, LOADING_TEXT, SAVING, STEPS
from ...generate.request import GenerateRequest
from ..comfyui_server import PACK, Events, Server, free_port
from ..part import Chart, Part, Row
from ..stages import row as figures
from .run import IN_COMFYUI, PACK_START, draw, table

CONTROLS = ("fixed", "randomize", "increment", "decrement")
LOADERS = {
    "LongCatModelLoader": ("model_name", "diffusion_models"),
    "LongCatTextEncoderLoader": ("text_encoder_name", "text_encoders"),
    "VAELoader": ("vae_name", "vae"),
    "LoraLoaderModelOnly": ("lora_name", "loras"),
}
SAMPLER, DECODER = "LongCatSampler", "LongCatVAEDecode"
STAGES = {
    "LongCatModelLoader": LOADING,
    "LoraLoaderModelOnly": "loading the LoRA",
    "LongCatTextEncoderLoader": LOADING_TEXT,
    "VAELoader": "loading the VAE",
    "CLIPTextEncode": ENCODING,
    "LongCatEmptyLatent": "empty latent",
    DECODER: DECODING,
    "VAEDecode": DECODING,
    "CreateVideo": SAVING,
    "SaveVideo": SAVING,
}
# What the sampler's node does beside its steps.
TO_GPU, AFTER = "moving the model", "after sampling"


@dataclass(frozen=True)
class Wanted:
    """What is run. workflow: a file of the pack's `workflows`. files: loader's class -> file or folder of shards.
    prompts: of the two runs. settings: (class, input) -> value, in place of the workflow's."""

    workflow: Path
    files: Mapping[str, Path]
    prompts: tuple[str, str]
    settings: Mapping[tuple[str, str], Any] = field(default_factory=dict)


def wanted_of(
    request: GenerateRequest,
    paths: ModelPaths,
    prompts: tuple[str, str],
    *,
    lora: tuple[Path, float] | None = None,
    fp8: bool = False,
    speed: str = "exact",
) -> Wanted:
    """The pack's workflow from text with a filled request's size and sampling, and with the LoRA if there is one."""
    files = {"LongCatModelLoader": paths.model, "LongCatTextEncoderLoader": paths.text_encoder, "VAELoader": paths.vae}
    settings: dict[tuple[str, str], Any] = {
        ("LongCatModelLoader", "weight_dtype"): "fp8 rowwise" if fp8 else "default",
        ("LongCatEmptyLatent", "width"): request.width,
        ("LongCatEmptyLatent", "height"): request.height,
        ("LongCatEmptyLatent", "length"): request.frames,
        (SAMPLER, "seed"): request.seed,
        (SAMPLER, "steps"): request.steps,
        (SAMPLER, "guidance"): request.guidance_scale,
        (SAMPLER, "mode"): request.schedule,
        (SAMPLER, "speed"): speed,
        (DECODER, "fps"): request.fps,
    }
    name = "LongCat real 1 - text to video 480p.json"
    if lora is not None:
        name = "LongCat real 2 - text to video 480p, 16 steps.json"
        files["LoraLoaderModelOnly"], settings["LoraLoaderModelOnly", "strength_model"] = lora
    return Wanted(PACK / "workflows" / name, files, prompts, settings)


def rows(
    checkout: Path,
    wanted: Wanted,
    *,
    cpu: bool,
    python: Path | None = None,
    port: int | None = None,
    said: Callable[[str], None] = lambda stage: None,
) -> Iterator[Row]:
    """The rows of the server's start and of two prompts.

    checkout: ComfyUI's folder. python: what runs it; None: its own environment, else this Python. port: None for any
    that is free. said: called with the name of what begins. Raises LongCatError in one sentence if there is no
    ComfyUI, the port is taken, the server ends, a node is missing or a prompt fails.
    """
    if not (checkout / "main.py").is_file() or not (checkout / "comfyui_version.py").is_file():
        raise LongCatError(f"{checkout} is not ComfyUI, because it has no main.py; give the folder of its source")
    if not (PACK / "nodes").is_dir():
        raise LongCatError(f"{PACK} holds no nodes; run the command from a clone of the pack, not from the package")
    for path in wanted.files.values():
        if not path.exists():
            raise LongCatError(f"{path} is not there; correct the path of the model's files")
    try:
        import websocket  # noqa: F401
    except ImportError as error:
        raise LongCatError("measuring ComfyUI needs a package; run: pip install 'longcat-video[bench]'") from error
    files = {kind: [wanted.files[loader]] if loader in wanted.files else [] for loader, (_, kind) in LOADERS.items()}
    with Server(checkout, python or _python_of(checkout), files, free_port(port), cpu) as server:
        said("starting ComfyUI")
        wall, pack = server.start()
        found = figures({"starting: server": wall - pack, PACK_START: pack}, [], [], None)
        yield {"name": IN_COMFYUI[0], "phase": "cold", "status": "ok", "notes": []} | found | {"steps": 0}
        prompt = to_prompt(json.loads(wanted.workflow.read_text(encoding="utf-8")))
        _set(prompt, wanted)
        server.check_nodes(prompt)
        for name, phase, text in zip(IN_COMFYUI[1:], ("cold", "warm"), wanted.prompts, strict=True):
            said(name)
            _positive(prompt)["inputs"]["text"] = text
            yield row(name, phase, prompt, server.run(prompt))


def _python_of(checkout: Path) -> Path:
    places = (checkout / ".venv", checkout / "venv", checkout.parent / "venv", checkout.parent / ".venv")
    names = ("bin/python", "Scripts/python.exe")
    return next((place / name for place in places for name in names if (place / name).is_file()), Path(sys.executable))


# --- the prompt ------------------------------------------------------------------------------------------------------


def to_prompt(workflow: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A workflow that the page saved, as the server takes it: node's id -> {"class_type", "inputs"}."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if "Note" in node["type"]:
            continue
        values = [value for value in node.get("widgets_values", ()) if value not in CONTROLS]
        inputs: dict[str, Any] = {}
        for each in node["inputs"]:
            value = values.pop(0) if "widget" in each and values else None
            if each["link"] is not None:
                inputs[each["name"]] = sources[each["link"]]
            elif value is not None:
                inputs[each["name"]] = value
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _set(prompt: dict[str, dict[str, Any]], wanted: Wanted) -> None:
    for node in prompt.values():
        kind = node["class_type"]
        if kind in wanted.files:
            node["inputs"][LOADERS[kind][0]] = wanted.files[kind].name
        node["inputs"] |= {name: value for (owner, name), value in wanted.settings.items() if owner == kind}


def _positive(prompt: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The node of the prompt's text."""
    sampler = next(node for node in prompt.values() if node["class_type"] == SAMPLER)
    return prompt[sampler["inputs"]["positive"][0]]


# --- the stages ------------------------------------------------------------------------------------------------------


def row(name: str, phase: str, prompt: Mapping[str, dict[str, Any]], events: Events) -> Row:
    """The stages of one prompt; their seconds add up to `wall_s`."""
    spans: dict[str, float] = {}
    later: list[float] = []
    first_frames = None

    def add(stage: str, seconds: float) -> None:
        spans[stage] = spans.get(stage, 0.0) + seconds

    marks = [*events.nodes, (events.end, "")]
    add("queue", marks[0][0])
    for (begun, node), (ended, _) in pairwise(marks):
        kind = prompt[node]["class_type"]
        done = [(at, count, of) for at, owner, count, of in events.progress if owner == node and begun <= at <= ended]
        if kind == SAMPLER and done:
            words = [(at, text) for at, owner, text in events.words if owner == node]
            times = [at for at, *_ in done]
            loaded = _after(LOADING, words, begun, times[0])
            compiled = _after(COMPILING, words, loaded, times[0])
            later = [end - start for start, end in pairwise(times)]
            add(TO_GPU, loaded - begun)
            if compiled > loaded:
                add(COMPILING, compiled - loaded)
            add(FIRST_STEP, times[0] - compiled)
            add(STEPS, times[-1] - times[0])
            add(AFTER, ended - times[-1])
        else:
            add(STAGES.get(kind, kind), ended - begun)
            if kind == DECODER and done:
                first_frames = done[0][0] - begun
    found = figures(spans, later, _beside(prompt), first_frames)
    return {"name": name, "phase": phase, "status": "ok", "notes": []} | found


def _beside(prompt: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    decodes = any(node["class_type"] == DECODER for node in prompt.values())
    return [{"name": "file", "s": None, "what": "encoded while later frames are decoded"}] if decodes else []


def _after(phase: str, words: Sequence[tuple[float, str]], begun: float, latest: float) -> float:
    """When a phase ended that the sampler's words name: at the first other words after it; `begun` if it never came."""
    during = [i for i, (at, text) in enumerate(words) if phase in text and begun <= at < latest]
    if not during:
        return begun
    following = [at for at, text in words[during[-1] + 1 :] if phase not in text]
    return min(following[0], latest) if following else latest


PART = Part(
    text="""## From Queue to mp4, in ComfyUI

ComfyUI's server is started with this pack alone among its custom nodes, and then runs the pack's workflow from text
twice, the second time with another prompt. *This pack* is its share of the start as ComfyUI logs it, to a tenth of a
second. Stages are nodes, and those that LongCat Sampler names; they add up to the time of a prompt. *Sampling* counts
the first step as long as a later one; *less sampling* is everything else.""",
    run=None,
    table=table,
    charts=(Chart(draw, ("wall_s",)),),
)
