"""Image sets whose splits are text files: a line `PATH LABEL` per image, as VTAB-1k is commonly prepared.

FOLDER/train800.txt  FOLDER/val200.txt  FOLDER/train800val200.txt  FOLDER/test.txt
FOLDER/train.csv  FOLDER/val.tsv      are read, too, also with a first line that names the columns
FOLDER/images/…      PATH is relative to FOLDER, LABEL counts from 0; a space, a tab or a comma is between them
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from pathlib import Path

from compressvit.data.classes import missing_classes, read_names
from compressvit.data.data_set import data_set
from compressvit.data.files import SPECIAL, PictureFiles, lies_in
from compressvit.data.fractions import TEST, TRAIN, VALIDATION, parts_by_name
from compressvit.data.notes import counted
from compressvit.data.sets.base import existing_root
from compressvit.data.spec import Data
from compressvit.errors import UserError, nearest
from compressvit.notes import Note
from compressvit.reading import read_bytes

SUFFIXES = (".txt", ".csv", ".tsv")
LAYOUT = """expected FOLDER/SPLIT.txt, .csv or .tsv with a line `PATH LABEL` per image (PATH relative to FOLDER, LABEL from 0), as in a
prepared VTAB-1k:
  data.train_split=train800val200 data.val_split=test      (or train800 and val200, to choose hyper-parameters)"""
MOST_CLASSES = 1_000_000


@data_set(
    "lists", note="SPLIT.txt, .csv or .tsv with `PATH LABEL` lines, e.g. a prepared VTAB-1k", listed=True, parts=True
)
def open_lists(data: Data) -> tuple[PictureFiles, ...]:
    """The splits that `data` names; all have as many classes as the highest label of any says. With `data.val_fraction` that for validation
    is held out of the training split.

    Raises:
        UserError: no such folder or list, a line that cannot be read, or images that are not there.
    """
    root = existing_root(data, LAYOUT)
    _require_parts(root, data)
    named = {"train_split": data.train_split, "val_split": data.val_split, "test_split": data.test_split}
    if data.val_fraction is not None:
        del named["val_split"]
    lists = [_List(root, option, split, data) for option, split in named.items() if split is not None]
    parts, of_parts = [found.samples for found in lists], list[Note]()
    if data.val_fraction is not None:
        held_out, of_parts = _held_out(lists[0], data)
        parts[:1] = held_out
    labels = [target for part in parts for _, target in part]
    classes = data.num_classes or 1 + max(labels)
    names = [str(i) for i in range(classes)]
    if data.classes is not None:
        names = read_names(data.classes)
        if max(labels) >= len(names):
            raise UserError(
                f"data.classes={data.classes} has {len(names)} names, and the lists go up to label {max(labels)}"
            )
    how = (
        f"the names in {data.classes}"
        if data.classes
        else "data.num_classes"
        if data.num_classes
        else "highest label + 1"
    )
    notes = [Note("classes", len(names), f"{len(names):,} classes: {how}")]
    if 0 not in labels and max(labels) > 0:
        text = f"no image has label 0, and {counted(labels.count(1), 'image')} label 1: labels count from 0, and class 0 stays empty"
        notes.append(Note("empty_class_0", len(labels), text))
    else:
        notes += missing_classes(names, {names[label] for label in {*labels} if label < len(names)}, "both lists")
    notes += of_parts
    for found in lists:
        notes += found.notes()
    return (*(PictureFiles(part, names, [] if i else notes) for i, part in enumerate(parts)),)


def _require_parts(root: Path, data: Data) -> None:
    """Raise a `UserError` where the options of the parts of a set contradict each other, or the lists that are there."""
    if data.test_fraction is not None and data.val_fraction is None:
        raise UserError(
            f"data.test_fraction={data.test_fraction:g} is held out of the list that data.val_fraction splits; give that too, or a list: "
            "data.test_split=test"
        )
    if data.test_split is not None and data.test_split in (data.train_split, data.val_split):
        raise UserError(
            f"data.test_split={data.test_split} is another split too; figures at the end are honest of images of their own"
        )
    if data.val_fraction is not None and os.path.isfile(file := _file(root, data.val_split)):
        raise UserError(
            f"data.val_fraction={data.val_fraction:g}: there is a {file} already (data.val_split); leave val_fraction out"
        )


def _held_out(whole: _List, data: Data) -> tuple[list[list[tuple[str, int]]], list[Note]]:
    """The samples of a list by parts, of which the first is that to train on."""
    paths = [path.replace(os.sep, "/") for path in whole.listed]
    of_image, notes = parts_by_name(paths, [str(label) for _, label in whole.samples], data, whole.file.name)
    parts = [
        [sample for sample, part in zip(whole.samples, of_image, strict=True) if part == wanted]
        for wanted in (TRAIN, VALIDATION, TEST)
    ]
    return parts[: 2 if data.test_fraction is None else 3], notes


def _file(root: Path, split: str) -> Path:
    """The list of a split, which may be named with its extension.

    Raises:
        UserError: there are several.
    """
    if split.endswith(SUFFIXES):
        return root / split
    there = [file for suffix in SUFFIXES if os.path.isfile(file := root / f"{split}{suffix}")]
    if len(there) > 1:
        names = " and ".join(file.name for file in there)
        raise UserError(f"{root} has {names}: name the one that is meant with its extension, e.g. {there[0].name}")
    return there[0] if there else root / f"{split}.txt"


class _List:
    """The images of a split, each found to be there, and what was guessed about them; `listed` has the paths as the list writes them."""

    def __init__(self, root: Path, option: str, split: str, data: Data):
        self.file = _file(root, split)
        self._root, self._inside, self._outside = root, os.path.realpath(root), data.outside
        self._guessed: Counter[str] = Counter()
        self._header = ""
        if not os.path.isfile(self.file):
            there = sorted({path.stem for path in root.iterdir() if path.suffix in SUFFIXES})
            close = nearest(split, there)
            hint = f"did you mean {close}? " if close else ""
            raise UserError(
                f"data.{option}={split}: there is no {self.file}; {hint}lists there: {', '.join(there) or 'none'}; {LAYOUT}"
            )
        entries = self._entries()
        missing: list[str] = []
        self.listed = [os.path.normpath(path) for path, _ in entries]
        self.samples = [(self._existing(path, missing), label) for path, label in entries]
        if missing:
            raise UserError(
                f"{self.file}: {len(missing)} of its {len(entries)} images are not there, first {root / missing[0]}"
            )

    def _entries(self) -> list[tuple[str, int]]:
        try:
            lines = read_bytes(self.file).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file} is not UTF-8 text: {error}") from error
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        if len(numbered) > 1 and self.file.suffix != ".txt" and not numbered[0][1][-1].isdigit():
            self._header = numbered.pop(0)[1]
        entries = [self._entry(line, number) for number, line in numbered]
        if not entries:
            raise UserError(f"{self.file} lists no image; {LAYOUT}")
        return entries

    def _entry(self, line: str, number: int) -> tuple[str, int]:
        head = line.rstrip("0123456789")
        label, path = line[len(head) :], head.rstrip(" \t,")
        if not label or not path or path == head:
            raise UserError(
                f"{self.file}, line {number}: {_short(line)!r} is not `PATH LABEL` with a label from 0; {LAYOUT}"
            )
        if len(label.lstrip("0")) > len(str(MOST_CLASSES)) or int(label) >= MOST_CLASSES:
            raise UserError(
                f"{self.file}, line {number}: label {_short(label)} would make more than {MOST_CLASSES:,} classes; labels count from 0 "
                "without gaps"
            )
        if len(path) > 1 and path[0] == path[-1] == '"':  # as spreadsheets write a path with a comma
            path = path[1:-1]
        return path, int(label)

    def _existing(self, path: str, missing: list[str]) -> str:
        """The file that a list means, which may be stored under the other Unicode form of its name."""
        for form in dict.fromkeys((path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))):
            full = os.path.join(self._root, form)
            try:
                kind = stat.S_IFMT(os.stat(full).st_mode)
            except (OSError, ValueError):  # nothing there, too long for a path, or with a zero byte
                continue
            if kind in SPECIAL:
                raise UserError(f"{self.file}: {full} is {SPECIAL[kind]}, not an image")
            if kind == stat.S_IFREG:
                self._guessed["form"] += form != path
                self._check_inside(path, full)
                return full
        missing.append(_short(path, 200))
        return ""

    def _check_inside(self, path: str, full: str) -> None:
        written_inside = lies_in(os.path.normpath(full), os.path.normpath(self._root))
        if written_inside and lies_in(os.path.realpath(full), self._inside):
            return
        if self._outside is False or (self._outside is None and not written_inside):
            raise UserError(
                f"{self.file}: {_short(path, 200)} leads out of data.root={self._root}; data.outside=true reads such images, too"
            )
        self._guessed["outside"] += 1

    def notes(self) -> list[Note]:
        texts = {
            "form": "{} found under another Unicode form of the name in the list",
            "outside": f"{{}} read from outside {self._root}",
        }
        found = []
        if self._header:
            text = f"{self.file.name}: the first line, {_short(self._header)!r}, is taken for the names of columns"
            found.append(Note("header", 1, text))
        return found + [
            Note(
                kind if kind == "form" else "from_outside",
                count,
                f"{self.file.stem}: {texts[kind].format(counted(count))}",
            )
            for kind, count in self._guessed.items()
            if count
        ]


def _short(text: str, at_most: int = 80) -> str:
    return text if len(text) <= at_most else f"{text[:at_most]}…"
