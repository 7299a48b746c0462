"""Build timm models by name and give them values: timm's pretrained ones, a file's, another model's, or noise."""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError, did_you_mean
from compressvit.files import damaged_record, near, torch_fault
from compressvit.model import hugging_face
from compressvit.model.backbone import body_of, head_names, model_name
from compressvit.model.bounded import on_meta, require_sound
from compressvit.model.channels import adapted_channels
from compressvit.model.hub import weights_path
from compressvit.model.local_dir import INDEXES, in_parts, read_local_dir
from compressvit.model.modules import as_timm
from compressvit.model.names import is_model, nearest_model
from compressvit.model.positions import resample_positions, resampled_note, shapes_text
from compressvit.model.stored import is_artifact, read_safetensors, read_tensors, require_as_written
from compressvit.model.unwrapping import contents, load_plain, unwrapped, without_prefix
from compressvit.notes import Note

log = logging.getLogger("compressvit")


class NoPretrainedError(UserError):
    """timm's pretrained weights of a model cannot be had; a file may."""


class MisfitError(UserError):
    """The tensors of a file are not those of the model."""


def build(
    name: str, given: Mapping[str, Any] = MappingProxyType({}), /, *, device: str | None = None, **more: Any
) -> nn.Module:
    """A timm model with fresh values (or none, with device='meta').

    Args:
        given, more: arguments of timm.create_model; those of a recipe or file are `given`, because their names may be any.

    Raises:
        UserError: timm does not know the model, its tag or an argument; near names are suggested.
    """
    import timm

    require_known(name)
    args = {**given, **more}
    try:
        require_sound(args)
        if device is None:
            return timm.create_model(name, pretrained=False, **args)
        with on_meta() if device == "meta" else torch.device(device):
            return timm.create_model(name, pretrained=False, **args)
    except UserError:  # of a detector, which says what is wrong
        raise
    except Exception as error:
        # timm checks its arguments with asserts, look-ups and conversions, so that a wrong one can raise anything
        asked = ", ".join(f"{k}={v!r}" for k, v in args.items()) or "no arguments"
        raise UserError(
            f"timm cannot build {name} with {asked}: {error or type(error).__name__}{_similar_argument(name, error)}"
        ) from error


def _similar_argument(name: str, error: Exception) -> str:
    """For an unknown argument, the most similar one that the model's class has, as a clause, and all where they are few; or empty."""
    import timm

    word = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if word is None:
        return ""
    with suppress(Exception), on_meta():  # whatever timm raises: the first error is reported
        known = list(inspect.signature(type(timm.create_model(name, pretrained=False))).parameters)
        hint = did_you_mean(word[1], known)
        return f"; {hint}" if hint else ""
    return ""


def require_known(name: str) -> None:
    """Check that timm knows a model's name, and its tag if it has one.

    Raises:
        UserError: it does not; near names are suggested.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        hint = nearest_model(architecture) or "timm.list_models() lists them"
        raise UserError(f"timm {timm.__version__} has no model {architecture!r}; {hint}")
    if tag:
        known = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
        if tag not in known:
            raise UserError(f"timm has no pretrained weights {name!r}; {did_you_mean(tag, known)}")


def require_pretrained(model: nn.Module, where: str, *, new_head: bool = False) -> str:
    """The name and tag under which timm has pretrained values for `model`, which may be without values; arguments as `load_pretrained`.

    Raises:
        NoPretrainedError: timm has none.
        UserError: it has none for a head of this size.
    """
    config = as_timm(model).pretrained_cfg
    name: str = config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")
    if not (config.get("hf_hub_id") or config.get("url") or config.get("file")):
        whose = where.partition(".")[0]
        start = f"{where}={'train' if whose == 'teacher' else 'random'} {whose}.backbone=pretrained"
        other = f" Or begin with its backbone's: {start}." if body_of(model) is not None else ""
        raise NoPretrainedError(
            f"{where}: pretrained: timm has no pretrained weights for {name}. {_supply(where)}{other}"
        )
    classes = getattr(model, "num_classes", 0)
    if classes and classes != config.get("num_classes") and not new_head:
        raise UserError(
            f"{where}: the pretrained {name} has {config.get('num_classes')} classes and the model's head {classes}, "
            "so it would stay random; train it with teacher.finetune, or leave num_classes out"
        )
    return name


def load_pretrained(model: nn.Module, where: str, *, new_head: bool = False) -> None:
    """Give `model` the pretrained values that timm has for its name and tag, downloading them if they are not cached.

    Args:
        model: built by `build`; changed in place.
        where: the recipe key that messages name, e.g. 'teacher.weights'.
        new_head: a classifier of another size than the pretrained one may start fresh, because it will be trained.

    Raises:
        NoPretrainedError: they cannot be downloaded; the text says how to supply them.
        UserError: as `require_pretrained`.
    """
    import timm

    name = require_pretrained(model, where, new_head=new_head)
    config = as_timm(model).pretrained_cfg
    try:
        _require_reachable(config)
        loaded = timm.create_model(name, pretrained=True, **getattr(model, "_model_args", {}))
    except Exception as error:
        # what the hub's HTTP client raises has no common base, and the client has changed before
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if str(error).strip()
            else type(error).__name__
        )
        source = (
            f"repository {config['hf_hub_id']} of the Hugging Face Hub"
            if config.get("hf_hub_id")
            else config.get("url")
        )
        raise NoPretrainedError(
            f"{where}: pretrained: the weights of {name} are not in the local cache and could not be downloaded ({reason}).\n"
            f"  They are file model.safetensors of the {source}.\n"
            f"  {_supply(where)}"
        ) from error
    model.load_state_dict(resample_positions(loaded.state_dict(), model))  # of images, for a model of clips


def load_file(model: nn.Module, path: str | Path, where: str, *, new_head: bool = False) -> list[Note]:
    """Give `model` the values in a file: safetensors, or a torch file of plain tensors. Nothing is unpickled.

    As timm does it, position embeddings and tables of relative positions are resampled to the model's token grid, and a first convolution
    of three channels is adapted to the model's number of channels.

    Args:
        model: changed in place; on the meta device it is only compared with the file, and nothing is logged.
        path: the file, or an artifact's folder.
        where: the recipe path to speak of in a message.
        new_head: keep the model's fresh classifier when the file's has another number of classes (it will be trained).

    Returns:
        What was taken off or left out, which is also logged.

    Raises:
        UserError: no such file, a truncated or unsafe one, or (`MisfitError`) tensors that do not fit the model.
    """
    own = model.state_dict()
    stored, notes = _read(weights_path(path, where), where)
    given, more = _under_its_names(stored, own, where)
    tensors = resample_positions(given, model)
    notes += more + resampled_note(given, tensors, model)
    tensors, adapted = adapted_channels(tensors, model)
    notes += adapted
    heads = head_names(model)
    if not any(n in own for n in heads):  # a headless model has no use for the file's classifier
        classifiers = {"head", "head_dist", *_classifiers(model)}
        dropped = [n for n in tensors if n.split(".")[0] in classifiers and n not in own]
        tensors = {n: t for n, t in tensors.items() if n not in dropped}
        if dropped:
            text = f"the file's classifier was left out ({', '.join(dropped)}), because the model has none"
            notes.append(Note("classifier", len(dropped), text))
    misfit = [n for n in tensors if n in own and tensors[n].shape != own[n].shape]
    if misfit and set(misfit) <= heads:
        if not new_head:
            classes, ours = tensors[misfit[0]].shape[0], own[misfit[0]].shape[0]
            # the layers of a detector have more outputs than classes
            known = classes if ours == model.num_classes else "another number of"
            raise UserError(
                f"{where}: {path} has a classifier of {known} classes and the model one of {model.num_classes}; "
                f"set num_classes{f'={classes}' * (known == classes)} beside it, or train a new head with `teacher.finetune`"
            )
        notes.append(Note("classifier", len(misfit), "another number of classes; the classifier is initialised anew"))
        anew = {n.rpartition(".")[0] for n in misfit}  # of a head of several layers the others stay
        tensors = {n: t for n, t in tensors.items() if n not in heads or n.rpartition(".")[0] not in anew}
    _require_fit(tensors, model, heads if new_head else set(), f"{where}: {path}", given)
    notes = [replace(note, text=f"{where}: {path}: {note.text}") for note in notes]
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict(tensors, strict=False)
        for note in notes:
            log.info("%s", note.text)
    return notes


def _require_fit(
    tensors: dict[str, torch.Tensor], model: nn.Module, new: Collection[str], what: str, given: Collection[str]
) -> None:
    """Raise a `MisfitError` unless tensors are those of a model.

    Args:
        new: names of a classifier that may be missing.
        what: the place and the file, for messages.
        given: names of the file's tensors, before any was left out.
    """
    own, heads = model.state_dict(), head_names(model)
    missing = [n for n in own if n not in tensors and n not in new]
    unknown = [n for n in tensors if n not in own]
    misfit = [n for n in tensors if n in own and tensors[n].shape != own[n].shape]
    if missing and set(missing) == heads and not unknown + misfit:
        raise MisfitError(
            f"{what} has no classifier, and the model one of {getattr(model, 'num_classes', 0)} classes; set num_classes=0 beside it, or "
            "train one with `teacher.finetune`"
        )
    if missing or unknown or misfit:
        lines = [
            f"{len(names)} {kind}, first {names[0]}{shapes_text(names[0], tensors, own)}"
            for kind, names in (("tensors missing", missing), ("unknown", unknown), ("of another shape", misfit))
            if names
        ]
        raise MisfitError(
            f"{what} does not fit {model_name(model)}: {'; '.join(lines)}. "
            f"{contents(given, own)}. Check teacher.model and teacher.args against what the file was made with"
        )


def classes_in_file(model: nn.Module, path: Path, where: str) -> int:
    """The number of classes of the classifier in a file of weights; 0 without one.

    Args:
        model: of the file's architecture, with any classifier or none; may be on the meta device.
        path, where: as for `load_file`.

    Raises:
        UserError: as `load_file`, of a file that cannot be read.
    """
    stored, _ = _read(path, where)
    given, _ = _under_its_names(stored, model.state_dict(), where)
    tensors = resample_positions(given, model)
    names = sorted(head_names(model)) or _heads_in(tensors, model)
    return next((len(tensors[name]) for name in names if name in tensors), 0)


def _heads_in(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Weights that a headless model's classifier would have: of its name, and of its width. DINOv2 is headless unless it was fine-tuned."""
    widths = {getattr(as_timm(model), name, None) for name in ("num_features", "head_hidden_size")}
    names = [f"{name}{end}.weight" for name in ("head", *_classifiers(model)) for end in ("", ".fc")]
    return [name for name in names if name in tensors and tensors[name].ndim == 2 and tensors[name].shape[1] in widths]


def _under_its_names(
    stored: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """Tensors under the names of timm's model, and notes on what was taken off or left out."""
    if hugging_face.is_of_transformers(stored):
        return hugging_face.in_timms_names(stored, own, where)
    return without_prefix(stored, own)


def _classifiers(model: nn.Module) -> list[str]:
    """Names of a model's children that hold its classifier where it has one, as timm says: `fc` of a ResNet."""
    said = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [path.split(".")[0] for path in ((said,) if isinstance(said, str) else said)]


def copy_matching(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy the teacher's values, by name, into a student that timm built with other arguments.

    Class, distillation and register tokens may be gone: their rows of the position embedding are then left out. On the meta
    device it only checks. Returns the names that were not copied.

    Raises:
        UserError: a tensor of the student has no counterpart of its shape in the teacher.
    """
    source = teacher.state_dict()
    own = student.state_dict()
    if "pos_embed" in own and "pos_embed" in source and own["pos_embed"].shape != source["pos_embed"].shape:
        extra = source["pos_embed"].shape[1] - own["pos_embed"].shape[1]
        kept = int("cls_token" in own)  # the class token comes first, then distillation and register tokens
        if 0 < extra <= getattr(teacher, "num_prefix_tokens", 0) - kept:
            rows = source["pos_embed"]
            source["pos_embed"] = torch.cat([rows[:, :kept], rows[:, kept + extra :]], dim=1)
    wrong = [n for n in own if n not in source or source[n].shape != own[n].shape]
    if wrong:
        raise UserError(
            f"student.weights: teacher: {len(wrong)} tensors of the student have no counterpart in the teacher, first {wrong[0]}"
            f"{shapes_text(wrong[0], source, own, ('teacher', 'student'))}. Use `student.weights: pretrained` or a file"
        )
    student.load_state_dict({n: source[n] for n in own})
    return [n for n in source if n not in own]


def _read(path: Path, where: str) -> tuple[dict[str, torch.Tensor], list[Note]]:
    if is_artifact(path):
        tensors = read_tensors(path)
        require_as_written(path, tensors)
        return tensors, []
    if path.is_dir() or path.name in INDEXES:
        known = read_local_dir(path) if path.is_dir() else None
        files = in_parts(path) if path.is_file() else known.files if known else ()
        if len(files) > 1:
            return _in_one([_read(file, where) for file in files], where)
        path = files[0] if files else path
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}{near(path) or '.'} {_supply(where)}")
    if path.suffix == ".safetensors":
        return read_safetensors(path), []
    if record := damaged_record(path):
        raise UserError(f"{where}: {path} is damaged (the checksum of its record {record} differs); get it again")
    try:
        content = load_plain(path)
    except Exception as error:
        # on a damaged file: IndexError, struct.error, OSError, whatever the unpickler stumbles on
        raise UserError(
            f"{where}: {path} is not a file of plain tensors ({torch_fault(error)}). compressvit never runs code from a weights file; "
            "convert it to safetensors where you trust it, with safetensors.torch.save_file(model.state_dict(), 'FILE.safetensors')"
        ) from error
    return unwrapped(content, path, where)


def _in_one(
    parts: list[tuple[dict[str, torch.Tensor], list[Note]]], where: str
) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """The tensors of several files as those of one."""
    found: dict[str, torch.Tensor] = {}
    for tensors, _ in parts:
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{where}: {sorted(twice)[0]} is in more than one of the model's files")
        found |= tensors
    notes = [note for _, more in parts for note in more]
    return found, [*notes, Note("parts", len(parts), f"the tensors were read from {len(parts)} files")]


def _require_reachable(config: dict[str, Any]) -> None:
    """Ask the hub once, before timm's own five slow retries, whether uncached weights are available."""
    if not config.get("hf_hub_id") or config.get("custom_load") == "hf-local":
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if any(
        isinstance(try_to_load_from_cache(config["hf_hub_id"], n), str)
        for n in ("model.safetensors", "pytorch_model.bin")
    ):
        return
    get_hf_file_metadata(hf_hub_url(config["hf_hub_id"], "model.safetensors"), timeout=10)


def _supply(where: str) -> str:
    return f"Supply weights as a file: {where}=PATH (safetensors, or a torch file of plain tensors)."


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
