"""`hmdb51`: HMDB51 as it is published (https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database), or laid out like it.

FOLDER/CLASS/NAME.avi                                         or FOLDER/videos/CLASS/NAME.avi
FOLDER/testTrainMulti_7030_splits/CLASS_test_split1.txt       lines `NAME.avi 1` (to train on), 2 (to test on), 0 (neither)
"""

from __future__ import annotations

import re
from pathlib import Path

from compressvit.data.clips import ClipFiles
from compressvit.data.data_set import data_set
from compressvit.data.sets.base import existing_root
from compressvit.data.sets.videos import sets_of
from compressvit.data.spec import Data
from compressvit.data.video_lists import Entry, found_videos
from compressvit.errors import UserError
from compressvit.reading import Unreadable, read_text

SPLITS = "testTrainMulti_7030_splits"
USUAL = "split1"
TRAIN, TEST, NEITHER = "1", "2", "0"
LAYOUT = f"""expected FOLDER/CLASS/NAME.avi and FOLDER/{SPLITS}/CLASS_test_split1.txt with lines `NAME.avi 1`; \
data.train_split=split2 takes the second of the three splits"""


@data_set("hmdb51", note="class folders of videos, and the files of its splits", listed=True, clips=True)
def open_hmdb51(data: Data) -> tuple[ClipFiles, ClipFiles]:
    """The training and the test videos of the split `data.train_split`, of which there are three.

    Raises:
        UserError: no such folder or split, a line that cannot be read, no video that is there, or PyAV is missing.
    """
    root = existing_root(data, LAYOUT)
    split = USUAL if data.train_split == "train" else data.train_split
    if data.val_split not in ("validation", split):
        raise UserError(
            f"data.val_split={data.val_split}: a split of hmdb51 has its own videos to test on; leave it out, and name the split by "
            "data.train_split"
        )
    folder = root / SPLITS
    files = sorted(folder.glob(f"*_test_{split}.txt"))
    if not files:
        there = sorted(
            {match[1] for path in folder.glob("*.txt") if (match := re.search(r"_test_(split\d+)$", path.stem))}
        )
        raise UserError(
            f"data.train_split={split}: there is no such split in {folder}; found {', '.join(there) or 'none'}; {LAYOUT}"
        )
    entries: dict[str, list[Entry]] = {TRAIN: [], TEST: [], NEITHER: []}
    for file in files:
        label = file.stem.removesuffix(f"_test_{split}")
        for name, use in _uses(file):
            entries[use].append(Entry((f"{label}/{name}", f"videos/{label}/{name}"), label))
    parts = [
        found_videos(folder / f"*_test_{split}.txt", entries[use], root, data) for use in (TRAIN, TEST) if entries[use]
    ]
    if len(parts) < 2:
        raise UserError(f"{folder}: {split} has no video to {'test' if entries[TRAIN] else 'train'} on; {LAYOUT}")
    return sets_of(parts, data)


def _uses(file: Path) -> list[tuple[str, str]]:
    """The name of every video of a class, and what it is for."""
    try:
        rows = [line.rsplit(maxsplit=1) for line in read_text(file).splitlines() if line.strip()]
    except Unreadable as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[1] not in (TRAIN, TEST, NEITHER):
            raise UserError(f"{file}, line {number}: {' '.join(row)[:80]!r} is not `NAME.avi 1`, 2 or 0")
    return [(name, use) for name, use in rows]
