"""Bring colors of HDR and of wide gamuts to what our frames are: SDR, BT.709, R'G'B' for a display of gamma 2.2.

HLG and PQ are decoded by BT.2100 to light in cd/m2 on a display of 1,000 cd/m2. The reference white of HDR, 203 cd/m2
(BT.2408), becomes the white of SDR, with highlights compressed by the tone mapping curve of BT.2390, section 5.4.1, on
the largest of R, G and B, which keeps the hue. Primaries are converted in linear light, and what is outside of BT.709
is clipped.
"""

from __future__ import annotations

from functools import cache

import numpy as np

# FFmpeg's numbers (libavutil/pixfmt.h), as a stream declares them.
PQ, HLG = 16, 18
LINEAR, LOG_100, LOG_316, CINEMA = 8, 9, 10, 17
FILM, BT2020, XYZ, DCI_P3, DISPLAY_P3 = 8, 9, 10, 11, 12
HDR = {PQ: "PQ", HLG: "HLG"}
# Other transfer functions that are converted. Those of SDR television, sRGB and gamma 2.2 and 2.8 (4 to 7 and 11 to 15)
# are taken for BT.709, as players do.
CURVES = {LINEAR: "linear light", LOG_100: "logarithmic", LOG_316: "logarithmic", CINEMA: "SMPTE ST 428"}
# Transfer functions that cameras write into a clip to be graded, by FFmpeg's numbers.
CAMERA_LOGS = 256
# Linear RGB to linear BT.709: BT.2087, Display P3 by the chromaticities of SMPTE EG 432-1, the others by those of ITU-T
# H.273, table 2, with their white brought to D65 by Bradford's matrix. Primaries of BT.601 are close to BT.709.
TO_BT709 = {
    FILM: ((1.3462, -0.3392, -0.0070), (-0.0474, 1.0661, -0.0187), (-0.0217, -0.0613, 1.0830)),
    XYZ: ((3.1467, -1.6665, -0.4802), (-0.9955, 1.9558, 0.0397), (0.0636, -0.2146, 1.1510)),
    DCI_P3: ((1.1575, -0.1549, -0.0026), (-0.0415, 1.0456, -0.0041), (-0.0181, -0.0785, 1.0966)),
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    DISPLAY_P3: ((1.2249, -0.2249, 0.0), (-0.0420, 1.0420, 0.0), (-0.0196, -0.0786, 1.0983)),
}
PEAK, WHITE = 1000.0, 203.0  # cd/m2
GAMMA = 2.2  # of the displays of computers


def to_sdr(picture: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """uint16 [H, W, 3], full range R'G'B' -> uint8 [H, W, 3], BT.709. transfer, primaries: FFmpeg's numbers."""
    light = _light(transfer)[picture]
    if transfer == HLG:
        # The system gamma of BT.2100 for a display of 1,000 cd/m2 is 1.2.
        luminance = light @ np.array((0.2627, 0.6780, 0.0593), np.float32)
        light *= _looked_up(_system_gamma(), luminance)[..., None]
    if transfer in HDR:
        light *= _looked_up(_tone_map(), light.max(axis=-1) * (WHITE / PEAK))[..., None]
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    return _looked_up(_display(), light)


def _looked_up(table: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The entries of a table over 0..1, spaced by square roots, because dark tones need finer steps."""
    places = np.sqrt(np.clip(value, 0, 1, out=value), out=value)
    places *= len(table) - 1
    return table[(places + 0.5).astype(np.uint16)]


# Values over 0..1 at which tables are computed.
_AT = np.linspace(0, 1, 4096) ** 2


@cache
def _display() -> np.ndarray:
    return (255 * _AT ** (1 / GAMMA) + 0.5).astype(np.uint8)


@cache
def _system_gamma() -> np.ndarray:
    return (PEAK / WHITE * _AT**0.2).astype(np.float32)


@cache
def _light(transfer: int) -> np.ndarray:
    """fp32 [65536]: linear light of a signal of 16 bits, 1.0 is SDR white; of HLG light of the scene, up to 1.0."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        light = _pq_to_light(signal) / WHITE
    elif transfer == HLG:
        # BT.2100, table 5.
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    elif transfer == CINEMA:
        light = 52.37 / 48 * signal**2.6
    elif transfer in (LOG_100, LOG_316):
        # H.273, table 3.
        light = np.where(signal > 0, 10 ** ((signal - 1) * (2 if transfer == LOG_100 else 2.5)), 0.0)
    else:
        light = signal if transfer == LINEAR else signal**GAMMA
    return light.astype(np.float32)


# BT.2100, table 4.
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def _pq_to_light(signal: np.ndarray) -> np.ndarray:
    power = signal ** (1 / _M2)
    return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _light_to_pq(light: np.ndarray | float) -> np.ndarray:
    power = (np.asarray(light) / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


@cache
def _tone_map() -> np.ndarray:
    """By what light is multiplied so that PEAK becomes WHITE, over light / PEAK."""
    light = np.maximum(_AT, _AT[1]) * PEAK
    top = _light_to_pq(PEAK)
    source, limit = _light_to_pq(light) / top, _light_to_pq(WHITE) / top
    knee = 1.5 * limit - 0.5
    t = np.maximum(source - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * limit
    return (_pq_to_light(np.where(source < knee, source, spline) * top) / light).astype(np.float32)
