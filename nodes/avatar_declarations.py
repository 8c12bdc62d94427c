"""The nodes of LongCat-Video-Avatar, declared as `declarations` declares all others. Does not import ComfyUI."""

from __future__ import annotations

from dataclasses import replace

from ..longcat_core.generate.options import FRAME_MULTIPLE
from ..longcat_core.sampling.guidance import AVATAR_NEGATIVE_PROMPT
from .fields import Node, Socket, long_text, own, shared
from .widgets import (
    CLIP,
    CONTINUATION,
    DISTILLED_NEWER,
    DISTILLED_OLDER,
    FIRST_SEED,
    GIVEN_SIZES,
    GUIDANCE,
    GUIDANCE_UNTIL,
    KV_CACHE,
    LONG_MODES,
    LOSSY_CHANGE,
    MODEL,
    NEGATIVE,
    POSITIVE,
    SPEED,
    VAE,
    folder,
)

_VOICES = Socket("voices", "AudioEncoderOutput", "from LongCat Encode Audio")
_ENCODER = Socket("audio_encoder", "AudioEncoder", "from LongCat Audio Encoder Loader; the stock Load Audio Encoder "
                  "does for a whole Whisper-large-v3 and for wav2vec2-base")  # fmt: skip
_AUDIO = Socket("audio", "Audio", "what the first person says, or the only one; music makes the mouth follow the "
                "music, so remove it first")  # fmt: skip
_AUDIO_2 = Socket("audio_2", "Audio", "what a second person says", optional=True)
_ORDER = own("order", "choice", "with two sounds. together: both begin at once. in turn: the second begins when the "
             "first has ended", "together", choices=("together", "in turn"), optional=True)  # fmt: skip
_PERSON_1 = Socket("person_1", "Mask", "where the person of the first voice is in the image; with two voices and no "
                   "masks, one half of the image", optional=True)  # fmt: skip
_PERSON_2 = replace(_PERSON_1, name="person_2", help="where the person of the second voice is in the image")
_OTHERS = replace(_PERSON_1, name="others", help="further people who do not speak, one mask each; LongCat Encode Audio "
                  "must have others on")  # fmt: skip
_FIRST_VOICE = own("first_voice", "choice", "with two voices and no masks: the side of the image on which the person "
                   "of the first voice is", "left", choices=("left", "right"), optional=True)  # fmt: skip
_AUDIO_GUIDANCE = own("audio_guidance", "number", "how far from silence to go: 4, more for clearer lips; 1 with the "
                      "DMD LoRA", 4.0, least=0.0, most=20.0, step=0.1)  # fmt: skip
_REFERENCE_POSITION = own("reference_position", "whole", "for a continuation: which latent frame of the segment the "
                          "reference stands for; far away, such as -10 or 30, against repeated motion", 10,
                          least=-1000, most=1000, optional=True, advanced=True)  # fmt: skip
_SKIP = own("skip", "whole", "for a continuation: generated frames this close to the reference's position do not see "
            "it; 0: all see it. A range that sticks out of the segment has no effect", 3, least=0, most=1000,
            optional=True, advanced=True)  # fmt: skip
_OVERLAP = shared("overlap", "long", help="number of frames that a segment shares with the previous one", optional=True,
                  advanced=True)  # fmt: skip
_SIZES = GIVEN_SIZES[:-1]


def _side(person: int, name: str, default: int, what: str) -> object:
    return own(f"{name}_{person}", "whole", f"{what} of the box of person {person}, in percent of the image", default,
               least=0, most=100)  # fmt: skip


_BOXES = tuple(
    _side(person, name, default, what)
    for person, (left, right) in ((1, (5, 45)), (2, (55, 95)))
    for name, default, what in (
        ("left", left, "left edge"),
        ("top", 10, "top edge"),
        ("right", right, "right edge"),
        ("bottom", 90, "bottom edge"),
    )
)

AVATAR_NODES: dict[str, Node] = {
    "LongCatAudioEncoderLoader": Node(
        "LongCat Audio Encoder Loader",
        "Loads the audio encoder of LongCat-Video-Avatar, in any form of file.",
        (own("audio_encoder_name", "choice", "file in ComfyUI's audio_encoders folders: Whisper-large-v3 for avatars "
             "1.5, chinese-wav2vec2-base for 1.0, longcat_nano_whisper for the nano avatar"),),
        (Socket("", "AudioEncoder", "for LongCat Encode Audio"),),
    ),
    "LongCatEncodeAudio": Node(
        "LongCat Encode Audio",
        "Turns speech into what LongCat-Video-Avatar hears: loudness as in training, and the states of the audio "
        "encoder. The stock AudioEncoderEncode computes something else.",
        (
            _ENCODER,
            _AUDIO,
            _AUDIO_2,
            _ORDER,
            own("others", "switch", "with two sounds: further people are in the image, who are silent", False,
                optional=True, advanced=True),
            own("seed", "whole", "seed of the faint noise that avatars 1.0 add to the sound; 1.5 has none", 0, least=0,
                most=2**32 - 1, optional=True, advanced=True),
            shared("frames", name="length", help="number of frames of a segment", least=1 + FRAME_MULTIPLE,
                   optional=True, advanced=True),
            _OVERLAP,
        ),
        (
            Socket("voices", "AudioEncoderOutput", "for LongCat Avatar"),
            Socket("segments", "Int", "number of segments that the sound takes"),
            Socket("fps", "Float", "frames a second of the video, by the encoder: 25 for Whisper, 16 for wav2vec2"),
        ),
    ),
    "LongCatAvatar": Node(
        "LongCat Avatar",
        "Adds to the prompts what people say in one segment of a video, and makes the latent for LongCat Sampler: from "
        "text alone, from an image of one or two people, or as the continuation of a segment.",
        (
            POSITIVE,
            replace(NEGATIVE, help="negative prompt: what the video should avoid"),
            VAE,
            _VOICES,
            *_SIZES,
            own("segment", "whole", "which segment of the sound this is, counted from 0", 0, least=0, most=9999),
            _AUDIO_GUIDANCE,
            Socket("image", "Image", "a single image, the first frame of the first segment", optional=True),
            Socket("previous", "Image,Video", "to continue: the frames of the previous segment, whose size the video "
                   "keeps", optional=True),
            Socket("reference", "Latent", "to continue: the latents of the first segment, whose first frame shows who "
                   "the people are", optional=True),
            _PERSON_1,
            _PERSON_2,
            _OTHERS,
            _FIRST_VOICE,
            _REFERENCE_POSITION,
            _SKIP,
            _OVERLAP,
        ),
        (
            Socket("positive", "Conditioning", "with the audio"),
            Socket("negative", "Conditioning", "with silence: under a stock sampler cfg is the scale of text and audio "
                   "at once, and LongCat Sampler and LongCat Guider set both apart"),
            Socket("latent", "Latent", "for latent_image of LongCat Sampler"),
            Socket("audio", "Audio", "the sound of this segment, for Create Video; of a continuation that of its new "
                   "frames"),
            Socket("fps", "Float", "frames a second of the video"),
        ),
    ),
    "LongCatAvatarLongVideo": Node(
        "LongCat Avatar Long Video",
        "Generates a video of one or two people who say a whole sound, in segments, each of which starts from the end "
        "of the previous one. Every finished segment is saved, and an interrupted run resumes from there. The video "
        "ends with the sound.",
        (
            replace(MODEL, help="LongCat-Video-Avatar, with the DMD LoRA for mode distilled of version 1.5"),
            CLIP,
            VAE,
            _ENCODER,
            _AUDIO,
            long_text(own("prompts", "text", "one prompt per line, one line per segment; further segments use the last "
                          "line. Say that the person talks or sings", "")),
            long_text(shared("negative_prompt", default=AVATAR_NEGATIVE_PROMPT)),
            *_SIZES,
            own("segments", "whole", "number of segments at most; 0: as many as the sound takes", 0, least=0,
                most=9999),
            FIRST_SEED,
            own("steps", "whole", "number of denoising steps: 50, or for distilled 8 of version 1.5 and 16 of 1.0", 50,
                least=1, most=1000, schedules={"distilled": (8, 50), **DISTILLED_NEWER, **DISTILLED_OLDER}),
            replace(GUIDANCE, row=replace(GUIDANCE.row, help="scale of the text: 4, or 1 for distilled")),
            replace(_AUDIO_GUIDANCE, row=replace(_AUDIO_GUIDANCE.row, schedules={"distilled": (1.0, 1.0)})),
            own("mode", "choice", "schedule of the first segment and of the others. distilled: guidance 1, with the "
                "DMD LoRA of version 1.5, or the cfg_step LoRA on 1.0", CONTINUATION, choices=tuple(LONG_MODES)),
            folder("longcat/avatar"),
            Socket("image", "Image", "a single image of the people, which becomes the first frame", optional=True),
            _AUDIO_2,
            _ORDER,
            _PERSON_1,
            _PERSON_2,
            replace(_OTHERS, help="further people who do not speak, one mask each"),
            _FIRST_VOICE,
            _REFERENCE_POSITION,
            _SKIP,
            _OVERLAP,
            KV_CACHE,
            LOSSY_CHANGE,
            GUIDANCE_UNTIL,
            SPEED,
        ),
        (
            Socket("images", "Image", "all frames. Built only if connected: a long video may not fit into memory"),
            Socket("report", "String", "the segments, and how the color changes at the joins"),
            Socket("video", "Video", "the same frames with the sound for Save Video, read from the folder one by one"),
        ),
        hidden=("unique_id", "dynprompt", "extra_pnginfo"),
    ),
    "LongCatAvatarBoxes": Node(
        "LongCat Avatar Boxes",
        "Draws a box around each of two people, as masks for LongCat Avatar, and shows them on the image.",
        (Socket("image", "Image", "the image of both people"), *_BOXES),
        (Socket("person_1", "Mask", "for LongCat Avatar"), Socket("person_2", "Mask", "for LongCat Avatar")),
        shows=True,
    ),
}  # fmt: skip
