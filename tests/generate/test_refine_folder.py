"""Refining piece by piece into a folder: the same video, and nothing is refined twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_core.files.media import write_video
from longcat_core.generate.engine import Engine
from longcat_core.generate.footage import Footage
from longcat_core.generate.refine import RefineRequest, piece_folder, refine, refine_in_folder
from longcat_core.generate.request import NANO
from longcat_core.generate.segment_folder import SegmentFolder
from longcat_core.generate.segments import FRAMES
from longcat_core.optimize.block_sparse import BlockSparse

from ..support.folders import contents, copied, flipped
from ..support.tiny import SEED, moving_clip, unwanted

REFINE = RefineRequest("a", seed=SEED, height=16, width=32, steps=12, piece=9, overlap=5, doubled=False)


def refined(
    engine: Engine, path: Path, video: np.ndarray | Footage, model: dict | None = None, **changes: Any
) -> list[tuple]:
    asked = replace(REFINE, **changes)
    return list(refine_in_folder(lambda: engine, NANO, video, asked, piece_folder(path), model or {}))


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    """Three pieces of 9 frames with 5 in common."""
    return moving_clip(17, 8, 16)


@pytest.fixture(scope="module")
def pieces(tiny, video, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pieces")
    refined(tiny, path, video)
    return path


@pytest.mark.parametrize("doubled", [False, True])
def test_pieces_in_a_folder_are_the_video_that_refining_gives(tiny, video, tmp_path, doubled):
    folder: SegmentFolder = piece_folder(tmp_path / "v")
    done = refined(tiny, folder.path, video, doubled=doubled)
    factor = 1 + doubled
    assert done == [(0, 0, False), (1, 5 * factor, False), (2, 5 * factor, False)]
    kept = np.concatenate([folder.frames(number, skip) for number, skip, _ in done])
    assert np.array_equal(kept, np.concatenate(list(refine(tiny, video, replace(REFINE, doubled=doubled)))))
    assert kept.shape == (17 * factor, 16, 32, 3)


def test_a_file_is_refined_as_its_frames_are(tiny, video, pieces, tmp_path, made):
    write_video(tmp_path / "a.mkv", video, 15)
    from_file = np.concatenate(list(refine(tiny, tmp_path / "a.mkv", REFINE)))
    assert np.array_equal(from_file, np.concatenate(list(refine(tiny, video, REFINE))))
    made.clear()
    path = copied(pieces, tmp_path / "v")
    refined(tiny, path, Footage.of_file(tmp_path / "a.mkv"))
    assert made == [] and contents(path) == contents(pieces)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("damage", [shutil.rmtree, flipped(FRAMES)])
def test_a_lost_piece_alone_is_refined_again(tiny, video, pieces, tmp_path, made, number, damage):
    path = copied(pieces, tmp_path / "v")
    damage(path / f"segment-{number + 1:03}")
    done = refined(tiny, path, video)
    assert made == [number] and [reused for *_, reused in done] == [n != number for n in range(3)]
    assert contents(path) == contents(pieces)


@pytest.mark.parametrize(("frame", "first"), [(0, 0), (3, 0), (4, 0), (9, 1), (13, 2), (16, 2)])
def test_another_frame_is_refined_again_from_its_first_piece_on(tiny, video, pieces, tmp_path, made, frame, first):
    path = copied(pieces, tmp_path / "v")
    other = video.copy()
    other[frame] ^= 255
    refined(tiny, path, other)
    assert made == list(range(first, 3))
    assert {name: content for name, content in contents(path).items() if "-v2" not in name} == contents(pieces)
    made.clear()
    for source in (video, other):
        folder = piece_folder(path)
        done = list(refine_in_folder(unwanted, NANO, source, REFINE, folder, {}))
        kept = folder.footage([(number, skip) for number, skip, _ in done], 15)
        frames = np.stack(list(kept.read()))
        assert np.array_equal(frames, np.concatenate(list(refine(tiny, source, REFINE))))
        assert (kept.frames, kept.height, kept.width, kept.fps) == (17, 16, 32, 15)


def test_a_longer_video_goes_on_from_its_whole_pieces(tiny, video, pieces, tmp_path, made):
    path = copied(pieces, tmp_path / "v")
    refined(tiny, path, np.concatenate([video, video[:6]]))
    assert made == [3, 4]


def test_where_all_pieces_are_there_no_model_is_loaded(video, pieces):
    done = list(refine_in_folder(unwanted, NANO, video, REFINE, piece_folder(pieces), {}))
    assert [reused for *_, reused in done] == [True] * 3


def test_block_sparse_pieces_are_known_again(tiny, video, tmp_path, made):
    sparse = BlockSparse(0.5, chunk=(2, 2, 2))
    refined(tiny, tmp_path / "v", video, block_sparse=sparse)
    made.clear()
    refined(tiny, tmp_path / "v", video, block_sparse=replace(sparse, kernel="plain"))
    assert made == []
    folder = piece_folder(tmp_path / "v")
    asked = replace(REFINE, block_sparse=replace(sparse, sparsity=0.25))
    next(refine_in_folder(lambda: tiny, NANO, video, asked, folder, {}))
    assert "block-sparse sparsity 0.5, chunk 2x2x2 there, sparsity 0.25, chunk 2x2x2 now" in folder.said
    assert "lossy change" in folder.said and folder.place(0) == "take-002/segment-001"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 8}, "seed 7 there, 8 now"),
        ({"prompt": "b"}, "prompt a there, b now"),
        ({"steps": 13}, "steps 12 there, 13 now"),
        ({"height": 32}, "height 16 there, 32 now"),
        ({"doubled": True}, "doubled False there, True now"),
        # Other frames make the first piece.
        ({"piece": 13}, "another source"),
        ({"block_sparse": BlockSparse()}, "block-sparse none there"),
        ({"model": {"lora": "abc"}}, "lora none there, abc now"),
    ],
)
def test_pieces_of_other_settings_stay_beside_a_new_take(tiny, video, pieces, tmp_path, changes, said):
    path = copied(pieces, tmp_path / "v")
    before, folder = contents(path), piece_folder(path)
    asked = replace(REFINE, **{name: value for name, value in changes.items() if name != "model"})
    next(refine_in_folder(lambda: tiny, NANO, video, asked, folder, changes.get("model", {})))
    assert said in folder.said and folder.place(0) == "take-002/segment-001"
    assert contents(path) == before and (path / "take-002" / "segment-001" / FRAMES).is_file()


def test_another_overlap_keeps_the_first_piece(tiny, video, pieces, tmp_path, made):
    path = copied(pieces, tmp_path / "v")
    done = refined(tiny, path, video, overlap=1)
    assert [reused for *_, reused in done] == [True, False] and made == [1]
    assert all(reused for *_, reused in refined(tiny, path, video))
