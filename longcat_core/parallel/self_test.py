"""The self-test of several GPUs: a tiny random model on all of them and on one, compared.

Where all GPUs run the same kernels on the same shapes, as with a sample each, results must be equal bit for bit. Where
they share a sample's tokens or a picture's rows, matrix products and convolutions have fewer rows, for which libraries
may choose other kernels, and these round differently. Such a result may be as far from that of one GPU as two correct
results are from each other: each is as far from the CPU's in fp32 as its precision rounds, so twice that far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import LongCatError
from ..model.config import ModelConfig
from ..optimize.optimized import OptimizedTransformer
from ..vae.network import VAEConfig, WanVAE, channels_last
from ..vae.parts import decoded, encoded
from ..vae.tiles import FACTOR
from .division import Text
from .group import Group, named
from .known import Known, wrong_bytes
from .layout import measured_links
from .led_vae import LedVAE
from .mirror import share
from .torchrun import torchrun_size

M = TypeVar("M", bound=nn.Module)
# Seconds that a check may take, kernels that are compiled for it included. A bad link often stops the GPUs for ever.
LIMIT = 180.0
CONFIG = ModelConfig(
    hidden_size=512, depth=2, num_heads=8, caption_channels=64, adaln_dim=64, frequency_dim=64, ffn_hidden=1024
)
# Of the network's latents, and tokens of text.
FRAMES, HEIGHT, WIDTH, TEXT = 3, 16, 24, 7
# Of the VAE's latents; every rank has a row.
ROWS, COLUMNS = 8, 6
# How far from the CPU's result a GPU may be, as a share of it. What is broken is at least as far as it is large. In
# fp32 the VAE's convolutions run in TF32.
MOST = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
# What processes on a CPU may differ by in fp32; also the least bound between GPUs.
LEAST = 1e-5
# The least bound of convolutions on a GPU in fp32, some of which may run in TF32, which rounds at 2^-11.
LEAST_TF32 = 4 * 2.0**-11
LEAVE_OUT = "choose the other GPUs with CUDA_VISIBLE_DEVICES and run the test again"
AROUND = "set NCCL_P2P_DISABLE=1, which exchanges through CPU memory, or choose other GPUs with CUDA_VISIBLE_DEVICES"
LATE = f"the GPUs did not answer within {LIMIT:g} seconds; {AROUND}"


@dataclass(frozen=True)
class Check:
    """name, result: in words. fault: "", or a sentence that names the failing GPU and the remedy."""

    name: str
    result: str
    fault: str = ""


def check_several(devices: Sequence[torch.device]) -> None:
    """Raise LongCatError if there is nothing to compare a GPU with."""
    if len(devices) == 1:
        raise LongCatError("one GPU has no other one to be compared with; give 2 or more, on a CPU with --device cpu")


def self_test(group: Group) -> Iterator[Check]:
    """The checks of a group, in rank 0, up to the first fault. The workers must run `mirror.serve`.

    A network that the workers hold gets lost; its `Leader` sends it again. Raises LongCatError where a rank fails.
    """
    parts = (part(group, dtype) for dtype in _dtypes(group.device) for part in (_network, _decoder_and_encoder))
    for checks in (_bytes(group), *parts):
        while True:
            with group.within(LIMIT, LATE):
                check = next(checks, None)
            if check is None:
                break
            yield check
            if check.fault:
                return


def in_words(group: Group) -> Iterator[str]:
    """The GPUs of a group and their links, measured, line by line."""
    devices = group.devices
    if group.device.type != "cuda":
        yield f"{group.size} processes on the CPU"
    # The other hosts of torchrun have the same GPUs.
    for rank, device in enumerate(devices if group.device.type == "cuda" else ()):
        card = torch.cuda.get_device_properties(device)
        reached = [to for to in devices if to != device and torch.cuda.can_device_access_peer(device, to)]
        direct = "" if torchrun_size() else f"; reaches {len(reached)} of {group.size - 1} others directly"
        yield f"{named(rank, device)}: {card.name}, {card.total_memory / 2**30:.1f} GiB{direct}"
    with group.within(LIMIT, LATE):
        speeds = measured_links(group)
    for size, link in speeds.items():
        yield (
            f"exchange among {size}: {link.all_to_all / 1e9:.3g} GB/s all to all, {link.broadcast / 1e9:.3g} GB/s from "
            f"the first to all, {link.latency * 1e6:.3g} us for a byte"
            + (f", {link.written / 1e9:.3g} GB/s written into each other's memory" if link.written else "")
        )


def report(group: Group) -> Iterator[tuple[str, bool]]:
    """The lines of a self-test and, of each, whether it tells a fault."""
    for line in in_words(group):
        yield line, False
    for check in self_test(group):
        yield f"{check.name}: {check.result}", False
        if check.fault:
            yield check.fault, True
            return
    noun = "GPUs" if group.device.type == "cuda" else "processes"
    yield f"all {group.size} {noun} compute and exchange what one does", False


def _dtypes(device: torch.device) -> list[torch.dtype]:
    both = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return [torch.float32, torch.bfloat16] if both else [torch.float32]


def _bytes(group: Group) -> Iterator[Check]:
    with group.working():
        group.send(Known())
        wrong = wrong_bytes(group)
    fault = ""
    if wrong.any():
        to, sender = divmod(int(wrong.argmax()), group.size)
        of = wrong.sum(0) + wrong.sum(1)
        fault = (
            f"{_name(group, max(sender, to, key=lambda rank: int(of[rank])))} exchanges wrong bytes, mostly from "
            f"{_name(group, sender)} to {_name(group, to)}; {AROUND}"
        )
    yield Check("known bytes from each to each", f"{int(wrong.sum())} wrong", fault)


@torch.no_grad()
def _network(group: Group, dtype: torch.dtype) -> Iterator[Check]:
    bits = _bits(dtype)
    exact, model = _new_network(torch.device("cpu"), dtype, torch.float32), _new_network(group.device, dtype, dtype)
    right, alone = (
        torch.cat([_pass(one, slice(i, i + 1), group.size).cpu() for i in range(group.size)]) for one in (exact, model)
    )
    rounds = _distance(alone, right)
    yield from _near(group, f"network in {bits}", rounds, dtype)
    share(group, model)
    yield _same(group, f"network in {bits}, a sample each", _pass(model, slice(group.size), group.size), alone, right)
    for count in (1, 2) if group.size > 2 and group.size % 2 == 0 else (1,):
        found = _pass(model, slice(count), group.size).cpu()
        what = "tokens shared" if count == 1 else "halves and tokens shared"
        shares = _shares_of_tokens(found - alone[:count], group.size // count)
        yield _shared(group, f"network in {bits}, {what}", _distance(found, alone[:count]), rounds, shares)


@torch.no_grad()
def _decoder_and_encoder(group: Group, dtype: torch.dtype) -> Iterator[Check]:
    bits = _bits(dtype)
    exact, vae = _new_vae(torch.device("cpu"), dtype, torch.float32), _new_vae(group.device, dtype, dtype)
    led, rows = LedVAE(group, vae), max(ROWS, group.size)
    latents = _numbers(1, vae.config.z_dim, FRAMES, rows, COLUMNS).to(dtype)
    clip = _numbers(1, 3, 1 + 4 * (FRAMES - 1), FACTOR * rows, FACTOR * COLUMNS).clamp(-1, 1).to(dtype)

    def whole(parts: Iterator[Tensor]) -> Tensor:
        return torch.cat(list(parts), 1).movedim(-1, 1)

    cases: tuple[tuple[str, Tensor, Callable[[WanVAE, Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
        ("decoding", latents, lambda one, x: whole(decoded(one, x)), lambda x: whole(led.decode(x))),
        ("encoding", clip, encoded, led.encode),
    )
    for name, x, by_one, by_all in cases:
        alone = by_one(vae, x.to(group.device)).cpu()
        rounds = _distance(alone, by_one(exact, x.float()))
        yield from _near(group, f"{name} in {bits}", rounds, dtype)
        found = by_all(x.to(group.device)).cpu()
        heights = [len(range(first, rows, group.size)) * found.shape[-2] // rows for first in range(group.size)]
        shares = [float(part.double().norm()) for part in (found.double() - alone.double()).split(heights, -2)]
        least = LEAST if group.device.type == "cpu" else LEAST_TF32
        yield _shared(group, f"{name} in {bits}, rows shared", _distance(found, alone), rounds, shares, least)


def _near(group: Group, name: str, rounds: float, dtype: torch.dtype) -> Iterator[Check]:
    """rounds: how far the first GPU's result is from the CPU's."""
    if group.device.type == "cpu":
        return
    fault = f"{_name(group, 0)} computes other numbers than the CPU; {LEAVE_OUT}" if rounds > MOST[dtype] else ""
    yield Check(f"{name} against the CPU", f"{rounds:.1e} apart, at most {MOST[dtype]:.0e}", fault)


def _same(group: Group, name: str, together: Tensor, alone: Tensor, right: Tensor) -> Check:
    """together: samples, one of each rank; alone: all of the first GPU."""
    together = together.cpu()
    apart = [_distance(*pair) for pair in zip(together, alone, strict=True)]
    most = 0.0 if group.device.type == "cuda" else LEAST
    fault, worst = "", max(range(group.size), key=apart.__getitem__)
    if apart[worst] > most:
        first = _distance(alone[worst], right[worst]) > _distance(together[worst], right[worst])
        wrong, other = (0, worst) if first else (worst, 0)
        fault = f"{_name(group, wrong)} computes other numbers than {_name(group, other)}; {LEAVE_OUT}"
    return Check(name, _words(apart[worst], most), fault)


def _shared(
    group: Group, name: str, apart: float, rounds: float, shares: Sequence[float], least: float = LEAST
) -> Check:
    """apart: of the result from that of one. shares: of the difference, by rank."""
    most, fault = max(least, 2 * rounds), ""
    if apart > most:
        worst = max(range(len(shares)), key=lambda rank: math.inf if math.isnan(shares[rank]) else shares[rank])
        fault = f"{_name(group, worst)} has the largest share of a wrong result; {AROUND}"
    return Check(name, _words(apart, most), fault)


def _words(apart: float, most: float) -> str:
    if not apart:
        return "equal bit for bit"
    return f"{apart:.1e} apart, at most {most:.1e}" if most else f"{apart:.1e} apart"


def _shares_of_tokens(difference: Tensor, ranks: int) -> list[float]:
    """Of a difference [B, C, T, H, W], where `ranks` share the tokens of each sample."""
    _, rows, columns = CONFIG.patch_size
    tokens = difference.double().square().unflatten(3, (-1, rows)).unflatten(5, (-1, columns)).sum((1, 2, 4, 6))
    return [float(part.sum()) for sample in tokens.flatten(1) for part in sample.split(-(-len(sample) // ranks))]


def _distance(found: Tensor, wanted: Tensor) -> float:
    """As a share of what is wanted; infinite where one is not finite."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    apart = float((found - wanted).norm() / wanted.norm())
    return apart if math.isfinite(apart) else math.inf


def _pass(model: OptimizedTransformer, samples: slice, there: int) -> Tensor:
    """Of some of the samples that are there."""
    text = model.embed_text(_numbers(there, TEXT, CONFIG.caption_channels).to(model.device), None)
    x = _numbers(there, CONFIG.in_channels, FRAMES, HEIGHT, WIDTH)[samples].to(model.device)
    return model(x, torch.full((1, FRAMES), 500.0, device=model.device), Text(0, text).of(samples, there))


def _new_network(device: torch.device, dtype: torch.dtype, computed: torch.dtype) -> OptimizedTransformer:
    # Not PyTorch's own random numbers, which belong to the process.
    with torch.random.fork_rng(devices=[]):
        model = OptimizedTransformer(CONFIG, dtype=computed, device=device)
    return _filled(model, dtype)


def _new_vae(device: torch.device, dtype: torch.dtype, computed: torch.dtype) -> WanVAE:
    with torch.random.fork_rng(devices=[]):
        vae = WanVAE(VAEConfig(8, 16, [0.0] * 16, [1.0] * 16))
    vae = _filled(vae.to(device, computed), dtype)
    if device.type == "cuda":
        # As all ranks run it.
        channels_last(vae)
    return vae


def _filled(module: M, dtype: torch.dtype) -> M:
    """With the same random weights in every precision: those of `dtype`."""
    for number, parameter in enumerate(module.requires_grad_(False).eval().parameters()):
        random = _numbers(*parameter.shape, seed=number)
        several = parameter.ndim > 1 and len(parameter) < parameter.numel()
        values = random * (len(parameter) / parameter.numel()) ** 0.5 if several else 1 + 0.1 * random
        parameter.copy_(values.to(dtype))
    return module


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bits(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(group: Group, rank: int) -> str:
    return named(rank, group.devices[rank])
