"""A model as timm writes it: a folder with `config.json` and its tensors, which `timm.create_model("local-dir:FOLDER")` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressvit.errors import UserError
from compressvit.reading import Unreadable, read_json

CONFIG = "config.json"
TENSORS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for


@dataclass(frozen=True)
class LocalDir:
    """What `config.json` says of a model.

    Attributes:
        file: the tensors.
        architecture: timm's name, without a tag.
        args: further arguments of timm.create_model, the number of classes included.
        input: what images must look like, under the names of an artifact's manifest: mean, std, interpolation, crop_pct, crop_mode.
        label_names: of the classes, in the order of the outputs, where they are known.
    """

    file: Path
    architecture: str
    args: dict[str, Any]
    input: dict[str, Any]
    label_names: list[str] | None = None


def read_local_dir(path: Path) -> LocalDir | None:
    """What is known of the weights at `path`: such a folder, or the file of tensors in one; None of others.

    Raises:
        UserError: `config.json` cannot be read, or its folder has no tensors.
    """
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if not config.is_file() or (path.is_file() and path.name not in TENSORS):
        return None
    content = _content(config)
    if content is None:
        if path.is_file():
            return None  # of something else that keeps a config.json, e.g. a transformers model
        raise UserError(
            f"{config} does not say which timm model it describes (it has no 'architecture'); give the file of the weights"
        )
    file = path if path.is_file() else next((folder / name for name in TENSORS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has a {CONFIG} and no {' or '.join(TENSORS)}; give the folder of a whole model")
    about, args = _mapping(content, "pretrained_cfg") or content, _mapping(content, "model_args")
    if isinstance(content.get("num_classes"), int):
        args = {"num_classes": content["num_classes"], **args}
    known = {
        key: about[key]
        for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        if about.get(key) is not None
    }
    names = about.get("label_names") or content.get("label_names")
    names = [str(name) for name in names] if isinstance(names, list) else None
    return LocalDir(file, content["architecture"], args, known, names)


def _mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _content(file: Path) -> dict[str, Any] | None:
    """The content of a config.json; None of one that does not describe a timm model."""
    try:
        content = read_json(file)
    except Unreadable as error:
        raise UserError(f"{error}; it says how the weights beside it want their images") from error
    return content if isinstance(content, dict) and isinstance(content.get("architecture"), str) else None
