"""Nano's text encoder: what it is taught, and that the embedded one knows whose color is whose."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import read_tensors
from longcat_core.generate.paths import NANO_TEXT_ENCODER
from longcat_core.generate.text import load_text_encoder
from longcat_core.nano.reading import NO_ANSWER, QUESTIONS, answers, train_text_encoder
from longcat_core.nano.vocabulary import new_text_encoder, train_vocabulary
from longcat_core.nano.world import Actor, Scene, actor_spans, caption, corpus, sample_scene

from ..support.captions import parse_caption

TOKENS = 32
OWN = ("shape", "color", "motion")


@pytest.fixture(scope="module")
def processor():
    import sentencepiece

    proto = read_tensors(NANO_TEXT_ENCODER, names=["spiece_model"])["spiece_model"]
    return sentencepiece.SentencePieceProcessor(model_proto=proto.numpy().tobytes())


def test_spans_cover_each_actors_words():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng, two_shapes=0.7)
        text = caption(scene, rng)
        spans = actor_spans(text)
        assert len(spans) == len(scene.actors)
        for (start, end), actor in zip(spans, scene.actors, strict=True):
            assert parse_caption(f"{text[start:end]} on {scene.background}").actors == (actor,)


def test_spans_of_a_text_of_another_world_are_refused():
    with pytest.raises(LongCatError, match="not a caption of the nano world"):
        actor_spans("a dog runs")


def test_answers_belong_to_their_tokens(processor):
    scene = Scene("blue", (Actor("circle", "red", "left"), Actor("cross", "green", "pulse")))
    text = caption(scene)
    words = [piece.strip("▁") for piece in processor.encode(text, out_type=str)]
    assert words == text.split(), "one token a word, or the rows below are others"
    rows = answers(processor, text, scene, TOKENS)
    names = [
        {name: QUESTIONS[name][i] for name, i in zip(QUESTIONS, row, strict=True) if i != NO_ANSWER} for row in rows
    ]
    everywhere = {"background": "blue", "actors": 2}
    first = everywhere | {"shape": "circle", "color": "red", "motion": "left"}
    second = everywhere | {"shape": "cross", "color": "green", "motion": "pulse"}
    for word, answer in zip([*words, "EOS"], names, strict=False):
        owner = first if word in ("red", "circle", "moves", "left") else everywhere
        assert answer == (second if word in ("green", "cross", "pulses") else owner), word
    assert not any(names[len(words) + 1 :]), "padding is asked nothing"


def test_a_fresh_encoder_learns_to_read():
    sentencepiece = pytest.importorskip("sentencepiece", minversion="0.2.3")
    vocabulary = train_vocabulary(corpus(2000))
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    torch.manual_seed(0)
    encoder = new_text_encoder(vocabulary, d_model=64, d_ff=64, num_layers=1, num_heads=2).train()
    settings = {"tokens": TOKENS, "seed": 0, "device": torch.device("cpu"), "captions": 200}
    untaught = train_text_encoder(encoder, processor, steps=1, **settings)
    assert untaught < 0.4
    assert train_text_encoder(encoder, processor, steps=60, **settings) > untaught + 0.2


def test_the_embedded_encoder_knows_whose_attributes_are_whose(processor):
    """A linear probe on the token of each shape's word, fitted on some captions, names that actor's attributes."""
    rng = random.Random("probe")
    scenes = [sample_scene(rng, two_shapes=1.0) for _ in range(600)]
    texts = [caption(scene) for scene in scenes]
    context, _ = load_text_encoder(NANO_TEXT_ENCODER).encode(texts, TOKENS)
    features, wanted = [], []
    for row, text, scene in zip(context, texts, scenes, strict=True):
        pieces = processor.encode(text, out_type=str)
        for actor in scene.actors:
            features.append(row[pieces.index(f"▁{actor.color}") + 1])  # the shape stands behind its color
            wanted.append([QUESTIONS[name].index(getattr(actor, name)) for name in OWN])
    features, wanted = torch.stack(features), torch.tensor(wanted)
    features = torch.cat((features, torch.ones(len(features), 1)), dim=1)
    train, test = slice(0, 900), slice(900, None)
    ridge = features[train].T @ features[train] + 1e-2 * torch.eye(features.shape[1])
    for i, name in enumerate(OWN):
        target = F.one_hot(wanted[train, i], len(QUESTIONS[name])).float()
        answer = (features[test] @ torch.linalg.solve(ridge, features[train].T @ target)).argmax(-1)
        assert (answer == wanted[test, i]).float().mean() > 0.95, name
