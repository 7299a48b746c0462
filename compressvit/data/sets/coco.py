"""`coco`: pictures with boxes and masks, in COCO's format (https://cocodataset.org/#format-data).

FOLDER/annotations/instances_train2017.json with FOLDER/train2017/*.jpg, or FOLDER/train.json with FOLDER/train/*.jpg; likewise for the
other split. Classes are the categories in the order of their ids, whatever these are.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressvit.data.annotated import AnnotatedFiles, Annotation
from compressvit.data.data_set import data_set
from compressvit.data.files import lies_in
from compressvit.data.notes import counted
from compressvit.data.outlines import FAULTS, BadOutline, Outline, Outlines, read_outline
from compressvit.data.sets.base import TRAIN_FOLDERS, VAL_FOLDERS, existing_root, split_names
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.notes import Note
from compressvit.reading import Unreadable, parse_json, read_text

_MOST_PIXELS, _LONGEST_SIDE = 2**32 - 1, 2**27  # of a picture: pycocotools counts in 32 bits, and in fifths of a pixel
MOST_BYTES = 2**30  # of annotations: COCO's largest file has 450 MB
LAYOUT = """expected, for each split,
  FOLDER/annotations/instances_SPLIT2017.json with FOLDER/SPLIT2017/*.jpg   (or without 2017)
  FOLDER/SPLIT.json with FOLDER/SPLIT/*.jpg"""


@data_set(
    "coco", note="pictures with boxes and masks, in COCO's format", task="detection", full_frame=True, listed=True
)
def open_coco(data: Data) -> tuple[AnnotatedFiles, AnnotatedFiles]:
    """The two splits that `data` names.

    Raises:
        UserError: no such folder or file, pictures that are not there, or annotations that do not fit them.
    """
    root = existing_root(data, LAYOUT)
    return (
        _open(root, data, "train_split", data.train_split, TRAIN_FOLDERS),
        _open(root, data, "val_split", data.val_split, VAL_FOLDERS),
    )


def _open(root: Path, data: Data, option: str, split: str, usual: Sequence[str]) -> AnnotatedFiles:
    file, folder = _place(root, data, option, split, usual)
    try:
        content = parse_json(read_text(file, most=MOST_BYTES), file)
    except Unreadable as error:
        raise UserError(str(error)) from error
    return _Annotations(file, content).read(root, folder, outside=data.outside is True)


def _place(root: Path, data: Data, option: str, split: str, usual: Sequence[str]) -> tuple[Path, Path]:
    """The file of a split's annotations and the folder of its pictures."""
    for name in split_names(split, usual):
        for year in ("", "2017"):
            files = [root / f"{name}{year}.json", root / "annotations" / f"instances_{name}{year}.json"]
            folders = [root / f"{name}{year}", root / "images" / f"{name}{year}"]
            file = next((path for path in files if path.is_file()), None)
            if file is None:
                continue
            folder = next((path for path in folders if path.is_dir()), None)
            if folder is None:
                raise UserError(
                    f"data.root={data.root}: {file} is there, but no folder {folders[0]} with its pictures; {LAYOUT}"
                )
            return file, folder
    raise UserError(f"data.{option}={split}: there are no annotations of that split in {root}; {LAYOUT}")


class _Annotations:
    """The content of a file of annotations, checked as it is read."""

    def __init__(self, file: Path, content: Any):
        self.file, self.content = file, content
        self.passed_over: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def read(self, root: Path, folder: Path, *, outside: bool) -> AnnotatedFiles:
        """The pictures in `folder` with their annotations."""
        categories = self._by_id("categories")
        labels = {number: label for label, number in enumerate(sorted(categories))}
        names = [str(categories[number].get("name", number)) for number in labels]
        images = self._by_id("images")
        objects: dict[int, list[tuple[Any, int, bool, Outline | None]]] = {number: [] for number in images}
        for annotation in self._annotations():
            number = annotation.get("image_id")
            if not isinstance(number, int) or number not in objects:
                self._pass_over("no_image", annotation)
                continue
            box = self._box(annotation, images[number])
            if box is not None:
                crowd = bool(annotation.get("iscrowd", 0))
                outline = self._outline(annotation, images[number])
                objects[number].append((box, self._label(annotation, labels), crowd, outline))
                if crowd:
                    self._pass_over("crowd", annotation)
        samples = []
        for number, image in images.items():
            boxes, classes, crowds, outlines = zip(*objects[number], strict=True) if objects[number] else ((),) * 4
            known = Outlines(outlines if any(outlines) else ())
            truth = Annotation(self._size(image), boxes, classes, crowds, known)
            samples.append((self._path(image, root, folder, outside), truth))
        if not any(truth.outlines for _, truth in samples):
            del self.passed_over["no_mask"]  # of a file without masks that is no fault
        self._require_pictures([path for path, _ in samples])
        empty = sum(not found.labels for _, found in samples)
        notes = [
            Note(
                "classes",
                len(names),
                f"{len(names):,} classes: the categories of {self.file.name} in order of their ids"
                if len(names) > 1
                else f"one class: {names[0]}, the category of {self.file.name}",
            )
        ]
        if list(labels) != list(range(1, len(labels) + 1)):
            first = ", ".join(f"{number} is class {label}" for number, label in list(labels.items())[:3])
            notes.append(
                Note(
                    "category_ids",
                    len(labels),
                    f"category ids of {self.file.name} are not 1 to {len(labels)}: {first}, …",
                )
            )
        if empty:
            notes.append(
                Note("without_boxes", empty, f"{counted(empty)} of {self.file.name} without a box: background alone")
            )
        return AnnotatedFiles(samples, names, [*notes, *self._notes()])

    def _list(self, key: str) -> list[Mapping[str, Any]]:
        found = self.content.get(key) if isinstance(self.content, Mapping) else None
        if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
            raise UserError(
                f"{self.file}: it has no list '{key}' of objects, as COCO's format has (images, annotations, categories)"
            )
        return found

    def _by_id(self, key: str) -> dict[int, Mapping[str, Any]]:
        found: dict[int, Mapping[str, Any]] = {}
        for entry in self._list(key):
            number = entry.get("id")
            if not isinstance(number, int) or isinstance(number, bool):
                raise UserError(
                    f"{self.file}: an entry of '{key}' has the id {number!r:.50}, which is not a whole number"
                )
            if number in found:
                raise UserError(f"{self.file}: two entries of '{key}' have the id {number}")
            found[number] = entry
        if not found:
            raise UserError(f"{self.file}: its list '{key}' is empty")
        return found

    def _annotations(self) -> Iterator[Mapping[str, Any]]:
        seen: set[Any] = set()
        for annotation in self._list("annotations"):
            number = annotation.get("id")
            if isinstance(number, int):
                if number in seen:
                    self._pass_over("same_id", annotation)
                seen.add(number)
            yield annotation

    def _label(self, annotation: Mapping[str, Any], labels: Mapping[int, int]) -> int:
        number: Any = annotation.get("category_id")
        if not isinstance(number, int) or number not in labels:
            raise UserError(
                f"{self.file}: annotation {annotation.get('id')} is of category {number!r:.50}, which is none of its categories "
                f"({min(labels)} to {max(labels)})"
            )
        return labels[number]

    def _side(self, image: Mapping[str, Any], key: str) -> int:
        value = image.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LONGEST_SIDE:
            raise UserError(
                f"{self.file}: image {image.get('id')} has the {key} {value!r:.50}, which is not a number of pixels from 1 to "
                f"{_LONGEST_SIDE:,}"
            )
        return value

    def _size(self, image: Mapping[str, Any]) -> tuple[int, int]:
        height, width = self._side(image, "height"), self._side(image, "width")
        if height * width > _MOST_PIXELS:
            raise UserError(
                f"{self.file}: image {image.get('id')} has {width}×{height} pixels; pictures of up to {_MOST_PIXELS:,} are read"
            )
        return height, width

    def _box(self, annotation: Mapping[str, Any], image: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
        """(x0, y0, x1, y1) within the image; None where nothing is left of it."""
        box: Any = annotation.get("bbox")
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(side, (int, float)) for side in box)
        if not numbers or not all(math.isfinite(side) for side in box):
            raise UserError(
                f"{self.file}: annotation {annotation.get('id')} has the bbox {box!r:.60}, which is not [x, y, width, height] in pixels"
            )
        x, y, across, down = map(float, box)
        if across <= 0 or down <= 0:
            self._pass_over("no_area", annotation)
            return None
        height, width = self._size(image)
        clipped = (max(0.0, x), max(0.0, y), min(float(width), x + across), min(float(height), y + down))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self._pass_over("outside", annotation)
            return None
        if min(x, y) < -1 or x + across > width + 1 or y + down > height + 1:  # a pixel is rounding
            self._pass_over("clipped", annotation)
        return clipped

    def _outline(self, annotation: Mapping[str, Any], image: Mapping[str, Any]) -> Outline | None:
        """Where the object is; None where that is not said, or not in a way that can be drawn: its box is used all the same."""
        given: Any = annotation.get("segmentation")
        if given is None or given == []:
            self._pass_over("no_mask", annotation)
            return None
        try:
            outline, around = read_outline(given, self._size(image))
        except BadOutline as fault:
            self._pass_over(f"mask_{fault}", annotation)
            return None
        x, y, across, down = annotation["bbox"]
        if x - around[0] > 1 or y - around[1] > 1 or around[2] - x - across > 1 or around[3] - y - down > 1:
            self._pass_over("mask_outside", annotation)
        return outline

    def _path(self, image: Mapping[str, Any], root: Path, folder: Path, outside: bool) -> str:
        name = image.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"{self.file}: image {image.get('id')} has the file_name {name!r:.60}")
        path = folder / name
        if not outside and not lies_in(os.path.normpath(path), os.path.normpath(root)):
            raise UserError(
                f"{self.file}: image {image.get('id')} is {name}, outside {root}; set data.outside=true if that is meant"
            )
        return str(path)

    def _require_pictures(self, paths: Sequence[str]) -> None:
        absent = [path for path in paths if not os.path.isfile(path)]
        if absent:
            raise UserError(
                f"{self.file}: {len(absent):,} of its {len(paths):,} pictures are not there, first {absent[0]}"
            )

    def _pass_over(self, kind: str, annotation: Mapping[str, Any]) -> None:
        self.passed_over[kind] += 1
        self.examples.setdefault(kind, str(annotation.get("id")))

    def _notes(self) -> list[Note]:
        return [
            Note(
                kind,
                count,
                text.format(n=f"{count:,} box" + "es" * (count > 1), first=self.examples[kind], file=self.file.name),
            )
            for kind, text in _PASSED_OVER.items()
            if (count := self.passed_over[kind])
        ]


_PASSED_OVER = {
    "no_image": "{n} of images that {file} does not list were passed over, first annotation {first}",
    "no_area": "{n} of {file} without an area were passed over, first annotation {first}",
    "outside": "{n} of {file} outside their images were passed over, first annotation {first}",
    "clipped": "{n} of {file} reach out of their images and were cut at the edge, first annotation {first}",
    "crowd": "{n} of {file} of crowds: nothing is learned from them, and what is found in them counts neither as right nor as wrong",
    "same_id": "{n} of {file} whose id another has, first {first}; all were kept",
    "no_mask": "{n} of {file} have no segmentation, so that no mask of theirs is learned or judged, first annotation {first}",
    **{
        f"mask_{kind}": f"{{n}} of {{file}} have {text}, so that no mask of theirs is learned or judged, first annotation {{first}}"
        for kind, text in FAULTS.items()
    },
    "mask_outside": "{n} of {file} have a mask that reaches out of the box by more than a pixel, first annotation {first}; both were kept",
}
