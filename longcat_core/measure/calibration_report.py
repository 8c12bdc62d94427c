"""What a calibration found, in a few lines of text and on a page: how uneven attention is, and how sparse it may be."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..generate.calibration import Calibration
from ..sampling.conditioning import latent_frames
from .charts import BLUE, COLORS, DASH, FAINT, GRAY, GREEN, ORANGE, Axis, Line, Panel, even_axis, line_chart, log_axis
from .fidelity import decibels
from .results import machine_line, markdown

if TYPE_CHECKING:
    from PIL import Image

# The density at which `Calibration.mass` is given, as near as the ladder has it.
MASS_AT = 0.15
NO_FLOOR = "none: this machine has no second exact attention kernel"
TITLE = "# How sparse attention may be"
LAYERS, CURVE = "layers.png", "curve.png"
HEADS_COLOR = (176, 199, 228)
ABOUT = """\
Sparse attention computes a share of the blocks of 64 keys exactly, the density, and counts each other block as one key
and one value. Videos were sampled densely, and in some of their steps every layer and head was measured. The heads get
the densities of the lowest mean that keeps the budget: the error of the layers' attention, as a share of its output."""


# --- text ------------------------------------------------------------------------------------------------------------


def text(found: Calibration) -> str:
    """What was found, in a few lines."""
    lines = [
        f"mean density {found.density:.3f}: {_steps(found)}; {_dense_layers(found)}",
        *_softmax(found),
        f"expected: all steps {found.expected_speed_up:.2f} times as fast",
        *_video(found),
    ]
    return "\n".join(lines)


def _means(found: Calibration) -> list[list[float]]:
    """Mean densities of the heads, [ranges][layers]."""
    return [[statistics.fmean(heads) for heads in layers] for layers in found.densities]


def _ranges(found: Calibration) -> list[str]:
    """The ranges in words."""
    ends = itertools.pairwise((found.settings.dense_steps, *found.ends))
    return [f"from {start:.0%} to {end:.0%} of the steps" for start, end in ends]


def _steps(found: Calibration) -> str:
    means = map(statistics.fmean, _means(found))
    return ", ".join(f"{mean:.3f} {words}" for mean, words in zip(means, _ranges(found), strict=True))


def _dense_layers(found: Calibration) -> str:
    dense = sum(all(density == 1 for density in row) for layers in found.densities for row in layers)
    return f"{dense} of {len(found.ends) * found.model.depth} layers stay dense"


def _density_of_mass(found: Calibration) -> float:
    return min((point.density for point in found.curve), key=lambda density: abs(density - MASS_AT))


def _even(found: Calibration, density: float | None = None) -> float:
    """What attention that is alike for all keys would hold in the blocks that are taken, those of given frames too.
    density: default: that of `Calibration.mass`."""
    there, share = found.settings, _density_of_mass(found) if density is None else density
    given = latent_frames(there.given) / latent_frames(there.frames) if there.given else 0.0
    return given + (1 - given) * share


def _softmax(found: Calibration) -> Iterator[str]:
    """How uneven attention is: what the blocks that are taken hold of the softmax, by layer and head."""
    at = _density_of_mass(found)
    said = f"softmax in the blocks taken at density {at:g}: {statistics.fmean(found.mass):.0%}"
    if found.best_mass:
        said += f" (in the best blocks {statistics.fmean(itertools.chain(*found.best_mass)):.0%})"
    yield f"{said}, where even attention has {_even(found):.0%}; by layer {_percents(found.mass)}"
    if found.head_mass:
        named = [
            (share, f"layer {layer}, head {head}")
            for layer, row in enumerate(found.head_mass)
            for head, share in enumerate(row)
        ]
        (low, least), (high, most) = min(named), max(named)
        yield f"of single heads {low:.0%} ({least}) to {high:.0%} ({most})"


def _percents(shares: Sequence[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _video(found: Calibration) -> Iterator[str]:
    if (video := found.video) is None:
        return
    floor = f"noise floor: {video.floor}"
    if video.floor != NO_FLOOR:
        floor = f"noise floor: {_decibels(video.floor_psnr)} ({video.floor})"
    yield (
        f"a whole video against the exact one: {_decibels(video.psnr)}, {floor}; {video.speed_up:.2f} times as "
        f"fast, steps of {video.sparse_s:.3g} s instead of {video.dense_s:.3g} s"
    )


def _decibels(value: float | None) -> str:
    return decibels(math.inf if value is None else value)


# --- page ------------------------------------------------------------------------------------------------------------


def page(found: Calibration, name: str, written: str, prefix: str = "") -> str:
    """Markdown with the pictures `LAYERS` and `CURVE`. name: of the calibration; written: when and by which command, as
    `results.written` says it; prefix: of the pictures' names."""
    there, at = found.settings, _density_of_mass(found)
    lora = f", LoRA {', '.join(there.lora)}" if there.lora else ""
    parts = (
        TITLE,
        ABOUT,
        written,
        f"It wrote {name}: {_what(found)}; guidance {there.guidance:g}, query blocks of {there.query_block}{lora}.",
        "\n".join(f"- {line}" for line in text(found).splitlines()),
        f"![The softmax and the densities of each layer]({prefix}{LAYERS})",
        table(found),
        f"Held: share of the softmax in the blocks that are taken at density {at:g}, mean of the heads, in per cent; "
        f"even attention has {_even(found):.0%} there. Blocks are chosen by the means of queries and keys. Best: in "
        "the blocks that hold the most. Densities are means of the heads, from the share of the steps in the head on.",
        f"![Error and softmax by density]({prefix}{CURVE})",
    )
    return "\n\n".join(parts) + "\n"


def table(found: Calibration) -> str:
    """Markdown: a row for each layer."""
    head, columns = ["layer", "held (%)"], [_hundreds(found.mass)]
    if found.head_mass:
        head += ["lowest head", "highest head"]
        columns += [_hundreds(map(min, found.head_mass)), _hundreds(map(max, found.head_mass))]
    if found.best_mass:
        head, columns = [*head, "best"], [*columns, _hundreds(map(statistics.fmean, found.best_mass))]
    starts = (found.settings.dense_steps, *found.ends)
    head += [f"density, {start:.0%}" for start in starts[:-1]]
    columns += [[f"{mean:.3f}" for mean in layers] for layers in _means(found)]
    return markdown(head, [list(map(str, row)) for row in zip(itertools.count(), *columns, strict=False)])


def _hundreds(shares: Any) -> list[str]:
    return [f"{100 * share:.0f}" for share in shares]


def pictures(found: Calibration) -> dict[str, Image.Image]:
    """By name, the pictures of `page`."""
    return {LAYERS: layers_chart(found), CURVE: curve_chart(found)}


def layers_chart(found: Calibration) -> Image.Image:
    """Layer by layer, what the blocks that are taken hold of the softmax, and the densities of each range of steps."""
    depth, at = found.model.depth, _density_of_mass(found)
    every, ends = range(depth), (0, depth - 1)
    # A point alone is a dot.
    heads = [Line([(layer, share)], HEADS_COLOR) for layer, row in enumerate(found.head_mass) for share in row]
    lines = [*heads, Line([(end, _even(found)) for end in ends], FAINT, DASH), Line(list(enumerate(found.mass)), BLUE)]
    legend = [(f"held by the blocks taken at density {at:g}, mean of the heads", BLUE, 0)]
    legend += [("single heads", HEADS_COLOR, 0)] if heads else []
    if found.best_mass:
        lines.append(Line(list(enumerate(map(statistics.fmean, found.best_mass))), GREEN))
        legend.append(("held by the best blocks, as many", GREEN, 0))
    legend.append(("even attention", FAINT, DASH))
    colors = list(zip(_ranges(found), COLORS[3:], strict=False))
    densities = [Line(list(enumerate(means)), color) for means, (_, color) in zip(_means(found), colors, strict=False)]
    step = max(1, math.ceil(depth / 16))
    top = max(mean for means in _means(found) for mean in means)
    return line_chart(
        "Layer by layer",
        (
            Panel("share of the softmax", 300, even_axis(0.0, 1.0, 5), lines),
            Panel("mean density of the heads", 220, even_axis(0.0, top, 5), densities),
        ),
        Axis(*ends, [(layer, str(layer)) for layer in every[::step]]),
        "layer",
        [_what(found)],
        [*legend, *((f"density {words}", color, 0) for words, color in colors)],
    )


def curve_chart(found: Calibration) -> Image.Image:
    """The error of the layers and what is held of the softmax, by density."""
    points, budget = found.curve, found.settings.budget
    places = [math.log10(100 * point.density) for point in points]
    ends = places[0], places[-1]

    def line(values: Iterator[float], color: tuple[int, int, int], dash: int = 0) -> Line:
        return Line(list(zip(places, values, strict=True)), color, dash)

    most = max(*(point.high for point in points), budget)
    errors = [
        Line([(end, budget) for end in ends], FAINT, DASH),
        line((point.high for point in points), ORANGE),
        line((point.median for point in points), BLUE),
    ]
    masses = [
        line((_even(found, point.density) for point in points), GRAY, DASH),
        line((point.mass for point in points), GREEN),
    ]
    ticks = log_axis([100 * point.density for point in points]).ticks
    shown = [(place, words) for place, words in ticks if ends[0] <= place + 1e-9 and place <= ends[1] + 1e-9]
    return line_chart(
        "By density",
        (
            Panel("error of a layer's attention, as a share of its output", 300, even_axis(0.0, most, 5), errors),
            Panel("share of the softmax in the blocks that are taken", 220, even_axis(0.0, 1.0, 5), masses),
        ),
        Axis(*ends, shown),
        "density (%), logarithmic",
        [_what(found)],
        [
            ("nine of ten layers are below, all heads at this density", ORANGE, 0),
            ("median layer", BLUE, 0),
            (f"budget {budget:g}", FAINT, DASH),
            ("softmax, mean of the heads", GREEN, 0),
            ("softmax of even attention", GRAY, DASH),
        ],
    )


def _what(found: Calibration) -> str:
    """What was measured, in words."""
    there, count = found.settings, len(found.prompts)
    prompts = "" if not count else "one prompt, " if count == 1 else f"{count} prompts, "
    return (
        f"budget {there.budget:g}; {found.model.depth} layers of {found.model.heads} heads; {prompts}{there.frames} "
        f"frames of {there.height}x{there.width}, {there.steps} steps; {machine_line(found.machine)}"
    )
