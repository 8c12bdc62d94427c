"""The video VAE: pixels to normalized latents and back, and the files that it comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import wan_vae
from ..checkpoints.whole import read_whole
from ..errors import CheckpointError, LongCatError
from ..files.records import FiniteFloat, read_record
from ..files.safetensors_io import write_safetensors
from ..optimize.kernels import vae as kernels
from ..parallel.vae import SpreadVAE
from ..sampling.conditioning import SPATIAL_FACTOR, TEMPORAL_FACTOR, video_frames
from ..vae import tiles
from ..vae.layers import RMSNorm
from ..vae.network import SPELLED, VAEConfig, WanVAE, channels_last
from ..vae.parts import decoded, encoded

MAX_CONFIG_BYTES = 1_000_000
REMEDY = "give another config"
# Means and deviations of latents are about 1; between this and its inverse, every product is finite in fp32.
LARGEST = 1e6


class VideoVAE:
    """The Wan 2.1 VAE with the latent normalization z = (mu - mean) / std built in.

    tiling: work on overlapping tiles of 256x256 pixels. This bounds memory on large frames and changes the result
    slightly where tiles meet.
    spread: None, or what shares the work with other GPUs, as long as it is not done in tiles.
    """

    def __init__(self, model: WanVAE, *, tiling: bool = False) -> None:
        self.model = model.eval()
        # Small and precision-critical, so kept in fp32 on the CPU and moved per call.
        self.mean = torch.tensor(model.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(model.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.tiling = tiling
        self.spread: SpreadVAE | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> VideoVAE:
        """Move or cast in place; returns self."""
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B,3,F,H,W], float in -1..1, to normalized latents [B,16,1+(F-1)/4,H/8,W/8] fp32 on the VAE's device.

        The mode of the posterior, not a sample. Raises LongCatError unless F is 4k+1 and H and W divide by 8, and for
        latents that are not finite.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise LongCatError(f"the VAE encodes videos [B,3,F,H,W], got shape {list(video.shape)}")
        frames, height, width = video.shape[2:]
        if (
            frames % TEMPORAL_FACTOR != 1
            or height % SPATIAL_FACTOR
            or width % SPATIAL_FACTOR
            or not height
            or not width
        ):
            raise LongCatError(
                f"the VAE encodes 4k+1 frames with sides that divide by {SPATIAL_FACTOR}, "
                f"got {frames} frames of {height}x{width} (height x width)"
            )
        self._prepare()
        if self.tiling and tiles.exceeds(height, width):
            mode = tiles.tiled(video, self._encode, 1, SPATIAL_FACTOR)
        elif self.spread is not None:
            mode = self.spread.encode(video.to(self.device, self.dtype))
        else:
            mode = self._encode(video)
        mode = mode.to(self.device, torch.float32)
        if not mode.isfinite().all():
            raise LongCatError(f"the VAE overflows in {self.dtype}; load it as bfloat16 or float32")
        return (mode - self.mean.to(mode.device)) / self.std.to(mode.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B,16,T,h,w] to video [B,1+4(T-1),8h,8w,3], fp32 in 0..1, on the VAE's device."""
        parts = self.decode_frames(latents)
        first = next(parts)
        video = first.new_empty((len(first), video_frames(latents.shape[2]), *first.shape[2:]))
        begin = 0
        for part in chain([first], parts):
            video[:, begin : begin + part.shape[1]] = part
            begin += part.shape[1]
        return video

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The frames of `decode` part by part, as they leave the decoder: first one, then several at a time.

        In tiles all frames come at once. Raises LongCatError for latents of another form, before the first part.
        """
        channels = self.mean.shape[1]
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.shape[2]:
            raise LongCatError(f"the VAE decodes latents [B,{channels},T,h,w], got shape {list(latents.shape)}")
        return self._decoded(latents)

    def decode_in_any_case(
        self, latents: Tensor, in_tiles: Callable[[torch.OutOfMemoryError], None]
    ) -> Iterator[Tensor]:
        """`decode_frames`, which goes on in tiles where memory runs out; no frame comes twice.

        in_tiles: called with the error; turns `tiling` on, or raises.
        """
        # In tiles the decoder begins again, with frames that are out already.
        done = begun = 0
        parts = self.decode_frames(latents)
        while True:
            try:
                part = next(parts, None)
            except torch.OutOfMemoryError as error:
                in_tiles(error)
                parts, begun = self.decode_frames(latents), 0
                continue
            if part is None:
                return
            new, begun = part[:, max(0, done - begun) :], begun + part.shape[1]
            if new.shape[1]:
                done = begun
                yield new

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        self._prepare()
        z = latents.to(self.device, torch.float32)
        z = (z * self.std.to(z.device) + self.mean.to(z.device)).to(self.dtype)
        if self.tiling and tiles.exceeds(z.shape[3] * SPATIAL_FACTOR, z.shape[4] * SPATIAL_FACTOR):
            parts = iter([tiles.tiled(z, self._decode, SPATIAL_FACTOR, 1).permute(0, 2, 3, 4, 1)])
        elif self.spread is not None:
            parts = self.spread.decode(z)
        else:
            parts = decoded(self.model, z)
        for part in parts:
            yield part.to(self.device, torch.float32).add(1).div(2).clamp(0, 1)

    def compile_ahead(self, stopped: Callable[[], bool]) -> None:
        """Compile the decoder's kernels, without work for the GPU. stopped: see `kernels.vae.compile_ahead`."""
        if kernels.takes(self.dtype):
            norms = (layer for layer in self.model.decoder.modules() if isinstance(layer, RMSNorm))
            kernels.compile_ahead(self.dtype, dict.fromkeys(norm.gamma.numel() for norm in norms), stopped)

    def _encode(self, video: Tensor) -> Tensor:
        return encoded(self.model, video.to(self.device, self.dtype))

    def _decode(self, z: Tensor) -> Tensor:
        """Pictures [B,3,F,H,W] on the CPU, of one tile."""
        return torch.cat([part.cpu() for part in decoded(self.model, z)], dim=1).permute(0, 4, 1, 2, 3)

    def _prepare(self) -> None:
        if self.device.type == "cuda":
            channels_last(self.model)


def load_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", tiling: bool = False
) -> VideoVAE:
    """A Wan 2.1 VAE from one file, or from a diffusers folder or its parent.

    Names are Wan's and ComfyUI's, or diffusers', under any prefix. Sizes come from the tensors' shapes. A file with
    diffusers' names takes the latent normalization from `vae_config.json` or a VAE's `config.json` beside it; otherwise
    it is Wan 2.1's own. Weights are cast to `dtype`. Raises CheckpointError for files that are unreadable, incomplete
    or not a Wan 2.1 VAE, for a config that does not fit them and for a weight that is not finite.
    """
    path = Path(path)
    folder = path / "vae" if (path / "vae" / "config.json").exists() else path
    opened = wan_vae.open_vae(folder)
    config_file = _config_of(folder)
    config = wan_vae.sizes(opened)
    if config_file is not None and opened.form is wan_vae.DIFFUSERS:
        config |= _normalization(config_file, config)
    with torch.device("meta"):
        model = WanVAE(_shape(config)).to(dtype)
    model.load_state_dict(read_whole(opened, model.state_dict(), device), assign=True)
    return VideoVAE(model.requires_grad_(False), tiling=tiling)


def _shape(config: dict[str, Any]) -> VAEConfig:
    names = {spelled: name for name, spelled in SPELLED.items()}
    return VAEConfig(**{names.get(name, name): value for name, value in config.items() if name != "attn_scales"})


def save_vae(path: str | Path, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights as one .safetensors in ComfyUI's Wan names, which ComfyUI's own VAE loader reads.

    The file carries no latent normalization: readers use Wan 2.1's.
    """
    state = wan_vae.to_wan(model.state_dict())
    write_safetensors(path, {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, {"format": "pt"})


@dataclass(frozen=True)
class Config:
    """What is read of a VAE's config.json: the structure, which must be Wan 2.1's, sizes and normalization."""

    z_dim: int
    base_dim: int | None = None
    decoder_base_dim: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    dim_mult: list[int] | None = None
    num_res_blocks: int | None = None
    attn_scales: list[float] | None = None
    temperal_downsample: list[bool] | None = None
    is_residual: bool | None = None
    patch_size: int | None = None
    latents_mean: list[FiniteFloat] = field(default_factory=lambda: list(wan_vae.LATENTS_MEAN))
    latents_std: list[FiniteFloat] = field(default_factory=lambda: list(wan_vae.LATENTS_STD))


def _config_of(path: Path) -> Path | None:
    """The VAE's config in a folder, which must be there, or beside a file."""
    if path.is_dir():
        config = path / "config.json"
        if not config.exists():
            raise CheckpointError(f"{path} holds no config.json; give the VAE's .safetensors file itself")
        if not _is_vae_config(config):
            raise CheckpointError(f"{config} is not the config of an AutoencoderKLWan; give the VAE's own folder")
        return config
    beside = (path.with_name(name) for name in ("vae_config.json", "config.json"))
    return next((file for file in beside if file.exists() and _is_vae_config(file)), None)


def _is_vae_config(file: Path) -> bool:
    # A network's config.json lies beside the VAE in some folders; only a VAE's has z_dim.
    return "z_dim" in read_record(file, dict[str, Any], "a config", REMEDY, MAX_CONFIG_BYTES, CheckpointError)


def _normalization(file: Path, sizes: dict[str, Any]) -> dict[str, list[float]]:
    """latents_mean and latents_std of a config that describes a VAE of these `sizes`."""
    config = read_record(file, Config, "a VAE's config", REMEDY, MAX_CONFIG_BYTES, CheckpointError)
    if config.is_residual or config.patch_size:
        raise CheckpointError(f"{file} describes a Wan 2.2 VAE; LongCat-Video needs the Wan 2.1 VAE")
    for name, value in (sizes | {"decoder_base_dim": sizes["decoder_base_dim"] or sizes["base_dim"]}).items():
        if not name.startswith("latents_") and (given := getattr(config, name)) not in (None, value):
            raise CheckpointError(f"{file} has {name} {given}, the VAE beside it {value}; {REMEDY}")
    found = {"latents_mean": config.latents_mean, "latents_std": config.latents_std}
    for name, numbers in found.items():
        if len(numbers) != sizes["z_dim"]:
            raise CheckpointError(f"{file} needs {sizes['z_dim']} values in {name}; {REMEDY}")
        if max(map(abs, numbers)) > LARGEST:
            raise CheckpointError(f"{file} has {max(numbers, key=abs)} in {name}, which no latent reaches; {REMEDY}")
    if (least := min(config.latents_std)) < 1 / LARGEST:
        raise CheckpointError(f"{file} has {least} in latents_std, which must be above 0; {REMEDY}")
    if any(abs(a - b) > 1e-3 for name in found for a, b in zip(found[name], sizes[name], strict=True)):
        warnings.warn(f"{file} has another latents_mean or latents_std than Wan 2.1's VAE; they are used", stacklevel=3)
    return found
