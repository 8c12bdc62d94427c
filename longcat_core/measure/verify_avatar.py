"""The cases of a golden folder of LongCat-Video-Avatar, 1.0 or 1.5: the network, and whole generations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lora import merge_lora
from ..files.media import cover
from ..generate.avatar import begun_with, start_of
from ..generate.people import classes_of
from ..model.audio import latent_windows
from ..model.kv_cache import KVMode, Reference
from ..model.ops import PlainOps
from ..model.text import TextTokens
from ..model.transformer import LongCatTransformer, ReferenceLayout
from ..optimize.optimized import OptimizedTransformer
from ..optimize.text_keys import TokenTexts
from ..sampling.avatar import Audio, ReferenceFrame, class_tokens, fit_masks
from ..sampling.conditioning import SPATIAL_FACTOR, to_pixels
from ..sampling.guidance import audio_guidance
from ..sampling.sampler import sample
from ..sampling.schedules import AVATAR_SHIFT, DMD_STEPS, SHIFT, Schedule, dmd_schedule, make_schedule
from .golden import Case, Golden, Pair
from .verify_audio import VOICES, audio_cases

TEXT_SCALE, AUDIO_SCALE = 3.0, 4.5
STEPS, DISTILLED_STEPS = 6, 4
SCHEDULES = {"base": (50, 6), "enhance_hf": (50, 6)}
# In the order of `avc.cases`: what the skip range does.
REFERENCES = ("skip", "all", "right", "left", "before", "beyond")
PEOPLE = {"duo": 2, "trio": 3}
# Segments and how their continuations were made, (cache, enhance_hf), by version.
RUNS: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "1.0": {"ai2v": ((0, 0), (1, 0), (1, 1)), "at2v": ((1, 0),), "duo": ((1, 1),), "at2v_distill": ()},
    "1.5": {"ai2v_distill": ((1, 0),), "duo_distill": ((1, 0),), "at2v": ((1, 1),)},
}


# The network


def _reference(golden: Golden, name: str) -> Reference:
    position, skip = golden.read("forward")["avc.cases"][REFERENCES.index(name)].tolist()
    return Reference(position, skip)


def _clean(golden: Golden) -> int:
    """Clean frames of a continuation, the reference among them: those at timestep 0."""
    return int((golden.read("forward")["avc.t"][0] == 0).sum())


def _classes(golden: Golden, people: str) -> Tensor:
    data = golden.read("forward")
    _, ph, pw = golden.config.patch_size
    return class_tokens(data[f"{people}.masks"], data["x"].shape[3] // ph, data["x"].shape[4] // pw)


def _text(
    golden: Golden, model: OptimizedTransformer, rows: slice, windows: Tensor | None = None, people: str = ""
) -> TextTokens:
    """The texts of these samples with their audio, or other windows, or those of several people."""
    data = golden.read("forward")
    classes = _classes(golden, people) if people else None
    windows = data["multi.audio"][: PEOPLE[people]] if people else data["audio"][rows] if windows is None else windows
    text = model.embed_text(data["context"][rows], data["mask"][rows])
    return replace(text, audio=model.embed_audio(windows, classes))


def _filled(golden: Golden) -> tuple[Any, Tensor]:
    """The KV cache of the clean frames, and the network's output on them."""
    clean, at = golden.read("forward")["x"][:1, :, : _clean(golden)], _reference(golden, "skip")
    frames, height, width = clean.shape[2:]
    cache = golden.model.new_kv_cache(frames, height, width, reference=at)
    return cache, golden.model(clean, torch.zeros(1), None, fill=cache, reference=at)


def _forward(
    golden: Golden,
    name: str,
    kind: str,
    people: str = "",
    at: str = "",
    model: OptimizedTransformer | None = None,
    silent: bool = False,
) -> Pair:
    """The network's output. kind: at2v, ai2v, avc or avc_cached; at: which reference."""
    data, model = golden.read("forward"), model or golden.model
    frames, clean = data["ai2v.t"].shape[1], _clean(golden)
    rows = slice(0, 1) if people or kind == "avc" else slice(0, 2)
    read = slice(1, 2) if people else rows
    windows = torch.zeros_like(data["audio"]) if silent else None
    text = _text(golden, model, read, windows, people)
    options: dict[str, Any] = {}
    x, t = data["x"][rows, :, :frames], data["t"][rows]
    if kind == "ai2v":
        t, options = data["ai2v.t"][rows], {"num_cond_latents": 1}
    elif kind == "avc":
        x, t = data["x"][rows], data["avc.t"][rows]
        options = {"num_cond_latents": clean, "reference": _reference(golden, at)}
    elif kind == "avc_cached":
        x, t = data["x"][rows, :, clean:], data["avc.t"][rows, clean:]
        options = {"kv_cache": _filled(golden)[0], "reference": _reference(golden, at)}
    return model(x, t, text, **options), data[f"{name}.out"]


def _windows(golden: Golden, part: int) -> Pair:
    audio = golden.config.audio
    assert audio is not None, "an avatar's folder"
    data = golden.read("forward")
    return latent_windows(data["audio"], audio.frames)[part], data[f"audio.{('first', 'rest')[part]}"]


def _tokens(golden: Golden) -> Pair:
    data = golden.read("forward")
    return golden.model.embed_audio(data["audio"]).tokens, data["audio.tokens"]


def _kept(golden: Golden, block: int, kind: str) -> Pair:
    # Golden layout: [1, heads, tokens, head_dim].
    given = getattr(_filled(golden)[0], kind)[block]
    return given.transpose(1, 2), golden.read("forward")[f"kv.{block}.{kind}"]


def _masks(golden: Golden, people: str) -> Pair:
    data = golden.read("forward")
    return fit_masks(data[f"{people}.masks.source"], *data[f"{people}.masks"].shape[1:]), data[f"{people}.masks"]


class _Recording(PlainOps):
    """Keeps every block's class maps."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def class_maps(self, q: Tensor, k: Tensor, classes: Tensor) -> Tensor:
        self.maps.append(super().class_maps(q, k, classes))
        return self.maps[-1]


def _maps(golden: Golden, people: str, kind: str) -> Pair:
    data, model, ops = golden.read("forward"), golden.model, _Recording()
    clean, frames = _clean(golden), data["ai2v.t"].shape[1]
    text = _text(golden, model, slice(1, 2), None, people)
    assert text.audio is not None
    x, t, noisy = data["x"][:1, :, :frames], data["ai2v.t"][:1], frames - 1
    options: dict[str, Any] = {"num_cond_latents": 1}
    if kind == "avc_cached":
        x, t, cache = data["x"][:1, :, clean:], data["avc.t"][:1, clean:], _filled(golden)[0]
        cache.rotate()
        noisy, options = x.shape[2], {"cache": cache, "layout": ReferenceLayout(_reference(golden, "skip"))}
    texts = TokenTexts(text, ops.text_form(text, 1), text.audio.block(noisy))
    LongCatTransformer.forward(model, x, t, texts, ops, **options)
    return torch.cat(ops.maps).transpose(1, 2), data[f"{people}.{kind}.maps"]


def _lora(golden: Golden) -> OptimizedTransformer:
    model = golden.load("dit.safetensors")
    merge_lora(model, golden.folder / "lora.safetensors")
    return model


def _prenorm(golden: Golden) -> Pair:
    audio = golden.config.audio
    assert audio is not None, "an avatar's folder"
    data, state = golden.read("forward"), dict(golden.model.state_dict())
    for i in range(golden.config.depth):
        for kind in ("weight", "bias"):
            stored = f"prenorm.blocks.{i}.pre_audio_crs_attn_norm.{kind}"
            state[f"blocks.{i}.audio_attn.source_norm.{kind}"] = data[stored]
    model = OptimizedTransformer(replace(golden.config, audio=replace(audio, prenorm=True))).eval()
    model.load_state_dict(state)
    return _forward(golden, "prenorm", "at2v", model=model)


# Schedules and sampling


def _make_schedule(golden: Golden, name: str, steps: int) -> Schedule:
    newer = golden.version == "1.5"
    if name == "distill":
        return dmd_schedule() if newer else make_schedule("distilled", steps)
    return make_schedule(name, steps, AVATAR_SHIFT if newer else SHIFT)


def _schedule(golden: Golden, name: str, steps: int, kind: str) -> Pair:
    given = getattr(_make_schedule(golden, name, steps), kind)
    return given, golden.read("schedule")[f"{name}.{steps}.{kind}"]


def _segment(golden: Golden, run: str, mode: str, second: bool, kv_cache: KVMode, conditions: dict[str, Any]) -> Tensor:
    """One segment. second: the continuation."""
    data, voices, distilled = golden.read("generate"), golden.read("audio"), run.endswith("_distill")
    newer, people = golden.version == "1.5", "duo" if run.startswith("duo") else ""
    noise = data[f"noise{int(second)}"]
    height, width = (side * SPATIAL_FACTOR for side in noise.shape[3:])
    windows = torch.cat([voices[f"{voice}.segment{int(second)}"] for voice in VOICES[: 2 if people else 1]])
    classes = classes_of(golden.read("forward")[f"{people}.masks.source"], height, width) if people else None
    steps = (DMD_STEPS if newer else DISTILLED_STEPS) if distilled else STEPS
    return sample(
        _lora(golden) if distilled and newer else golden.model,
        noise,
        _make_schedule(golden, "distill" if distilled else mode, steps),
        data["pos.embeds"],
        data["pos.mask"],
        negative_context=data["neg.embeds"],
        negative_mask=data["neg.mask"],
        guidance_scale=1.0 if distilled else TEXT_SCALE,
        kv_cache=kv_cache,
        audio=Audio(windows, classes, 1.0 if distilled else AUDIO_SCALE),
        **conditions,
    )


def _first(golden: Golden, run: str, kv_cache: KVMode = "off") -> Pair:
    data = golden.read("generate")
    conditions = {} if run.startswith("at2v") else {"cond_latents": data["image.latent"]}
    return _segment(golden, run, "base", False, kv_cache, conditions), data[f"{run}.latents"]


def _next(golden: Golden, run: str, name: str, hf: int, kv_cache: KVMode) -> Pair:
    data = golden.read("generate")
    before, tail = data[f"{run}.latents"], data[f"{run}.tail.latents"]
    assert golden.config.audio is not None, "an avatar's folder"
    conditions = {
        "cond_latents": start_of(golden.config.audio, before, tail),
        "reference": ReferenceFrame(before[:, :, :1], _reference(golden, "skip")),
    }
    found = _segment(golden, run, "enhance_hf" if hf else "base", True, kv_cache, conditions)
    return begun_with(tail, found), data[f"{name}.latents"]


def _guidance(golden: Golden) -> Pair:
    data = golden.read("generate")
    outs = torch.cat([data[f"cfg.{name}"] for name in ("uncond", "uncond_text", "cond")])
    return -audio_guidance(outs, torch.tensor(TEXT_SCALE), torch.tensor(AUDIO_SCALE)), data["cfg.velocity"]


# Pixels


def _decoded(golden: Golden, run: str) -> Pair:
    data = golden.read("generate")
    frames = data[f"{run}.frames"].float()
    given = 255 * golden.vae.decode(data[f"{run}.latents"])[0, -len(frames) :]
    # The golden frames were truncated.
    return given, given.clamp(frames, frames + 1)


def _encoded(golden: Golden, frames: str, latents: str) -> Pair:
    data = golden.read("generate")
    pixels = data[frames] if data[frames].ndim == 4 else data[frames][None]
    return golden.vae.encode(to_pixels(pixels)), data[latents]


def _fitted(golden: Golden, name: str) -> Pair:
    data = golden.read("generate")
    image = data[f"fit.{name}.image"]
    given = cover(data[f"fit.{name}.source"].numpy(), *image.shape[:2])
    return torch.tensor(given), image


def avatar_cases(golden: Golden) -> Iterator[Case]:
    """Every case of an avatar's golden folder."""
    version = golden.version
    yield Case("audio.first", partial(_windows, part=0))
    yield Case("audio.rest", partial(_windows, part=1))
    yield Case("audio.tokens", _tokens)
    yield Case("at2v", partial(_forward, name="at2v", kind="at2v"))
    yield Case("silent", partial(_forward, name="silent", kind="at2v", silent=True))
    yield Case("ai2v", partial(_forward, name="ai2v", kind="ai2v"))
    for at in REFERENCES:
        yield Case(f"avc.{at}", partial(_forward, name=f"avc.{at}", kind="avc", at=at))
    yield Case("kv.cond_out", lambda g: (_filled(g)[1], g.read("forward")["kv.cond_out"]))
    for block in range(golden.config.depth):
        for kind in ("k", "v"):
            yield Case(f"kv.{block}.{kind}", partial(_kept, block=block, kind=kind))
    for at in REFERENCES[:2]:
        yield Case(f"avc_cached.{at}", partial(_forward, name=f"avc_cached.{at}", kind="avc_cached", at=at))
    for people in PEOPLE:
        yield Case(f"{people}.masks", partial(_masks, people=people))
        for kind in ("ai2v", "avc", "avc_cached"):
            name = f"{people}.{kind}"
            yield Case(name, partial(_forward, name=name, kind=kind, people=people, at="skip"))
        for kind in ("ai2v", "avc_cached"):
            yield Case(f"{people}.{kind}.maps", partial(_maps, people=people, kind=kind))
    yield Case("lora", lambda g: _forward(g, "lora", "ai2v", model=_lora(g)))
    if version == "1.5":
        yield Case("int8", lambda g: _forward(g, "int8", "ai2v", model=g.load("dit_int8.safetensors")))
    else:
        yield Case("prenorm", _prenorm)
    counts = SCHEDULES | {"distill": (DMD_STEPS,) if version == "1.5" else (16, DISTILLED_STEPS)}
    for name, steps in ((name, steps) for name, many in counts.items() for steps in many):
        for kind in ("timesteps", "sigmas"):
            yield Case(f"{name}.{steps}.{kind}", partial(_schedule, name=name, steps=steps, kind=kind))
    yield Case("cfg.velocity", _guidance)
    yield from audio_cases(golden)
    for name in ("wide", "tall"):
        yield Case(f"fit.{name}", partial(_fitted, name=name))
    yield Case("vae encode image", partial(_encoded, frames="image", latents="image.latent"))
    for run, continued in RUNS[version].items():
        yield Case(f"generate {run}", partial(_first, run=run))
        if not run.startswith("at2v"):
            yield Case(f"generate {run}, exact cache", partial(_first, run=run, kv_cache="exact"))
        if continued:
            yield Case(f"vae decode {run}", partial(_decoded, run=run))
            yield Case(f"vae encode {run}", partial(_encoded, frames=f"{run}.frames", latents=f"{run}.tail.latents"))
        for cached, hf in continued:
            name = f"{run}.next.cache{cached}.hf{hf}" if len(continued) > 1 else f"{run}.next"
            modes: tuple[KVMode, ...] = ("exact", "official") if cached else ("off",)
            for mode in modes:
                suffix = ", official cache" if mode == "official" else ""
                yield Case(f"generate {name}{suffix}", partial(_next, run=run, name=name, hf=hf, kv_cache=mode))
