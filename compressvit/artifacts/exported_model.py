"""A graph that `compressvit export` wrote, as a model that is evaluated: its runtime computes it, and its metadata say what it takes and
gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from compressvit.data.input import InputConfig, Side
from compressvit.errors import UserError
from compressvit.model.detectors.prediction import Detections
from compressvit.model.stored import LABEL_NAMES, Images
from compressvit.notes import Note
from compressvit.spec import first_fault
from compressvit.tasks.base import find_task

_DETECTIONS = ["boxes", "scores", "labels", "masks"]


class Reopened(NamedTuple):
    """A file or folder that was exported before: the model in it with the input that it takes, and what was left out in reading it."""

    side: Side
    notes: Sequence[Note] = ()


class Port(NamedTuple):
    """What a graph takes or gives: a tensor of this shape, in which a side that is not fixed is no number."""

    name: str
    shape: Sequence[Any]
    is_float32: bool = True


class GraphFile(NamedTuple):
    """A graph as its runtime has it.

    Attributes:
        metadata: as `Source.metadata` wrote them: texts, those that were no texts as JSON.
        takes, gives: its inputs and outputs.
        compute: from images (B, C, H, W) in float32 to the tensors of these names.
    """

    metadata: Mapping[str, str]
    takes: Sequence[Port]
    gives: Sequence[Port]
    compute: Callable[[Sequence[str], Tensor], Sequence[Tensor]]


class _Said(BaseModel):
    """What the metadata of a file say, as far as it is needed here."""

    model_config = ConfigDict(extra="ignore")

    task: str
    outputs: list[str]
    num_classes: int
    architecture: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    label_names: list[str] | None = None

    @model_validator(mode="after")
    def _has_statistics_of_every_channel(self) -> _Said:
        if {len(self.mean), len(self.std)} != {self.input_size[0]}:
            raise ValueError(f"mean and std of {len(self.mean)} and {len(self.std)} channels, of {self.input_size[0]}")
        return self


class _Found(NamedTuple):
    """The detections of a batch, as `Answering` gives them."""

    parts: tuple[Tensor, ...]

    def detections(self, limit: int) -> list[Detections]:
        """Those of each image, without the zeros after its last."""
        rows = (Detections(*image) for image in zip(*self.parts, strict=True))
        return [row.first(min(limit, int((row.scores > 0).sum()))) for row in rows]


class ExportedModel(nn.Module):
    """A graph with what a task asks of a model: `num_classes`, `task`, and the names of its classes."""

    def __init__(self, opened: GraphFile, said: _Said):
        super().__init__()
        self._compute, self._names, self._channels = opened.compute, said.outputs, said.input_size[0]
        self.num_classes, self.task, self.masks = said.num_classes, said.task, "masks" in said.outputs
        self.pretrained_cfg = {"architecture": said.architecture, LABEL_NAMES: said.label_names}

    def forward(self, images: Tensor) -> Any:
        views = images.shape[1] // self._channels
        if (
            views > 1 and len(self._names) == 1
        ):  # several clips of each video beside one another, of which a graph takes one
            (logits,) = self._compute(self._names, images.cpu().reshape(-1, self._channels, *images.shape[2:]))
            return logits.unflatten(0, (-1, views)).mean(dim=1)
        found = self._compute(self._names, images.cpu())
        return found[0] if len(found) == 1 else _Found(tuple(found))


def reopened(file: Path, opened: GraphFile) -> Reopened:
    """The model in a file of a graph, and the input that it takes.

    Raises:
        UserError: no export wrote it, or it is not what its metadata say.
    """
    content = {key: _plain(value) for key, value in opened.metadata.items()}
    try:
        Images.model_validate(content)
        said = _Said.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{file} does not say what it takes and gives ({first_fault(error)}): its metadata are not those that `compressvit export` "
            "writes; export it again"
        ) from error
    find_task(said.task)  # one of a package that is not installed is refused with its name
    if fault := _misfit(opened, said):
        raise UserError(f"{file} is not what its metadata say: {fault}; export it again")
    model = ExportedModel(opened, said)
    config = InputConfig(
        *said.input_size, said.mean, said.std, said.interpolation, said.crop_pct, said.crop_mode, masks=model.masks
    )
    return Reopened(Side(model.eval(), config))


def _misfit(opened: GraphFile, said: _Said) -> str | None:
    """What a graph takes or gives otherwise than its metadata say."""
    inputs, outputs = opened.takes, {port.name: port for port in opened.gives}
    if [port.name for port in inputs] != ["images"]:
        return f"it takes {', '.join(port.name for port in inputs) or 'nothing'}, where images alone are meant"
    (images,) = inputs
    if not images.is_float32:
        return "its images are not float32"
    sizes = zip(images.shape[1:], said.input_size, strict=False)
    if len(images.shape) != 4 or any(isinstance(side, int) and side != meant for side, meant in sizes):
        return f"its images are {_times(images.shape[1:])}, and input_size is {_times(said.input_size)}"
    if missing := [name for name in said.outputs if name not in outputs]:
        return f"it has no output {missing[0]}; there are {', '.join(outputs)}"
    if said.task == "detection" and said.outputs not in (_DETECTIONS[:3], _DETECTIONS):
        return f"the outputs of a detector are {', '.join(_DETECTIONS[:3])} and perhaps masks, not {', '.join(said.outputs)}"
    if said.task != "detection" and len(said.outputs) != 1:
        return f"of the task {said.task} there is one output, not {', '.join(said.outputs) or 'none'}"
    if said.task == "classification":
        classes = outputs[said.outputs[0]].shape[-1:]
        if any(isinstance(count, int) and count != said.num_classes for count in classes):
            return f"it gives {classes[0]} logits, and num_classes is {said.num_classes}"
    return None


def _times(sides: Sequence[Any]) -> str:
    return "×".join(map(str, sides))


def _plain(value: str) -> Any:
    """A text of the metadata as what it was: what is no JSON is a text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
