"""Captions of the nano world read back, and the words that they are made of."""

from __future__ import annotations

import re

from longcat_core.nano.world import COLOR_WORDS, MOTION_WORDS, SHAPE_WORDS, Actor, Scene, corpus, match_caption

TABLES = (COLOR_WORDS, SHAPE_WORDS, MOTION_WORDS)
NAMES = [{word: name for name, row in table.items() for word in row} for table in TABLES]


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes. Raises LongCatError for any other text."""
    groups = match_caption(" ".join(text.split())).groups()
    colors, shapes, motions = NAMES
    actors = [groups[i : i + 3] for i in (1, 4) if groups[i]]
    shown = (Actor(shapes[shape], colors[color], motions[motion]) for color, shape, motion in actors)
    return Scene(colors[groups[0] or groups[-1]], tuple(shown))


def words_of_the_world() -> set[str]:
    """Every word that captions use."""
    return {word for text in corpus(2000, seed=3) for word in re.findall(r"[a-z]+", text.lower())}
