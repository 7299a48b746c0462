"""A file that `compressvit export --to onnx` wrote, as a model that is evaluated: onnxruntime computes it, and its metadata say what it
takes and gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from compressvit.artifacts.formats.base import find_format
from compressvit.artifacts.formats.onnx import outputs_of, session_of
from compressvit.data.input import InputConfig, Side
from compressvit.errors import UserError
from compressvit.model.detectors.prediction import Detections
from compressvit.model.stored import LABEL_NAMES, Images
from compressvit.reading import open_regular
from compressvit.spec import first_fault
from compressvit.tasks.base import find_task

_DETECTIONS = ["boxes", "scores", "labels", "masks"]


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


class ONNXModel(nn.Module):
    """A model in ONNX with what a task asks of a model: `num_classes`, `task`, and the names of its classes."""

    def __init__(self, session: Any, said: _Said):
        super().__init__()
        self._session, self._names = session, said.outputs
        self.num_classes, self.task, self.masks = said.num_classes, said.task, "masks" in said.outputs
        self.pretrained_cfg = {"architecture": said.architecture, LABEL_NAMES: said.label_names}

    def forward(self, images: Tensor) -> Any:
        found = outputs_of(self._session, self._names, images.cpu())
        return found[0] if len(found) == 1 else _Found(tuple(found))


def open_onnx(file: Path) -> Side:
    """The model in an ONNX file, and the input that it takes.

    Raises:
        UserError: a package is missing, onnxruntime cannot read the file, or no export wrote it.
    """
    find_format("onnx").require("fp32", None)
    with open_regular(file):
        pass  # raises where it is a named pipe, or cannot be read
    try:
        session = session_of(file)
    except Exception as error:  # onnxruntime's own classes, of which it exports none
        raise UserError(f"{file} is not a model that onnxruntime reads: {str(error)[:300]}") from error
    content = {key: _plain(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    try:
        Images.model_validate(content)
        said = _Said.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{file} does not say what it takes and gives ({first_fault(error)}): its metadata are not those that `compressvit export` "
            "writes; export it again"
        ) from error
    find_task(said.task)  # one of a package that is not installed is refused with its name
    if fault := _misfit(session, said):
        raise UserError(f"{file} is not what its metadata say: {fault}; export it again")
    model = ONNXModel(session, said)
    config = InputConfig(
        *said.input_size, said.mean, said.std, said.interpolation, said.crop_pct, said.crop_mode, masks=model.masks
    )
    return Side(model.eval(), config)


def _misfit(session: Any, said: _Said) -> str | None:
    """What the graph of a file takes or gives otherwise than its metadata say."""
    inputs, outputs = session.get_inputs(), {found.name: found for found in session.get_outputs()}
    if [found.name for found in inputs] != ["images"]:
        return f"it takes {', '.join(found.name for found in inputs) or 'nothing'}, where images alone are meant"
    (images,) = inputs
    if images.type != "tensor(float)":
        return f"its images are {images.type}, not float32"
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
        classes = outputs[said.outputs[0]].shape[-1]
        if isinstance(classes, int) and classes != said.num_classes:
            return f"it gives {classes} logits, and num_classes is {said.num_classes}"
    return None


def _times(sides: Sequence[Any]) -> str:
    return "×".join(map(str, sides))


def _plain(value: str) -> Any:
    """A text of the metadata as what it was: what is no JSON is a text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
