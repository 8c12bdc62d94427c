"""The avatar network: who sees and hears whom, and that every way of running it computes the same.

What it computes is compared with the public code in tests/measure/test_verify_avatar.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longcat_core.checkpoints.load import load_transformer
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.model.attention import Groups
from longcat_core.model.audio_block import AudioAttention, AudioBlock
from longcat_core.model.block import Block, run_block
from longcat_core.model.config import AudioConfig, ModelConfig
from longcat_core.model.kv_cache import Reference
from longcat_core.model.text import TextTokens
from longcat_core.model.transformer import LongCatTransformer, ReferenceLayout
from longcat_core.optimize.block_sparse import BlockSparse
from longcat_core.optimize.compilation import Regional
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Fp8Linear, Policy
from longcat_core.optimize.streaming import BlockStream
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.avatar import class_tokens

GOLDEN = Path(__file__).parents[1] / "data" / "golden-avatar" / "v1_5"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
SWITCHES = Optimizations(attention="sdpa")
REFERENCE = Reference(4, 1)
BOTH = slice(0, 2)


def loaded(**options: Any) -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors", config=CONFIG, **options)


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "forward.safetensors")


@pytest.fixture
def model() -> OptimizedTransformer:
    return loaded(optimizations=SWITCHES)


def heard(model: OptimizedTransformer, data: dict[str, Tensor], people: int = 0, rows: slice = BOTH) -> TextTokens:
    """The texts of these samples with their audio, or that of several people in one video."""
    windows, classes = data["audio"][rows], None
    if people:
        windows, classes = data["multi.audio"][:people], class_tokens(data["duo.masks"], 4, 6)
    text = model.embed_text(data["context"][rows], data["mask"][rows])
    return replace(text, audio=model.embed_audio(windows, classes))


@torch.no_grad()
def step(model: OptimizedTransformer, data: dict[str, Tensor], text: TextTokens, cached: bool = True) -> Tensor:
    """A continuation behind a reference and two conditioning frames, with as many videos as texts."""
    x, t = (data[name][: len(text.tokens)] for name in ("x", "avc.t"))
    if not cached:
        return model(x, t, text, num_cond_latents=3, reference=REFERENCE)[:, :, 3:]
    cache = model.fill_kv_cache(x[:1, :, :3], reference=REFERENCE)
    x = torch.cat((x[:, :, :3], data["x"][: len(x), :, 3:]), dim=2)
    return model(x[:, :, 3:], t[:, 3:], text, kv_cache=cache, reference=REFERENCE)


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.std()).item()


# Shape


@pytest.mark.parametrize(("sizes", "count"), [((5, 1280), 15_852_916_800), ((12, 768), 15_871_660_096)])
def test_released_models_have_their_number_of_weights(sizes, count):
    config = ModelConfig(audio=AudioConfig(groups=sizes[0], channels=sizes[1]))
    with torch.device("meta"):
        one, two = (LongCatTransformer(replace(config, depth=depth)) for depth in (1, 2))
    first, second = (sum(p.numel() for p in m.parameters()) for m in (one, two))
    assert first + 47 * (second - first) == count


def test_the_config_says_which_block():
    shape = {"hidden_size": 64, "depth": 1, "num_heads": 2, "ffn_hidden": 96}
    for audio, block in ((None, Block), (AudioConfig(), AudioBlock)):
        config = ModelConfig(**shape, audio=audio)
        with torch.device("meta"):
            assert type(LongCatTransformer(config).blocks[0]) is block
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "changes", [{"window": 4}, {"frames": 1}, {"tokens": 0}, {"channels": True}, {"prenorm": 1}, {"hidden": 1.5}]
)
def test_bad_audio_configs_are_named(changes):
    with pytest.raises(LongCatError, match="model config: audio"):
        AudioConfig(**changes)


# Who sees whom


def visible(groups: Groups, frames: int, cached: int = 0) -> list[set[int]]:
    """For every frame of x, the frames that it sees, counted from the first cached one."""
    found: list[set[int]] = []
    keys = range(cached + frames)
    for queries, seen in groups.reads(frames, 1, cached > 0):
        found += [set(keys[seen])] * len(range(frames)[queries])
    return found


def test_clean_frames_see_clean_frames_and_noise_sees_all():
    assert visible(Groups(), 3) == [{0, 1, 2}] * 3
    assert visible(Groups(2), 4) == [{0, 1}] * 2 + [{0, 1, 2, 3}] * 2
    assert visible(Groups(), 2, cached=2) == [{0, 1, 2, 3}] * 2


def test_the_reference_sees_itself_and_is_seen_by_noise_alone():
    everything = set(range(7))
    hides = Groups(3, 1, (1, 3))
    behind = [everything, everything - {0}, everything - {0}, everything]
    assert visible(hides, 7) == [{0}, {1, 2}, {1, 2}, *behind]
    assert visible(hides._replace(clean=0), 4, cached=3) == behind
    assert visible(Groups(3, 1), 3) == [{0}, {1, 2}, {1, 2}], "a pass that fills a cache"
    assert visible(Groups(1, 1), 2) == [{0}, {0, 1}]


@pytest.mark.parametrize(("start", "clean"), [(0, 5), (5, 0)])
@pytest.mark.parametrize(
    ("reference", "hidden"),
    [((10, 3), (3, 10)), ((10, 0), (0, 0)), ((4, 0), (0, 0)), ((7, 3), (0, 7)), ((6, 3), (0, 0)), ((20, 3), (13, 20)),
     ((21, 3), (0, 0)), ((-10, 3), (0, 0)), ((30, 3), (0, 0))],
)  # fmt: skip
def test_a_skip_range_that_sticks_out_is_dropped(reference, hidden, start, clean):
    """Of a segment of 93 frames: 4 conditioning and 20 noisy ones."""
    frames = 20 + clean
    assert ReferenceLayout(Reference(*reference)).groups(clean, start, frames) == Groups(clean, 1, hidden)


def test_a_frame_hears_its_own_audio(data):
    config = replace(CONFIG, depth=1)
    model = OptimizedTransformer(config, SWITCHES).eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    outs = []
    for change in (0.0, 1.0):
        text = heard(model, data)
        text.audio.tokens[:, 4] += change * torch.randn(text.audio.tokens.shape[-1])
        outs.append(model(data["x"][:, :, :7], data["ai2v.t"], text, num_cond_latents=1).detach())
    changed = (outs[0] - outs[1]).abs().amax((0, 1, 3, 4))
    assert changed[4] > 1e-3 and not changed[[0, 1, 2, 3, 5, 6]].any()


def test_speakers_take_turns_with_their_masks(model, data):
    """Whose mask comes first does not matter, as long as the voices come in the same order."""
    text = heard(model, data, people=2, rows=slice(0, 1))
    classes = text.audio.classes
    voices = data["multi.audio"][:2]
    outs = []
    for order in ([0, 1], [1, 0]):
        audio = model.embed_audio(voices[order], classes[:, [*order, 2]])
        outs.append(model(data["x"][:1, :, :7], data["ai2v.t"][:1], replace(text, audio=audio), num_cond_latents=1))
    assert error(outs[0], outs[1]) < 0.5, "the positions of the two differ"
    silent = model.embed_audio(torch.zeros_like(voices), classes)
    other = model(data["x"][:1, :, :7], data["ai2v.t"][:1], replace(text, audio=silent), num_cond_latents=1)
    assert error(other, outs[0]) > 1e-3


# Ways of running it


@pytest.mark.parametrize("people", [0, 2])
def test_a_cache_changes_nothing(model, data, people):
    text = heard(model, data, people, slice(0, 1))
    assert error(step(model, data, text), step(model, data, text, cached=False)) < 1e-5


def test_one_voice_serves_a_batch(model, data):
    text = heard(model, data)
    one = replace(text, audio=model.embed_audio(data["audio"][:1]))
    both = replace(text, audio=model.embed_audio(data["audio"][:1].expand(2, -1, -1, -1, -1)))
    assert error(step(model, data, one), step(model, data, both)) < 1e-5


@pytest.mark.parametrize("people", [0, 2])
def test_keys_are_computed_once_for_all_steps(model, data, people, monkeypatch):
    count, keys = [], AudioAttention.frame_keys
    monkeypatch.setattr(AudioAttention, "frame_keys", lambda self, *args: count.append(1) or keys(self, *args))
    text = heard(model, data, people, slice(0, 1))
    out = step(model, data, text)
    assert len(count) == len(model.blocks)
    assert torch.equal(step(model, data, text), out) and len(count) == len(model.blocks)
    with torch.no_grad():
        model.blocks[0].audio_attn.kv.weight.mul_(2)
    assert error(step(model, data, text), out) > 1e-4, "the weights have changed"
    model.set_optimizations(replace(SWITCHES, reuse_text=False))
    assert torch.equal(step(model, data, text), step(model, data, text))
    assert len(count) == 4 * len(model.blocks)


@pytest.mark.parametrize("people", [0, 2])
def test_one_graph_for_blocks_and_steps(model, data, people):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = loaded(optimizations=replace(SWITCHES, compile="blocks"))
    compiled.compiled_block = Regional(run_block, "the block", counter)
    said: list[str] = []
    compiled.announce = said.append
    texts = [heard(m, data, people, slice(0, 1)) for m in (model, compiled)]
    for _ in range(2):
        assert error(step(compiled, data, texts[1]), step(model, data, texts[0])) < 1e-5
    assert counter.frame_count == 1 and len(said) == 1
    assert error(step(compiled, data, texts[1], False), step(model, data, texts[0], False)) < 1e-5
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("people", [0, 2])
def test_streamed_blocks_give_the_same(model, data, people):
    other = loaded(optimizations=SWITCHES)
    other.stream_blocks("cpu", [1])
    assert isinstance(other.stream, BlockStream)
    texts = [heard(m, data, people, slice(0, 1)) for m in (model, other)]
    for _ in range(2):
        assert torch.equal(step(other, data, texts[1]), step(model, data, texts[0]))


def test_keys_of_audio_are_late_weights(model):
    """A block that waits is copied without them once a segment has its keys."""
    model.stream_blocks("cpu", [1])
    offloaded, block = model.stream._offloaded[1], model.blocks[1]
    late = block.audio_attn.kv.weight.nbytes + block.cross_attn.kv.weight.nbytes
    assert offloaded.buffer.nbytes - offloaded.always >= late


def test_a_cache_in_cpu_memory_gives_the_same(model, data):
    text = heard(model, data)
    x, t = data["x"], data["avc.t"]
    cache = model.fill_kv_cache(x[:1, :, :3], "cpu", reference=REFERENCE)
    with torch.no_grad():
        out = model(x[:, :, 3:], t[:, 3:], text, kv_cache=cache.to("cpu"), reference=REFERENCE)
    assert torch.equal(out, step(model, data, text))


@pytest.mark.parametrize("people", [0, 2])
def test_8_bit_layers(model, data, people):
    eight = loaded(optimizations=SWITCHES, fp8=Policy())
    assert isinstance(eight.blocks[0].audio_attn.q, Fp8Linear) and isinstance(
        eight.blocks[1].audio_attn.proj, Fp8Linear
    )
    assert not isinstance(eight.blocks[0].audio_attn.kv, Fp8Linear)
    outs = [step(m, data, heard(m, data, people, slice(0, 1))) for m in (eight, model)]
    assert 1e-4 < error(*outs) < 1.0
    kept = loaded(optimizations=SWITCHES, fp8=Policy(("ffn.down",)))
    assert not isinstance(kept.blocks[0].audio_attn.q, Fp8Linear)


def test_bf16_is_near_fp32(model, data):
    half = loaded(dtype=torch.bfloat16, optimizations=SWITCHES)
    assert error(step(half, data, heard(half, data)), step(model, data, heard(model, data))) < 0.2


# Bad input


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 24, 5, 5, 16), "4n\\+1 frames"), ((1, 25, 5, 12, 768), "audio encoder that belongs to it"),
     ((25, 5, 5, 16), "hears \\[speakers")],
)  # fmt: skip
def test_windows_of_another_encoder_are_named(model, shape, said):
    with pytest.raises(LongCatError, match=said):
        model.embed_audio(torch.zeros(shape))


def test_voices_and_masks_that_do_not_fit(model, data):
    classes = class_tokens(data["duo.masks"], 4, 6)
    with pytest.raises(LongCatError, match="1 voices and 3 masks"):
        model.embed_audio(data["audio"][:1], classes)
    with pytest.raises(LongCatError, match="2 voices and 2 masks"):
        model.embed_audio(data["audio"], classes[:, :2])
    with pytest.raises(LongCatError, match="mask 2 covers no token"):
        model.embed_audio(data["audio"], classes & torch.tensor([True, False, True]))
    with pytest.raises(LongCatError, match="one video at a time"):
        text = model.embed_text(data["context"], data["mask"])
        step(model, data, replace(text, audio=model.embed_audio(data["audio"], classes)))


def test_text_without_audio_and_audio_without_ears(model, data):
    with pytest.raises(LongCatError, match="LongCat-Video-Avatar needs audio"):
        step(model, data, model.embed_text(data["context"], data["mask"]))
    plain = OptimizedTransformer(replace(model.config, audio=None), SWITCHES)
    with pytest.raises(LongCatError, match="does not hear audio; load LongCat-Video-Avatar"):
        plain.embed_audio(data["audio"])
    text = replace(plain.embed_text(data["context"], data["mask"]), audio=heard(model, data).audio)
    with pytest.raises(LongCatError, match="does not hear audio; give the text alone"):
        plain(data["x"], data["t"], text)


def test_audio_that_is_too_short_or_of_other_videos(model, data):
    text = model.embed_text(data["context"], data["mask"])
    with pytest.raises(LongCatError, match=r"3 latent frames and 5 are generated"):
        step(model, data, replace(text, audio=model.embed_audio(data["audio"][:, :9])))
    with pytest.raises(LongCatError, match="audio of 3 videos for 2"):
        step(model, data, replace(text, audio=model.embed_audio(data["multi.audio"])))


def test_a_cache_belongs_to_its_reference(model, data):
    cache = model.fill_kv_cache(data["x"][:1, :, :3], reference=REFERENCE)
    for other, said in ((None, "not at None"), (Reference(5, 1), "not at 5")):
        with pytest.raises(LongCatError, match=f"reference frame at 4, {said}"):
            model(data["x"][:, :, 3:], data["t"], heard(model, data), kv_cache=cache, reference=other)


def test_block_sparse_attention_is_refused(model, data):
    model.block_sparse = BlockSparse(0.5)
    with pytest.raises(LongCatError, match="block-sparse attention does not run with audio"):
        heard(model, data)
