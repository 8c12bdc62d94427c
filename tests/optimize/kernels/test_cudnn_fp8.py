"""What happens around cuDNN's attention in 8 bits. The kernel itself needs a GPU; before use it is tried there."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longcat_core.optimize.kernels import cudnn_fp8 as eight
from longcat_core.optimize.kernels.cudnn_fp8 import Scaled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 2, 32
needs_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="tests what a GPU needs no stand-in for")


def qkv(tokens: int, samples: int = 2) -> tuple[Tensor, ...]:
    """Slices of a fused projection; keys have a mean that is much larger than they vary."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(samples, tokens, 3 * HEADS * DIM, generator=generator).to(DEVICE, torch.float16)
    q, k, v = (part.unflatten(-1, (HEADS, DIM)) for part in fused.chunk(3, dim=-1))
    mean = 5 * torch.randn(samples, 1, HEADS, DIM, generator=generator).to(k)
    return q, k.clone() + mean, v * 3


def plain(q: Scaled, k: Scaled, v: Scaled) -> Scaled:
    """What cuDNN computes, in fp32 but for its result."""
    wide = ((x.values.float() * x.scale).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*wide).transpose(1, 2) / v.scale
    return Scaled(out.clamp(-448, 448).to(torch.float8_e4m3fn), v.scale)


def right(values: Tensor) -> Any:
    """All but what Triton's interpreter gets wrong, see test_kernels: what rounds up to a power of two."""
    return values.float().abs().log2() % 1 != 0 if DEVICE.type == "cpu" else slice(None)


@pytest.mark.parametrize("centered", [False, True])
def test_packed_under_one_scale(centered):
    _, k, _ = qkv(700)
    packed = eight.pack(k, 768, centered=centered)
    assert packed.values.shape == (2, 768, HEADS, DIM) and packed.values.dtype == torch.float8_e4m3fn
    assert not packed.values[:, 700:].float().any(), "zeros behind the tokens"
    wanted = k.float() - k.float().mean(1, keepdim=True) if centered else k.float()
    most = wanted.abs().max()
    assert packed.scale.shape == (1,) and most / 448 <= packed.scale <= (10 if centered else 1.001) * most / 448
    values = packed.values[:, :700]
    found = values.float() * packed.scale
    where = right(values)
    torch.testing.assert_close(found[where], wanted[where], rtol=0.07, atol=float(most) / 1000)


def test_attention_of_keys_with_a_mean(monkeypatch):
    monkeypatch.setattr(eight, "_by_cudnn", plain)
    q, k, v = qkv(1100)
    wanted = scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def error() -> float:
        found = eight.attend(q, k, v)
        assert found.shape == q.shape and found.dtype == q.dtype
        return float((found.float() - wanted).norm() / wanted.norm())

    # 6 % on a GPU; the interpreter rounds badly.
    centered = error()
    given = eight.attend_quantized(q[:, :1090], k, v)
    assert given.values.shape == (2, 1090, HEADS * DIM) and given.scales.shape == (2, 1090, 1)
    same = (given.values.float() * given.scales).to(q.dtype).view(2, 1090, HEADS, DIM)
    assert torch.equal(same, eight.attend(q[:, :1090], k, v)), "in 8 bits already"
    assert centered < (0.2 if DEVICE.type == "cpu" else 0.07)
    pack = eight.pack
    monkeypatch.setattr(eight, "pack", lambda x, tokens, **_: pack(x, tokens))
    assert error() > 2 * centered, "what the mean would cost"


def test_zeros_among_the_keys_cost_less_than_they_may(monkeypatch):
    """The bound that lets them in, in fp32 and on their own."""
    q, k, v = (x.float().transpose(1, 2) for x in qkv(1100))
    k = (k - k.mean(2, keepdim=True)) * 2
    wanted = scaled_dot_product_attention(q, k, v)
    zeros = torch.zeros_like(k[:, :, :52])
    found = scaled_dot_product_attention(q, torch.cat((k, zeros), 2), torch.cat((v, zeros), 2))
    shrunk = 1 - found / wanted
    assert shrunk.min() > 0 and shrunk.max() <= 52 / 1100


def test_how_many_tokens_cudnn_gets():
    assert eight.padded(37440, True) == 37632 and eight.padded(37440, False) == 37440
    assert eight.padded(256, True) == 256 and eight.padded(200, False) == 256
    assert eight.padded(250, True) == 250, "6 zeros beside 250 keys would change the result"


@needs_cpu
def test_what_cudnn_is_given(monkeypatch):
    """Shapes, strides and pointers of the graph, played by a stand-in that keeps the books of the real one."""
    made = []

    class Node:
        def __init__(self, **given: Any) -> None:
            self.given = given

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("set_"):
                raise AttributeError(name)
            return lambda value: self.given.update({name.removeprefix("set_"): value}) or self

    class Graph:
        def __init__(self, **given: Any) -> None:
            self.tensors, self.steps = {}, []
            made.append(self)

        def tensor(self, **given: Any) -> Node:
            self.tensors[given["uid"]] = node = Node(**given)
            return node

        def sdpa_fp8(self, **given: Any) -> tuple[Node, ...]:
            self.given, self.outs = given, (Node(), Node(), Node(), Node())
            return self.outs

        def get_workspace_size(self) -> int:
            return 0

        def execute(self, pointers: dict[int, int], workspace: int, handle: str) -> None:
            self.pointers, self.handle = pointers, handle

        def __getattr__(self, name: str) -> Any:
            return lambda *args: self.steps.append(name)

    streams = []
    cudnn = types.SimpleNamespace(
        pygraph=Graph,
        data_type=types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float"),
        heur_mode=types.SimpleNamespace(A="a"),
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: streams.append((handle, stream)),
    )
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    for cached in (eight._build, eight._handle):
        monkeypatch.setattr(eight, cached.__name__, cached.__wrapped__)
    q, k, v = qkv(1100)
    out = eight.attend(q[:, -140:], k, v)
    assert out.shape == (2, 140, HEADS, DIM)
    (graph,) = made
    assert graph.steps == [
        *("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"),
    ]
    sizes = {name: graph.given[name].given["dim"] for name in "qkv"}
    assert sizes == {"q": (2, HEADS, 192, DIM), "k": (2, HEADS, 1100, DIM), "v": (2, HEADS, 1100, DIM)}
    assert graph.given["q"].given["stride"] == (192 * HEADS * DIM, DIM, HEADS * DIM, 1)
    assert graph.given["attn_scale"] == DIM**-0.5 and graph.given["generate_stats"] is False
    known = {*graph.tensors, *(node.given["uid"] for node in graph.outs if "uid" in node.given)}
    assert set(graph.pointers) == known and len(set(graph.pointers.values())) == len(known)
    assert graph.handle == "handle" and streams == [("handle", 7)]
