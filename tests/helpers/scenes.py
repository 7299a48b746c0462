"""Small pictures with boxes or masks, in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw


def with_scenes(folder: Path, recipe: Mapping[str, Any], train: int, val: int, outlined: bool = False) -> Path:
    """Make so many scenes in a folder, and write the recipe that reads them; its file."""
    scenes(folder / "scenes", "train", train, outlined)
    scenes(folder / "scenes", "val", val, outlined)
    content = {**recipe, "data": {**recipe["data"], "root": str(folder / "scenes")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


def scenes(root: Path, split: str, count: int, outlined: bool = False) -> None:
    """Dark pictures with one bright rectangle each, red or green, in COCO's format; its mask, if there are any, is a diamond."""
    generator = torch.Generator().manual_seed(len(split))
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture = Image.new("RGB", (48, 32))
        x, y = torch.randint(0, 20, (2,), generator=generator).tolist()
        x, y, kind = x, y // 2, number % 2
        ImageDraw.Draw(picture).rectangle((x, y, x + 19, y + 15), fill=((255, 0, 0), (0, 255, 0))[kind])
        picture.save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 32})
        entry = {"id": number, "image_id": number, "category_id": kind + 1, "bbox": [x, y, 20, 16], "iscrowd": 0}
        diamond = [x + 10, y, x + 20, y + 8, x + 10, y + 16, x, y + 8]
        annotations.append(entry | ({"segmentation": [diamond]} if outlined else {}))
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}],
    }
    (root / f"{split}.json").write_text(json.dumps(content))
