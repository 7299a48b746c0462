"""What a task keeps of two models' outputs for `predictions.json` and the report's gallery."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Answers(ABC):
    """What is recorded of two models' outputs on the held-out images beside figures: tables, and the images most worth showing.

    Attributes:
        measure: the key in `Task.measures` of what the images are chosen by; None where there is nothing to choose by.
        pixels: the most that the longer side of a picture has in the report.
    """

    measure: str | None = None
    pixels: int = 96

    @abstractmethod
    def add(self, outputs: Any, targets: Any, expected: Any | None) -> Tensor | None:
        """Add a batch.

        Args:
            outputs, targets: as for `Metrics.add`.
            expected: the teacher's outputs where the two can be compared.

        Returns:
            (B,): the higher, the more an image is worth looking at; None where there is no `measure`.
        """

    @abstractmethod
    def describe(self, index: int) -> dict[str, Any]:
        """What `predictions.json` keeps of the image at `index` of the last batch, as JSON has it.

        The report shows `true` (a text), `teacher` and `student` (a text each, or a class with its probability), if present.
        """

    def draw(self, picture: Image, description: Mapping[str, Any]) -> Image:
        """The picture that the report shows of an image; by default the image itself.

        Args:
            picture: the image as the model takes it, made smaller to `pixels`, in mode L or RGB.
            description: what `describe` said of it.
        """
        return picture

    def value(self, worth: float) -> float:
        """The value that is shown of an image, from the one it was chosen by."""
        return worth

    def tables(self) -> dict[str, Any]:
        """What else `predictions.json` has: `classes`, `confusions` and `confusions_in_all`, None where the task has none."""
        return {"classes": None, "confusions": None, "confusions_in_all": None}


@dataclass(frozen=True)
class Measure:
    """The criterion by which a report selects images: a caption for the selection, and the text under each image from its value."""

    caption: str
    text: Callable[[float], str | None]
