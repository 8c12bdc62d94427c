"""The command: bad input is one clear sentence before any model is loaded; files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.errors import LongCatError
from longcat_core.files import media, places
from longcat_core.generate import paths as model_paths
from longcat_core.generate.engine import Generation
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.request import FilledRequest, GenerateRequest
from longcat_core.optimize import compilation
from longcat_core.sampling.sampler import Step

PROMPT = "a red circle moves right on a blue background"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; the embedded model's files exist in it, but loading them is a failure."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("NANO_MODEL", "NANO_VAE", "NANO_TEXT_ENCODER"):
        (weights / f"{name}.safetensors").touch()
    paths = [weights / f"{name}.safetensors" for name in ("NANO_MODEL", "NANO_VAE", "NANO_TEXT_ENCODER")]
    monkeypatch.setattr(model_paths, "NANO_MODEL", paths[0])
    monkeypatch.setattr(ModelPaths.__init__, "__defaults__", tuple(paths))

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded before the input was checked")

    monkeypatch.setattr(commands, "load_pipeline", load)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


class Bad(NamedTuple):
    """Arguments after `generate`, and what the sentence must hold: the input and the remedy."""

    arguments: tuple[str, ...]
    said: tuple[str, ...]


def bad(*arguments: str, said: tuple[str, ...], name: str) -> Any:
    return pytest.param(Bad(arguments, said), id=name)


def option(name: str, value: str, *said: str) -> Any:
    return bad(PROMPT, name, value, said=said, name=f"{name.lstrip('-')}={value[:20]}")


def make_inputs(work: Path) -> None:
    """Files that some of the bad inputs name."""
    Image.new("RGB", (32, 32)).save("good.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save("truncated.jpg")
    Path("truncated.jpg").write_bytes(Path("truncated.jpg").read_bytes()[:900])
    Path("text.png").write_text("no image", encoding="utf-8")
    Path("empty.png").touch()
    Path("text.mp4").write_text("no video" * 100, encoding="utf-8")
    Path("empty.mp4").touch()
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    clip[..., 0] = np.arange(5)[:, None, None] * 20
    media.write_video("short.webp", clip, 15)
    media.write_video("short.mp4", clip, 15)
    Path("moov.mp4").write_bytes(Path("short.mp4").read_bytes()[:200])
    Path("folder.mp4").mkdir()
    Path("model_only").mkdir()
    Path("model.safetensors").touch()
    os.mkfifo("pipe.mp4")


# What a request refuses is tested in tests/generate/test_request.py, files that cannot be read in tests/files: here
# each option has a row for a value of its type that is refused, and one for what is not of its type.
BAD = [
    # the prompt
    bad("", said=("prompt is empty", "say what the video shows"), name="empty prompt"),
    bad("&nbsp;", said=("prompt is empty",), name="prompt of an HTML blank"),
    bad("a \udc80", said=("prompt is not valid UTF-8", "type it again"), name="prompt not UTF-8"),
    bad(PROMPT, "--negative-prompt", "\udc80", said=("negative prompt is not valid UTF-8",), name="negative not UTF-8"),
    bad(said=("PROMPT", "--help"), name="no prompt"),
    bad(PROMPT, "blue", said=("blue", "--help"), name="two prompts"),
    # sizes
    option("--size", "65x96", "height 65 is not a multiple of 16", "64"),
    option("--size", "64x90", "width 90 is not a multiple of 16", "96"),
    option("--size", "64", "'64'", "64x96"),
    option("--size", "64x96x3", "'64x96x3'", "64x96"),
    option("--size", "-64x96", "--size"),
    option("--height", "0", "height 0", "16 to 4096"),
    option("--width", "wide", "--width", "cannot read 'wide' as a whole number"),
    bad(PROMPT, "--size", "64x96", "--width", "96", said=("--size", "--width", "one or the other"), name="size twice"),
    # frames
    option("--frames", "32", "32 frames", "29 and 33"),
    option("--frames", "33.5", "cannot read '33.5' as a whole number"),
    option("--fps", "0", "fps 0", "1 to 120"),
    option("--fps", "fast", "cannot read 'fast' as a number"),
    # sampling
    option("--steps", "0", "0 steps", "1 to 1000"),
    option("--steps", "many", "cannot read 'many' as a whole number"),
    bad(PROMPT, "--distilled", "--steps", "51", said=("51 steps", "distilled", "1 to 50"), name="distilled steps"),
    option("--guidance", "-1", "guidance -1", "0 to 30"),
    option("--guidance", "strong", "cannot read 'strong' as a number"),
    option("--seed", "-1", "seed -1", "2^63"),
    option("--seed", "9" * 5000, "9999", "as a whole number"),
    option("--seed", "lucky", "cannot read 'lucky' as a whole number"),
    option("--schedule", "fast", "'fast'", "base, distilled, enhance_hf"),
    bad(PROMPT, "--distilled", "--schedule", "base", said=("--distilled", "--schedule base"), name="two schedules"),
    # given pictures
    option("--image", "missing.png", "missing.png does not exist"),
    option("--image", "folder.mp4", "folder.mp4 is a folder"),
    option("--image", "text.png", "text.png is not a readable image", "PNG"),
    option("--image", "empty.png", "empty.png is not a readable image", "PNG"),
    option("--image", "truncated.jpg", "truncated.jpg is not a readable image", "PNG"),
    option("--image", "short.mp4", "short.mp4 is not a readable image", "PNG"),
    option("--video", "missing.mp4", "missing.mp4 does not exist"),
    option("--video", "text.mp4", "text.mp4 is not a readable video", ".mp4"),
    option("--video", "empty.mp4", "empty.mp4 is not a readable video", ".mp4"),
    option("--video", "moov.mp4", "moov.mp4 holds no video", ".mp4"),
    option("--video", "short.mp4", "short.mp4 has 5 frames", "13", "at most 5"),
    option("--cond-frames", "12", "12 conditioning frames", "9 and 13"),
    bad(PROMPT, "--video", "short.mp4", "--cond-frames", "5", "--frames", "5", said=("5 frames", "9"), name="no room"),
    bad(PROMPT, "--image", "good.png", "--video", "short.mp4", said=("image", "video", "give the one"), name="both"),
    # outputs
    option("--output", "a.avi", "'a.avi'", ".mp4, .mkv, .webp, .gif"),
    option("--output", "a", "'a'", ".mp4, .mkv, .webp, .gif"),
    option("--output", "missing/a.mp4", "missing", "does not exist", "create it"),
    option("--output", "good.png/a.mp4", "good.png", "does not exist"),
    option("--output", "folder.mp4", "folder.mp4 is a folder"),
    option("--output", "pipe.mp4", "pipe.mp4 is not a regular file"),
    option("--output", "/proc/a.mp4", "/proc", "choose another place"),
    option("--output", "a" * 300 + ".mp4", "aaa", "File name too long"),
    option("--contact-sheet", "a.jpg", "'a.jpg'", ".png"),
    option("--contact-sheet", "missing/a.png", "missing", "does not exist"),
    bad(
        PROMPT,
        "--image",
        "good.png",
        "--contact-sheet",
        "./good.png",
        said=("good.png is the input itself", "--contact-sheet"),
        name="sheet over image",
    ),
    bad(
        PROMPT,
        "--video",
        "short.webp",
        "--cond-frames",
        "5",
        "-o",
        "short.webp",
        said=("short.webp", "--output"),
        name="self",
    ),
    # models and machine
    option("--model", "missing", "missing", "does not exist"),
    option("--model", "model_only", "model_only has no folder vae", "--vae"),
    option("--model", "model.safetensors", "model.safetensors has no folder vae", "--vae"),
    bad(
        PROMPT,
        "--model",
        "model_only",
        "--vae",
        "good.png",
        said=("text_encoder", "--text-encoder"),
        name="no text encoder",
    ),
    option("--vae", "good.png", "without a model", "--model"),
    option("--text-encoder", "good.png", "without a model", "--model"),
    option("--lora", "missing.safetensors", "missing.safetensors does not exist"),
    option("--lora", "model_only", "model_only is a folder"),
    option("--lora", "text.mp4", "text.mp4 is not a safetensors file"),
    option("--lora", "text.mp4:nan", "strength nan of text.mp4", "-1000 to 1000"),
    option("--lora", "text.mp4:1e39", "strength 1e+39 of text.mp4", "-1000 to 1000"),
    option("--device", "abacus", "'abacus'", "cpu"),
    option("--device", "mps", "'mps'", "cpu"),
    option("--device", "cuda:77", "'cuda:77'", "cpu"),
    option("--dtype", "int4", "int4", "float32"),
    option("--attention", "magic", "'magic'", "sdpa"),
    option("--stepz", "3", "--stepz", "--help"),
    option("--step", "3", "--step", "--help"),
]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str], case: Bad) -> None:
    make_inputs(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(["generate", *case.arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("longcat: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err
    for words in case.said:
        assert words in err
    assert sorted(folder.rglob("*")) == before


def test_enough_bad_inputs_are_tried() -> None:
    assert len(BAD) >= 35 and len({case.id for case in BAD}) == len(BAD)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["verify"], ["--nonsense"]])
def test_bad_commands(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("longcat: error: ") and err.count("\n") == 1 and "--help" in err


def test_full_disk(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert cli.main(["generate", PROMPT, "-o", "a.mp4"]) == 2
    err = capsys.readouterr().err
    assert "a.mp4" in err and "0.0 MB free" in err and "make room" in err and err.count("\n") == 1


def test_missing_weights_of_the_embedded_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_paths.NANO_MODEL.unlink()
    assert cli.main(["generate", PROMPT]) == 2
    assert "longcat train-nano" in capsys.readouterr().err


# --- runs, with a stand-in for the models ----------------------------------------------------------------------------


class StandIn:
    """Has the pipeline's face: calls back like the sampler and returns a gradient."""

    def __init__(self, at_step: Callable[[int], None] = lambda _: None, warn: str = "") -> None:
        self.at_step, self.warn = at_step, warn
        self.vae, self.plan_note = SimpleNamespace(tiling=False), ""
        self.request: GenerateRequest | None = None

    def generate(self, request: GenerateRequest, callback: Callable[[Step], None]) -> Generation:
        self.request = request
        if self.warn:
            warnings.warn_explicit(self.warn, UserWarning, "pipeline.py", 1, module="longcat_core.generate.pipeline")
        for i in range(request.steps):
            self.at_step(i)
            callback(Step(i, request.steps, 0.0, 0.0, torch.zeros(1), torch.zeros(1)))
        frames = np.zeros((request.frames, request.height, request.width, 3), np.uint8)
        frames[...] = np.arange(request.frames, dtype=np.uint8)[:, None, None, None]
        return Generation(frames, torch.zeros(1), request)


def stand_in(monkeypatch: pytest.MonkeyPatch, **options: Any) -> StandIn:
    model = StandIn(**options)
    monkeypatch.setattr(commands, "load_pipeline", lambda *_, **__: model)
    return model


def test_files_are_written_and_named(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    stand_in(monkeypatch)
    arguments = ["generate", PROMPT, "-o", "a.webp", "--contact-sheet", "a.png", "--steps", "3", "--seed", "5"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a.webp: 33 frames of 64x96 at 15 fps, seed 5, in ")
    assert "3/3" in err, "the progress bar counts the steps"
    frames, fps = media.read_video("a.webp")
    assert frames.shape == (33, 64, 96, 3) and (frames[7] == 7).all() and fps == pytest.approx(15, abs=0.1)
    assert sorted(os.listdir()) == ["a.png", "a.webp"]


def test_8_bit_layers_come_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*_: Any, fp8: bool, **__: Any) -> StandIn:
        asked.append(fp8)
        return StandIn()

    monkeypatch.setattr(commands, "load_pipeline", load)
    for i, options in enumerate(([], ["--fp8"])):
        assert cli.main(["generate", PROMPT, "-o", f"{i}.webp", "--steps", "1", "--device", "cpu", *options]) == 0
    assert asked == [False, True]


def test_blocks_are_compiled_on_request(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def load(*_: Any, optimizations: Any, **__: Any) -> StandIn:
        compiled.append(optimizations.compile)
        return StandIn()

    monkeypatch.setattr(commands, "load_pipeline", load)
    monkeypatch.setattr(compilation, "why_not", lambda device: "")
    for i, options in enumerate(([], ["--compile", "off"], ["--compile", "blocks"])):
        assert cli.main(["generate", PROMPT, "-o", f"{i}.webp", "--steps", "1", "--device", "cpu", *options]) == 0
    assert compiled == ["off", "off", "blocks"]
    capsys.readouterr()
    monkeypatch.setattr(compilation, "why_not", lambda device: "there is no C++ compiler")
    assert cli.main(["generate", PROMPT, "-o", "3.webp", "--device", "cpu", "--compile", "blocks"]) == 2
    err = capsys.readouterr().err
    assert "no C++ compiler" in err and "--compile off" in err and err.count("\n") == 1 and len(compiled) == 3


def test_options_reach_the_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in(monkeypatch)
    clip = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    media.write_video("clip.webp", clip, 15)
    line = "--video clip.webp --cond-frames 5 --size 32x48 --frames 9 --steps 2 --guidance 3.5 --seed 4 --fps 12"
    options = [*line.split(), "--kv-cache", "official", "--schedule", "enhance_hf", "--negative-prompt", "fog"]
    assert cli.main(["generate", PROMPT, "-o", "a.mp4", *options]) == 0
    wanted = FilledRequest(
        PROMPT,
        "fog",
        32,
        48,
        9,
        2,
        3.5,
        4,
        "enhance_hf",
        video=Path("clip.webp"),
        num_cond_frames=5,
        kv_cache="official",
        fps=12,
    )
    assert model.request == wanted
    np.testing.assert_array_equal(model.request.given, clip[-5:])


def test_distilled_is_short_for_three_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in(monkeypatch)
    assert cli.main(["generate", PROMPT, "--distilled"]) == 0
    assert (model.request.schedule, model.request.steps, model.request.guidance_scale) == ("distilled", 16, 1.0)


def test_default_name_overwrites_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    for _ in range(3):
        assert cli.main(["generate", PROMPT, "--steps", "1"]) == 0
    assert sorted(os.listdir()) == ["longcat-2.mp4", "longcat-3.mp4", "longcat.mp4"]


def test_named_output_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    Path("a.mp4").write_bytes(b"old")
    assert cli.main(["generate", PROMPT, "--steps", "1", "-o", "a.mp4"]) == 0
    assert len(media.read_video("a.mp4")[0]) == 33


def _raise(error: BaseException) -> Callable[[int], None]:
    def at_step(index: int) -> None:
        if index == 2:
            raise error

    return at_step


def test_interrupt_while_sampling(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    stand_in(monkeypatch, at_step=_raise(KeyboardInterrupt()))
    Path("a.mp4").write_bytes(b"old")
    assert cli.main(["generate", PROMPT, "-o", "a.mp4", "--contact-sheet", "a.png"]) == 130
    assert "longcat: interrupted" in capsys.readouterr().err
    assert os.listdir() == ["a.mp4"] and Path("a.mp4").read_bytes() == b"old"


def test_interrupt_while_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)

    def half(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "_write_stream", half)
    assert cli.main(["generate", PROMPT, "-o", "a.mp4", "--steps", "1"]) == 130
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            LongCatError("the file a.safetensors is cut short;\n get it anew"),
            "the file a.safetensors is cut short; get it",
        ),
        (MemoryError(), "out of memory; give a smaller size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; give a smaller size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (PermissionError(13, "Permission denied", "a.mp4"), "a.mp4: Permission denied"),
    ],
)
def test_late_errors_are_one_sentence_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, error: BaseException, said: str
) -> None:
    stand_in(monkeypatch, at_step=_raise(error))
    assert cli.main(["generate", PROMPT, "-o", "a.mp4"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"longcat: error: {said}")
    assert os.listdir() == []


def test_a_bug_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, at_step=_raise(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["generate", PROMPT, "-o", "a.mp4"])


def test_notes_are_said(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    stand_in(monkeypatch, warn="the prompt fills all 512 tokens")
    assert cli.main(["generate", PROMPT, "--distilled", "--guidance", "4", "--steps", "1"]) == 0
    err = capsys.readouterr().err
    assert "longcat: note: the distilled schedule is made for guidance 1, not 4\n" in err
    assert "longcat: note: the prompt fills all 512 tokens\n" in err


# --- model paths -----------------------------------------------------------------------------------------------------


def test_official_folder_names_all_three(tmp_path: Path) -> None:
    for name in ("dit", "vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    paths = ModelPaths.of(tmp_path)
    assert paths == ModelPaths(tmp_path, tmp_path / "vae", tmp_path) and not paths.is_nano
    assert ModelPaths.of(tmp_path, vae="v.safetensors").vae == Path("v.safetensors")
    paths.check()


def test_no_path_is_the_embedded_model() -> None:
    assert ModelPaths.of().is_nano and ModelPaths().defaults.frames == 33


# --- other commands --------------------------------------------------------------------------------------------------


def test_backends_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    from longcat_core.optimize.attention import names

    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(names()[1:])
    assert all(line.split()[1] in ("yes", "no") for line in lines)


def test_train_nano_has_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train-nano", "--help"])
    assert stopped.value.code == 0 and "--steps" in capsys.readouterr().out


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_module_and_help_without_heavy_imports() -> None:
    result = _run("-X", "importtime", "-m", "longcat_core", "generate", "--help")
    assert result.returncode == 0 and "--negative-prompt" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "av", "diffusers", "transformers", "tqdm"}


def test_error_of_the_real_process() -> None:
    result = _run("-m", "longcat_core", "generate", PROMPT, "--frames", "32")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "longcat: error: 32 frames are not of the form 4k+1; the nearest are 29 and 33\n"


def test_termination_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A real process, stopped by SIGTERM in the middle of writing."""
    script = (
        "import sys, time\n"
        "from longcat_core.cli import main as cli\n"
        "from longcat_core.files.atomic import atomic_path\n"
        "from pathlib import Path\n"
        "def run(args):\n"
        "    with atomic_path(args.directory) as temporary:\n"
        "        temporary.write_bytes(b'half')\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.verify = run\n"
        "sys.exit(cli.main(['verify', sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_is_not_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "longcat_core", "backends"]
    with open(write, "wb") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == cli.BROKEN_PIPE and ended.stderr == ""


def test_plan_shows_what_goes_where(capsys):
    assert cli.main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"{n} GiB" for n in (48, 32, 24, 16, 12, 8)]
    assert "everything on the GPU" in lines[2] and "48 blocks" not in lines[3] and "48 blocks" in lines[-1]
    # Given frames and their keys take room; without guidance there are no halves.
    assert cli.main(["plan", "24", "--cond-frames", "13"]) == 0
    assert "keys of given frames" in capsys.readouterr().out
    assert cli.main(["plan", "4", "--no-guidance"]) == 0
    said = capsys.readouterr().out
    assert "too much" in said and "halves" not in said


@pytest.mark.parametrize(
    "argv",
    [
        ["--frames", "92"],
        ["--size", "481x832"],
        ["--cond-frames", "12"],
        ["--frames", "13", "--cond-frames", "13"],
        ["0"],
        ["-3"],
        ["nan"],
        ["inf"],
        ["1e300"],
    ],
)
def test_plan_refuses(argv, capsys):
    assert cli.main(["plan", *argv]) == 2
    assert capsys.readouterr().err.startswith("longcat: error: ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--steps", "0"], "0 steps"), (["--guidance", "nan"], "guidance nan"), (["--prompts", "1"], "1 prompts")],
)
def test_score_nano_refuses(argv, said, monkeypatch, capsys):
    from longcat_core.nano import adherence

    monkeypatch.setattr(adherence.Pipeline, "load", lambda **_: pytest.fail("a model was loaded first"))
    assert cli.main(["score-nano", *argv]) == 2
    assert said in capsys.readouterr().err
