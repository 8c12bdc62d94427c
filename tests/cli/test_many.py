"""`longcat generate --prompts-file`: a video for each prompt, from one load, and again what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.files.claims import claimed
from longcat_core.files.media import read_video, write_video
from longcat_core.generate.request import GenerateRequest

from ..support.python_path import python_path
from ..support.tiny import moving_clip, tiny_pipeline

ONE, TWO = "a red circle moves right on a blue background", "a red circle moves up on a blue background"
SMALL = ["--size", "16x32", "--frames", "9", "--steps", "2", "--device", "cpu"]
RUN = ["generate", "--prompts-file", "three.txt", *SMALL]
NAMES = ["longcat-001.mp4", "longcat-002.mp4", "longcat-003.mp4", "longcat-run.json"]


@pytest.fixture
def inputs(folder: Path) -> None:
    """Prompts, the first of them twice, with what editors leave; an image, a clip and a file in the way."""
    Path("three.txt").write_bytes(f"\ufeff{ONE}\r\n\r\n  {TWO}  \n{ONE}\n".encode())
    Path("empty.txt").write_text(" \n\n", encoding="utf-8")
    Image.new("RGB", (32, 16), "red").save("good.png")
    write_video("clip.mkv", moving_clip(9, 16, 32), 15)
    Path("theirs").mkdir()
    Path("theirs", NAMES[1]).write_bytes(b"precious")
    Path("file").touch()


@pytest.fixture
def loads(inputs: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tiny model is loaded instead: the prompts that are to come, for each load."""
    loaded, pipeline = [], tiny_pipeline()
    monkeypatch.setattr(commands, "load_pipeline", lambda _, **given: loaded.append(given["prompts"]) or pipeline)
    return loaded


@pytest.fixture
def fails(loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Makes the video with this number, from 0, of the next load fail after its first step."""

    def at(number: int, error: BaseException) -> None:
        pipeline, made = tiny_pipeline(), 0

        def generate(request: Any, callback: Any, on_frames: Any) -> Any:
            nonlocal made
            made += 1

            def after(step: Any) -> None:
                if made > number:
                    raise error
                callback(step)

            return type(pipeline).generate(pipeline, request, after, on_frames=on_frames)

        monkeypatch.setattr(pipeline, "generate", generate, raising=False)
        monkeypatch.setattr(commands, "load_pipeline", lambda *_, **__: pipeline)

    return at


def names(folder: str = "three-videos") -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


def content(folder: str = "three-videos") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def videos() -> dict[str, bytes]:
    return {name: held for name, held in content().items() if name != NAMES[3]}


@pytest.fixture
def refused_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command with --output in a folder that is there: its files must stay as they were, though trial writes
    change its time. Returns the sentence."""

    def run(folder: str, *arguments: str) -> str:
        monkeypatch.setattr(commands, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
        capsys.readouterr()
        before = content(folder)
        assert cli.main([*RUN, *arguments, "-o", folder]) == cli.BAD_INPUT
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("longcat: error: ") and err.count("\n") == 1, err
        assert content(folder) == before
        return err

    return run


@pytest.mark.parametrize("given", [(), ("--image", "good.png"), ("--video", "clip.mkv", "--cond-frames", "5")])
def test_each_video_is_that_of_its_own_command(loads: list[Any], capsys: Any, given: tuple[str, ...]) -> None:
    assert cli.main([*RUN, *given, "--seed", "7", "-o", "all/v.mkv"]) == 0
    out, err = capsys.readouterr()
    assert len(loads) == 1 and set(loads[0]) >= {ONE, TWO}
    assert names("all") == ["v-001.mkv", "v-002.mkv", "v-003.mkv", "v-run.json"]
    assert "video 2 of 3: seed 7, finished and saved in all/v-002.mkv" in out
    assert "all/v-001.mkv to v-003.mkv: 3 videos of 9 frames of 16x32" in out
    assert "video 3 of 3, step" in err and "video 3 of 3, decoding" in err
    # The second one of the same prompt has the next seed.
    for number, (prompt, seed) in enumerate([(ONE, "7"), (TWO, "7"), (ONE, "8")], 1):
        assert cli.main(["generate", prompt, *SMALL, *given, "--seed", seed, "-o", "one.mkv"]) == 0
        assert Path("one.mkv").read_bytes() == Path("all", f"v-{number:03}.mkv").read_bytes()


def test_what_it_returns_is_what_python_returns(loads: list[Any]) -> None:
    assert cli.main([*RUN, "-o", "v.mkv"]) == 0
    request = GenerateRequest(TWO, height=16, width=32, frames=9, steps=2)
    assert (read_video("v-002.mkv")[0] == tiny_pipeline().generate(request).frames).all()


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), cli.INTERRUPTED), (MemoryError(), cli.BAD_INPUT)],
    ids=["ctrl-c", "memory"],
)
def test_what_is_finished_is_kept(loads: list[Any], fails: Any, monkeypatch: Any, capsys: Any, error, code) -> None:
    cli.main([*RUN, "-o", "whole"])
    load = commands.load_pipeline
    fails(1, error)
    assert cli.main(RUN) == code
    said = capsys.readouterr().err
    assert "1 of 3 videos are finished and kept in three-videos; run the same command again to make the others" in said
    assert names() == [NAMES[0], NAMES[3]]
    before = Path("three-videos", NAMES[0]).stat().st_mtime_ns

    monkeypatch.setattr(commands, "load_pipeline", load)
    assert cli.main(RUN) == 0
    assert Path("three-videos", NAMES[0]).stat().st_mtime_ns == before
    assert content() == content("whole")
    assert "video 1 of 3: already in three-videos/longcat-001.mp4" in capsys.readouterr().out
    # Nothing is missing, so nothing is loaded.
    loads.clear()
    assert cli.main(RUN) == 0 and not loads


def test_what_failed_at_once_leaves_nothing(loads: list[Any], fails: Any, capsys: Any) -> None:
    fails(0, KeyboardInterrupt())
    assert cli.main([*RUN, "-o", "new/folder"]) == cli.INTERRUPTED
    assert not Path("new").exists() and "kept" not in capsys.readouterr().err


def test_prompts_may_be_added_and_left_out(loads: list[Any]) -> None:
    cli.main(RUN)
    before = content()
    loads.clear()
    Path("three.txt").write_text(f"{ONE}\n{TWO}\n", encoding="utf-8")
    assert cli.main(RUN) == 0 and not loads and content() == before
    Path("three.txt").write_text(f"{ONE}\n{TWO}\n{ONE}\n{TWO}\n", encoding="utf-8")
    assert cli.main(RUN) == 0
    assert names() == sorted([*NAMES, "longcat-004.mp4"])
    assert all(content()[name] == before[name] for name in NAMES[:3])


def test_a_deleted_video_is_made_again(loads: list[Any]) -> None:
    cli.main(RUN)
    before = videos()
    Path("three-videos", NAMES[1]).unlink()
    assert cli.main(RUN) == 0 and videos() == before
    # As if the run had been killed between the file and its record.
    record = json.loads(content()[NAMES[3]])
    del record["finished"][NAMES[0]]
    # No name but those of videos counts.
    record["finished"]["../three.txt"] = ""
    Path("three-videos", NAMES[3]).write_text(json.dumps(record), encoding="utf-8")
    assert cli.main(RUN) == 0 and videos() == before
    assert json.loads(content()[NAMES[3]])["finished"].keys() == before.keys()


def test_a_record_without_videos_refuses_nothing(loads: list[Any]) -> None:
    cli.main(RUN)
    for name in NAMES[:3]:
        Path("three-videos", name).unlink()
    assert cli.main([*RUN, "--steps", "1"]) == 0
    assert json.loads(content()[NAMES[3]])["settings"]["steps"] == 1


OTHER = {
    "steps": (["--steps", "3"], "steps 2 there, 3 now"),
    "seed": (["--seed", "1"], "seed 0 there, 1 now"),
    "rate": (["--fps", "10"], "fps 15.0 there, 10.0 now"),
    "lossy": (["--dtype", "bfloat16"], "precision"),
    "image": (["--image", "good.png"], "given frames"),
    "prompt": (["--prompts-file", "other.txt"], f"prompt 2 {TWO} there"),
}


@pytest.mark.parametrize(("options", "said"), OTHER.values(), ids=OTHER)
def test_another_run_is_refused(loads: list[Any], refused_in: Any, options: list[str], said: str) -> None:
    cli.main([*RUN, "-o", "made"])
    Path("other.txt").write_text(f"{ONE}\n{ONE}\n", encoding="utf-8")
    found = refused_in("made", *options)
    assert "made/longcat-run.json is of another run" in found and said in found and "name another output" in found


def test_a_name_with_another_ending_shares_the_record_and_is_another_run(loads: list[Any], capsys: Any) -> None:
    cli.main(RUN)
    before = content()
    assert cli.main([*RUN, "--seed", "1", "-o", "three-videos/longcat.mkv"]) == cli.BAD_INPUT
    assert "its videos are .mp4, not .mkv" in capsys.readouterr().err and content() == before


BAD = {
    "prompt too": ([ONE], "prompts and --prompts-file exclude each other"),
    "no prompts": (["--prompts-file", "empty.txt"], "empty.txt holds no prompts"),
    "no file": (["--prompts-file", "none.txt"], "none.txt does not exist"),
    "sheet": (["--contact-sheet", "a.png"], "--contact-sheet shows one video"),
    "ending": (["-o", "a.avi"], "must end in .mp4"),
    "folder is a file": (["-o", "file"], "file is not a folder"),
    "in a file": (["-o", "file/a.mp4"], "file is not a folder"),
    "frames": (["--frames", "10"], "10 frames"),
    "image": (["--image", "none.png", "-o", "new"], "none.png does not exist"),
    "model": (["--model", "none", "-o", "new/one"], "none"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(inputs: None, refused: Any, options: list[str], said: str) -> None:
    assert said in refused(*RUN, *options)


def test_a_prompt_is_needed(refused: Any) -> None:
    assert "a PROMPT is missing" in refused("generate")


def test_a_changed_video_is_not_replaced(loads: list[Any], refused_in: Any) -> None:
    cli.main([*RUN, "-o", "made"])
    Path("made", NAMES[2]).write_bytes(b"cut by hand")
    assert "made/longcat-003.mp4 was changed after it was made" in refused_in("made")


def test_files_of_others_are_not_replaced(loads: list[Any], refused_in: Any) -> None:
    assert "theirs/longcat-002.mp4 exists and is not of this run" in refused_in("theirs")
    Path("theirs", NAMES[3]).write_text("{}", encoding="utf-8")
    assert "theirs/longcat-run.json is not the record of a run" in refused_in("theirs")


def test_one_run_at_a_time(inputs: None, refused_in: Any) -> None:
    with claimed(Path("theirs", NAMES[3]), "busy"):
        assert "another run is writing theirs/longcat-run.json" in refused_in("theirs")


def test_a_full_disk_is_refused(inputs: None, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    assert "may take" in refused(*RUN)


def test_a_killed_run_of_the_bundled_model_goes_on(tmp_path: Path) -> None:
    """Real processes: SIGKILL while the second of three videos is made, and the same command again."""
    (tmp_path / "p.txt").write_text(f"{ONE}\n{TWO}\n{ONE}\n", encoding="utf-8")
    options = ["--frames", "5", "--steps", "3", "--guidance", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "longcat_core", "generate", "--prompts-file", "p.txt", *options]
    # The package need not be installed, as on a machine of `make test-gpu`.
    environment = os.environ | python_path(Path(__file__).parents[2])
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True}
    settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **settings) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.kill()
        process.communicate(timeout=60)
    assert "video 1 of 3: seed 0, finished and saved in p-videos/longcat-001.mp4" in first
    made = (tmp_path / "p-videos" / NAMES[0]).stat().st_mtime_ns
    again = subprocess.run(command, timeout=120, check=True, **settings)
    assert "video 1 of 3: already in p-videos/longcat-001.mp4" in again.stdout
    assert (tmp_path / "p-videos" / NAMES[0]).stat().st_mtime_ns == made
    # Neither locks nor temporary files of the killed run are left.
    assert sorted(file.name for file in (tmp_path / "p-videos").iterdir()) == NAMES
    assert len(read_video(tmp_path / "p-videos" / NAMES[2])[0]) == 5
