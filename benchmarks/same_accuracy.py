"""One accuracy through every way in which a labelled set can lie on a disk: class folders, lists, CSV, TSV, tar files, TIFF copies.

The set is the validation split of a folder of class folders; a classifier of its classes is judged on the same pictures each time, and the
program ends with an error where it answers otherwise on a single one.

    python benchmarks/same_accuracy.py --data FOLDER --weights FILE --model vit_small_patch14_dinov2 --img-size 98
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from compressvit.data.input import input_config
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.pictures import EXTENSIONS
from compressvit.data.spec import Data
from compressvit.model.weights import build, load_file

Pictures = list[tuple[Path, int]]  # with the index of the class
WAYS: dict[str, Callable[[Path, Pictures, Path], Data]] = {}


def way(function: Callable[[Path, Pictures, Path], Data]) -> Callable[[Path, Pictures, Path], Data]:
    """Register a way to lay the pictures of a folder out in another one."""
    WAYS[function.__name__] = function
    return function


def data(name: str, root: Path, **options: object) -> Data:
    """The set, with batches of 32 read in this process."""
    return Data(name=name, root=str(root), batch_size=32, num_workers=0, **options)


@way
def folder(source: Path, pictures: Pictures, made: Path) -> Data:
    """The class folders themselves."""
    return data("folder", source)


def listed(source: Path, pictures: Pictures, made: Path, separator: str) -> Data:
    """Lists beside links to the pictures."""
    (made / "images").symlink_to(source.resolve(), target_is_directory=True)
    lines = [f"images/{path.relative_to(source)}{separator}{label}" for path, label in pictures]
    for split in ("train", "val"):
        (made / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return data("lists", made, train_split="train", val_split="val", outside=True)


@way
def lists(source: Path, pictures: Pictures, made: Path) -> Data:
    """Separated by a space."""
    return listed(source, pictures, made, " ")


@way
def csv(source: Path, pictures: Pictures, made: Path) -> Data:
    """Separated by a comma."""
    return listed(source, pictures, made, ",")


@way
def tsv(source: Path, pictures: Pictures, made: Path) -> Data:
    """Separated by a tab."""
    return listed(source, pictures, made, "\t")


@way
def tar(source: Path, pictures: Pictures, made: Path) -> Data:
    """WebDataset's shards: N.png beside N.cls."""
    for split in ("train", "val"):
        with tarfile.open(made / f"{split}-0000.tar", "w") as shard:
            for i, (path, label) in enumerate(pictures):
                for suffix, content in ((path.suffix, path.read_bytes()), (".cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{i:06d}{suffix}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
    count = len(pictures)
    splits = {
        split: {"name": split, "filenames": [f"{split}-0000.tar"], "shard_lengths": [count], "num_samples": count}
        for split in ("train", "val")
    }
    (made / "_info.json").write_text(json.dumps({"splits": splits}))
    return data(
        "wds/set", made, train_split="train", val_split="val", num_classes=1 + max(label for _, label in pictures)
    )


@way
def tiff(source: Path, pictures: Pictures, made: Path) -> Data:
    """Copies without loss."""
    for split in ("train", "val"):
        for path, _ in pictures:
            copy = made / split / path.relative_to(source / "val").with_suffix(".tiff")
            copy.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.save(copy, compression="tiff_lzw")
    return data("folder", made)


@torch.inference_mode()
def answers(model: torch.nn.Module, spec: Data) -> list[tuple[int, int]]:
    """(label, predicted class) of every picture of the validation split, in any order."""
    datasets = open_data(spec)
    loader = eval_loader(datasets, spec, input_config(model, spec), torch.device("cpu"))
    found = []
    for images, labels in loader:
        found += list(zip(labels.tolist(), model(images).argmax(1).tolist(), strict=True))
    return sorted(found)


def main() -> int:
    """Lay out, answer, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with val/CLASS/…")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/same_accuracy"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    arguments = parser.parse_args()
    classes = sorted(path.name for path in (arguments.data / "val").iterdir() if path.is_dir())
    pictures = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((arguments.data / "val" / name).rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    sized = {} if arguments.model.startswith("swin") else {"img_size": arguments.img_size}
    model = build(arguments.model, num_classes=len(classes), **sized).eval()
    load_file(model, arguments.weights, "--weights")
    console, first = Console(highlight=False), None
    for name in arguments.ways:
        made = arguments.output / name
        made.mkdir(parents=True)
        found = answers(model, WAYS[name](arguments.data, pictures, made))
        first = first or found
        right = sum(label == answer for label, answer in found)
        console.print(f"{name:7} {right} of {len(found)} right, {100 * right / len(found):.3f} %")
        if found != first:
            console.print(f"{name} has other answers than {arguments.ways[0]}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
