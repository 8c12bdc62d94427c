"""How far a setting moves the video: frame-by-frame distance from a reference at the same seed, and the noise floor.

Quality scores of single videos cannot show this: an entirely different video may score as well. So each video is
compared with the reference's. A third run, the reference's settings with another exact attention kernel, gives the
scale: both kernels are right and differ only in rounding, so a distance no larger than theirs is noise.
"""

from __future__ import annotations

import itertools
import math
import statistics
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LongCatError
from ..optimize import attention as backends
from ..optimize.attention import Inputs
from .clock import is_out_of_memory
from .results import machine, machine_line, markdown, shown

PEAK = 255.0
# SSIM as published (Wang et al. 2004): a Gaussian window of 11 pixels, sigma 1.5, only where it fits into the frame.
WINDOW = 11
# Frames compared at a time.
CHUNK = 8
CPU = torch.device("cpu")
# One run of another kernel is one sample of the noise; twice its square error still counts as noise.
MARGIN_DB = 3.0
REFERENCE, FLOOR = "A", "noise floor"
# Batch, tokens and heads of the input on which kernels are compared.
PROBE = (1, 512, 2)


@dataclass(frozen=True)
class Distance:
    """Distance of one video from another, frame by frame. mse: mean square error in squared levels of 0..255, ssim: in
    -1..1, both [F] fp64, of generated frames only; given: how many conditioning frames come before them."""

    mse: np.ndarray
    ssim: np.ndarray
    given: int = 0


def distance(video: np.ndarray, reference: np.ndarray, given: int = 0, device: torch.device = CPU) -> Distance:
    """Compare videos, uint8 [F, H, W, 3] of one shape, except their first `given` frames.

    The error is the mean over R, G and B, and so is SSIM. device: where SSIM is computed if it is a CUDA one with
    memory for it; else on the CPU, where 61 frames of 192x320 take seconds. Raises LongCatError for videos of different
    shapes or too small for SSIM, and if the package kornia is missing.
    """
    for frames in (video, reference):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise LongCatError(f"frames are {frames.dtype} {list(frames.shape)}; compare uint8 [F, H, W, 3]")
    if video.shape != reference.shape:
        raise LongCatError(f"videos of {list(video.shape)} and {list(reference.shape)} differ in size; use one")
    if min(video.shape[1:3]) < WINDOW:
        raise LongCatError(f"frames of {video.shape[1]}x{video.shape[2]} are too small for SSIM, it takes {WINDOW}")
    if not 0 <= given < len(video):
        raise LongCatError(f"{given} conditioning frames of {len(video)} leave none to compare")
    mse, ssim = [], []
    for start in range(given, len(video), CHUNK):
        one, other = (frames[start : start + CHUNK].astype(np.float32) for frames in (video, reference))
        mse.append(np.square(one - other).mean(axis=(1, 2, 3), dtype=np.float64))
        pictures = [torch.from_numpy(frames).movedim(3, 1) / PEAK for frames in (one, other)]
        try:
            # fp64, which other accelerators lack.
            found = _ssim(*(part.to(device if device.type == "cuda" else CPU) for part in pictures))
        except (MemoryError, RuntimeError) as error:
            if device.type == "cpu" or not is_out_of_memory(error):
                raise
            device = CPU
            found = _ssim(*pictures)
        ssim.append(found)
    return Distance(np.concatenate(mse), np.concatenate(ssim), given)


def _ssim(one: Tensor, other: Tensor) -> np.ndarray:
    """SSIM [F] of frames [F, 3, H, W] in 0..1."""
    try:
        from kornia.metrics import ssim
    except ImportError as error:
        raise LongCatError("SSIM needs the package kornia; run: pip install 'longcat-video[headless]'") from error
    # fp64, since flat regions subtract nearly equal numbers; eps=0, since eps takes 1e-5 from identical frames.
    one, other = one.double().contiguous(), other.double().contiguous()
    return ssim(one, other, WINDOW, max_val=1.0, eps=0.0, padding="valid").mean(dim=(1, 2, 3)).cpu().numpy()


def psnr(mse: float, peak: float = PEAK) -> float:
    """Peak signal-to-noise ratio in dB of a mean square error; infinite for identical frames."""
    return 10 * math.log10(peak**2 / mse) if mse > 0 else math.inf


def tensor_psnr(given: Tensor, expected: Tensor) -> float:
    """PSNR in dB of a tensor such as latents; the peak is the range of `expected`."""
    given, expected = given.float(), expected.float()
    return psnr((given - expected).square().mean().item(), (expected.max() - expected.min()).item())


def relative_error(given: Tensor, expected: Tensor) -> float:
    """|given - expected| / |expected|, of tensors of one shape, in fp32."""
    given, expected = given.float(), expected.float()
    return ((given - expected).norm() / expected.norm()).item()


@dataclass
class Setting:
    """One setting and its measurements. options: how it differs from the reference, in words.

    distances: one for each video, empty for the reference; seconds: of each sampling; first_s: of a first step,
    compilation included; computed: work of each sampling in whole steps, of all blocks and both halves of guidance,
    out of `steps`; shots: some frames of the first video, uint8 [n, H, W, 3].
    """

    name: str
    options: str = ""
    distances: list[Distance] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_s: float | None = None
    computed: list[float] = field(default_factory=list)
    steps: int = 0
    shots: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))

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
    def videos(self) -> list[float]:
        """PSNR of every video."""
        return [psnr(mse) for mse in self.mse.mean(axis=1)]

    @property
    def psnr(self) -> float:
        """The median over the videos: a single video that diverged would dominate a mean."""
        return statistics.median_low(self.videos)

    @property
    def typical_ssim(self) -> float:
        """The median over the videos."""
        return statistics.median_low(self.ssim.mean(axis=1).tolist())

    @property
    def time(self) -> float | None:
        """Seconds of the fastest video: other work on the machine only adds to it."""
        return min(self.seconds, default=None)

    def parts(self, joins: Sequence[int]) -> list[float]:
        """PSNR of every segment, each the median over the videos. joins: frames at which later segments begin."""
        given = self.distances[0].given
        segments = np.split(self.mse, [join - given for join in joins], axis=1)
        return [statistics.median_low(map(psnr, segment.mean(axis=1).tolist())) for segment in segments]

    def as_row(self, joins: Sequence[int] = ()) -> dict[str, Any]:
        """Values for JSON; `identical` stands for an infinite PSNR. joins: those of `Fidelity`."""
        row = {name: getattr(self, name) for name in ("name", "options", "seconds", "first_s", "computed", "steps")}
        if self.distances:
            row |= {"identical": self.identical, "psnr": self.psnr, "worst_psnr": psnr(self.mse.max())}
            row |= {"ssim": self.typical_ssim, "worst_ssim": float(self.ssim.min()), "video_psnr": self.videos}
            row |= {"frame_psnr": [[psnr(frame) for frame in video] for video in self.mse.tolist()]}
            row |= {"frame_ssim": self.ssim.tolist(), "first_frame": self.distances[0].given}
            row |= {"segment_psnr": self.parts(joins)} if joins else {}
        return row


@dataclass
class Fidelity:
    """A reference, the settings compared with it, and the noise floor: the reference with another exact kernel, or
    None, with the reason in no_floor. what: videos and machine in a sentence; picks: indices of the frames in
    `Setting.shots`; timed: what `Setting.seconds` measures; joins: frames at which later segments begin."""

    reference: Setting
    others: list[Setting]
    floor: Setting | None
    no_floor: str
    what: str
    picks: Sequence[int]
    timed: str = "sampling"
    joins: Sequence[int] = ()

    @property
    def compared(self) -> list[Setting]:
        """All settings that have distances, the floor last."""
        return [*self.others, *([] if self.floor is None else [self.floor])]

    def within(self, setting: Setting) -> bool | None:
        """Whether a setting is within the noise floor; None if there is no floor."""
        if setting.identical:
            return True
        return None if self.floor is None else setting.psnr >= self.floor.psnr - MARGIN_DB

    def verdict(self, setting: Setting) -> str:
        """One sentence: the distance from the reference, and whether that is noise."""
        if setting.identical:
            return f"{setting.name} is identical to {self.reference.name}, every pixel of every frame."
        said = f"{setting.name} differs from {self.reference.name} by {decibels(setting.psnr)}"
        if len(setting.videos) > 1:
            said += f" ({decibels(min(setting.videos))} in the farthest of {len(setting.videos)} videos)"
        if self.floor is None:
            return f"{said}; how much of that is noise is not known: {self.no_floor}."
        apart = "make identical frames" if self.floor.identical else f"differ by {decibels(self.floor.psnr)}"
        place = "within" if self.within(setting) else "beyond"
        return f"{said}; two exact kernels {apart}: {place} the noise floor."

    def faster(self, setting: Setting) -> float | None:
        """How many times as fast as the reference."""
        return self.reference.time / setting.time if self.reference.time and setting.time else None


def described(
    count: int,
    size: Sequence[int],
    steps: int,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
    audio_guidance: float | None = None,
    segments: int = 1,
) -> str:
    """What was compared, and on which machine, in a sentence. size: frames, height and width of each video.
    audio_guidance: of an avatar; steps: of each of its segments."""
    frames, height, width = size
    parts = f"{steps} steps" if segments == 1 else f"{segments} segments of {steps} steps"
    scale = f"{guidance:g}" if audio_guidance is None else f"{guidance:g} by text and {audio_guidance:g} by sound"
    return (
        f"{'One video' if count == 1 else f'{count} videos'} of {frames} frames of {height}x{width}, {parts}, "
        f"guidance {scale}; {machine_line(machine(device))}, {str(dtype).removeprefix('torch.')}"
    )


def decibels(value: float, unit: str = " dB") -> str:
    return f"{value:.1f}{unit}" if math.isfinite(value) else "identical"


def picks(frames: int, given: int = 0, count: int = 4) -> list[int]:
    """Evenly spaced generated frames, including the first and the last."""
    return sorted({round(i) for i in np.linspace(given, frames - 1, min(count, frames - given)).tolist()})


def letters() -> Iterator[str]:
    """Names of the settings after the reference: B, C, ..., Z, S26, S27, ..."""
    yield from string.ascii_uppercase[1:]
    yield from (f"S{number}" for number in itertools.count(26))


# --- the noise floor's kernel ----------------------------------------------------------------------------------------


def other_kernel(name: str, inputs: Inputs) -> str:
    """The fastest exact attention backend that rounds differently from the backend `name` (or `auto`) on such inputs.

    Raises LongCatError, with a sentence fit for a report, if there is none or if `name` is lossy.
    """
    if not backends.is_exact(name):
        raise LongCatError(f"the reference's own attention, {name}, is lossy; give the reference an exact one")
    own = backends.resolve(name, inputs)
    out = _probe(own.attend, inputs)
    for backend in backends.BACKENDS:
        if not backend.exact or backend is own or backend.needs.why_not(inputs):
            continue
        try:
            differs = not torch.equal(_probe(backend.attend, inputs), out)
        except Exception:  # a kernel that is installed and cannot run does not count
            continue
        if differs:
            return backend.name
    raise LongCatError(f"this machine has no second exact attention kernel that rounds differently from {own.name}")


def _probe(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*PROBE, inputs.head_dim, generator=generator) for _ in range(3))
    with torch.no_grad():
        return attend(*(part.to(inputs.device, inputs.dtype) for part in (q, k, v)))


# --- as text ---------------------------------------------------------------------------------------------------------


def table(fidelity: Fidelity) -> str:
    """Markdown: one row for each setting, the floor last; columns without any value are left out."""
    head = ["steps computed", f"{fidelity.timed} (s)", "times as fast", "first step (s)", "PSNR (dB)"]
    head += ["of each segment", "nearest and farthest video", "worst frame", "SSIM", "worst frame"]
    head += ["within the noise floor"]

    def cells(s: Setting) -> list[Any]:
        mean = shown(statistics.fmean(s.computed), 1).removesuffix(".0") if s.computed else ""
        own = [f"{mean} of {s.steps}" if mean else None, s.time, fidelity.faster(s), s.first_s]
        if not s.distances:
            return own + [None] * 7
        parts = ", ".join(decibels(part, "") for part in s.parts(fidelity.joins)) if fidelity.joins else None
        several = len(s.videos) > 1
        ends = f"{decibels(max(s.videos), '')}, {decibels(min(s.videos), '')}" if several else None
        worst, within = decibels(psnr(s.mse.max()), ""), None if s is fidelity.floor else fidelity.within(s)
        return [*own, decibels(s.psnr, ""), parts, ends, worst, f"{s.typical_ssim:.4f}", f"{s.ssim.min():.4f}", within]

    settings = [fidelity.reference, *fidelity.compared]
    columns = zip(head, *map(cells, settings), strict=True)
    used = [column for column in columns if any(value is not None for value in column[1:])]
    first, *rows = zip(*used, strict=True)
    return markdown(("", *first), [(setting.title, *row) for setting, row in zip(settings, rows, strict=True)])


def text(fidelity: Fidelity) -> str:
    """The report: what was compared, the verdicts, the table and its legend."""
    verdicts = "\n".join(f"- {fidelity.verdict(setting)}" for setting in fidelity.others)
    return "\n\n".join((fidelity.what, verdicts, table(fidelity), _legend(fidelity)))


def _legend(fidelity: Fidelity) -> str:
    distances = fidelity.compared[0].distances if fidelity.compared else []
    given = distances[0].given if distances else 0
    frames = f"generated frames only, from frame {given} on" if given else "all frames"
    middle = "median over the videos, " if len(distances) > 1 else ""
    legend = (
        f"PSNR (peak 255, of the mean square error of R, G and B over the frames of a video) and SSIM (Gaussian window "
        f"of {WINDOW} pixels, mean over the frames), {middle}against {fidelity.reference.name} at the same seed, "
        f"{frames}; higher is closer."
    )
    if fidelity.floor is None:
        return f"{legend} No noise floor: {fidelity.no_floor}."
    return (
        f"{legend} Noise floor: {fidelity.reference.name} repeated with {fidelity.floor.options}; both kernels are "
        f"exact and differ only in rounding. A setting up to {MARGIN_DB:g} dB farther away is within it."
    )
