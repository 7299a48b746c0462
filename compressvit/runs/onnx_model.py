"""A file that `compressvit export --to onnx` wrote, as a model that is evaluated: onnxruntime computes it, and its metadata say what it
takes and gives."""

from __future__ import annotations

import json
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
    model = ONNXModel(session, said)
    config = InputConfig(
        *said.input_size, said.mean, said.std, said.interpolation, said.crop_pct, said.crop_mode, masks=model.masks
    )
    return Side(model.eval(), config)


def _plain(value: str) -> Any:
    """A text of the metadata as what it was: what is no JSON is a text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
