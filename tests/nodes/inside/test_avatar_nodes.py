"""The nodes that make an avatar's conditioning: what they give equals the golden numbers, and can be sampled."""

from __future__ import annotations

import pytest
import torch

from .golden_avatar import Avatar, close

# Of the golden segments.
LENGTH, OVERLAP = 25, 5
SIZE = {"resolution": "custom", "width": 96, "height": 64, "length": LENGTH, "overlap": OVERLAP}


@pytest.fixture(scope="module")
def newer(comfy) -> Avatar:
    return Avatar(comfy, "v1_5")


@pytest.fixture(scope="module")
def encoder(comfy, newer):
    from safetensors.torch import load_file

    state = load_file(newer.folder / "whisper.safetensors")
    name = comfy.save("audio_encoders", "whisper.safetensors", state, {"config": '{"heads": 2}'})
    return comfy("LongCatAudioEncoderLoader", audio_encoder_name=name)


def spoken(newer, *voices):
    sounds = [{"waveform": newer.voices[f"{voice}.wave"].view(1, 1, -1), "sample_rate": 16000} for voice in voices]
    return dict(zip(("audio", "audio_2"), sounds, strict=False))


@pytest.fixture(scope="module")
def voices(comfy, newer, encoder):
    def encode(*names, **values):
        given = {"audio_encoder": encoder, "length": LENGTH, "overlap": OVERLAP} | values
        return comfy("LongCatEncodeAudio", **spoken(newer, *names), **given)

    return encode


@pytest.fixture(scope="module")
def picture(newer):
    return newer.data["image"][None].float() / 255


@pytest.fixture(scope="module")
def avatar(comfy, newer, vae):
    def make(voices, **values):
        names = ("positive", "negative")
        texts = {name: [[text, {"pooled_output": None}]] for name, text in zip(names, newer.texts, strict=True)}
        given = {"vae": vae, "voices": voices, "segment": 0, "audio_guidance": 4.5} | SIZE | texts | values
        return comfy("LongCatAvatar", **given)

    return make


def audio_of(conds):
    return conds[0][1]["longcat_audio"]


def test_speech_becomes_golden_windows(newer, voices, avatar, picture):
    found, segments, fps = voices("one")
    assert segments == 2 and fps == 25.0
    positive, negative, latent, sound, rate = avatar(found, image=picture)
    assert (audio_of(positive).windows - newer.voices["one.segment0"]).abs().max() < 2e-5
    assert audio_of(positive).guidance_scale == 4.5 and not audio_of(negative).windows.any()
    assert positive[0][1]["pooled_output"] is None and "longcat_reference" not in positive[0][1]
    assert (
        latent["samples"].shape == newer.shape
        and (latent["noise_mask"][0, 0, :, 0, 0] == 0).tolist() == [True] + [False] * 6
    )
    assert sound["waveform"].shape == (1, 1, LENGTH * 16000 // 25) and rate == 25.0
    got = newer.sampled({"positive": positive, "negative": negative}, latent, steps=2)
    clean = newer.model.model.process_latent_in(latent["samples"])[:, :, :1]
    assert close(got, newer.expected(audio_of(positive), clean, steps=2))


def test_a_continuation_has_the_sound_of_its_new_frames(newer, voices, avatar, picture):
    found, *_ = voices("one")
    first = {"samples": newer.latent(newer.data["image.latent"])["samples"]}
    frames = picture.repeat(9, 1, 1, 1)
    given = {"previous": frames, "reference": first, "reference_position": 4, "skip": 1, "segment": 1}
    positive, negative, latent, sound, _ = avatar(found, **given)
    assert (audio_of(positive).windows - newer.voices["one.segment1"]).abs().max() < 2e-5
    reference = positive[0][1]["longcat_reference"]
    assert torch.equal(reference.latents, first["samples"][:, :, :1]) and reference.at == (4, 1)
    assert reference is negative[0][1]["longcat_reference"]
    assert int((latent["noise_mask"][0, 0, :, 0, 0] == 0).sum()) == 2
    assert sound["waveform"].shape[-1] == (LENGTH - OVERLAP) * 640
    got = newer.sampled({"positive": positive, "negative": negative}, latent, steps=2)
    clean = newer.model.model.process_latent_in(latent["samples"])[:, :, :2]
    assert close(got, newer.expected(audio_of(positive), clean, reference, steps=2))


def test_two_people(comfy, newer, voices, avatar, picture):
    found, *_ = voices("one", "two")
    masks = newer.forward["duo.masks.source"]
    wide = torch.zeros(1, *masks.shape[1:], 3)
    positive, *_ = avatar(found, image=wide, person_1=masks[:1], person_2=masks[1:2])
    expected = newer.audio(2)
    assert torch.equal(audio_of(positive).classes, expected.classes)
    assert (audio_of(positive).windows - expected.windows).abs().max() < 2e-5
    # Without masks: the boxes of LongCat Avatar Boxes, on either side.
    boxes = comfy("LongCatAvatarBoxes", image=picture)
    drawn = audio_of(avatar(found, image=picture, person_1=boxes[0], person_2=boxes[1])[0])
    plain, other = (audio_of(avatar(found, image=picture, first_voice=side)[0]) for side in ("left", "right"))
    assert torch.equal(drawn.classes, plain.classes) and torch.equal(other.classes, plain.classes[:, [1, 0, 2]])
    silent, *_ = voices("one", "two", others=True)
    trio = audio_of(avatar(silent, image=picture, others=boxes[0])[0])
    assert len(trio.windows) == 3 and trio.classes.shape[1] == 4


def test_in_turn(newer, voices):
    both, segments, _ = voices("one", "two", order="in turn")
    alone, *_ = voices("one")
    lengths = [newer.voices[f"{name}.wave"].shape[-1] for name in ("one", "two")]
    assert both["audio_samples"] == sum(lengths) and alone["audio_samples"] == lengths[0] and segments > 2


def test_sizes(voices, avatar):
    found, *_ = voices("one")
    for resolution, size in (("480p", (60, 104)), ("720p", (96, 160))):
        assert avatar(found, resolution=resolution)[2]["samples"].shape[-2:] == size
    assert avatar(found, resolution="480p", image=torch.zeros(1, 90, 60, 3))[2]["samples"].shape[-2:] == (96, 64)


def test_refusals(comfy, voices, avatar, picture, encoder):
    one, *_ = voices("one")
    two, *_ = voices("one", "two")
    error, mask = comfy.core("errors").LongCatError, torch.ones(1, 64, 96)
    frames, latent = picture.repeat(9, 1, 1, 1), {"samples": torch.zeros(1, 16, 7, 8, 12)}
    for match, given, values in (
        ("is not from LongCat Encode Audio", {"audio_samples": 3}, {}),
        ("takes previous and reference", one, {"previous": frames}),
        ("connect one of them", one, {"previous": frames, "reference": latent, "image": picture}),
        ("fewer than the overlap of 5", one, {"previous": frames[:3], "reference": latent}),
        ("connect the latents of the first segment", one, {"previous": torch.zeros(9, 32, 32, 3), "reference": latent}),
        ("masks tell several voices apart", one, {"image": picture, "person_1": mask, "person_2": mask}),
        ("connect both or neither", two, {"image": picture, "person_1": mask}),
        ("others has masks", two, {"image": picture, "others": mask}),
        ("masks say where people are in the first frame", two, {}),
        ("mask 1 of 3 covers no token", two, {"image": picture, "person_1": 0 * mask, "person_2": mask}),
        ("different sizes", two, {"image": picture, "person_1": mask[:, :9], "person_2": mask}),
        ("begins after the sound", one, {"image": picture, "segment": 9}),
    ):
        with pytest.raises(error, match=match):
            avatar(given, **values)
    sound = {"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000}
    with pytest.raises(error, match="the sound is silent"):
        comfy("LongCatEncodeAudio", audio_encoder=encoder, audio=sound)
    with pytest.raises(error, match="only one person speaks"):
        voices("one", others=True)
    with pytest.raises(error, match="connect LongCat Audio Encoder Loader"):
        comfy("LongCatEncodeAudio", audio_encoder=object(), audio=sound | {"waveform": torch.randn(1, 1, 16000)})
    with pytest.raises(error, match="connect LongCat Encode Audio instead"):
        encoder.encode_audio(sound["waveform"], 16000)
    with pytest.raises(error, match="the box of person 2 reaches from 90% to 50%"):
        comfy("LongCatAvatarBoxes", image=picture, left_2=90, right_2=50)
