"""What a script relies on: the names of longcat_core, sentences for wrong types, threads that share a pipeline."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import longcat_core as longcat

PROMPT = "a red circle moves right on a blue background"
FRAMES = np.zeros((5, 16, 16, 3), np.uint8)
SCHEDULE = longcat.make_schedule("base", 1)


@pytest.fixture(scope="module")
def pipeline() -> longcat.Pipeline:
    return longcat.Pipeline.load()


def request(**values) -> longcat.GenerateRequest:
    return longcat.GenerateRequest(**{"prompt": PROMPT, "frames": 5, "steps": 2, **values})


def test_importing_shows_the_interface_and_stays_light():
    code = (
        "import sys, longcat_core as l; assert dir(l) == sorted(l.__all__), dir(l); "
        "assert not {'torch', 'numpy'} & sys.modules.keys(); [getattr(l, name) for name in l.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'pipelines'"):
        longcat.pipelines  # noqa: B018


LONG = longcat.LongVideoRequest(request(), (PROMPT,))
WRONG = {
    "paths": (lambda _: longcat.Pipeline.load("model"), "paths cannot be of type str; give ModelPaths.of"),
    "path of text": (lambda _: longcat.Pipeline.load(longcat.ModelPaths("model")), "give a pathlib.Path"),
    "path of a number": (lambda _: longcat.ModelPaths.of(3), "the path of the model cannot be of type int"),
    "dtype": (lambda _: longcat.Pipeline.load(dtype="float8"), "unknown dtype 'float8'; choose one of float32"),
    "integer dtype": (lambda _: longcat.Pipeline.load(dtype=torch.int8), "unknown dtype torch.int8"),
    "device": (lambda _: longcat.Pipeline.load(device="gpu"), "unknown device 'gpu'; choose cpu"),
    "device not there": (lambda _: longcat.Pipeline.load(device="cuda:99"), "device 'cuda:99' is missing"),
    "device of another kind": (lambda _: longcat.Pipeline.load(device="meta"), "'meta' is not supported"),
    "LoRA": (lambda _: longcat.Pipeline.load(lora=5), "lora cannot be of type int"),
    "LoRA without strength": (lambda _: longcat.Pipeline.load(lora=[("a",)]), "not a pair of path and strength"),
    "strength of text": (lambda p: p.set_loras([("a", "0.5")]), "not a pair of path and strength"),
    "LoRAs of a number": (lambda p: p.loras.set(5), "lora cannot be of type int"),
    "LoRAs without strengths": (lambda p: p.loras.set(["a.safetensors"]), "not a pair of path and strength"),
    "LoRA of NaN": (lambda p: p.loras.set([("a.safetensors", float("nan"))]), "strength nan of a.safetensors is out"),
    "LoRA that is missing": (lambda p: p.loras.set("missing.safetensors"), "missing.safetensors does not exist"),
    "LoRA mode": (lambda _: longcat.Pipeline.load(lora_mode="both"), "the LoRA mode is 'both'; choose one of"),
    "request": (lambda p: p.generate(PROMPT), "the request cannot be of type str"),
    "prompt": (lambda p: p.generate(request(prompt=[PROMPT])), "the prompt is a list"),
    "frames": (lambda p: p.generate(request(frames=5.0)), r"5\.0 frames are out of range"),
    "image": (lambda p: p.generate(request(image=3)), "the path of the image cannot be of type int"),
    "given": (lambda p: p.generate(request(given=[1])), "what is given cannot be of type list"),
    "schedule": (lambda p: p.generate(request(schedule=3)), "the schedule cannot be of type int"),
    "callback": (lambda p: p.generate(request(), 3), "the callback cannot be of type int"),
    "noise": (lambda p: p.denoise(torch.zeros(1, 3, 2, 8, 12), SCHEDULE, PROMPT), r"the noise cannot be .* \[1, 3"),
    "noise of NaN": (lambda p: p.denoise(torch.full((1, 16, 1, 2, 2), torch.nan), SCHEDULE, PROMPT), "NaN or infinite"),
    "infinite latents": (lambda p: p.decode(torch.full((1, 16, 1, 2, 2), torch.inf)), "NaN or infinite values"),
    "latents of integers": (lambda p: p.decode(torch.zeros(1, 16, 2, 8, 12, dtype=torch.int64)), "torch.int64"),
    "no latents": (lambda p: p.decode(np.zeros(3)), "the latents cannot be of type ndarray"),
    "handed": (
        lambda p: p.generate(
            request(frames=9, given=np.zeros((5, 64, 96, 3), np.uint8), num_cond_frames=5),
            handed=torch.zeros(1, 16, 2, 8, 12),
        ),
        r"the handed latents cannot be torch.float32 \[1, 16, 2, 8, 12\]; give .* \[1, 16, 1, 8, 12\]",
    ),
    "handed alone": (lambda p: p.generate(request(), handed=torch.zeros(1, 16, 1, 8, 12)), "give its frames too"),
    "prompts": (lambda _: longcat.spread_prompts(PROMPT, 2), "prompts cannot be of type str"),
    "folder": (lambda _: longcat.segment_folder(3), "the folder of segments cannot be of type int"),
    "video to refine": (lambda p: list(longcat.refine(p, [1], longcat.RefineRequest())), "cannot be of type list"),
    "noise's schedule": (lambda p: p.denoise(torch.zeros(1, 16, 1, 2, 2), "base", PROMPT), "give what make_schedule"),
    "noise's prompt": (lambda p: p.denoise(torch.zeros(1, 16, 1, 2, 2), SCHEDULE, 3), "the prompt is a int; give text"),
    "guidance of text": (
        lambda p: p.denoise(torch.zeros(1, 16, 1, 2, 2), SCHEDULE, PROMPT, guidance_scale="4"),
        "guidance 4 is out of range; give a number from",
    ),
    "two videos to decode": (lambda p: p.decode(torch.zeros(2, 16, 1, 2, 2)), r"give .* \[1, 16, any, any, any\]"),
    "frames beside a file": (
        lambda p: p.generate(request(image=Path("a.png"), given=np.zeros((1, 8, 8, 3), np.uint8))),
        "both given; give only one",
    ),
    "defaults": (lambda p: request().filled(p), "cannot be of type Pipeline; give the defaults of a pipeline"),
    "overlap": (lambda p: longcat.work_of(request().filled(p.defaults), "13"), "the overlap cannot be '13'"),
    "fp8": (lambda _: longcat.Pipeline.load(fp8="yes"), "fp8 cannot be of type str; give True or False"),
    "work": (lambda _: longcat.Pipeline.load(work=request()), "work cannot be of type GenerateRequest; give a Work"),
    "least": (lambda _: longcat.Pipeline.load(least=4), "least cannot be of type int; give a Plan or None"),
    "memory": (lambda _: longcat.Pipeline.load(memory="8GB"), "memory cannot be '8GB'; give a number of bytes"),
    "latents of work": (lambda _: longcat.Work((1, 2)), r"work cannot be latents \(1, 2\); give the shape"),
    "streamed": (lambda _: longcat.Plan(streamed=-1), "streamed blocks cannot be -1; give a whole number"),
    "switch": (lambda _: longcat.Optimizations(fused_qkv="no"), "optimization fused_qkv cannot be of type str"),
    "compile": (lambda _: longcat.Optimizations(compile=True), "optimization compile is True; choose one of off"),
    "attention": (lambda _: longcat.Optimizations(attention=None), "optimization attention cannot be of type NoneType"),
    "sparsity": (lambda _: longcat.BlockSparse(sparsity="0.9"), r"sparsity is 0\.9; it must lie between 0 and 1"),
    "chunk": (lambda _: longcat.BlockSparse(chunk=4), "chunk is 4; it must be three whole numbers"),
    "steps": (lambda _: longcat.make_schedule("base", 4.5), r"4\.5 steps are out of range"),
    "mode": (lambda _: longcat.make_schedule(["base"], 4), r"unknown schedule \['base'\]"),
    "description": (
        lambda p: longcat.LongVideoRequest(request(), (PROMPT,), 1, model={"x": torch.ones(1)}).filled(p.defaults),
        "the description of the model holds what JSON cannot hold",
    ),
    "model, not a function": (
        lambda p: list(longcat.long_video(p, LONG, longcat.segment_folder("s"))),
        "what loads the model cannot be of type Pipeline; give a function",
    ),
    "folder of text": (
        lambda p: list(longcat.long_video(lambda: p, LONG, "s")),
        "the folder cannot be of type str; give what segment_folder returns",
    ),
    "picture for its path": (lambda _: longcat.read_image(Image.new("RGB", (8, 8))), "the path of the image cannot be"),
    "bytes for a path": (lambda _: longcat.read_video(b"a.mp4"), "the path of the video cannot be of type bytes"),
    "last frames": (lambda _: longcat.read_video("a.mp4", last=-1), "last cannot be -1; give a number of frames"),
    "rate to read": (lambda _: longcat.read_video("a.mp4", fps="15"), "'15' frames per second cannot be read"),
    "swapped": (lambda _: longcat.write_video(FRAMES, "a.mp4", 15), "the path of the video cannot be of type ndarray"),
    "no frames": (lambda _: longcat.write_video("a.mp4", None, 15), "frames cannot be of type NoneType"),
    "pictures": (lambda _: longcat.write_video("a.mp4", [Image.new("RGB", (8, 8))], 15), r"give uint8 \[F, H, W, 3\]"),
    "frames one by one": (lambda _: longcat.write_video("a.mp4", list(FRAMES), 15), r"give uint8 \[F, H, W, 3\], all"),
    "frames of floats": (lambda _: longcat.write_video("a.mp4", FRAMES / 255, 15), "frames are float64"),
    "no rate": (lambda _: longcat.write_video("a.mp4", FRAMES, None), "None frames per second; give a number above 0"),
    "rate 0": (lambda _: longcat.write_video("a.gif", FRAMES, 0), "0 frames per second; give a number above 0"),
    "rate NaN": (lambda _: longcat.write_video("a.mkv", FRAMES, float("nan")), "nan frames per second"),
    "piece": (lambda _: longcat.RefineRequest(piece=93.0).check(), r"piece cannot be 93\.0; give a whole number"),
    "path of a sound": (lambda _: longcat.read_sound(3), "the path of the sound cannot be of type int"),
    "sounds": (lambda _: longcat.combine(longcat.Sound(torch.ones(1, 9), 8000)), "sounds cannot be of type Sound"),
    "a sound": (lambda _: longcat.combine(["a.wav"]), "a sound cannot be of type str; give a Sound"),
    "audio encoder": (lambda _: longcat.load_audio_encoder(3), "the path of the audio encoder cannot be of type int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_types_get_a_sentence(pipeline, case):
    call, sentence = WRONG[case]
    with pytest.raises(longcat.LongCatError, match=sentence):
        call(pipeline)


def test_two_threads_get_the_frames_that_each_gets_alone(pipeline):
    requests = [request(seed=1), request(seed=2, prompt="a green square moves up on a black background")]
    alone = [pipeline.generate(each).frames for each in requests]
    found: list = [None, None]
    start, running, overlaps = threading.Barrier(2), set(), []

    def run(number: int) -> None:
        def watch(step: longcat.Step) -> None:
            running.add(number)
            overlaps.append(len(running))
            if step.index == step.total - 1:
                running.discard(number)

        start.wait()
        found[number] = pipeline.generate(requests[number], watch).frames

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert overlaps == [1] * 4
    assert all(np.array_equal(*pair) for pair in zip(found, alone, strict=True))


def test_a_callback_that_uses_its_pipeline_is_refused_and_the_pipeline_stays_usable(pipeline):
    wanted = pipeline.generate(request()).frames
    for use in (lambda: pipeline.generate(request()), pipeline.set_loras):
        with pytest.raises(longcat.LongCatError, match="a callback uses the pipeline that is calling it"):
            pipeline.generate(request(), lambda step, use=use: use())
    found: list = []
    # The lock is free again for other threads too.
    thread = threading.Thread(target=lambda: found.append(pipeline.generate(request()).frames), daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert len(found) == 1 and np.array_equal(found[0], wanted)


def test_the_typed_example_uses_the_whole_interface():
    """`make lint` type-checks it; a name that is not in it could lose its annotations unnoticed."""
    used = set(re.findall(r"\blongcat\.(\w+)", (Path(__file__).parent / "typed_face.py").read_text(encoding="utf-8")))
    assert used == set(longcat.__all__)


def test_loras_are_exchanged_only_when_no_thread_generates(pipeline):
    thread = threading.Thread(target=pipeline.set_loras, daemon=True)
    waited: list[bool] = []

    def exchange(step: longcat.Step) -> None:
        if step.index == 0:
            thread.start()
            # Without the lock it would be done long before this.
            thread.join(timeout=0.3)
            waited.append(thread.is_alive())

    pipeline.generate(request(), exchange)
    thread.join(timeout=120)
    assert waited == [True] and not thread.is_alive()
