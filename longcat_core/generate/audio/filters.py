"""Recursive filters over a whole sound, by their frequency response, in fp64.

A recursive filter whose response fades within TAIL samples equals a product of spectra, to rounding, once the sound has
that many zeros behind it. This needs neither a loop over samples nor SciPy, which a headless installation lacks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The slowest filter here, the high pass at 38 Hz, fades to 1e-17 in 4,000 samples.
TAIL = 8192
# Numerator and denominator in powers of a delay by one sample.
Section = tuple[tuple[float, ...], tuple[float, ...]]


def filtered(wave: Tensor, sections: tuple[Section, ...]) -> Tensor:
    """A sound [N] fp64 after these filters, one after another, from silence on: [N] fp64."""
    size = _quick_size(len(wave) + TAIL)
    spectrum = torch.fft.rfft(wave, size)
    delay = torch.exp(-1j * torch.linspace(0, math.pi, size // 2 + 1, dtype=torch.float64))
    for above, below in sections:
        spectrum *= _polynomial(above, delay)
        spectrum /= _polynomial(below, delay)
    return torch.fft.irfft(spectrum, size)[: len(wave)]


def _polynomial(factors: tuple[float, ...], at: Tensor) -> Tensor:
    value = torch.full_like(at, factors[-1])
    for factor in reversed(factors[:-1]):
        value = value * at + factor
    return value


def _quick_size(least: int) -> int:
    """The smallest even length from `least` on that an FFT splits into many equal parts."""
    unit = 1 << max(1, least.bit_length() - 4)
    return -(-least // unit) * unit


def high_shelf(frequency: float, gain: float, q: float, rate: int) -> Section:
    """A filter that raises what is above `frequency` Hz by `gain` dB (R. Bristow-Johnson, Audio EQ Cookbook)."""
    a, w = 10 ** (gain / 40), 2 * math.pi * frequency / rate
    cos, alpha = math.cos(w), math.sin(w) / (2 * q)
    root = 2 * math.sqrt(a) * alpha
    above = (a * (a + 1 + (a - 1) * cos + root), -2 * a * (a - 1 + (a + 1) * cos), a * (a + 1 + (a - 1) * cos - root))
    return above, (a + 1 - (a - 1) * cos + root, 2 * (a - 1 - (a + 1) * cos), a + 1 - (a - 1) * cos - root)


def high_pass(frequency: float, q: float, rate: int) -> Section:
    """A filter that removes what is below `frequency` Hz, of the same source."""
    w = 2 * math.pi * frequency / rate
    cos, alpha = math.cos(w), math.sin(w) / (2 * q)
    return ((1 + cos) / 2, -1 - cos, (1 + cos) / 2), (1 + alpha, -2 * cos, 1 - alpha)


def butterworth_low_pass(frequency: float, rate: int) -> tuple[Section, Section]:
    """The third-order Butterworth low pass by the bilinear transform: 1 / ((s + 1) (s^2 + s + 1)) at `frequency` Hz."""
    k = math.tan(math.pi * frequency / rate)
    first = (k, k), (k + 1, k - 1)
    return first, ((k * k, 2 * k * k, k * k), (k * k + k + 1, 2 * k * k - 2, k * k - k + 1))
