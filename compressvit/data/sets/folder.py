"""`folder`: a folder or tar a split, with a folder or tar a class."""

from __future__ import annotations

import tarfile
from pathlib import Path

from torch.utils.data import Dataset

from compressvit.data.data_set import data_set
from compressvit.data.sets.base import IMAGE_TYPES, LAYOUT, class_names_of, existing_root, some_of
from compressvit.data.spec import Data
from compressvit.errors import UserError

TAR_IMAGE_TYPES = (".jpg", ".jpeg", ".png")  # as timm reads them
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test")


@data_set("folder", note="train/ and val/ with a folder or tar per class")
def open_folder(data: Data) -> tuple[Dataset, Dataset]:
    """Splits are found under their usual names, too: val/, valid/, test/ for the validation split."""
    root = existing_root(data, LAYOUT)
    opened = []
    for option, split, folders in (
        ("train_split", data.train_split, TRAIN_FOLDERS),
        ("val_split", data.val_split, VAL_FOLDERS),
    ):
        names = dict.fromkeys([split, *folders] if split in folders else [split])
        paths = [path for name in names for path in (root / name, root / f"{name}.tar") if path.exists()]
        if not paths:
            raise UserError(
                f"data.root={data.root}: nothing for data.{option}={split} (looked for {', '.join(names)}, as a folder "
                f"or .tar); found {some_of(sorted(p.name for p in root.iterdir()))}; {LAYOUT}"
            )
        opened.append(_class_folders(paths[0]))
    return opened[0], opened[1]


def _class_folders(path: Path) -> Dataset:
    from timm.data import ImageDataset, create_dataset
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    tars = path.is_file() or any(path.glob("*.tar"))
    try:
        if tars:
            # open tar files must not be shared with forked workers, and timm's index of large tars is a pickle
            reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
            dataset = ImageDataset(str(path), reader=reader)
        else:
            dataset = create_dataset("", root=str(path), search_split=False, input_key=";".join(IMAGE_TYPES))
    except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:
        types = ", ".join(TAR_IMAGE_TYPES if tars else IMAGE_TYPES)
        raise UserError(f"{path}: no images ({types}) can be found in it; {LAYOUT}") from error
    if "" in (class_names_of(dataset) or ()):
        raise UserError(f"{path}: images lie directly in it rather than in one folder per class; {LAYOUT}")
    return dataset
