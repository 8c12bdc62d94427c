"""The whole chain with less memory: the same videos whatever waits in CPU memory, and a way out where it runs short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from longcat_core.cli.main import main
from longcat_core.errors import LongCatError
from longcat_core.files.safetensors_io import write_safetensors
from longcat_core.generate import pipeline as pipelines
from longcat_core.generate import placement
from longcat_core.generate import vae as vaes
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.refine import RefineRequest
from longcat_core.generate.request import NANO, RELEASED, GenerateRequest, work_of
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.plan import GIB, Plan, Weights, Work, free_bytes
from longcat_core.optimize.switches import Optimizations
from longcat_core.sampling.conditioning import seeded_noise

PROMPT = "a red circle moves right on a black background"


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    pixels = seeded_noise((13, 32, 48, 3), 3).mul(40).add(128).clamp(0, 255)
    return pixels.to(torch.uint8).numpy()


PLACES = "blocks and the KV cache in CPU memory, the text encoder in its file"


def request(**options: object) -> GenerateRequest:
    return GenerateRequest(PROMPT, height=32, width=48, frames=17, steps=3, **options)


@pytest.fixture(scope="module")
def plain(clip) -> list[np.ndarray]:
    whole = Pipeline.load()
    assert whole.plan == Plan() and whole.plan_note == "" and whole.model.stream is None
    return [whole.generate(request(given=given)).frames for given in (None, clip)]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_video_is_the_same_from_weights_that_wait(monkeypatch, clip, plain, fp8):
    emptied: list[str] = []
    depth = Pipeline.load().model.config.depth
    least = Plan(streamed=depth - 1, offload_kv_cache=True, stream_text_encoder=True)
    small = Pipeline.load(least=least, fp8=fp8)
    assert len(small.model.stream.streamed) == depth - 1 and small.plan == least
    assert small.plan_note == f"{depth - 1} of {depth} {PLACES}"
    wanted = plain if not fp8 else [Pipeline.load(fp8=True).generate(request(given=g)).frames for g in (None, clip)]
    monkeypatch.setattr(pipelines, "_empty_cache", lambda: emptied.append("sampled"))
    for given, frames in zip((None, clip), wanted, strict=True):
        assert np.array_equal(small.generate(request(given=given)).frames, frames)
    assert not small.model.stream._slots and emptied == ["sampled"] * 2, "given back for the VAE"


def test_split_guidance_comes_from_the_plan_or_the_switch():
    for options in ({"least": Plan(split_guidance=True)}, {"optimizations": Optimizations(split_guidance=True)}):
        loaded = Pipeline.load(**options)
        assert loaded.plan == Plan(split_guidance=True) and loaded.model.optimizations.split_guidance
        assert loaded.plan_note == "guidance in halves"


@pytest.fixture
def lora(tmp_path) -> Path:
    dim, file = Pipeline.load().model.config.hidden_size, tmp_path / "lora.safetensors"
    down, up = (seeded_noise(shape, 5) for shape in ((2, dim), (dim, 2)))
    name = "diffusion_model.blocks.1.attn.proj"
    write_safetensors(file, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    return file


def test_loras_are_exchanged_in_weights_that_wait(lora):
    model, file = Pipeline.load().model, lora
    small = Pipeline.load(least=Plan(streamed=model.config.depth))
    first = small.generate(request()).frames
    small.set_loras([(file, 1.0)])
    changed = small.generate(request()).frames
    assert np.array_equal(changed, Pipeline.load(lora=file).generate(request()).frames)
    assert not np.array_equal(changed, first)
    small.set_loras()
    assert np.array_equal(small.generate(request()).frames, first)


class Short:
    """Lets calls of a function run out of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *fails: int) -> None:
        self.calls, function = 0, getattr(owner, name)

        def limited(*args: object, **options: object) -> object:
            self.calls += 1
            if self.calls - 1 in fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*args, **options)

        monkeypatch.setattr(owner, name, limited)


def test_out_of_memory_goes_on_with_the_next_smaller_plan(clip, plain, monkeypatch):
    pipeline = Pipeline.load()
    depth = pipeline.model.config.depth
    Short(monkeypatch, OptimizedTransformer, "forward", 1, 4)
    seen = []
    with pytest.warns(UserWarning) as warned:
        found = pipeline.generate(request(given=clip), callback=lambda step: seen.append(step.index))
    said = [str(warning.message) for warning in warned]
    assert len(said) == 2 and all(sentence.startswith("out of memory; continuing with ") for sentence in said)
    assert said[0].endswith("guidance in halves") and "blocks" not in said[0] and "blocks in CPU memory" in said[1]
    assert seen == [0, 1, 2]
    assert pipeline.plan.split_guidance and 0 < pipeline.plan.streamed <= depth
    assert len(pipeline.model.stream.streamed) == pipeline.plan.streamed
    # Halves round in another way than batches.
    assert np.abs(found.frames.astype(int) - plain[1]).max() <= 1


def test_room_is_made_until_it_is_enough(monkeypatch):
    pipeline = Pipeline.load()
    depth = pipeline.model.config.depth
    Short(monkeypatch, OptimizedTransformer, "forward", 0, 1, 2, 3)
    with pytest.warns(UserWarning) as warned:
        assert pipeline.generate(request()).frames.shape == (17, 32, 48, 3)
    assert len(warned) == 4 and pipeline.plan.split_guidance and 3 < pipeline.plan.streamed <= depth


def test_out_of_memory_with_nothing_left_is_an_error(monkeypatch):
    pipeline = Pipeline.load(least=Plan(Pipeline.load().model.config.depth, True))
    Short(monkeypatch, OptimizedTransformer, "forward", 0)
    with pytest.raises(torch.OutOfMemoryError, match="ask for a smaller size"):
        pipeline.generate(request())


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_vae_goes_on_in_tiles(clip, monkeypatch, part):
    pipeline = Pipeline.load()
    Short(monkeypatch, vaes, f"{part}d", 0)
    with pytest.warns(UserWarning, match="on tiles from now on"):
        frames = pipeline.generate(request(given=clip)).frames
    # Tiles are larger than this video, so nothing else changes.
    assert pipeline.vae.tiling and frames.shape == (17, 32, 48, 3)
    Short(monkeypatch, vaes, f"{part}d", 0)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.generate(request(given=clip))


def test_tiles_go_on_where_the_frames_ended(monkeypatch):
    """Out of memory after some frames are out: none is missing and none comes twice."""
    pipeline, latents = Pipeline.load(), seeded_noise((1, 16, 3, 4, 6), 1)
    whole, plain = pipeline.decode(latents), vaes.decoded

    def short(*args: object) -> Iterator[Tensor]:
        for number, part in enumerate(plain(*args, most=1)):
            if number == 4 and not pipeline.vae.tiling:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield part

    monkeypatch.setattr(vaes, "decoded", short)
    with pytest.warns(UserWarning, match="on tiles from now on"):
        parts = list(pipeline.decode_frames(latents))
    assert len(parts) == 9 and np.array_equal(np.concatenate(parts), whole)


def test_a_plan_is_made_for_what_is_free(monkeypatch):
    """As on a GPU: the free memory decides, and a sentence names it."""
    config = Pipeline.load().model.config
    work = Work((1, 16, 24, 60, 104))
    cuda, decoding = torch.device("cuda"), 0
    monkeypatch.setattr(placement.parts, "needed_bytes", lambda *picture: decoding if picture[:2] == (480, 832) else 0)

    def place(work: Work | None, memory: int | None = None) -> placement.Placement:
        return placement.Placement(config, torch.bfloat16, cuda, None, Optimizations(), work, 0, memory=memory)

    def plan(free: int, work: Work | None = work) -> tuple[Plan, str]:
        monkeypatch.setattr(
            placement, "free_bytes", lambda device, memory: free if memory is None else min(free, memory)
        )
        return place(work).plan(None)

    assert plan(0, None) == (Plan(), "") == plan(10 * GIB)
    with pytest.warns(UserWarning, match="0.5 are free"):
        limited, _ = place(work, GIB // 2).plan(None)
    assert limited != Plan()
    with pytest.warns(UserWarning, match=r"needs about \d\.\d GiB of GPU memory and 0.0 are free; it may run out"):
        chosen, note = plan(0)
    assert chosen.streamed == config.depth and chosen.split_guidance
    assert note == f"0.0 GiB of GPU memory are free: {chosen.describe(config.depth)}"
    free, config = 24 * GIB, ModelConfig()
    monkeypatch.setattr(placement, "free_bytes", lambda device, memory: free)
    several = placement.Placement(config, torch.bfloat16, cuda, None, Optimizations(), work, 0, ranks=2, sharding=True)
    chosen, note = several.plan(None)
    assert chosen.sharded and note == f"24.0 GiB of GPU memory are free: {chosen.describe(config.depth)}"
    assert several.spare(chosen) >= 0 > several.spare(Plan())

    # Decoding finds room beside the weights, unless no plan leaves any; then tiles do.
    one = placement.Placement(config, torch.bfloat16, cuda, None, Optimizations(), work, 0)
    weights, before = Weights.of(config, torch.bfloat16), one.plan(None)[0].streamed
    decoding = 8 * GIB
    after = one.plan(None)[0].streamed
    assert after > before and (config.depth - after) * weights.block + weights.rest + decoding < free
    decoding = 30 * GIB
    assert one.plan(None)[0].streamed == before


def test_what_cannot_fit_in_memory_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    def machine(ram: float, swap: float) -> None:
        for name, size in (("virtual_memory", ram), ("swap_memory", swap)):
            monkeypatch.setattr(psutil, name, lambda size=size: SimpleNamespace(total=int(size * GIB)))

    def command(size: str, frames: int) -> tuple[int, str]:
        output = tmp_path / "a.mp4"
        code = main([*COMMAND, "--size", size, "--frames", str(frames), "--output", str(output)])
        assert output.exists() == (code == 0)
        return code, capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine(24, 8)
    code, said = command("4096x4096", 2001)
    assert code == 2
    assert re.search(
        r"2001 frames of 4096x4096 \(height x width\) with this model take about [\d,]+ GiB of memory and this machine "
        "has 32 GiB; ask for a smaller or shorter video, or run it on a GPU",
        said,
    )
    # What is decoded takes more than an unguided sampling: 36 bytes a pixel.
    decoded, work = 2001 * 4096 * 4096 * 36 / GIB, Work((1, 16, 501, 512, 512), guided=False)
    machine(decoded * 0.99, 0)
    with pytest.raises(LongCatError, match=f"{decoded:,.0f} GiB of memory and this machine has"):
        Pipeline.load(work=work)
    machine(decoded * 1.01, 0)
    Pipeline.load(work=work)
    # What is just enough with the swap space is tried.
    machine(0.5, 1.5)
    assert command("32x48", 5)[0] == 0


def test_what_a_request_takes(clip):
    plain = GenerateRequest(PROMPT).filled(RELEASED)
    assert work_of(plain) == Work((1, 16, 24, 60, 104), True, 0)
    assert work_of(plain, 13).cond_latents == 4
    assert work_of(GenerateRequest(PROMPT, given=clip[:1], height=480, width=832).filled(RELEASED)).cond_latents == 1
    assert work_of(GenerateRequest(PROMPT, schedule="distilled").filled(RELEASED)) == Work((1, 16, 24, 60, 104), False)
    video = np.zeros((93, 480, 832, 3), np.uint8)
    assert RefineRequest().work(video, RELEASED) == Work((1, 16, 48, 88, 160), False, 0)
    longer = RefineRequest(piece=60).work(video, NANO)
    assert longer.latents[3:] == (120, 208) and longer.cond_latents > 0


COMMAND = ["generate", PROMPT, "--steps", "2", "--size", "32x48", "--frames", "9", "--device", "cpu"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outs = []
    for name, more in (("a", []), ("b", ["--stream-blocks", "2", "--stream-text-encoder", "--offload-kv-cache"])):
        output = tmp_path / f"{name}.mkv"
        assert main([*COMMAND, *more, "--output", str(output)]) == 0
        outs.append(output.read_bytes())
    assert outs[0] == outs[1]
    said = capsys.readouterr().err
    assert said.count("longcat: note: 2 of ") == 1 and PLACES in said
    output = tmp_path / "c.mkv"
    assert main([*COMMAND, "--split-guidance", "--tiled-vae", "--output", str(output)]) == 0
    assert "guidance in halves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "8"], "--memory limits a GPU's memory"),
        (["--stream-blocks", "-1"], "--stream-blocks -1 is out of range"),
        (["--stream-blocks", "1000"], "1000 streamed blocks are more than the model's"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, options, said):
    # Before any part is loaded.
    monkeypatch.setattr(pipelines, "load_vae", None)
    output = tmp_path / "a.mkv"
    assert main([*COMMAND, *options, "--output", str(output)]) == 2
    assert said in capsys.readouterr().err and not output.exists()


def test_models_are_found_by_their_parts():
    # What a plan takes from the text encoder.
    encoder = Pipeline.load(ModelPaths()).text_encoder
    assert encoder.nbytes == sum(p.nbytes for p in encoder.loaded.model.parameters()) > 0


@pytest.mark.parametrize("fp8", [False, True])
def test_loras_at_run_time_beside_weights_that_wait(tmp_path, lora, fp8):
    whole, small = (
        Pipeline.load(least=least, fp8=fp8, lora=lora, lora_mode="runtime") for least in (None, Plan(streamed=4))
    )
    for strength in (1.0, 0.5):
        for pipeline in (whole, small):
            pipeline.set_loras([(lora, strength)])
        assert np.array_equal(small.generate(request()).frames, whole.generate(request()).frames)
    small.set_loras()
    assert np.array_equal(small.generate(request()).frames, Pipeline.load(fp8=fp8).generate(request()).frames)


def test_what_is_free_counts_what_the_allocator_holds(monkeypatch):
    numbers = {"mem_get_info": (5 * GIB, 24 * GIB), "memory_reserved": 4 * GIB, "memory_allocated": 3 * GIB}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    device = torch.device("cuda")
    assert free_bytes(device) == 6 * GIB and free_bytes(device, 8 * GIB) == 5 * GIB
