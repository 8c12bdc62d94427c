"""Loading the text encoder and the transformer at once gives what loading them one by one gives, and fails alike."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longcat_core.checkpoints import load as transformers
from longcat_core.checkpoints import reader
from longcat_core.checkpoints.formats import COMFYUI
from longcat_core.checkpoints.load import load_transformer, official_state
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.generate import loading, pipeline, text_cache
from longcat_core.generate.loading import load_both
from longcat_core.generate.paths import NANO_TEXT_ENCODER, ModelPaths
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.placement import Placement
from longcat_core.generate.progress import ENCODING, LOADING, LOADING_TEXT
from longcat_core.optimize.plan import Plan
from longcat_core.optimize.quantization import Policy
from longcat_core.optimize.streaming import Offloaded

from ..support.pretend_cuda import pretended

CPU = torch.device("cpu")
PROMPTS = ["a red circle moves right", "blur"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(loading, "overlaps", lambda device: True)
    monkeypatch.setattr(pipeline, "overlaps", lambda device: True)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    width, file = Pipeline.load().model.config.hidden_size, tmp_path_factory.mktemp("lora") / "lora.safetensors"
    generator = torch.Generator().manual_seed(1)
    name = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj"
    up, down = (torch.randn(shape, generator=generator) for shape in ((width, 2), (2, width)))
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, file)
    return file


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> ModelPaths:
    """The nano model with its transformer in ComfyUI's names and bf16."""
    file = tmp_path_factory.mktemp("half") / "dit.safetensors"
    state = official_state(load_transformer(ModelPaths().model, dtype=torch.bfloat16), COMFYUI)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, file)
    return ModelPaths(file, ModelPaths().vae, NANO_TEXT_ENCODER)


def weights(loaded: Pipeline) -> dict[str, Tensor]:
    return dict(loaded.model.state_dict())


@pytest.mark.parametrize(
    "options",
    [{}, {"fp8": True}, {"lora": True}, {"lora": True, "lora_mode": "runtime"}, {"least": Plan(streamed=2)},
     {"dtype": "bfloat16", "fp8": True, "least": Plan(streamed=2, stream_text_encoder=True)}],
    ids=str,
)  # fmt: skip
def test_at_once_is_one_after_the_other_bit_for_bit(monkeypatch, half, lora, options):
    options = options | ({"lora": lora} if "lora" in options else {})
    one = Pipeline.load(half, **options)
    monkeypatch.setattr(pipeline, "overlaps", lambda device: True)
    other = Pipeline.load(half, prompts=PROMPTS, **options)
    wanted, found = weights(one), weights(other)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for prompt in PROMPTS:
        assert torch.equal(other.text_encoder.encode([prompt])[0], one.text_encoder.encode([prompt])[0])


def test_the_transformer_is_read_while_the_text_encoder_works(monkeypatch, at_once):
    """Neither could end alone: each waits for the other's beginning."""
    reading, encoding = threading.Event(), threading.Event()
    loads, encodes = load_transformer, text_cache.TextEncoder.encode_each

    def load(*args, **kwargs):
        reading.set()
        assert encoding.wait(60) and threading.current_thread() is not threading.main_thread()
        return loads(*args, **kwargs)

    def encode(self, batches, *more, **options):
        encoding.set()
        assert reading.wait(60) and threading.current_thread() is threading.main_thread()
        return encodes(self, batches, *more, **options)

    monkeypatch.setattr(pipeline, "load_transformer", load)
    monkeypatch.setattr(text_cache.TextEncoder, "encode_each", encode)
    Pipeline.load(prompts=PROMPTS)


@pytest.mark.parametrize("overlapped", [False, True])
def test_stages_come_in_order_with_their_bytes(monkeypatch, overlapped):
    monkeypatch.setattr(pipeline, "overlaps", lambda device: overlapped)
    seen: list[tuple[str, int, int]] = []

    def on_load(*seen_now) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append(seen_now)

    Pipeline.load(prompts=PROMPTS, on_load=on_load)
    assert list(dict.fromkeys(stage for stage, *_ in seen)) == [LOADING_TEXT, ENCODING, LOADING]
    for stage, file in ((LOADING_TEXT, NANO_TEXT_ENCODER), (LOADING, ModelPaths().model)):
        counts = [(done, of) for name, done, of in seen if name == stage]
        assert counts == sorted(counts) and counts[-1][0] == counts[-1][1]
        # Of the text encoder's file, the vocabulary is not among the weights.
        assert 0.5 * file.stat().st_size < counts[-1][1] <= file.stat().st_size


def test_prompts_are_encoded_once_and_as_later(monkeypatch):
    plain = Pipeline.load().text_encoder
    loaded = Pipeline.load(prompts=PROMPTS)
    wanted = [plain.encode([prompt]) for prompt in PROMPTS]
    monkeypatch.setattr(text_cache.TextEncoder, "encode_each", lambda *_, **__: pytest.fail("it was encoded before"))
    for prompt, pair in zip(PROMPTS, wanted, strict=True):
        for one, other in zip(loaded.text_encoder.encode([prompt]), pair, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_more_prompts_than_memory_is_meant_for_are_encoded_later(monkeypatch):
    monkeypatch.setattr(pipeline, "PREPARED", 1)
    assert not Pipeline.load(prompts=PROMPTS).text_encoder._prepared


def test_an_encoder_that_goes_comes_back_for_another_prompt():
    encoder = Pipeline.load(prompts=PROMPTS).text_encoder
    wanted = encoder.encode(["another"])
    encoder.release()
    assert encoder._loaded is None and encoder.missing([*PROMPTS, "another"]) == ["another"]
    assert torch.equal(encoder.encode(["another"])[0], wanted[0])


@pytest.mark.parametrize("prompts", [PROMPTS, []])
def test_without_room_beside_the_network_the_encoder_comes_before_or_streams(monkeypatch, prompts):
    """Known prompts: it has the GPU to itself, and has gone when the network is loaded."""
    order: list[str] = []
    loads, loads_text = load_transformer, text_cache.load_text_encoder

    def load(*args, **kwargs):
        order.append("network")
        return loads(*args, **kwargs)

    def load_text(*args, device, streams, **kwargs):
        order.append(f"text {'through' if streams else 'on'} {device}")
        return loads_text(*args, device=device, streams=streams, **kwargs)

    monkeypatch.setattr(pipeline, "load_transformer", load)
    monkeypatch.setattr(text_cache, "load_text_encoder", load_text)
    monkeypatch.setattr(Placement, "plan", lambda *_: (Plan(stream_text_encoder=True), ""))
    monkeypatch.setattr(Placement, "has_room_before", lambda *_: True)
    wanted = Pipeline.load().text_encoder.encode(["another"])[0]
    order.clear()
    with pretended() as gpu:
        encoder = Pipeline.load(device="cuda", prompts=prompts).text_encoder
        assert order == (["text on cuda", "network"] if prompts else ["text through cuda", "network"])
        assert (encoder._loaded is None) == bool(prompts)
        assert torch.equal(encoder.encode(["another"])[0].cpu(), wanted)
        assert order[2:] == (["text through cuda"] if prompts else []) and not gpu.errors


@pytest.mark.parametrize("fp8", [None, Policy()])
def test_blocks_that_wait_go_from_the_gpu_to_their_memory(monkeypatch, fp8):
    """Each as soon as it is read, so that no other copy of it is made in CPU memory."""
    offloaded: list[Offloaded] = []

    class Noted(Offloaded):
        def __init__(self, block, *more) -> None:
            assert all(parameter.is_cuda for parameter in block.parameters())
            super().__init__(block, *more)
            offloaded.append(self)

    monkeypatch.setattr(transformers, "Offloaded", Noted)
    model = ModelPaths().model
    wanted = load_transformer(model, dtype=torch.bfloat16, fp8=fp8).state_dict()
    with pretended() as gpu:
        loaded = load_transformer(model, dtype=torch.bfloat16, device="cuda", fp8=fp8, streamed=[1, 3])
        found = loaded.state_dict()
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(found[name].cpu(), tensor), name
            assert found[name].is_cuda != name.startswith(("blocks.1.", "blocks.3.")), name
        for i, made in zip((1, 3), offloaded, strict=True):
            assert loaded.stream.offloaded(i).buffer is made.buffer
        assert not gpu.errors
        # Their memory is unpinned by this GPU.
        del loaded, found, made, offloaded[:]


# --- errors ----------------------------------------------------------------------------------------------------------


def damaged(file: Path, target: Path, name: str) -> Path:
    state = load_file(file)
    name = next(each for each in state if each.endswith(name))
    state[name] = torch.full_like(state[name], torch.nan)
    save_file(state, target)
    return target


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize(
    ("part", "name"), [("text_encoder", "layer.0.SelfAttention.q.weight"), ("model", "blocks.0.attn.proj.weight")]
)
def test_a_damaged_file_has_its_own_sentence(tmp_path, monkeypatch, overlapped, part, name):
    monkeypatch.setattr(pipeline, "overlaps", lambda device: overlapped)
    whole = ModelPaths()
    file = damaged(getattr(whole, part), tmp_path / "damaged.safetensors", name)
    files = {each: getattr(whole, each) for each in ("model", "vae", "text_encoder")} | {part: file}
    with pytest.raises(CheckpointError, match=rf"damaged\.safetensors has NaN or infinite values in .*{name}"):
        Pipeline.load(ModelPaths(*files.values()), prompts=PROMPTS)


def test_an_error_of_the_transformer_ends_the_text_encoder_at_once(at_once):
    """It would go on for ever otherwise."""
    failed = threading.Event()

    def text(check):
        assert failed.wait(60)
        while True:
            check()

    def transformer(watch):
        failed.set()
        raise CheckpointError("the transformer is broken")

    with pytest.raises(CheckpointError, match="the transformer is broken"):
        load_both(text, transformer, lambda *_: None, CPU, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, LongCatError("the text encoder is broken")])
@pytest.mark.parametrize("where", ["text", "waiting"])
def test_an_error_or_ctrl_c_here_ends_the_transformer(error, where):
    begun, ended = threading.Event(), []

    def text(check):
        assert begun.wait(60)
        if where == "text":
            raise error

    def on_load(*seen):
        raise error

    def transformer(watch):
        try:
            while True:
                watch(0, 1)
                begun.set()
        finally:
            ended.append(True)

    with pytest.raises(type(error) if isinstance(error, LongCatError) else error):
        load_both(text, transformer, on_load, CPU, True)
    assert ended


def test_on_load_may_end_a_load_in_the_middle_of_a_file(monkeypatch, half):
    """Files of many pieces: after the first one nothing more is taken."""
    monkeypatch.setattr(reader, "PIECE", 1 << 10)
    taken = []

    def watch(done: int, of: int) -> None:
        taken.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transformers.load_transformer(half.model, watch=watch)
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompts": "a red circle"}, "prompts cannot be of type str; give a list of texts"),
        ({"prompts": [5]}, "the prompt is a int; give text"),
        ({"on_load": 5}, "what takes the progress of loading cannot be of type int; give a function"),
    ],
)
def test_arguments_are_checked_first(monkeypatch, options, said):
    monkeypatch.setattr(pipeline, "open_model", None)
    with pytest.raises(LongCatError, match=said):
        Pipeline.load(**options)
