"""The names of classes and their order, which decides what a target means."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from compressvit.data.files import natural_key
from compressvit.data.notes import counted
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.notes import Note

ORDERS = ("natural", "plain")
_LONGEST_FILE = 2**26


def class_order(names: Iterable[str], asked: str | None, where: str) -> tuple[list[str], list[Note]]:
    """The classes in target order.

    Args:
        names: of the folders.
        asked: the recipe's `data.classes`: 'natural' (also None), 'plain', or a file with a name a line.
        where: what messages call the folder of the folders.

    Raises:
        UserError: a name that is not in the file, or two names that differ only in their Unicode form.
    """
    natural = sorted(set(names), key=lambda name: (natural_key(name), name))
    plain = sorted(natural)
    _refuse_twins(natural, where)
    if asked is not None and asked not in ORDERS:
        order = read_names(asked)
        known = {composed(name) for name in order}
        if strange := [name for name in natural if composed(name) not in known]:
            raise UserError(
                f"data.classes={asked}: {counted(len(strange), 'folder')} of {where} not among its {len(order)} names, first "
                f"'{strange[0]}'; the file has one folder name a line, in the order of the targets"
            )
        return order, [Note("classes", len(order), f"{len(order):,} classes, in the order of {asked}")]
    order = plain if asked == "plain" else natural
    text = f"{len(order):,} classes: the folders directly in {where}, in {asked or 'natural'} order"
    notes = [Note("classes", len(order), text)]
    if plain != natural:
        place = next(i for i, (a, b) in enumerate(zip(plain, natural, strict=True)) if a != b)
        moved = sum(a != b for a, b in zip(plain, natural, strict=True))
        text = (
            f"{moved:,} classes have another number in plain order (torchvision's) than in natural order (timm's): class {place} is "
            f"'{plain[place]}' or '{natural[place]}'. A head that was trained elsewhere needs the order it was trained with: "
            "data.classes=plain, natural, or a file"
        )
        notes.append(Note("class_order", moved, text))
    return order, notes


def read_names(file: str) -> list[str]:
    """The names in a file, one a line.

    Raises:
        UserError: no such file, an empty line between names, or a name that is there twice.
    """
    path = expanded(file, "data.classes")
    if not path.is_file():
        raise UserError(
            f"data.classes={file}: there is no such file; give {', '.join(ORDERS)}, or a file with one class name a line"
        )
    try:
        if path.stat().st_size > _LONGEST_FILE:
            raise UserError(f"data.classes={file}: a file of {path.stat().st_size:,} bytes is no list of class names")
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.classes={file} cannot be read as UTF-8 text: {error}") from error
    if len(names) < 2 or "" in names:
        fault = f"line {names.index('') + 1} is empty" if "" in names else f"it has {counted(len(names), 'line')}"
        raise UserError(f"data.classes={file}: {fault}; give one class name a line, at least two")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if composed(name) in first:
            raise UserError(f"data.classes={file}: '{name}' is on line {first[composed(name)]} and on line {number}")
        first[composed(name)] = number
    return names


def composed(name: str) -> str:
    """A name in which an accented letter is one character (NFC): file systems and archives also store it as two (NFD)."""
    return unicodedata.normalize("NFC", name)


def numbers_of(order: Sequence[str]) -> dict[str, int]:
    """The target of every name, in composed form."""
    return {composed(name): number for number, name in enumerate(order)}


def different_classes(name: str, train: Iterable[str], held_out: Iterable[str], part: str = "validation") -> UserError:
    """What to raise where the training split and another, called `part`, have other classes."""
    train, held_out = set(train), set(held_out)
    return UserError(
        f"data.name={name}: the training and the {part} split have different classes"
        f"\n  only in training: {some_of(sorted(train - held_out))}"
        f"\n  only in {part}: {some_of(sorted(held_out - train))}"
        "\na target is the position of a class, so both splits need the same class folders, or data.classes=FILE with all their names"
    )


def missing_classes(order: Sequence[str], there: Iterable[str], split: str) -> list[Note]:
    """A note where a split has no image of some classes."""
    known = {composed(name) for name in there}
    missing = [name for name in order if composed(name) not in known]
    text = f"{split}: {counted(len(missing), 'class')} without an image: {some_of(missing)}"
    return [Note("missing_classes", len(missing), text)] if missing else []


def other_classes(names: Sequence[str], model: Sequence[str], whose: str) -> list[Note]:
    """A note where a model was trained on classes of other names than the data's, or in another order.

    Args:
        names, model: in target order, of the data and of the model; of another number they are not compared.
        whose: what the note calls the model.
    """
    ours, theirs = [composed(name) for name in names], [composed(name) for name in model]
    places = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if len(ours) != len(theirs) or not places:
        return []
    first = f"class {places[0]} is '{names[places[0]]}' in the data and '{model[places[0]]}' in {whose}"
    if sorted(ours) == sorted(theirs):
        text = (
            f"{len(places):,} of {len(ours):,} classes have another number in {whose} than in the data: {first}. Its accuracy is "
            "meaningless until data.classes=FILE gives the data that order"
        )
        return [Note("model_class_order", len(places), text)]
    text = f"{len(places):,} of {len(ours):,} classes have another name in {whose} than in the data: {first}. Its accuracy is meaningless "
    return [Note("model_class_names", len(places), text + "unless they mean the same")]


def some_of(names: Sequence[str], at_most: int = 5) -> str:
    """The first few names for a message, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more if names else "none"


def _refuse_twins(names: Sequence[str], where: str) -> None:
    first: dict[str, str] = {}
    for name in names:
        if composed(name) in first:
            raise UserError(
                f"{where}: two folders are called '{composed(name)}', in different Unicode forms; move the images into one"
            )
        first[composed(name)] = name
