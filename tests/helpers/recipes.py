"""A good recipe to spoil, and the list of faults that the reader of a spoilt one is shown."""

from __future__ import annotations

import re

import pytest
from torch import nn

from compressvit.errors import UserError
from compressvit.recipe.recipe import Recipe, parse_recipe
from compressvit.runs.models import teacher_architecture

GOOD = """\
description: A test.
seed: 3
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {img_size: 8, patch_size: 4, embed_dim: 48, depth: 2}
data:
  name: digits
steps:
  - multiplex: {share: 2}
  - distill:
      epochs: 2
      lr: 1e-3
"""


def fault(text: str, overrides: list[str] | None = None, name: str = "recipes/x.yaml") -> str:
    """The message of a recipe that must be refused."""
    with pytest.raises(UserError) as caught:
        parse_recipe(text, name, overrides)
    return str(caught.value)


def rows(message: str) -> list[tuple[str, str, str]]:
    """The lines of a list of faults as (place, path, sentence), after checking its head."""
    head, *lines = message.splitlines()
    count = len(lines)
    assert head == f"recipes/x.yaml: {count} error{'s' * (count > 1)}"
    found = []
    for line in lines:
        match = re.fullmatch(r"  (line \d+|override .+?) {2,}(\S+): (.+)", line)
        assert match, line
        found.append((match[1].strip(), match[2], match[3]))
    return found


def only_row(text: str, overrides: list[str] | None = None) -> tuple[str, str, str]:
    found = rows(fault(text, overrides))
    assert len(found) == 1, found
    return found[0]


def build_teacher(recipe: Recipe, *, classes: int | None = None, device: str | None = None) -> nn.Module:
    """The teacher of a recipe before it has values; device='meta' for a skeleton."""
    return teacher_architecture(recipe, classes=classes).build(device)
