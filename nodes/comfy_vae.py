"""ComfyUI's VAE in our own network: it works part by part, so that memory does not grow with a video's length."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..longcat_core.checkpoints.wan_vae import DIFFUSERS_TO_WAN
from ..longcat_core.errors import LongCatError
from ..longcat_core.generate.vae import VideoVAE
from ..longcat_core.sampling.conditioning import video_frames
from ..longcat_core.vae.network import VAEConfig, WanVAE
from ..longcat_core.vae.parts import needed_bytes
from .host import running_workers


def own_vae(vae: comfy.sd.VAE) -> VideoVAE | None:
    """Our network with a VAE's weights, where ComfyUI has loaded them; None if it is not a Wan 2.1 VAE.

    ComfyUI's latents are not normalized, and neither are this network's.
    """
    theirs = vae.first_stage_model
    if not isinstance(theirs, comfy.ldm.wan.vae.WanVAE):
        return None
    state = theirs.state_dict()
    config = VAEConfig(
        theirs.dim,
        theirs.z_dim,
        [0.0] * theirs.z_dim,
        [1.0] * theirs.z_dim,
        in_channels=state["encoder.conv1.weight"].shape[1],
        out_channels=state["decoder.head.2.weight"].shape[0],
        dim_mult=theirs.dim_mult,
        num_res_blocks=theirs.num_res_blocks,
        temporal_downsample=theirs.temperal_downsample,
    )
    with torch.device("meta"):
        own = WanVAE(config)
    wanted = {}
    for name, parameter in own.state_dict().items():
        module, _, kind = name.rpartition(".")
        found = state.get(f"{DIFFUSERS_TO_WAN.get(module, module)}.{kind}")
        if found is None or found.shape != parameter.shape:
            return None
        # Weights that are there already are shared.
        wanted[name] = found.to(vae.device, vae.vae_dtype)
    if config.out_channels != 3 or len(wanted) != len(state):
        return None
    own.load_state_dict(wanted, assign=True)
    return VideoVAE(own.requires_grad_(False))


def _loaded(vae: comfy.sd.VAE, height: int, width: int) -> VideoVAE | None:
    """`own_vae`, on its device, with room for pictures of this size, and on the GPUs that the last pass ran on."""
    needed = needed_bytes(height, width, vae.vae_dtype, vae.device)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
    own, workers = own_vae(vae), running_workers()
    if own is not None and workers is not None and (group := workers.active(own.device)) is not None:
        from ..longcat_core.parallel.led_vae import LedVAE

        own.spread = LedVAE(group, own.model)
    return own


def decoded(vae: comfy.sd.VAE, samples: Tensor) -> Iterator[Tensor]:
    """Frames [f, H, W, 3], fp32 in 0..1, of one video's samples [1, C, T, h, w], as they leave the decoder.

    Raises what ComfyUI raises if the user interrupts it, and LongCatError for a VAE that gives other frames.
    """
    own = _loaded(vae, 8 * samples.shape[-2], 8 * samples.shape[-1])
    if own is None:
        logging.info("LongCat: the VAE is not a Wan 2.1 VAE; ComfyUI's own decoder decodes it at once")
        images = vae.decode(samples)
        images = images.reshape(-1, *images.shape[-3:])
        wanted = video_frames(samples.shape[2])
        if len(images) != wanted or images.shape[-1] != 3:
            raise LongCatError(
                f"the VAE decodes {list(samples.shape)} to {list(images.shape)} and not to {wanted} frames of three "
                "channels; connect the Wan 2.1 VAE"
            )
        yield images
        return
    for part in own.decode_in_any_case(samples, lambda error: _in_tiles(own, error)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield part[0]


def encoded(vae: comfy.sd.VAE, frames: Tensor) -> Tensor:
    """Samples [1, C, T, H/8, W/8] of frames [F, H, W, 3] in 0..1, on the VAE's output device.

    F is 4k+1, and H and W divide by 8.
    """
    own = _loaded(vae, *frames.shape[1:3])
    if own is None:
        return vae.encode(frames)
    video = frames.movedim(-1, 0)[None].mul(2).sub(1)
    try:
        samples = own.encode(video)
    except torch.OutOfMemoryError as error:
        _in_tiles(own, error)
        samples = own.encode(video)
    return samples.to(vae.output_device)


def _in_tiles(own: VideoVAE, error: torch.OutOfMemoryError) -> None:
    """Let a VAE that ran out of memory go on in tiles. Raises the error if it does that already."""
    if own.tiling:
        raise error
    # Their tensors fill the memory.
    traceback.clear_frames(error.__traceback__)
    comfy.model_management.soft_empty_cache()
    logging.warning("LongCat: the VAE ran out of memory; it works on tiles")
    # Its group has ended, and tiles are for one GPU.
    own.tiling, own.spread = True, None
