"""`videos`: videos, or folders of frames, whose splits are lists (`compressvit.data.video_lists`).

FOLDER/train.csv  FOLDER/val.csv      as VideoMAE prepares Kinetics and Something-Something; .txt is read, too
FOLDER/…                              PATH is relative to FOLDER
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressvit.data.clips import ClipFiles
from compressvit.data.data_set import data_set
from compressvit.data.footage import require_decoder
from compressvit.data.sets.base import TRAIN_FOLDERS, VAL_FOLDERS, existing_root, split_names
from compressvit.data.spec import Data
from compressvit.data.video_lists import Videos, found_videos, read_entries, with_numbers
from compressvit.errors import UserError, nearest
from compressvit.notes import Note

SUFFIXES = (".csv", ".txt")
LAYOUT = """expected FOLDER/train.csv and FOLDER/val.csv with a line `PATH LABEL` per video (PATH relative to FOLDER, LABEL from 0), or \
lists as Kinetics and Something-Something have them; data.train_split and data.val_split name other lists"""


@data_set("videos", note="videos by lists, as Kinetics and Something-Something", listed=True, clips=True)
def open_videos(data: Data) -> tuple[ClipFiles, ClipFiles]:
    """The splits that `data` names; both have as many classes as any label says.

    Raises:
        UserError: no such folder or list, a line that cannot be read, no video that is there, or PyAV is missing.
    """
    root = existing_root(data, LAYOUT)
    parts = [
        _listed(root, data, option, usual)
        for option, usual in (("train_split", TRAIN_FOLDERS), ("val_split", VAL_FOLDERS))
    ]
    return sets_of(parts, data)


def sets_of(parts: Sequence[Videos], data: Data) -> tuple[ClipFiles, ClipFiles]:
    """The training and the validation set of two lists. Raises as `open_videos`."""
    for part in parts:
        require_decoder([path for path, _ in part.samples], str(part.file))
    (train, validation), names = with_numbers(parts, data)
    notes = [Note("classes", len(names), f"{len(names):,} classes, by the labels in the lists")]
    one = data.clip.model_copy(update={"views": 1, "crops": 1})  # calibration looks at images to train on
    return (
        ClipFiles(train, names, [*notes, *parts[0].notes()], one),
        ClipFiles(validation, names, parts[1].notes(), data.clip),
    )


def _listed(root: Path, data: Data, option: str, usual: Sequence[str]) -> Videos:
    split: str = getattr(data, option)
    stems = [split.removesuffix(suffix) for suffix in SUFFIXES if split.endswith(suffix)] or split_names(split, usual)
    file = next((path for stem in stems for suffix in SUFFIXES if (path := root / f"{stem}{suffix}").is_file()), None)
    if file is None:
        there = sorted({path.stem for path in root.iterdir() if path.suffix in SUFFIXES})
        close = nearest(split, there)
        hint = f"did you mean {close}? " if close else ""
        raise UserError(
            f"data.{option}={split}: there is no {root / stems[0]}.csv or .txt; {hint}lists there: {', '.join(there) or 'none'}; {LAYOUT}"
        )
    return found_videos(file, read_entries(file), root, data)
