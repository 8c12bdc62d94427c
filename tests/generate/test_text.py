"""The text encoder gives the same embeddings from every file form, and says what is wrong with a file."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import UMT5EncoderModel

from longcat_core.checkpoints import reader
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.paths import NANO_TEXT_ENCODER
from longcat_core.generate.text import TextEncoder, clean_prompt, load_text_encoder
from longcat_core.nano.vocabulary import new_text_encoder, save_text_encoder

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PROMPTS = ["a red circle moves right on a blue background", "", "a green square stays still"]


@pytest.fixture(scope="module")
def vocab() -> bytes:
    """The embedded text encoder's."""
    return bytes(read_tensors(NANO_TEXT_ENCODER)["spiece_model"].numpy())


@pytest.fixture(scope="module")
def model(vocab) -> UMT5EncoderModel:
    torch.manual_seed(0)
    return new_text_encoder(vocab, d_model=32, d_ff=48, num_layers=3, num_heads=2, d_kv=8).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory, model, vocab) -> Path:
    path = tmp_path_factory.mktemp("text") / "te.safetensors"
    save_text_encoder(path, model, vocab, torch.float32)
    return path


@pytest.fixture(scope="module")
def encoder(file) -> TextEncoder:
    return load_text_encoder(file)


@pytest.fixture
def official(tmp_path, model, vocab) -> Path:
    """The official layout: sharded text_encoder/ with its index and config, tokenizer/ with spiece.model."""
    model.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(vocab)
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    return tmp_path


def test_embeddings_equal_the_plain_model_over_all_positions(encoder, model):
    embeds, mask = encoder.encode(PROMPTS, max_length=40)
    ids, _ = encoder.tokens(PROMPTS, max_length=40)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert embeds.shape == (3, 40, 32) and embeds.dtype == torch.float32
    assert mask.shape == (3, 40) and mask.dtype == torch.int64
    assert torch.allclose(embeds, plain * mask[..., None], atol=1e-5)
    assert (embeds[mask == 0] == 0).all()
    assert (embeds[mask == 1].abs().sum(-1) > 0).all()


def test_rows_do_not_depend_on_their_batch(encoder):
    embeds, _ = encoder.encode(PROMPTS, max_length=40)
    for row, prompt in enumerate(PROMPTS):
        assert torch.allclose(encoder.encode([prompt], max_length=40)[0][0], embeds[row], atol=1e-5)


def test_tokens_end_in_eos(encoder):
    ids, mask = encoder.tokens(PROMPTS, max_length=512)
    assert ids.shape == (3, 512)
    for row, prompt in enumerate(PROMPTS):
        length = int(mask[row].sum())
        assert ids[row, :length].tolist() == [*encoder.tokenize(prompt), 1]
        assert (ids[row, length:] == 0).all() and (mask[row, length:] == 0).all()
    assert mask[1].sum() == 1 and ids[1, 0] == 1  # an empty prompt is its EOS


def test_long_prompts_are_cut_before_eos(encoder):
    ids, mask = encoder.tokens(["a red circle " * 50], max_length=8)
    assert ids.shape == (1, 8) and mask.sum() == 8
    assert ids[0, -1] == 1 and ids[0, :-1].tolist() == encoder.tokenize("a red circle " * 50)[:7]
    assert encoder.encode(["a red circle"], max_length=1)[1].tolist() == [[1]]


def test_clean_prompt():
    assert clean_prompt("  a\tred \n\n circle ") == "a red circle"
    assert clean_prompt("a &amp;lt;red&amp;gt; circle") == "a <red> circle"
    assert clean_prompt("caf\u00c3\u00a9 isn\u2019t") == "caf\u00e9 isn't"
    assert clean_prompt("") == ""


def test_prompts_are_cleaned_before_they_are_tokenized(encoder):
    assert torch.equal(encoder.tokens(["a &amp;amp; red"])[0], encoder.tokens(["a & red"])[0])


def test_official_folders(official, encoder):
    want, _ = encoder.encode(PROMPTS, max_length=24)
    for path in (official, official / "text_encoder"):
        assert torch.equal(load_text_encoder(path).encode(PROMPTS, max_length=24)[0], want)


def test_a_file_that_the_index_does_not_name_is_left_alone(official, encoder):
    first = sorted((official / "text_encoder").glob("*.safetensors"))[0]
    other = {name: torch.randn(tensor.shape) for name, tensor in read_tensors(first).items()}
    write_safetensors(official / "text_encoder" / "old_finetune.safetensors", other)
    with pytest.warns(UserWarning, match="does not name old_finetune.safetensors, which is left alone"):
        found, _ = load_text_encoder(official).encode(PROMPTS, max_length=24)
    assert torch.equal(found, encoder.encode(PROMPTS, max_length=24)[0])
    (official / "text_encoder" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"is in both .*old_finetune.safetensors"):
        load_text_encoder(official)


def test_official_folder_equals_from_pretrained(official):
    ours = load_text_encoder(official).model.state_dict()
    theirs = UMT5EncoderModel.from_pretrained(official / "text_encoder", local_files_only=True).state_dict()
    assert set(ours) == set(theirs) - {"encoder.embed_tokens.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_network_is_transformers_own_bit_for_bit(file, model, dtype):
    """Over distances in every bucket, alone and with padding."""
    encoder = load_text_encoder(file, dtype=dtype)
    state = encoder.model.state_dict()
    theirs = copy.deepcopy(model)
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
    for prompts in (PROMPTS[:1], ["a green square " * 90], [*PROMPTS, "a green square " * 20]):
        ids, mask = encoder.tokens(prompts)
        used = int(mask.sum(1).max())
        with torch.no_grad():
            embedded = encoder.model.shared(ids[:, :used])
            found = encoder.model(embedded, mask[:, :used])
            wanted = theirs(inputs_embeds=embedded, attention_mask=mask[:, :used]).last_hidden_state
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_tokenizer_json_alone(official):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    (official / "tokenizer" / "spiece.model").unlink()
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(official / "tokenizer" / "tokenizer.json"))
    ids, _ = load_text_encoder(official).tokens(["red circle jumps"], max_length=6)
    assert ids.tolist() == [[3, 4, 2, 1, 0, 0]]


def test_scaled_fp8_is_multiplied_out(tmp_path, file, encoder):
    state = read_tensors(file)
    scaled, restored = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in state.items():
        scaled[name] = restored[name] = tensor
        if name.endswith((".q.weight", ".wi_0.weight", ".wo.weight")):
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
            restored[name] = scaled[name].float() * scale
    write_safetensors(tmp_path / "fp8.safetensors", scaled)
    write_safetensors(tmp_path / "restored.safetensors", restored)
    got, _ = load_text_encoder(tmp_path / "fp8.safetensors").encode(PROMPTS, max_length=24)
    assert torch.equal(got, load_text_encoder(tmp_path / "restored.safetensors").encode(PROMPTS, max_length=24)[0])
    want, _ = encoder.encode(PROMPTS, max_length=24)
    assert 1e-4 < (got - want).abs().max() / want.std() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_encoder_that_streams_encodes_bit_for_bit(monkeypatch, file, dtype):
    """The file is read once for all batches, in pieces of a few rows, and not kept."""
    monkeypatch.setattr(reader, "PIECE", 512)
    whole, seen = load_text_encoder(file, dtype=dtype), []
    streamed = load_text_encoder(file, dtype=dtype, streams=True, watch=lambda *_: pytest.fail("nothing is read yet"))
    found = streamed.encode_each([PROMPTS, PROMPTS[:1]], 24, lambda *at: seen.append(at))
    for (embeds, mask), prompts in zip(found, (PROMPTS, PROMPTS[:1]), strict=True):
        wanted = whole.encode(prompts, 24)
        assert torch.equal(embeds, wanted[0]) and torch.equal(mask, wanted[1])
    assert len(seen) > 70 and seen == sorted(set(seen)) and seen[-1][0] == seen[-1][1]
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert (streamed.dtype, streamed.device, streamed.channels) == (whole.dtype, whole.device, whole.channels)


def test_an_encoder_that_streams_refuses_files_when_it_is_loaded(tmp_path, file):
    state = read_tensors(file)
    _missing(state)
    write_safetensors(tmp_path / "x.safetensors", state)
    with pytest.raises(CheckpointError, match="lacks"):
        load_text_encoder(tmp_path / "x.safetensors", streams=True)


def test_a_tied_copy_of_the_embedding_is_ignored(tmp_path, file, encoder):
    state = read_tensors(file)
    write_safetensors(
        tmp_path / "x.safetensors", state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    )
    loaded = load_text_encoder(tmp_path / "x.safetensors")
    assert torch.equal(loaded.encode(PROMPTS, 24)[0], encoder.encode(PROMPTS, 24)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(file, encoder, dtype, capfd):
    half = load_text_encoder(file, dtype=dtype, device="cpu")
    embeds, _ = half.encode(PROMPTS, max_length=24)
    want, _ = encoder.encode(PROMPTS, max_length=24)
    assert half.dtype == dtype and half.device == torch.device("cpu") and half.channels == 32
    assert embeds.dtype == torch.float32
    assert (embeds - want).abs().max() / want.std() < 0.1
    assert half.to("cpu") is half
    assert "".join(capfd.readouterr()) == ""


def test_encode_refuses(encoder):
    for prompts in ([], "a red circle"):
        with pytest.raises(LongCatError, match="list of at least one prompt"):
            encoder.encode(prompts)
    with pytest.raises(LongCatError, match="max_length"):
        encoder.encode(["a"], max_length=0)


def test_embeddings_that_are_not_finite_are_refused(tmp_path, file):
    state = read_tensors(file)
    state["encoder.final_layer_norm.weight"] = torch.full((32,), 3e38)
    write_safetensors(tmp_path / "te.safetensors", state)
    with pytest.raises(LongCatError, match=r"the text encoder overflows in torch.float32"):
        load_text_encoder(tmp_path / "te.safetensors").encode(PROMPTS)


def _missing(state):
    del state["encoder.final_layer_norm.weight"]


def _extra(state):
    state["lm_head.weight"] = torch.zeros(2, 2)


def _misshapen(state):
    state["encoder.block.2.layer.1.DenseReluDense.wo.weight"] = torch.zeros(32, 47)


def _no_vocabulary(state):
    del state["spiece_model"]


def _corrupt_vocabulary(state):
    state["spiece_model"] = state["spiece_model"][:100].clone()


def _t5(state):
    for block in (1, 2):
        del state[f"encoder.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight"]


def _ungated(state):
    for name in [name for name in state if "wi_" in name]:
        del state[name]


def _odd_heads(state):
    state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(32, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, "lacks: encoder.final_layer_norm.weight; "),
        (_extra, "holds unknown tensors: lm_head.weight; check that it is a UMT5 encoder"),
        (_misshapen, r"wo.weight has shape \[32, 47\], the network wants \[32, 48\]"),
        (_no_vocabulary, "carries no SentencePiece model"),
        (_corrupt_vocabulary, "SentencePiece model in .* is corrupt"),
        (_t5, "is a T5 encoder, not UMT5"),
        (_ungated, "it has no matrix .*wi_0"),
        (_odd_heads, "3 heads"),
    ],
)
def test_bad_files(tmp_path, file, spoil, message):
    state = read_tensors(file)
    spoil(state)
    path = tmp_path / "te.safetensors"
    write_safetensors(path, state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_text_encoder(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path, file):
    with pytest.raises(CheckpointError, match="is not a UMT5 encoder"):
        load_text_encoder(GOLDEN / "dit.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is truncated"):
        load_text_encoder(tmp_path / "cut.safetensors")
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        load_text_encoder(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_text_encoder(tmp_path / "none.safetensors")


def test_bad_folders(official):
    empty = official / "empty"
    empty.mkdir()
    folder = official / "text_encoder"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="type 't5'"):
        load_text_encoder(official)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a text encoder config"):
        load_text_encoder(official)
    (folder / "config.json").unlink()
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.rename(official / "kept")
    with pytest.raises(CheckpointError, match=r"missing|is not a UMT5 encoder"):
        load_text_encoder(official)
    (official / "kept").rename(shard)
    shutil.rmtree(official / "tokenizer")
    with pytest.raises(CheckpointError, match="download the tokenizer folder too"):
        load_text_encoder(official)
    with pytest.raises(CheckpointError, match=r"holds no .safetensors file"):
        load_text_encoder(empty)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": ["umt5"]}, "model_type"),
        ({"d_model": 4096}, "has d_model 4096, the files beside it 32"),
        ({"num_layers": "3"}, "num_layers"),
        ({"num_layers": 10**400}, "num_layers"),
        ({"num_heads": [2]}, "num_heads"),
        ({"vocab_size": 256384}, "vocab_size 256384"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj relu"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "config"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon -1e-06"),
        ({"relative_attention_max_distance": 0}, "relative_attention_max_distance 0"),
        ({"relative_attention_max_distance": 128.5}, "relative_attention_max_distance"),
        ({"relative_attention_max_distance": None}, "relative_attention_max_distance"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(official, change, message):
    file = official / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_text_encoder(official)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["1", "128.0", "null", '"umt5"', "[" * 100000, '{"a":' * 10000, "{", "", "\x00"])
def test_a_config_that_is_none_is_refused(official, text):
    (official / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is not a text encoder config"):
        load_text_encoder(official)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spiece.model", b"", "is corrupt"),
        ("spiece.model", b"\x00" * 100, "is corrupt"),
        ("spiece.model", b"<html></html>", "is corrupt"),
        ("tokenizer.json", b"", "as a tokenizer"),
        ("tokenizer.json", b"1", "as a tokenizer"),
        ("tokenizer.json", b"[" * 100000, "as a tokenizer"),
        ("tokenizer.json", b"{\xff\xff", "is not"),
        ("tokenizer.json", {"version": None}, "as a tokenizer"),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"</s>": 1}, "unk_token": "?"}}, "as a tokenizer"),
        (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "vocab": {"</s>": 2, "?": 0}, "unk_token": "?"}},
            "EOS id 2",
        ),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}, "EOS id None"),
        (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "vocab": {"</s>": 1, "?": 4000000000}, "unk_token": "?"}},
            "4000000001 pieces",
        ),
    ],
)
def test_a_broken_tokenizer_is_named(official, name, content, message):
    (official / "tokenizer" / "spiece.model").unlink()
    if isinstance(content, dict):
        content = json.dumps({"version": "1.0", "added_tokens": []} | content).encode()
    (official / "tokenizer" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_text_encoder(official)
    assert name in str(caught.value) and len(str(caught.value)) < 600


def test_without_sentencepiece(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(LongCatError, match=r"sentencepiece.*longcat-video\[headless\]"):
        load_text_encoder(file)


def test_import_is_cheap():
    code = (
        "import sys, longcat_core.generate.text, longcat_core.nano.vocabulary\n"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'sentencepiece', 'ftfy', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[2], check=False).returncode == 0


def test_encoding_imports_neither_transformers_nor_the_compiler():
    """Either takes seconds."""
    code = (
        "import sys\n"
        "from longcat_core.generate.paths import NANO_TEXT_ENCODER\n"
        "from longcat_core.generate.text import load_text_encoder\n"
        "load_text_encoder(NANO_TEXT_ENCODER).encode(['a red circle'])\n"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'torch._dynamo')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[2], check=False).returncode == 0
