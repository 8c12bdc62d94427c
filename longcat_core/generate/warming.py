"""Kernels are compiled, or loaded from their caches, while weights are read or a GPU samples."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace

import torch

from ..model.config import ModelConfig
from ..optimize.attention import resolve_kernels
from ..optimize.kernels import vae as decoder
from ..optimize.kernels.jit import compiling
from ..optimize.optimized import OptimizedTransformer
from ..optimize.plan import TEXT_ROWS, Plan, Weights, Work, needed_bytes
from ..optimize.quantization import Policy, quantize
from ..optimize.requirement import HALF, Inputs
from ..optimize.switches import Optimizations
from ..sampling.conditioning import latent_shape
from ..sampling.sampler import sample
from ..sampling.schedules import make_schedule
from .loading import overlaps, same_stream
from .request import RELEASED

# Triton compiles a kernel for sizes that divide by 16 and another one for those that do not.
DIVISOR = 16
# Seconds that a thread waits for Python's lock before it asks for it. Python's own 5 ms, each time that a reader has
# waited for a file or the GPU, are ten times as long as reading itself beside a thread that imports or compiles.
TURN = 1e-4
# Channels of the layers of the released VAE's decoder.
DECODER_WIDTHS = (384, 192, 96)
_lock = threading.Lock()
# How many threads work now, and Python's own setting.
_working, _usual = 0, 0.0


@contextmanager
def short_turns() -> Iterator[None]:
    """Let this process's threads take turns every `TURN` while any is in such a block."""
    global _working, _usual
    with _lock:
        if not _working:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(TURN, _usual))
        _working += 1
    try:
        yield
    finally:
        with _lock:
            _working -= 1
            if not _working:
                sys.setswitchinterval(_usual)


@contextmanager
def warming(device: torch.device, warm: Callable[[Callable[[], bool]], None]) -> Iterator[None]:
    """Call `warm` in a thread, which is over when the `with` block is left. Whoever needs the kernels meets what it
    raises.

    warm: gets a function that says whether the block has ended with an error, so that the rest need not be done.
    """
    place, stop = same_stream(device), threading.Event()

    def run() -> None:
        with suppress(Exception), short_turns(), place, torch.no_grad():
            warm(stop.is_set)

    thread = threading.Thread(target=run, name="longcat-warm")
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()


def warm_up(
    config: ModelConfig,
    optimizations: Optimizations,
    dtype: torch.dtype,
    device: torch.device,
    fp8: Policy | None,
    work: Work | None,
) -> None:
    """Choose the attention kernels, which tries them, and sample steps of a network of one block at random.

    The network has the sizes of `config`, and the videos those of `work`, except for their number of frames, which is
    `few`; work None: attention alone. Not warmed: blocks that are compiled by torch, passes with conditioning frames,
    sparse attention, attention to audio, the VAE, graphs of cuDNN for the video's own length, and kernels for the
    length of a prompt.
    """
    if work is None or optimizations.compile != "off":
        resolve_kernels(optimizations.attention, Inputs(device, dtype, config.head_dim, False))
        return
    with torch.device("meta"):
        model = OptimizedTransformer(replace(config, depth=1, audio=None), optimizations, dtype=dtype)
    # Generators of the device and of PyTorch belong to the user.
    generator = torch.Generator(device).manual_seed(0)
    model.to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    if fp8 is not None:
        quantize(model, Policy(fp8.layers))
    model.announce = lambda sentence: None
    context = torch.randn(1, TEXT_ROWS, config.caption_channels, generator=generator, device=device)
    mask = torch.ones(1, TEXT_ROWS, dtype=torch.int64, device=device)
    mask[:, TEXT_ROWS // 4 :] = 0
    noise = torch.randn(*few(work.latents), generator=generator, device=device)
    samples = 2 if work.guided and not optimizations.split_guidance else 1
    with compiling(device) as instead:
        # Without a package, which `import_ahead` imports meanwhile. Not by `sample`, which looks at results.
        model.set_optimizations(replace(optimizations, attention="sdpa"))
        with suppress(Exception), instead():
            text = model.embed_text(context.repeat(samples, 1, 1), mask.repeat(samples, 1))
            timestep = torch.full((1, 1), 500.0, device=device)
            model.execution.evaluate(noise.repeat(samples, 1, 1, 1, 1), timestep, text)
        model.set_optimizations(optimizations)
        model.choose_kernels(device)
    sample(
        model,
        noise,
        make_schedule("base", 1),
        context,
        mask,
        negative_context=context if work.guided else None,
        negative_mask=mask if work.guided else None,
        guidance_scale=4.0 if work.guided else 1.0,
    )


def network_ahead(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, fp8: Policy | None, room: int
) -> AbstractContextManager[None]:
    """On a GPU, `warm_up` for a video of the usual size in a thread while the block loads weights for an unknown one.

    In fp32 nothing is warmed: our kernels are for 16 bits. room: free bytes of the GPU; with too few, attention alone
    is warmed.
    """
    if not overlaps(device) or dtype not in HALF:
        return nullcontext()
    usual = Work((1, *latent_shape(RELEASED.frames, RELEASED.height, RELEASED.width)))
    fits = warm_bytes(config, dtype, usual) <= room

    def warm(stopped: Callable[[], bool]) -> None:
        # Kernels for one sample in a pass are others than those for two.
        for work in (usual, replace(usual, guided=False)) if fits else (None,):
            if not stopped():
                warm_up(config, Optimizations(), dtype, device, fp8, work)

    return warming(device, warm)


def decoder_ahead(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """On a GPU, compile the kernels of the released VAE's decoder in a thread while the block samples."""
    if not (overlaps(device) and decoder.takes(dtype)):
        return nullcontext()
    return warming(device, lambda stopped: decoder.compile_ahead(dtype, DECODER_WIDTHS, stopped))


def few(latents: Sequence[int]) -> tuple[int, ...]:
    """A shape [B, C, T, H, W] with few frames, whose numbers of frames and tokens have the same remainders."""
    batch, channels, frames, height, width = latents
    return batch, channels, frames if frames < 2 else 2 + (frames - 2) % DIVISOR, height, width


def warm_bytes(config: ModelConfig, dtype: torch.dtype, work: Work) -> int:
    """GPU memory that `warm_up` takes at most."""
    config, work = replace(config, depth=1), replace(work, latents=few(work.latents), cond_latents=0)
    weights = Weights.of(config, dtype)
    return needed_bytes(Plan(), config, weights, work, dtype.itemsize, own=False, others=0)
