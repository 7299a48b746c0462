"""Small clips of a bright square that moves to the right or to the left, which no frame tells: as folders of frames or videos."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SIZE = (36, 32)  # width and height


def frames(label: int, count: int, seed: int, *, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Frames (H, W, 3) of a square that moves two pixels a frame, round the picture: to the right (label 1) or to the left (0)."""
    rng = random.Random(seed)
    width, height = size
    x, y = rng.randrange(width), rng.randrange(height - 10)
    found = []
    for i in range(count):
        frame = np.full((height, width, 3), 20, np.uint8)
        columns = (x + (2 if label else -2) * i + np.arange(10)) % width
        frame[y : y + 10, columns] = (220, 180, 90)
        found.append(frame)
    return found


def write_folder(folder: Path, pictures: Sequence[np.ndarray]) -> Path:
    """A folder of numbered frames; the tenth is `10.png`, which a plain order would put before `2.png`."""
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def write_video(
    file: Path, pictures: Sequence[np.ndarray], *, rate: int = 10, times: Sequence[int] | None = None
) -> Path:
    """An MP4 of lossless frames, encoded by PyAV.

    Args:
        times: when each frame is shown, in units of 1 / rate; None: one after the other.
    """
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"crf": "0", "g": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = (times or range(len(pictures)))[i]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def with_clips(folder: Path, recipe: Mapping[str, Any], train: int, val: int, count: int = 12) -> Path:
    """Make so many clips as folders of frames, with their lists, and write the recipe that reads them; its file."""
    root = folder / "clips"
    for split, number in (("train", train), ("val", val)):
        lines = []
        for i in range(number):
            write_folder(root / split / f"{i:03d}", frames(i % 2, count, seed=1000 * len(split) + i))
            lines.append(f"{split}/{i:03d} {i % 2}\n")
        (root / f"{split}.csv").write_text("".join(lines))
    content = {**recipe, "data": {**recipe["data"], "root": str(root)}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"
