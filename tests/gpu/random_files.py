"""Random files of the released models' sizes, for measuring whole runs on a machine without the released ones.

    python -m tests.gpu.random_files FOLDER             33 GB: model, text encoder and VAE
    python -m tests.gpu.random_files FOLDER --avatar    40 GB: an avatar in its place, an audio encoder, a sound
    python -m tests.gpu.random_files FOLDER --small     for trying a benchmark on a CPU

Videos of such files are noise, and `longcat generate --model FOLDER/model.safetensors ...` makes them like any others.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longcat_core.checkpoints.formats import COMFYUI, OFFICIAL
from longcat_core.checkpoints.load import official_state
from longcat_core.files.media import Sound, write_video
from longcat_core.files.safetensors_io import read_tensors, stream_safetensors
from longcat_core.generate.audio.whisper import WhisperConfig, WhisperEncoder
from longcat_core.generate.paths import NANO_TEXT_ENCODER
from longcat_core.generate.umt5 import Umt5Config, Umt5Encoder
from longcat_core.generate.vae import save_vae
from longcat_core.model.config import AudioConfig, ModelConfig
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.vae.network import VAEConfig, WanVAE

E4M3 = torch.float8_e4m3fn
SECONDS, RATE = 60, 16000
# Of the quantized layers: stored numbers are a thousand times as large as the weights.
SCALE = 1e-3


def write(folder: Path, avatar: bool = False, small: bool = False) -> None:
    """Write all files into `folder`, which is made; what is there under these names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = ModelConfig()
    if small:
        config = replace(config, depth=2, hidden_size=128, num_heads=4, caption_channels=64)
    if avatar:
        config = replace(config, audio=AudioConfig())
    form = OFFICIAL if avatar else COMFYUI
    with torch.device("meta"):
        network = official_state(OptimizedTransformer(config), form)
        width = config.caption_channels
        sizes = (width, 64, 2 * width, 2, 4, 32) if small else (width, 64, 10240, 24, 64, 32)
        text = Umt5Encoder(Umt5Config(256384, *sizes)).state_dict()
        vae = WanVAE(VAEConfig(8 if small else 96, 16, [0.0] * 16, [1.0] * 16))
        hears = WhisperEncoder(WhisperConfig(layers=4) if small else WhisperConfig()).state_dict()
    own = {"config": json.dumps(config.to_dict())} if avatar else {}
    _write(folder / "model.safetensors", network, torch.bfloat16, own)
    _write(folder / "umt5_xxl.safetensors", text, torch.bfloat16, {}, quantized=True)
    vae = vae.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.copy_(_values(name, parameter, torch.float32))
    save_vae(folder / "vae.safetensors", vae)
    if avatar:
        _write(folder / "whisper.safetensors", hears, torch.float16, {"config": '{"heads": 20}'})
        time = torch.arange(SECONDS * RATE) / RATE
        tone = 0.2 * torch.sin(2 * torch.pi * (200 + 60 * torch.sin(3 * time)) * time)
        sound = Sound(tone[None].double(), RATE)
        write_video(folder / "speech.mkv", np.zeros((1, 16, 16, 3), np.uint8), 1 / SECONDS, sound)


def _write(
    path: Path, like: Mapping[str, Tensor], dtype: torch.dtype, metadata: dict[str, str], quantized: bool = False
) -> None:
    """Random numbers in the shapes of `like`. quantized: as ComfyUI's scaled e4m3 file of UMT5, with its vocabulary."""
    header = {name: (dtype, tuple(tensor.shape)) for name, tensor in like.items()}
    extra = {}
    if quantized:
        layers = [
            name for name, tensor in like.items() if tensor.ndim == 2 and ".layer." in name and "bias" not in name
        ]
        header |= {name: (E4M3, header[name][1]) for name in layers}
        extra = {name.removesuffix("weight") + "scale_weight": torch.tensor([SCALE]) for name in layers}
        extra |= {"scaled_fp8": torch.zeros(2).to(E4M3), "spiece_model": _vocabulary()}
        header |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in like.items():
            yield name, _values(name, tensor, header[name][0])
        yield from extra.items()

    stream_safetensors(path, header, tensors(), {"format": "pt"} | metadata)
    print(path, flush=True)


def _values(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Ones for norms, zeros for biases, otherwise normal numbers that keep activations in their range."""
    if like.ndim < 2 or "norm" in name:
        return torch.full(like.shape, float("norm" in name and not name.endswith("bias")), dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spread = like[0].numel() ** -0.5 if like.ndim > 2 else 0.02
    found = torch.empty(like.shape, device=device).normal_(std=spread)
    return (found / SCALE if dtype == E4M3 else found).to(dtype).cpu()


def _vocabulary() -> Tensor:
    """nano's SentencePiece model with as many more pieces as UMT5-XXL's embedding needs, as bytes."""
    known = bytes(read_tensors(NANO_TEXT_ENCODER)["spiece_model"].tolist())
    # Concatenated messages of protobuf are merged.
    return torch.frombuffer(bytearray(known + b"".join(map(_piece, range(256300 - 384)))), dtype=torch.uint8)


def _piece(number: int) -> bytes:
    text = f"\u2581zq{number}x".encode()
    message = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -50.0)
    return b"\n" + bytes([len(message)]) + message


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--avatar", action="store_true")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    write(args.folder, args.avatar, args.small)
