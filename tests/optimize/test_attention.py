"""Attention backends: chosen by name or `auto`, refused with a reason, and text packed for a varlen kernel."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_core.errors import BackendUnavailable
from longcat_core.model.ops import attend_with_bias
from longcat_core.model.text import TextTokens, arrange_text
from longcat_core.optimize import attention as backends
from longcat_core.optimize import requirement
from longcat_core.optimize.attention import BACKENDS, Inputs, Varlen
from longcat_core.optimize.fused import attend_packed, pack_text

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BY_NAME = {backend.name: backend for backend in BACKENDS}
OPTIONAL = ("flash_attn", "flash_attn_interface", "sageattention", "xformers")
PLAIN = Inputs(CPU, torch.float32, 64, False)


def forget() -> None:
    """Nothing is remembered of the machine and of the packages that were looked for."""
    requirement.load.cache_clear()
    requirement._missing.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a Hopper GPU, without any optional package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    # What runs on it works.
    monkeypatch.setattr(backends, "tried", lambda *_: "")
    packages(monkeypatch, {})
    yield
    forget()


def packages(monkeypatch: pytest.MonkeyPatch, found: dict[str, object]) -> None:
    """Make exactly `found` importable among optional packages; an exception there is raised by the import."""
    real, real_spec = importlib.import_module, requirement.find_spec
    there = {name.split(".")[0] for name in found}

    def import_module(name: str, package: str | None = None) -> object:
        if name.split(".")[0] not in OPTIONAL:
            return real(name, package)
        result = found.get(name, ModuleNotFoundError(name))
        if isinstance(result, Exception):
            raise result
        return result

    def find_spec(name: str) -> object:
        # A folder of that name may be there: FlashAttention-4 has flash_attn without what FlashAttention-2 needs.
        return real_spec(name) if name not in OPTIONAL else object() if name in there else None

    forget()
    monkeypatch.setattr(requirement.importlib, "import_module", import_module)
    monkeypatch.setattr(requirement, "find_spec", find_spec)


def test_names_are_those_of_the_report(no_gpu):
    assert backends.names()[0] == "auto"
    report = backends.report()
    assert tuple(name for name, _, _ in report) == backends.names()[1:]
    expected = {
        "flash2",
        "flash3",
        "flash4",
        "cudnn-fp8",
        "sage",
        "xformers",
        "cudnn",
        "sdpa",
        "sdpa-flash",
        "sdpa-math",
    }
    assert {name for name, _, _ in report} == expected


def test_report_says_what_is_there_and_why_the_rest_is_not(no_gpu, monkeypatch):
    packages(monkeypatch, {})
    rows = {name: (usable, text) for name, usable, text in backends.report()}
    assert {name for name, (usable, _) in rows.items() if usable} == {"sdpa", "sdpa-math"}
    assert rows["sdpa"] == (True, BY_NAME["sdpa"].summary)
    assert rows["cudnn"] == (False, "no CUDA device")
    assert rows["flash2"] == (False, "package flash_attn is not installed")
    assert rows["xformers"] == (False, "package xformers is not installed")
    assert all(text for _, text in rows.values())


def test_a_broken_package_is_reported_not_raised(no_gpu, monkeypatch):
    broken = ImportError("libcudart.so.11: cannot open\nsecond line")
    packages(monkeypatch, {"flash_attn": broken, "sageattention": AttributeError("no such thing")})
    rows = {name: text for name, _, text in backends.report()}
    assert rows["flash2"] == "flash_attn does not load: ImportError: libcudart.so.11: cannot open"
    assert rows["sage"] == "sageattention does not load: AttributeError: no such thing"
    with pytest.raises(BackendUnavailable, match=r"'flash2' is unavailable \(flash_attn does not load.*auto, sdpa"):
        backends.check("flash2")


def test_a_package_of_another_version_is_reported(no_gpu, monkeypatch):
    packages(monkeypatch, {"flash_attn": types.ModuleType("flash_attn")})
    assert BY_NAME["flash2"].needs.missing() == "flash_attn has no flash_attn_func: its version does not fit"


def test_an_old_gpu_is_a_reason(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    packages(monkeypatch, {"flash_attn_interface": types.SimpleNamespace(flash_attn_func=None)})
    assert BY_NAME["flash3"].needs.missing() == "needs compute capability 9.0, this GPU has 7.5"


def test_unknown_and_unavailable_names_list_what_is_there(no_gpu):
    with pytest.raises(BackendUnavailable, match="unknown attention backend 'magic'; this machine has: auto, sdpa, sd"):
        backends.check("magic")
    with pytest.raises(BackendUnavailable, match=r"'cudnn' is unavailable \(no CUDA device\); this machine has: auto"):
        backends.resolve("cudnn", PLAIN)
    for name in ("auto", "sdpa", "sdpa-math"):
        backends.check(name)


def test_auto_on_a_cpu_is_sdpa(no_gpu):
    assert backends.resolve("auto", PLAIN).name == "sdpa"
    assert backends.resolve_kernels("auto", PLAIN) == backends.Kernels(BY_NAME["sdpa"].attend, None)


def test_auto_takes_the_first_that_accepts_the_inputs(gpu):
    half = Inputs(CUDA, torch.bfloat16, 128, False)
    assert backends.resolve("auto", half).name == "cudnn"
    assert backends.resolve("auto", half._replace(head_dim=256)).name == "sdpa-flash"
    assert backends.resolve("auto", half._replace(dtype=torch.float32)).name == "sdpa"
    assert backends.resolve("auto", half._replace(device=CPU)).name == "sdpa"


def test_auto_never_takes_a_lossy_kernel(gpu, monkeypatch):
    packages(monkeypatch, {"sageattention": types.SimpleNamespace(sageattn=None)})
    half = Inputs(CUDA, torch.bfloat16, 128, False)
    assert BY_NAME["sage"].needs.missing() == "" and backends.resolve("auto", half).name == "cudnn"
    assert backends.resolve("sage", half).name == "sage"


def test_flash4_comes_first_but_not_in_training(gpu, monkeypatch):
    flash = types.SimpleNamespace(flash_attn_func=None)
    packages(monkeypatch, {"flash_attn.cute": flash, "flash_attn_interface": flash})
    half = Inputs(CUDA, torch.bfloat16, 128, False)
    assert backends.resolve("auto", half).name == "flash4"
    assert backends.resolve("auto", half._replace(grad=True)).name == "flash3"


def test_a_package_is_imported_while_a_checkpoint_loads(monkeypatch):
    loaded = []
    monkeypatch.setattr(backends, "load", lambda module: loaded.append(module))
    monkeypatch.setattr(requirement, "needs_cuda", lambda capability, exactly=False: "")
    there = {"flash_attn", "sageattention"}
    monkeypatch.setattr(requirement, "find_spec", lambda name: object() if name in there else None)
    for name in ("auto", "sage", "cudnn"):
        thread = backends.import_ahead("cuda", name)
        if thread is not None:
            thread.join()
    assert loaded == ["flash_attn.cute", "sageattention"]
    assert backends.import_ahead("cpu") is None
    there.remove("flash_attn")
    there.add("xformers")
    assert backends.import_ahead("cuda") is None, "cuDNN comes before it"


@pytest.fixture
def tried(monkeypatch):
    """A function that says what a trial finds of a kernel that stands in the place of `name`."""

    def trial(name: str, attend) -> str:
        other = dataclasses.replace(BY_NAME[name], attend=attend)
        monkeypatch.setitem(backends._BY_NAME, name, other)
        return backends.tried.__wrapped__(name, CPU, torch.bfloat16, 64)

    return trial


def test_kernels_are_tried_on_a_few_tokens(tried):
    state = torch.get_rng_state()
    exact = BY_NAME["sdpa"].attend
    assert tried("flash4", exact) == ""
    assert torch.equal(torch.get_rng_state(), state)

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution")

    found = tried("flash4", broken)
    assert found == "it fails on this GPU: RuntimeError: no kernel image is available for execution"
    assert "wrong on this GPU (error nan)" in tried("flash4", lambda q, k, v: exact(q, k, v) * torch.nan)
    assert "wrong on this GPU (error 0.1)" in tried("flash4", lambda q, k, v: exact(q, k, v) * 1.1)
    assert tried("sage", lambda q, k, v: exact(q, k, v) * 1.1) == "", "8 bits may be farther off"
    assert "wrong" in tried("sage", lambda q, k, v: exact(q, k, v) * 1.5)
    assert "wrong" in tried("flash4", lambda q, k, v: exact(k, q, v))


def test_a_kernel_that_fails_is_skipped_or_refused_with_its_reason(gpu, monkeypatch):
    flash = types.SimpleNamespace(flash_attn_func=None)
    packages(monkeypatch, {"flash_attn.cute": flash})
    half, asked = Inputs(CUDA, torch.bfloat16, 128, False), []

    def fails(name: str, *inputs: object) -> str:
        asked.append((name, *inputs))
        return "it fails on this GPU: X" if name in ("flash4", "cudnn") else ""

    monkeypatch.setattr(backends, "tried", fails)
    assert backends.resolve("auto", half).name == "sdpa-flash"
    assert asked[0] == ("flash4", CUDA, torch.bfloat16, 128)
    kernels = backends.resolve_kernels("auto", half)
    assert kernels.text is BY_NAME["sdpa-flash"].attend and kernels.varlen is backends._TORCH_VARLEN
    with pytest.raises(BackendUnavailable, match="'flash4' cannot run here: it fails on this GPU: X; choose 'auto'"):
        backends.resolve("flash4", half)
    rows = {name: (usable, text) for name, usable, text in backends.report(half)}
    assert rows["flash4"] == (False, "it fails on this GPU: X") and rows["sdpa-flash"][0] and rows["sdpa"][0]
    asked.clear()
    assert backends.resolve("auto", half._replace(device=CPU)).name == "sdpa" and not asked


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("cudnn", {"device": CPU}, "the tensors are on cpu"),
        ("cudnn", {"dtype": torch.float32}, "it takes bfloat16 or float16, not float32"),
        ("cudnn", {"head_dim": 192}, "up to 128 in steps of 8, not 192"),
        ("sdpa-flash", {"head_dim": 100}, "up to 256 in steps of 8, not 100"),
        ("flash4", {"grad": True}, "no backward pass"),
        ("sage", {"grad": True}, "no backward pass"),
        ("xformers", {"dtype": torch.float64}, "bfloat16 or float16 or float32"),
    ],
)
def test_refused_inputs_have_a_reason(name, change, said):
    half = Inputs(CUDA, torch.bfloat16, 128, False)
    assert BY_NAME[name].needs.refuses(half) == ""
    assert said in BY_NAME[name].needs.refuses(half._replace(**change))


def test_asked_by_name_a_refusal_is_an_error_not_a_substitute(gpu):
    with pytest.raises(BackendUnavailable, match=r"'cudnn' cannot run here: .*not float32; choose 'auto'"):
        backends.resolve("cudnn", Inputs(CUDA, torch.float32, 128, False))


def test_varlen_kernels_run_without_gradients_only(gpu):
    half = Inputs(CUDA, torch.bfloat16, 128, False)
    assert backends.resolve_kernels("auto", half).varlen is backends._TORCH_VARLEN
    assert backends.resolve_kernels("auto", half._replace(grad=True)).varlen is None
    assert backends.resolve_kernels("sdpa", half).varlen is None


@pytest.mark.parametrize("grad", [False, True])
def test_both_cpu_kernels_agree_with_the_definition(grad):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 3, 16, generator=generator, requires_grad=grad)
    k, v = torch.randn(2, 2, 11, 3, 16, generator=generator)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 16**-0.5
    wanted = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double()).float()
    for name in ("sdpa", "sdpa-math"):
        torch.testing.assert_close(BY_NAME[name].attend(q, k, v), wanted, atol=1e-5, rtol=1e-5)


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Varlen) -> tuple[Tensor, Tensor]:
    """What a varlen kernel computes, one sequence after the other: output [sum Nq, H, D], log-sum-exp [H, sum Nq]."""
    assert lengths.cu_seqlens_q.dtype == lengths.cu_seqlens_k.dtype == torch.int32
    assert lengths.cu_seqlens_q[-1] == len(q) and lengths.cu_seqlens_k[-1] == len(k) == len(v)
    assert lengths.max_seqlen_q == lengths.cu_seqlens_q.diff().max()
    assert lengths.max_seqlen_k == lengths.cu_seqlens_k.diff().max()
    outputs, sums = [], []
    for i in range(len(lengths.cu_seqlens_q) - 1):
        rows = slice(*lengths.cu_seqlens_q[i : i + 2].tolist())
        keys = slice(*lengths.cu_seqlens_k[i : i + 2].tolist())
        logits = torch.einsum("nhd,mhd->hnm", q[rows].float(), k[keys].float()) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v[keys].float()).to(q.dtype))
        sums.append(logits.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def text(lengths: list[int], width: int, zero_pad: bool, mode: str = "exact") -> tuple[TextTokens, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(len(lengths), width, 8, generator=generator)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return arrange_text(context, mask, mode, zero_pad, lambda x: x), context, mask


@pytest.mark.parametrize("zero_pad", [True, False], ids=["folded", "dropped"])
@pytest.mark.parametrize("lengths", [[5, 9, 1], [12, 3, 12], [12, 12, 12]])
def test_packed_text_is_attended_like_biased_text(zero_pad, lengths):
    tokens, heads, dim, width = 10, 2, 16, 12
    arranged, context, mask = text(lengths, width, zero_pad)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(2, 8, heads * dim, generator=generator)
    shift = torch.randn(2, heads * dim, generator=generator)
    q = torch.randn(3, tokens, heads, dim, generator=generator)

    def keys_values(x: Tensor) -> list[Tensor]:
        # With a bias, so that the zero vector of a padding token has a key and a value.
        return [(x @ weights[i] + shift[i]).unflatten(-1, (heads, dim)) for i in range(2)]

    packed = attend_packed(plain_varlen, q, *keys_values(arranged.tokens), pack_text(arranged))
    biased = attend_with_bias(q, *keys_values(arranged.tokens), arranged.bias)
    torch.testing.assert_close(packed, biased, atol=1e-5, rtol=1e-5)

    # And both like every position attended the plain way.
    k, v = keys_values(context * mask[..., None])
    hidden = None if zero_pad else mask[:, None, None].bool()
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=hidden)
    torch.testing.assert_close(packed, wanted.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_the_dtype_of_packed_attention_is_that_of_the_queries():
    arranged, _, _ = text([2, 4], 6, True)
    q, k = torch.ones(2, 3, 2, 4).bfloat16(), arranged.tokens.unflatten(-1, (2, 4)).bfloat16()
    assert attend_packed(plain_varlen, q, k, k, pack_text(arranged)).dtype == torch.bfloat16


@pytest.mark.parametrize("documented", [True, False])
def test_log_sum_exp_of_torch_varlen_in_either_layout(monkeypatch, documented):
    class FakeVarlen:
        AuxRequest = dict

        @staticmethod
        def varlen_attn(q, k, v, *lengths, return_aux):
            out, lse = plain_varlen(q, k, v, Varlen(*lengths))
            return out, lse.T if documented else lse

    monkeypatch.setattr(backends, "load", lambda module: (FakeVarlen, ""))
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    lengths = Varlen(*torch.tensor([[0, 3, 6], [0, 4, 5]], dtype=torch.int32), 3, 4)
    given, expected = backends._torch_varlen(q, k, v, lengths), plain_varlen(q, k, v, lengths)
    torch.testing.assert_close(given[0], expected[0])
    torch.testing.assert_close(given[1], expected[1])


@pytest.mark.parametrize("needs", ["", "import whole\nassert whole.started"])
def test_a_module_that_needs_parts_of_a_package_does_not_wait_for_its_start(monkeypatch, tmp_path, needs):
    """Unless it turns out to need more; and whoever asks for the rest gets it."""
    files = {"whole/__init__.py": "from .slow import part\nstarted = True", "whole/slow.py": "def part(): ...",
             "whole/begin.py": "", "user.py": f"from whole import begin\n{needs}"}  # fmt: skip
    (tmp_path / "whole").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(requirement._PARTS, "user", ("whole", "whole.begin"))
    for name in ("whole", "whole.slow", "whole.begin", "user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    forget()
    assert requirement.load("user")[1] == ""
    assert ("whole.slow" in sys.modules) == bool(needs)
    from whole import part, started

    assert started and callable(part) and sys.modules["whole"].begin
