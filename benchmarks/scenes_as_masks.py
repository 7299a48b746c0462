"""Pictures with the masks of objects, in COCO's format, as pictures with masks of classes, laid out as ADE20K.

    python benchmarks/scenes_as_masks.py SCENES MASKS
    compressvit apply segmentation_dinov2_s data.root=MASKS data.classes=MASKS/classes.txt teacher.backbone=FILE

SCENES is what `data.name=coco` reads (train.json, train/, val.json, val/). Class 0 is what no object covers, and the categories follow in
the order of their ids; where objects overlap, the one that is annotated later is on top. What is in a crowd, and a box without a mask, is
ignored (255).
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from compressvit.data.annotated import Annotation
from compressvit.data.opening import open_data
from compressvit.data.outlines import runs
from compressvit.data.spec import Data
from compressvit.tasks.overlap import IGNORED
from compressvit.tasks.precision import coco_masks

SPLITS = {"training": "train", "validation": "validation"}  # of ADE20K, and the attributes of `Datasets`
BACKGROUND = "background"


def classes_of(annotation: Annotation) -> np.ndarray:
    """The classes of a picture's pixels, uint8 (H, W)."""
    values = np.zeros(annotation.size, np.uint8)
    outlines = annotation.outlines or (None,) * len(annotation.labels)
    for box, label, crowd, outline in zip(annotation.boxes, annotation.labels, annotation.crowd, outlines, strict=True):
        if outline is None:
            x0, y0, x1, y1 = (round(side) for side in box)
            values[y0:y1, x0:x1] = IGNORED
            continue
        values[coco_masks().decode(runs(outline, annotation.size)) > 0] = IGNORED if crowd else label + 1
    return values


def write(scenes: Path, target: Path) -> dict[str, int]:
    """Write both splits; how many pictures each has."""
    datasets = open_data(Data(name="coco", root=str(scenes)))
    written = {}
    for split, name in SPLITS.items():
        images, masks = (target / part / split for part in ("images", "annotations"))
        for folder in (images, masks):
            folder.mkdir(parents=True)
        samples = getattr(datasets, name).source.samples
        for path, annotation in samples:
            shutil.copyfile(path, images / os.path.basename(path))
            Image.fromarray(classes_of(annotation)).save(masks / f"{Path(path).stem}.png")
        written[split] = len(samples)
    names = [BACKGROUND, *(datasets.class_names or ())]
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", metavar="SCENES", type=Path)
    parser.add_argument("masks", metavar="MASKS", type=Path, help="a folder that is not there yet")
    arguments = parser.parse_args()
    if arguments.masks.exists():
        parser.exit(2, f"{arguments.masks} exists; give another folder\n")
    print(", ".join(f"{count:,} of {split}" for split, count in write(arguments.scenes, arguments.masks).items()))


if __name__ == "__main__":
    main()
