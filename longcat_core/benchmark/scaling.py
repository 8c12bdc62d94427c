"""What more GPUs and several hosts would take, calculated from what one and two GPUs took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..measure.charts import COLORS, DASH, GRAY, SHORT, SOLID, Axis, Line, Panel, Point, even_axis, line_chart
from ..model.config import ModelConfig
from ..optimize.plan import Work
from ..parallel.layout import exchanged_bytes, flops, pass_seconds

if TYPE_CHECKING:
    from PIL import Image

COUNTS = (1, 2, 4, 8)
# GPUs of a host, and bytes per second of each GPU's network card: 400 Gbit/s, as hosts of eight H100s or H200s have.
PER_HOST, NETWORK = 8, 50e9
WEAK = "weak, "


@dataclass(frozen=True)
class Basis:
    """Of an evaluation, in milliseconds. samples: those that do not belong together. inside, outside: what a sample
    takes on one GPU in blocks and outside blocks. exchange: how long each of n GPUs would take for all queries, keys,
    values and results of a sample, as far as two GPUs did not hide it. sent: bytes of these. attention: share of the
    work in blocks that grows with the square of a video's length."""

    samples: int
    inside: float
    outside: float
    exchange: float
    sent: int
    attention: float

    def on(self, count: int, times: int = 1) -> float:
        """Milliseconds on `count` GPUs of one host, of a video that is `times` as long."""
        inside = self.inside * times * (1 - self.attention + self.attention * times)
        return pass_seconds(count, self.samples, inside, lambda tokens: self.exchange * times, self.outside * times)

    def on_hosts(self, count: int, hidden: float) -> float:
        """Milliseconds on `count` GPUs of hosts of `PER_HOST` each. hidden: share of the network's time that attention
        hides; what stays within a host counts as on one."""

        def exchange(tokens: int) -> float:
            # Of the tokens - 1 others, those on other hosts.
            away = max(0, tokens - PER_HOST) / (tokens - 1)
            return (1 - away) * self.exchange + away * (1 - hidden) * 1000 * self.sent / NETWORK

        return pass_seconds(count, self.samples, self.inside, exchange, self.outside)


def sent_and_attention(config: ModelConfig, work: Work, itemsize: int) -> tuple[int, float]:
    """Bytes that ranks exchange in one evaluation of a sample, and the share of its FLOPs that is attention."""
    rest = flops(config, replace(work, density=0.0))
    return exchanged_bytes(config, work, itemsize), 1 - rest / flops(config, work)


def chart(
    title: str, strong: Mapping[str, Basis], weak: Mapping[str, Basis], seen: Mapping[str, Sequence[Point]]
) -> Image.Image:
    """Strong scaling, as a speedup over one GPU, and weak scaling, as a share of the ideal speedup.

    strong, weak: by the name of a line. seen: measured (GPUs, times as fast) of a line in `strong`, and of a line in
    `weak` under its name with `WEAK` before it.
    """
    names = list(dict.fromkeys((*strong, *weak)))
    colors = dict(zip(names, COLORS, strict=False))
    lines: list[list[Line]] = []
    for bases, mark in ((strong, ""), (weak, WEAK)):
        lines.append([])
        for name, basis in bases.items():
            measured = [(1.0, 1.0), *seen.get(mark + name, ())]
            last = measured[-1]
            times = ((n, n if mark else 1) for n in COUNTS if n > last[0])
            later = [last, *((float(n), basis.on(1, grown) / basis.on(n, grown)) for n, grown in times)]
            for points, dash in ((measured, SOLID), (later, DASH)):
                if len(points) > 1:
                    shares = [(n, 100 * ratio / n if mark else ratio) for n, ratio in points]
                    lines[-1].append(Line(shares, colors[name], dash))
    most = float(COUNTS[-1])
    lines[0].append(Line([(1.0, 1.0), (most, most)], GRAY, SHORT))
    least = min((ratio for line in lines[1] for _, ratio in line.points), default=0.0)
    panels = [
        Panel("strong scaling: times as fast as one GPU, the same video", 280, even_axis(0.0, most), lines[0]),
        Panel("weak scaling: % of ideal, a video that grows with the GPUs", 160, even_axis(least, 100.0), lines[1]),
    ]
    x = Axis(1.0, most, [(float(count), str(count)) for count in COUNTS])
    legend = [(name, colors[name], SOLID) for name in names]
    legend += [("calculated", COLORS[0], DASH), ("ideal", GRAY, SHORT)]
    return line_chart(title, panels, x, "GPUs of one host", legend=legend)
