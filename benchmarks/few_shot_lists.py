"""Write digits or Fashion-MNIST as a few-shot task in the list format of a prepared VTAB-1k: 800 + 200 images, and the test set.

python benchmarks/few_shot_lists.py fashion_mnist --output few_shot/fashion_mnist
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from compressvit.data.opening import open_data
from compressvit.data.spec import Data


def main() -> None:
    """Draw 1,000 training images, as many of each class as can be, and write PNGs and lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("digits", "fashion_mnist"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--test", type=int, default=10000, help="test images at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    datasets = open_data(Data(name=arguments.name))
    sources = datasets.train, datasets.validation
    by_class: dict[int, list[int]] = {}
    order = list(range(len(sources[0])))
    random.Random(arguments.seed).shuffle(order)
    for index in order:
        by_class.setdefault(sources[0][index][1], []).append(index)
    drawn = [index for turn in zip(*by_class.values(), strict=False) for index in turn][:1000]
    lists = {
        "train800": (0, drawn[:800]),
        "val200": (0, drawn[800:]),
        "train800val200": (0, drawn),
        "test": (1, list(range(len(sources[1])))[: arguments.test]),
    }
    for name, (which, indices) in lists.items():
        lines = []
        folder = arguments.output / "images" / ("test" if which else "train")
        folder.mkdir(parents=True, exist_ok=True)
        for index in indices:
            image, target = sources[which][index]
            path = folder / f"{index:05d}.png"
            if not path.is_file():
                image.save(path)
            lines.append(f"{path.relative_to(arguments.output)} {target}")
        (arguments.output / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} images")


if __name__ == "__main__":
    main()
