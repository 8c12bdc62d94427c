"""The flow-matching training step: per-frame timesteps, so that one network learns T2V, I2V and continuation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.text import TextTokens
from ..optimize.optimized import OptimizedTransformer
from ..sampling.flow import NUM_TRAIN_TIMESTEPS, shift_sigmas


def sample_sigmas(batch: int, shift: float, *, device: torch.device | str = "cpu") -> Tensor:
    """Noise levels [batch] fp32 in 0..1, uniform before the shift (the distribution of a sampler with that shift)."""
    return shift_sigmas(torch.rand(batch, device=device), shift)


def flow_matching_loss(
    model: OptimizedTransformer,
    latents: Tensor,
    sigmas: Tensor,
    context: Tensor | TextTokens,
    mask: Tensor | None = None,
    *,
    num_cond_latents: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted x0 - noise over the noisy frames, a scalar fp32 (arXiv 2210.02747).

    latents [B, C, T, H, W] fp32, normalized; sigmas [B] in 0..1; context and mask as for the network. The first
    `num_cond_latents` frames stay clean at timestep 0 and have no loss.
    """
    options: dict[str, Any] = {"num_cond_latents": num_cond_latents, "noise": noise}
    return flow_matching_errors(model, latents, sigmas, context, mask, **options).mean()


def flow_matching_errors(
    model: OptimizedTransformer,
    latents: Tensor,
    sigmas: Tensor,
    context: Tensor | TextTokens,
    mask: Tensor | None = None,
    *,
    num_cond_latents: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """`flow_matching_loss` of each sample: [B] fp32."""
    noise = torch.randn_like(latents) if noise is None else noise
    level = sigmas[:, None].repeat(1, latents.shape[2])
    level[:, :num_cond_latents] = 0
    weight = level[:, None, :, None, None]
    noisy = torch.lerp(latents, noise, weight)
    out = model(noisy, level * NUM_TRAIN_TIMESTEPS, context, mask, num_cond_latents=num_cond_latents)
    error = (out - (latents - noise))[:, :, num_cond_latents:]
    return error.square().flatten(1).mean(1)


def drop_text(
    context: Tensor, mask: Tensor, null_context: Tensor, null_mask: Tensor, probability: float
) -> tuple[Tensor, Tensor]:
    """Replace each sample's text by the null text with `probability`, so that guidance has an unconditional half.

    context [B, L, D] or token ids [B, L], mask [B, L]; null_context [1, L, D] or ids [1, L], null_mask [1, L].
    """
    drop = torch.rand(context.shape[0], device=context.device) < probability
    chosen = drop.view(-1, *[1] * (context.ndim - 1))
    return torch.where(chosen, null_context, context), torch.where(drop[:, None], null_mask, mask)


class WeightAverage:
    """Exponential moving average of a module's parameters, in fp32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters: list[Tensor] = list(module.parameters())
        self.average = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimizer step."""
        torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averages inside the `with` block and its own parameters again after it."""
        with torch.no_grad():
            kept = [p.detach().clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, kept)


def captured(
    step: Callable[[], Any], optimizer: torch.optim.Optimizer, rate: Tensor, device: torch.device, pool: Any = None
) -> Callable[[], Any]:
    """A whole training step (forward, backward, optimizer) that runs as one CUDA graph; eager on other devices.

    A network of a few million parameters spends more time on launching kernels than on running them. `step` takes no
    arguments and reads its inputs from buffers that the caller refills; `rate` is the optimizer's learning rate as a
    tensor on the device. `pool` shares memory between graphs that never run at the same time.
    """

    def eager() -> Any:
        optimizer.zero_grad(set_to_none=True)
        return step()

    if device.type != "cuda":
        return eager
    rate.zero_()  # the rehearsal that capturing asks for must not train
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = step()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


@torch.no_grad()
def initialize(model: OptimizedTransformer) -> None:
    """Fresh weights: Xavier for projections, zero for modulation and output (DiT, arXiv 2212.09748).

    So the gated parts of a block start as identity and the network's output at zero; cross-attention has no gate.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif ".modulation." in name or name.startswith("final_layer."):
            parameter.zero_()
        elif name.startswith(("time_embed.", "text_embed.")):
            parameter.normal_(std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1))
