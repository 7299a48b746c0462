"""Image files: a data set of paths, and the search for them in a folder, in which everything that is passed over is counted."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from compressvit.data.bands import SUFFIX, Picture
from compressvit.data.notes import counted
from compressvit.data.pictures import EXTENSIONS, read_picture
from compressvit.errors import UserError
from compressvit.notes import Note

# What a path may be that is neither a folder nor a file.
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# File systems in which the kernel shows itself; from /proc, links lead to every file of every process.
_KERNELS = ("/proc", "/sys")


class PictureFiles(Dataset):
    """Files with their targets: `samples` holds (path, target), and an item is (PIL image of 8 bits a channel, or `Bands`, target).

    Attributes:
        classes: names in target order; None in a set without classes.
        notes: what was passed over or guessed while the files were found.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], classes: list[str] | None, notes: Sequence[Note] = ()):
        self.samples, self.classes, self.notes = list(samples), classes, list(notes)
        self.targets = torch.tensor([target for _, target in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        path, target = self.samples[index]
        return read_picture(path)[0], target


class Found(NamedTuple):
    """An image file: its path, and the same in parts, relative to the folder that was searched."""

    path: str
    parts: tuple[str, ...]


class _Folder(NamedTuple):
    path: str
    parts: tuple[str, ...]
    outside: bool


class Search:
    """All image files below a folder, in natural order of their paths: 2 before 10, ignoring case.

    A folder is searched once: at its own place where that is inside, else at the first link to it. So no link makes a loop or counts a
    image twice.

    Args:
        root: the folder.
        within: the folder of the data set. What lies outside it is counted, and with `outside` false passed over.
        leave_out: names directly in `root` that are not searched.
        arrays: take `.npy` files, too; None: where there are no pictures (beside pictures they are mostly features, depths or labels).

    Attributes:
        found: the files.
        folders: names of the folders directly in `root`.

    Raises:
        UserError: a file with the name of an image is a pipe or a device, which would block, or a folder belongs to the kernel.
    """

    def __init__(
        self,
        root: Path,
        *,
        within: Path,
        outside: bool = True,
        leave_out: Sequence[str] = (),
        arrays: bool | None = None,
    ):
        self.root = str(root)
        self.found: list[Found] = []
        self.folders: list[str] = []
        self._within, self._outside, self._leave_out = os.path.realpath(within), outside, frozenset(leave_out)
        self._entered: set[tuple[int, int]] = set()
        self._links: list[_Folder] = []
        self._from_outside = 0
        self._arrays: list[tuple[Found, bool]] = []  # with whether they lie outside
        self._other_types: Counter[str] = Counter()
        self._passed_over: dict[str, list[str]] = {kind: [] for kind in ("again", "outside", "dangling", "unreadable")}
        from_outside = not lies_in(os.path.realpath(root), self._within)
        if from_outside and not outside:
            raise UserError(f"data.outside=false: {root} is a link out of {within}; set data.outside=true")
        self._search(_Folder(self.root, (), from_outside))
        while self._links:
            links, self._links = sorted(self._links, key=lambda link: _order(link.parts)), []
            for link in links:
                self._search(link)
        if arrays or (arrays is None and not self.found):
            self.found += [found for found, _ in self._arrays]
            self._from_outside += sum(outside for _, outside in self._arrays)
            self._arrays = []
        self.found.sort(key=lambda found: _order(found.parts))

    def _search(self, start: _Folder) -> None:
        """A folder and all below it; links to folders are kept for later."""
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            name = "/".join(folder.parts)
            try:
                status = os.stat(folder.path)
                entries = list(os.scandir(folder.path))
            except OSError:
                self._passed_over["unreadable"].append(name)
                continue
            if (status.st_dev, status.st_ino) in self._entered:
                self._passed_over["again"].append(name)
                continue
            self._entered.add((status.st_dev, status.st_ino))
            if any(lies_in(os.path.realpath(folder.path), kernels) for kernels in _KERNELS):
                raise UserError(f"{folder.path} is a folder of the operating system, not of pictures; remove it")
            for entry in entries:
                parts = (*folder.parts, entry.name)
                if len(parts) > 1 or entry.name not in self._leave_out:
                    self._take(entry, _Folder(entry.path, parts, folder.outside), waiting)

    def _take(self, entry: os.DirEntry[str], here: _Folder, waiting: list[_Folder]) -> None:
        is_link = entry.is_symlink()
        try:
            kind = stat.S_IFMT(os.stat(entry.path).st_mode) if is_link else _kind(entry)
        except OSError:  # it leads nowhere, or to itself
            self._passed_over["dangling"].append("/".join(here.parts))
            return
        if is_link and not lies_in(os.path.realpath(entry.path), self._within):
            here = here._replace(outside=True)
            if not self._outside:
                self._passed_over["outside"].append("/".join(here.parts))
                return
        if kind == stat.S_IFDIR:
            (self._links if is_link else waiting).append(here)
            if len(here.parts) == 1:
                self.folders.append(entry.name)
            return
        extension = os.path.splitext(entry.name)[1].lower()
        if extension == SUFFIX and kind not in SPECIAL:
            self._arrays.append((Found(entry.path, here.parts), here.outside))
            return
        if extension not in EXTENSIONS:
            self._other_types[extension or "no extension"] += 1
            return
        if kind in SPECIAL:
            raise UserError(f"{entry.path} is {SPECIAL[kind]}, not an image; remove it")
        self.found.append(Found(entry.path, here.parts))
        self._from_outside += here.outside

    def notes(self) -> list[Note]:
        """What was passed over, and what was read from elsewhere."""
        where = os.path.basename(self.root)
        kinds = {
            "again": "{} to folders that are found elsewhere; their images count once",
            "outside": f"{{}} out of {self._within}, passed over (data.outside=false)",
            "dangling": "{} to nothing, passed over",
            "unreadable": "{} that cannot be read, passed over",
        }
        notes = []
        if self._from_outside:
            text = f"{where}: {counted(self._from_outside)} read by links from outside {self._within}"
            notes.append(Note("from_outside", self._from_outside, f"{text} (data.outside=false passes them over)"))
        if count := self._other_types.total():
            most = sorted(self._other_types.items(), key=lambda item: (-item[1], item[0]))
            types = ", ".join(f"{n:,} {extension}" for extension, n in most[:5])
            more = f", … ({len(self._other_types)} types)" if len(self._other_types) > 5 else ""
            text = f"{where}: {counted(count, 'file')} of types that are not read, passed over: {types}{more}"
            notes.append(Note("other_types", count, text))
        if self._arrays:
            text = f"{where}: {counted(len(self._arrays), 'array')} ({SUFFIX}) passed over; data.arrays=true takes them beside pictures"
            notes.append(Note("arrays", len(self._arrays), text))
        for kind, names in self._passed_over.items():
            if names:
                noun = "folder" if kind == "unreadable" else "link"
                text = kinds[kind].format(counted(len(names), noun))
                notes.append(Note(kind, len(names), f"{where}: {text}, first {min(names)}"))
        return notes


def natural_key(text: str) -> list[str | int]:
    """A sort key in which 2 comes before 10 and case is ignored; the order of timm's readers."""
    pieces = re.split(r"(\d+)", text.lower())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def _order(parts: Sequence[str]) -> tuple[list[str | int], Sequence[str]]:
    return natural_key("/".join(parts)), parts


def _kind(entry: os.DirEntry[str]) -> int:
    """The file type of what is not a link, mostly known without asking the disk."""
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)


def lies_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or below it, as both are written."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
