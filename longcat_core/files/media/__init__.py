"""Read, resize and write pictures and videos. Frames are uint8 [F, H, W, 3], RGB."""

from .beside import VideoBeside
from .pictures import count_pictures, cover, read_image, resize_and_crop
from .reading import VideoReader, open_video, read_video
from .sound import check_sound
from .writing import check_output, check_output_name, estimate_bytes, write_video

__all__ = [
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
    "read_video",
    "resize_and_crop",
    "write_video",
]
