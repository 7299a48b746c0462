"""A model as timm or transformers writes it: a folder with `config.json` and its tensors. timm's is what
`timm.create_model("local-dir:FOLDER")` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressvit.errors import UserError
from compressvit.model import hugging_face_config
from compressvit.reading import Unreadable, read_json

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"  # of transformers
TENSORS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for
INDEXES = tuple(
    f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")
)  # which tensors are in which of several files
_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class LocalDir:
    """What `config.json` says of a model.

    Attributes:
        files: the tensors; several of a large model.
        architecture: timm's name, without a tag.
        args: further arguments of timm.create_model, the number of classes included.
        input: what images must look like, under the names of an artifact's manifest: input_size, mean, std, interpolation, crop_pct,
            crop_mode.
        label_names: of the classes, in the order of the outputs, where they are known.
    """

    files: tuple[Path, ...]
    architecture: str
    args: dict[str, Any]
    input: dict[str, Any]
    label_names: list[str] | None = None


def read_local_dir(path: Path) -> LocalDir | None:
    """What is known of the weights at `path`: such a folder, or the file of tensors in one, or the index of several; None of others.

    Raises:
        UserError: `config.json` cannot be read or describes what timm has not, or its folder has no tensors.
    """
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    if not config.is_file() or (path.is_file() and path.name not in (*TENSORS, *INDEXES)):
        return None
    content = _content(config)
    if content is None or (described := _of_transformers(content, config) or _of_timm(content)) is None:
        if path.is_file():
            return None  # of something else that keeps a config.json
        kinds = ", ".join(hugging_face_config.KINDS)
        raise UserError(
            f"{config} does not say which model it describes: it has neither timm's 'architecture' nor a 'model_type' of transformers that "
            f"is known ({kinds}); give the file of the weights"
        )
    return LocalDir(_files(path), *described)


def _files(path: Path) -> tuple[Path, ...]:
    """Those with the tensors: the file at `path`, or what is in the folder at `path`."""
    if path.is_file():
        return in_parts(path) if path.name in INDEXES else (path,)
    for name in TENSORS:
        if (path / name).is_file():
            return (path / name,)
    for name in INDEXES:
        if (path / name).is_file():
            return in_parts(path / name)
    raise UserError(f"{path} has a {CONFIG} and no {' or '.join(TENSORS)}; give the folder of a whole model")


def named_parts(index: Path) -> list[str]:
    """The names of the files that an index lists.

    Raises:
        UserError: it is no index, or names what is not beside it.
    """
    content = _content(index)
    places = None if content is None else content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} does not say which tensors are in which file (it has no 'weight_map' of names)")
    names = sorted(set(places.values()))
    outside = next((name for name in names if Path(name).name != name or Path(name).suffix not in _SUFFIXES), None)
    if outside is not None:
        raise UserError(f"{index} names {outside}, which is no file of tensors beside it (.safetensors or .bin)")
    return names


def in_parts(index: Path) -> tuple[Path, ...]:
    """The files beside an index that have a model's tensors; raises as `named_parts`, and a `UserError` where one is not there."""
    names = named_parts(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index} lists {len(names)} files, and {len(missing)} of them are not there ({missing[0]}); give the folder of a whole model"
        )
    return tuple(index.parent / name for name in names)


_Described = tuple[str, dict[str, Any], dict[str, Any], list[str] | None]  # as in LocalDir


def _of_timm(content: dict[str, Any]) -> _Described | None:
    if not isinstance(content.get("architecture"), str):
        return None
    about, args = _mapping(content, "pretrained_cfg") or content, _mapping(content, "model_args")
    if isinstance(content.get("num_classes"), int):
        args = {"num_classes": content["num_classes"], **args}
    known = {
        key: about[key]
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        if about.get(key) is not None
    }
    names = about.get("label_names") or content.get("label_names")
    names = [str(name) for name in names] if isinstance(names, list) else None
    return content["architecture"], args, known, names


def _of_transformers(content: dict[str, Any], config: Path) -> _Described | None:
    try:
        found = hugging_face_config.timms_model(content)
    except UserError as error:
        raise UserError(f"{config}: {error}") from None
    if found is None:
        return None
    beside = config.with_name(PREPROCESSOR)
    images = _content(beside) if beside.is_file() else None
    name, args = found
    if "img_size" not in args and (side := hugging_face_config.image_size(images or {})):  # CvT's config.json has none
        args["img_size"] = side
    names = hugging_face_config.label_names(content) if args["num_classes"] else None
    return name, args, hugging_face_config.input_of(images or {}), names


def _mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _content(file: Path) -> dict[str, Any] | None:
    """The content of a file of JSON; None if it is no mapping."""
    try:
        content = read_json(file)
    except Unreadable as error:
        raise UserError(f"{error}; it says what the tensors beside it are of") from error
    return content if isinstance(content, dict) else None
