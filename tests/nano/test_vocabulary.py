"""The embedded model's vocabulary: small, reproducible, whole words of its world, and nothing written that it loses."""

from __future__ import annotations

import string
import tempfile

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_header, read_tensors
from longcat_core.nano.vocabulary import SIZE, new_text_encoder, save_text_encoder, train_vocabulary
from longcat_core.nano.world import corpus
from longcat_core.sampling.guidance import DEFAULT_NEGATIVE_PROMPT

from ..support.captions import words_of_the_world


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [*corpus(4000, 0), *[DEFAULT_NEGATIVE_PROMPT] * 20]


@pytest.fixture(scope="module")
def vocab(captions) -> bytes:
    pytest.importorskip("sentencepiece", minversion="0.2.3")
    return train_vocabulary(captions)


@pytest.fixture(scope="module")
def processor(vocab) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=vocab)


def test_special_ids_and_size(vocab, processor):
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    assert processor.get_piece_size() == SIZE
    assert len(vocab) < 20_000


def test_same_corpus_same_bytes(vocab, captions):
    assert train_vocabulary(captions) == vocab
    assert tempfile.gettempdir().encode() not in vocab


def test_every_word_of_the_world_is_one_piece(processor):
    assert [word for word in words_of_the_world() if len(processor.encode(word)) != 1] == []


def test_case_and_typographic_signs_fold(processor):
    assert processor.encode("A RED Circle") == processor.encode("a red circle")
    assert processor.encode("\u201cred\u201d \u2014 it\u2019s") == processor.encode('"red" - it\'s')
    assert processor.encode("  a   red\n circle ") == processor.encode("a red circle")


def test_printable_ascii_survives(processor):
    text = "".join(c for c in string.printable if not c.isspace())
    ids = processor.encode(text)
    assert processor.unk_id() not in ids
    assert processor.decode(ids) == text.lower()
    sentence = "Zebra #7 jumps (quickly) over 3 lazy foxes & a {vixen}!"
    assert processor.decode(processor.encode(sentence)) == sentence.lower()


def test_other_scripts_become_unknown_and_keep_the_rest(processor):
    ids = processor.encode("red \u732b circle")
    assert ids.count(processor.unk_id()) == 1
    assert set(processor.encode("red circle")) <= set(ids)


@pytest.mark.parametrize("version", ["0.2.2", "0.1.99"])
def test_a_sentencepiece_that_would_end_the_process_is_refused(monkeypatch, version):
    monkeypatch.setattr("sentencepiece.__version__", version)
    with pytest.raises(LongCatError, match=rf"sentencepiece {version} cannot .* install 0\.2\.3"):
        train_vocabulary(["a red circle"])


def test_bad_arguments():
    with pytest.raises(LongCatError, match=r"corpus .* is empty"):
        train_vocabulary(["", "  "])
    with pytest.raises(LongCatError, match="at least"):
        train_vocabulary(["a red circle"], size=10)


def test_new_encoder_follows_the_seed(vocab):
    torch.manual_seed(3)
    first = new_text_encoder(vocab, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=8)
    torch.manual_seed(3)
    second = new_text_encoder(vocab, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=8)
    assert first.shared.weight.shape == (SIZE, 32) and first.shared.weight.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_saved_file_holds_weights_once_and_the_vocabulary(tmp_path, vocab):
    model = new_text_encoder(vocab)
    save_text_encoder(tmp_path / "te.safetensors", model, vocab)
    header = read_header(tmp_path / "te.safetensors")
    assert header.pop("spiece_model") == (torch.uint8, (len(vocab),))
    assert set(header) == set(model.state_dict()) - {"encoder.embed_tokens.weight"}
    assert {dtype for dtype, _ in header.values()} == {torch.bfloat16}
    stored = read_tensors(tmp_path / "te.safetensors", names=["spiece_model"])["spiece_model"]
    assert stored.numpy().tobytes() == vocab
    assert (tmp_path / "te.safetensors").stat().st_size < 1_000_000
