"""The pairs of `auto` against every map that keeps the order, tried one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.models import build

from compressvit.model.backbone import BlockInfo, describe
from compressvit.training.pairs import suggested_pairs

STUDENTS, TEACHERS = 4, 6


@pytest.fixture(scope="module")
def blocks() -> list[BlockInfo]:
    """The blocks of a Swin: of two stages, every other one shifted."""
    return list(describe(build("swin")).blocks)


def fitting(students: list[BlockInfo], teachers: list[BlockInfo]) -> np.ndarray:
    """Which blocks agree in place."""
    places = [[(b.stage, b.resolution, b.window, b.shift) for b in blocks] for blocks in (students, teachers)]
    return np.array([[s == t for t in places[1]] for s in places[0]])


def best(values: np.ndarray, students: list[BlockInfo], teachers: list[BlockInfo]) -> set[tuple[tuple[int, int], ...]]:
    """Of all order-keeping sets of pairs that agree in place: the largest ones, and among those the ones with the largest sum."""
    fits = fitting(students, teachers)
    found: dict[tuple[tuple[int, int], ...], float] = {}
    for count in range(min(len(students), len(teachers)) + 1):
        for rows in itertools.combinations(range(len(students)), count):
            for columns in itertools.combinations(range(len(teachers)), count):
                if all(fits[i, j] for i, j in zip(rows, columns, strict=True)):
                    pairs = tuple((students[i].index, teachers[j].index) for i, j in zip(rows, columns, strict=True))
                    found[pairs] = sum(values[i, j] for i, j in zip(rows, columns, strict=True))
    most = max(found.values())
    return {pairs for pairs, total in found.items() if total > most - 1e-9}


@pytest.mark.parametrize("seed", range(12))
def test_no_other_pairs_that_keep_the_order_are_more_alike(blocks, seed):
    values = np.random.default_rng(seed).random((len(blocks), len(blocks)))
    students = [b for b in blocks if b.index != seed % len(blocks)]
    pairs = suggested_pairs(np.delete(values, seed % len(blocks), axis=0), students, blocks, fitting(students, blocks))
    assert tuple(pairs) in best(np.delete(values, seed % len(blocks), axis=0), students, blocks)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_are_unlike_in_all_pairs_have_one_nevertheless(seed):
    """Unbiased CKA may be below zero, and a pair that is allowed is better than none."""
    blocks = list(describe(build("vit")).blocks)
    values = np.random.default_rng(seed).random((len(blocks), len(blocks))) - 2
    assert len(suggested_pairs(values, blocks, blocks, fitting(blocks, blocks))) >= 1
    values[:] = -1
    np.fill_diagonal(values, -0.5)
    assert suggested_pairs(values, blocks, blocks, fitting(blocks, blocks)) == [(b.index, b.index) for b in blocks]


def test_a_block_that_no_teacher_block_fits_has_no_pair(blocks):
    first_stage = [b for b in blocks if b.stage == 0]
    pairs = suggested_pairs(np.ones((len(blocks), len(first_stage))), blocks, first_stage, fitting(blocks, first_stage))
    assert pairs == [(b.index, b.index) for b in first_stage]
