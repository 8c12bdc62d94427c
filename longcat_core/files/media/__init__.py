"""Read, resize and write pictures, videos and sound. Frames are uint8 [F, H, W, 3], RGB."""

from .beside import Clip, VideoBeside
from .pictures import count_pictures, cover, read_image, resize_and_crop
from .reading import VideoReader, open_video, read_video
from .samples import Sound
from .sound import check_sound
from .sound_reading import read_sound
from .writing import check_output, check_output_name, estimate_bytes, write_video

__all__ = [
    "Clip",
    "Sound",
    "VideoBeside",
    "VideoReader",
    "check_output",
    "check_output_name",
    "check_sound",
    "count_pictures",
    "cover",
    "estimate_bytes",
    "open_video",
    "read_image",
    "read_sound",
    "read_video",
    "resize_and_crop",
    "write_video",
]
