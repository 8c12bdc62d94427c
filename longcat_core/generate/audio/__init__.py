"""Sound to what a LongCat-Video-Avatar hears: read, leveled, encoded, cut into the windows of segments."""

from .encoder import AudioEncoder, audio_encoder_of, empty_audio_encoder, load_audio_encoder
from .speech import speech
from .voices import Embeddings, Voices, combine, embed_voices, frames_for, seconds_of, segments_for

__all__ = [
    "AudioEncoder",
    "Embeddings",
    "Voices",
    "audio_encoder_of",
    "combine",
    "embed_voices",
    "empty_audio_encoder",
    "frames_for",
    "load_audio_encoder",
    "seconds_of",
    "segments_for",
    "speech",
]
