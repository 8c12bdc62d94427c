"""The pictures of the template browser: a video of a bundled model, with a label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.nano.avatar.measure import load_avatar, request_of, speak
from longcat_core.nano.avatar.world import Scene

from .graph import Graph
from .nano import TALKING

SIDE, STRIP = 512, 100
STEPS = 50


def picture(video: np.ndarray, label: str, origin: str) -> Image.Image:
    """A square: one large frame of video [F, H, W, 3], three small ones, a label, and what made it."""
    sheet = Image.new("RGB", (SIDE, SIDE), (24, 24, 28))
    frames = [Image.fromarray(video[i]) for i in np.linspace(0, len(video) - 1, 4).astype(int)]
    sheet.paste(frames[2].resize((SIDE, 324), Image.Resampling.BICUBIC), (0, 0))
    for i, frame in enumerate((frames[0], frames[1], frames[3])):
        sheet.paste(frame.resize((SIDE // 3 - 4, STRIP), Image.Resampling.BICUBIC), (2 + i * SIDE // 3, 330))
    draw = ImageDraw.Draw(sheet)
    draw.text((SIDE / 2, 456), label, fill=(235, 235, 235), font=ImageFont.load_default(32), anchor="mm")
    draw.text((SIDE / 2, 492), origin, fill=(170, 170, 180), font=ImageFont.load_default(20), anchor="mm")
    return sheet


def spoken(scene: Scene, seed: int) -> np.ndarray:
    """Frames [F, H, W, 3] of a segment that the nano avatar makes from the picture of a scene."""
    engine, encoder = load_avatar(None, torch.device("cpu"))
    asked = request_of(scene, seed, 1, STEPS, image=True)
    return speak(engine, encoder, engine.defaults, asked, scene, lambda step: None).frames


def write_picture(path: Path, graph: Graph, seed: int) -> None:
    """Generate what the picture of a workflow shows, a segment for each prompt, and write it."""
    scene = TALKING.get(graph.shown[0])
    if scene is None:
        pipeline, video = Pipeline.load(), None
        for prompt in graph.shown:
            given = None if video is None else video[-13:]
            more = pipeline.generate(GenerateRequest(prompt, seed=seed, given=given)).frames
            video = more if video is None else np.concatenate((video, more[13:]))
        assert video is not None
    else:
        video = spoken(scene, seed)
    real = " real " in graph.name
    origin = "picture made with the nano test model" if real else "runs on any computer"
    picture(video, graph.label, origin).save(path, quality=88)
