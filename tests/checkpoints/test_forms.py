"""Every form of checkpoint that is found in the wild gives the golden model, as closely as its numbers allow."""

from __future__ import annotations

import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longcat_core.checkpoints import reader
from longcat_core.checkpoints.formats import FORMATS, targets
from longcat_core.checkpoints.load import load_transformer, open_checkpoint, read_parameter
from longcat_core.errors import CheckpointError
from longcat_core.files import read_ahead, safetensors_io, tensor_files
from longcat_core.files.fingerprints import fingerprint
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Fp8Linear, Policy

from .written_forms import (
    E4M3,
    E5M2,
    State,
    comfyui,
    described,
    fastvideo,
    fp8_scaled,
    is_matrix,
    multiplied_out,
    write_gguf,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CONFIG = ModelConfig.from_json(GOLDEN / "config.json")
NAMES = {"official": lambda state: state, "comfyui": comfyui, "fastvideo": fastvideo}


@pytest.fixture(scope="module")
def golden() -> State:
    return read_tensors(GOLDEN / "dit.safetensors")


@pytest.fixture(scope="module")
def forward() -> State:
    return read_tensors(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def wanted() -> State:
    return load_transformer(GOLDEN / "dit.safetensors").state_dict()


def saved(folder: Path, state: State, metadata: dict[str, str] | None = None, name: str = "x.safetensors") -> Path:
    write_safetensors(folder / name, state, metadata)
    return folder / name


def assert_same(model: torch.nn.Module, state: State) -> None:
    """The network's parameters are those of `state`, bit for bit."""
    given = model.state_dict()
    assert given.keys() == state.keys()
    assert all(torch.equal(given[name], value) for name, value in state.items())


def error(model: OptimizedTransformer, forward: State, name: str = "t2v.out") -> float:
    """Of the output against the golden one: the largest difference over the golden one's standard deviation."""
    with torch.no_grad():
        out = model(*(forward[key].to(model.dtype) for key in ("x", "t", "context")), forward["mask"])
    return ((out - forward[name]).abs().max() / forward[name].std()).item()


# Names


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer.", "_orig_mod."])
def test_names_in_fp32_are_exact(tmp_path, golden, wanted, forward, form, prefix):
    path = saved(tmp_path, {prefix + name: tensor for name, tensor in NAMES[form](golden).items()})
    model = load_transformer(path)
    assert model.config == CONFIG
    assert_same(model, wanted)
    assert error(model, forward) < 1e-5


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_names_in_16_bits_are_exact(tmp_path, golden, wanted, forward, form, dtype):
    path = saved(tmp_path, {name: tensor.to(dtype) for name, tensor in NAMES[form](golden).items()})
    assert_same(load_transformer(path, dtype=dtype), {name: value.to(dtype) for name, value in wanted.items()})
    model = load_transformer(path)
    assert_same(model, {name: value.to(dtype).float() for name, value in wanted.items()})
    assert error(model, forward) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_the_file_name_does_not_matter(tmp_path, golden, wanted):
    path = saved(tmp_path, comfyui(golden), name="Wan2_1-T2V-14B_official_int8.gguf")
    assert_same(load_transformer(path), wanted)


def test_folder_of_fastvideo(tmp_path, golden, wanted):
    folder = tmp_path / "transformer"
    folder.mkdir()
    state = fastvideo(golden)
    halves = sorted(state)[::2], sorted(state)[1::2]
    for i, names in enumerate(halves, 1):
        saved(folder, {name: state[name] for name in names}, name=f"model-0000{i}-of-00002.safetensors")
    values = json.loads((GOLDEN / "config.json").read_text())
    values["num_attention_heads"] = values.pop("num_heads")
    (folder / "config.json").write_text(json.dumps(values))
    for path in (tmp_path, folder):
        assert_same(load_transformer(path), wanted)


def test_every_name_of_every_form_means_one_thing():
    for known in (targets(2), {name.replace(".", "_"): target for name, target in targets(2).items()}):
        for form in FORMATS:
            for canonical, sources in form.modules(2):
                for i, source in enumerate(sources):
                    name = source if source in known else source.replace(".", "_")
                    assert known[name] == (canonical, i, len(sources))


# 8 bits


STORED = {
    "scaled": lambda state: fp8_scaled(comfyui(state)),
    "scaled by rows": lambda state: fp8_scaled(comfyui(state), rows=True),
    "scaled, one number as a list": lambda state: {
        name: tensor.reshape(1) if name.endswith("scale_weight") else tensor
        for name, tensor in fp8_scaled(comfyui(state)).items()
    },
    "scaled, official names": fp8_scaled,
    "scaled, no marker": lambda state: fp8_scaled(comfyui(state), marker=False),
    "scaled, input scales": lambda state: (
        fp8_scaled(comfyui(state)) | {"blocks.0.self_attn.q.scale_input": torch.ones(()), "scaled_fp8": torch.ones(2)}
    ),
    "described": lambda state: described(
        fp8_scaled(comfyui(state), scale="weight_scale", marker=False), "float8_e4m3fn"
    ),
    "plain": lambda state: {n: t.to(E4M3) if is_matrix(n, t) else t for n, t in comfyui(state).items()},
    "plain, everything": lambda state: {name: tensor.to(E4M3) for name, tensor in comfyui(state).items()},
    "plain e5m2": lambda state: {n: t.to(E5M2) if is_matrix(n, t) else t for n, t in fastvideo(state).items()},
}
# Of e4m3 with 3 bits of mantissa, e5m2 with 2; "everything" has the norms and embeddings in it too.
BOUNDS = dict.fromkeys(STORED, 0.1) | {"plain, everything": 0.25, "plain e5m2": 0.25}


@pytest.mark.parametrize("kind", STORED)
def test_8_bit_weights_are_their_numbers_times_their_scales(tmp_path, golden, forward, kind):
    state = STORED[kind](golden)
    model = load_transformer(saved(tmp_path, state))
    assert_same(model, load_transformer(saved(tmp_path, multiplied_out(state), name="wide.safetensors")).state_dict())
    assert 1e-4 < error(model, forward) < BOUNDS[kind]


def test_rows_of_a_fused_weight_keep_the_scales_of_their_own(tmp_path, golden, wanted):
    # Thousandfold apart: with the scale of one the others would be lost.
    state = dict(golden)
    state["blocks.0.attn.qkv.weight"] = golden["blocks.0.attn.qkv.weight"].clone()
    for rows, factor in zip(state["blocks.0.attn.qkv.weight"].chunk(3), (1, 1e-3, 1e3), strict=True):
        rows *= factor
    model = load_transformer(saved(tmp_path, fp8_scaled(comfyui(state))))
    parts = zip(model.blocks[0].attn.qkv.weight.chunk(3), state["blocks.0.attn.qkv.weight"].chunk(3), strict=True)
    for given, rows in parts:
        assert (given - rows).abs().max() <= rows.abs().max() / 16
        assert (given - rows).norm() <= 0.04 * rows.norm()


def test_metadata_describes_layers_as_tensors_do(tmp_path, golden, wanted):
    state = fp8_scaled(comfyui(golden), scale="weight_scale", marker=False)
    layers = [name.removesuffix(".weight_scale") for name in state if name.endswith(".weight_scale")]
    text = json.dumps({"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}})
    described_here = load_transformer(saved(tmp_path, state, {"_quantization_metadata": text}))
    assert_same(described_here, load_transformer(saved(tmp_path, state, name="y.safetensors")).state_dict())
    for kind, said in (("int3", ", which is not supported; give"), ("nvfp4", r" but lacks \S+.weight_scale_2")):
        text = json.dumps({"layers": {layer: {"format": kind} for layer in layers}})
        with pytest.raises(CheckpointError, match=rf"stores blocks\.\S+ as {kind}{said}"):
            load_transformer(saved(tmp_path, dict(sorted(state.items())), {"_quantization_metadata": text}))


def test_official_int8_gives_the_golden_output(forward):
    assert error(load_transformer(GOLDEN / "dit_int8.safetensors"), forward, "int8.out") < 1e-5


def test_int8_of_comfyui(tmp_path, golden, wanted):
    state = {}
    for name, tensor in comfyui(golden).items():
        if is_matrix(name, tensor):
            scale = tensor.abs().max() / 127
            state |= {name: (tensor / scale).round().to(torch.int8), f"{name}_scale": scale}
        else:
            state[name] = tensor
    model = load_transformer(saved(tmp_path, described(state, "int8_tensorwise")))
    for name, value in model.state_dict().items():
        assert (value - wanted[name]).abs().max() <= wanted[name].abs().max() / 250
    rotated = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}
    name = "blocks.0.ffn.w1.comfy_quant"
    text = torch.tensor(list(json.dumps(rotated).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"w1 as int8_tensorwise with a rotation of 32 columns, which is not"):
        load_transformer(saved(tmp_path, state | {name: text}))


@pytest.mark.parametrize("kind", ["scaled", "scaled by rows", "described", "plain"])
def test_8_bit_layers_keep_the_numbers_of_the_file(tmp_path, golden, wanted, kind):
    """Quantizing them again would round them twice; they stay bit-equal to the file."""
    path = saved(tmp_path, STORED[kind](golden))
    exact = load_transformer(path).state_dict()
    model = load_transformer(path, fp8=Policy())
    for name in Policy().names(CONFIG.depth):
        layer = model.get_submodule(name)
        assert isinstance(layer, Fp8Linear) and layer.weight_scale.shape == (layer.out_features, 1)
        assert torch.equal(layer.weight.float() * layer.weight_scale, exact[f"{name}.weight"])


def test_8_bit_layers_from_what_is_not_e4m3_are_quantized(tmp_path, golden):
    state = STORED["scaled"](golden)
    # One of three parts of a fused weight in bf16: the whole weight is quantized again.
    state["blocks.0.self_attn.k.weight"] = comfyui(golden)["blocks.0.self_attn.k.weight"].bfloat16()
    del state["blocks.0.self_attn.k.scale_weight"]
    path = saved(tmp_path, state)
    layer = load_transformer(path, fp8=Policy()).blocks[0].attn.qkv
    exact = load_transformer(path).blocks[0].attn.qkv.weight
    assert torch.equal(layer.weight.float().abs().amax(1), torch.full((192,), 448.0))
    assert ((layer.weight.float() * layer.weight_scale - exact).norm() / exact.norm()) < 0.03


# GGUF


def gguf_types(state: State, small: str) -> dict[str, str]:
    """Types as converters choose them: matrices in `small` where blocks fit their rows, then Q8_0, else 16 bits."""
    kinds = {}
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            kinds[name] = "BF16" if tensor.ndim == 1 else "F16" if tensor.ndim == 2 else "F32"
        else:
            kinds[name] = small if tensor.shape[1] % (256 if small == "Q4_K" else 32) == 0 else "Q8_0"
    return kinds


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize(("small", "bound"), [("Q8_0", 0.02), ("Q4_K", 0.1)])
def test_gguf(tmp_path, golden, forward, wanted, form, small, bound):
    state = NAMES[form](golden)
    kinds = gguf_types(state, small)
    assert set(kinds.values()) == {"Q8_0", "BF16", "F16", "F32", small}
    path = tmp_path / "x.gguf"
    write_gguf(path, state, kinds, flat_patches=form == "comfyui")
    model = load_transformer(path)
    assert model.config == CONFIG
    assert error(model, forward) < bound
    for name, value in model.state_dict().items():
        step = 16 if small == "Q4_K" and name.endswith("ffn.down.weight") else 120
        assert (value - wanted[name]).abs().max() <= wanted[name].abs().max() / step, name


def test_gguf_blocks_mean_what_the_package_says(tmp_path, golden):
    import gguf

    name = "blocks.0.ffn.w2.weight"
    write_gguf(tmp_path / "x.gguf", golden, gguf_types(golden, "Q4_K"))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    stored = next(tensor for tensor in reader.tensors if tensor.name == name)
    assert stored.tensor_type.name == "Q4_K"
    numbers = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(load_transformer(tmp_path / "x.gguf").blocks[0].ffn.down.weight, numbers)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert torch.equal(read_parameter(checkpoint, "blocks.0.ffn.down.weight"), numbers)
    # 4 bits with a step for every 32 numbers: a thirtieth of their span at most.
    assert (numbers - golden[name]).norm() < 0.1 * golden[name].norm()


def test_gguf_in_pieces_is_the_same(tmp_path, golden, monkeypatch):
    write_gguf(tmp_path / "x.gguf", comfyui(golden), gguf_types(comfyui(golden), "Q4_K"), flat_patches=True)
    whole = load_transformer(tmp_path / "x.gguf").state_dict()
    monkeypatch.setattr(reader, "PIECE", 1000)
    assert_same(load_transformer(tmp_path / "x.gguf"), whole)


def test_gguf_in_a_folder_with_its_config(tmp_path, golden, wanted):
    write_gguf(tmp_path / "model.gguf", golden, {})
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((GOLDEN / "config.json").read_text()) | {"text_tokens_zero_pad": False})
    )
    model = load_transformer(tmp_path)
    assert_same(model, wanted)
    assert not model.config.text_tokens_zero_pad


def test_folders_of_gguf_are_distinguished(tmp_path, golden):
    marks = set()
    for i, kind in enumerate(("Q8_0", "F16")):
        (tmp_path / str(i)).mkdir()
        write_gguf(tmp_path / str(i) / "model.gguf", golden, {"blocks.0.ffn.w2.weight": kind})
        marks.add(fingerprint(tmp_path / str(i)))
    assert len(marks) == 2


def test_gguf_without_its_package(tmp_path, golden, monkeypatch):
    write_gguf(tmp_path / "x.gguf", golden, {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"x\.gguf is a GGUF file, which needs a package; run: pip install gguf$"):
        load_transformer(tmp_path / "x.gguf")


@pytest.mark.parametrize("kept", [4, 10, 30, 1000, 50_000, -1])
def test_truncated_gguf(tmp_path, golden, kept):
    write_gguf(tmp_path / "x.gguf", golden, gguf_types(golden, "Q8_0"))
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: kept if kept > 0 else content.rindex(b"\1")])
    with pytest.raises(CheckpointError, match=r"x\.gguf is a truncated or corrupt GGUF.*download it again") as caught:
        load_transformer(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


# What does not fit


def test_missing_scales_are_named(tmp_path, golden):
    state = STORED["scaled"](golden)
    del state["blocks.1.ffn.w2.scale_weight"]
    with pytest.raises(CheckpointError, match=r"lacks: blocks\.1\.ffn\.w2\.scale_weight; download"):
        load_transformer(saved(tmp_path, state))
    state = STORED["scaled by rows"](golden)
    state["blocks.1.ffn.w2.scale_weight"] = torch.ones(3)
    with pytest.raises(
        CheckpointError, match=r"w2\.scale_weight has shape \[3\], the network wants one number, or one for each"
    ):
        load_transformer(saved(tmp_path, state))


@pytest.mark.parametrize("form", ["comfyui", "fastvideo"])
def test_a_part_of_a_fused_weight_that_is_missing(tmp_path, golden, form):
    state = NAMES[form](golden)
    name = next(name for name in state if name.startswith("blocks.1.self_attn.") and name.endswith("v.weight"))
    del state[name]
    with pytest.raises(CheckpointError, match=f"lacks: {name}; download it again"):
        load_transformer(saved(tmp_path, state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["wide", "int8", "bias", "fp8"])
def test_weights_that_are_not_numbers_are_named(tmp_path, golden, kind, value):
    if kind == "int8":
        state = read_tensors(GOLDEN / "dit_int8.safetensors")
        state["blocks.1.ffn.w2.weight_scale"] = state["blocks.1.ffn.w2.weight_scale"].index_fill(
            0, torch.tensor(3), value
        )
        said = r"blocks\.1\.ffn\.down\.weight"
    elif kind == "fp8":
        state = STORED["scaled"](golden)
        if value != value:
            state["blocks.1.ffn.w2.weight"].view(torch.uint8)[3, 5] = 0xFF
        else:
            state["blocks.1.ffn.w2.scale_weight"] = torch.tensor(value)
        said = r"blocks\.1\.ffn\.down\.weight"
    else:
        name = "blocks.1.attn.qkv." + ("weight" if kind == "wide" else "bias")
        state = golden | {name: golden[name].clone()}
        state[name].view(-1)[7] = value
        said = name.replace(".", r"\.")
    path = saved(tmp_path, state)
    for fp8 in (None, Policy()):
        with pytest.raises(CheckpointError, match=rf"x\.safetensors has NaN or infinite values in {said}; download"):
            load_transformer(path, fp8=fp8)


def test_numbers_beyond_fp16_are_not_the_files_fault(tmp_path, golden):
    path = saved(tmp_path, golden | {"blocks.0.ffn.w1.weight": golden["blocks.0.ffn.w1.weight"] * 1e7})
    load_transformer(path, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"in blocks\.0\.ffn\.gate_up\.weight; load it as bfloat16 or float32"):
        load_transformer(path, dtype=torch.float16)


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made since it began; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def _gone(self, pointer: int) -> None:
        entry = self.live[pointer]
        entry[1] -= 1
        if not entry[1]:
            self.now -= entry[0]
            del self.live[pointer]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                entry = self.live.setdefault(storage.data_ptr(), [storage.nbytes(), 0])
                if not entry[1]:
                    self.now += entry[0]
                entry[1] += 1
                weakref.finalize(tensor, self._gone, storage.data_ptr())
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("kind", ["wide", "scaled", "int8", "gguf"])
@pytest.mark.parametrize("fp8", [None, Policy()])
def test_loading_holds_one_tensor_besides_the_network(tmp_path, golden, monkeypatch, kind, fp8):
    """And buffers of pieces that are read ahead; a GGUF file is mapped."""
    monkeypatch.setattr(reader, "PIECE", 1024)
    path = tmp_path / "x"
    if kind == "gguf":
        write_gguf(path, comfyui(golden), gguf_types(comfyui(golden), "Q8_0"))
    elif kind == "int8":
        path = GOLDEN / "dit_int8.safetensors"
    else:
        write_safetensors(path, comfyui(golden) if kind == "wide" else STORED["scaled"](golden))
    with LiveBytes() as count:
        model = load_transformer(path, dtype=torch.bfloat16, fp8=fp8)
    network = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(tensor.numel() for tensor in golden.values()) * 2
    # Quantizing makes one weight wide, twice over; pieces of fp32 are small.
    room = (3 * 4 * largest if fp8 else 2 * largest) + reader.AHEAD * 4 * reader.PIECE
    assert network <= count.peak <= network + room, (count.peak, network, largest)
    assert largest * 4 < network


def test_reading_ahead(monkeypatch):
    """In order, no further than asked, buffers serving again; what a reader raises comes where it is asked for."""
    monkeypatch.setattr(read_ahead, "THREADS", 1)
    begun: list[int] = []

    def job(i: int) -> object:
        def read(buffer: Tensor) -> Tensor:
            begun.append(i)
            if i == 5:
                raise CheckpointError("gone")
            buffer[0] = i
            return buffer[:1]

        return read

    ahead = read_ahead.ReadAhead(
        ((i, job(i)) for i in range(100)), [torch.empty(8, dtype=torch.uint8) for _ in range(2)]
    )
    places = set()
    for i in range(5):
        assert ahead.take("something else") is None
        found = ahead.take(i)
        assert int(found) == i
        places.add(found.data_ptr())
    assert len(places) == 2
    with pytest.raises(CheckpointError, match="gone"):
        ahead.take(5)
    ahead.close()
    assert max(begun) <= 7 and begun == sorted(begun)


def test_a_buffer_is_written_again_when_its_copy_is_over(monkeypatch):
    monkeypatch.setattr(read_ahead, "THREADS", 1)
    log: list[str] = []

    def job(i: int) -> object:
        return lambda buffer: log.append(f"read {i}") or buffer[:1]

    def used() -> object:
        log.append("taken")
        return lambda: log.append("copied")

    buffers = [torch.empty(8, dtype=torch.uint8) for _ in range(2)]
    ahead = read_ahead.ReadAhead(((i, job(i)) for i in range(4)), buffers, used)
    for i in range(4):
        assert ahead.take(i) is not None
    ahead.close()
    assert [event for event in log if event != "taken"] == ["read 0", "read 1", "copied", "read 2", "copied", "read 3"]


def test_a_file_that_becomes_shorter_meanwhile(tmp_path, golden, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, comfyui(golden))
    opened = tensor_files.open_file(path)
    os.truncate(path, path.stat().st_size // 2)

    def read() -> None:
        for name in opened.header:
            opened.rows(name)

    with pytest.raises(CheckpointError, match=r"is truncated \(.*download it again"):
        read()
    # As if it had been cut off after it was compared with the file that was opened.
    monkeypatch.setattr(opened, "_stamp", safetensors_io.stamp(path.stat()))
    with pytest.raises(CheckpointError, match="became shorter while it was read; download it again"):
        read()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_file_that_is_written_again_meanwhile(tmp_path, kind):
    """One with the same tensors serves, wherever they lie in it; one with others does not, and neither does none."""

    def write(tensors: State) -> None:
        fresh = tmp_path / f"fresh.{kind}"
        write_gguf(fresh, tensors, {}) if kind == "gguf" else write_safetensors(fresh, tensors, {"note": "x" * 40})
        os.replace(fresh, path)

    path, tensors = tmp_path / f"x.{kind}", {"a": torch.ones(4, 32), "b": torch.zeros(2, 32)}
    write(tensors)
    opened = tensor_files.open_file(path)
    write({"b": torch.full((2, 32), 5.0), "a": torch.full((4, 32), 7.0)})
    assert (opened.rows("a") == 7).all() and (opened.rows("b", 1) == 5).all()
    write({"a": torch.ones(4, 32), "b": torch.zeros(3, 32)})
    with pytest.raises(CheckpointError, match=r"holds other tensors than when it was opened; load it again"):
        opened.rows("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read .*download it again"):
        opened.rows("a")


@pytest.mark.parametrize("rows", [(0, None), (3, 7), (0, 1), (60, 10**6), (5, 5)])
def test_rows_of_a_file(tmp_path, rows):
    values = {
        "wide": torch.randn(64, 3),
        "small": torch.randn(64, 2, 5).to(torch.float8_e4m3fn),
        "one": torch.tensor(3),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, values)
    opened, buffer = tensor_files.open_file(path), torch.empty(1000, dtype=torch.uint8)
    for name in ("wide", "small"):
        wanted = values[name][rows[0] : rows[1]].float()
        assert torch.equal(opened.rows(name, *rows).float(), wanted)
        assert torch.equal(opened.rows(name, *rows, buffer).float(), wanted)
    assert opened.rows("one") == 3 and opened.rows("one").shape == ()
