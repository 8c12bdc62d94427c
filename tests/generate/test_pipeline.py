"""The chain from request to frames: golden generations, seeds, and checkpoints that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longcat_core.cli import main as cli
from longcat_core.errors import LongCatError
from longcat_core.generate import engine as engine_module
from longcat_core.generate import pipeline as pipeline_module
from longcat_core.generate.pipeline import ModelPaths, Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.model.kv_cache import KV_MODES, KVMode

from ..support.tiny import GOLDEN, PromptText, golden_pipeline

SIZE = {"height": 64, "width": 96, "frames": 17}


class GoldenText:
    """Gives the golden embeddings: those of the prompt for any prompt but "negative"."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        self.golden = golden
        self.asked: list[str] = []

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        (prompt,) = prompts
        self.asked.append(prompt)
        half = "neg" if prompt == "negative" else "pos"
        return self.golden[f"{half}.embeds"], self.golden[f"{half}.mask"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "generate.safetensors")


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return golden_pipeline(None)


@pytest.fixture
def tiny(loaded: Pipeline, golden: dict[str, Tensor]) -> Pipeline:
    loaded.text_encoder = GoldenText(golden)
    return loaded


@pytest.fixture
def golden_noise(golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(shape: tuple[int, ...], seed: int) -> Tensor:
        assert shape == tuple(golden["noise"].shape) and seed == 0
        return golden["noise"]

    monkeypatch.setattr(engine_module, "seeded_noise", noise)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and got.dtype == torch.float32
    assert ((got - wanted).abs().max() / wanted.std()).item() < 2e-5


def request(**changes: object) -> GenerateRequest:
    return GenerateRequest("x", "negative", steps=6, **{**SIZE, **changes})


@pytest.mark.usefixtures("golden_noise")
class TestGolden:
    def test_text_to_video(self, tiny: Pipeline, golden: dict[str, Tensor]) -> None:
        result = tiny.generate(request())
        assert_near(result.latents, golden["t2v.latents"])
        assert result.frames.shape == (17, 64, 96, 3) and result.frames.dtype == np.uint8
        wanted = (golden["t2v.video"][0] * 255).numpy()
        assert np.abs(result.frames - wanted).max() <= 0.51
        assert tiny.text_encoder.asked == ["x", "negative"]
        assert (result.seed, result.fps, result.request.schedule) == (0, 15, "base")

    def test_distilled(self, tiny: Pipeline, golden: dict[str, Tensor]) -> None:
        result = tiny.generate(GenerateRequest("x", steps=4, schedule="distilled", **SIZE))
        assert_near(result.latents, golden["t2v_distill.latents"])
        assert tiny.text_encoder.asked == ["x"], "without guidance the negative prompt is not encoded"

    def test_image_to_video(self, tiny: Pipeline, golden: dict[str, Tensor]) -> None:
        # The public pipeline has no key-value cache for images.
        for cache in ("off", "exact"):
            result = tiny.generate(request(given=golden["image"][None].numpy(), kv_cache=cache))
            assert_near(result.latents[:, :, :1], golden["i2v.cond_latents"])
            assert_near(result.latents, golden["i2v.latents"])

    @pytest.mark.parametrize("cache", KV_MODES)
    @pytest.mark.parametrize("schedule", ["base", "enhance_hf"])
    def test_continuation(self, tiny: Pipeline, golden: dict[str, Tensor], cache: KVMode, schedule: str) -> None:
        clip = golden["clip"].numpy()
        longer = np.concatenate([255 - clip, clip])
        result = tiny.generate(request(given=longer, num_cond_frames=5, kv_cache=cache, schedule=schedule))
        wanted = golden[f"vc.cache{int(cache == 'official')}.hf{int(schedule == 'enhance_hf')}.latents"]
        assert_near(result.latents[:, :, :2], golden["vc.cond_latents"])
        assert_near(result.latents, wanted)


def test_a_seed_is_a_video_bit_for_bit(tiny: Pipeline) -> None:
    first, again, other = (tiny.generate(request(seed=seed, frames=5)) for seed in (3, 3, 4))
    assert torch.equal(first.latents, again.latents) and np.array_equal(first.frames, again.frames)
    assert not torch.equal(first.latents, other.latents)


def test_every_step_calls_back(tiny: Pipeline) -> None:
    seen = []
    tiny.generate(request(frames=5), lambda step: seen.append((step.index, step.total)))
    assert seen == [(i, 6) for i in range(6)]


def test_a_callback_can_stop(tiny: Pipeline) -> None:
    def stop(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(request(frames=5), stop)


def test_pictures_are_fitted_to_the_size(tiny: Pipeline) -> None:
    picture = np.zeros((1, 50, 50, 3), np.uint8)
    assert tiny.generate(request(given=picture, frames=5, width=32)).frames.shape == (5, 64, 32, 3)


def test_frames_are_handed_over_as_they_leave_the_decoder(tiny: Pipeline) -> None:
    parts: list[np.ndarray] = []
    made = tiny.generate(request(frames=9), on_frames=parts.append)
    assert [len(part) for part in parts] == [1, 8] and np.array_equal(np.concatenate(parts), made.frames)
    with pytest.raises(LongCatError, match="what takes the frames cannot be of type str; give a function"):
        tiny.generate(request(frames=9), on_frames="print")
    clip = np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), np.uint8)
    filled, begun = request(frames=9, given=clip, num_cond_frames=5).filled(tiny.defaults), []
    assert filled.cond_frames == 5
    put = filled.beginning(begun.append)
    for start, stop in ((0, 1), (1, 3), (3, 7), (7, 9)):
        put(made.frames[start:stop])
    assert np.array_equal(np.concatenate(begun), filled.begun(made.frames))
    assert np.array_equal(begun[0], clip) and request(frames=9).filled(tiny.defaults).beginning(put) is put


def test_a_prompt_that_is_cut_gives_a_warning(tiny: Pipeline, golden: dict[str, Tensor]) -> None:
    full = {**golden, "pos.mask": torch.ones_like(golden["pos.mask"])}
    tiny.text_encoder = GoldenText(full)
    with pytest.warns(UserWarning, match="the prompt is longer than 16 tokens; the rest is ignored") as caught:
        tiny.generate(request(frames=5))
    assert len(caught) == 1 and caught[0].filename.endswith("pipeline.py")


def test_overflow_is_an_error_not_a_black_video(tiny: Pipeline, golden: dict[str, Tensor]) -> None:
    broken = {**golden, "pos.embeds": torch.full_like(golden["pos.embeds"], float("nan"))}
    tiny.text_encoder = GoldenText(broken)
    with pytest.raises(LongCatError, match=r"not finite.*--dtype"):
        tiny.generate(request(frames=5))


@pytest.mark.parametrize("part", ["the transformer", "the VAE"])
def test_an_overflow_in_the_network_or_the_vae_is_an_error(part: str) -> None:
    engine = golden_pipeline(PromptText())
    network = engine.model.network if part == "the transformer" else engine.vae.model.decoder
    with torch.no_grad():
        list(network.parameters())[-1].fill_(torch.nan)
    with pytest.raises(LongCatError, match=f"the result of {part} is not finite"):
        engine.generate(request(frames=5))


# --- checkpoints that do not fit, from the command line --------------------------------------------------------------


def _umt5(path: Path) -> Path:
    save_file({"shared.weight": torch.zeros(8, 8), "encoder.block.0.layer.0.layer_norm.weight": torch.ones(8)}, path)
    return path


def _foreign(path: Path, *names: str) -> Path:
    save_file({name: torch.zeros(8, 8) for name in names}, path)
    return path


def _cut(path: Path, size: int) -> Path:
    path.write_bytes((GOLDEN / "dit.safetensors").read_bytes()[:size])
    return path


def _changed(path: Path, change: str) -> Path:
    state = load_file(GOLDEN / "dit.safetensors")
    name = "blocks.1.attn.proj.weight"
    if change == "missing":
        del state[name]
    elif change == "shape":
        state[name] = state[name][:, :-8].contiguous()
    else:
        state["blocks.1.attn.extra.weight"] = torch.zeros(3)
    save_file(state, path)
    return path


WAN = ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight")
LONGCAT_IMAGE = (
    "x_embedder.weight",
    "transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.0.attn.to_q.weight",
)


def _pickle(path: Path) -> Path:
    torch.save({"a": torch.zeros(3)}, path)
    return path


def _text(path: Path) -> Path:
    path.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    return path


BAD_MODELS = {
    "empty": (lambda p: _cut(p, 0), ("model.safetensors",)),
    "header cut": (lambda p: _cut(p, 500), ("model.safetensors",)),
    "data cut": (lambda p: _cut(p, 50_000), ("model.safetensors",)),
    "text": (_text, ("model.safetensors",)),
    "pickle": (_pickle, ("model.safetensors",)),
    "Wan": (lambda p: _foreign(p, *WAN), ("Wan", "LongCat-Video")),
    "LongCat-Image": (lambda p: _foreign(p, *LONGCAT_IMAGE), ("LongCat-Image", "LongCat-Video")),
    "nobody's": (lambda p: _foreign(p, "weight"), ("weight", "LongCat-Video")),
    "VAE": (lambda p: Path(os.path.relpath(GOLDEN / "vae.safetensors")), ("VAE", "LongCat-Video")),
    "text encoder": (_umt5, ("UMT5", "LongCat-Video")),
    "missing tensor": (lambda p: _changed(p, "missing"), ("blocks.1.attn.proj.weight",)),
    "extra tensor": (lambda p: _changed(p, "extra"), ("blocks.1.attn.extra.weight",)),
    "wrong shape": (lambda p: _changed(p, "shape"), ("blocks.1.attn.proj.weight", "[64, 56]", "[64, 64]")),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # What is asked of the text encoder needs no real one: only the model is bad here.
    monkeypatch.setattr(pipeline_module, "CachedTextEncoder", lambda *_: _Channels())
    make, said = BAD_MODELS[case]
    model = make(Path("model.safetensors"))
    before = sorted(os.listdir())
    arguments = ["--model", str(model), "--vae", str(GOLDEN / "vae.safetensors"), "--text-encoder", str(model)]
    arguments.append("--no-text-cache")
    assert cli.main(["generate", "x", "--size", "64x96", "--frames", "5", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("longcat: error: ") and err.count("\n") == 1
    for words in said:
        assert words in err
    assert sorted(os.listdir()) == before


class _Channels:
    channels, nbytes = 48, 0

    def missing(self, prompts: Sequence[str]) -> Sequence[str]:
        return ()

    def prepare(self, prompts: Sequence[str], check: Callable[[], None], watch: Callable[[int, int], None]) -> None:
        pass

    def release(self) -> None:
        pass


@pytest.mark.parametrize("option", ["--vae", "--text-encoder"])
def test_bad_vae_and_text_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dit, vae = str(GOLDEN / "dit.safetensors"), str(GOLDEN / "vae.safetensors")
    parts = {"--model": dit, "--vae": vae, "--text-encoder": dit} | {option: dit}
    assert cli.main(["generate", "x", *(word for pair in parts.items() for word in pair)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("longcat: error: ") and err.count("\n") == 1 and "dit.safetensors" in err


def test_text_encoder_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _Channels()
    other.channels = 64
    monkeypatch.setattr(pipeline_module, "CachedTextEncoder", lambda *_: other)
    paths = ModelPaths(GOLDEN / "dit.safetensors", GOLDEN / "vae.safetensors", GOLDEN)
    with pytest.raises(LongCatError, match="64 channels but the model takes 48"):
        Pipeline.load(paths)


def test_golden_config_is_the_one_assumed_here() -> None:
    assert json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))["caption_channels"] == _Channels.channels
