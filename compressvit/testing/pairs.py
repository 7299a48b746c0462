"""Laws of several transforms: every ordered pair composes, or is refused with a message that names both steps and an alternative."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import ties
from compressvit.testing.cases import require, with_files
from compressvit.testing.models import build, images_for, outputs, same_values, structure, values
from compressvit.transforms.applying import compress
from compressvit.transforms.base import Transform
from compressvit.transforms.record import compression_of


def compose_or_refuse(first: Transform, second: Transform, backbone: str) -> str | None:
    """Apply two transforms to a backbone that supports both.

    Returns:
        None if they compose, else the message with which they are refused.

    Raises:
        AssertionError: the result of composing them is wrong, or the message is incomplete.
    """
    pair = f"{first.name} and then {second.name} on {backbone}"
    model = build(backbone)
    before, state = structure(model), values(model)
    steps = [with_files(first, backbone), with_files(second, backbone, before=[first])]
    try:
        made = compress(model, steps)
    except UserError as error:
        text = str(error)
        for name in (first.name, second.name):
            require(name in text, f"{pair}: the refusal does not name {name}: {text}")
        require("; " in text, f"{pair}: the refusal offers no way out after a semicolon: {text}")
        require(structure(model) == before, f"{pair}: the refusal leaves another structure")
        require(same_values(values(model), state), f"{pair}: the refusal leaves other values")
        return text
    images = images_for(model)
    require(outputs(made, images).isfinite().all(), f"{pair}: outputs are not finite")
    names = [plan.transform for plan in compression_of(made).plans]
    require(names == [first.name, second.name], f"{pair}: {', '.join(names)} were recorded")
    change = sum(e.after - e.before for e in compression_of(made).ledger)
    require(change == ties.count_parameters(made) - ties.count_parameters(model), f"{pair}: the ledger does not add up")
    with tempfile.TemporaryDirectory() as folder:
        again = artifact.load(artifact.save(made, Path(folder) / "student"))
    require(structure(again) == structure(made), f"{pair}: an artifact is loaded with another structure")
    require(torch.equal(outputs(again, images), outputs(made, images)), f"{pair}: an artifact computes something else")
    return None
