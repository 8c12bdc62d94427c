"""A UMT5 encoder is read in every form that people publish, and refused by the right reason in all others."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

from longcat_core.checkpoints.umt5 import dequantise, open_umt5
from longcat_core.errors import CheckpointError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.paths import NANO_TEXT_ENCODER
from longcat_core.generate.text import load_text_encoder
from longcat_core.nano.world import corpus

State = dict[str, Tensor]
PROMPTS = ["a red circle moves right on a blue background", ""]
WAN = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "encoder.block.": "blocks.",
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention.": "attn.",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
LLAMA_CPP = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "encoder.block.": "enc.blk.",
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention.": "attn_",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}
STACK = {"shared": "encoder.embed_tokens", "encoder.": ""}
TIED = {"shared": "encoder.embed_tokens"}


def renamed(state: State, table: dict[str, str]) -> State:
    def rename(name: str) -> str:
        for theirs, ours in table.items():
            name = name.replace(theirs, ours, 1)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def state() -> State:
    return read_tensors(NANO_TEXT_ENCODER)


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    return load_text_encoder(NANO_TEXT_ENCODER).encode(PROMPTS, 32)[0]


def encoded(path: Path) -> Tensor:
    """By an encoder that holds its weights; one that leaves them in the file gives the same."""
    whole, streamed = (load_text_encoder(path, streams=streams).encode(PROMPTS, 32)[0] for streams in (False, True))
    assert torch.equal(whole, streamed)
    return whole


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "text_encoder.", "encoder.", "text_encoders.umt5xxl.transformer.", "cond_stage_model.", "module."],
)
@pytest.mark.parametrize("names", [{}, WAN, LLAMA_CPP, STACK, TIED], ids=["hf", "wan", "llama.cpp", "stack", "tied"])
def test_names_and_prefixes(tmp_path, state, wanted, names, prefix):
    path = tmp_path / "te.safetensors"
    inner = {name: tensor for name, tensor in renamed(state, names).items() if name != "spiece_model"}
    vocabulary = {("text_encoders." if "umt5xxl" in prefix else "") + "spiece_model": state["spiece_model"]}
    beside = {"vae.decoder.conv1.weight": torch.zeros(1), "diffusion_model.blocks.0.x.weight": torch.zeros(1)}
    write_safetensors(
        path, {prefix + name: tensor for name, tensor in inner.items()} | vocabulary | (beside if prefix else {})
    )
    assert torch.equal(encoded(path), wanted)
    assert open_umt5(path).sizes["num_layers"] == 2


def test_settings_of_comfyuis_attention_are_not_weights(tmp_path, state, wanted):
    setting = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)
    layer = "encoder.block.0.layer.0.SelfAttention"
    write_safetensors(tmp_path / "te.safetensors", state | {f"{layer}.comfy_attention.config": setting})
    assert torch.equal(encoded(tmp_path / "te.safetensors"), wanted)


def is_layer(name: str) -> bool:
    return re.search(r"(SelfAttention\.[qkvo]|DenseReluDense\.\w+)\.weight$", name) is not None


def described(**description: object) -> Tensor:
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def by_rows(weight: Tensor, largest: float) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / largest


def scaled(weight: Tensor) -> State:
    scale = weight.abs().amax() / 448
    return {"weight": fp8(weight, scale), "scale_weight": scale, "scale_input": torch.ones(())}


def scaled_rows(weight: Tensor) -> State:
    scale = by_rows(weight, 448)
    return {"weight": fp8(weight, scale), "scale_weight": scale}


def comfy_fp8(weight: Tensor) -> State:
    found = scaled(weight)
    return {
        "weight": found["weight"],
        "weight_scale": found["scale_weight"].view(1),
        "input_scale": torch.ones(()),
        "comfy_quant": described(format="float8_e4m3fn", full_precision_matrix_mult=True),
    }


def comfy_e5m2(weight: Tensor) -> State:
    scale = weight.abs().amax() / 57344
    stored = (weight / scale).to(torch.float8_e5m2)
    return {"weight": stored, "weight_scale": scale, "comfy_quant": described(format="float8_e5m2")}


def comfy_int8(weight: Tensor) -> State:
    scale = by_rows(weight, 127)
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale, "comfy_quant": described(format="int8_tensorwise")}


def one_int8(weight: Tensor) -> State:
    scale = weight.abs().amax() / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def official_int8(weight: Tensor) -> State:
    scale = by_rows(weight, 127)
    return {"weight_int8": (weight / scale).round().to(torch.int8), "weight_scale": scale.flatten()}


def plain_fp8(weight: Tensor) -> State:
    return {"weight": weight.to(torch.float8_e4m3fn)}


def stored_as(state: State, make: Callable[[Tensor], State], layer: Callable[[str], bool] = is_layer) -> State:
    out: State = {}
    for name, tensor in state.items():
        if layer(name):
            out |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in make(tensor.float()).items()}
        else:
            out[name] = tensor
    return out


MAKERS = [scaled, scaled_rows, comfy_fp8, comfy_e5m2, comfy_int8, one_int8, official_int8, plain_fp8]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("form", ["hf", "wan", "prefix"])
def test_quantized_weights(tmp_path, state, wanted, make, form):
    quantized = stored_as(state, make)
    if make in (scaled, scaled_rows):
        quantized["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if form == "wan":
        quantized = renamed(quantized, WAN)
    elif form == "prefix":
        # The marker and the vocabulary stay outside, as some writers leave them.
        outside = ("scaled_fp8", "spiece_model")
        quantized = {name if name in outside else f"text_encoder.{name}": tensor for name, tensor in quantized.items()}
    write_safetensors(tmp_path / "te.safetensors", quantized)
    got = encoded(tmp_path / "te.safetensors")
    most = 0.3 if make is comfy_e5m2 else 0.1
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < most


def test_layers_described_in_the_metadata(tmp_path, state, wanted):
    quantized = stored_as(state, scaled)
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in state if is_layer(name)}
    write_safetensors(
        tmp_path / "te.safetensors", quantized, {"_quantization_metadata": json.dumps({"layers": layers})}
    )
    got = encoded(tmp_path / "te.safetensors")
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < 0.1


def gguf_file(path: Path, state: State, vocabulary: dict[str, Any] | None = None) -> None:
    """The encoder by llama.cpp's names, its matrices as Q8_0. vocabulary: lists of metadata."""
    import gguf

    writer, kind = gguf.GGUFWriter(str(path), "t5"), gguf.GGMLQuantizationType.Q8_0
    if vocabulary is not None:
        writer.add_tokenizer_model(vocabulary["model"])
        writer.add_token_list(vocabulary["tokens"])
        writer.add_token_scores(vocabulary["scores"])
        writer.add_token_types(vocabulary["types"])
        writer.add_precompiled_charsmap(vocabulary["charsmap"])
        writer.add_remove_extra_whitespaces(True)
    for name, tensor in renamed(state, LLAMA_CPP).items():
        if tensor.ndim == 2 and "rel_b" not in name:
            writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_with_a_vocabulary_beside_it(tmp_path, state, wanted):
    (tmp_path / "spiece.model").write_bytes(state["spiece_model"].numpy().tobytes())
    gguf_file(tmp_path / "te.gguf", {name: tensor for name, tensor in state.items() if name != "spiece_model"})
    got = encoded(tmp_path / "te.gguf")
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < 0.05


def fields_of(message: bytes, number: int) -> Iterator[bytes]:
    """The contents of a protobuf message's fields of one number."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        length, at = varint(at) if key & 7 == 2 else (4 if key & 7 == 5 else 0, at)
        if key & 7 == 0:
            _, at = varint(at)
        if key >> 3 == number:
            yield message[at : at + length]
        at += length


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> bytes:
    """A SentencePiece model of UMT5's kind: unigrams, NFKC, no begin of sentence."""
    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(300, 0)), model_writer=proto, model_type="unigram", vocab_size=96, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    return proto.getvalue()


@pytest.fixture(scope="module")
def vocabulary(unigram) -> dict[str, Any]:
    """What llama.cpp writes of a SentencePiece model."""
    spiece = SentencePieceProcessor(model_proto=unigram)
    kinds = (("is_unknown", 2), ("is_control", 3), ("is_unused", 5), ("is_byte", 6))
    ids = range(spiece.get_piece_size())
    return {
        "model": "t5",
        "tokens": [spiece.id_to_piece(i) for i in ids],
        "scores": [spiece.get_score(i) for i in ids],
        "types": [next((kind for name, kind in kinds if getattr(spiece, name)(i)), 1) for i in ids],
        "charsmap": next(fields_of(next(fields_of(unigram, 3)), 2)),
    }


def test_gguf_with_its_own_vocabulary(tmp_path, state, unigram, vocabulary):
    # llama.cpp fills the vocabulary up to the embedding's rows.
    rows = len(vocabulary["tokens"]) + 20
    padded = {key: [*vocabulary[key], *fill] for key, fill in (
        ("tokens", [f"[PAD{i}]" for i in range(20)]), ("scores", [-1000.0] * 20), ("types", [5] * 20)
    )}  # fmt: skip
    encoder = {name: tensor for name, tensor in state.items() if name != "spiece_model"}
    encoder["shared.weight"] = encoder["shared.weight"][:rows]
    gguf_file(tmp_path / "te.gguf", encoder, vocabulary | padded)
    loaded = load_text_encoder(tmp_path / "te.gguf")
    theirs = SentencePieceProcessor(model_proto=unigram)
    for text in [*corpus(50, 1), "", "\u00e9t\u00e9  \uff21\u3000x", "caf\u0065\u0301 \U0001f600 [PAD3] <unk>"]:
        assert loaded.tokenize(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt2"}, "has a vocabulary of kind 'gpt2', not UMT5's"),
        ({"scores": [0.5]}, "without a score and a type for each token"),
        ({"types": [99] * 96}, "without a score and a type for each token"),
        ({"types": [1] * 96}, "is corrupt"),
        ({"tokens": ["a"] * 96}, "is corrupt"),
        ({"charsmap": b"123"}, "is corrupt"),
    ],
)
def test_a_broken_vocabulary_in_gguf(tmp_path, state, vocabulary, change, message):
    given = {key: values if isinstance(values, str | bytes) else values[:96] for key, values in vocabulary.items()}
    gguf_file(tmp_path / "te.gguf", {n: t for n, t in state.items() if n != "spiece_model"}, given | change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_text_encoder(tmp_path / "te.gguf")
    assert "te.gguf" in str(caught.value)


@pytest.mark.parametrize("place", ["spiece.model", "tokenizer/spiece.model", "google/umt5-xxl/spiece.model"])
def test_a_vocabulary_beside_the_file(tmp_path, state, wanted, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(state["spiece_model"].numpy().tobytes())
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors"
    write_safetensors(path, renamed({name: t for name, t in state.items() if name != "spiece_model"}, WAN))
    assert torch.equal(encoded(path), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_a_vocabulary_that_was_cast(tmp_path, state, wanted, dtype):
    write_safetensors(tmp_path / "te.safetensors", state | {"spiece_model": state["spiece_model"].to(dtype)})
    assert torch.equal(encoded(tmp_path / "te.safetensors"), wanted)


Q = "encoder.block.1.layer.0.SelfAttention.q."


def _too_few_scales(state: State) -> State:
    found = stored_as(state, scaled)
    return found | {name: tensor.expand(7) for name, tensor in found.items() if name.endswith("scale_weight")}


def _no_scale(state: State) -> State:
    found = stored_as(state, scaled)
    del found[Q + "scale_weight"]
    return found


def _with(suffix: str, value: Tensor, make: Callable[[Tensor], State] = scaled) -> Callable[[State], State]:
    return lambda state: stored_as(state, make) | {Q + suffix: value}


def _bare_int8(state: State) -> State:
    return stored_as(state, lambda weight: {"weight": one_int8(weight)["weight"]})


def _nan(name: str) -> Callable[[State], State]:
    def spoil(state: State) -> State:
        tensor = state[name].clone()
        tensor.view(-1)[-1] = torch.nan
        return state | {name: tensor}

    return spoil


def _block(number: str) -> Callable[[State], State]:
    return lambda state: state | {f"encoder.block.{number}.layer.0.layer_norm.weight": torch.zeros(128)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_scale, "SelfAttention.q.*scale"),
        (_bare_int8, "SelfAttention.*scale"),
        (_too_few_scales, r"scale_weight has shape \[7\].* and 11 more; "),
        (_with("scale_weight", torch.ones(7)), r"q.scale_weight has shape \[7\]"),
        (_with("scale_weight", torch.ones(2, 128)), "q.weight with a scale for each block"),
        (_with("scale_weight", torch.ones(0)), r"q.scale_weight has shape \[0\]"),
        (_with("scale_weight", torch.tensor(0.0)), "scale of 0 or less in .*q.scale_weight"),
        (_with("weight_scale", -torch.ones(128, 1), comfy_int8), "scale of 0 or less in .*q.weight_scale"),
        (_with("scale_weight", torch.tensor(torch.nan)), "NaN or infinite values in .*q.weight"),
        (_with("scale_weight", torch.tensor(torch.inf)), "NaN or infinite values in .*q.weight"),
        (_with("comfy_quant", described(format="nvfp4"), comfy_fp8), "nvfp4"),
        (_with("comfy_quant", torch.zeros(3, dtype=torch.uint8), comfy_fp8), "q.comfy_quant"),
        (_nan("shared.weight"), "NaN or infinite values in shared.weight"),
        (_nan("encoder.block.0.layer.1.layer_norm.weight"), "NaN or infinite values in .*0.layer.1.layer_norm.weight"),
        (_block("3"), "lacks encoder.block.2, though it has a later block"),
        (_block("999999999"), "lacks encoder.block.2"),
        (_block("9" * 5000), "lacks encoder.block.2"),
        (_block("x"), "lacks encoder.block.2"),
        (lambda state: state | {"shared.weight": state["shared.weight"][:64]}, "384 pieces, the embedding .* 64 rows"),
        (lambda state: state | {"shared.weight": torch.zeros(4000, 128)}, "384 pieces, the embedding .* 4000 rows"),
        (lambda state: state | {"shared.weight": torch.zeros(384, 0)}, "no matrix 'shared.weight'"),
        (lambda state: state | {"spiece_model": torch.full((9,), 0.5)}, "is not bytes"),
        (lambda state: state | {"spiece_model": state["spiece_model"][:0]}, "is corrupt"),
        (lambda state: state | {"spiece_model": state["spiece_model"][None]}, r"of shape \[1, .*not one row of bytes"),
        (lambda state: state | {"scaled_fp8": torch.zeros(2)}, "marker 'scaled_fp8' but stores no matrix in fp8"),
        (lambda state: state | {Q + "scale_weight": torch.tensor(2.0)}, "a scale in .*q.scale_weight but stores"),
        (lambda state: state | {f"x.{name}": tensor for name, tensor in state.items()}, "more than one UMT5 encoder"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, state, spoil, message):
    path = tmp_path / "te.safetensors"
    write_safetensors(path, spoil(state))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_text_encoder(path)
    assert "te.safetensors" in str(caught.value) and len(str(caught.value)) < 600


def _nf4(weight: Tensor) -> State:
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    state = {"weight.absmax": torch.ones(4), "weight.quant_state.bitsandbytes__nf4": packed[:9, 0]}
    return {"weight": packed} | state


def _gptq(weight: Tensor) -> State:
    rows, columns = weight.shape
    packed = torch.zeros(max(1, columns // 8), rows, dtype=torch.int32)
    return {"qweight": packed, "qzeros": packed[:1], "scales": torch.ones(1, rows), "g_idx": packed[0]}


def _nvfp4(weight: Tensor) -> State:
    rows, columns = weight.shape
    packed = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    return {
        "weight": packed,
        "weight_scale": fp8(torch.ones(rows, columns // 16), torch.ones(())),
        "weight_scale_2": torch.ones(()),
    }


def _quanto(weight: Tensor) -> State:
    return {"weight._data": weight.to(torch.int8), "weight._scale": torch.ones(len(weight), 1)}


def _as_bytes(weight: Tensor) -> State:
    found = comfy_fp8(weight)
    return found | {"weight": found["weight"].view(torch.uint8)}


@pytest.mark.parametrize("prefix", ["", "text_encoder."])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(("make", "name"), [(_nf4, "nf4"), (_gptq, "GPTQ"), (_nvfp4, "nvfp4"), (_quanto, "quanto")])
def test_packed_weights_are_refused_by_their_name(tmp_path, state, make, name, every, prefix):
    packed = stored_as(state, make, (lambda name: state[name].ndim == 2) if every else is_layer)
    write_safetensors(tmp_path / "te.safetensors", {prefix + name: tensor for name, tensor in packed.items()})
    with pytest.raises(CheckpointError, match=f"te.safetensors stores .* as .*{name}, which is not supported"):
        load_text_encoder(tmp_path / "te.safetensors")


def test_fp8_stored_as_bytes(tmp_path, state):
    write_safetensors(tmp_path / "bytes.safetensors", stored_as(state, _as_bytes))
    write_safetensors(tmp_path / "fp8.safetensors", stored_as(state, comfy_fp8))
    assert torch.equal(encoded(tmp_path / "bytes.safetensors"), encoded(tmp_path / "fp8.safetensors"))


def test_scales_multiply_rows():
    rows = torch.arange(1.0, 4.0)
    for name in ("scale_weight", "weight_scale"):
        for scale in (rows, rows[:, None]):
            assert torch.equal(
                dequantise("a.weight", torch.ones(3, 3), {f"a.{name}": scale}), rows[:, None].expand(3, 3)
            )
    assert torch.equal(
        dequantise("a.weight", torch.ones(3, 3), {"a.weight_scale": torch.tensor(2.0)}), torch.full((3, 3), 2.0)
    )
    plain = torch.ones(3, dtype=torch.bfloat16)
    assert dequantise("a.bias", plain, {"a.weight_scale": rows}) is plain
    with pytest.raises(CheckpointError, match=r"a\.scale_weight holds 2 scales for 3 rows of a.weight"):
        dequantise("a.weight", torch.ones(3, 3), {"a.scale_weight": torch.ones(2)})


@pytest.mark.parametrize("what", ["te.safetensors", "tokenizer/spiece.model", "text_encoder/config.json"])
def test_a_pipe_is_not_waited_for(tmp_path, state, what):
    for folder in ("text_encoder", "tokenizer"):
        (tmp_path / folder).mkdir()
    write_safetensors(
        tmp_path / "text_encoder" / "a.safetensors", {n: t for n, t in state.items() if n != "spiece_model"}
    )
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(state["spiece_model"].numpy().tobytes())
    (tmp_path / what).unlink(missing_ok=True)
    os.mkfifo(tmp_path / what)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        load_text_encoder(tmp_path / what if what.startswith("te.") else tmp_path)
