"""The description of a data set that is available before it is opened, and the registry of data sets.

One set is one file in `compressvit/data/sets/`, or of a package that offers it (entry points `compressvit.sets`). Such a file imports what
reads images only when the set is opened, so that names and classes do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import Dataset

from compressvit.errors import UserError, nearest
from compressvit.registry import Registry

# Takes the recipe's `data` section (`compressvit.data.spec.Data`, which is built on this file) and gives the training and the validation
# set, and where it was asked for one that of the test: map-style ones of (PIL image, target), where an image may be an array (H, W, C),
# `Samples`, or timm's `IterableImageDataset`. What is amiss is a `UserError`.
Opener = Callable[..., tuple[Dataset, ...]]
Open = TypeVar("Open", bound=Opener)

_ANY = "NAME"  # what follows the prefix of a set that stands for all names with it


@dataclass(frozen=True)
class DataSet:
    """A set, or all sets of a prefix.

    Attributes:
        name: what recipes call it; 'wds/NAME' is every name that begins with 'wds/'.
        open: reads it.
        note: a few words for the list of sets.
        classes: how many it has, where that is known without opening it.
        labelled: whether its images have classes, or another ground truth.
        task: what its ground truth is for (a word of `compressvit.tasks`); None: classification, or features where there is none.
        full_frame: its images fill their frame, so evaluation crops nothing off unless the recipe says so.
        package: what must be installed to read it, as Python imports it.
        streams: it is read in the order of its shards, which depends on the number of workers.
        listed: opening it only lists files, without reading an image, so a plan can count them.
        clips: its samples are videos, of which `data.clip` says what is taken.
        parts: it can be split (`data.val_fraction`, `data.test_fraction`) and have a test (`data.test_split`).
    """

    name: str
    open: Opener
    note: str = ""
    classes: int | None = None
    labelled: bool = True
    task: str | None = None
    full_frame: bool = False
    package: str | None = None
    streams: bool = False
    listed: bool = False
    parts: bool = False
    clips: bool = False

    @property
    def truth(self) -> str | None:
        """The word of the task that its ground truth is for; None where it has none."""
        return (self.task or "classification") if self.labelled else None


SETS: Registry[DataSet] = Registry("data set", "compressvit.data.sets")


def data_set(
    name: str,
    *,
    note: str = "",
    classes: int | None = None,
    labelled: bool = True,
    task: str | None = None,
    full_frame: bool = False,
    package: str | None = None,
    streams: bool = False,
    listed: bool = False,
    parts: bool = False,
    clips: bool = False,
) -> Callable[[Open], Open]:
    """Register what opens a data set under the set's name; for the arguments see `DataSet`. A name that is taken is refused at import."""

    def register(opener: Open) -> Open:
        entry = DataSet(name, opener, note, classes, labelled, task, full_frame, package, streams, listed, parts, clips)
        SETS.add(name, entry, opener.__module__)
        return opener

    return register


def find_set(name: str) -> DataSet:
    """The set of that name. Names with a prefix are case-insensitive, as in timm.

    Raises:
        UserError: there is none, or the package that offers it cannot be used.
    """
    prefix, slash, rest = name.partition("/")
    words = (name.lower(), f"{prefix.lower()}/{_ANY}") if slash else (name,)
    for word in words if rest or not slash else ():
        if word in SETS:
            return SETS[word]
        if fault := SETS.fault(word):
            raise UserError(fault)
    close = nearest(name, [known for known in SETS if not known.endswith(f"/{_ANY}")])
    hint = f"did you mean '{close}'? " if close else ""
    siblings = [
        known for known in SETS if slash and known.startswith(f"{prefix.lower()}/") and not known.endswith(_ANY)
    ]
    raise UserError(f"there is no data set '{name}'; {hint}(known: {', '.join(siblings or briefly(SETS))})")


def briefly(names: Iterable[str]) -> list[str]:
    """Names without a prefix, then each prefix once."""
    names = list(names)
    prefixes = (f"{name.partition('/')[0]}/{_ANY}" for name in names if "/" in name)
    return [*(name for name in names if "/" not in name), *dict.fromkeys(prefixes)]


def list_of_sets() -> str:
    """All names, for the documentation of recipes: those without a prefix first, each with its note."""
    entries = sorted(SETS.values(), key=lambda entry: "/" in entry.name)
    texts = [f"{entry.name} ({entry.note})" if entry.note else entry.name for entry in entries]
    return f"{', '.join(texts)}."
