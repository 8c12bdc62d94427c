"""LongCat-Video without a user interface: network, checkpoints, sampling, tasks, training, benchmark.

The names in `__all__` are the Python interface; docs/python.md explains them. Importing this package imports nothing
heavy, downloads nothing and prints nothing: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import BackendUnavailable, CheckpointError, LongCatError
    from .files.media import Sound, read_image, read_sound, read_video, write_video
    from .generate.audio import AudioEncoder, Embeddings, Voices, combine, load_audio_encoder
    from .generate.avatar import AvatarRequest, avatar_video, spoken_frames
    from .generate.calibration import read_calibration
    from .generate.engine import Generation
    from .generate.long_video import LongVideoRequest, long_video, new_frames, segment_folder, spread_prompts
    from .generate.paths import ModelPaths
    from .generate.pipeline import Pipeline
    from .generate.refine import RefineRequest, piece_folder, refine, refine_in_folder
    from .generate.request import GenerateRequest, work_of
    from .optimize.block_sparse import BlockSparse
    from .optimize.plan import Plan, Work
    from .optimize.sparse.settings import Densities, Sparse
    from .optimize.switches import Optimizations
    from .sampling.sampler import Interrupted, Step
    from .sampling.schedules import Schedule, make_schedule

__version__ = "0.1.0"

__all__ = [
    "AudioEncoder",
    "AvatarRequest",
    "BackendUnavailable",
    "BlockSparse",
    "CheckpointError",
    "Densities",
    "Embeddings",
    "GenerateRequest",
    "Generation",
    "Interrupted",
    "LongCatError",
    "LongVideoRequest",
    "ModelPaths",
    "Optimizations",
    "Pipeline",
    "Plan",
    "RefineRequest",
    "Schedule",
    "Sound",
    "Sparse",
    "Step",
    "Voices",
    "Work",
    "__version__",
    "avatar_video",
    "combine",
    "load_audio_encoder",
    "long_video",
    "make_schedule",
    "new_frames",
    "piece_folder",
    "read_calibration",
    "read_image",
    "read_sound",
    "read_video",
    "refine",
    "refine_in_folder",
    "segment_folder",
    "spoken_frames",
    "spread_prompts",
    "work_of",
    "write_video",
]

# Where each name lives, for `__getattr__`; the imports above say the same to type checkers.
_HOMES = {
    "errors": ("BackendUnavailable", "CheckpointError", "LongCatError"),
    "files.media": ("Sound", "read_image", "read_sound", "read_video", "write_video"),
    "generate.audio": ("AudioEncoder", "Embeddings", "Voices", "combine", "load_audio_encoder"),
    "generate.avatar": ("AvatarRequest", "avatar_video", "spoken_frames"),
    "generate.calibration": ("read_calibration",),
    "generate.engine": ("Generation",),
    "generate.long_video": ("LongVideoRequest", "long_video", "new_frames", "segment_folder", "spread_prompts"),
    "generate.paths": ("ModelPaths",),
    "generate.pipeline": ("Pipeline",),
    "generate.refine": ("RefineRequest", "piece_folder", "refine", "refine_in_folder"),
    "generate.request": ("GenerateRequest", "work_of"),
    "optimize.block_sparse": ("BlockSparse",),
    "optimize.plan": ("Plan", "Work"),
    "optimize.sparse.settings": ("Densities", "Sparse"),
    "optimize.switches": ("Optimizations",),
    "sampling.sampler": ("Interrupted", "Step"),
    "sampling.schedules": ("Schedule", "make_schedule"),
}


# Type checkers would take any name for an attribute of this module if they saw this function.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
