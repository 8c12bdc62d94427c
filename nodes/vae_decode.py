"""LongCat VAE Decode: frames by our own decoder and the VAE's weights, and the video's file encoded beside it."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import InputImpl, Types, io

from ..longcat_core.errors import LongCatError
from ..longcat_core.files.media import VideoBeside
from ..longcat_core.generate.progress import DECODING, Part
from ..longcat_core.sampling.conditioning import video_frames
from .comfy_vae import decoded
from .folders import FolderNode
from .images import to_bytes
from .progress import NodeProgress
from .video import connected

# Where the outputs are in the node's declaration.
VIDEO_SLOT = 1


class VaeDecode(FolderNode):
    ID = "LongCatVAEDecode"

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: comfy.sd.VAE, fps: float) -> io.NodeOutput:
        latents = samples["samples"]
        if latents.ndim != 5:
            raise LongCatError(f"samples are {list(latents.shape)}; connect latents of a video, from a sampler")
        with ExitStack() as stack:
            file = None
            if connected(cls.hidden, VIDEO_SLOT):
                # ComfyUI removes its temporary folder when it starts and ends.
                folder = Path(folder_paths.get_temp_directory())
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"longcat-{uuid.uuid4().hex}.mp4"
                beside = stack.enter_context(VideoBeside(file, fps))
            images, done = None, 0
            total = len(latents) * video_frames(latents.shape[2])
            shown = stack.enter_context(NodeProgress([Part(total)], unit="frame", closing=False))
            shown.task.phase(DECODING)
            for one in latents.split(1):
                for part in decoded(vae, one):
                    if images is None:
                        images = part.new_empty((total, *part.shape[1:]), device=vae.output_device)
                    images[done : done + len(part)] = part
                    if file is not None:
                        # Where the part is: a GPU rounds it sooner, and copies a quarter of the bytes.
                        beside.add(to_bytes(part))
                    done += len(part)
                    shown.step(done, total)
        if file is not None:
            cls.remember([file])
            return io.NodeOutput(images, InputImpl.VideoFromFile(str(file)))
        components = Types.VideoComponents(images=images, frame_rate=Fraction(fps).limit_denominator(1001))
        return io.NodeOutput(images, InputImpl.VideoFromComponents(components))


NODES = [VaeDecode]
