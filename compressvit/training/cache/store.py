"""The files of a cache: `cache.json`, and for every view a file of rows, one for each image of the set in its order.

A row is an answer and 4 bytes of CRC-32 over it and its place; zeros where nobody has asked yet. Several processes and runs write into the
same files, each its own rows. A row that was written in part, or has been damaged, does not fit its checksum and counts as not there.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from compressvit.errors import UserError
from compressvit.files import disk_faults, put, sync
from compressvit.reading import open_regular, read_json
from compressvit.spec import Frozen
from compressvit.training.cache.spec import CacheFiles

INDEX = "cache.json"
HELD_OUT = "held_out-"  # begins the name of a cache in a cache
_CHECKSUM = 4  # bytes
_FORMAT = 1


class Index(Frozen):
    """The content of `cache.json`.

    Attributes:
        images: in the training set, and rows in every file.
        bytes: of an answer.
        identity: what the answers depend on.
    """

    format: int = _FORMAT
    images: int = Field(ge=1)
    bytes: int = Field(ge=1)
    identity: dict[str, Any]


@dataclass
class Verified:
    """What is in the file of a view: so many answers, the places of the damaged ones, and whether the end of the file is missing."""

    file: Path
    answers: int
    damaged: list[int]
    cut: bool


def view_bytes(images: int, answer: int) -> int:
    """The size of the file of a view in bytes."""
    return images * (answer + _CHECKSUM)


def refuse_size(spec: CacheFiles, views: int, images: int, answer: int) -> None:
    """Raise a `UserError` where the files would take more than a recipe allows.

    Args:
        answer: bytes of one, with its checksum.
    """
    size = views * images * answer / 1e9
    if size > spec.limit_gb:
        raise UserError(
            f"cache: {views} view{'s' * (views > 1)} of {images:,} images in {answer:,} bytes each take {size:.3g} GB, and "
            f"cache.limit_gb is {spec.limit_gb:g}; set it to {size * 1.01:.3g}, or take {spec.ways}"
        )


def read_index(folder: Path) -> Index:
    """Raises a `UserError` where a folder is no cache of this version."""
    path = folder / INDEX
    try:
        index = Index.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(
            f"{path} is no index of a cache ({'.'.join(map(str, fault['loc']))}: {fault['msg']}); give another folder"
        ) from None
    if index.format != _FORMAT:
        raise UserError(
            f"{path} has format {index.format}, and this version of compressvit reads {_FORMAT}; give another folder"
        )
    return index


class Store:
    """The rows of a cache.

    Args:
        folder: with an index.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        self._file: BinaryIO | None = None
        self._view = -1

    def path(self, view: int) -> Path:
        return self.folder / f"view-{view:05d}.bin"

    def read(self, view: int, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The answers to images of a view, uint8 (B, bytes), and which of them are there, bool (B,)."""
        file = self._opened(view)
        rows = np.zeros((len(places), self._row), dtype=np.uint8)
        there = np.zeros(len(places), dtype=bool)
        for i, place in enumerate(places):
            if place >= 0:
                file.seek(place * self._row)
                there[i] = file.readinto(rows[i]) == self._row and _sound(rows[i], view, place)  # type: ignore[attr-defined]
        return rows[:, :-_CHECKSUM], there

    def write(self, view: int, places: Sequence[int], answers: np.ndarray) -> None:
        """Keep answers, uint8 (B, bytes); not those whose place is negative."""
        file = self._opened(view)
        with disk_faults(self.path(view)):
            for place, answer in zip(places, answers, strict=True):
                if place >= 0:
                    file.seek(place * self._row)
                    file.write(answer.tobytes() + _checksum(answer, view, place).to_bytes(_CHECKSUM, "little"))

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._file is not None:
            sync(self.path(self._view))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._view = None, -1

    def verify(self) -> list[Verified]:
        """Compare every row of every view with its checksum. Raises a `UserError` where a view is no file that can be read."""
        found = []
        for path in views_in(self.folder):
            view, size = int(path.stem.partition("-")[2]), path.stat().st_size
            answers, damaged = 0, []
            with open_regular(path) as file:
                for place in range(min(self.index.images, size // self._row)):
                    row = np.frombuffer(file.read(self._row), dtype=np.uint8)
                    if _sound(row, view, place):
                        answers += 1
                    elif row.any():
                        damaged.append(place)
            found.append(Verified(path, answers, damaged, size != view_bytes(self.index.images, self.index.bytes)))
        return found

    @cached_property
    def _row(self) -> int:
        return self.index.bytes + _CHECKSUM

    def _opened(self, view: int) -> BinaryIO:
        """The file of a view, which has its full size from the beginning: where it is empty, most file systems store nothing."""
        if self._file is None or self._view != view:
            self.close()
            path, size = self.path(view), view_bytes(self.index.images, self.index.bytes)
            with disk_faults(path):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
                self._file, self._view = os.fdopen(handle, "r+b", buffering=0), view
                if os.fstat(handle).st_size != size:
                    os.ftruncate(handle, size)
        assert self._file is not None
        return self._file


def is_free(folder: Path) -> bool:
    """Whether a folder can become a cache: it is not there or empty, but for what a run that was killed has left of its index."""
    return not folder.exists() or (
        folder.is_dir() and all(fnmatch(path.name, f".{INDEX}.*.part") for path in folder.iterdir())
    )


def create(folder: Path, index: Index) -> None:
    """Make a folder a cache. Another run may do the same at this moment, and the index of the first one stays."""
    with disk_faults(folder / INDEX):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{INDEX}.{os.getpid()}.part"
        scratch.write_text(json.dumps(index.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        sync(scratch)
        try:
            os.link(scratch, folder / INDEX)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            put(scratch, folder / INDEX)
        scratch.unlink(missing_ok=True)


def clear(folder: Path) -> int:
    """Remove a cache, the index last, and its folder where nothing else is in it; returns how many bytes it had."""
    read_index(folder)
    files = [*views_in(folder), *folder.glob(f".{INDEX}.*.part"), folder / INDEX]
    size = sum(file.stat().st_size for file in files)
    with disk_faults(folder):
        for file in files:
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    return size


def views_in(folder: Path) -> list[Path]:
    """The files of views in a folder, in their order."""
    return sorted(path for path in folder.glob("view-*.bin") if re.fullmatch(r"view-\d{5,9}\.bin", path.name))


def caches_in(folder: Path) -> list[Path]:
    """A folder that is a cache, or those in it that are, each after those in itself.

    Raises:
        UserError: there are none.
    """
    if (folder / INDEX).is_file():
        return [*sorted(path.parent for path in folder.glob(f"{HELD_OUT}*/{INDEX}")), folder]
    found = sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    if not found:
        raise UserError(f"{folder} is no cache and has none in it (no {INDEX}); a run names its folder in run.log")
    return [inner for each in found for inner in caches_in(each)]


def _checksum(answer: np.ndarray, view: int, place: int) -> int:
    """CRC-32 of an answer at its place, never 0."""
    return zlib.crc32(answer.tobytes(), zlib.crc32(f"{view} {place}".encode())) or 1


def _sound(row: np.ndarray, view: int, place: int) -> bool:
    stored = int.from_bytes(row[-_CHECKSUM:].tobytes(), "little")
    return stored != 0 and stored == _checksum(row[:-_CHECKSUM], view, place)
