"""`segmentation`: pictures and masks of classes, laid out as ADE20K (https://groups.csail.mit.edu/vision/datasets/ADE20K).

FOLDER/images/training/NAME.jpg with FOLDER/annotations/training/NAME.png, and likewise validation. The values of a mask are the classes of
the picture's pixels, 255 those of none. With `data.reduce_zero_label`, as ADE20K is meant, 0 is none, too, and 1 the first class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressvit.data.annotated import AnnotatedFiles
from compressvit.data.class_masks import MOST_CLASSES, MaskFile, NoClassError
from compressvit.data.classes import ORDERS, read_names
from compressvit.data.data_set import data_set
from compressvit.data.files import Found, Search
from compressvit.data.notes import counted
from compressvit.data.pictures import BrokenPicture
from compressvit.data.sets.base import TRAIN_FOLDERS, VAL_FOLDERS, evenly, existing_root, split_names
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.notes import Note
from compressvit.reading import Unreadable, read_text
from compressvit.tasks.overlap import IGNORED

IMAGES, MASKS, SUFFIX = "images", "annotations", ".png"
NAMES = "objectInfo150.txt"  # of ADE20K's scene parsing benchmark: a table whose first column is a number from 1 and the last a name
LOOKED_AT = 16  # masks of each split, whose values are looked at before anything is computed
LAYOUT = """expected, for each split,
  FOLDER/images/SPLIT/NAME.jpg with FOLDER/annotations/SPLIT/NAME.png, whose values are classes   (SPLIT: training, validation)"""


@data_set(
    "segmentation",
    note="pictures with masks of classes, laid out as ADE20K",
    task="segmentation",
    full_frame=True,
    listed=True,
)
def open_segmentation(data: Data) -> tuple[AnnotatedFiles, AnnotatedFiles]:
    """The two splits that `data` names. Of their masks a few are read.

    Raises:
        UserError: no such folder, no picture with a mask, more classes than a byte tells apart, or a mask with a value that is no class.
    """
    root = existing_root(data, LAYOUT)
    names = _names(root, data)
    classes = data.num_classes or (len(names) if names else None)
    if classes is not None and classes > MOST_CLASSES:
        raise UserError(
            f"data.num_classes={classes}: masks have one byte a pixel, and {IGNORED} is ignored, so there are up to {MOST_CLASSES}"
        )
    return (
        _open(root, data, "train_split", TRAIN_FOLDERS, names, classes),
        _open(root, data, "val_split", VAL_FOLDERS, names, classes),
    )


def _names(root: Path, data: Data) -> list[str] | None:
    """The classes that the recipe's file or ADE20K's own table names; None without either."""
    if data.classes is not None and data.classes not in ORDERS:
        return read_names(data.classes)
    table = root / NAMES
    if not table.is_file():
        return None
    try:
        rows = [line.split("\t") for line in read_text(table).splitlines()[1:] if line.strip()]
        named = {int(row[0]): row[-1].partition(";")[0].partition(",")[0].strip() for row in rows}
    except (Unreadable, ValueError) as error:
        raise UserError(f"{table} is no table of classes as ADE20K has it (number, …, name): {error}") from error
    if list(named) != list(range(1, len(named) + 1)):
        raise UserError(f"{table} is no table of classes as ADE20K has it: its numbers are not 1, 2, …")
    return list(named.values()) if data.reduce_zero_label else ["none of these", *named.values()]


def _open(
    root: Path, data: Data, option: str, usual: Sequence[str], names: list[str] | None, classes: int | None
) -> AnnotatedFiles:
    split: str = getattr(data, option)
    known = (name for name in split_names(split, usual) if (root / IMAGES / name).is_dir())
    name = next(known, None)
    if name is None:
        raise UserError(f"data.{option}={split}: there are no pictures of that split in {root / IMAGES}; {LAYOUT}")
    if not (root / MASKS / name).is_dir():
        raise UserError(
            f"data.root={data.root}: {root / IMAGES / name} is there, but no {root / MASKS / name}; {LAYOUT}"
        )
    pictures, masks = (
        Search(root / part / name, within=root, outside=data.outside is not False) for part in (IMAGES, MASKS)
    )
    by_stem = {_stem(found): found for found in masks.found if found.path.lower().endswith(SUFFIX)}
    samples, alone = [], []
    for found in pictures.found:
        mask = by_stem.pop(_stem(found), None)
        if mask is None:
            alone.append(found)
            continue
        file = MaskFile(mask.path, "/".join((MASKS, name, *mask.parts)), classes, data.reduce_zero_label)
        samples.append((found.path, file))
    if not samples:
        raise UserError(
            f"data.root={data.root}: none of {counted(len(pictures.found))} in {root / IMAGES / name} has a mask NAME{SUFFIX} in "
            f"{root / MASKS / name}; {LAYOUT}"
        )
    _look_at([file for _, file in samples], data)
    missing = [
        ("no_mask", alone, f"{{}} of {IMAGES}/{name} without a mask passed over"),
        ("no_image", list(by_stem.values()), f"{{}} of {MASKS}/{name} without a picture passed over"),
        (
            "other_masks",
            [found for found in masks.found if not found.path.lower().endswith(SUFFIX)],
            f"{{}} of {MASKS}/{name} in other formats than {SUFFIX} passed over",
        ),
    ]
    notes = [_passed_over(*entry) for entry in missing if entry[1]]
    return AnnotatedFiles(samples, names, [*pictures.notes(), *masks.notes(), *notes])


def _stem(found: Found) -> tuple[str, ...]:
    """The path of a file in its split, without its extension."""
    return (*found.parts[:-1], Path(found.parts[-1]).stem)


def _passed_over(kind: str, found: Sequence[Found], text: str) -> Note:
    noun = "picture" if kind == "no_mask" else "mask"
    return Note(kind, len(found), f"{text.format(counted(len(found), noun))}, first {'/'.join(found[0].parts)}")


def _look_at(files: Sequence[MaskFile], data: Data) -> None:
    """Raise a `UserError` where one of a few masks has a value that is no class: those of most others have then, too."""
    for i in evenly(len(files), LOOKED_AT):
        try:
            files[i].values()
        except NoClassError as error:
            way = (
                f"set data.num_classes to the number of classes, or change the value to {IGNORED}"
                if data.reduce_zero_label
                else f"set data.num_classes to the number of classes, data.reduce_zero_label=true if 0 is none and 1 the first of them, "
                f"or change the value to {IGNORED}"
            )
            raise UserError(f"data.name={data.name}: {str(error).removeprefix('its ')}; {way}") from error
        except BrokenPicture:
            continue  # counted when its picture is read
