"""Small pictures with boxes, in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw


def scenes(root: Path, split: str, count: int) -> None:
    """Dark pictures with one bright rectangle each, red or green, in COCO's format."""
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
        annotations.append(
            {"id": number, "image_id": number, "category_id": kind + 1, "bbox": [x, y, 20, 16], "iscrowd": 0}
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}],
    }
    (root / f"{split}.json").write_text(json.dumps(content))
