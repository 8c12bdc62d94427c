"""The golden avatars as ComfyUI and as the core load them, with inputs for both."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..checkout import PACK
from .conftest import ROUNDING

GOLDEN = Path(PACK, "tests", "data", "golden-avatar")
TOLERANCE = 1e-4 * ROUNDING
SEED, TEXT, AUDIO = 3, 3.0, 4.5


class Avatar:
    """The golden avatar of one version as ComfyUI and as the core load it, and inputs for both."""

    def __init__(self, comfy, version: str) -> None:
        from safetensors.torch import load_file

        self.comfy, self.version, self.folder = comfy, version, GOLDEN / version
        self.name = f"golden-avatar-{version}"
        place = comfy.folder / "models" / "diffusion_models" / self.name
        place.mkdir(exist_ok=True)
        for file in ("config.json", "dit.safetensors"):
            shutil.copy(self.folder / file, place)
        self.model = comfy("LongCatModelLoader", model_name=self.name, weight_dtype="fp32")
        self.network = comfy.core("checkpoints.load").load_transformer(place)
        read = (load_file(self.folder / f"{name}.safetensors") for name in ("generate", "forward", "audio"))
        self.data, self.forward, self.voices = read
        data = self.data
        self.texts = [self._text(data[f"{name}.embeds"], data[f"{name}.mask"]) for name in ("pos", "neg")]
        self.shape = tuple(data["noise0"].shape)

    @staticmethod
    def _text(embeds, mask):
        return torch.nn.functional.pad(embeds * (mask != 0)[..., None], (0, 0, 0, 512 - embeds.shape[1]))

    def audio(self, people: int = 1, scale: float = AUDIO):
        """The audio of a first segment."""
        avatar = self.comfy.core("sampling.avatar")
        windows = torch.cat([self.voices[f"{voice}.segment0"] for voice in ("one", "two")[:people]])
        classes = None
        if people > 1:
            _, _, _, rows, columns = self.shape
            masks = avatar.fit_masks(self.forward["duo.masks.source"], 8 * rows, 8 * columns)
            classes = avatar.class_tokens(masks, rows // 2, columns // 2)
        return avatar.Audio(windows, classes, scale)

    def reference(self, position: int = 10, skip: int = 3):
        avatar, cache = self.comfy.core("sampling.avatar"), self.comfy.core("model.kv_cache")
        latents = self.model.model.process_latent_out(
            self.data["ai2v.latents" if self.version == "v1_0" else "ai2v_distill.latents"][:, :, :1]
        )
        return avatar.ReferenceFrame(latents, cache.Reference(position, skip))

    def conds(self, audio, reference=None):
        values = {"longcat_audio": audio} | ({} if reference is None else {"longcat_reference": reference})
        return {name: [[text, dict(values)]] for name, text in zip(("positive", "negative"), self.texts, strict=True)}

    def latent(self, clean=None, batch: int = 1):
        samples = torch.zeros(batch, *self.shape[1:])
        if clean is None:
            return {"samples": samples}
        mask = torch.ones(1, 1, *self.shape[2:])
        count = clean.shape[2]
        samples[:, :, :count], mask[:, :, :count] = self.model.model.process_latent_out(clean), 0
        return {"samples": samples, "noise_mask": mask}

    def sampled(self, conds, latent, model=None, **values):
        """LongCat Sampler's latents, normalized."""
        given = {"seed": SEED, "steps": 4, "guidance": TEXT, "mode": "base"} | values
        node = self.comfy("LongCatSampler", model=model or self.model, latent_image=latent, **conds, **given)
        return self.model.model.process_latent_in(node["samples"])

    def expected(
        self, audio, clean=None, reference=None, network=None, steps=4, mode="base", guidance=TEXT, seed=SEED,
        callback=None,
    ):  # fmt: skip
        core, network = self.comfy.core, network or self.network
        if reference is not None:
            latents = self.model.model.process_latent_in(reference.latents)
            reference = core("sampling.avatar").ReferenceFrame(latents, reference.at)
        noise = core("sampling.conditioning").seeded_noise(self.shape, seed)
        schedule = core("sampling.schedules").schedule_of(network.config.audio, mode, steps)
        masks = [(text != 0).any(-1) for text in self.texts]
        return core("sampling.sampler").sample(
            network, noise, schedule, self.texts[0], masks[0], negative_context=self.texts[1], negative_mask=masks[1],
            guidance_scale=guidance, cond_latents=clean, audio=audio, reference=reference,
            callback=callback,
        )  # fmt: skip


def close(one, other) -> bool:
    assert one.std() > 0.3
    return float((one - other).abs().max()) <= TOLERANCE
