"""LoRA files of every kind change the weights that they are for, by what they say, and can be taken out again."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_core.checkpoints.load import load_transformer, open_checkpoint
from longcat_core.checkpoints.lora import LoraStack, lora_of, merge_lora, open_loras
from longcat_core.checkpoints.lora_names import PREFIX, SEPARATOR
from longcat_core.checkpoints.merged import MergedLoras
from longcat_core.cli import main as cli
from longcat_core.cli import models as commands
from longcat_core.errors import CheckpointError, LongCatError
from longcat_core.files.fingerprints import fingerprint
from longcat_core.files.safetensors_io import read_tensors, write_safetensors
from longcat_core.generate.paths import ModelPaths
from longcat_core.generate.pipeline import Pipeline
from longcat_core.model.config import ModelConfig
from longcat_core.optimize.optimized import OptimizedTransformer
from longcat_core.optimize.quantization import Policy, quantize

from .written_forms import COMFYUI, FASTVIDEO, comfyui, fp8_scaled, renamed

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LORA = GOLDEN / "lora.safetensors"
FORWARD = GOLDEN / "forward.safetensors"
OTHER_BLOCK = PREFIX + SEPARATOR.join(("blocks", "9", "attn", "proj")) + ".alpha_scale"


@pytest.fixture
def model() -> OptimizedTransformer:
    return load_transformer(GOLDEN / "dit.safetensors")


def test_slices_of_a_fused_weight_change_by_their_own_product(model):
    before = model.blocks[0].attn.qkv.weight.clone()
    merge_lora(model, LORA, strength=0.5)
    parts = open_loras([(LORA, 1.0)])[0].layers["blocks.0.attn.qkv"]
    for i in range(3):
        down = parts["lora_down.weight"].chunk(3)[i]
        expected = 0.5 * parts["alpha_scale"] * parts[f"lora_up.blocks.{i}.weight"] @ down
        change = (model.blocks[0].attn.qkv.weight - before).chunk(3)[i]
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)


def test_gate_and_up_land_in_their_halves(model):
    before = model.blocks[1].ffn.gate_up.weight.clone()
    merge_lora(model, LORA)
    for i, name in enumerate(("w1", "w3")):
        parts = open_loras([(LORA, 1.0)])[0].layers[f"blocks.1.ffn.{name}"]
        expected = parts["alpha_scale"] * parts["lora_up.weight"] @ parts["lora_down.weight"]
        change = (model.blocks[1].ffn.gate_up.weight - before).chunk(2)[i]
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)


def test_every_target_changes_and_strength_minus_one_takes_it_out(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    changed = merge_lora(model, LORA)
    assert len(changed) == len(open_loras([(LORA, 1.0)])[0].layers) == 19
    assert sum(not torch.equal(v, before[k]) for k, v in model.state_dict().items()) == 17
    merge_lora(model, LORA, strength=-1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)


def test_merging_in_inference_mode_counts_as_a_write(model):
    """Else a streamed block would go on with its copy on the device."""
    before = [parameter._version for parameter in model.parameters()]
    with torch.inference_mode():
        merge_lora(model, LORA)
    changed = sum(new._version > old for new, old in zip(model.parameters(), before, strict=True))
    assert changed == 17


def test_tensors_in_memory_join_into_one_lora_for_each_weight(model):
    """As ComfyUI takes it: up @ down is the whole change, of w1 and w3 and of every slice."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    stack = LoraStack([lora_of(read_tensors(LORA), "the LoRA file")], shapes)
    assert stack.weights == LoraStack([(LORA, 1.0)], shapes).weights
    for name in stack.weights:
        up, down = stack.joined(name)
        expected = stack.add(name, torch.zeros(shapes[name])).flatten(1)
        torch.testing.assert_close(up @ down.float(), expected, atol=1e-6, rtol=1e-4)


def test_errors_of_tensors_in_memory_name_their_source():
    with pytest.raises(CheckpointError, match=r"the LoRA file is not a LoRA \(it holds a\)"):
        lora_of({"a": torch.ones(1)}, "the LoRA file")


# Kinds of files


def layers() -> dict[str, tuple[Tensor, list[Tensor], float]]:
    """The golden LoRA: official module -> (down, ups, scale)."""
    found = {}
    for name, tensor in read_tensors(LORA).items():
        module, _, part = name.removeprefix(PREFIX).replace(SEPARATOR, ".").partition(".lora_")
        module = module.removesuffix(".alpha_scale")
        down, ups, scale = found.get(module, (None, [], 0.0))
        if not part:
            scale = float(tensor)
        elif part.startswith("down"):
            down = tensor
        else:
            ups = [*ups, (part, tensor)]
        found[module] = down, ups, scale
    return {m: (d, [up for _, up in sorted(u, key=lambda pair: pair[0])], s) for m, (d, u, s) in found.items()}


def whole() -> dict[str, tuple[Tensor, Tensor, float]]:
    """module -> (down, up, scale), the slices of fused layers on a block diagonal."""
    return {module: (down, torch.block_diag(*ups), scale) for module, (down, ups, scale) in layers().items()}


def parted(rules: tuple[tuple[str, str], ...]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Every slice of a fused layer as a layer of its own, under the names of a form."""
    out = {}
    for module, (down, ups, scale) in layers().items():
        fused = re.search(r"(qkv|kv)(_linear)?$", module)
        letters = fused[1] if fused else "-"
        for letter, rows, up in zip(letters, down.chunk(len(ups)), ups, strict=True):
            name = module[: fused.start()] + letter if fused else module
            # The rules of a form end on names of tensors.
            out[renamed(f"{name}.weight", rules).removesuffix(".weight")] = rows, up, scale
    return out


def peft(files: dict, prefix: str, adapter: str = "", alpha: bool = True) -> dict[str, Tensor]:
    out = {}
    for module, (down, up, scale) in files.items():
        name = prefix + module
        out[f"{name}.lora_A{adapter}.weight"] = down
        out[f"{name}.lora_B{adapter}.weight"] = up if alpha else up * scale
        if alpha:
            out[f"{name}.alpha"] = torch.tensor(scale * down.shape[0])
    return out


def kohya(files: dict, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    out = {}
    for module, (down, up, scale) in files.items():
        name = prefix + module.replace(".", "_")
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        out[f"{name}.alpha"] = torch.tensor(scale * down.shape[0])
    return out


def fastvideo_lora(files: dict) -> dict[str, Tensor]:
    out = {}
    for module, (down, up, scale) in files.items():
        out |= {f"{module}.lora_A": down, f"{module}.lora_B": up}
        out[f"{module}.lora_alpha"] = torch.tensor(scale * down.shape[0], dtype=torch.float32)
    return out


def network_names() -> dict[str, tuple[Tensor, Tensor, float]]:
    """Modules as the network calls them, w1 and w3 as one LoRA of gate_up."""
    names = {"adaLN_modulation.1": "modulation", "cross_attn.q_linear": "cross_attn.q", "ffn.w2": "ffn.down"}
    out, given = {}, whole()
    for module, (down, up, scale) in given.items():
        name = module.replace("cross_attn.kv_linear", "cross_attn.kv")
        for official, ours in names.items():
            name = name.replace(official, ours) if name.startswith("blocks.") else name
        if module.endswith("w1"):
            other = given[module.replace("w1", "w3")]
            assert other[2] == scale
            down, up = torch.cat((down, other[0])), torch.block_diag(up, other[1])
            name = module.replace("w1", "gate_up")
        if not module.endswith("w3"):
            out[name] = down, up, scale
    return out


KINDS = {
    "peft, official names": lambda: peft(whole(), "transformer."),
    "peft, ComfyUI names": lambda: peft(parted(COMFYUI), "diffusion_model."),
    "peft, named adapter": lambda: peft(parted(FASTVIDEO), "base_model.model.", adapter=".default"),
    "peft, two prefixes": lambda: peft(whole(), "base_model.model.transformer."),
    "peft, no alpha": lambda: peft(parted(COMFYUI), "diffusion_model.", alpha=False),
    "peft, the network's names": lambda: peft(network_names(), "diffusion_model."),
    "kohya, fused": lambda: kohya(whole()),
    "kohya, split": lambda: kohya(parted(COMFYUI)),
    "kohya, FastVideo names": lambda: kohya(parted(FASTVIDEO), "lora_transformer_"),
    "FastVideo": lambda: fastvideo_lora(parted(FASTVIDEO)),
    "dotted downs and ups": lambda: {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in peft(parted(COMFYUI), "diffusion_model.").items()
    },
}


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors") -> Path:
    write_safetensors(folder / name, tensors)
    return folder / name


def output(model: OptimizedTransformer) -> Tensor:
    given = read_tensors(FORWARD)
    with torch.no_grad():
        return model(given["x"], given["t"], given["context"], given["mask"])


def test_the_golden_output(model):
    merge_lora(model, LORA)
    wanted = read_tensors(FORWARD)["lora.out"]
    assert ((output(model) - wanted).abs().max() / wanted.std()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_golden_output(model, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(model, saved(tmp_path, KINDS[kind]()))
    wanted = read_tensors(FORWARD)["lora.out"]
    assert ((output(model) - wanted).abs().max() / wanted.std()) < 1e-5


def test_a_lora_of_the_patch_embedding(model, tmp_path):
    up, down = torch.randn(64, 4, 1, 1, 1), torch.randn(4, 16, 1, 2, 2)
    tensors = {"lora_unet_patch_embedding.lora_up.weight": up, "lora_unet_patch_embedding.lora_down.weight": down}
    before = model.patch_embed.weight.clone()
    merge_lora(model, saved(tmp_path, tensors | {"lora_unet_patch_embedding.alpha": torch.tensor(2.0)}), 0.5)
    change = 0.25 * torch.einsum("or,ricpq->oicpq", up[..., 0, 0, 0], down)
    torch.testing.assert_close(model.patch_embed.weight - before, change, atol=1e-5, rtol=1e-4)


# Several at a time, and exchanging them


def test_a_stack_is_summed_before_it_is_rounded(tmp_path):
    other = saved(tmp_path, kohya({name: (d, u * 0.3, s) for name, (d, u, s) in whole().items()}))
    stack = [(LORA, 0.7), (other, -1.5), (LORA, 0.25)]
    wide = load_transformer(GOLDEN / "dit.safetensors")
    for path, strength in stack:
        merge_lora(wide, path, strength)
    merged = load_transformer(GOLDEN / "dit.safetensors", lora=stack).state_dict()
    for name, value in wide.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)
    half = load_transformer(GOLDEN / "dit.safetensors", lora=stack, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in merged.items())


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8", "fp8 of fp8"])
def test_loras_are_exchanged_exactly(tmp_path, kind):
    path = GOLDEN / "dit.safetensors"
    if kind == "fp8 of fp8":
        path = saved(tmp_path, fp8_scaled(comfyui(read_tensors(path))), "base.safetensors")
    other = saved(tmp_path, peft(parted(COMFYUI), "diffusion_model."))
    options = {"dtype": torch.float32 if kind == "fp32" else torch.bfloat16}
    options["fp8"] = Policy() if "fp8" in kind else None

    def same(model: OptimizedTransformer, loras: list) -> bool:
        wanted = load_transformer(path, lora=loras, **options).state_dict()
        return all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())

    model = load_transformer(path, lora=[(LORA, 1.0)], **options)
    merged = MergedLoras(model, open_checkpoint(path), [(LORA, 1.0)])
    for loras in ([(other, 0.5)], [(LORA, 0.1), (other, 0.2)], [], [(LORA, 1.0)]):
        assert len(merged.set(loras)) == 17
        assert same(model, loras)
    assert merged.set() and merged.set() == []
    assert same(model, [])
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        merged.set([(GOLDEN / "dit.safetensors", 1.0)])
    assert same(model, [])


def test_exchanging_changes_nothing_if_the_checkpoint_is_gone(tmp_path):
    path = tmp_path / "dit.safetensors"
    path.write_bytes((GOLDEN / "dit.safetensors").read_bytes())
    model = load_transformer(path)
    merged = MergedLoras(model, open_checkpoint(path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path.unlink()
    with pytest.raises(CheckpointError, match=r"dit\.safetensors"):
        merged.set([(LORA, 1.0)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"unet.weight": torch.ones(2)}, r"is not a LoRA \(it holds unet\.weight\)"),
        (lambda t: {}, r"is not a LoRA \(it holds nothing\)"),
        (
            lambda t: {k: v[:, :-1] if k.endswith("proj.lora_up.weight") else v for k, v in t.items()},
            "mismatched ranks",
        ),
        (lambda t: {k: v for k, v in t.items() if "final" not in k or "down" not in k}, "broken LoRA for final"),
        (
            lambda t: {
                "blocks.0.ffn.w2.lora_up.weight": torch.ones(64),
                "blocks.0.ffn.w2.lora_down.weight": torch.ones(1, 256),
            },
            "broken LoRA for blocks.0.ffn.w2",
        ),
        (lambda t: {k: v[:-2] if k.endswith("w2.lora_up.weight") else v for k, v in t.items()}, "another size"),
        (lambda t: {k: v[..., :3] if k.endswith("w3.lora_down.weight") else v for k, v in t.items()}, "another size"),
        (lambda t: {k: v * float("nan") if "w2.lora_up" in k else v for k, v in t.items()}, "NaN .*w2; download"),
        (lambda t: {k: v * float("inf") if k.endswith("scale") else v for k, v in t.items()}, "NaN or infinite"),
        (lambda t: t | {"blocks.0.ffn.w2.dora_scale": torch.ones(64)}, "holds blocks.0.ffn.w2.dora_scale: a kind of"),
        (lambda t: t | {"blocks.0.ffn.w2.hada_w1_a": torch.ones(64)}, "a kind of LoRA that cannot be merged"),
        (lambda t: t | {"blocks.0.ffn.w2.lora_A.weight": torch.ones(4, 256)}, "changes blocks.0.ffn.w2 twice"),
        (
            lambda t: {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": torch.ones(4, 8),
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": torch.ones(8, 4),
            },
            r"matches nothing in LongCat-Video: 0 of its 1 modules; it has for instance single_blocks\.0\.linear1; it",
        ),
        (
            lambda t: peft(
                {"blocks.0.self_attn.q": (torch.ones(4, 5120), torch.ones(5120, 4), 1.0)}, "diffusion_model."
            ),
            r"self_attn\.q by \[5120, 5120\], the model has \[64, 64\]; it belongs to a model of another size",
        ),
    ],
)
def test_bad_files_change_nothing(model, tmp_path, change, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = saved(tmp_path, change(read_tensors(LORA)), "bad.safetensors")
    for use in (
        lambda: merge_lora(model, path),
        lambda: load_transformer(GOLDEN / "dit.safetensors", lora=[(path, 1)]),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            use()
        assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_does_not_match_is_reported(model, tmp_path):
    path = saved(tmp_path, read_tensors(LORA) | {OTHER_BLOCK: torch.ones(()), "note": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"matches 19 of its 21 modules; not matched: note, blocks\.9\.attn\.proj$"):
        merge_lora(model, path)
    with pytest.warns(UserWarning, match="matches 19 of its 21 modules"):
        load_transformer(GOLDEN / "dit.safetensors", lora=[(path, 1.0)])
    shallow = OptimizedTransformer(replace(ModelConfig.from_json(GOLDEN / "config.json"), depth=1))
    with pytest.warns(UserWarning, match=r"10 of its 19 modules; not matched: blocks\.1\.\S+, .* and 6 more"):
        merge_lora(shallow.requires_grad_(False), LORA)


def test_8_bit_weights_and_bad_strengths_are_refused(model):
    for strength in (float("nan"), float("inf"), 1e39, -1001.0):
        with pytest.raises(LongCatError, match=rf"strength {re.escape(f'{strength:g}')} of .* is out of range"):
            merge_lora(model, LORA, strength)
    quantize(model)
    with pytest.raises(LongCatError, match="cannot be merged into 8-bit weights"):
        merge_lora(model, LORA)


# The option


def test_the_option_takes_files_with_strengths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b:0.5").touch()
    given = ["a.safetensors", "a.safetensors:0.8", "a:-1", "C:\\a.safetensors", "b:0.5", ":2", "a:high"]
    arguments = [argument for text in given for argument in ("--lora", text)]
    loras = cli.build_parser().parse_args(["generate", "x", *arguments]).lora
    wanted = [("a.safetensors", 1), ("a.safetensors", 0.8), ("a", -1), ("C:\\a.safetensors", 1)]
    assert loras == [(Path(name), strength) for name, strength in (*wanted, ("b:0.5", 1), (":2", 1), ("a:high", 1))]
    assert cli.build_parser().parse_args(["generate", "x"]).lora is None


def test_strengths_are_settings_of_a_folder_of_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "compile_mode", lambda *args: "off")
    paths = ModelPaths(GOLDEN / "dit.safetensors", GOLDEN / "vae.safetensors", GOLDEN / "dit.safetensors")

    def settings(*loras: str) -> str | None:
        arguments = [argument for text in loras for argument in ("--lora", text)]
        args = cli.build_parser().parse_args(["generate", "x", *arguments])
        return commands.model_settings(args, paths, torch.device("cpu"))[0].get("lora")

    assert settings() is None
    one = settings(str(LORA))
    assert len({None, one, settings(f"{LORA}:0.5"), settings(str(LORA), str(LORA)), settings(f"{LORA}:2")}) == 5
    assert one == settings(f"{LORA}:1") == fingerprint(LORA)


def test_the_pipeline_takes_one_file_or_several(tmp_path):
    name = PREFIX + SEPARATOR.join(("blocks", "0", "attn", "proj"))
    size = Pipeline.load().model.config.hidden_size
    tensors = {f"{name}.lora_down.weight": torch.ones(2, size) * 0.1, f"{name}.alpha_scale": torch.tensor(1.0)}
    path = saved(tmp_path, tensors | {f"{name}.lora_up.weight": torch.linspace(-0.1, 0.1, size * 2).view(size, 2)})
    one, both, twice = (Pipeline.load(lora=lora) for lora in (path, [(path, 0.4), (path, 0.6)], [(path, 2.0)]))
    weight, plain = one.model.blocks[0].attn.proj.weight, Pipeline.load().model.blocks[0].attn.proj.weight
    torch.testing.assert_close(both.model.blocks[0].attn.proj.weight, weight)
    torch.testing.assert_close(twice.model.blocks[0].attn.proj.weight - plain, 2 * (weight - plain))
    # Exchanged without loading again: for a second LoRA, then for none.
    assert list(twice.loras) == [(path, 2.0)]
    twice.set_loras([(path, 1.0)])
    assert torch.equal(twice.model.blocks[0].attn.proj.weight, weight)
    with pytest.raises(LongCatError):
        twice.loras.set("missing.safetensors")
    assert list(twice.loras) == [(path, 1.0)]
    assert twice.loras.set() and not twice.loras
    assert torch.equal(twice.model.blocks[0].attn.proj.weight, plain)
