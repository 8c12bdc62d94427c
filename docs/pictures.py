"""Draws icon.png and banner.png, by which the registry shows the pack: a long cat whose body is a strip of film; and
avatar.png, frames of a video that the nano avatar makes, with the loudness of what is said.

python docs/pictures.py        # from the pack's folder; the film is the video of demo.png
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from longcat_core.nano.avatar.measure import load_avatar, request_of, speak
from longcat_core.nano.avatar.world import FACE_COLORS, HEIGHT, WIDTH, Face, Scene

DOCS = Path(__file__).parent
# Drawn at this multiple of their size and reduced, which antialiases edges.
FINE = 4
NIGHT, FUR, DARK, NOSE, EYE = (24, 28, 48), (240, 146, 60), (196, 104, 32), (250, 170, 160), (34, 30, 40)
PALE, FAINT = (245, 243, 238), (168, 176, 200)
# Frames of demo.png in the order of time: columns and rows of its cells, and their size.
CELLS = [(20 + 302 * column, 20 + 230 * row) for row in range(3) for column in range(4)]
CELL = (288, 192)


def frames(count: int, first: int = 0, last: int = 11) -> list[Image.Image]:
    """`count` evenly spaced frames of the generated video, from cell `first` of its sheet to cell `last`."""
    with Image.open(DOCS / "demo.png") as sheet:
        cells = [sheet.convert("RGB").crop((x, y, x + CELL[0], y + CELL[1])) for x, y in CELLS]
    return [cells[first + round(i * (last - first) / (count - 1))] for i in range(count)]


def head(pen: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    """A cat's face of radius r around (x, y)."""
    for side in (-1, 1):
        pen.polygon([(x + side * a * r, y + b * r) for a, b in ((0.95, -0.2), (0.88, -1.4), (0.12, -0.85))], FUR)
        pen.polygon([(x + side * a * r, y + b * r) for a, b in ((0.80, -0.5), (0.77, -1.1), (0.38, -0.8))], NOSE)
    pen.ellipse((x - 1.08 * r, y - 0.95 * r, x + 1.08 * r, y + 0.95 * r), FUR)
    for side in (-1, 1):
        at = x + side * 0.42 * r
        pen.ellipse((at - 0.15 * r, y - 0.28 * r, at + 0.15 * r, y + 0.1 * r), EYE)
        pen.ellipse((at - 0.02 * r, y - 0.22 * r, at + 0.09 * r, y - 0.1 * r), PALE)
        for rise in (0.0, 0.14):
            start, end = (x + side * 0.5 * r, y + (0.28 + rise) * r), (x + side * 1.3 * r, y + (0.16 + 2 * rise) * r)
            pen.line([start, end], PALE, width=max(1, round(0.035 * r)))
    pen.polygon([(x - 0.12 * r, y + 0.2 * r), (x + 0.12 * r, y + 0.2 * r), (x, y + 0.33 * r)], NOSE)
    for side in (-1, 1):
        box = (min(x, x + side * 0.26 * r), y + 0.22 * r, max(x, x + side * 0.26 * r), y + 0.5 * r)
        pen.arc(box, 0, 180, EYE, width=max(1, round(0.045 * r)))


def film(
    sheet: Image.Image, left: float, top: float, width: float, height: float, pictures: list[Image.Image], upright: bool
) -> None:
    """The body: a strip of fur with the pictures and holes along its long sides."""
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + width, top + height), FUR)
    thick, long = (width, height) if upright else (height, width)
    edge, pitch = 0.17 * thick, long / len(pictures)
    for i, picture in enumerate(pictures):
        if upright:
            box = left + edge, top + i * pitch + 0.05 * pitch, left + width - edge, top + (i + 0.95) * pitch
        else:
            box = left + (i + 0.04) * pitch, top + edge, left + (i + 0.96) * pitch, top + height - edge
        x, y, right, bottom = map(round, box)
        size = right - x, bottom - y
        sheet.paste(ImageOps.fit(picture, size, Image.Resampling.BICUBIC), (x, y))
        for hole in range(4):
            along, r = (i + (hole + 0.5) / 4) * pitch, 0.055 * thick
            for across in (edge / 2, thick - edge / 2):
                hx, hy = (left + across, top + along) if upright else (left + along, top + across)
                pen.rounded_rectangle((hx - r, hy - r, hx + r, hy + r), r / 2, NIGHT)


def icon(side: int = 400) -> Image.Image:
    """The cat stands upright. RGBA: the corners are transparent."""
    size = side * FINE
    sheet = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    pen.rounded_rectangle((0, 0, size - 1, size - 1), 0.18 * size, NIGHT)
    pen.arc((0.60 * size, 0.52 * size, 0.90 * size, 0.93 * size), -60, 150, DARK, width=round(0.055 * size))
    pen.ellipse((0.785 * size, 0.53 * size, 0.84 * size, 0.585 * size), DARK)
    film(sheet, 0.31 * size, 0.34 * size, 0.38 * size, 0.585 * size, frames(2, 5, 6), upright=True)
    pen = ImageDraw.Draw(sheet)
    for at in (0.31, 0.53):
        pen.rounded_rectangle((at * size, 0.89 * size, (at + 0.16) * size, 0.955 * size), 0.03 * size, FUR)
    head(pen, 0.5 * size, 0.29 * size, 0.185 * size)
    return sheet.reduce(FINE)


def banner(width: int = 1260, height: int = 540) -> Image.Image:
    """The cat lies along the strip, the pack's name above it."""
    w, h = width * FINE, height * FINE
    sheet = Image.new("RGB", (w, h), NIGHT)
    pen = ImageDraw.Draw(sheet)
    margin = 0.055 * w
    pen.text((margin - 0.006 * w, 0.10 * h), "LongCat-Video", PALE, ImageFont.load_default(round(0.17 * h)))
    words = "text, image and continuation to video, native in ComfyUI"
    pen.text((margin, 0.30 * h), words, FAINT, ImageFont.load_default(round(0.064 * h)))
    pen.arc((0.025 * w, 0.46 * h, 0.115 * w, 0.78 * h), 90, 290, DARK, width=round(0.035 * h))
    pen.ellipse((0.0775 * w, 0.466 * h, 0.0925 * w, 0.501 * h), DARK)
    for at in (0.07, 0.145, 0.66, 0.735):
        pen.rounded_rectangle((at * w, 0.77 * h, (at + 0.05) * w, 0.90 * h), 0.04 * h, FUR)
    film(sheet, margin, 0.53 * h, 0.74 * w, 0.285 * h, frames(6, 0, 10), upright=False)
    pen = ImageDraw.Draw(sheet)
    head(pen, 0.845 * w, 0.60 * h, 0.175 * h)
    return sheet.reduce(FINE)


def avatar(count: int = 8, scale: int = 2, height: int = 72) -> Image.Image:
    """`count` frames of two faces who talk at once, each above its time in the loudness of both voices, which has the
    colors of the faces."""
    scene = Scene("gray", (Face("circle", "red"), Face("square", "green")))
    engine, encoder = load_avatar(None, torch.device("cpu"))
    spoken = speak(engine, encoder, engine.defaults, request_of(scene, 0, 2, 50, True), scene, lambda step: None)
    wide, high, total = WIDTH * scale, HEIGHT * scale, len(spoken.frames)
    sheet = Image.new("RGB", (count * wide, high + 2 * height), NIGHT)
    pen = ImageDraw.Draw(sheet)
    for row, (face, loudness) in enumerate(zip(scene.faces, spoken.loudness, strict=True), 1):
        floor = high + row * height - 6
        curve = [(count * wide * (i + 0.5) / total, floor - (height - 12) * level) for i, level in enumerate(loudness)]
        pen.polygon([(0, floor), *curve, (count * wide, floor)], FACE_COLORS[face.color])
    for place in range(count):
        number = int((place + 0.5) * total / count)
        cell = Image.fromarray(spoken.frames[number]).resize((wide, high), Image.Resampling.BICUBIC)
        sheet.paste(cell, (place * wide, 0))
        at = count * wide * (number + 0.5) / total
        pen.line([(at, high), (at, high + 2 * height)], PALE)
    return sheet


if __name__ == "__main__":
    for name, picture in (("icon", icon()), ("banner", banner()), ("avatar", avatar())):
        picture.quantize(128).save(DOCS / f"{name}.png", optimize=True)
