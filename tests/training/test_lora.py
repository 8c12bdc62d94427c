"""LoRA training: the file is what was trained, runs that were cut off go on bit for bit, bad input is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_core.checkpoints.adapted import RuntimeLoras
from longcat_core.checkpoints.load import load_transformer
from longcat_core.cli import main as cli
from longcat_core.errors import LongCatError
from longcat_core.files import media
from longcat_core.files.safetensors_io import read_header, read_metadata, read_tensors, write_safetensors
from longcat_core.optimize.switches import Optimizations
from longcat_core.training import lora as train_lora
from longcat_core.training.clips import find_clips, left_out, notes
from longcat_core.training.lora import LAYERS, LoraTrainer, Recipe

from ..support.clips import numbered, numbers, write_clip
from ..support.python_path import python_path
from . import killed_training
from .killed_training import PATHS, RECIPE, samples


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, torch.Tensor]]:
    """A run of the tiny model on clips that are encoded already; its LoRA."""
    monkeypatch.setattr(train_lora, "_encode", lambda *_: samples())

    def run(name: str = "a", recipe: Recipe = RECIPE, **options: Any) -> dict[str, torch.Tensor]:
        return read_tensors(killed_training.train(tmp_path, name, recipe, **options))

    return run


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_file_is_what_was_trained(train, tmp_path):
    losses = []
    lora = train(recipe=replace(RECIPE, steps=30), report=lambda what, done, of, loss: losses.append(loss))
    assert len(losses) == 30 and sum(losses[-8:]) < sum(losses[:8])
    assert len(lora) == 3 * 2 * len(LAYERS) and all(tensor.dtype == torch.float32 for tensor in lora.values())
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert (metadata["rank"], metadata["alpha"], metadata["steps"]) == ("4", "2", "30")
    assert metadata["base"] == PATHS.fingerprints()["model"]
    # The adapters of the training, those of the file, and the file merged: one network.
    trainer = LoraTrainer(load_transformer(PATHS.model), RECIPE)
    trainer.load_state(read_tensors(tmp_path / "a.state.safetensors"), 30)
    adapted, merged = (
        load_transformer(PATHS.model),
        load_transformer(PATHS.model, lora=[(tmp_path / "a.safetensors", 1.0)]),
    )
    RuntimeLoras(adapted, [(tmp_path / "a.safetensors", 1.0)])
    x, context = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 5, 48)
    with torch.no_grad():
        outs = [m(x, torch.tensor([500.0]), context) for m in (trainer.model, adapted, merged)]
        plain = load_transformer(PATHS.model)(x, torch.tensor([500.0]), context)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-4, rtol=1e-4)
    assert (outs[0] - plain).abs().max() > 0.05


def test_a_seed_is_a_lora_bit_for_bit_and_options_change_it(train):
    first = train("a")
    state = torch.get_rng_state()
    assert same(first, train("b")) and torch.equal(torch.get_rng_state(), state), "others' random numbers are theirs"
    changes = {"seed": 1, "shift": 3.0, "caption_dropout": 0.9, "cond_share": 0.0, "batch": 1, "rank": 3, "alpha": 4.0}
    for name, value in (changes | {"learning_rate": 1e-3}).items():
        assert not same(first, train(name, replace(RECIPE, **{name: value}))), name
    some = train("layers", replace(RECIPE, layers=("attn.qkv", "ffn.gate_up")))
    assert {name.split(".", 3)[3].partition(".lora")[0].removesuffix(".alpha") for name in some} == {
        "attn.qkv",
        "ffn.gate_up",
    }


def test_gradient_checkpointing_and_compiled_blocks_train_the_same(train, monkeypatch):
    from longcat_core.model.block import run_block
    from longcat_core.optimize.compilation import Regional
    from longcat_core.optimize.execution import Execution

    plain = train("a", optimizations=Optimizations(attention="sdpa"))
    again = train("b", optimizations=Optimizations(attention="sdpa", gradient_checkpointing=True))
    graphs = Regional(run_block, "the block", "aot_eager")
    monkeypatch.setattr(Execution, "compiled_block", graphs)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="compiling the block"):
        compiled = train("c", replace(RECIPE, steps=2), optimizations=Optimizations(attention="sdpa", compile="blocks"))
    torch._dynamo.reset()
    short = train("d", replace(RECIPE, steps=2), optimizations=Optimizations(attention="sdpa"))
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(compiled[name], short[name], atol=1e-4, rtol=1e-3)


def test_a_file_is_trained_by_one_run_at_a_time(train, tmp_path):
    def second(*_: Any) -> None:
        with pytest.raises(LongCatError, match=r"another run is training .*a\.safetensors; wait for its end or name"):
            train("a", replace(RECIPE, seed=1))

    train("a", replace(RECIPE, steps=2), report=second)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "a.state.safetensors", "clip.mkv"]


ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | python_path(ROOT)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the other process: sums in another order would be other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[[Path, str], int]]:
    """Runs the training in a folder until it kills itself; how it ended."""
    command, pipe = [sys.executable, killed_training.__file__], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=ENVIRONMENT) as process:

        def run(folder: Path, moment: str) -> int:
            process.stdin.write(json.dumps({"folder": str(folder), "name": "killed", "moment": moment}) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.parametrize(
    "moment", ["step 1", "step 3", "step 6", "write 1", "write 2", "write 3", "write 5", "write 6"]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(train, tmp_path, one_thread, killed, moment):
    """By SIGKILL, in a process of its own: after a step, or just before a file takes its name."""
    wanted = train("wanted")
    assert killed(tmp_path, moment) == -signal.SIGKILL
    for name in ("killed.safetensors", "killed.state.safetensors"):
        if (tmp_path / name).exists():
            read_tensors(tmp_path / name)
    steps = []
    assert same(train("killed", report=lambda what, done, of, loss: steps.append(done)), wanted)
    begun = {
        "step 1": 1,
        "step 3": 3,
        "step 6": 5,
        "write 1": 1,
        "write 2": 3,
        "write 3": 3,
        "write 5": 5,
        "write 6": 7,
    }
    assert steps == list(range(begun[moment], 7))


def test_more_steps_go_on_and_other_settings_do_not(train, tmp_path):
    wanted = train("a", replace(RECIPE, steps=5, save_every=100))
    train("b", replace(RECIPE, steps=3))
    assert same(train("b", replace(RECIPE, steps=5)), wanted)
    steps = []
    train("b", replace(RECIPE, steps=5), report=lambda *told: steps.append(told))
    assert not steps, "all is there"
    for change, said in (
        ({"rank": 8}, "rank 4 there, 8 now"),
        ({"learning_rate": 1e-3}, "learning_rate 0.01 there, 0.001 now"),
    ):
        with pytest.raises(LongCatError, match=rf"b\.state\.safetensors has other settings \({said}\)"):
            train("b", replace(RECIPE, steps=9, **change))
    (tmp_path / "b.state.safetensors").unlink()
    with pytest.raises(LongCatError, match=r"b\.safetensors exists, without b\.state\.safetensors"):
        train("b")
    write_safetensors(tmp_path / "c.state.safetensors", {"a": torch.ones(1)})
    with pytest.raises(LongCatError, match=r"c\.state\.safetensors is not a training state"):
        train("c")


def rewritten(path: Path, change: Callable[[dict, dict], None], checksum: bool = True) -> None:
    """Write a state again with other tensors or header; `checksum`: keep its checksum, which then is wrong."""
    tensors, metadata = dict(read_tensors(path)), read_metadata(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if not checksum:
        del metadata["checksum"]
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


FIRST = "exp_avg.diffusion_model.blocks.0.attn.qkv.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[dict, dict], None], bool, str]] = {
    "a number": (lambda t, m: t[FIRST].view(-1)[5].add_(1e-3), True, "does not match its checksum"),
    "a sign of zero": (lambda t, m: t[FIRST].view(-1)[5].zero_().neg_(), True, "does not match its checksum"),
    "steps": (lambda t, m: m.update(step="3"), True, "does not match its checksum"),
    "steps of 5,000 digits": (lambda t, m: m.update(step="9" * 5000), True, "has no number of steps"),
    "steps below zero": (lambda t, m: m.update(step="-2"), True, "has no number of steps"),
    "steps of a half": (lambda t, m: m.update(step="2.5"), True, "has no number of steps"),
    "settings as a list": (lambda t, m: m.update(settings="[1]"), True, "is not a training state"),
    "settings nested": (lambda t, m: m.update(settings="[" * 99_999), True, "is not a training state"),
    "a tensor is missing": (lambda t, m: t.pop(FIRST) is None, False, f"lacks {FIRST}, 1 of 84"),
    "a tensor of one number": (lambda t, m: t.update({FIRST: torch.ones(1, 1)}), False, r"has other tensors \(exp_avg"),
    "a tensor of whole numbers": (lambda t, m: t.update({FIRST: t[FIRST].int()}), False, "has other tensors"),
    "a tensor too many": (lambda t, m: t.update(more=torch.ones(1)), False, r"has other tensors \(more\)"),
    "NaN, without a checksum": (lambda t, m: t[FIRST].fill_(torch.nan), False, "has NaN or infinite values"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_not_gone_on_with(train, tmp_path, damage):
    change, checksum, said = DAMAGE[damage]
    train("a", replace(RECIPE, steps=2))
    rewritten(tmp_path / "a.state.safetensors", change, checksum)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for steps in (2, 4):
        with pytest.raises(LongCatError, match=rf"a\.state\.safetensors .*{said}.*; name another file") as caught:
            train("a", replace(RECIPE, steps=steps), report=lambda *_: pytest.fail("it went on"))
        assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"{}", None])
def test_a_state_that_cannot_be_read_is_one_sentence(train, tmp_path, content):
    train("a", replace(RECIPE, steps=2))
    state = tmp_path / "a.state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] if content is None else content)
    with pytest.raises(LongCatError, match=r"a\.state\.safetensors .*, so training cannot go on; name another file"):
        train("a", replace(RECIPE, steps=4))


def test_a_state_of_an_older_version_goes_on_and_says_so(train, tmp_path):
    wanted = train("a", replace(RECIPE, steps=4))
    train("b", replace(RECIPE, steps=2))
    rewritten(tmp_path / "b.state.safetensors", lambda tensors, metadata: None, checksum=False)
    with pytest.warns(UserWarning, match=r"b\.state\.safetensors is of an older version and has no checksum"):
        assert same(train("b", replace(RECIPE, steps=4)), wanted)


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: flipped(raw, len(raw) - 9),
        lambda raw: flipped(raw, len(raw) // 2),
        lambda raw: flipped(raw, 8),
        lambda raw: flipped(raw, 100),
        lambda raw: raw[:-1],
        lambda raw: raw[:5],
        lambda raw: b"",
        lambda raw: raw + b"more",
        lambda raw: b"\0" * len(raw),
        lambda raw: None,
    ],
)
def test_a_damaged_lora_is_written_again_from_its_state(train, tmp_path, damage):
    train("a", replace(RECIPE, steps=2))
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    if (now := damage(whole)) is None:
        path.unlink()
    else:
        path.write_bytes(now)
    with pytest.warns(UserWarning, match=r"a\.safetensors was missing or did not match its state; it is written again"):
        train("a", replace(RECIPE, steps=2), report=lambda *_: pytest.fail("it went on"))
    assert path.read_bytes() == whole


def test_anothers_lora_beside_a_state_is_not_replaced(train, tmp_path):
    train("a", replace(RECIPE, steps=2))
    write_safetensors(tmp_path / "a.safetensors", {"x.lora_A.weight": torch.ones(2, 2)}, {"format": "pt"})
    before = (tmp_path / "a.safetensors").read_bytes()
    for steps in (2, 4):
        with pytest.raises(LongCatError, match=r"a\.safetensors is not the LoRA of a\.state\.safetensors; move"):
            train("a", replace(RECIPE, steps=steps))
    assert before == (tmp_path / "a.safetensors").read_bytes()


def test_equal_trainings_write_equal_bytes(train, tmp_path):
    """The order of a header must not follow the hashes of names, which differ between processes."""
    train("a", replace(RECIPE, steps=2))
    lora = list(read_header(tmp_path / "a.safetensors"))
    adapters = [name for name in lora if not name.endswith(".alpha")]
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in adapters)
    assert lora == [*adapters, *(f"{module}.alpha" for module in modules)] and len(modules) == len(lora) // 3
    train("b", replace(RECIPE, steps=2))
    for name in ("{}.safetensors", "{}.state.safetensors"):
        assert (tmp_path / name.format("a")).read_bytes() == (tmp_path / name.format("b")).read_bytes()


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(train, tmp_path, monkeypatch):
    loss_of = train_lora.flow_matching_loss
    count = 0

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return loss_of(*args, **options) * (float("nan") if count == 4 else 1)

    monkeypatch.setattr(train_lora, "flow_matching_loss", loss)
    with pytest.raises(
        LongCatError, match=r"loss is nan at step 4.*was saved before is kept.*--learning-rate than 0\.01"
    ):
        train("a")
    monkeypatch.undo()
    assert read_metadata(tmp_path / "a.safetensors")["steps"] == "2"
    assert all(tensor.isfinite().all() for tensor in read_tensors(tmp_path / "a.safetensors").values())


# The folder, and the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two clips, a picture and their captions; loading a model is a failure."""
    monkeypatch.chdir(tmp_path)
    clips = tmp_path / "clips"
    clips.mkdir()
    video = np.zeros((9, 32, 48, 3), np.uint8)
    video[:, :, :, 0] = np.arange(9)[:, None, None] * 20
    media.write_video(clips / "a.mkv", video, 15)
    media.write_video(clips / "b.webp", video[::-1], 15)
    Image.new("RGB", (48, 32), (9, 8, 7)).save(clips / "c.png")
    for name in "abc":
        (clips / f"{name}.txt").write_text(f" clip\n{name} ", encoding="utf-8")
    (clips / "notes.md").touch()
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(train_lora, name, lambda *_, **__: pytest.fail("a model was loaded"))
    return clips


def test_clips_are_found_with_their_captions(folder):
    clips = find_clips(folder, 5)
    assert [(clip.path.name, clip.caption, clip.frames) for clip in clips] == [
        ("a.mkv", "clip a", 5),
        ("b.webp", "clip b", 5),
        ("c.png", "clip c", 1),
    ]
    assert [clip.read().shape for clip in clips] == [(5, 32, 48, 3)] * 2 + [(1, 32, 48, 3)]
    assert [int(clip.read()[0, 0, 0, 0]) for clip in clips[:2]] == [0, 160], "from the first frame on"
    one = train_lora.clips_fingerprint(clips)
    (folder / "a.txt").write_text("another")
    assert one != train_lora.clips_fingerprint(find_clips(folder, 5))


@pytest.mark.parametrize(
    ("name", "codec", "fps", "taken"),
    [
        ("a.mkv", "ffv1", 30, [0, 2, 4, 6, 8]),
        ("a.ts", "libx264", 60, [0, 4, 8, 12, 16]),
        ("a.mpg", "mpeg2video", 25, [0, 2, 3, 5, 7]),
        ("a.wmv", "wmv2", 15, [0, 1, 2, 3, 4]),
        ("a.flv", "libx264", 7.5, [0, 0, 1, 1, 2]),
        ("a.m2ts", "libx264", 30, [0, 2, 4, 6, 8]),
        ("a.mov", "mpeg4", 12, [0, 1, 2, 2, 3]),
        ("a.ogv", "libvpx", 15, [0, 1, 2, 3, 4]),
    ],
)
def test_clips_of_any_kind_and_rate_are_taken_by_their_time(tmp_path, name, codec, fps, taken):
    form = {".ogv": "ogg", ".m2ts": "mpegts", ".wmv": "asf"}.get(Path(name).suffix)
    write_clip(tmp_path / name, numbered(24), fps, codec=codec, form=form)
    (tmp_path / "a.txt").write_text("a")
    [found] = find_clips(tmp_path, 5)
    assert numbers(found.read()) == taken and found.frames == 5
    assert (found.note == "") == (fps == 15) and left_out(tmp_path, [found]) == ""


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF", "a.avif", "a.jfif", "a.tga", "a.webp", "a.gif"])
def test_pictures_of_any_kind_are_one_frame(tmp_path, name):
    Image.new("RGB", (48, 32), (9, 8, 7)).save(tmp_path / name, format={".jfif": "JPEG"}.get(Path(name).suffix))
    (tmp_path / "a.txt").write_text("a")
    [found] = find_clips(tmp_path, 5)
    assert found.frames == 1 and found.read().shape == (1, 32, 48, 3)


def test_a_moving_picture_is_a_clip_and_pages_are_refused(tmp_path):
    frames = [Image.fromarray(frame) for frame in numbered(9)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=67)
    (tmp_path / "a.txt").write_text("a")
    [found] = find_clips(tmp_path, 5)
    assert numbers(found.read()) == [0, 1, 2, 3, 4]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(LongCatError, match=r"a\.tif has 9 pages"):
        find_clips(tmp_path, 5)


def test_a_clip_that_is_too_short_after_all_is_no_picture(tmp_path):
    write_clip(tmp_path / "a.mkv", numbered(2), 60)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(LongCatError, match=r"shorter than --frames 5, 0\.33 s at 15 fps \(a\.mkv has 1\)"):
        find_clips(tmp_path, 5)


def test_what_is_left_out_is_named(folder):
    clips = find_clips(folder, 5)
    assert left_out(folder, clips) == "", "notes.md is neither media nor a caption"
    for name in ("d.heic", "e.txt", "f.xyz", "f.txt", "g.mp3"):
        (folder / name).write_text("x")
    (folder / "h").mkdir()
    said = left_out(folder, clips)
    assert notes(folder, clips) == [said]
    fast = [replace(clips[0], note=f"{number}") for number in range(12)]
    assert notes(folder, fast)[1:] == [*(str(number) for number in range(10)), "2 more clips are taken by their time"]
    by_time = [replace(clips[0], note="x"), *clips[1:]]
    assert train_lora.clips_fingerprint(clips) != train_lora.clips_fingerprint(by_time)
    assert said.startswith(f"not used from {folder}: d.heic, e.txt, f.txt, f.xyz, g.mp3, h/; clips are .mp4 ")


def _written(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(), make(folder / name))


BAD: list[tuple[list[str], Callable[[Path], object] | None, str]] = [
    ([], lambda folder: (folder / "b.txt").unlink(), "b.webp has no caption; write what it shows into b.txt"),
    ([], _replaced("b.txt", os.mkfifo), "b.txt is a pipe or a device; give a regular file"),
    ([], _replaced("b.txt", os.mkdir), "b.txt is a folder; give a file"),
    ([], _written("c.txt", " \n"), "c.txt is empty; write what c.png shows"),
    ([], _written("c.txt", b"\xff\xfe\x00"), "c.txt is not UTF-8 text"),
    ([], _written("a.mkv", "no video" * 99), "a.mkv is not a readable video"),
    ([], _written("c.png", "no picture"), "c.png is not a readable image"),
    (["--frames", "13"], None, "are shorter than --frames 13, 0.87 s at 15 fps (a.mkv has 9, b.webp has 9)"),
    (["--frames", "12"], None, "12 frames are not of the form 4k+1"),
    (["--size", "60x96"], None, "height 60 is not a multiple of 16"),
    ([], lambda folder: [file.unlink() for file in folder.iterdir()], "clips holds no clips"),
    (["--rank", "0"], None, "rank 0 is out of range"),
    (["--steps", "0"], None, "steps 0 is out of range"),
    (["--batch", "-1"], None, "batch -1 is out of range"),
    (["--save-every", "0"], None, "save every 0 is out of range"),
    (["--learning-rate", "0"], None, "learning rate 0.0 is out of range"),
    (["--learning-rate", "nan"], None, "learning rate nan is out of range"),
    (["--alpha", "-1"], None, "alpha -1.0 is out of range"),
    (["--caption-dropout", "1.5"], None, "caption dropout 1.5 is out of range"),
    (["--cond-share", "-0.1"], None, "cond share -0.1 is out of range"),
    (["--shift", "0"], None, "shift 0.0 is out of range"),
    (["--seed", "-1"], None, "seed -1 is out of range"),
    (["--layers", "attn.qkv,mlp"], None, "no layers mlp to train; choose from attn.qkv"),
    (["--dtype", "float16"], None, "float16"),
    (["--vae", "vae.safetensors"], None, "without a model"),
    (["-o", "a.pt"], None, "'a.pt' must end in .safetensors"),
    (["-o", "a.state.safetensors"], None, "not in .state.safetensors"),
    (["-o", "nowhere/a.safetensors"], None, "nowhere does not exist"),
]


@pytest.mark.parametrize(("options", "spoil", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(folder, capsys, options, spoil, said):
    if spoil is not None:
        spoil(folder)
    before = sorted(folder.parent.rglob("*"))
    arguments = [str(folder), "-o", "a.safetensors", "--frames", "9", "--size", "64x96", *options]
    assert cli.main(["train-lora", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("longcat: error: ") and err.count("\n") == 1 and said in err
    assert sorted(folder.parent.rglob("*")) == before


def test_a_missing_folder(capsys, tmp_path):
    assert cli.main(["train-lora", str(tmp_path / "none"), "-o", str(tmp_path / "a.safetensors")]) == 2
    assert "none is not a folder; give one with clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 4.0}, r"rank 4\.0 is out of range; give a whole number"),
        ({"rank": True}, "rank True is out of range"),
        ({"alpha": "4"}, "alpha cannot be of type str; give a number or None"),
        ({"learning_rate": "1e-4"}, "learning rate 1e-4 is out of range"),
        ({"layers": 3}, "layers cannot be of type int; give a tuple of attn"),
        ({"height": "16"}, "height 16 must be a whole number"),
    ],
)
def test_a_recipe_of_wrong_types_is_refused(values, sentence):
    with pytest.raises(LongCatError, match=sentence):
        Recipe(**{"height": 16, "width": 16, "frames": 1} | values)


def test_a_recipe_takes_numbers_of_numpy():
    recipe = Recipe(height=np.int64(16), width=np.int32(16), frames=np.array(1), rank=np.uint8(4), alpha=np.float32(2))
    assert recipe == Recipe(height=16, width=16, frames=1, rank=4, alpha=2.0)
    assert json.dumps(recipe.decides())
