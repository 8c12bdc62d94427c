"""LongCat Avatar Long Video: a whole sound as a video of who says it, saved segment by segment."""

from __future__ import annotations

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..longcat_core.files.regular import lines_of
from ..longcat_core.generate import long_video
from ..longcat_core.generate.audio import Embeddings, segments_for
from ..longcat_core.generate.avatar import AvatarRequest, avatar_video
from ..longcat_core.generate.options import LOSSY_CHANGES
from ..longcat_core.generate.progress import sampled
from ..longcat_core.generate.request import RELEASED, GenerateRequest
from ..longcat_core.generate.speeds import EXACT
from ..longcat_core.sampling.conditioning import latent_frames, latent_shape
from .audio import HEARING, combined, encoder_of, on_device
from .avatar import people_of, size_of
from .checks import check_length, check_ranges, check_size
from .engine import ComfyEngine, weights_hash
from .folders import FolderNode, check_folder, output_folder, written_out
from .images import one_image
from .long_video import Gathered, say
from .models import distilled_notes, require_longcat, until_notes
from .progress import NodeProgress, begins
from .sampling import latent_tokens
from .sounds import UNCONNECTED
from .speed import with_speed
from .video import check_fits
from .widgets import CUSTOM, LONG_MODES

NAME = "LongCat Avatar Long Video"


class AvatarLongVideo(FolderNode):
    ID = "LongCatAvatarLongVideo"

    @classmethod
    def validate_inputs(
        cls, resolution=None, width=None, height=None, length=None, segments=None, seed=None, steps=None,
        guidance=None, audio_guidance=None, mode=None, folder=None, order=None, first_voice=None,
        reference_position=None, skip=None, overlap=None,
    ) -> bool:  # fmt: skip
        check_ranges(cls.ID, {name: value for name, value in locals().items() if name not in ("cls", "folder")})
        check_size(width, height, resolution)
        check_length(length, overlap)
        size = (width or 0) * (height or 0) if resolution == CUSTOM else 0
        check_folder(folder, 2 * (length or 0) * size, long_video.segment_folder)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, audio_encoder, audio, prompts, negative_prompt, resolution, width, height, length,
        segments, seed, steps, guidance, audio_guidance, mode, folder, image=None, audio_2=UNCONNECTED,
        order="together", person_1=None, person_2=None, others=None, first_voice="left", reference_position=10, skip=3,
        overlap=13, kv_cache="exact", lossy_change=LOSSY_CHANGES[0], guidance_until=1.0, speed=EXACT,
    ) -> io.NodeOutput:  # fmt: skip
        require_longcat(model, NAME)
        encoder, voices = encoder_of(audio_encoder), combined(audio, audio_2, order)
        defaults = replace(RELEASED, audio=model.model.network.config.audio)
        encoder.check(defaults.audio)
        given = None if image is None else one_image(image)
        height, width = size_of(resolution, width, height, given, None)
        schedule, later = LONG_MODES[mode]
        strongest = max(1.0, guidance, audio_guidance)
        notes = [*distilled_notes(model, schedule, strongest), *until_notes(strongest, guidance_until)]
        shape, clean = latent_shape(length, height, width), latent_frames(overlap)
        model, guidance_until, found = with_speed(
            model, speed, mode=schedule, guidance=strongest, guidance_until=guidance_until,
            tokens=latent_tokens((1, *shape), clean),
        )  # fmt: skip
        count = segments_for(voices.seconds, encoder.fps, length, overlap)
        count = min(segments, count) if segments else count
        folder = written_out(folder, cls.hidden, width, height)
        kept = long_video.segment_folder(output_folder(folder), lossy_change, say)
        texts = tuple(lines_of(prompts)) or ("",)
        engine = ComfyEngine(NAME, model, clip, vae, [*texts, negative_prompt], defaults)
        made_by = engine.settings() | {"audio encoder": weights_hash(encoder.model)}
        first = GenerateRequest(
            texts[0], negative_prompt=negative_prompt, height=height, width=width, frames=length, steps=steps,
            guidance_scale=guidance, seed=seed, schedule=schedule, kv_cache=kv_cache, given=given,
            guidance_until=guidance_until,
        )  # fmt: skip
        request = AvatarRequest(
            first, voices, texts, people_of(person_1, person_2, others, first_voice), count, audio_guidance,
            overlap, later, reference_position, skip, made_by, engine.lossy(),
        ).filled(defaults)  # fmt: skip
        check_fits(cls.hidden, 0, request.total_frames, height, width)
        notes, report = [*notes, *found, *request.notes()], []
        for note in dict.fromkeys(notes):
            logging.warning("LongCat: %s", note)

        def hear() -> Embeddings:
            begins(HEARING)
            with on_device(encoder):
                return request.embed(encoder)

        parts = [sampled(later if i else schedule, steps, "later" if i else "") for i in range(request.count)]
        with NodeProgress(parts, what="segment") as shown:
            gathered = Gathered(shown, request.fps, request.total_frames, request.track)
            for segment in avatar_video(lambda: engine, hear, request, kept):
                report.append(segment.summary(folder))
                gathered.add(kept, segment.number, segment.skip, segment.reused)
        cls.remember(gathered.files)
        return gathered.output(cls, "\n".join([*notes, *filter(None, [kept.said]), *report]))


NODES = [AvatarLongVideo]
