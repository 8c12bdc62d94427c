"""Refining: what is made of the frames, in what pieces, from what noise, and that the scene stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from longcat_core.checkpoints.load import load_transformer
from longcat_core.checkpoints.lora import merge_lora
from longcat_core.errors import LongCatError
from longcat_core.generate import pipeline as pipelines
from longcat_core.generate.paths import NANO_MODEL
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.refine import Padding, RefineRequest, enlarge, pieces, refine, target_size
from longcat_core.generate.request import GenerateRequest
from longcat_core.nano.scorer import score
from longcat_core.nano.world import Actor, Scene, caption
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.kernels.elementwise import quantize_rows
from longcat_core.sampling.conditioning import latent_frames
from longcat_core.sampling.sampler import Interrupted

from ..support.tiny import PromptText, golden_pipeline

SCENE = Scene("black", (Actor("square", "green", "up"),))


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return golden_pipeline(PromptText())


def clip(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    bright = [(rows * 3 + columns * 2 + 9 * i) % 256 for i in range(frames)]
    return np.stack([np.stack([b, 255 - b, b // 2], -1) for b in bright]).astype(np.uint8)


def run(pipeline: Pipeline, video: np.ndarray, **changes) -> list[np.ndarray]:
    # The base schedule of 12 steps has one below 500: two evaluations.
    return list(refine(pipeline, video, RefineRequest(**{"steps": 12, "height": 32, "width": 48} | changes)))


@pytest.mark.parametrize(
    ("frames", "given", "latents", "given_latents"),
    [
        # 93 frames doubled, alone and after 13 doubled ones; 93 of one rate: figures of the public pipeline.
        (186, 0, 48, 0),
        (186, 26, 48, 8),
        (93, 0, 24, 0),
        (93, 13, 24, 4),
        (1, 0, 4, 0),
        (20, 13, 8, 4),
    ],
)
def test_latent_frames_come_in_fours(frames, given, latents, given_latents):
    padding = Padding.of(frames, given)
    assert latent_frames(padding.total) == latents and padding.given_latents == given_latents
    video = torch.arange(frames, dtype=torch.float32).view(1, 1, frames, 1, 1).expand(1, 3, -1, 2, 2)
    padded = padding.pad(video)
    assert padded.shape[2] == padding.total
    assert torch.equal(padded[:, :, padding.front : padding.front + frames], video)
    assert (padded[:, :, : padding.front] == 0).all() and (padded[:, :, padding.front + frames :] == frames - 1).all()


@pytest.mark.parametrize("frames", range(1, 60))
@pytest.mark.parametrize("given", [0, 1, 13, 26])
def test_any_number_of_frames_fits(frames, given):
    if frames <= given:
        return
    padding = Padding.of(frames, given)
    assert latent_frames(padding.total) % 4 == 0 and padding.given_latents % 4 == 0
    assert latent_frames(padding.total) > padding.given_latents
    assert padding.back < 16 and padding.front < 16


@pytest.mark.parametrize("count", [5, 10])
def test_frames_are_enlarged_as_interpolation_does_it(count):
    frames = clip(5, 8, 12)
    wanted = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = F.interpolate(wanted, size=(16, 20), mode="bilinear", align_corners=True).permute(1, 0, 2, 3)[None]
    wanted = F.interpolate(wanted, size=(count, 16, 20), mode="trilinear", align_corners=True)
    assert (enlarge(frames, 16, 20, count) - wanted).abs().max() < 1e-5
    assert enlarge(frames[:1], 16, 20, 2).shape == (1, 3, 2, 16, 20)


def test_pieces():
    assert pieces(253, 93, 13) == [(0, 93), (80, 173), (160, 253)]
    assert pieces(100, 93, 13) == [(0, 93), (80, 100)] and pieces(10, 93, 13) == [(0, 10)]


def test_sizes():
    assert target_size(480, 832, True) == (704, 1280) and target_size(64, 96, False) == (128, 192)


@pytest.mark.parametrize("doubled", [False, True])
def test_every_frame_once(tiny, doubled, monkeypatch):
    """Pieces of 9 frames with 5 in common; the later ones are given the refined frames of the one before."""
    known, starts = [], []
    sample = pipelines.sample

    def spy(model, noise, *args, **kwargs):
        known.append(kwargs["cond_latents"])
        starts.append(noise)
        return sample(model, noise, *args, **kwargs)

    monkeypatch.setattr(pipelines, "sample", spy)
    video = clip(17)
    parts = run(tiny, video, doubled=doubled, piece=9, overlap=5)
    factor = 2 if doubled else 1
    assert [len(part) for part in parts] == [9 * factor, 4 * factor, 4 * factor]
    assert all(part.shape[1:] == (32, 48, 3) and part.dtype == np.uint8 for part in parts)
    assert known[0] is None and all(latents.shape[2] % 4 == 0 for latents in (*known[1:], *starts))
    given = 5 * factor
    last = torch.from_numpy(parts[0][-given:].copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    front = Padding.of(9 * factor, given).front
    assert torch.equal(known[1], tiny.vae.encode(torch.cat([last[:, :, :1].expand(-1, -1, front, -1, -1), last], 2)))
    # Half of the start is the video, half of it noise.
    clean = tiny.vae.encode(Padding.of(9 * factor).pad(enlarge(video[:9], 32, 48, 9 * factor)))
    rest = 2 * starts[0] - clean
    assert abs(rest.mean()) < 0.05 and rest.std() == pytest.approx(1, abs=0.05)


def test_a_seed_is_a_video_bit_for_bit(tiny):
    one, same, other = (np.concatenate(run(tiny, clip(9), seed=seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_steps_are_reported_and_may_stop(tiny):
    seen = []

    def callback(piece, of, step):
        seen.append((piece, of, step.index, step.total, step.timestep))
        if piece == 1:
            raise Interrupted

    request = RefineRequest(steps=12, height=32, width=48, piece=9, overlap=5, doubled=False)
    with pytest.raises(Interrupted):
        list(refine(tiny, clip(13), request, callback))
    assert seen[0] == (0, 2, 0, 2, 500.0) and seen[-1][:3] == (1, 2, 0) and len(seen) == 3


def test_the_scene_stays_on_nano():
    pipeline = Pipeline.load()
    video = pipeline.generate(GenerateRequest(caption(SCENE), seed=1, steps=20)).frames
    assert all(score(video, SCENE).values())
    out = np.concatenate(list(refine(pipeline, video, RefineRequest(caption(SCENE)))))
    assert out.shape == (66, 128, 192, 3)
    assert all(score(out[::2, ::2, ::2], SCENE).values())
    plain = enlarge(video, 128, 192, 66)[0].permute(1, 2, 3, 0).numpy() * 127.5 + 127.5
    mse = float(((out.astype(np.float32) - plain) ** 2).mean())
    assert 25 < 10 * np.log10(255**2 / mse) < 45, "near the enlarged video, and not the same"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"height": 33, "width": 48}, "height 33 is not a multiple of 16"),
        ({"width": None}, "give both or neither"),
        ({"piece": 5, "overlap": 5}, "leave nothing new"),
        ({"seed": -1}, "seed -1"),
        ({"steps": 0}, "0 steps"),
        ({"fps": 0.0}, "fps 0.0"),
    ],
)
def test_bad_requests(tiny, changes, said):
    with pytest.raises(LongCatError, match=said):
        run(tiny, clip(5), **changes)


def test_attention_is_block_sparse_while_refining_alone(tiny, monkeypatch):
    seen, forward = [], tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda *a, **k: seen.append(tiny.model.block_sparse) or forward(*a, **k))
    sparse = BlockSparse(0.5, chunk=(2, 2, 2))
    full, half = (np.concatenate(run(tiny, clip(9), block_sparse=s)) for s in (None, sparse))
    assert seen == [None] * 2 + [sparse] * 2 and tiny.model.block_sparse is None
    assert not np.array_equal(full, half)


def test_bad_frames(tiny):
    for video in (clip(5).astype(np.float32), clip(5)[..., :1], clip(5)[:0]):
        with pytest.raises(LongCatError, match="give uint8 frames"):
            run(tiny, video)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_lora_is_merged_before_anything_is_quantized(tmp_path, fp8):
    name = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj"
    rows = load_transformer(NANO_MODEL).blocks[0].attn.proj.weight.shape[0]
    lora = {f"{name}.lora_down.weight": torch.ones(2, rows) * 0.1, f"{name}.lora_up.weight": torch.ones(rows, 2) * 0.1}
    save_file({**lora, f"{name}.alpha_scale": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    wanted = load_transformer(NANO_MODEL)
    merge_lora(wanted, tmp_path / "lora.safetensors")
    layer = Pipeline.load(lora=tmp_path / "lora.safetensors", fp8=fp8).model.blocks[0].attn.proj
    weight = wanted.blocks[0].attn.proj.weight
    if fp8:
        values, scales = quantize_rows(weight)
        assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(layer.weight_scale, scales)
    else:
        assert torch.equal(layer.weight, weight)
