"""What a user's type checker makes of docs/python.md; `make lint` checks this file strictly and nothing runs it.

A name of the interface that loses its annotation fails here, because `assert_type` does not accept Any.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import torch

import longcat_core as longcat


def load() -> longcat.Pipeline:
    paths = longcat.ModelPaths.of("LongCat-Video")
    assert_type(paths, longcat.ModelPaths)
    optimizations = longcat.Optimizations(attention="sdpa")
    request = longcat.GenerateRequest("a red circle", frames=17, steps=4, seed=1, image=Path("first.png"))
    work = longcat.work_of(request.filled(longcat.Pipeline.load().defaults))
    assert_type(work, longcat.Work)
    loras = [("style.safetensors", 0.8)]
    pipeline = longcat.Pipeline.load(
        paths, dtype="bfloat16", device="cuda", optimizations=optimizations, lora=loras, lora_mode="runtime", work=work
    )
    longcat.Pipeline.load(prompts=[request.prompt], text_cache=Path("kept"), on_load=lambda stage, done, of: None)
    assert_type(pipeline, longcat.Pipeline)
    assert_type(pipeline.plan, longcat.Plan)
    pipeline.set_loras(loras)
    return pipeline


def generate(pipeline: longcat.Pipeline, request: longcat.GenerateRequest) -> None:
    def watch(step: longcat.Step) -> None:
        assert_type(step.index, int)
        assert_type(step.latents, torch.Tensor)
        raise longcat.Interrupted

    result = pipeline.generate(request, watch)
    assert_type(result, longcat.Generation)
    assert_type(result.frames, np.ndarray)
    assert_type(result.latents, torch.Tensor)
    assert_type(result.request, longcat.GenerateRequest)
    longcat.write_video("circle.mp4", result.frames, result.fps)
    frames, fps = longcat.read_video("circle.mp4")
    assert_type(frames, np.ndarray)
    assert_type(fps, float)
    assert_type(longcat.read_image("first.png"), np.ndarray)


def hear(path: Path) -> longcat.Embeddings:
    sound = longcat.read_sound("speech.wav")
    assert_type(sound, longcat.Sound)
    assert_type(sound.cut(3.5).samples, torch.Tensor)
    voices = longcat.combine([sound, None], "add")
    assert_type(voices, longcat.Voices)
    assert_type(voices.track, longcat.Sound)
    encoder = longcat.load_audio_encoder(path, device="cuda")
    assert_type(encoder, longcat.AudioEncoder)
    embeddings = longcat.Embeddings(encoder.embed(voices.speakers[0])[None], encoder.fps, encoder.stride)
    assert_type(embeddings.windows(0, 93), torch.Tensor)
    return embeddings


def sparse() -> longcat.Sparse:
    densities = longcat.Densities(ends=(0.5, 1.0), values=(((0.1, 0.2),), ((0.3, 0.4),)))
    assert_type(densities.at(0.2), tuple[tuple[float, ...], ...])
    calibrated = longcat.read_calibration("mine.json").sparse()
    assert_type(calibrated, longcat.Sparse)
    return longcat.Sparse(0.15, densities=densities, dense_steps=0.2)


def go_on(pipeline: longcat.Pipeline, request: longcat.GenerateRequest, video: np.ndarray) -> None:
    prompts = longcat.spread_prompts([request.prompt], segments=2)
    assert_type(prompts, tuple[str, ...])
    long_request = longcat.LongVideoRequest(request, prompts, overlap=5).filled(pipeline.defaults)
    assert_type(long_request, longcat.LongVideoRequest)
    folder = longcat.segment_folder("segments")
    finished = list(longcat.long_video(lambda: pipeline, long_request, folder))
    longcat.write_video("long.mp4", longcat.new_frames(folder, finished), request.fps)

    refining = longcat.RefineRequest(doubled=False, height=96, width=144, block_sparse=longcat.BlockSparse())
    assert_type(longcat.refine(pipeline, video, refining), Iterator[np.ndarray])
    pieces = longcat.piece_folder("pieces")
    for number, skip, reused in longcat.refine_in_folder(
        lambda: pipeline, pipeline.defaults, video, refining, pieces, {}
    ):
        assert_type((number, skip, reused), tuple[int, int, bool])


def speak(request: longcat.GenerateRequest, voices: longcat.Voices, encoder: longcat.AudioEncoder) -> None:
    paths = longcat.ModelPaths.of_avatar("LongCat-Video-Avatar-1.5", base="LongCat-Video")
    assert_type(paths, longcat.ModelPaths)
    pipeline = longcat.Pipeline.load(paths, lora="dmd_lora.safetensors")
    boxes = ((0.1, 0.05, 0.9, 0.45), (0.1, 0.55, 0.9, 0.95))
    spoken = longcat.AvatarRequest(request, voices, (request.prompt,), boxes).filled(pipeline.defaults)
    assert_type(spoken, longcat.AvatarRequest)
    assert_type(spoken.track, longcat.Sound)
    folder = longcat.segment_folder("spoken")
    finished = list(longcat.avatar_video(lambda: pipeline, lambda: spoken.embed(encoder), spoken, folder))
    clips = longcat.spoken_frames(folder, finished, spoken)
    assert_type(clips, Iterator[np.ndarray])
    longcat.write_video("spoken.mp4", clips, spoken.fps, spoken.track)


def own_latents(pipeline: longcat.Pipeline, pixels: torch.Tensor) -> np.ndarray:
    schedule = longcat.make_schedule("base", 4)
    assert_type(schedule, longcat.Schedule)
    clean = pipeline.encode(pixels)
    assert_type(clean, torch.Tensor)
    latents = pipeline.denoise(torch.randn_like(clean), schedule, "a red circle", guidance_scale=4.0, clean=clean)
    assert_type(latents, torch.Tensor)
    return pipeline.decode(latents)


def errors() -> tuple[type[longcat.LongCatError], ...]:
    assert_type(longcat.__version__, str)
    return longcat.CheckpointError, longcat.BackendUnavailable
