"""The figures of all tasks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressvit.tasks.base import TASKS
from compressvit.tasks.quality import Quality


def qualities() -> dict[str, Quality]:
    """By key. A key that several tasks have is one figure, described as the first of them does."""
    found: dict[str, Quality] = {}
    for task in TASKS.values():
        for quality in task.qualities:
            found.setdefault(quality.key, quality)
    return found


def ranking() -> tuple[str, ...]:
    """The keys of those that say how good a model is; of two that were measured, the first counts."""
    return tuple(dict.fromkeys(key for task in TASKS.values() for key in task.ranking))


def graded() -> list[str]:
    """The keys of those that one model has alone, against the ground truth."""
    return [key for key in qualities() if any(key in task.graded for task in TASKS.values())]


def measured(scores: Mapping[str, Any]) -> list[Quality]:
    """Those that were measured, without details such as top-5."""
    return [q for key, q in qualities().items() if not q.detail and scores.get(key) is not None]


def intervals(scores: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The intervals of the figures that have one, by key; `scores` says of how many `images` they are, and of a figure that is no mean over
    images has the ends itself, as KEY_low and KEY_high."""
    known = ((key, quality, scores.get(key)) for key, quality in qualities().items() if quality.of_images)
    found = {key: quality.interval(value, scores["images"]) for key, quality, value in known if value is not None}
    ends = {key: (scores.get(f"{key}_low"), scores.get(f"{key}_high")) for key in qualities()}
    return found | {key: (low, high) for key, (low, high) in ends.items() if low is not None and high is not None}


def differences(scores: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """By how many points the teacher is above the student, between the ends of the interval of that, for the figures of which `scores` says
    how many images either has right alone, or which it has itself, as KEY_behind with _low and _high."""
    known = ((key, quality, scores.get(f"{key}_lost")) for key, quality in qualities().items() if quality.of_images)
    found = {
        key: quality.difference(lost, scores[f"{key}_gained"], scores["images"])
        for key, quality, lost in known
        if lost is not None
    }
    given = (key for key in qualities() if scores.get(f"{key}_behind_low") is not None)
    return found | {
        key: (scores[f"{key}_behind_low"], scores[f"{key}_behind"], scores[f"{key}_behind_high"]) for key in given
    }


def words(scores: Mapping[str, Any]) -> str:
    """The scores that were measured, in a few words."""
    return ", ".join(f"{q.in_text} {q.number(scores[q.key])}{q.unit}" for q in measured(scores))
