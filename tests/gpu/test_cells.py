"""The pairs of values that the page names occur, and every cell has a prompt whose links lead somewhere."""

from __future__ import annotations

import itertools

import pytest

from . import jobs, stock
from .cells import (
    EXTRAS,
    LONG_TASKS,
    LONGCAT,
    MODES,
    NONE,
    SAMPLERS,
    TASKS,
    WITH_PATCHES,
    Cell,
    first_cells,
    pairs,
    possible,
)
from .jobs import Job
from .weights import AXIS

AXES = {"weights": tuple(AXIS), "sampler": SAMPLERS, "mode": MODES, "extra": EXTRAS, "task": TASKS}


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return pairs(list(AXIS), MODES)


def values(cells: list[Cell], *axes: str) -> set[tuple[str, ...]]:
    return {tuple(getattr(cell, axis) for axis in axes) for cell in cells}


def test_all_pairs_of_the_page_occur(cells):
    for one, other in (("weights", "mode"), ("weights", "sampler"), ("extra", "mode"), ("extra", "sampler")):
        assert values(cells, one, other) == set(itertools.product(AXES[one], AXES[other])), (one, other)
    assert values(cells, "extra", "weights") == set(itertools.product(EXTRAS[1:], WITH_PATCHES)) | {
        (NONE, form) for form in AXIS
    }
    assert values(cells, "task", "mode") == set(itertools.product(TASKS, MODES))
    assert values(cells, "task", "sampler") == {
        (task, sampler) for task, sampler in itertools.product(TASKS, SAMPLERS) if possible(task, sampler)
    }


def test_each_of_the_weights_and_each_patch_meets_four_tasks(cells):
    for form in AXIS:
        assert len({cell.task for cell in cells if cell.weights == form and cell.extra == NONE}) >= 4, form
    for extra in EXTRAS[1:]:
        assert len({cell.task for cell in cells if cell.extra == extra}) >= 4, extra


def test_they_are_few(cells):
    assert len(cells) == len(set(cells)) <= len(AXIS) * len(MODES) + (len(EXTRAS) - 1) * len(WITH_PATCHES) + 12


def test_long_videos_are_sampled_by_their_own_node(cells):
    assert {cell.sampler for cell in cells if cell.task in LONG_TASKS} == {LONGCAT}


def test_a_short_run_has_every_mode_with_every_sampler():
    assert {(cell.mode, cell.sampler) for cell in first_cells(MODES)} == set(itertools.product(MODES, SAMPLERS))


def links(job: Job) -> set[tuple[str, str]]:
    """(kind of node, name it links to) for links that lead nowhere."""
    return {
        (part["class_type"], value[0])
        for prompt in (*job.prompts, *job.reference)
        for part in prompt.values()
        for value in part["inputs"].values()
        if isinstance(value, list) and value[0] not in prompt
    }


def test_no_link_of_a_prompt_leads_nowhere(cells):
    work = [jobs.of_cell(cell, number) for number, cell in enumerate(cells)]
    work += [jobs.of_stock(row, MODES[0]) for row in stock.ROWS]
    assert not set().union(*map(links, work))
    assert all("save" in job.prompts[-1] and "save" in job.reference[-1] for job in work)


def test_names_and_folders_differ(cells):
    work = [jobs.of_cell(cell, number) for number, cell in enumerate(cells)]
    work += [jobs.of_stock(row, mode) for row in stock.ROWS for mode in MODES]
    assert len({job.name for job in work}) == len(work)
    # A long video that finds another one's folder would take its pieces.
    folders = [job.prompts[0]["long"]["inputs"]["folder"] for job in work if "long" in job.prompts[0]]
    assert folders and len(set(folders)) == len(folders)


def test_rows_share_a_video_of_the_cpu_only_if_it_is_the_same_prompt(cells):
    made: dict[tuple[str, ...], tuple] = {}
    for number, cell in enumerate(cells):
        job = jobs.of_cell(cell, number)
        assert made.setdefault(job.key, job.reference) == job.reference
    assert len(made) < len(cells)
