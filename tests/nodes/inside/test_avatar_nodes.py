"""An avatar's nodes: the conditioning equals the golden numbers, can be sampled, and makes long videos that resume."""

from __future__ import annotations

import math

import pytest
import torch

from .golden_avatar import AUDIO, SEED, TEXT, Avatar, close

# Of the golden segments.
LENGTH, OVERLAP = 25, 5
PROMPT = "a person talks"
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


def test_the_stock_loaders_encoder(comfy, newer, voices):
    """Its weights are right, and our network runs them."""

    class Stock:
        def get_sd(self):
            whisper = comfy.core("generate.audio.whisper")
            torch.manual_seed(0)
            model = whisper.WhisperEncoder(whisper.WhisperConfig(80, 64, 4, 1, 64, 50))
            # Its positions begin as whatever memory holds.
            return {f"encoder.{name}": 0.02 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}

    found, _, fps = voices("one", audio_encoder=Stock())
    assert found["longcat_voices"].embeddings.values.shape[2:] == (5, 64) and fps == 25


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
        ("previous: width 97 is not", one, {"previous": torch.zeros(9, 64, 97, 3), "reference": latent}),
        ("masks tell several voices apart", one, {"image": picture, "person_1": mask, "person_2": mask}),
        ("connect both or neither", two, {"image": picture, "person_1": mask}),
        ("others has masks", two, {"image": picture, "others": mask}),
        ("masks say where people are in the first frame", two, {}),
        ("mask of person 1 covers no token", two, {"image": picture, "person_1": 0 * mask, "person_2": mask}),
        ("different sizes", two, {"image": picture, "person_1": mask[:, :9], "person_2": mask}),
        ("begins after the sound", one, {"image": picture, "segment": 9}),
    ):
        with pytest.raises(error, match=match):
            avatar(given, **values)
    sound = {"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000}
    with pytest.raises(error, match="the sound is silent"):
        comfy("LongCatEncodeAudio", audio_encoder=encoder, audio=sound)
    with pytest.raises(error, match="audio is from a video without sound; connect a sound"):
        comfy("LongCatEncodeAudio", audio_encoder=encoder, audio=None)
    with pytest.raises(error, match="audio_2 is from a video without sound; connect a sound"):
        comfy("LongCatEncodeAudio", audio_encoder=encoder, audio=sound, audio_2=None)
    spoiled = sound | {"waveform": torch.full((1, 1, 16000), math.nan)}
    with pytest.raises(error, match="audio_2 has samples that are not finite; connect another sound"):
        comfy("LongCatEncodeAudio", audio_encoder=encoder, audio=sound, audio_2=spoiled)
    with pytest.raises(error, match="only one person speaks"):
        voices("one", others=True)
    with pytest.raises(error, match="connect LongCat Audio Encoder Loader"):
        comfy("LongCatEncodeAudio", audio_encoder=object(), audio=sound | {"waveform": torch.randn(1, 1, 16000)})
    with pytest.raises(error, match="connect LongCat Encode Audio instead"):
        encoder.encode_audio(sound["waveform"], 16000)
    with pytest.raises(error, match="the box of person 2 reaches from 90% to 50%"):
        comfy("LongCatAvatarBoxes", image=picture, left_2=90, right_2=50)


# --- long videos -----------------------------------------------------------------------------------------------------


class Clip:
    """A text encoder of the golden avatar: its two texts."""

    def __init__(self, avatar: Avatar) -> None:
        self.texts, self.patcher = avatar.texts, avatar.model

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens, **options):
        return [[self.texts[0 if tokens == PROMPT else 1], {}]]


@pytest.fixture
def run(comfy, newer, encoder, vae, picture):
    def make(folder="avatar", voices=("one",), **values):
        given = {"model": newer.model, "clip": Clip(newer), "vae": vae, "audio_encoder": encoder, "prompts": PROMPT}
        given |= {"segments": 0, "seed": 5, "steps": 2, "guidance": 3.0, "audio_guidance": 3.0, "mode": "base"}
        given |= {"image": picture, "negative_prompt": "", "folder": folder}
        return comfy("LongCatAvatarLongVideo", **spoken(newer, *voices), **SIZE, **given | values)

    return make


def test_the_whole_sound_becomes_a_video_that_ends_with_it(comfy, newer, run, tmp_path, forwards):
    from comfy_api.latest import InputImpl

    images, report, video = run()
    samples = newer.voices["one.wave"].shape[-1]
    total = -(-samples * 25 // 16000)
    assert len(images) == total > LENGTH and len(report.splitlines()) >= 2
    parts = video.get_components()
    assert parts.frame_rate == 25 and abs(parts.audio["waveform"].shape[-1] - total * 640) <= 1
    path = tmp_path / "spoken.mp4"
    video.save_to(str(path))
    back = InputImpl.VideoFromFile(str(path)).get_components()
    assert len(back.images) == total and back.audio["waveform"].shape[-1] / back.audio["sample_rate"] == pytest.approx(
        total / 25, abs=0.1
    )
    half = video.as_trimmed(0.4, 0.4)
    assert len(half.reel) == 10 and half.get_components().audio["waveform"].shape[-1] == 6400
    # Queued again it reads what is there; with another sound it begins another take.
    count = len(forwards)
    again = run()
    assert len(forwards) == count and torch.equal(again[0].dense(), images.dense())
    run(voices=("two",))
    assert len(forwards) > count


def test_a_lost_segment_is_made_again_as_it_was(comfy, run, forwards):
    first = run(folder="lost")[0].dense()
    (comfy.folder / "output" / "lost" / "segment-002" / "frames.mkv").unlink()
    forwards.clear()
    assert torch.equal(run(folder="lost")[0].dense(), first) and forwards


def test_segments_equal_the_core(comfy, newer, run):
    """Segment 0 from the image, segment 1 from the end of it, encoded again, with its first latent as reference."""
    from safetensors.torch import load_file

    run(folder="equal", seed=SEED, guidance=TEXT, audio_guidance=AUDIO, reference_position=4, skip=1)
    normalized = newer.model.model.process_latent_in
    first, second = (
        normalized(
            load_file(comfy.folder / "output" / "equal" / f"segment-00{i}" / "latents.safetensors")["latents"].float()
        )
        for i in (1, 2)
    )
    avatar, cache = comfy.core("sampling.avatar"), comfy.core("model.kv_cache")
    image, clean = first[:, :, :1], second[:, :, :2]
    assert close(first, newer.expected(newer.audio(), image, steps=2))
    given = newer.model.model.process_latent_out(image)
    reference = avatar.ReferenceFrame(given, cache.Reference(4, 1))
    heard = avatar.Audio(newer.voices["one.segment1"], None, AUDIO)
    assert close(second, newer.expected(heard, clean, reference, steps=2, seed=SEED + 1))


def test_two_people_and_one_segment(comfy, run, picture):
    boxes = comfy("LongCatAvatarBoxes", image=picture)
    given = {"voices": ("one", "two"), "segments": 1}
    plain = run(folder="two", **given)[0].dense()
    drawn = run(folder="drawn", person_1=boxes[0], person_2=boxes[1], **given)[0].dense()
    other = run(folder="other", first_voice="right", **given)[0].dense()
    assert torch.equal(plain, drawn) and not torch.equal(plain, other) and len(plain) == LENGTH


def test_refusals_of_long_videos(comfy, run, model, picture):
    error, mask = comfy.core("errors").LongCatError, torch.ones(1, 64, 96)
    for match, values in (
        ("the model does not hear audio", {"model": model}),
        ("who is where among several people", {"voices": ("one", "two"), "image": None}),
        ("connect both or neither", {"voices": ("one", "two"), "person_1": mask}),
        ("holds 2 images", {"image": picture.repeat(2, 1, 1, 1)}),
        ("has exactly 8 steps", {"mode": "distilled", "guidance": 1.0, "audio_guidance": 1.0}),
        ("is not inside ComfyUI's output folder", {"folder": "../away"}),
    ):
        with pytest.raises(error, match=match):
            run(**{"folder": "refused"} | values)
    assert not (comfy.folder / "output" / "refused").exists()


def test_the_bundled_avatar_says_the_sample_speech(comfy, clip):
    """From the three loaders to the frames, each of two mouths with its own voice."""
    scene = "a red circle face talks and a green square face talks on a gray background"
    model = comfy("LongCatModelLoader", model_name="longcat_nano_avatar_bf16.safetensors", weight_dtype="fp32")
    vae = comfy("VAELoader", vae_name="longcat_nano_avatar_vae_bf16.safetensors")
    encoder = comfy("LongCatAudioEncoderLoader", audio_encoder_name="longcat_nano_whisper_bf16.safetensors")
    image, audio, audio_2 = comfy("LongCatSampleSpeech", scene=scene)
    assert image.shape == (1, 64, 96, 3) and audio["waveform"].shape == (1, 1, 46720)
    voices, segments, _ = comfy(
        "LongCatEncodeAudio", audio_encoder=encoder, audio=audio, audio_2=audio_2, length=33, overlap=13
    )
    assert segments == 3
    text = comfy("CLIPTextEncode", clip=clip, text=scene)
    size = SIZE | {"length": 33, "overlap": 13}
    positive, negative, latent, *_ = comfy(
        "LongCatAvatar", positive=text, negative=text, vae=vae, voices=voices, image=image, audio_guidance=1.0, **size
    )
    conds = {"positive": positive, "negative": negative}
    settings = {"seed": 1, "steps": 12, "guidance": 1.0, "mode": "base"}
    sampled = comfy("LongCatSampler", model=model, latent_image=latent, **conds, **settings)
    frames = comfy("LongCatVAEDecode", samples=sampled, vae=vae)[0]
    scorer, measure = comfy.core("nano.avatar.scorer"), comfy.core("nano.avatar.measure")
    sounds, speech = comfy.core("nano.avatar.sounds"), comfy.core("generate.audio.speech")
    background, faces = scorer.look((frames * 255).round().to(torch.uint8).numpy(), 2)
    assert background == "gray" and [(face.head, face.color) for face in faces] == [
        ("circle", "red"),
        ("square", "green"),
    ]
    waves = [speech.leveled(sound["waveform"][0, 0].double()) for sound in (audio, audio_2)]
    assert measure.pair_is_right(faces, [sounds.opening(wave, 33).numpy() for wave in waves])
