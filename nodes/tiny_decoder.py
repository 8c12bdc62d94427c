"""The small decoders of Wan 2.1 latents that previews use where the user has one: TAEHV's taew2_1 and lighttaew2_1."""

from __future__ import annotations

import logging
from functools import lru_cache

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import LatentFormat
from comfy.taesd.taehv import TAEHV
from comfy_execution.progress import PreviewImageTuple
from torch import Tensor

# How names of files begin, in models/vae_approx; the first that is there is used. Both have one architecture.
RAW = "lighttaew2_1"
NAMES = ("taew2_1", RAW)
# A frame is decoded together with as many before it: it remembers what was there.
BEFORE = 2
# Numbers for each pixel of a frame that decoding may hold at a time: 455 as measured, 800 as ComfyUI counts.
PER_PIXEL = 800


class CannotShow(Exception):
    """This decoder cannot make pictures; its words say why and what helps."""


class TinyPreviewer:
    """ComfyUI's TAEHV with one file's decoder, for single frames of a video.

    ComfyUI's own previewer shows the first frame only, evicts models to load the decoder in the midst of a run, takes
    weights in fp16 for HunyuanVideo's, and copies pictures without waiting for the GPU.
    """

    before = BEFORE

    def __init__(self, path: str, form: LatentFormat, device: torch.device, raw: bool) -> None:
        """raw: the decoder was trained on the VAE's latents, and not on normalized ones (taew2_1) as samplers have.

        Raises CannotShow if `path` is not such a decoder.
        """
        self.form, self.device, self.raw = form, device, raw
        dtype = comfy.model_management.vae_dtype(device, [torch.float16, torch.bfloat16, torch.float32])
        with torch.device("meta"):
            decoder = TAEHV(form.latent_channels, show_progress_bar=False)
        # The encoder stays on meta and never gets memory.
        wanted = decoder.decoder.state_dict()
        try:
            found = comfy.utils.load_torch_file(path, safe_load=True)
            weights = {name: found[f"decoder.{name}"] for name in wanted}
            if any(weights[name].shape != wanted[name].shape for name in wanted):
                raise ValueError("tensors of other shapes")
            weights = {name: weight.to(device, dtype, copy=True) for name, weight in weights.items()}
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise ValueError("numbers that are not finite")
        except Exception as error:  # A file can be damaged in any way.
            raise CannotShow(
                f"previews leave out {path}, which is not a TAEHV decoder of Wan 2.1 latents ({error!r}); replace or "
                "remove it"
            ) from error
        decoder.decoder.load_state_dict(weights, assign=True)
        self.decoder, self.dtype = decoder, dtype

    @torch.no_grad()
    def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> PreviewImageTuple:
        """The last frame of normalized latents [B, 16, T, h, w], decoded with those before it.

        Raises CannotShow if the device has no memory for it.
        """
        management = comfy.model_management
        x0 = x0[:1].to(self.device)
        size = PER_PIXEL * 64 * x0.shape[3] * x0.shape[4] * self.dtype.itemsize
        if management.get_free_memory(self.device) < size:
            raise CannotShow(
                f"previews show rough colors: decoding needs {size >> 20} MiB of free memory; choose the preview "
                "method latent2rgb to leave it out"
            )
        x0 = (self.form.process_out(x0) if self.raw else x0).to(self.dtype)
        try:
            # To the CPU here: ComfyUI reads a picture without waiting until it has been copied from a GPU.
            frame = self.decoder.decode(x0)[0, :, -1].movedim(0, -1).float().cpu()
        except Exception as error:  # A preview must not end a run that may have taken hours.
            raise CannotShow(
                f"previews show rough colors: decoding failed: {error!r}; choose the preview method latent2rgb"
            ) from error
        image = latent_preview.preview_to_image(frame, do_scale=False)
        return preview_format, image, latent_preview.MAX_PREVIEW_RESOLUTION


def plain_previewer(form: LatentFormat) -> latent_preview.Latent2RGBPreviewer:
    """Pictures from RGB factors alone."""
    return latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    )


def find_previewer(device: torch.device, form: LatentFormat) -> TinyPreviewer | latent_preview.LatentPreviewer | None:
    """What ComfyUI's preview method asks for: a tiny decoder where the user has one, RGB factors, or None."""
    if args.preview_method == LatentPreviewMethod.TAESD and form.taesd_decoder_name is not None:
        files = folder_paths.get_filename_list("vae_approx")
        ours = [(name, file) for name in NAMES for file in sorted(files) if file.startswith(name)]
        for name, file in ours:
            # A link that leads nowhere has no path.
            path = folder_paths.get_full_path("vae_approx", file) or file
            try:
                return TinyPreviewer(path, form, device, name == RAW)
            except CannotShow as error:
                say_once(str(error))
        if ours:
            # ComfyUI would stop the run at a file that it cannot read.
            return plain_previewer(form)
    return latent_preview.get_previewer(device, form)


@lru_cache(maxsize=64)
def say_once(text: str) -> None:
    """One note for all runs and segments."""
    logging.warning("LongCat: %s", text)
