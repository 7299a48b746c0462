"""What was passed over, guessed or converted: counted, and said in plan, log and `results.json`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """One thing worth knowing about a data set or the weights of a model.

    Attributes:
        what: a word for it that stays the same from run to run, e.g. 'other_types'.
        count: how many files, pictures, labels, classes or tensors.
        text: the sentence for a person.
    """

    what: str
    count: int
    text: str
