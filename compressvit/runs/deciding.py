"""The images that decide how small a student of `shrink: {keep: …}` becomes: some of those held out, apart from the evidence."""

from __future__ import annotations

from dataclasses import replace

import torch

from compressvit.data.notes import counted
from compressvit.data.opening import Datasets
from compressvit.data.samples import BrokenFiles, Samples
from compressvit.notes import Note
from compressvit.recipe.recipe import Recipe

LEAST = 64  # images held out, of which half may be set aside; with fewer both halves would say little
_PHOTOGRAPHS = 8  # of which they are at least


def set_aside(datasets: Datasets, recipe: Recipe) -> Datasets:
    """The data of a recipe whose steps judge students: every second photograph of those held out decides, and the others are the evidence
    at the end. Where they are too few, or cannot be listed, all do both. Data of other recipes stays as it is."""
    if datasets.deciding is not None or not any(getattr(step.spec, "judged", ()) for step in recipe.steps):
        return datasets
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
