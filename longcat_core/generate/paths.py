"""Where a model's three parts lie; the nano model's, which come with the pack, are the defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoints.audio_encoders import FOLDERS as ENCODER_FOLDERS
from ..checkpoints.load import Checkpoint, open_checkpoint, with_audio, without_audio
from ..errors import CheckpointError, check_path, check_type
from ..files.fingerprints import fingerprint
from ..files.records import read_record
from ..sampling.conditioning import latent_shape
from .request import NANO, RELEASED, Defaults

NANO_WEIGHTS = Path(__file__).parent.parent / "nano" / "weights"
NANO_MODEL = NANO_WEIGHTS / "diffusion_models" / "longcat_nano_bf16.safetensors"
NANO_VAE = NANO_WEIGHTS / "vae" / "longcat_nano_vae_bf16.safetensors"
NANO_TEXT_ENCODER = NANO_WEIGHTS / "text_encoders" / "longcat_nano_umt5_bf16.safetensors"
# Of the nano avatar, whose text encoder is nano's.
NANO_AVATAR_MODEL = NANO_WEIGHTS / "diffusion_models" / "longcat_nano_avatar_bf16.safetensors"
NANO_AVATAR_VAE = NANO_WEIGHTS / "vae" / "longcat_nano_avatar_vae_bf16.safetensors"
NANO_AUDIO_ENCODER = NANO_WEIGHTS / "audio_encoders" / "longcat_nano_whisper_bf16.safetensors"

WORLD_FILE = "world.json"
# LongCat-Video's folder, which a folder of LongCat-Video-Avatar needs beside it.
BASE = "LongCat-Video"
# Folders of the transformer in that of LongCat-Video-Avatar: of 1.5, and those of 1.0 for one person and for several.
ONE, SEVERAL = ("base_model", "avatar_single"), ("base_model", "avatar_multi")


@dataclass(frozen=True)
class World:
    """The procedural world that a small model knows, and the size of its videos."""

    world: str
    height: int
    width: int
    frames: int


@dataclass(frozen=True)
class ModelPaths:
    """Where the three parts lie: each a safetensors file or a folder of the official form. Defaults: the nano model.

    audio_encoder: of an avatar; None for LongCat-Video.
    """

    model: Path = NANO_MODEL
    vae: Path = NANO_VAE
    text_encoder: Path = NANO_TEXT_ENCODER
    audio_encoder: Path | None = None

    @classmethod
    def of(
        cls,
        model: str | Path | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
    ) -> ModelPaths:
        """Fill in what is not named: the nano model, or the folders of the official root that `model` is.

        Raises CheckpointError for a VAE or text encoder without a model and the other way round.
        """
        for name, given in (("model", model), ("VAE", vae), ("text encoder", text_encoder)):
            if given is not None:
                check_path(f"the path of the {name}", given)
        if model is None and vae is None and text_encoder is None:
            paths = cls()
        elif model is None:
            raise CheckpointError("a VAE or text encoder is given without a model; give --model too, or omit both")
        else:
            root = Path(model)
            for name, given in (("vae", vae), ("text_encoder", text_encoder)):
                if given is None and root.exists() and not (root / name).is_dir():
                    option = f"--{name.replace('_', '-')}"
                    sentence = f"{root} has no folder {name}; give LongCat-Video's folder or use {option}"
                    raise _lacking(_transformer(root), without_audio, sentence)
            # The official root holds tokenizer/ beside text_encoder/, so the root itself stands for both.
            paths = cls(root, Path(vae or root / "vae"), Path(text_encoder or root))
        return paths

    @classmethod
    def of_avatar(
        cls,
        model: str | Path | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        audio_encoder: str | Path | None = None,
        base: str | Path | None = None,
        people: int = 1,
    ) -> ModelPaths:
        """Fill in what is not named, for LongCat-Video-Avatar.

        model: its folder, or the file or folder of its transformer; None: the nano avatar. The audio encoder is found
        in that folder, VAE and text encoder too, or in `base`, LongCat-Video's folder, by default the folder of that
        name beside it. people: how many are in the video; 1.0 has a transformer for one and one for several. Raises
        CheckpointError for a part that is neither named nor found, and for parts without a model.
        """
        named = {"model": model, "VAE": vae, "text encoder": text_encoder, "audio encoder": audio_encoder, "base": base}
        for name, given in named.items():
            if given is not None:
                check_path(f"the path of the {name}", given)
        if model is None:
            if others := [name for name, given in named.items() if given is not None]:
                raise CheckpointError(f"the {others[0]} is given without a model; give --model too, or omit both")
            return cls(NANO_AVATAR_MODEL, NANO_AVATAR_VAE, NANO_TEXT_ENCODER, NANO_AUDIO_ENCODER)
        root = Path(model)
        transformer = _transformer(root, people)
        places = [root, root.absolute().parent / BASE] if base is None else [Path(base)]
        found = {}
        for name, given in (("vae", vae), ("text_encoder", text_encoder)):
            found[name] = next((place for place in places if (place / name).is_dir()), places[-1])
            if given is None and root.exists() and not (found[name] / name).is_dir():
                option = f"--{name.replace('_', '-')}"
                sentence = f"{places[-1]} has no folder {name}; give LongCat-Video's folder as --base, or use {option}"
                raise _lacking(transformer, with_audio, sentence)
        if audio_encoder is None and root.exists() and not any((root / name).is_dir() for name in ENCODER_FOLDERS):
            sentence = (
                f"{root} has no audio encoder ({' or '.join(ENCODER_FOLDERS)}); give LongCat-Video-Avatar's folder or "
                "use --audio-encoder"
            )
            raise _lacking(transformer, with_audio, sentence)
        return cls(
            transformer,
            Path(vae or found["vae"] / "vae"),
            Path(text_encoder or found["text_encoder"]),
            Path(audio_encoder or root),
        )

    @property
    def _parts(self) -> dict[str, Path]:
        """Each part by its name in words."""
        found = {"model": self.model, "VAE": self.vae, "text encoder": self.text_encoder}
        return found if self.audio_encoder is None else found | {"audio encoder": self.audio_encoder}

    def check(self) -> None:
        """Raise CheckpointError unless all parts exist."""
        for what, path in self._parts.items():
            check_type(f"the path of the {what}", path, Path, "a pathlib.Path, or use ModelPaths.of")
            if path.exists():
                continue
            remedy = "reinstall, or run longcat train-nano" if self.is_nano else "give a file or LongCat-Video's folder"
            raise CheckpointError(f"{what} {path} does not exist; {remedy}")

    def fingerprints(self) -> dict[str, str]:
        """What tells these models from others, by part."""
        folders = {"model": ("dit",), "vae": (), "text_encoder": ("text_encoder",), "audio_encoder": ENCODER_FOLDERS}
        found = {}
        for part, names in folders.items():
            path = getattr(self, part)
            if path is None:
                continue
            # The official root stands for more than one part.
            inner = next((path / name for name in names if (path / name).is_dir()), path)
            found[part] = fingerprint(inner)
        return found

    @property
    def is_nano(self) -> bool:
        """Whether the model comes with the pack: nano or the nano avatar."""
        return self.model.resolve() in (NANO_MODEL.resolve(), NANO_AVATAR_MODEL.resolve())

    @property
    def world(self) -> World | None:
        """The procedural world that the model knows: nano's, or what its folder says in WORLD_FILE; None for others."""
        if self.is_nano:
            name = "nano" if self.model.resolve() == NANO_MODEL.resolve() else "avatar"
            return World(name, NANO.height, NANO.width, NANO.frames)
        file = self.model / WORLD_FILE
        if not file.is_file():
            return None
        remedy = "train it again with longcat train-nano"
        world = read_record(file, World, "a model's world", remedy, error=CheckpointError)
        latent_shape(world.frames, world.height, world.width)
        return world

    @property
    def defaults(self) -> Defaults:
        """What the model was trained for; a model's folder may say so in WORLD_FILE, as LongCat-mini's does."""
        world = self.world
        if world is None:
            return RELEASED
        return replace(NANO, height=world.height, width=world.width, frames=world.frames)


def _transformer(root: Path, people: int = 1) -> Path:
    """The folder of the transformer in that of LongCat-Video-Avatar; `root` where it has none."""
    inner = (root / name for name in (ONE if people == 1 else SEVERAL))
    return next((folder for folder in inner if folder.is_dir()), root)


def _lacking(transformer: Path, suits: Callable[[Checkpoint], Checkpoint], sentence: str) -> CheckpointError:
    """The error of a part that is missing; for the transformer of the other model, which is the reason, what `suits`
    says of it."""
    try:
        opened = open_checkpoint(transformer)
    except CheckpointError:
        return CheckpointError(sentence)
    try:
        suits(opened)
    except CheckpointError as error:
        return error
    return CheckpointError(sentence)
