"""The command: bad input is one clear sentence before any model is loaded; files appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from longcat_core.generate.text_cache import cache_folder
from longcat_core.optimize import compilation
from longcat_core.optimize.attention import names
from longcat_core.optimize.plan import Plan
from longcat_core.optimize.sparse.settings import SPARSE_KERNELS
from longcat_core.sampling.sampler import Step

from ..support.tiny import moving_clip

PROMPT = "a red circle moves right on a blue background"


@pytest.fixture
def inputs(folder: Path) -> None:
    """Files that some of the bad inputs name."""
    Image.new("RGB", (32, 32)).save("good.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save("truncated.jpg")
    Path("truncated.jpg").write_bytes(Path("truncated.jpg").read_bytes()[:900])
    Path("text.png").write_text("no image", encoding="utf-8")
    Path("empty.png").touch()
    media.write_video("short.webp", moving_clip(5), 15)
    Path("folder.mp4").mkdir()
    Path("dit").mkdir()
    Path("model.safetensors").touch()
    os.mkfifo("pipe.mp4")


# Arguments after the prompt, and what the sentence must contain. What requests, clips, LoRAs and folders of segments
# refuse is tested in their rooms; here are the rules of arguments, of places to write to and of model folders, and a
# row for each of the others.
BAD: dict[str, tuple[str, ...]] = {
    "blue": ("blue", "--help"),
    "--stepz 3": ("--stepz", "--help"),
    "--step 3": ("--step", "--help"),
    # values of options
    "--size 64": ("'64'", "64x96"),
    "--size 64x96x3": ("'64x96x3'", "64x96"),
    "--size -64x96": ("--size",),
    "--width wide": ("--width", "cannot read 'wide' as a whole number"),
    "--seed " + "9" * 5000: ("9999", "as a whole number"),
    "--fps fast": ("cannot read 'fast' as a number",),
    "--image=": ("--image: it is empty",),
    "--model=": ("--model: it is empty",),
    "--lora=": ("--lora: it is empty",),
    "--size 64x96 --width 96": ("--size", "--width", "one or the other"),
    "--distilled --schedule base": ("--distilled", "--schedule base"),
    "--dtype int4": ("int4", "float32"),
    # what the request refuses
    "--frames 32": ("32 frames", "29 and 33"),
    "--height 0": ("height 0", "16 to 4096"),
    "--schedule fast": ("'fast'", "base, distilled, enhance_hf"),
    # images and clips
    "--image missing.png": ("missing.png does not exist",),
    "--image folder.mp4": ("folder.mp4 is a folder",),
    "--image text.png": ("text.png is not a readable image", "PNG"),
    "--image empty.png": ("empty.png is not a readable image", "PNG"),
    "--image truncated.jpg": ("truncated.jpg is not a readable image", "PNG"),
    "--video missing.mp4": ("missing.mp4 does not exist",),
    "--video short.webp": ("short.webp lasts 0.33 s and has 5 frames", "13", "0.87 s", "at most 5"),
    # outputs
    "--output a.avi": ("'a.avi'", ".mp4, .mkv, .webp, .gif"),
    "--output missing/a.mp4": ("missing", "does not exist", "create it"),
    "--output good.png/a.mp4": ("good.png", "does not exist"),
    "--output folder.mp4": ("folder.mp4 is a folder",),
    "--output pipe.mp4": ("error: pipe.mp4 is not a regular file; choose another name",),
    "--output /proc/a.mp4": ("/proc", "choose another place"),
    "--output " + "a" * 300 + ".mp4": ("aaa", "File name too long"),
    "--contact-sheet a.jpg": ("'a.jpg'", ".png"),
    "--image good.png --contact-sheet ./good.png": ("good.png is the input itself", "--contact-sheet"),
    "--video short.webp --cond-frames 5 -o short.webp": ("short.webp", "--output"),
    # models and machine
    "--model missing": ("missing", "does not exist"),
    "--model dit": ("dit has no folder vae", "--vae"),
    "--model model.safetensors": ("model.safetensors has no folder vae", "--vae"),
    "--model dit --vae good.png": ("text_encoder", "--text-encoder"),
    "--vae good.png": ("without a model", "--model"),
    "--text-encoder good.png": ("without a model", "--model"),
    "--lora missing.safetensors": ("missing.safetensors does not exist",),
    "--lora text.png": ("text.png is not a safetensors file",),
    "--lora text.png:1e39": ("strength 1e+39 of text.png", "-1000 to 1000"),
    "--device abacus": ("'abacus'", "cpu"),
    "--device mps": ("'mps'", "cpu"),
    "--device cuda:77": ("'cuda:77'", "cpu"),
    "--memory 4 --device cpu": ("--memory", "runs on the cpu"),
    "--stream-blocks -1": ("--stream-blocks -1", "0 or more"),
    "--attention magic": ("'magic'", "sdpa"),
}


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("options", BAD, ids=lambda options: options[:40])
def test_bad_input_is_one_sentence(refused: Any, options: str) -> None:
    sentence = refused("generate", PROMPT, *options.split())
    assert all(words in sentence for words in BAD[options]), sentence


def test_bad_prompts(refused: Any) -> None:
    for prompt, said in ([], "PROMPT"), ([""], "prompt is empty"), (["\udc80"], "not valid UTF-8"):
        assert said in refused("generate", *prompt)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["verify"], ["--nonsense"]])
def test_bad_commands(refused: Any, arguments: list[str]) -> None:
    assert "--help" in refused(*arguments)


def test_full_disk(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    sentence = refused("generate", PROMPT, "-o", "a.mp4")
    assert "a.mp4" in sentence and "0.0 MB free" in sentence and "make room" in sentence


def test_missing_weights_of_the_bundled_model(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Path("missing.safetensors")
    monkeypatch.setattr(model_paths, "NANO_MODEL", missing)
    monkeypatch.setattr(ModelPaths.__init__, "__defaults__", (missing, *ModelPaths.__init__.__defaults__[1:]))
    assert "longcat train-nano" in refused("generate", PROMPT)


# --- runs, with a stand-in for the models ----------------------------------------------------------------------------


class StandIn:
    """Has the pipeline's face: calls back like the sampler and returns a gradient."""

    def __init__(self, at_step: Callable[[int], None] = lambda _: None, warn: str = "") -> None:
        self.at_step, self.warn = at_step, warn
        self.vae, self.plan_note = SimpleNamespace(tiling=False), ""
        self.request: GenerateRequest | None = None

    def generate(
        self, request: GenerateRequest, callback: Callable[[Step], None], on_frames: Callable[[np.ndarray], None]
    ) -> Generation:
        self.request = request
        if self.warn:
            warnings.warn_explicit(self.warn, UserWarning, "pipeline.py", 1, module="longcat_core.generate.pipeline")
        for i in range(request.steps):
            self.at_step(i)
            callback(Step(i, request.steps, 0.0, 0.0, torch.zeros(1), torch.zeros(1)))
        frames = np.zeros((request.frames, request.height, request.width, 3), np.uint8)
        frames[...] = np.arange(request.frames, dtype=np.uint8)[:, None, None, None]
        for part in (frames[:1], frames[1:]):
            on_frames(part)
        return Generation(frames, torch.zeros(1), request)


def stand_in(monkeypatch: pytest.MonkeyPatch, **options: Any) -> StandIn:
    model = StandIn(**options)
    monkeypatch.setattr(commands, "load_pipeline", lambda *_, **__: model)
    return model


def test_files_are_written_and_named(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    stand_in(monkeypatch)
    arguments = ["generate", PROMPT, "-o", "a.webp", "--contact-sheet", "a.png", "--steps", "3", "--seed", "5"]
    Path("a.webp").write_bytes(b"old")
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a.webp: 33 frames of 64x96 at 15 fps, seed 5, in ")
    assert "100%" in err and "3 steps" in err, "the progress bar counts the steps"
    frames, fps = media.read_video("a.webp")
    assert frames.shape == (33, 64, 96, 3) and (frames[7] == 7).all() and fps == pytest.approx(15, abs=0.1)
    assert sorted(os.listdir()) == ["a.png", "a.webp"]


def test_options_reach_the_pipeline(folder: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(commands, "load_pipeline", lambda _, **options: asked.append(options) or StandIn())
    monkeypatch.setattr(compilation, "why_not", lambda device: "")
    command = ["generate", PROMPT, "--steps", "1", "--device", "cpu"]
    for options in ("", "--compile off", "--compile blocks --fp8 --dtype bfloat16 --stream-blocks 2 --split-guidance"):
        assert cli.main([*command, *options.split()]) == 0
    assert [options["optimizations"].compile for options in asked] == ["off", "off", "blocks"]
    assert [options["fp8"] for options in asked] == [False, False, True]
    assert [options["dtype"] for options in asked] == [torch.float32, torch.float32, torch.bfloat16]
    assert [options["least"] for options in asked] == [Plan(), Plan(), Plan(2, split_guidance=True)]
    monkeypatch.setattr(compilation, "why_not", lambda device: "there is no C++ compiler")
    sentence = refused(*command, "--compile", "blocks")
    assert "no C++ compiler" in sentence and "--compile off" in sentence and len(asked) == 3


def test_options_reach_the_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in(monkeypatch)
    clip = moving_clip(9)
    media.write_video("clip.webp", clip, 25)
    line = "--video clip.webp --cond-frames 5 --size 32x48 --frames 9 --steps 2 --guidance 3.5 --seed 4 --fps 12.5"
    options = [*line.split(), "--kv-cache", "official", "--schedule", "enhance_hf", "--negative-prompt", "fog"]
    line = "--step-cache 0.1 --guidance-until 0.9 --speed near"
    options += line.split()
    assert cli.main(["generate", PROMPT, "-o", "a.mp4", *options]) == 0
    wanted = FilledRequest(
        *(PROMPT, "fog", 32, 48, 9, 2, 3.5, 4, "enhance_hf", None, Path("clip.webp")),
        num_cond_frames=5,
        kv_cache="official",
        fps=12.5,
        step_cache=0.1,
        guidance_until=0.9,
        speed="near",
    )
    assert model.request == wanted
    np.testing.assert_array_equal(model.request.given, clip[::2])


def test_distilled_is_short_for_three_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in(monkeypatch)
    assert cli.main(["generate", PROMPT, "--distilled"]) == 0
    assert (model.request.schedule, model.request.steps, model.request.guidance_scale) == ("distilled", 16, 1.0)


def test_default_name_overwrites_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    for _ in range(3):
        assert cli.main(["generate", PROMPT, "--steps", "1"]) == 0
    assert sorted(os.listdir()) == ["longcat-2.mp4", "longcat-3.mp4", "longcat.mp4"]


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            LongCatError("the file a.safetensors is cut short;\n get it again"),
            r"the file a.safetensors is cut short;\n get it again",
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


# --- other commands --------------------------------------------------------------------------------------------------


def test_backends_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    dense, sparse = capsys.readouterr().out.removeprefix("attention:\n").split("sparse attention:\n")
    for lines, wanted in ((dense, names()[1:]), (sparse, SPARSE_KERNELS[1:])):
        found = {line.split()[0]: line.split()[1] for line in lines.splitlines()}
        assert sorted(found) == sorted(wanted) and set(found.values()) <= {"yes", "no"}
    assert found["plain"] == "yes"


def test_train_nano_has_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train-nano", "--help"])
    assert "--steps" in capsys.readouterr().out


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_module_and_help_without_heavy_imports() -> None:
    result = _run("-X", "importtime", "-m", "longcat_core", "generate", "--help")
    assert result.returncode == 0 and "--negative-prompt" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "av", "diffusers", "transformers", "tqdm"}


def test_missing_packages_are_a_sentence() -> None:
    """-S leaves the installed packages out, as an installation without extras has them."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); import longcat_core.__main__ as m; "
    result = _run("-S", "-c", f"{code}sys.exit(m.run())", "generate", PROMPT)
    assert result.returncode == 2 and re.fullmatch(
        r"longcat: error: the command needs the package \w+; run: pip install 'longcat-video\[headless\]'\n",
        result.stderr,
    )


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
        "from longcat_core.cli import bench\n"
        "bench.verify = run\n"
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
    # Packages of kernels warn when they are imported.
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    with open(write, "wb") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert ended.returncode == cli.BROKEN_PIPE and ended.stderr == ""


def test_plan_shows_what_goes_where(capsys):
    assert cli.main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"{n} GiB" for n in (48, 32, 24, 16, 12, 8)]
    assert "everything on the GPU" in lines[2] and "48 blocks" not in lines[3] and "48 blocks" in lines[-1]
    # Given frames and their keys take room; without guidance there are no halves.
    assert cli.main(["plan", "24", "--cond-frames", "13"]) == 0
    assert "the KV cache" in capsys.readouterr().out
    assert cli.main(["plan", "4", "--no-guidance"]) == 0
    said = capsys.readouterr().out
    assert "too much" in said and "halves" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--frames 92", "92 frames"),
        ("--size 481x832", "height 481"),
        ("--frames 13 --cond-frames 13", "leave nothing to generate"),
        ("0", "0 GiB"),
        ("nan", "nan GiB"),
        ("1e300", "1e+300 GiB"),
    ],
)
def test_plan_refuses(refused: Any, options: str, said: str) -> None:
    assert said in refused("plan", *options.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--steps 0", "0 steps"),
        ("--guidance nan", "guidance nan"),
        ("--prompts 1", "1 prompts"),
        ("--step-cache 2", "step cache 2.0 is out of range"),
        ("--guidance-until -1", "guidance until -1.0 is out of range"),
        ("--sparse much", "--sparse much is neither a density from 0 to 1 nor a file"),
        ("--device tpu", "tpu"),
        ("--versus=--steps=0", "--versus '--steps=0': 0 steps"),
        ("--versus=--prompts=3", "--versus '--prompts=3': unrecognized arguments"),
        ("--output scores.txt", "must end in .json"),
        ("--output nowhere/scores.json", "the folder"),
        ("--model nowhere", "nowhere does not exist"),
    ],
)
def test_score_nano_refuses(refused: Any, monkeypatch: pytest.MonkeyPatch, options: str, said: str) -> None:
    monkeypatch.setattr(commands, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded first"))
    assert said in refused("score-nano", *options.split())


@pytest.mark.parametrize("given", [True, False])
def test_encodings_are_kept_unless_the_option_says_no(tmp_path, monkeypatch, given):
    """All prompts that are read are named when the model is loaded, so that it can do without its text encoder."""
    asked = []

    def load(_, **options):
        asked.append(options)
        raise LongCatError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_pipeline", load)
    extra = ["--no-text-cache"] if given else []
    assert cli.main(["generate", "a red circle", "--negative-prompt", "blur", *extra]) == cli.BAD_INPUT
    assert cli.main(["generate", "a red circle", "--guidance", "1", *extra]) == cli.BAD_INPUT
    assert cli.main(["long", "one", "two", "--segments", "2", "--negative-prompt", "blur", *extra]) == cli.BAD_INPUT
    assert [options["text_cache"] for options in asked] == [None if given else cache_folder()] * 3
    wanted = [{"a red circle", "blur"}, {"a red circle"}, {"one", "two", "blur"}]
    assert [set(options["prompts"]) for options in asked] == wanted
