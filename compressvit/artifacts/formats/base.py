"""The interface of a format of `compressvit export`, and the registry of formats.

One format is one file in `compressvit/artifacts/formats/`, or of a package that offers it (entry points `compressvit.formats`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from compressvit import __version__
from compressvit.artifacts.export import INTEGERS, PRECISIONS, SEAL, Graph, exported, require_packages
from compressvit.artifacts.exported_model import Reopened
from compressvit.data.input import InputConfig
from compressvit.errors import UserError, did_you_mean, option
from compressvit.files import write_json
from compressvit.model.backbone import model_name
from compressvit.model.stored import class_names
from compressvit.registry import Registry
from compressvit.tasks.base import Task
from compressvit.transforms.record import compression_of


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: on the CPU, in float32 and eval mode; not to be changed.
        task: what its outputs mean.
        input: what it expects of images.
        precision: of the weights in the file and, where the format `computes` in it, of the arithmetic: 'fp32', 'fp16', 'bf16', 'int8' or
            'int8-static'.
        name: where it comes from, in words that can be published.
        opset: version of ONNX's operators, where the format has such; None: its own choice.
        dense: whether it may have more parameters than the model, where the format has no other layers than dense ones.
        exif: whether its images were turned as their EXIF blocks say.
        calibration: batches (B, C, H, W) of normalised images, where the precision needs them.
    """

    model: nn.Module
    task: Task
    input: InputConfig
    precision: str = "fp32"
    name: str = ""
    opset: int | None = None
    dense: bool = False
    exif: bool = False
    calibration: Sequence[Tensor] = ()

    @cached_property
    def reference(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The model as it is exported, from images to one tensor or several, and the names of these."""
        return self.task.graph(self.model)

    @cached_property
    def graph(self) -> Graph:
        """The model in its precision, as a program for any number of images; in float32 where the format rounds it to integers."""
        images = torch.zeros(1, *self.input.size)
        precision = self.precision if self.precision in PRECISIONS else "fp32"
        return exported(self.model, images, self.task, precision=precision)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What a reader needs to know of the model, as texts; what is no text is JSON."""
        names = class_names(self.model)
        content: dict[str, Any] = {
            "compressvit": __version__,
            "source": self.name,
            "architecture": model_name(self.model),
            "transforms": [plan.transform for plan in compression_of(self.model).plans],
            "task": self.task.name,
            "num_classes": getattr(self.model, "num_classes", 0) or 0,
            "outputs": list(self.reference[1]),
            "precision": self.precision,
            **({"calibration_images": sum(map(len, self.calibration))} if self.calibration else {}),
            **self.input.as_dict(),
            "exif": self.exif,
            **({"label_names": names} if names else {}),
        }
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}

    def seal(self, folder: Path) -> None:
        """Note in a folder that an export wrote it, and the metadata."""
        write_json(folder / SEAL, self.metadata)


class Opened(nn.Module):
    """A file as its own runtime computes it: a model from images (B, C, H, W) to tensors.

    Args:
        call: from images to one tensor or several.
    """

    def __init__(self, call: Callable[[Tensor], Any]):
        super().__init__()
        self._call = call

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self._call(images)
        return (found,) if isinstance(found, Tensor) else tuple(found)


class Format(ABC):
    """A format of files for other programs.

    Attributes:
        name: its word, set by `format_of_files`.
        title: what messages call it.
        suffix: of its files; empty where it is a folder, which has a `SEAL` with the metadata (`Source.seal`).
        inside: where it is a folder, the names of the other files in it.
        packages: what must be installed, as Python imports it.
        install: what `pip install` takes for them.
        precisions: those that it has, the usual one first.
        computes: whether what opens a file in a lower precision of floats computes in that; otherwise weights alone are rounded to it.
        has_opset: whether it takes an opset.
        any_model: whether it takes any student as it is.
        reads: whether it has a `read`, so that `compressvit evaluate` takes its files.
        is_graph: whether what is read computes in its runtime on the CPU alone, so that its parameters and MACs are not counted.
        runtime: the package that opens it again.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str] = ""
    inside: ClassVar[Sequence[str]] = ()
    packages: ClassVar[Sequence[str]] = ()
    install: ClassVar[str] = ""
    precisions: ClassVar[Sequence[str]] = ("fp32", "fp16", "bf16")
    computes: ClassVar[bool] = True
    has_opset: ClassVar[bool] = False
    any_model: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    is_graph: ClassVar[bool] = True
    runtime: ClassVar[str]

    def require(self, precision: str, opset: int | None) -> None:
        """Raise a `UserError` where packages are missing, or the format has no such precision or opset."""
        if precision not in self.precisions:
            others = [fmt.name for fmt in FORMATS.values() if precision in fmt.precisions and fmt.any_model]
            hint = f"; {precision} can be had with {option('to')} {' or '.join(others)}" if others else ""
            raise UserError(
                f"{option('precision', precision)}: {self.title} is written in {' or '.join(self.precisions)}{hint}"
            )
        if opset is not None and not self.has_opset:
            raise UserError(f"{option('opset', opset)}: opsets are of ONNX, and {self.title} has none; leave it out")
        require_packages(self.title, self.packages, self.install)

    def computes_in(self, precision: str) -> bool:
        """Whether what opens a file of that precision computes in it."""
        return self.computes or precision in ("fp32", *INTEGERS)

    def refuse(self, source: Source) -> None:  # noqa: B027 - a default, not a gap
        """Raise a `UserError` where the format cannot express a model."""

    def beside(self, name: str) -> list[str]:
        """The files that are written beside one called `name`, or can be: they are replaced together with it."""
        return self.parts(name)

    def parts(self, name: str) -> list[str]:
        """Those of them that hold a part of the model."""
        return []

    def is_at(self, path: Path) -> bool:
        """Whether what is at `path` is a file of the format, by its name."""
        return bool(self.suffix) and path.suffix == self.suffix and path.is_file()

    @abstractmethod
    def write(self, source: Source, path: Path) -> None:
        """Write a model to `path`, and what belongs `beside` it, in a folder where nothing else is.

        Raises:
            UserError: the format cannot express the model.
        """

    @abstractmethod
    def open(self, path: Path, source: Source) -> nn.Module:
        """The file at `path`, which was just written, in the runtime that it is for, on the CPU: from images in float32 to the tensors of
        `Source.reference`."""

    def read(self, path: Path, *, trust: bool = False) -> Reopened:
        """The model in a file that was exported before, which may be from anybody.

        Args:
            trust: the user trusts the file, should reading it run code that is in it.

        Raises:
            UserError: no export wrote it, it is damaged, or it could run code and is not trusted.
        """
        raise TypeError(f"files of {self.title} are not read again")

    def chosen(self, path: Path) -> dict[str, Any]:
        """What the format chose for the file at `path`, for the result."""
        return {}

    def how(self, path: Path) -> str:
        """How the file is read, for the last line of the verb; may be several lines."""
        return ""


FORMATS: Registry[Format] = Registry("format", "compressvit.artifacts.formats")
T = TypeVar("T", bound=type[Format])


def format_of_files(name: str) -> Callable[[T], T]:
    """Register a format under its word. A second one of the same word is refused at import."""

    def register(kind: T) -> T:
        kind.name = name
        FORMATS.add(name, kind(), kind.__module__)
        return kind

    return register


def find_format(name: str) -> Format:
    """The format of that word.

    Raises:
        UserError: there is none, or the package that offers it cannot be used.
    """
    if name in FORMATS:
        return FORMATS[name]
    raise UserError(
        FORMATS.fault(name) or f"{option('to', name)}: there is no such format; {did_you_mean(name, list(FORMATS))}"
    )


def format_at(path: Path) -> Format | None:
    """The format of a file or folder that `compressvit export` can have written and that can be read again; None of others."""
    return next((fmt for fmt in FORMATS.values() if fmt.reads and fmt.is_at(path)), None)
