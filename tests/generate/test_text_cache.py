"""Encodings of prompts that are kept on disk: the same bits, no text encoder, a bounded folder, and no way to fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from longcat_core.checkpoints.umt5 import open_umt5
from longcat_core.generate import text_cache
from longcat_core.generate.paths import NANO_TEXT_ENCODER
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest
from longcat_core.generate.text import load_text_encoder
from longcat_core.generate.text_cache import CachedTextEncoder, TextCache, bytes_of, cache_folder

CPU = torch.device("cpu")
PROMPTS = ["a red circle moves right on a blue background", "", "word " * 600, "\ud800 \u00e9\u732b"]


def cache_in(folder: Path, **changed) -> TextCache:
    settings = {"path": NANO_TEXT_ENCODER, "dtype": torch.float32, "device": CPU}
    return TextCache(folder, **settings | changed)


def encoder_in(folder: Path) -> CachedTextEncoder:
    return CachedTextEncoder(NANO_TEXT_ENCODER, torch.float32, CPU, cache_in(folder))


@pytest.fixture(scope="module")
def fresh():
    return load_text_encoder(NANO_TEXT_ENCODER)


@pytest.fixture
def no_encoder(monkeypatch):
    def forbid() -> None:
        monkeypatch.setattr(text_cache, "load_text_encoder", lambda *_, **__: pytest.fail("the encoder was loaded"))

    return forbid


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_kept_encodings_are_the_fresh_ones_bit_for_bit(tmp_path, fresh, no_encoder, prompt):
    wanted = fresh.encode([prompt])
    computed = encoder_in(tmp_path).encode([prompt])
    no_encoder()
    kept = encoder_in(tmp_path).encode([prompt])
    for found in (computed, kept):
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_several_prompts_at_once_are_computed_as_they_always_were(tmp_path, fresh):
    encoder = encoder_in(tmp_path)
    for one, other in zip(encoder.encode(PROMPTS[:2]), fresh.encode(PROMPTS[:2]), strict=True):
        assert torch.equal(one, other)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_makes_the_same_video_without_its_text_encoder(tmp_path, no_encoder):
    request = GenerateRequest("a red circle", negative_prompt="blur", frames=5, steps=2, seed=3)
    prompts = [request.prompt, request.negative_prompt]
    plain = Pipeline.load().generate(request).latents
    first = Pipeline.load(text_cache=tmp_path, prompts=prompts).generate(request).latents
    no_encoder()
    pipeline = Pipeline.load(text_cache=tmp_path, prompts=prompts)
    assert torch.equal(pipeline.generate(request).latents, plain) and torch.equal(first, plain)
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        Pipeline.load(text_cache=tmp_path, prompts=[*prompts, "another prompt"])


def test_a_prompt_that_is_not_kept_loads_the_encoder_later(tmp_path, fresh):
    cache_in(tmp_path).put("a red circle", *fresh.encode(["a red circle"]))
    pipeline = Pipeline.load(text_cache=tmp_path, prompts=["a red circle"])
    assert pipeline.text_encoder._loaded is None
    found, _ = pipeline.text_encoder.encode(["a blue square"])
    assert torch.equal(found, fresh.encode(["a blue square"])[0])


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_other_weights_precisions_and_tokenizers_have_other_entries(tmp_path, fresh, prompt):
    cache_in(tmp_path).put(prompt, *fresh.encode([prompt]))
    assert prompt in cache_in(tmp_path)
    assert prompt not in cache_in(tmp_path, dtype=torch.bfloat16)
    assert prompt + " " not in cache_in(tmp_path)
    folder = tmp_path / "other"
    folder.mkdir()
    copied = folder / "encoder.safetensors"
    content = bytearray(NANO_TEXT_ENCODER.read_bytes())
    copied.write_bytes(content)
    assert prompt in cache_in(tmp_path, path=copied), "the name of a file does not matter"
    (folder / "spiece.model").write_bytes(b"another")
    assert prompt not in cache_in(tmp_path, path=copied)
    (folder / "spiece.model").unlink()
    content[-1] ^= 1
    copied.write_bytes(content)
    assert prompt not in cache_in(tmp_path, path=copied)


def test_neither_names_nor_files_hold_the_prompt(tmp_path, fresh):
    prompt = "a very secret prompt"
    cache_in(tmp_path / "kept").put(prompt, *fresh.encode([prompt]))
    (file,) = (tmp_path / "kept").iterdir()
    assert "secret" not in file.name and b"secret" not in file.read_bytes()
    assert os.name == "nt" or (tmp_path / "kept").stat().st_mode & 0o077 == 0


def test_what_was_not_used_for_the_longest_goes_first(tmp_path, fresh):
    texts = [f"circle {number}" for number in range(4)]
    encoded = {each: fresh.encode([each]) for each in texts}
    cache = cache_in(tmp_path)
    for age, each in enumerate(texts[:3]):
        cache.put(each, *encoded[each])
        os.utime(cache._file(each), (1000 + age, 1000 + age))
    assert cache.get(texts[0]) is not None, "used, and so the latest"
    cache.most = sum(file.stat().st_size for file in tmp_path.iterdir())
    cache.put(texts[3], *encoded[texts[3]])
    assert [each in cache for each in texts] == [True, False, True, True]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= cache.most


def test_files_of_others_in_the_folder_stay(tmp_path, fresh):
    (tmp_path / "model.safetensors").write_bytes(b"a model")
    left = tmp_path / f".{64 * 'a'}.0123abcd.safetensors"
    for file in (left, tmp_path / "model.safetensors"):
        file.write_bytes(b"what was there before")
        os.utime(file, (1, 1))
    cache = cache_in(tmp_path)
    cache.most = 1
    cache.put(PROMPTS[0], *fresh.encode([PROMPTS[0]]))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"no safetensors", "short", "one bit"])
def test_a_damaged_entry_is_computed_again(tmp_path, fresh, damage):
    wanted, _ = fresh.encode([PROMPTS[0]])
    encoder = encoder_in(tmp_path)
    encoder.encode([PROMPTS[0]])
    (file,) = tmp_path.iterdir()
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "one bit":
        content = bytearray(file.read_bytes())
        content[-4] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(damage)
    assert PROMPTS[0] not in encoder.cache
    assert torch.equal(encoder.encode([PROMPTS[0]])[0], wanted)
    assert PROMPTS[0] in encoder.cache, "and mended"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, fresh):
    (tmp_path / "file").write_bytes(b"")
    cache = cache_in(tmp_path / "file" / "kept")
    cache.put(PROMPTS[0], *fresh.encode([PROMPTS[0]]))
    assert PROMPTS[0] not in cache


def test_sizes_are_those_of_the_loaded_encoder(tmp_path, fresh):
    lazy = encoder_in(tmp_path)
    assert (lazy.nbytes, lazy.channels) == (fresh.nbytes, fresh.channels) and lazy._loaded is None
    assert 2 * bytes_of(open_umt5(NANO_TEXT_ENCODER), torch.bfloat16) == fresh.nbytes


@pytest.mark.parametrize(
    ("platform", "given", "wanted"),
    [
        ("linux", None, ".cache"),
        ("linux", "relative", ".cache"),
        ("darwin", None, "Library/Caches"),
        ("win32", None, "AppData/Local"),
    ],
)
def test_the_folder_is_the_users_own(tmp_path, monkeypatch, platform, given, wanted):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(text_cache.sys, "platform", platform)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / wanted / "longcat-video" / "text"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "set"))
    assert cache_folder() == tmp_path / "set" / "longcat-video" / "text"


def test_a_user_without_a_home_has_none(monkeypatch):
    def home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None
