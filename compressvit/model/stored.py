"""A model as files: the manifest that describes its structure, and its tensors. This module does not know what transforms do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import nn

from compressvit import __version__
from compressvit.errors import UserError, did_you_mean
from compressvit.model import old
from compressvit.model.bounded import require_sound
from compressvit.model.checksums import content_checksum, damaged, tensor_checksums
from compressvit.model.header import MANIFEST, TENSORS, Slot, read_header
from compressvit.model.modules import as_timm
from compressvit.model.names import is_model
from compressvit.reading import Unreadable, read_json
from compressvit.spec import Frozen, first_fault

T = TypeVar("T")
LABEL_NAMES = "label_names"  # timm's key
FORMAT = 2  # 1 is read, too (see `compressvit.model.old`)
_CHECKSUMS = "compressvit_checksums"  # among the metadata of a safetensors file without a manifest


class StepRecord(Frozen):
    """One transform of the manifest: its recipe word, its resolved plan, and the package it comes from where that is another one."""

    transform: str
    plan: dict[str, Any]
    package: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        if self.package is None:
            del content["package"]
        return content


class Images(BaseModel):
    """What must hold of a manifest's `input`; a key may be missing."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    mean: list[float] | None = Field(None, min_length=1)
    std: list[PositiveFloat] | None = Field(None, min_length=1)
    interpolation: (
        Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] | None
    ) = None
    crop_pct: float | None = Field(None, gt=0, le=4)
    crop_mode: Literal["center", "squash", "border"] | None = None


class Manifest(Frozen):
    """The structure of an artifact.

    Attributes:
        input: what images must look like: size (C, H, W), mean, std, interpolation, crop_pct.
        label_names: of the classes, in the order of the outputs, where they are known.
        tensors: a checksum for every tensor; none in artifacts of earlier versions.
        checksum: of the manifest itself.
    """

    format: int
    compressvit: str
    architecture: str
    args: dict[str, Any]
    num_classes: int
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    parameters: int
    transforms: list[StepRecord]
    ties: list[list[str]]
    input: dict[str, Any]
    label_names: list[str] | None = None
    tensors: dict[str, str] | None = None
    checksum: str | None = None

    @field_validator("input")
    @classmethod
    def _is_of_images(cls, value: dict[str, Any]) -> dict[str, Any]:
        Images.model_validate(value)
        return value


def build_plain(path: Path, manifest: Manifest) -> nn.Module:
    """timm's own model of a manifest, before any transform, with fresh values; raises a `UserError` where timm cannot build it."""
    import timm

    if not is_model(manifest.architecture):  # `hf-hub:…` would ask a server, `local-dir:…` read another folder
        hint = did_you_mean(manifest.architecture, timm.list_models(), list_at_most=0)
        raise UserError(
            f"{path / MANIFEST}: timm {timm.__version__} cannot build {manifest.architecture[:100]}: it has no architecture of that name"
            + (f"; {hint}" if hint else "")
        )
    try:
        require_sound(manifest.args)
        return timm.create_model(manifest.architecture, pretrained=False, **manifest.args)
    except Exception as error:
        # timm checks its arguments with asserts, look-ups and conversions, so that a wrong one can raise anything
        raise UserError(
            f"{path / MANIFEST}: timm {timm.__version__} cannot build {manifest.architecture} with {manifest.args}: {error}"
        ) from error


def is_artifact(path: Path) -> bool:
    """Whether there is an artifact at `path`."""
    return (path / MANIFEST).is_file()


def expect_images(model: nn.Module, images: dict[str, Any]) -> None:
    """Set the model's input configuration to a manifest's `input`: size, mean, standard deviation, interpolation."""
    known = as_timm(model)
    known.pretrained_cfg = {**known.pretrained_cfg, **_pretrained_config(images)}


def name_classes(model: nn.Module, names: Sequence[str] | None) -> None:
    """Note the names of a model's classes where timm looks for them (`label_names`), if there are as many as it has outputs."""
    known = as_timm(model)
    if names is not None and len(names) == known.num_classes:
        known.pretrained_cfg = {**known.pretrained_cfg, LABEL_NAMES: list(names)}


def class_names(model: nn.Module) -> list[str] | None:
    """What `name_classes` noted, or timm knows; None after the head has been given another size."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get(LABEL_NAMES)
    if not isinstance(names, (list, tuple)) or len(names) != getattr(model, "num_classes", None):
        return None
    return [str(name) for name in names]


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the artifact at `path`; an earlier format is converted to the current one.

    Raises:
        UserError: it is missing, is not JSON, or is of another format.
    """
    manifest = _as_written(Path(path))
    if manifest.format == FORMAT:
        return manifest
    renames = old.renamed_tensors(_words(manifest))
    steps = zip(manifest.transforms, old.current_plans(_words(manifest)), strict=True)
    return manifest.model_copy(
        update={
            "format": FORMAT,
            "transforms": [step.model_copy(update={"transform": word, "plan": plan}) for step, (word, plan) in steps],
            "ties": [[renames.get(name, name) for name in group] for group in manifest.ties],
        }
    )


def require_as_written(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that an artifact is what was written: a flipped bit, or an edited number of heads, may fit and compute something else.

    Args:
        tensors: of the artifact at `path`, as `read_tensors` returns them.

    Raises:
        UserError: a tensor or the manifest is another one. Artifacts of earlier versions have no checksums and are not checked.
    """
    manifest = _as_written(Path(path))
    if wrong := damaged(tensors, manifest.tensors or {}):
        raise UserError(
            f"{Path(path) / TENSORS} is damaged: the checksum of {wrong[0]} is not that of {MANIFEST} ({len(wrong)} of {len(tensors)} "
            "tensors differ); restore the file, or make it again"
        )
    if manifest.checksum is None:
        return
    content = read_json(Path(path) / MANIFEST)
    if content_checksum(content) != manifest.checksum:
        raise UserError(
            f"{Path(path) / MANIFEST} is not what was written: its checksum differs, so the model would be another one. Restore the "
            'file; or, if you edited it on purpose, delete its line "checksum"'
        )


def _words(manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    return [(step.transform, step.plan) for step in manifest.transforms]


def _as_written(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.exists():
        raise UserError(f"there is no {path}; give a folder with {MANIFEST}")
    if not file.is_file():
        hint = f"; did you mean {path / 'student'}?" if (path / "student" / MANIFEST).is_file() else ""
        if (path / "merge.json").is_file():
            hint = f"; it is a merged model, for timm.create_model('local-dir:{path}', pretrained=True)"
        raise UserError(f"{path} is not a compressvit artifact: it has no {MANIFEST}{hint}")
    try:
        content = read_json(file)
        if isinstance(content, dict) and content.get("format") not in (1, FORMAT):
            raise UserError(
                f"{file} is of format {content.get('format')!r}; this compressvit ({__version__}) reads formats 1 to {FORMAT}. "
                f"It was written by compressvit {content.get('compressvit')}"
            )
        return Manifest.model_validate(content)
    except Unreadable as error:
        raise UserError(f"{file} is not a readable manifest: {error.fault}") from error
    except ValidationError as error:
        raise UserError(f"{file} is not a readable manifest: {first_fault(error)}") from error


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The stored tensors of the artifact folder at `path`, by canonical name, on the CPU.

    Raises:
        UserError: the file is missing, truncated, or the manifest is.
    """
    return _in_todays_names(Path(path), read_safetensors(_tensors_of(Path(path))))


def read_slots(path: str | Path) -> dict[str, Slot]:
    """Types and shapes of the stored tensors of the artifact folder at `path`, by canonical name. Raises as `read_tensors`."""
    file = _tensors_of(Path(path))
    try:
        return _in_todays_names(Path(path), read_header(file))
    except Unreadable as error:
        raise _incomplete(file, error.fault) from error


def _tensors_of(path: Path) -> Path:
    file = path / TENSORS
    if not file.is_file():
        raise UserError(
            f"{path} has no {TENSORS}: the artifact is incomplete; `compressvit apply … --resume` writes it again"
        )
    return file


def _in_todays_names(path: Path, tensors: dict[str, T]) -> dict[str, T]:
    manifest = _as_written(path)
    return tensors if manifest.format == FORMAT else old.rename(tensors, old.renamed_tensors(_words(manifest)))


def _incomplete(file: Path, fault: object) -> UserError:
    return UserError(f"{file} is not a complete safetensors file (truncated, or a different format): {fault}")


def require_complete(file: Path) -> None:
    """Raise a `UserError` unless a file is as long as its safetensors header says: it is mapped next, and that takes memory for all."""
    try:
        read_header(file)
    except Unreadable as error:
        raise _incomplete(file, error.fault) from error


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: it is truncated or foreign, or has checksums (`write_checked`) and other tensors.
    """
    require_complete(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            recorded = json.loads((opened.metadata() or {}).get(_CHECKSUMS, "{}"))
    except (SafetensorError, ValueError) as error:
        raise _incomplete(file, error) from error
    if isinstance(recorded, dict) and (wrong := damaged(tensors, recorded)):
        raise UserError(
            f"{file} is damaged: {wrong[0]} is not what was written, by its checksum ({len(wrong)} of {len(tensors)} tensors); "
            "write it again, or take another copy"
        )
    return tensors


def write_checked(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file with checksums of its tensors among its metadata, which other programs pass over.

    safetensors writes metadata in an order of chance; here it is sorted, so that the same model is the same file.
    """
    metadata = {_CHECKSUMS: json.dumps(tensor_checksums(tensors)), "format": "pt"}
    content = serialise(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.write(memoryview(content)[start:])


def _pretrained_config(data: dict[str, Any]) -> dict[str, Any]:
    """timm's field names and types for the manifest's `input`, so that `resolve_model_data_config` answers with it."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {k: tuple(v) if isinstance(v := data[k], list) else v for k in keys if k in data}
