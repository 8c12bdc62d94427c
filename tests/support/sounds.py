"""Sounds as other programs write them."""

from __future__ import annotations

import math
from pathlib import Path

import av
import torch

from longcat_core.files.media import Sound

from .clips import SOUND_RATE


def sweep(seconds: float = 1.5, channels: int = 2, rate: int = SOUND_RATE) -> Sound:
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    tones = [0.3 * torch.sin(2 * math.pi * (300 + 200 * i + 100 * time) * time) for i in range(channels)]
    return Sound(torch.stack(tones), rate)


def write_sound(path: Path, sound: Sound, codec: str) -> Path:
    layout = "stereo" if len(sound.samples) == 2 else "mono"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=sound.rate, layout=layout)
        converter = av.AudioResampler(stream.codec_context.format.name, layout, sound.rate)
        frame = av.AudioFrame.from_ndarray(sound.samples.numpy(), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = sound.rate, 0
        for part in (*converter.resample(frame), *converter.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path
