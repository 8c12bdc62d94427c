"""The video VAE: pixels to normalized latents and back, on diffusers' AutoencoderKLWan."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, LongCatError
from ..files.safetensors_io import SafetensorsFile, check_tensors, write_safetensors
from ..sampling.conditioning import SPATIAL_FACTOR, TEMPORAL_FACTOR
from . import wan_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class VideoVAE:
    """AutoencoderKLWan with the latent normalization z = (mu - mean) / std built in.

    tiling: work on overlapping tiles of 256x256 pixels. This bounds memory on large frames and changes the result
    slightly where tiles meet.
    """

    def __init__(self, model: AutoencoderKLWan, *, tiling: bool = False) -> None:
        self.model = model.eval()
        # Small and precision-critical, so kept in fp32 on the CPU and moved per call.
        self.mean = torch.tensor(model.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(model.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self.tiling = tiling

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def tiling(self) -> bool:
        return self.model.use_tiling

    @tiling.setter
    def tiling(self, on: bool) -> None:
        (self.model.enable_tiling if on else self.model.disable_tiling)()

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> VideoVAE:
        """Move or cast in place; returns self."""
        # nn.Module's own method: diffusers' override prints a warning on every cast.
        nn.Module.to(self.model, device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B,3,F,H,W], float in -1..1, to normalized latents [B,16,1+(F-1)/4,H/8,W/8] fp32 on the VAE's device.

        The mode of the posterior, not a sample. Raises LongCatError unless F is 4k+1 and H and W divide by 8.
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
        mode = self.model.encode(video.to(self.device, self.dtype)).latent_dist.mode().float()
        return (mode - self.mean.to(mode.device)) / self.std.to(mode.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B,16,T,h,w] to video [B,1+4(T-1),8h,8w,3], fp32 in 0..1, on the VAE's device."""
        channels = self.mean.shape[1]
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise LongCatError(f"the VAE decodes latents [B,{channels},T,h,w], got shape {list(latents.shape)}")
        z = latents.to(self.device, torch.float32)
        z = z * self.std.to(z.device) + self.mean.to(z.device)
        video = self.model.decode(z.to(self.dtype)).sample
        return video.permute(0, 2, 3, 4, 1).float().add(1).div(2).clamp(0, 1)


def load_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", tiling: bool = False
) -> VideoVAE:
    """A Wan 2.1 VAE from one .safetensors (ComfyUI/Wan or diffusers names) or a diffusers folder (or its parent).

    A diffusers-named file takes `vae_config.json` or a VAE's `config.json` beside it; otherwise all sizes come from the
    tensors' shapes and the latent normalization is Wan 2.1's own. Weights are cast to `dtype`.
    Raises CheckpointError for a file that is unreadable, incomplete or not a Wan 2.1 VAE, and LongCatError without
    diffusers.
    """
    path = Path(path)
    files, config_file = _find(path)
    opened = [SafetensorsFile(file) for file in files]
    shapes = {name: shape for file in opened for name, (_, shape) in file.header.items()}
    wan_named = wan_vae.is_wan_named(shapes)
    config = wan_vae.config_from_state(shapes, str(path))
    stored = None if wan_named or config_file is None else _read_config(config_file)
    if stored is not None:
        config |= stored
        for key in ("latents_mean", "latents_std"):
            if not isinstance(config[key], list) or len(config[key]) != config["z_dim"]:
                raise CheckpointError(f"{config_file} needs {config['z_dim']} values in {key}; give another config")
    model = _meta_model(config, config_file or path)
    names = wan_vae.to_diffusers if wan_named else dict
    check_tensors(path, names(shapes), {k: tuple(v.shape) for k, v in model.state_dict().items()}, "Wan 2.1 VAE")
    state = names({name: tensor for file in opened for name, tensor in file.tensors().items()})
    # `copy`: a tensor that needs no cast would otherwise stay a view of the file, which may be replaced later.
    state = {name: tensor.to(device, dtype, copy=True) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return VideoVAE(model.requires_grad_(False), tiling=tiling)


def save_vae(path: str | Path, model: AutoencoderKLWan, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights as one .safetensors in ComfyUI's Wan names, which ComfyUI's own VAE loader reads.

    The file carries no latent normalization: readers use Wan 2.1's.
    """
    state = wan_vae.to_wan(model.state_dict())
    write_safetensors(path, {name: tensor.to(dtype) for name, tensor in state.items()}, {"format": "pt"})


def _find(path: Path) -> tuple[list[Path], Path | None]:
    """(weight files, config file or None) of a file or folder."""
    if not path.is_dir():
        beside = [path.with_name(name) for name in ("vae_config.json", "config.json")]
        return [path], next((file for file in beside if file.is_file() and _is_vae_config(file)), None)
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    config = folder / "config.json"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; give the VAE's own folder or file")
    if not config.is_file():
        raise CheckpointError(f"{folder} holds no config.json; give the VAE's .safetensors file itself")
    if not _is_vae_config(config):
        raise CheckpointError(f"{config} is not the config of an AutoencoderKLWan; give the VAE's own folder")
    return files, config


def _read_json(file: Path) -> Mapping[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file} as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a config: it does not hold a JSON object")
    return content


def _is_vae_config(file: Path) -> bool:
    # A network's config.json lies beside the VAE in some folders; only a VAE's has z_dim.
    return "z_dim" in _read_json(file)


def _read_config(file: Path) -> dict[str, object]:
    known = inspect.signature(_autoencoder().__init__).parameters
    config = {name: value for name, value in _read_json(file).items() if name in known}
    if config.get("is_residual") or config.get("patch_size"):
        raise CheckpointError(f"{file} describes a Wan 2.2 VAE; LongCat-Video needs the Wan 2.1 VAE")
    return config


def _autoencoder() -> type[AutoencoderKLWan]:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise LongCatError(
            f"the VAE needs the diffusers package ({error}); run: pip install 'longcat-video[headless]'"
        ) from error
    return AutoencoderKLWan


def _meta_model(config: Mapping[str, object], source: Path) -> AutoencoderKLWan:
    autoencoder = _autoencoder()
    try:
        with torch.device("meta"):
            return autoencoder(**config)
    except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"cannot build the VAE that {source} describes ({error})") from error
