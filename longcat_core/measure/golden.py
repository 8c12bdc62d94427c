"""A folder of golden data, inputs and outputs of the public code on a tiny model, and what a case of it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.load import load_transformer, read_config
from ..errors import LongCatError
from ..files.safetensors_io import read_tensors
from ..optimize.optimized import OptimizedTransformer

TOLERANCE = 2e-5


class Golden:
    """A folder of golden data; each file is read when a case first needs it. `forward` holds inputs and outputs of the
    network, `generate` those of the sampler and the VAE. Raises LongCatError without a config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder / "config.json")
        self.read = cache(lambda name: read_tensors(folder / f"{name}.safetensors"))

    @cached_property
    def model(self) -> OptimizedTransformer:
        return self.load("dit.safetensors")

    @cached_property
    def vae(self) -> Any:
        from ..generate.vae import load_vae

        return load_vae(self.vae_file())

    @property
    def version(self) -> str:
        """The version of LongCat-Video-Avatar whose audio encoder the folder holds."""
        return "1.5" if (self.folder / "whisper_config.json").exists() else "1.0"

    @cached_property
    def audio_encoder(self) -> Any:
        from ..generate.audio.encoder import load_audio_encoder, open_audio_encoder

        name = "whisper" if self.version == "1.5" else "wav2vec2"
        file, config = (self.folder / f"{name}{suffix}" for suffix in (".safetensors", "_config.json"))
        return load_audio_encoder(file, opened=open_audio_encoder(file, config))

    def vae_file(self) -> Path:
        """The folder's own VAE; that of an avatar's data is in the set of golden data beside its own."""
        own, folder = self.folder / "vae.safetensors", self.folder.resolve()
        set_of, beside = folder.parent.name.replace("-avatar", ""), folder.parent.parent
        found = [beside / set_of / own.name, *sorted(beside.glob(f"*/{own.name}"))]
        return next((file for file in (own, *found) if file.exists()), own)

    def load(self, name: str, **changes: Any) -> OptimizedTransformer:
        return load_transformer(self.folder / name, config=replace(self.config, **changes))


# What a case returns: this code's output and the golden one.
Pair = tuple[Tensor, Tensor]


class Case(NamedTuple):
    name: str
    run: Callable[[Golden], Pair]
    tolerance: float = TOLERANCE


def half_units(x: Tensor) -> Tensor:
    """The largest rounding error of each number in x's dtype: half a unit in its last place; 0 for fp32."""
    if x.dtype.itemsize > 2 or not x.dtype.is_floating_point:
        return torch.zeros(())
    # frexp's mantissas lie between a half and one.
    units = torch.frexp(x.float()).exponent.float().exp2() * torch.finfo(x.dtype).eps / 4
    return units.masked_fill(x == 0, 0.0)


class Outcome(NamedTuple):
    """error: largest difference beyond 16-bit rounding, over the expected output's standard deviation; NaN if unknown.
    verdict: "pass", or "fail" and the reason if there is one besides the error."""

    error: float
    verdict: str


@torch.no_grad()
def check(case: Case, golden: Golden) -> Outcome:
    """Run one case. Any error, such as a missing file or tensor, becomes a fail with its reason."""
    try:
        given, expected = case.run(golden)
    except KeyError as error:
        return Outcome(math.nan, f"fail: no tensor {error.args[0]} in the folder")
    except (LongCatError, RuntimeError, OSError) as error:
        return Outcome(math.nan, f"fail: {str(error).splitlines()[0]}")
    if given.shape != expected.shape:
        return Outcome(math.nan, f"fail: shape {list(given.shape)} instead of {list(expected.shape)}")
    # A constant has no deviation; its magnitude serves instead.
    deviation = expected.float().std(correction=0).item() or expected.float().abs().max().item() or 1.0
    difference = (given.float() - expected.float()).abs() - half_units(given) - half_units(expected)
    largest = difference.clamp(min=0).max().item() / deviation
    # NaN must fail, hence `<=`.
    return Outcome(largest, "pass" if largest <= case.tolerance else "fail")
