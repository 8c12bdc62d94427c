"""What a setting costs in fidelity: its video against another setting's at the same seed, frame by frame.

Scores of single videos do not tell: a video that is another one altogether scores as well. So two videos are held
against each other, and what that distance means is told by a third: the reference's own settings with another exact
attention kernel. Both kernels are right and differ in rounding alone; what lies no further from the reference than the
two lie apart is within the noise floor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..optimize import attention as backends
from ..optimize.attention import Inputs
from .results import machine, markdown, shown

PEAK = 255.0
# Of SSIM, as published (Wang et al. 2004): a Gaussian window of 11 pixels, sigma 1.5, where it fits into the frame.
WINDOW = 11
# Frames at a time.
CHUNK = 8
# One run of another kernel is one draw of the noise. As far again, in square error, still counts as within it.
MARGIN_DB = 3.0
REFERENCE, FLOOR = "A", "noise floor"
# Tokens, heads of what two kernels are tried on.
PROBE = (1, 512, 2)


@dataclass(frozen=True)
class Distance:
    """Of one video from another, frame by frame. mse: mean square error in squared levels of 0..255, ssim: in -1..1,
    both [F] fp64, of generated frames only; given: how many given frames stand before them."""

    mse: np.ndarray
    ssim: np.ndarray
    given: int = 0


def distance(video: np.ndarray, reference: np.ndarray, given: int = 0) -> Distance:
    """Videos uint8 [F, H, W, 3] of one shape, whose first `given` frames are not compared.

    Errors over R, G and B alike; SSIM is the mean over the three. Raises LongCatError for videos that do not fit each
    other or are too small for SSIM, and without the package kornia.
    """
    for frames in (video, reference):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise LongCatError(f"frames are {frames.dtype} {list(frames.shape)}; compare uint8 [F, H, W, 3]")
    if video.shape != reference.shape:
        raise LongCatError(f"videos of {list(video.shape)} and {list(reference.shape)} differ in size; use one")
    if min(video.shape[1:3]) < WINDOW:
        raise LongCatError(f"frames of {video.shape[1]}x{video.shape[2]} are too small for SSIM, it takes {WINDOW}")
    if not 0 <= given < len(video):
        raise LongCatError(f"{given} given of {len(video)} frames leave none to compare")
    mse, ssim = [], []
    for start in range(given, len(video), CHUNK):
        one, other = (frames[start : start + CHUNK].astype(np.float32) for frames in (video, reference))
        mse.append(np.square(one - other).mean(axis=(1, 2, 3), dtype=np.float64))
        ssim.append(_ssim(*(torch.from_numpy(frames).movedim(3, 1) / PEAK for frames in (one, other))))
    return Distance(np.concatenate(mse), np.concatenate(ssim), given)


def _ssim(one: Tensor, other: Tensor) -> np.ndarray:
    """Of frames [F, 3, H, W] in 0..1, one number each."""
    try:
        from kornia.metrics import ssim
    except ImportError as error:
        raise LongCatError("SSIM needs the package kornia; run: pip install 'longcat-video[headless]'") from error
    # In fp64: flat regions are differences of nearly equal numbers. Without eps, which takes 1e-5 from equal frames.
    one, other = one.double().contiguous(), other.double().contiguous()
    return ssim(one, other, WINDOW, max_val=1.0, eps=0.0, padding="valid").mean(dim=(1, 2, 3)).numpy()


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean square error in levels of 0..255; infinite for equal frames."""
    return 10 * math.log10(PEAK**2 / mse) if mse > 0 else math.inf


@dataclass
class Setting:
    """One setting and what was measured of it. options: in words, what it has that the reference has not.

    distances: of each video from the reference's, none for the reference; seconds: of each sampling; first_s: of a
    first step, with whatever compiles; computed: evaluated steps of each sampling, of `steps`; shots: some frames of
    the first video, uint8 [n, H, W, 3].
    """

    name: str
    options: str = ""
    distances: list[Distance] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_s: float | None = None
    computed: list[int] = field(default_factory=list)
    steps: int = 0
    shots: np.ndarray | None = None

    @property
    def title(self) -> str:
        return f"{self.name}: {self.options}" if self.options else self.name

    @property
    def mse(self) -> np.ndarray:
        """[videos, F]."""
        return np.stack([distance.mse for distance in self.distances])

    @property
    def ssim(self) -> np.ndarray:
        """[videos, F]."""
        return np.stack([distance.ssim for distance in self.distances])

    @property
    def identical(self) -> bool:
        return not self.mse.any()

    @property
    def psnr(self) -> float:
        """Of the video in the middle. Sampling may part ways in a single video, which would then be all of a mean."""
        return statistics.median_low(self.videos)

    @property
    def typical_ssim(self) -> float:
        """Of the video in the middle."""
        return statistics.median_low(self.ssim.mean(axis=1).tolist())

    @property
    def videos(self) -> list[float]:
        """PSNR of every video by itself."""
        return [psnr(mse) for mse in self.mse.mean(axis=1)]

    @property
    def time(self) -> float | None:
        """Of the fastest video: what else a machine does only adds to it."""
        return min(self.seconds, default=None)

    @property
    def evaluations(self) -> float | None:
        return sum(self.computed) / len(self.computed) if self.computed else None

    def as_row(self) -> dict[str, Any]:
        """Plain values; what is infinite in dB is said by `identical`."""
        row = {"name": self.name, "options": self.options, "seconds": self.seconds, "first_s": self.first_s}
        row |= {"computed": self.computed, "steps": self.steps}
        if self.distances:
            row |= {"identical": self.identical, "psnr": self.psnr, "worst_psnr": psnr(self.mse.max())}
            row |= {"ssim": self.typical_ssim, "worst_ssim": float(self.ssim.min())}
            row |= {"video_psnr": self.videos}
            row |= {"frame_psnr": [[psnr(frame) for frame in video] for video in self.mse.tolist()]}
            row |= {"frame_ssim": self.ssim.tolist(), "first_frame": self.distances[0].given}
        return row


@dataclass
class Fidelity:
    """A reference, the settings held against it, and the noise floor: the reference with another exact kernel, or None
    and why there is none. what: videos, machine, date in a sentence; picks: indices of the frames in `Setting.shots`;
    timed: what `Setting.seconds` are seconds of."""

    reference: Setting
    others: list[Setting]
    floor: Setting | None
    no_floor: str
    what: str
    picks: Sequence[int]
    timed: str = "sampling"

    @property
    def compared(self) -> list[Setting]:
        """All that have distances, the floor last."""
        return [*self.others, *([] if self.floor is None else [self.floor])]

    def within(self, setting: Setting) -> bool | None:
        """Whether a setting is within the noise floor; None where there is no floor to tell it by."""
        if setting.identical:
            return True
        return None if self.floor is None else setting.psnr >= self.floor.psnr - MARGIN_DB

    def verdict(self, setting: Setting) -> str:
        """One sentence: how far the setting lies from the reference, and how that stands to the noise floor."""
        if setting.identical:
            return f"{setting.name} is identical to {self.reference.name}, every pixel of every frame."
        said = f"{setting.name} differs from {self.reference.name} by {decibels(setting.psnr)}"
        if len(setting.videos) > 1:
            said += f" ({decibels(min(setting.videos))} in the farthest of {len(setting.videos)} videos)"
        if self.floor is None:
            return f"{said}; what of that is noise is not known: {self.no_floor}."
        apart = "make identical frames" if self.floor.identical else f"differ by {decibels(self.floor.psnr)}"
        place = "within" if self.within(setting) else "beyond"
        return f"{said}; two exact kernels {apart}: {place} the noise floor."

    def faster(self, setting: Setting) -> float | None:
        """How many times as fast as the reference."""
        return self.reference.time / setting.time if self.reference.time and setting.time else None


def described(
    count: int, size: Sequence[int], steps: int, guidance: float, device: torch.device, dtype: torch.dtype
) -> str:
    """What was compared, and where, in a sentence. size: frames, height and width of each of `count` videos."""
    here = machine(device)
    frames, height, width = size
    where = here.get("gpu") or f"{here['cpu']}, {here['cores']} cores"
    return (
        f"{'One video' if count == 1 else f'{count} videos'} of {frames} frames of {height}x{width}, {steps} steps, "
        f"guidance {guidance:g}; {where}, PyTorch {here['torch']}, {str(dtype).removeprefix('torch.')}"
    )


def decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def picks(frames: int, given: int = 0, count: int = 4) -> list[int]:
    """Evenly spaced generated frames, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(given, frames - 1, min(count, frames - given)).tolist()})


def letters() -> Iterator[str]:
    """Names of the settings after the reference: B, C, ..., Z, S26, S27, ..."""
    yield from (chr(code) for code in range(ord("B"), ord("Z") + 1))
    number = 26
    while True:
        yield f"S{number}"
        number += 1


# --- the noise floor's kernel ----------------------------------------------------------------------------------------


def other_kernel(name: str, inputs: Inputs) -> str:
    """An exact attention backend that rounds otherwise than the backend `name` (or `auto`) does on such inputs.

    The fastest that is there. Raises LongCatError where there is none, or `name` itself is lossy; the sentence is
    fit for a report.
    """
    if not backends.is_exact(name):
        raise LongCatError(f"the reference's own attention, {name}, is lossy; give the reference an exact one")
    own = backends.resolve(name, inputs)
    out = _probe(own.attend, inputs)
    for backend in backends.BACKENDS:
        if not backend.exact or backend is own or backend.missing() or backend.refuses(inputs):
            continue
        try:
            differs = not torch.equal(_probe(backend.attend, inputs), out)
        except Exception:  # a kernel that this machine has and cannot run is no other kernel
            continue
        if differs:
            return backend.name
    raise LongCatError(f"this machine has no second exact attention kernel that rounds otherwise than {own.name}")


def _probe(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*PROBE, inputs.head_dim, generator=generator) for _ in range(3))
    with torch.no_grad():
        return attend(*(part.to(inputs.device, inputs.dtype) for part in (q, k, v)))


# --- as text ---------------------------------------------------------------------------------------------------------


def table(fidelity: Fidelity) -> str:
    """Markdown, a row a setting, the floor last; a column where anything is known of it."""
    columns: tuple[tuple[str, Callable[[Setting], Any]], ...] = (
        ("steps computed", lambda s: _of(s.evaluations, s.steps)),
        (f"{fidelity.timed} (s)", lambda s: s.time),
        ("times as fast", fidelity.faster),
        ("first step (s)", lambda s: s.first_s),
        ("PSNR (dB)", lambda s: _if(s, lambda: _number(s.psnr))),
        ("nearest and farthest video", lambda s: _if(s, lambda: _range(s.videos))),
        ("worst frame", lambda s: _if(s, lambda: _number(psnr(s.mse.max())))),
        ("SSIM", lambda s: _if(s, lambda: f"{s.typical_ssim:.4f}")),
        ("worst frame", lambda s: _if(s, lambda: f"{s.ssim.min():.4f}")),
        ("within the noise floor", lambda s: _if(s, lambda: None if s is fidelity.floor else fidelity.within(s))),
    )
    settings = [fidelity.reference, *fidelity.compared]
    cells = [(name, [value(setting) for setting in settings]) for name, value in columns]
    cells = [(name, values) for name, values in cells if any(value is not None for value in values)]
    rows = [(setting.title, *(values[i] for _, values in cells)) for i, setting in enumerate(settings)]
    return markdown(("", *(name for name, _ in cells)), rows)


def _if(setting: Setting, value: Callable[[], Any]) -> Any:
    return value() if setting.distances else None


def _of(computed: float | None, steps: int) -> str | None:
    return None if computed is None else f"{shown(computed, 1).removesuffix('.0')} of {steps}"


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "identical"


def _range(videos: Sequence[float]) -> str | None:
    return f"{_number(max(videos))}, {_number(min(videos))}" if len(videos) > 1 else None


def text(fidelity: Fidelity) -> str:
    """The report: what was compared, the verdicts, the table, and what its figures are."""
    verdicts = "\n".join(f"- {fidelity.verdict(setting)}" for setting in fidelity.others)
    return "\n\n".join((fidelity.what, verdicts, table(fidelity), _legend(fidelity)))


def _legend(fidelity: Fidelity) -> str:
    given = fidelity.compared[0].distances[0].given if fidelity.compared else 0
    frames = f"generated frames only, from frame {given} on" if given else "all frames"
    several = bool(fidelity.compared) and len(fidelity.compared[0].distances) > 1
    middle = "of the video in the middle, " if several else ""
    legend = (
        f"PSNR (peak 255, of the mean square error of R, G and B over the frames of a video) and SSIM (Gaussian window "
        f"of {WINDOW} pixels, mean over the frames), {middle}against {fidelity.reference.name} at the same seed, "
        f"{frames}; the higher, the nearer."
    )
    if fidelity.floor is None:
        return f"{legend} There is no noise floor: {fidelity.no_floor}."
    return (
        f"{legend} Noise floor: {fidelity.reference.name} once more with {fidelity.floor.options}; both kernels are "
        f"exact and differ in rounding alone. Within it is what lies at most {MARGIN_DB:g} dB further off."
    )
