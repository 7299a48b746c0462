"""Lists of images by domain or task, in the layouts of DomainNet, PACS and VTAB-1k, and few images of each class drawn from them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compressvit.data.sets.lists import open_lists
from compressvit.data.spec import Data
from compressvit.data.splits import Split
from compressvit.errors import UserError, did_you_mean
from compressvit.files import write_text

Sample = tuple[str, int]  # the path of an image, and its label from 0
CHOICE_TRAIN, CHOICE_VAL, TRAIN, TEST = "train800", "val200", "train800val200", "test"  # of a prepared VTAB-1k
FOLD = 5  # one of so many parts is held out to choose on
LAYOUT = (
    "expected DOMAIN_train.txt and DOMAIN_test.txt (DomainNet), DOMAIN_train_kfold.txt with DOMAIN_crossval_kfold.txt and "
    "DOMAIN_test_kfold.txt (PACS), TASK/train800.txt, val200.txt, train800val200.txt and test.txt (VTAB-1k), or folders DOMAIN/CLASS"
)


@dataclass(frozen=True)
class Domain:
    """Images of one look, or of one task.

    Attributes:
        test: for what has learned from `train`.
        unseen: for what has seen nothing of the domain; in PACS all of it, otherwise `test`.
        choice: of a task with lists to choose on: what to learn from, and what to choose on.
    """

    name: str
    train: list[Sample]
    test: list[Sample]
    unseen: list[Sample] = field(default_factory=list)
    choice: tuple[list[Sample], list[Sample]] | None = None


@dataclass(frozen=True)
class Layout:
    """What lies in a folder.

    Attributes:
        classes: how many, of domains, which share them; None of tasks, of which each has its own.
        notes: what was passed over or guessed, in words.
    """

    root: Path
    domains: dict[str, Domain]
    classes: int | None
    notes: list[str]

    def chosen(self, names: Sequence[str] | None) -> list[str]:
        """The names of the domains that are asked for, or of all.

        Raises:
            UserError: there is no such domain.
        """
        for name in names or ():
            if name not in self.domains:
                raise UserError(
                    f"{name}: there is no such domain or task in {self.root}; {did_you_mean(name, self.domains)}"
                )
        return list(names or self.domains)


def read_layout(root: Path, lists: Path | None = None, classes: int | None = None) -> Layout:
    """Read the lists in a folder, whichever layout it has.

    Args:
        root: the folder that paths are relative to.
        lists: where the lists are; None: in `root`.
        classes: how many there are; None: the highest label + 1.

    Raises:
        UserError: no such layout, images that are not there, labels that are no class, or a domain without one of the classes.
    """
    lists = lists or root
    if not root.is_dir() or not lists.is_dir():
        raise UserError(f"{root if not root.is_dir() else lists}: there is no such folder; {LAYOUT}")
    if tasks := [path for path in (root, *sorted(root.iterdir())) if (path / f"{TRAIN}.txt").is_file()]:
        return _tasks(root, tasks)
    notes: list[str] = []
    if names := _names(lists, "_train.txt"):
        domains = [_listed(root, lists, name, ("train", "test"), 0, notes) for name in names]
    elif names := _names(lists, "_train_kfold.txt"):
        parts = ("train_kfold", "crossval_kfold", "test_kfold")
        domains = [_listed(root, lists, name, parts, 1, notes) for name in names]
    else:
        domains = _folders(root, notes)
    count = classes or 1 + max(label for domain in domains for _, label in (*domain.train, *domain.test))
    for domain in domains:
        _check(domain, count)
    return Layout(root, {domain.name: domain for domain in domains}, count, list(dict.fromkeys(notes)))


def _names(folder: Path, end: str) -> list[str]:
    return sorted(path.name.removesuffix(end) for path in folder.glob(f"*{end}"))


def _samples(root: Path, first: str, second: str, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    """The images of two lists, each of which is there."""
    data = Data(name="lists", root=str(root), train_split=first, val_split=second, outside=True)
    train, validation = open_lists(data)
    notes += [note.text for note in train.notes if note.what not in ("classes", "empty_class_0")]
    return train.samples, validation.samples


def _tasks(root: Path, folders: Iterable[Path]) -> Layout:
    domains, notes = {}, list[str]()
    for folder in folders:
        choice, final = _samples(folder, CHOICE_TRAIN, CHOICE_VAL, notes), _samples(folder, TRAIN, TEST, notes)
        name = folder.resolve().name
        domains[name] = Domain(name, *final, unseen=final[1], choice=choice)
    return Layout(root, domains, None, notes)


def _listed(root: Path, lists: Path, name: str, parts: Sequence[str], first: int, notes: list[str]) -> Domain:
    """A domain of two or three lists whose labels count from `first`."""
    files = [str((lists / f"{name}_{part}.txt").resolve()) for part in parts]
    train, test = _samples(root, files[0], files[1], notes)
    unseen = _samples(root, files[2], files[2], [])[0] if len(files) > 2 else test
    if first and (bad := next((path for path, label in (*train, *test, *unseen) if label < first), None)):
        raise UserError(f"{name}: {bad} has label 0, but labels of PACS's lists count from {first}")
    return Domain(name, *([(path, label - first) for path, label in part] for part in (train, test, unseen)))


def _folders(root: Path, notes: list[str]) -> list[Domain]:
    """Domains that are folders of class folders; a fifth of each class is for the test, by a hash of the paths."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if not folders:
        raise UserError(f"{root}: there are neither lists nor folders of domains; {LAYOUT}")
    splits = [Split.read(path, root, Data(name="folder", root=str(root))) for path in folders]
    notes += [note.text for split in splits for note in split.notes]
    names = sorted({label for split in splits for label in split.labels})
    domains = []
    for split in splits:
        assert isinstance(split.files, list)
        samples = [(path, names.index(label)) for path, label in zip(split.files, split.labels, strict=True)]
        train, test = fold(samples, root)
        domains.append(Domain(split.name, train, test, samples))
    return domains


def _check(domain: Domain, classes: int) -> None:
    """Raise a `UserError` where a label is no class, or the domain has no image of one to learn from."""
    for path, label in (*domain.train, *domain.test, *domain.unseen):
        if label >= classes:
            raise UserError(
                f"{domain.name}: {path} has label {label}, but there are {classes} classes, 0 to {classes - 1}"
            )
    if missing := sorted({*range(classes)} - {label for _, label in domain.train}):
        named = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
        raise UserError(
            f"{domain.name} has no training image of {len(missing)} of the {classes} classes (label {named}); leave the domain out, or "
            "its classes in all domains"
        )


# -------------------------------------------------------------------------------------------------------------- few of them


def _rank(path: str, root: Path, seed: int) -> str:
    """What images are ordered by: it depends on the seed and the path within the folder, and on no other image."""
    within = os.path.relpath(path, root).replace(os.sep, "/")
    return hashlib.sha256(f"{seed} {within}".encode()).hexdigest()


def by_class(samples: Iterable[Sample], root: Path, seed: int) -> dict[int, list[Sample]]:
    """The images of each label, in the order in which they are drawn."""
    found: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda one: _rank(one[0], root, seed)):
        found.setdefault(sample[1], []).append(sample)
    return dict(sorted(found.items()))


def draw(samples: Sequence[Sample], shots: int, root: Path, seed: int, name: str) -> list[Sample]:
    """So many images of each class. Those of fewer shots are among those of more; other images do not change who goes first.

    Raises:
        UserError: a class has fewer.
    """
    groups = by_class(samples, root, seed)
    label, fewest = min(((label, len(group)) for label, group in groups.items()), key=lambda pair: pair[1])
    if fewest < shots:
        raise UserError(
            f"{name}: {shots} images of each class are asked for, and label {label} has {fewest}; ask for {fewest} at most"
        )
    return [sample for group in groups.values() for sample in group[:shots]]


def at_most(samples: Sequence[Sample], count: int | None, root: Path, seed: int = 0) -> list[Sample]:
    """As many images of each class, where it has more; None: all."""
    return [one for group in by_class(samples, root, seed).values() for one in group[:count]]


def fold(samples: Sequence[Sample], root: Path) -> tuple[list[Sample], list[Sample]]:
    """Images without and with a fifth of each class, at least one of every class with two: what to learn from, and what is held out."""
    kept: list[Sample] = []
    held: list[Sample] = []
    for group in by_class(samples, root, 0).values():
        count = max(round(len(group) / FOLD), int(len(group) > 1))
        held += group[:count]
        kept += group[count:]
    return kept, held


def write_list(file: Path, samples: Sequence[Sample]) -> None:
    """Write a list that `data.name: lists` reads with `outside: true`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(f"{os.path.abspath(path)} {label}\n" for path, label in samples))


def repeated(parts: Iterable[Sequence[Sample]]) -> int:
    """How many images are in more than one of the parts."""
    counts = Counter(path for part in parts for path in {path for path, _ in part})
    return sum(count > 1 for count in counts.values())
