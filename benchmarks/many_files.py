"""What opening a set of many files takes, in CPU seconds and memory, beside timm: folders of classes, images without labels, and a list.

The files are hard links of a few small pictures in a folder of its own, so a million of them take little room. Nothing is decoded. Every
reader runs in a process of its own; memory is what its peak is above that before the set was opened.

    python benchmarks/many_files.py --files 1000000 --output /tmp/many_files
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

_CLASSES, _PICTURES = 1000, 30
_LINKS = 50_000  # to a file at most; ext4 allows 65,000
_TRAIN = 0.95


def make(root: Path, files: int) -> None:
    """Fill a folder that is not there yet with train/ and val/ of a thousand classes, and the lists of both."""
    complete = root / "val.txt"  # is written last
    if complete.exists():
        return
    if root.exists():
        shutil.rmtree(root)
    own = root.with_name(f"{root.name}_pictures")
    own.mkdir(parents=True, exist_ok=True)
    pictures = [own / f"{i}.jpg" for i in range(max(_PICTURES, files // _LINKS + 1))]
    for i, path in enumerate(pictures):
        Image.new("RGB", (32, 32), (i % 256, 2 * i % 256, 3 * i % 256)).save(path)
    made = 0
    for split, share in (("train", _TRAIN), ("val", 1 - _TRAIN)):
        lines = []
        for label in range(_CLASSES):
            folder = root / split / f"class_{label:04d}"
            folder.mkdir(parents=True)
            for number in range(round(share * files / _CLASSES)):
                name = folder / f"{label:04d}_{number}.jpg"
                os.link(pictures[made % len(pictures)], name)
                lines.append(f"{name.relative_to(root)} {label}\n")
                made += 1
        (root / f"{split}.txt").write_text("".join(lines))


def _ours(name: str, **options: str) -> Callable[[Path], int]:
    def count(root: Path) -> int:
        from compressvit.data.opening import open_data
        from compressvit.data.spec import Data

        opened = open_data(Data(name=name, root=str(root), **options))
        return len(opened.train) + len(opened.validation)  # type: ignore[arg-type]

    return count


def _timm(root: Path) -> int:
    from timm.data import create_dataset

    return sum(len(create_dataset("", str(root), split=split)) for split in ("train", "val"))


READERS: dict[str, Callable[[Path], int]] = {
    "folder": _ours("folder"),
    "images": _ours("images"),
    "lists": _ours("lists", train_split="train", val_split="val"),
    "timm's folder": _timm,
}


def measure(reader: str, root: Path) -> str:
    """A row of the table."""
    import timm.data  # noqa: F401

    import compressvit.data.opening  # noqa: F401  (what is imported is not what is measured)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent, started = time.process_time(), time.perf_counter()
    found = READERS[reader](root)
    spent, took = time.process_time() - spent, time.perf_counter() - started
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return f"| {reader} | {found:,} | {spent:.1f} | {took:.1f} | {more:,.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the files and measure every reader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    root = given.output / f"files_{given.files}"
    if given.reader:
        print(measure(given.reader, root))
        return
    make(root, given.files)
    print("| | files | CPU s | s | MiB |\n| --- | --- | --- | --- | --- |", flush=True)
    for reader in READERS:
        command = [sys.executable, __file__, "--files", str(given.files), "--output", str(given.output)]
        subprocess.run([*command, "--reader", reader], check=True)


if __name__ == "__main__":
    main()
