"""Adapter files: the parameters trained on top of a frozen backbone, in one small safetensors file per task.

The header of the file describes the structure to add, and contains the hash of the backbone. Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressvit import __version__
from compressvit.errors import UserError
from compressvit.files import usual_mode, write_atomically
from compressvit.model import surgery, ties
from compressvit.model.backbone import head_names, model_name
from compressvit.model.bounded import on_meta
from compressvit.model.checksums import content_checksum
from compressvit.model.modules import as_timm
from compressvit.model.stored import StepRecord, read_safetensors, require_complete
from compressvit.model.weights import hash_tensors
from compressvit.reading import Unreadable, parse_json
from compressvit.spec import Frozen, first_fault
from compressvit.transforms.applying import apply_plans
from compressvit.transforms.base import Plan
from compressvit.transforms.record import Compression, compression_of, set_compression, trained_names
from compressvit.transforms.stored import record_of, resolve_plan

FORMAT = 1
_KEY = "compressvit"


class AdapterHeader(Frozen):
    """The header of an adapter file.

    Attributes:
        backbone: hash of the frozen tensors.
        tensors: hash of the tensors in the file; None in files of earlier versions.
        checksum: hash of the header itself; None in files of earlier versions.
    """

    format: int
    compressvit: str
    architecture: str
    num_classes: int
    backbone: str
    transforms: list[StepRecord]
    tensors: str | None = None
    checksum: str | None = None


@dataclass
class _Loaded:
    """What `remove_adapter` restores: the classifier's size, and the tensors that the adapter replaced."""

    num_classes: int
    replaced: dict[str, torch.Tensor]
    trained: dict[str, bool]


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Write the parameters trained on top of a frozen backbone (kilobytes), including the classifier.

    Args:
        model: a timm model with transforms that all freeze the parameters they do not train.
        path: a file, by convention `*.safetensors`.

    Raises:
        UserError: the model has no adapters, or transforms that changed the backbone itself.
    """
    plans = compression_of(model).plans
    others = [plan.transform for plan in plans if plan.trains(model) is None]
    names = trained_names(model)
    if names is None or others:
        made = f"{', '.join(others)} changed the backbone itself" if others else "no transform has frozen anything"
        raise UserError(f"there is no adapter to save on its own: {made}; compressvit.save writes the whole model")
    saved = _saved_names(model)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in ties.unique_state(model).items() if name in saved
    }
    header = AdapterHeader(
        tensors=hash_tensors(tensors),
        format=FORMAT,
        compressvit=__version__,
        architecture=model_name(model),
        num_classes=as_timm(model).num_classes,
        backbone=_hash(model, saved),
        transforms=[record_of(plan) for plan in plans],
    )
    content = header.model_dump(mode="json")
    content["checksum"] = content_checksum(content)

    def write(scratch: Path) -> None:
        save_file(tensors, scratch, metadata={_KEY: json.dumps(content)})
        usual_mode(scratch)

    write_atomically(Path(path), write)
    return Path(path)


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Add an adapter to its backbone, in place. An adapter loaded before is removed first, so this also switches tasks.

    Args:
        model: the plain timm model on which the adapter was trained.
        path: a file written by `save_adapter`.

    Raises:
        UserError: there is no adapter file at `path`, it belongs to another backbone, or transforms have changed the model. The model is
            then unchanged.
    """
    path = Path(path)
    header, plans, written = _read(path)
    if getattr(model, "_adapter", None) is None and compression_of(model).plans:
        made = ", ".join(plan.transform for plan in compression_of(model).plans)
        raise UserError(
            f"{path} is loaded onto a plain backbone, but this model was changed by {made}; build a new one"
        )
    tensors = read_safetensors(path)
    if model_name(model) != header.architecture:
        raise UserError(f"{path} was trained with a {header.architecture}, and this is a {model_name(model)}")
    known = getattr(model, "_adapter", None)
    if _hash(model, tensors.keys() | head_names(model), restored=known) != header.backbone:
        raise UserError(
            f"{path} was trained with another {header.architecture}: its frozen weights (or their sizes or precision) differ; "
            "load the weights of the run's teacher, in the same precision and input size"
        )
    _require_fit(model, header, plans, tensors, path)
    _require_as_written(header, written, tensors, path)
    if known:
        remove_adapter(model)
    loaded = _Loaded(as_timm(model).num_classes, {}, {n: p.requires_grad for n, p in model.named_parameters()})
    heads = head_names(model)
    for name, tensor in model.state_dict().items():
        if name in tensors or name in heads:
            loaded.replaced[name] = tensor.detach().clone()
    if header.num_classes != as_timm(model).num_classes:
        like = next(model.parameters())
        as_timm(model).reset_classifier(header.num_classes)
        model.to(device=like.device, dtype=like.dtype)
    apply_plans(model, plans)
    model.load_state_dict(tensors, strict=False)
    vars(model)["_adapter"] = loaded
    return model


def _require_fit(
    model: nn.Module, header: AdapterHeader, plans: list[Plan], tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """Raise a `UserError` unless the tensors are exactly those that the plans train on this backbone; checked on a skeleton."""
    scratch = surgery.skeleton(model)
    surgery.strip(scratch)
    set_compression(scratch, Compression())
    try:
        with on_meta():
            as_timm(scratch).reset_classifier(header.num_classes)
            apply_plans(scratch, plans)
    except Exception as error:  # a plan is checked where a recipe is planned; one that was edited can do anything
        raise UserError(f"{path} does not fit {header.architecture}: {error or type(error).__name__}") from error
    saved = _saved_names(scratch)
    expected = {n: t for n, t in ties.unique_state(scratch).items() if n in saved}
    wrong = list(expected.keys() ^ tensors.keys())
    wrong += [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if wrong:
        what = (
            "is missing"
            if wrong[0] in expected and wrong[0] not in tensors
            else "does not belong there, or has a different shape"
        )
        raise UserError(f"{path} does not fit its own structure: {wrong[0]} {what}; the file was changed")


def _require_as_written(
    header: AdapterHeader, written: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """Raise a `UserError` if the file fails its checksums; files of earlier versions have none.

    Args:
        written: the header as it is in the file; the parsed one also has the fields that were added since.
    """
    if header.tensors is not None and hash_tensors(tensors) != header.tensors:
        what = "tensors are"
    elif header.checksum is not None and content_checksum(written) != header.checksum:
        what = "header is"
    else:
        return
    raise UserError(f"{path} is damaged: its {what} not what was written; restore the file, or train it again")


def _saved_names(model: nn.Module) -> set[str]:
    """Names of the tensors in an adapter file: the trained parameters, the statistics of batch norms that have some, and the masks of
    added modules."""
    trained = trained_names(model) or set()
    owners = {name.rpartition(".")[0] for name in trained}
    norms = [f"{path}." for path, module in model.named_modules() if path in owners and isinstance(module, _BatchNorm)]
    statistics = {f"{norm}{name}" for norm in norms for name, _ in model.get_submodule(norm[:-1]).named_buffers()}
    return trained | statistics | surgery.added_buffers(model)


def remove_adapter(model: nn.Module) -> nn.Module:
    """Undo `load_adapter`, in place, which restores the original backbone and classifier.

    Raises:
        UserError: no adapter was loaded.
    """
    known: _Loaded | None = getattr(model, "_adapter", None)
    if known is None:
        raise UserError("no adapter was loaded onto this model by load_adapter, so none can be removed")
    surgery.strip(model)
    if as_timm(model).num_classes != known.num_classes:
        like = next(model.parameters())
        as_timm(model).reset_classifier(known.num_classes)
        model.to(device=like.device, dtype=like.dtype)
    model.load_state_dict(known.replaced, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(known.trained.get(name, True))
    set_compression(model, Compression())
    del model._adapter
    return model


def _hash(model: nn.Module, without: set[str], restored: _Loaded | None = None) -> str:
    """SHA-256 over the model's original tensors by name, except those given; values that a loaded adapter replaced count as before."""
    added = surgery.added_parameters(model) | surgery.added_buffers(model)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in without and name not in added}
    before = {name: tensor for name, tensor in restored.replaced.items() if name in own} if restored else {}
    return hash_tensors(own | before)


def _read(path: Path) -> tuple[AdapterHeader, list[Plan], dict[str, Any]]:
    if not path.is_file():
        inside = path / "adapter.safetensors"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise UserError(f"there is no adapter file {path}{hint}")
    require_complete(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file (truncated, or a different format): {error}"
        ) from error
    if _KEY not in metadata:
        raise UserError(
            f"{path} is not an adapter file: its header does not say how it was made (compressvit.save_adapter writes it)"
        )
    try:
        content = parse_json(metadata[_KEY], path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: its header holds a {type(content).__name__} where it should say how it was made")
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path} is of format {content.get('format')!r}; this compressvit ({__version__}) reads {FORMAT}"
            )
        header = AdapterHeader.model_validate(content)
    except Unreadable as error:
        raise UserError(f"{path}: its header cannot be read: {error.fault}") from error
    except ValidationError as error:
        raise UserError(f"{path}: its header cannot be read: {first_fault(error)}") from error
    return header, [resolve_plan(step, path) for step in header.transforms], content
