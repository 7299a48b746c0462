"""Lists of videos with their classes, as they are prepared for Kinetics, Something-Something and others.

| a line | of |
| --- | --- |
| `PATH LABEL`, with a space, tab, comma or semicolon between | VideoMAE's train.csv and val.csv; LABEL counts from 0 |
| `PATH FRAMES LABEL` | TSN's and TSM's lists of folders of frames; FRAMES is not needed |
| `PATH;text`, with a comma or semicolon | Something-Something V1; the texts are the classes |
| `label,youtube_id,time_start,time_end,split` in the first | Kinetics' own; a video is [SPLIT/][LABEL/]ID_000012_000022.mp4 |

A PATH may leave out the extension.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compressvit.data.classes import ORDERS, composed, numbers_of, read_names, some_of
from compressvit.data.files import SPECIAL, lies_in, natural_key
from compressvit.data.footage import SUFFIXES
from compressvit.data.notes import counted
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.notes import Note
from compressvit.reading import Unreadable, read_text

MOST_CLASSES = 1_000_000
_KINETICS = ("label", "youtube_id", "time_start", "time_end")
_SHOWN = 80  # characters of a line in a message


@dataclass(frozen=True)
class Entry:
    """A line of a list: where the video may be, relative to the root, and the number or the name of its class."""

    paths: tuple[str, ...]
    label: int | str


@dataclass
class Videos:
    """The videos of a split that are there.

    Attributes:
        file: the list, for messages.
        samples: path and label of each.
        missing: what the list has, and is not there.
    """

    file: Path
    samples: list[tuple[str, int | str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    outside: int = 0

    def notes(self) -> list[Note]:
        """What was passed over, and what was read from elsewhere."""
        found = []
        if self.missing:
            of = len(self.missing) + len(self.samples)
            first = _short(self.missing[0])
            text = f"{self.file.name}: {len(self.missing):,} of its {counted(of, 'video')} not there, passed over, first {first}"
            found.append(Note("missing_videos", len(self.missing), text))
        if self.outside:
            text = f"{self.file.name}: {counted(self.outside, 'video')} read from outside data.root"
            found.append(Note("from_outside", self.outside, text))
        return found


def read_entries(file: Path) -> list[Entry]:
    """The lines of a list, in any of the forms above.

    Raises:
        UserError: it cannot be read, lists nothing, or has a line of no such form.
    """
    try:
        lines = read_text(file).lstrip("\ufeff").splitlines()
    except Unreadable as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if lines and {*_KINETICS} <= {*(name.strip().strip('"') for name in lines[0].split(","))}:
        entries = _of_kinetics(lines, file)
    else:
        entries = [_entry(line.strip(), file, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise UserError(f"{file} lists no video; a line is `PATH LABEL`")
    return entries


def _entry(line: str, file: Path, number: int) -> Entry:
    path, label = _split(line)
    label = label.strip().strip('"')
    if not path or not label or label.startswith("-"):
        raise UserError(
            f"{file}, line {number}: {_short(line)!r} is not `PATH LABEL` with a label from 0, or `PATH;class`"
        )
    if not label.isdecimal():
        return Entry((path,), label)
    if int(label) >= MOST_CLASSES:
        raise UserError(
            f"{file}, line {number}: label {label[:20]} would make more than {MOST_CLASSES:,} classes; labels count from 0 without gaps"
        )
    return Entry((path,), int(label))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _split(line: str) -> tuple[str, str]:
    """Path and label, between which a semicolon, tab, comma or space is, and maybe a number of frames."""
    if ";" in line:
        path, _, label = line.partition(";")
    elif "\t" in line:
        path, _, label = line.rpartition("\t")
    elif re.search(r",\s*\d+$", line) or (" " not in line and "," in line):
        path, _, label = line.rpartition(",")
    elif re.search(r"\s\d+$", line):
        path, label = line.rsplit(maxsplit=1)
    else:
        path, _, label = line.rpartition(",")
    path = path.strip()
    if match := re.fullmatch(r"(\S+)[\s,]+\d+", path):  # a number of frames
        path = match[1]
    return path.strip('"'), label


def _of_kinetics(lines: Sequence[str], file: Path) -> list[Entry]:
    entries: list[Entry] = []
    rows = csv.DictReader(lines)
    try:
        entries += map(_clip, rows)
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError, csv.Error) as error:
        number = rows.line_num + isinstance(error, csv.Error)  # which is of the line after the last that was read
        reason = "it has fewer fields" if isinstance(error, (AttributeError, TypeError)) else str(error)
        raise UserError(
            f"{file}, line {number} is not {','.join(_KINETICS)} as Kinetics' own lists have it: {reason}"
        ) from error
    return entries


def _clip(row: dict[str, str]) -> Entry:
    label, start, end = row["label"].strip(), int(float(row["time_start"])), int(float(row["time_end"]))
    name = f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}"
    split = (row.get("split") or "").strip()
    folders = [[split, label], [split, label.replace(" ", "_")], [split], [label], [label.replace(" ", "_")], []]
    return Entry(tuple(dict.fromkeys("/".join([*filter(None, folder), name]) for folder in folders)), label)


def found_videos(file: Path, entries: Sequence[Entry], root: Path, data: Data) -> Videos:
    """Those of a list that are there.

    Raises:
        UserError: none is, one is a pipe or a device, which would block, or one lies outside of the root and may not (`data.outside`).
    """
    videos = Videos(file)
    for entry in entries:
        path = next((path for name in entry.paths for path in _forms(root, name) if os.path.exists(path)), None)
        if path is None:
            videos.missing.append(entry.paths[0])
            continue
        if what := SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode)):
            raise UserError(f"{file}: {path} is {what}, not a video")
        videos.outside += _is_outside(path, root, file, data)
        videos.samples.append((path, entry.label))
    if not videos.samples:
        first = root / _short(entries[0].paths[0])
        raise UserError(
            f"{file}: none of its {counted(len(entries), 'video')} is there, first {first}; paths are relative to data.root"
        )
    return videos


def _forms(root: Path, name: str) -> Iterator[str]:
    """Where a video of that name may be: there, or with an extension."""
    whole = os.path.join(root, name)
    yield whole
    for suffix in SUFFIXES:
        yield whole + suffix


def _is_outside(path: str, root: Path, file: Path, data: Data) -> bool:
    """Whether a video lies outside of the root; raises a `UserError` where it may not."""
    written = lies_in(os.path.normpath(path), os.path.normpath(root))
    if written and lies_in(os.path.realpath(path), os.path.realpath(root)):
        return False
    if data.outside is False or (data.outside is None and not written):
        raise UserError(f"{file}: {path} lies outside of data.root={root}; data.outside=true reads such videos, too")
    return True


def with_numbers(parts: Sequence[Videos], data: Data) -> tuple[list[list[tuple[str, int]]], list[str]]:
    """The samples of every part with the numbers of their classes, and the names of these.

    Raises:
        UserError: `data.classes` does not have a class, or not as many as the labels say.
    """
    labels = [label for part in parts for _, label in part.samples]
    given = read_names(data.classes) if data.classes is not None and data.classes not in ORDERS else None
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        names = given or [str(i) for i in range(data.num_classes or 1 + max(numbers))]
        if given is not None and max(numbers) >= len(given):
            raise UserError(
                f"data.classes={data.classes} has {len(given)} names, and the lists go up to label {max(numbers)}"
            )
        return [[(path, int(label)) for path, label in part.samples] for part in parts], names
    texts = {composed(str(label)) for label in labels}
    names = given or sorted(texts, key=lambda text: (natural_key(text), text))
    known = numbers_of(names)
    if strange := sorted(texts - known.keys()):
        raise UserError(
            f"data.classes={data.classes}: {counted(len(strange), 'class')} of the lists not among its names: {some_of(strange)}"
        )
    return [[(path, known[composed(str(label))]) for path, label in part.samples] for part in parts], names
