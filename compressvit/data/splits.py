"""A training or validation split of class folders or tar files, before its classes are numbered."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, extract_tarinfos
from torch.utils.data import Dataset

from compressvit.data.bands import SUFFIX
from compressvit.data.classes import composed, numbers_of, some_of
from compressvit.data.files import PictureFiles, Search
from compressvit.data.notes import counted
from compressvit.data.pictures import EXTENSIONS
from compressvit.data.sets.base import LAYOUT
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.notes import Note

_TYPES = ", ".join((*EXTENSIONS, SUFFIX))


@dataclass
class Split:
    """A split before its classes are numbered.

    Attributes:
        labels: the class name of each image.
        files: the paths of the images, or the tar files that contain them.
        paths: of images that are files, relative to the folder of the split, parts separated by `/`.
    """

    name: str
    labels: list[str]
    files: list[str] | Tars
    notes: list[Note]
    paths: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, root: Path, data: Data, *, leave_out: Sequence[str] = ()) -> Split:
        """The split at a path; `leave_out` are names directly in it that are none of its classes."""
        if path.is_file() or any(path.glob("*.tar")):
            return cls._of_tars(path, data.arrays)
        search = Search(path, within=root, outside=data.outside is not False, leave_out=leave_out, arrays=data.arrays)
        if not search.found:
            raise UserError(f"{path}: no images ({_TYPES}) can be found in it; {LAYOUT}")
        if direct := next((found for found in search.found if len(found.parts) == 1), None):
            raise UserError(
                f"{path}: images lie directly in it rather than in one folder per class, e.g. {direct.parts[0]}; {LAYOUT}"
            )
        notes = search.notes()
        if empty := sorted({*search.folders} - {found.parts[0] for found in search.found}):
            text = f"{path.name}: {counted(len(empty), 'folder')} without an image, which are therefore not classes: {some_of(empty)}"
            notes.append(Note("empty_folders", len(empty), text))
        if deeper := [found for found in search.found if len(found.parts) > 2]:
            first = "/".join(deeper[0].parts)
            text = f"{path.name}: {counted(len(deeper))} in subfolders of class folders, which belong to the class, e.g. {first}"
            notes.append(Note("deeper", len(deeper), text))
        labels = [found.parts[0] for found in search.found]
        paths = ["/".join(found.parts) for found in search.found]
        return cls(path.name, labels, [found.path for found in search.found], notes, paths)

    @classmethod
    def _of_tars(cls, path: Path, arrays: bool | None) -> Split:
        """Arrays are taken as `Search` takes them."""
        wanted = [(*EXTENSIONS, SUFFIX)] if arrays else [EXTENSIONS] if arrays is False else [EXTENSIONS, (SUFFIX,)]
        for extensions in wanted:
            try:
                tars = Tars(path, extensions)
                break
            except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:
                if extensions == wanted[-1]:
                    raise UserError(f"{path}: no images ({_TYPES}) can be found in it; {LAYOUT}") from error
        if "" in tars.labels:
            raise UserError(f"{path}: images lie directly in it rather than in one folder per class; {LAYOUT}")
        return cls(path.name.removesuffix(".tar"), tars.labels, tars, [])

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(self.labels))

    def part(self, chosen: Sequence[bool]) -> Split:
        """The chosen images, which are files, without notes."""
        assert not isinstance(self.files, Tars)
        labels, files, paths = (list(compress(of, chosen)) for of in (self.labels, self.files, self.paths))
        return Split(self.name, labels, files, [], paths)

    def data_set(self, order: list[str], notes: list[Note]) -> Dataset:
        numbers = numbers_of(order)
        targets = [numbers[composed(label)] for label in self.labels]
        if isinstance(self.files, Tars):
            return self.files.data_set(targets, order)
        return PictureFiles(list(zip(self.files, targets, strict=True)), order, notes)


class Tars(ReaderImageInTar):
    """timm's reader of tar files, for files with these extensions. In a single tar file, the classes are the folders of the first level
    that has more than one. Of several tar files, each is a class, or the innermost folders in them are."""

    def __init__(self, path: Path, extensions: Sequence[str]):
        self.root = str(path)
        # timm's index of large tars is a pickle
        found = extract_tarinfos(self.root, cache_tarinfo=False, extensions=set(extensions))
        self.samples, self.targets, self.class_name_to_idx, tarfiles = found
        self.root_is_tar = len(tarfiles) == 1 and tarfiles[0][0] is None
        self.tar_state = tarfiles[0][1] if self.root_is_tar else dict(tarfiles)
        self.cache_tarfiles = False  # open tar files must not be shared with forked workers
        names = {number: name for name, number in self.class_name_to_idx.items()}
        self.labels = [names[int(target)] for target in self.targets]
        if self.root_is_tar and all(child is None for _, _, child in self.samples):
            self.labels = _first_level([info.path for info, _, _ in self.samples])

    def data_set(self, targets: list[int], order: list[str]) -> ImageDataset:
        self.targets = np.array(targets)
        self.class_name_to_idx = {name: number for number, name in enumerate(order)}
        return ImageDataset(self.root, reader=self)


def _first_level(paths: Sequence[str]) -> list[str]:
    """The class of each path: its first folder after those that all paths have in common."""
    folders = [[part for part in path.split("/")[:-1] if part not in ("", ".")] for path in paths]
    while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        folders = [parts[1:] for parts in folders]
    return [parts[0] if parts else "" for parts in folders]
