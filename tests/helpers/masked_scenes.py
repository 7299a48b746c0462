"""Small pictures with masks of classes, laid out as ADE20K."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

SIZE = (48, 32)  # width and height
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0))  # of the classes: nothing, red, green


def with_masks(folder: Path, recipe: Mapping[str, Any], train: int, val: int) -> Path:
    """Make so many pictures in a folder, and write the recipe that reads them; its file."""
    masked_scenes(folder / "ade", "training", train)
    masked_scenes(folder / "ade", "validation", val)
    content = {**recipe, "data": {**recipe["data"], "root": str(folder / "ade")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


def masked_scenes(root: Path, split: str, count: int, *, from_one: bool = False) -> None:
    """Dark pictures with one bright rectangle each, red or green, and their masks, whose first row is ignored.

    Args:
        from_one: classes from 1, and 0 is ignored, as in ADE20K.
    """
    generator = torch.Generator().manual_seed(len(split))
    for part in ("images", "annotations"):
        (root / part / split).mkdir(parents=True)
    for number in range(1, count + 1):
        x, y = torch.randint(0, 20, (2,), generator=generator).tolist()
        mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
        mask[y // 2 : y // 2 + 16, x : x + 20] = 1 + number % 2
        picture = np.array(COLOURS, np.uint8)[mask]
        mask[0] = 255
        if from_one:
            mask = np.where(mask == 255, 0, mask + 1).astype(np.uint8)
        Image.fromarray(picture).save(root / "images" / split / f"{number}.png")
        Image.fromarray(mask).save(root / "annotations" / split / f"{number}.png")
