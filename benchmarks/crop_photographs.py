"""Cut photographs into square crops, so that a few large files become a small set of unlabelled images.

Every crop of a picture goes to the same split: every `--hold-out`-th picture to val/, the others to train/.

    python benchmarks/crop_photographs.py --output crops --per-image 16 @benchmarks/photographs.txt

The list names the photographs (not drawings) of Debian's packages lomiri-wallpapers-16.04, lomiri-wallpapers-20.04, mate-backgrounds,
plasma-workspace-wallpapers, opencv-doc, scratch, kphotoalbum and gcompris-qt-data (whose images lie in Qt's bundles, *.rcc, and are found
there by their first bytes); files and folders of your own do as well.

A file whose crops vary little (a gradient, a logo on one colour) is left out: its pixels' standard deviation is below `--contrast`.
"""

from __future__ import annotations

import argparse
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def images_of(file: Path) -> Iterator[tuple[str, Image.Image]]:
    """The image of a file, or the JPEG and WebP images that lie uncompressed in a Qt resource bundle, with names."""
    content = file.read_bytes()
    starts = [0]
    if file.suffix == ".rcc":
        starts = [match.start() for match in re.finditer(rb"RIFF....WEBP|\xff\xd8\xff", content, re.DOTALL)]
    for start in starts:
        try:
            image = Image.open(io.BytesIO(content[start:])).convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            if len(starts) == 1:  # within a bundle the bytes meant something else
                print(f"left out, cannot be read: {file}: {error}")
            continue
        yield (f"{file.stem}_{start}" if start else file.stem), image


def main() -> None:
    """Write the crops and say how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], fromfile_prefix_chars="@")
    parser.add_argument(
        "pictures", nargs="+", type=Path, help="files, folders, or @LIST, a file with one of them a line"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="side of a crop in pixels, after the image is scaled")
    parser.add_argument("--smallest", type=int, default=200, help="pictures with a shorter side are left out")
    parser.add_argument("--per-image", type=int, default=8)
    parser.add_argument("--hold-out", type=int, default=8, help="every so many pictures, one is held out")
    parser.add_argument("--contrast", type=float, default=25.0, help="smallest standard deviation of a crop, of 255")
    arguments = parser.parse_args()
    for split in ("train", "val"):
        (arguments.output / split).mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".rcc")
    files = [
        p
        for given in arguments.pictures
        for p in (sorted(given.rglob("*")) if given.is_dir() else [given])
        if p.suffix.lower() in suffixes
    ]
    seen: list[np.ndarray] = []
    count = 0
    for file in files:
        for name, image in images_of(file):
            if min(image.size) < arguments.smallest:
                continue
            small = np.asarray(image.resize((16, 16)), dtype=np.float32)
            if any(np.abs(small - other).mean() < 8 for other in seen):  # the same picture in another size
                continue
            seen.append(small)
            split = "val" if len(seen) % arguments.hold_out == 0 else "train"
            for index in range(arguments.per_image):
                side = chance.randint(min(arguments.size, min(image.size)), min(image.size))
                left, top = chance.randint(0, image.width - side), chance.randint(0, image.height - side)
                crop = image.crop((left, top, left + side, top + side)).resize((arguments.size, arguments.size))
                if np.asarray(crop).std() < arguments.contrast:
                    continue
                crop.save(arguments.output / split / f"{len(seen):04d}_{name}_{index}.jpg", quality=92)
                count += 1
    print(f"{count} crops of {len(seen)} pictures in {arguments.output}")


if __name__ == "__main__":
    main()
