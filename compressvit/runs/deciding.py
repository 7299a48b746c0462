"""Which images decide and which are the evidence: how small a student of `shrink: {keep: …}` becomes, which weights `keep: best` keeps, and
what the figures at the end are of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.data import Dataset

from compressvit.data.notes import counted
from compressvit.data.opening import Datasets
from compressvit.data.samples import BrokenFiles, Samples
from compressvit.notes import Note
from compressvit.recipe.recipe import Recipe

LEAST = 64  # images held out, of which half may be set aside; with fewer both halves would say little
_PHOTOGRAPHS = 8  # of which they are at least
_TOLD = ("test", "chosen_on_evidence")


def set_aside(datasets: Datasets, recipe: Recipe) -> Datasets:
    """The data of a recipe, with notes on what is chosen on which images, if anything is.

    Where steps judge students, every second photograph of those held out decides, and the others are the evidence at the end; where they
    are too few, or cannot be listed, all do both. Where there is a test, that is the evidence, and all that are held out for validation
    decide.
    """
    if datasets.deciding is not None or any(note.what in _TOLD for note in datasets.found):
        return datasets
    return _with_notes(_with_deciding(datasets, recipe), recipe)


def _with_notes(datasets: Datasets, recipe: Recipe) -> Datasets:
    """The data with a note on which images the figures at the end are of, where there is a test or `keep: best` chooses."""
    keeping = [where for where, phase in recipe.phases().items() if phase.keep == "best"]
    chosen = f"keep: best ({', '.join(keeping)}) chooses on"
    validation = _count(datasets.validation)
    if datasets.test is not None:
        text = f"the figures at the end are of {_count(datasets.test)} of the test, on which nothing is chosen"
        if keeping:
            text += f"; {chosen} {validation} held out for validation"
        note = Note("test", _number(datasets.test), text)
    elif keeping:
        text = (
            f"{chosen} {validation} held out, and the figures at the end are of the same, which makes them a little too good; "
            "data.test_split or data.test_fraction gives a test, where the set can have one"
        )
        note = Note("chosen_on_evidence", _number(datasets.validation), text)
    else:
        return datasets
    return replace(datasets, found=[*datasets.found, note])


def _number(part: Dataset) -> int:
    return len(part) if isinstance(part, Samples) else 0


def _count(part: Dataset) -> str:
    return counted(_number(part)) if _number(part) else "images"


def _with_deciding(datasets: Datasets, recipe: Recipe) -> Datasets:
    if not any(getattr(step.spec, "judged", ()) for step in recipe.steps):
        return datasets
    if datasets.test is not None:
        text = f"{_count(datasets.validation)} held out for validation decide how small the student becomes"
        found = [*datasets.found, Note("deciding", _number(datasets.validation), text)]
        return replace(datasets, deciding=datasets.validation, found=found)
    held_out = datasets.validation
    numbers = held_out.photographs(recipe.data) if isinstance(held_out, Samples) else torch.empty(0)
    photographs = len(numbers.unique())
    if not isinstance(held_out, Samples) or len(numbers) < LEAST or photographs < _PHOTOGRAPHS:
        count = (
            f"{counted(len(numbers))} of {counted(photographs, 'photograph')} held out"
            if len(numbers)
            else "images held out"
        )
        text = f"{count} decide how small the student becomes, and are the evidence too, which is therefore a little too good"
        found = [*datasets.found, Note("deciding", len(numbers), text)]
        return replace(datasets, deciding=held_out, found=found)
    decide = numbers % 2 == 0
    deciding, evidence = (held_out.part(part.nonzero().flatten().tolist()) for part in (decide, ~decide))
    text = (
        f"{counted(len(deciding))} held out decide how small the student becomes; {counted(len(evidence))} of other photographs are the "
        "evidence"
    )
    return replace(
        datasets,
        validation=evidence,
        deciding=deciding,
        broken=BrokenFiles(datasets.train, evidence, deciding),
        found=[*datasets.found, Note("deciding", len(deciding), text)],
    )
