"""Cut photographs into square crops, so that a few large files become a small set of unlabeled images.

Every crop of a picture goes to the same split: every `--hold-out`-th picture to val/, the others to train/.

    python benchmarks/crop_photographs.py --output crops --per-image 16 @benchmarks/photographs.txt

The list names the photographs (not drawings) of Debian's packages lomiri-wallpapers-16.04, lomiri-wallpapers-20.04, mate-backgrounds,
plasma-workspace-wallpapers, opencv-doc, scratch and kphotoalbum; files and folders of your own do as well.

A file whose crops vary little (a gradient, a logo on one colour) is left out: its pixels' standard deviation is below `--contrast`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def main() -> None:
    """Write the crops and say how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], fromfile_prefix_chars="@")
    parser.add_argument(
        "pictures", nargs="+", type=Path, help="files, folders, or @LIST, a file with one of them a line"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="side of a crop in pixels, after the image is scaled")
    parser.add_argument("--per-image", type=int, default=8)
    parser.add_argument("--hold-out", type=int, default=8, help="every so many pictures, one is held out")
    parser.add_argument("--contrast", type=float, default=25.0, help="smallest standard deviation of a crop, of 255")
    arguments = parser.parse_args()
    for split in ("train", "val"):
        (arguments.output / split).mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    files = [
        p
        for given in arguments.pictures
        for p in (sorted(given.rglob("*")) if given.is_dir() else [given])
        if p.suffix.lower() in suffixes
    ]
    seen: set[str] = set()
    count = 0
    for file in files:
        try:
            image = Image.open(file).convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            print(f"left out, cannot be read: {error}")
            continue
        if min(image.size) < arguments.size:
            continue
        signature = image.resize((16, 16)).tobytes().hex()
        if signature in seen:  # the same picture in another size
            continue
        seen.add(signature)
        for index in range(arguments.per_image):
            side = chance.randint(min(arguments.size, min(image.size)), min(image.size))
            left, top = chance.randint(0, image.width - side), chance.randint(0, image.height - side)
            crop = image.crop((left, top, left + side, top + side)).resize((arguments.size, arguments.size))
            if np.asarray(crop).std() < arguments.contrast:
                continue
            split = "val" if len(seen) % arguments.hold_out == 0 else "train"
            crop.save(arguments.output / split / f"{len(seen):04d}_{file.stem}_{index}.jpg", quality=92)
            count += 1
    print(f"{count} crops of {len(seen)} pictures in {arguments.output}")


if __name__ == "__main__":
    main()
