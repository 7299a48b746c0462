"""Opening the data sets that a recipe names, and checking them before anything is computed.

Map-style sets become `Samples`; streaming sets (WebDataset, TensorFlow and streaming Hugging Face datasets) become `Stream`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from timm.data import IterableImageDataset
from torch.utils.data import Dataset, Subset

from compressvit.data.classes import ORDERS, composed, different_classes, read_names
from compressvit.data.data_set import find_set
from compressvit.data.files import PictureFiles
from compressvit.data.samples import BrokenFiles, Samples
from compressvit.data.sets.base import LAYOUT, class_names_of, evenly
from compressvit.data.spec import Data
from compressvit.data.streams import Stream
from compressvit.errors import UserError
from compressvit.notes import Note
from compressvit.tasks.base import find_task


@dataclass
class Datasets:
    """The result of `open_data`.

    Attributes:
        train, validation: `Samples`, or `Stream` for a streaming set.
        test: images on which nothing is chosen; None where the figures at the end are of `validation`.
        num_classes: the number of classes; None in an unlabelled set, or one of a task without classes.
        class_names: in the order of the targets; None if unknown.
        labelled: False if every target is -1.
        broken: files that could not be decoded so far.
        found: notes on what was skipped or guessed when the data was opened.
        deciding: images held out, of which something is chosen; None where nothing is.
    """

    train: Dataset
    validation: Dataset
    num_classes: int | None
    class_names: list[str] | None
    labelled: bool
    broken: BrokenFiles
    found: list[Note] = field(default_factory=list)
    deciding: Dataset | None = None
    test: Dataset | None = None

    def evidence(self) -> Datasets:
        """The same with the images in `validation` that figures at the end are of: those of the test, where there is one."""
        return self if self.test is None else replace(self, validation=self.test)

    def notes(self) -> list[Note]:
        """Notes on what was skipped or guessed when the data was opened, and on conversions of the images read so far."""
        return [*self.found, *self.broken.notes()]

    def fingerprint(self) -> str | None:
        """A hash of the names and labels of all files, relative to their folder; None for a streaming set, which cannot list them."""
        parts = [part for part in (self.train, self.validation, self.test) if part is not None]
        found = [part.identity() for part in parts if isinstance(part, Samples)]
        return hashlib.sha256("".join(found).encode()).hexdigest() if len(found) == len(parts) else None


def open_data(data: Data) -> Datasets:
    """Open the training, the validation and the test set that `data` names, and check what can be checked without decoding images.

    Raises:
        UserError: the folder is missing, empty or laid out differently, a package is missing, the classes of the two
            splits differ, there is only one class, or a label does not fit `data.num_classes`.
    """
    found_set = find_set(data.name)
    if data.augment.repeats > 1 and found_set.streams:
        raise UserError(
            f"data.augment.repeats={data.augment.repeats}: {data.name} streams its images and cannot repeat them in an epoch; leave it out"
        )
    if found_set.package is not None and importlib.util.find_spec(found_set.package) is None:
        raise UserError(f"data.name={data.name} needs a package: pip install {found_set.package.replace('_', '-')}")
    sources = found_set.open(data)
    # once what both sets say, as where one is held out of the other
    notes = list(dict.fromkeys(note for source in sources if isinstance(source, PictureFiles) for note in source.notes))
    train = _limited(sources[0], data, "limit_train", found_set.labelled)
    validation = _limited(sources[1], data, "limit_val", found_set.labelled)
    test = _limited(sources[2], data, None, found_set.labelled) if len(sources) > 2 else None
    broken = BrokenFiles(train, validation, test)
    if not found_set.labelled:
        if data.classes is not None:
            raise UserError(
                f"data.classes={data.classes}: the images of data '{data.name}' have no classes; leave it out"
            )
        return Datasets(train, validation, None, None, False, broken, notes, test=test)
    task = find_task(data.usual_task)
    class_names = _named(_common_classes(sources, data.name, task.least_classes), data)
    found = len(class_names) if class_names else None
    num_classes = data.num_classes or found
    if num_classes is None and task.needs_class_count:
        raise UserError(f"data.name={data.name}: the set does not say how many classes it has; give data.num_classes=N")
    if found and num_classes and found > num_classes:
        raise UserError(
            f"data.num_classes={num_classes}, but {data.name} has {found} classes; leave data.num_classes out, "
            f"or set {found}"
        )
    for source in sources:
        targets = getattr(source, "targets", None)
        if targets is not None:
            task.check_set(targets, num_classes, data.name)
    return Datasets(train, validation, num_classes, class_names, True, broken, notes, test=test)


def _common_classes(sources: Sequence[Any], name: str, least: int) -> list[str] | None:
    train, validation = (class_names_of(source) for source in sources[:2])
    if train and validation and train != validation:
        raise different_classes(name, train, validation)
    if train and len(train) < least:
        raise UserError(
            f"data.name={name}: there is only one class, '{train[0]}', so there is nothing to classify; {LAYOUT}"
        )
    return train


def _named(names: list[str] | None, data: Data) -> list[str] | None:
    """The class names of a data set, or those in the file `data.classes` if it has none."""
    if data.classes is None or data.name == "folder":  # its classes are already ordered and named
        return names
    if data.classes in ORDERS:
        raise UserError(
            f"data.classes={data.classes} orders the class folders of data.name=folder; those of {data.name} have an order of their own"
        )
    given = read_names(data.classes)
    if names is not None and [composed(name) for name in names] != [composed(name) for name in given]:
        raise UserError(
            f"data.classes={data.classes}: its names are not those of {data.name} in their order, which begins {', '.join(names[:3])}; "
            "leave it out"
        )
    return given


def _limited(source: Any, data: Data, option: str | None, labelled: bool) -> Dataset:
    limit: int | None = None if option is None else getattr(data, option)
    if not isinstance(source, IterableImageDataset):
        chosen = evenly(len(source), limit)
        if isinstance(source, Subset):
            return Samples(source.dataset, [source.indices[i] for i in chosen], labelled, exif=data.exif)
        return Samples(source, chosen, labelled, exif=data.exif)
    if limit is not None:
        raise UserError(
            f"data.{option}={limit}: a streaming set is read in the order of its shards and cannot be thinned out; "
            "name fewer shards in data.train_split or data.val_split"
        )
    return Stream(source, data.num_workers, exif=data.exif)
