"""PSNR, SSIM and the noise floor: by hand, against another calculation, and as they are said and drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longcat_core.errors import LongCatError
from longcat_core.measure import charts, fidelity
from longcat_core.measure.fidelity import Fidelity, Setting, distance, picks, psnr, relative_error, tensor_psnr
from longcat_core.optimize import attention as backends
from longcat_core.optimize.attention import Inputs

HERE = Inputs(torch.device("cpu"), torch.float32, 32, False)


def video(seed: int = 0, frames: int = 9, height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth, with something in it."""
    rows, columns, time = np.mgrid[0:height, 0:width, 0:frames].astype(float)
    waves = [np.sin(rows / (3 + c) + seed) * np.cos(columns / 5 + c) + np.sin(time / 3 + c) for c in range(3)]
    return (120 + 50 * np.stack(waves, -1).transpose(2, 0, 1, 3)).round().astype(np.uint8)


def noisy(clean: np.ndarray, sigma: float, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.clip(clean + noise, 0, 255).round().astype(np.uint8)


def setting(name: str, frames: np.ndarray, reference: np.ndarray, given: int = 0, **values) -> Setting:
    shots = frames[picks(len(frames), given)]
    return Setting(name, distances=[distance(frames, reference, given)], shots=shots, **values)


def found(*others: Setting, reference: np.ndarray, floor: Setting | None, no_floor: str = "") -> Fidelity:
    chosen = picks(len(reference))
    first = Setting("A", shots=reference[chosen], seconds=[6.0], computed=[50], steps=50)
    return Fidelity(first, list(others), floor, no_floor, "Two videos on a machine", chosen)


def test_psnr_by_hand():
    clean = np.full((4, 16, 16, 3), 100, np.uint8)
    other = clean.copy()
    other[1] += 5
    other[2, :8] -= 10
    other[3, 0, 0, 0] = 255
    got = distance(other, clean)
    assert got.mse.tolist() == [0, 25, 50, 155**2 / (16 * 16 * 3)]
    assert [psnr(mse) for mse in got.mse[:3]] == [
        math.inf,
        pytest.approx(34.1514, abs=1e-4),
        pytest.approx(31.1411, abs=1e-4),
    ]
    assert setting("B", other, clean).psnr == pytest.approx(10 * math.log10(255**2 / got.mse.mean()))


def test_ssim_of_itself_is_one():
    for frames in (video(), np.zeros((2, 16, 16, 3), np.uint8), np.full((2, 16, 16, 3), 255, np.uint8)):
        assert (distance(frames, frames).ssim == 1).all()


def test_ssim_against_another_calculation():
    clean, other = video(), noisy(video(), 12)
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    boxes = np.lib.stride_tricks.sliding_window_view

    def means(values: np.ndarray) -> np.ndarray:
        return np.einsum("hwcij,ij->hwc", boxes(values, (11, 11), axis=(0, 1)), window)

    for index in (0, 8):
        x, y = (frames[index] / 255.0 for frames in (clean, other))
        mx, my = means(x), means(y)
        vx, vy, cov = means(x * x) - mx**2, means(y * y) - my**2, means(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
        assert 0.1 < expected < 0.95
        assert distance(other, clean).ssim[index] == pytest.approx(expected, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_ssim_on_a_gpu_is_that_of_the_cpu():
    clean = video()
    other = noisy(clean, 5)
    np.testing.assert_allclose(distance(other, clean, device=torch.device("cuda")).ssim, distance(other, clean).ssim)


def test_ssim_without_memory_on_the_gpu_is_computed_on_the_cpu(monkeypatch):
    """A network may have left no room; a comparison that took minutes must not end there."""
    clean = video()
    other = noisy(clean, 5)
    expected, to, asked = distance(other, clean), torch.Tensor.to, []

    def full(tensor, *args, **options):
        if any(getattr(one, "type", "") == "cuda" for one in args):
            asked.append(args)
            raise torch.OutOfMemoryError("out of memory")
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", full)
    got = distance(other, clean, device=torch.device("cuda"))
    assert len(asked) == 1 and (got.ssim == expected.ssim).all()


def test_given_frames_do_not_count():
    clean = video()
    other = noisy(clean, 5)
    other[:5] = 0
    part, whole = distance(other, clean, given=5), distance(other[5:], clean[5:])
    assert part.given == 5 and len(part.mse) == 4
    assert (part.mse == whole.mse).all() and (part.ssim == whole.ssim).all()


@pytest.mark.parametrize(
    "frames, given, said",
    [
        (video()[:5], 0, "differ in size"),
        (video().astype(np.float32), 0, "uint8"),
        (video()[..., 0], 0, "uint8"),
        (video(), 9, "leave none"),
    ],
)
def test_bad_videos(frames, given, said):
    with pytest.raises(LongCatError, match=said):
        distance(frames, video(), given)


def test_picks():
    assert picks(33) == [0, 11, 21, 32] and picks(33, 13) == [13, 19, 26, 32] and picks(1) == [0] and picks(2) == [0, 1]


def test_verdicts():
    clean = video()
    floor = setting("noise floor", noisy(clean, 2), clean, options="attention other")
    near, far, same = (
        setting(n, v, clean) for n, v in (("B", noisy(clean, 2, 7)), ("C", noisy(clean, 8)), ("D", clean))
    )
    made = found(near, far, same, reference=clean, floor=floor)
    assert [made.within(s) for s in (near, far, same)] == [True, False, True]
    assert f"B differs from A by {near.psnr:.1f} dB; two exact kernels differ by {floor.psnr:.1f} dB" in made.verdict(
        near
    )
    assert made.verdict(near).endswith("within the noise floor.") and "beyond" in made.verdict(far)
    assert made.verdict(same) == "D is identical to A, every pixel of every frame."
    # A little further than the one floor that was drawn, and clearly further.
    for further, within in ((2.9, True), (3.1, False)):
        apart = replace(floor.distances[0], mse=floor.mse[0] * 10 ** (further / 10))
        assert made.within(Setting("B", distances=[apart])) is within
    exact = setting("noise floor", clean, clean)
    assert "two exact kernels make identical frames: beyond" in found(far, reference=clean, floor=exact).verdict(far)
    none = found(far, same, reference=clean, floor=None, no_floor="only one kernel")
    assert none.within(far) is None and "not known: only one kernel" in none.verdict(far)
    assert "No noise floor: only one kernel" in fidelity.text(none) and none.within(same) is True


def test_text_is_a_table_of_the_video_in_the_middle_and_the_farthest():
    clean = video()
    other = setting(
        "B", noisy(clean, 3), clean, options="--some | thing", seconds=[3.0, 4.0], computed=[20, 25], steps=50
    )
    other.distances.append(distance(noisy(clean, 6), clean))
    made = found(other, reference=clean, floor=setting("noise floor", noisy(clean, 1), clean))
    other.distances.append(distance(clean, clean))
    every = np.concatenate([d.mse for d in other.distances])
    row = next(line for line in fidelity.text(made).splitlines() if line.startswith("| B:"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["B: --some / thing", "22.5 of 50", "3.00", "2.00"]
    each = [psnr(d.mse.mean()) for d in other.distances]
    assert cells[4:7] == [f"{each[0]:.1f}", f"identical, {each[1]:.1f}", f"{psnr(every.max()):.1f}"]
    assert each[0] > each[1] + 3 and cells[-1] == "no"
    assert f"by {each[0]:.1f} dB ({each[1]:.1f} dB in the farthest of 3 videos)" in made.verdict(other)
    plain = other.as_row()
    assert plain["psnr"] == other.psnr and np.shape(plain["frame_psnr"]) == (3, 9) and not plain["identical"]


def count(picture, color) -> int:
    return int((np.asarray(picture) == np.array(color)).all(-1).sum())


def test_plot_has_a_line_for_every_setting_and_the_floor():
    clean = video()
    others = [setting(n, noisy(clean, s), clean) for n, s in (("B", 3), ("C", 9))]
    made = found(
        *others, setting("D", clean, clean), reference=clean, floor=setting("noise floor", noisy(clean, 1), clean)
    )
    picture = charts.fidelity_plot(made)
    legend = 5 * 7 * 6
    for color in (*charts.COLORS[:3], charts.FLOOR_COLOR):
        assert count(picture, color) > legend + 300, color
    # Less noise lies higher.
    panel = np.asarray(picture)[80:480]
    heights = [np.argwhere((panel == np.array(c)).all(-1))[:, 0].mean() for c in charts.COLORS[:3]]
    assert heights[2] < heights[0] < heights[1]
    without = charts.fidelity_plot(found(*others, reference=clean, floor=None, no_floor="only one"))
    assert count(without, charts.FLOOR_COLOR) < count(picture, charts.FLOOR_COLOR) - 300


def test_segments_have_a_psnr_each_and_a_line_between_them():
    clean = video()
    other = noisy(clean, 4)
    other[6:] = noisy(clean, 12)[6:]
    one = setting("B", other, clean, given=2)
    made = replace(found(one, reference=clean, floor=None), joins=(6,))
    parts = [setting("B", other[part], clean[part]).psnr for part in (slice(2, 6), slice(6, None))]
    assert one.parts(made.joins) == pytest.approx(parts) and parts[0] > parts[1] + 5
    assert one.as_row(made.joins)["segment_psnr"] == one.parts(made.joins) and "segment_psnr" not in one.as_row()
    table = fidelity.table(made)
    assert "| of each segment |" in table and f"| {parts[0]:.1f}, {parts[1]:.1f} |" in table
    gray = [count(charts.fidelity_plot(each), charts.GRAY) for each in (replace(made, joins=()), made)]
    assert gray[1] > gray[0] + 500


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_plot_of_few_and_of_equal_frames(frames):
    clean = video(frames=frames)
    for other in (clean, noisy(clean, 4)):
        picture = charts.fidelity_plot(found(setting("B", other, clean), reference=clean, floor=None))
        assert count(picture, charts.COLORS[0]) > 140 + 8 * frames


def test_side_by_side_shows_the_frames_and_the_amplified_difference():
    clean = video(height=64, width=96)
    other = clean.copy()
    other[:, 10:20, 30:40] += 3
    made = found(setting("B", other, clean), reference=clean, floor=None)
    picture = np.asarray(charts.side_by_side(made))
    margin, label, gap = (getattr(charts, name) for name in ("MARGIN", "ROW_LABEL", "CELL_GAP"))
    step, right = 128 + label + gap, 2 * margin + 4 * (192 + gap)

    def cell(row: int, x: int, column: int) -> np.ndarray:
        top, left = margin + row * step + label, x + column * (192 + gap)
        return picture[top : top + 128 : 2, left : left + 192 : 2]

    for column, frame in enumerate(made.picks):
        assert (cell(0, margin, column) == clean[frame]).all() and (cell(1, margin, column) == other[frame]).all()
        apart = cell(1, right, column)
        assert (apart[10:20, 30:40] == 3 * 64).all() and apart.sum() == 3 * 64 * 300
    same = found(setting("B", clean, clean), reference=clean, floor=None)
    assert not np.asarray(charts.side_by_side(same))[margin + step + label :, right:][:100, :100].any()


def test_other_kernel_is_exact_and_rounds_otherwise(monkeypatch):
    assert fidelity.other_kernel("auto", HERE) == "sdpa-math" and fidelity.other_kernel("sdpa", HERE) == "sdpa-math"
    assert fidelity.other_kernel("sdpa-math", HERE) == "sdpa"
    with pytest.raises(LongCatError, match="sage, is lossy"):
        fidelity.other_kernel("sage", HERE)
    sdpa = backends.resolve("sdpa", HERE)

    def fails(*_):
        raise RuntimeError("no kernel image")

    twin, broken = replace(sdpa, name="twin"), replace(sdpa, name="broken", attend=fails)
    monkeypatch.setattr(backends, "BACKENDS", (broken, twin, sdpa))
    monkeypatch.setattr(backends, "resolve", lambda name, inputs: sdpa)
    with pytest.raises(LongCatError, match="no second exact attention kernel that rounds differently from sdpa"):
        fidelity.other_kernel("auto", HERE)


def test_errors_of_tensors():
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0 and relative_error(2 * a, a) == pytest.approx(1)
    other, expected = torch.tensor([0.0, 1.1]), torch.tensor([0.0, 1.0])
    assert tensor_psnr(other, expected) == pytest.approx(10 * 2.30103, rel=1e-4)
    assert tensor_psnr(a, a) == math.inf
