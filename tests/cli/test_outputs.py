"""Two runs never replace each other's work: names are held from before the work until it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from longcat_core.cli import main as cli
from longcat_core.cli.outputs import Outputs
from longcat_core.errors import LongCatError
from longcat_core.files.atomic import atomic_path, free_name
from longcat_core.files.claims import claimed


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_default_names_of_runs_at_once_differ() -> None:
    with Outputs() as first, Outputs() as second, Outputs() as third:
        names = [outputs.default(Path("longcat.mp4")) for outputs in (first, second, third)]
        assert names == [Path("longcat.mp4"), Path("longcat-2.mp4"), Path("longcat-3.mp4")]
        assert first.notes == [] and second.notes == ["longcat.mp4 is taken; this run writes longcat-2.mp4"]
    assert os.listdir() == []


def test_a_default_name_replaces_nothing_that_appears_during_the_work() -> None:
    with Outputs() as outputs:
        name = outputs.default(Path("longcat.mp4"))
        assert outputs.settled(name) == name
        Path("longcat.mp4").write_text("theirs")
        assert outputs.settled(name) == Path("longcat-2.mp4")
    with Outputs() as outputs:
        Path("given.mp4").write_text("old")
        outputs.hold(Path("given.mp4"))
        assert outputs.settled(Path("given.mp4")) == Path("given.mp4")


def test_a_name_that_may_stand_there_is_used_again_unless_it_is_held() -> None:
    Path("long.mp4").write_text("ours")
    with Outputs() as first, Outputs() as second:
        assert first.default(Path("long.mp4"), new=False) == Path("long.mp4")
        assert second.default(Path("long.mp4"), new=False) == Path("long-2.mp4")
        assert second.settled(Path("long-2.mp4")) == Path("long-2.mp4")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "a", "-o", "o.mp4"], "--output"),
        (["generate", "a", "--contact-sheet", "o.png"], "--contact-sheet"),
        (["long", "a", "-o", "o.mkv"], "--output"),
        (["refine", "clip.webp", "-o", "o.gif"], "--output"),
        (["compare", "a", "--versus", "--fp8", "-o", "o"], "--output"),
        (["compare", "a", "--versus", "--fp8", "--page", "o.md"], "--page"),
        (["compare", "a", "--versus", "--fp8", "--page", "p.md"], "--page"),
    ],
)
def test_a_given_name_that_another_run_writes_is_refused(
    folder: Path, refused: Any, arguments: list[str], option: str
) -> None:
    from longcat_core.files.media import write_video

    from ..support.tiny import moving_clip

    write_video("clip.webp", moving_clip(17), 15)
    name = next((word for word in arguments if word.startswith("o.") or word == "o"), "p-plot.png")
    with claimed(Path(name), "busy"):
        sentence = refused(*arguments)
    assert f"another run is writing {name}; wait for its end or give another name to {option}" in sentence


@pytest.mark.parametrize("name", ["a" * 252 + ".mp4", "\U0001f600" * 63 + ".mp4", "\u6f22" * 84 + ".mp4"])
@pytest.mark.parametrize("command", ["generate", "long"])
def test_a_name_that_is_too_long_is_refused_before_the_work(refused: Any, command: str, name: str) -> None:
    assert "too long" in refused(command, "a", "-o", name)


def test_a_link_in_a_circle_is_refused(refused: Any) -> None:
    Path("o.mp4").symlink_to("o.mp4")
    assert "o.mp4 cannot be followed" in refused("generate", "a", "-o", "o.mp4")


def test_a_trial_leaves_nothing_and_touches_nothing(refused: Any) -> None:
    Path("~.mp4").write_text("theirs")
    refused("generate", "a", "--device", "mps", "-o", "o.mp4")
    assert Path("~.mp4").read_text() == "theirs"


def test_a_held_name_survives_that_its_work_fails() -> None:
    with pytest.raises(LongCatError), Outputs() as outputs:
        outputs.hold(Path("o.mp4"))
        with atomic_path("o.mp4"):
            raise LongCatError("the work failed")
    assert os.listdir() == [] and free_name(Path("o.mp4")) == Path("o.mp4")
    assert cli.BAD_INPUT == 2
