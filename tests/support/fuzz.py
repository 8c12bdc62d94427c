"""A mutational fuzzer of everything that reads files: `make fuzz`, or a seeded minute of it in the tests.

Each case writes one mutated file among whole ones and reads it as the commands do. A finding is anything but a result
or a LongCatError: another exception, a crash, more than SECONDS, more memory than the files justify, a safetensors file
that is read though the safetensors package refuses it, or with other numbers than the package reads.

Run as `python -m tests.support.fuzz --seconds 3600 --keep findings`; a case is repeated with `--reader R --case N`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from longcat_core.checkpoints.convert import convert
from longcat_core.checkpoints.formats import OFFICIAL
from longcat_core.checkpoints.load import load_transformer, official_state, open_checkpoint
from longcat_core.errors import LongCatError
from longcat_core.files.media import read_image, read_sound, read_video, write_video
from longcat_core.files.regular import read_lines
from longcat_core.files.safetensors_io import SafetensorsFile, write_safetensors
from longcat_core.generate.audio import load_audio_encoder
from longcat_core.generate.calibration import read_calibration, write_calibration
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.segment_folder import SegmentFolder
from longcat_core.generate.text import load_text_encoder
from longcat_core.generate.vae import load_vae
from longcat_core.model.transformer import LongCatTransformer
from longcat_core.nano.vocabulary import new_text_encoder
from longcat_core.training.saved import PREFIX, LoraFile, state_shapes

from ..checkpoints.written_forms import is_matrix, write_gguf
from .calibrations import calibration_of
from .mutations import mutated
from .sounds import sweep, write_sound
from .tiny import GOLDEN, moving_clip, tiny_config

SECONDS = 10
# Memory that reading may take beyond a multiple of the files, most of it for a decoder's own frames.
SPARE, TIMES = 400_000_000, 40

PROMPTS = "a red circle moves right\r\nein grüner Kreis\u2028一只球\n"

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Reader:
    """make: writes whole files into a folder. targets: patterns of those that are mutated. read: the folder."""

    make: Callable[[Path], Any]
    targets: tuple[str, ...]
    read: Read


# --- whole files, and how they are read ------------------------------------------------------------------------------


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LongCatTransformer(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    return {name: tensor.bfloat16() for name, tensor in official_state(model, OFFICIAL).items()}


def _transformer(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", _weights(), {"format": "pt"})
    for form in ("comfyui-fp8", "int8"):
        convert(folder / "model.safetensors", folder / f"{form}.safetensors", form)


def _read_transformers(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        load_transformer(path)
        _as_the_package_reads(path)


def _sharded(folder: Path) -> None:
    weights = _weights()
    names, where = sorted(weights), {}
    for shard in range(2):
        file = f"diffusion_pytorch_model-0000{shard + 1}-of-00002.safetensors"
        part = names[shard::2]
        write_safetensors(folder / file, {name: weights[name] for name in part})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    values = {"hidden_size": 64, "depth": 2, "num_heads": 2, "caption_channels": 32, "adaln_tembed_dim": 32}
    (folder / "config.json").write_text(json.dumps(values | {"ffn_hidden": 96, "patch_size": [1, 2, 2]}))


def _gguf(folder: Path) -> None:
    weights = _weights()
    kinds = {name: "Q8_0" for name, tensor in weights.items() if is_matrix(name, tensor)}
    write_gguf(folder / "model.gguf", weights, kinds, flat_patches=True)


def _lora(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", _weights())
    lora, config = {}, tiny_config()
    for block in range(config.depth):
        name = f"diffusion_model.blocks.{block}.attn.proj"
        lora[f"{name}.lora_A.weight"] = torch.randn(4, config.hidden_size)
        lora[f"{name}.lora_B.weight"] = torch.randn(config.hidden_size, 4)
        lora[f"{name}.alpha"] = torch.tensor(2.0)
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.rank_pattern": {}})
    write_safetensors(folder / "lora.safetensors", lora, {"lora_adapter_metadata": settings, "ss_network_alpha": "2"})
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4, "use_rslora": False}))
    shutil.copy(folder / "lora.safetensors", folder / "adapter_model.safetensors")


def _read_loras(folder: Path) -> None:
    for name in ("lora.safetensors", "adapter_model.safetensors"):
        load_transformer(folder / "model.safetensors", lora=[(folder / name, 1.0)])
        _as_the_package_reads(folder / name)


def _vae(folder: Path) -> None:
    shutil.copy(ModelPaths().vae, folder / "diffusion_pytorch_model.safetensors")
    vae = load_vae(ModelPaths().vae)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **asdict(vae.model.config)}))


def _read_vae(folder: Path) -> None:
    load_vae(folder)
    _as_the_package_reads(folder / "diffusion_pytorch_model.safetensors")


def _text_encoder(folder: Path) -> None:
    shutil.copy(ModelPaths().text_encoder, folder / "encoder.safetensors")


def _read_text_encoder(folder: Path) -> None:
    load_text_encoder(folder / "encoder.safetensors").encode(["a red circle moves right"])
    _as_the_package_reads(folder / "encoder.safetensors")


def _text_folder(folder: Path) -> None:
    """The official form: a sharded text_encoder/ with index and config, and tokenizer/."""
    vocabulary = SafetensorsFile(ModelPaths().text_encoder).rows("spiece_model").numpy().tobytes()
    model = new_text_encoder(vocabulary)
    model.load_state_dict(load_text_encoder(ModelPaths().text_encoder).model.state_dict(), strict=False)
    model.save_pretrained(folder / "text_encoder", max_shard_size="300KB")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(vocabulary)


def _picture(folder: Path) -> None:
    picture = Image.fromarray(moving_clip(1)[0])
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "gif", "avif"):
        picture.save(folder / f"picture.{suffix}")


def _read_pictures(folder: Path) -> None:
    _each(sorted(folder.iterdir()), read_image)


def _video(folder: Path) -> None:
    clip = moving_clip(9, 32, 48)
    for suffix in ("mp4", "mkv", "webp", "gif"):
        write_video(folder / f"clip.{suffix}", clip, 15)


def _read_videos(folder: Path) -> None:
    _each(sorted(folder.iterdir()), read_video)


def _sound(folder: Path) -> None:
    for name, codec in {"a.wav": "pcm_s16le", "a.flac": "flac", "a.mp3": "libmp3lame", "a.m4a": "aac"}.items():
        write_sound(folder / name, sweep(0.5), codec)
    write_video(folder / "a.mp4", moving_clip(9, 32, 48), 15, sweep(0.5))


def _read_sounds(folder: Path) -> None:
    _each(sorted(folder.iterdir()), read_sound)


def _audio_encoders(folder: Path) -> None:
    for version, name in (("v1_0", "wav2vec2"), ("v1_5", "whisper")):
        (folder / name).mkdir()
        golden = GOLDEN.with_name("golden-avatar") / version
        shutil.copy(golden / f"{name}_config.json", folder / name / "config.json")
        shutil.copy(golden / f"{name}.safetensors", folder / name / "model.safetensors")


def _read_audio_encoders(folder: Path) -> None:
    _each(sorted(folder.iterdir()), load_audio_encoder)


def _segments(folder: Path) -> None:
    _fill(folder)


def _fill(folder: Path) -> list[np.ndarray]:
    clips = [moving_clip(5), moving_clip(5)[::-1]]

    def make(number: int, before: Any) -> tuple[np.ndarray, torch.Tensor, dict[str, Any]]:
        return clips[number], torch.zeros(1, 16, 2, 2, 4), {"join": {"color": [0.0, 0.0, 0.0]}} if number else {}

    settings = [{"prompt": "a ball", "seed": number} for number in range(2)]
    held = SegmentFolder(folder / "segments")
    found = []
    for number, _, _ in held.fill(settings, make, fps=15, room=[1000, 1000]):
        found.append(held.frames(number))
        assert np.array_equal(found[-1], clips[number]), "a damaged segment is taken for whole"
    return found


def _training() -> LoraFile:
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2)}
    adapters = {f"{PREFIX}blocks.0.attn.proj.{end}.weight": shape for end, shape in shapes.items()}
    return LoraFile(Path("lora.safetensors"), 2, 2.0, {"model": "tiny", "steps": [1, 2]}, adapters)


def _training_state(folder: Path) -> None:
    training = _training()
    training.path = folder / training.path
    state = {name: torch.full(shape, 0.5) for name, shape in state_shapes(training.adapters).items()}
    training.write(state, 6)


def _read_training_state(folder: Path) -> None:
    training = _training()
    training.path = folder / training.path
    training.open()
    training.finish()
    state = SafetensorsFile(training.state)
    if "checksum" in state.metadata:
        damaged = [name for name, tensor in state.tensors().items() if not bool((tensor == 0.5).all())]
        assert not damaged, "a damaged training state is taken for whole"
    _as_the_package_reads(training.path)


READERS = {
    "transformer": Reader(_transformer, ("*.safetensors",), _read_transformers),
    "shards": Reader(_sharded, ("*.json", "*.json", "*.safetensors"), load_transformer),
    "gguf": Reader(_gguf, ("*.gguf",), lambda folder: load_transformer(folder / "model.gguf")),
    "lora": Reader(_lora, ("lora.safetensors", "adapter_*"), _read_loras),
    "vae": Reader(_vae, ("*.json", "*.safetensors"), _read_vae),
    "text_encoder": Reader(_text_encoder, ("*.safetensors",), _read_text_encoder),
    "text_folder": Reader(
        _text_folder,
        ("text_encoder/*.json", "text_encoder/*.json", "text_encoder/*", "tokenizer/*"),
        lambda folder: load_text_encoder(folder).encode(["a red circle moves right"]),
    ),
    "prompts": Reader(
        lambda folder: (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8"),
        ("*",),
        lambda folder: read_lines(folder / "prompts.txt"),
    ),
    "picture": Reader(_picture, ("*",), _read_pictures),
    "video": Reader(_video, ("*",), _read_videos),
    "sound": Reader(_sound, ("*",), _read_sounds),
    "audio_encoder": Reader(_audio_encoders, ("*/*.json", "*/*"), _read_audio_encoders),
    "training": Reader(_training_state, ("*.state.safetensors", "*"), _read_training_state),
    "calibration": Reader(
        lambda folder: write_calibration(
            folder / "found.json", calibration_of(open_checkpoint(GOLDEN / "dit.safetensors"))
        ),
        ("found.json",),
        lambda folder: read_calibration(folder / "found.json").sparse(),
    ),
    "segments": Reader(_segments, ("segments/*/*.json", "segments/*/*"), _fill),
}


def _each(paths: list[Path], read: Read) -> None:
    """Read every file, so that a refused one hides no other."""
    refused: LongCatError | None = None
    for path in paths:
        try:
            read(path)
        except LongCatError as error:
            refused = error
    if refused is not None:
        raise refused


def _as_the_package_reads(path: Path) -> None:
    ours = SafetensorsFile(path)
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            assert names == set(ours.header), f"other tensors than the package: {names ^ set(ours.header)}"
            for name in names:
                theirs = file.get_tensor(name)
                same = torch.equal(ours.rows(name).flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))
                assert same, f"other numbers than the package: {name}"
    except SafetensorError as error:
        raise AssertionError(f"read though the safetensors package refuses it: {error}") from error


# --- cases -----------------------------------------------------------------------------------------------------------


class Slow(BaseException):
    """A case took too long. No reader catches it."""


def _ring(number: int, frame: FrameType | None) -> None:
    raise Slow


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _peak() -> int:
    """Most memory of this process since `_forget_peak`, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _forget_peak() -> None:
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def write_case(reader: Reader, whole: Path, folder: Path, draw: random.Random) -> Path:
    """Copy the whole files into `folder` and mutate one; returns it."""
    shutil.copytree(whole, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    target = draw.choice(sorted(folder.glob(draw.choice(reader.targets))))
    target.write_bytes(mutated(target.read_bytes(), draw))
    return target


def fault_of(reader: Reader, folder: Path) -> str:
    """What is wrong about how the folder is read, or ""."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _forget_peak()
    before = _peak()
    try:
        with _alarm(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except LongCatError:
        pass
    except Slow:
        return f"no end after {SECONDS} s"
    except AssertionError as error:
        return str(error)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "longcat_core" in frame.filename] or list(frames)
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:200]}"
    taken = _peak() - before
    return f"{taken / 1e6:,.0f} MB for {size:,} bytes" if taken > SPARE + TIMES * size else ""


def fuzz(name: str, cases: Iterator[int], seed: int, keep: Path | None = None) -> list[str]:
    """Try the cases of a reader; returns what was found, one line for each kind of fault."""
    reader, found = READERS[name], {}
    # Beyond this even a system with memory to spare stops a reader, as it would stop a user's.
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="longcat-fuzz-") as place:
        whole, folder = Path(place) / "whole", Path(place) / "case"
        whole.mkdir()
        reader.make(whole)
        # Once without a limit, because importing a package may take longer than reading a file.
        reader.read(whole)
        fault = fault_of(reader, whole)
        if fault:
            return [f"{name}: whole files: {fault}"]
        for case in cases:
            # Said before the case, for one that kills the process.
            print(f"{name} {case}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            target = write_case(reader, whole, folder, random.Random(f"{seed}:{name}:{case}"))
            mutant = target.read_bytes()
            fault = fault_of(reader, folder)
            if fault and fault.split(":")[0] not in {known.split(":")[0] for known in found.values()}:
                found[case] = fault
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{seed}-{case}-{target.name}").write_bytes(mutant)
    return [f"{name} --seed {seed} --case {case}: {fault}" for case, fault in found.items()]


def _until(end: float) -> Iterator[int]:
    case = 0
    while time.monotonic() < end:
        yield case
        case += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--reader", choices=READERS, action="append", help="this one only; can be repeated")
    parser.add_argument("--cases", type=int, help="how many for each reader, instead of a time")
    parser.add_argument("--case", type=int, help="this one only")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all readers together")
    parser.add_argument("--seed", type=int, help="of the mutations; default: the time")
    parser.add_argument("--keep", type=Path, help="folder for the files that were found")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    names = args.reader or list(READERS)
    found = []
    for name in names:
        cases: Iterator[int] = _until(time.monotonic() + args.seconds / len(names))
        if args.case is not None:
            cases = iter([args.case])
        elif args.cases is not None:
            cases = iter(range(args.cases))
        found += fuzz(name, cases, seed, args.keep)
    print("\n".join(found) or f"nothing found (seed {seed})")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
