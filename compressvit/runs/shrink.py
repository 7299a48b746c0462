"""`shrink`: a recipe of one `shrink` step, from a pretrained model, a folder of images and a size; and its run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import nn

from compressvit.errors import UserError, did_you_mean, option, switch
from compressvit.files import expanded
from compressvit.fitting.judge import FIGURES
from compressvit.model import cost, weights
from compressvit.model.backbone import input_size
from compressvit.model.header import MANIFEST
from compressvit.model.hub import weights_path
from compressvit.model.local_dir import read_local_dir
from compressvit.model.names import is_model
from compressvit.model.stored import is_artifact, read_manifest
from compressvit.model.unwrapping import named_in
from compressvit.model.weights import MisfitError, NoPretrainedError
from compressvit.recipe.recipe import Recipe, parse_recipe
from compressvit.recipe.yaml import dumped
from compressvit.runs.apply import RunResult, apply
from compressvit.runs.labels import labels_for
from compressvit.runs.models import teacher_architecture
from compressvit.runs.shrink_words import SIZES
from compressvit.transforms.shrink import Shrink
from compressvit.transforms.shrink.keep import ShrinkKeep
from compressvit.transforms.shrink.prices import Unit

CALIBRATION = 1024  # images
_TOKENS = 48  # of each
_HELD_OUT = 5000  # unlabelled images, which are enough to compare two models
_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".npz", ".onnx")
_NAMES = {"macs": "MACs"}


def shrink(
    source: str | Path,
    images: str | Path,
    to: float | Mapping[str, float] | None = None,
    output: str | Path | None = None,
    *,
    keep: Mapping[str, float] | None = None,
    unit: str | None = None,
    model: str | None = None,
    img_size: int | None = None,
    args: Mapping[str, Any] | None = None,
    batch: int | None = None,
    calibration: int = CALIBRATION,
    val_fraction: float | None = None,
    quantise: bool = False,
    **options: Any,
) -> RunResult:
    """Make a pretrained ViT smaller, without training, as `compressvit shrink` does.

    Args:
        source, images, to, keep, unit, model, img_size, args, batch, calibration, val_fraction, quantise: as for `shrink_recipe`.
        output: the run folder; by default `runs/shrink_NAME`.
        options: further ones of `apply`: device, resume, overwrite, console, report.

    Raises:
        UserError: it cannot be done as requested.

    Example:
        >>> import compressvit
        >>> compressvit.shrink("vit_small_patch14_dinov2", "photos", {"macs": 0.5}, img_size=224).student  # doctest: +SKIP
    """
    recipe = shrink_recipe(
        source,
        images,
        to,
        keep=keep,
        unit=unit,
        model=model,
        img_size=img_size,
        args=args,
        batch=batch,
        calibration=calibration,
        val_fraction=val_fraction,
        quantise=quantise,
    )
    return apply_recipe(recipe, default_output(recipe) if output is None else output, **options)


def apply_recipe(recipe: Mapping[str, Any], output: str | Path, **options: Any) -> RunResult:
    """`apply` of a recipe of `shrink_recipe`. Where timm's weights cannot be had, the message says how to give a file."""
    try:
        return apply(recipe, output, **options)
    except NoPretrainedError as error:
        name, images = recipe["teacher"]["model"], recipe["data"]["root"]
        raise UserError(f"{error}\n  To shrink that file: compressvit shrink PATH {images} --model {name}") from error
    except MisfitError as error:
        raise UserError(
            f"{error}\n  Arguments that it was built with are given as {option('args', 'patch_size=8 …')}"
        ) from error


def shrink_recipe(
    source: str | Path,
    images: str | Path,
    to: float | Mapping[str, float] | None = None,
    *,
    keep: Mapping[str, float] | None = None,
    unit: str | None = None,
    model: str | None = None,
    img_size: int | None = None,
    args: Mapping[str, Any] | None = None,
    batch: int | None = None,
    calibration: int = CALIBRATION,
    val_fraction: float | None = None,
    quantise: bool = False,
) -> dict[str, Any]:
    """A recipe as data.

    Args:
        source: timm's name of a pretrained model, the path of a weights file, or of a folder with an artifact or a model of timm's.
        images: a folder. Labels are used for evaluation where it has train/ and val/ with a folder per class, as many as the model has
            classes, or any if it has no classifier (k-NN accuracy); otherwise its images are searched recursively. Folders directly in
            it are not taken for classes, as they may be albums or days, but with `val_fraction`.
        to: a limit by unit ('parameters', 'macs', 'bytes', 'latency'), up to 1 a fraction of the teacher's; a number is one of
            parameters. Latency above 1 is in milliseconds. By default half of the parameters, unless `keep` is given.
        keep: instead, what the student keeps on held-out images, e.g. {'cosine': 0.98} or {'top1_drop': 1.0}: the smallest that does is
            searched for.
        unit: with `keep`, in which it is the smallest; by default parameters.
        model: timm's name of the architecture of a weights file.
        img_size: height and width in pixels of the images that the model is built for.
        args: further arguments of timm.create_model that it was built with, `num_classes` too (0: without the file's classifier).
        batch: images at once for which latency counts; by default one.
        calibration: number of images that the student is fitted to.
        val_fraction: takes the folders directly in `images` (or in its train/) for classes, and holds out so much of each to judge on.
        quantise: round the weights in the end, to 4 bits, or where bytes have a limit to 3 to 8 bits each; what is removed and how far the
            rest is rounded are then chosen together.

    Raises:
        UserError: there is no such model, file or folder; a limit is no smaller than the teacher; the model cannot be made narrower; with
            `val_fraction`, the model has another number of classes than there are folders.
    """
    step = _step(to, keep, unit, batch)
    recipe: dict[str, Any] = {
        "description": "",
        "seed": 0,
        "teacher": {**_teacher(_as_text(source), model), **_arguments(args, img_size)},
        "data": _data(images, val_fraction),
        "calibration": {"images": calibration, "tokens": _TOKENS},
        "steps": [{"shrink": step}],
    }
    built = _built(recipe)
    _require_smaller(built, step)
    if quantise:
        recipe["steps"].append({"quantise": _rounding(built, step)})
    labels, found = labels_for(built, recipe["data"])
    if found:
        recipe["data"]["name"] = "folder"
        if getattr(built, "num_classes", 0):  # accuracy is that of all held-out images
            del recipe["data"]["limit_val"]
    recipe["description"] = f"{recipe['teacher']['model']} with {_size(recipe)}, without training; {labels}."
    return recipe


def _arguments(args: Mapping[str, Any] | None, img_size: int | None) -> dict[str, Any]:
    """What the recipe's `teacher` section says of the arguments that the model was built with."""
    found = dict(args or {})
    if img_size is not None:
        if "img_size" in found:
            raise UserError(f"{option('img_size', img_size)} and {option('args')} both give img_size; give one of them")
        found["img_size"] = img_size
    own = {"num_classes": found.pop("num_classes")} if "num_classes" in found else {}
    return {**({"args": found} if found else {}), **own}


def _size(recipe: Mapping[str, Any]) -> str:
    """What is wanted, in words."""
    step = recipe["steps"][0]["shrink"]
    wanted = " and ".join(_text(unit, limit) for unit, limit in step.get("budget", {}).items()) or _kept(step)
    return wanted + ", rounded" * (len(recipe["steps"]) > 1)


def _rounding(teacher: nn.Module, step: dict[str, Any]) -> dict[str, Any]:
    """The options of the `quantise` step behind `shrink`, which counts on it where bytes have a limit."""
    if "budget" not in step:
        raise UserError(
            f"{switch('quantise')}: {option('keep')} judges students before they are rounded, so the one it finds might keep less; give "
            f"sizes with {option('to')}, {SIZES}"
        )
    limit = step["budget"].get("bytes")
    if limit is None:
        return {"bits": 4}
    step["rounded"] = True
    return {"budget": {"bytes": int(limit * cost.file_bytes(teacher) if limit <= 1 else limit)}}


def _data(images: str | Path, val_fraction: float | None) -> dict[str, Any]:
    """The recipe's `data` section, of images without labels."""
    root = expanded(images, "IMAGES")
    if not root.is_dir():
        raise UserError(
            f"IMAGES: {images} is a file; give a folder" if root.exists() else f"there is no folder {images}"
        )
    found = {"name": "images", "root": str(images), "limit_val": _HELD_OUT, "batch_size": 32, "num_workers": 2}
    return found if val_fraction is None else {**found, "val_fraction": val_fraction}


def default_output(recipe: Mapping[str, Any]) -> Path:
    """The run folder of a recipe of `shrink_recipe`, after the model or the weights file."""
    teacher = recipe["teacher"]
    name = teacher["model"]
    if _is_file(teacher["weights"]):
        file = Path(teacher["weights"]).name.split(".")[0] or name
        name = file if file == name else f"{file}_{name}"
    return Path("runs") / f"shrink_{name}"


def _budget(to: float | Mapping[str, float]) -> dict[str, float]:
    """The limits, in the order given."""
    budget = dict(to) if isinstance(to, Mapping) else {"parameters": to}
    if not budget:
        raise UserError(f"{option('to')} has no limit; give one, {SIZES}")
    for unit, limit in budget.items():
        _known_unit(unit, option("to", f"{unit}={limit}"))
        if not 0 < limit < math.inf:
            raise UserError(f"{option('to', f'{unit}={limit:g}')}: a limit is above 0, {SIZES}")
    return budget


def _step(
    to: float | Mapping[str, float] | None, keep: Mapping[str, float] | None, unit: str | None, batch: int | None
) -> dict[str, Any]:
    """The options of the recipe's step."""
    if keep is None:
        if unit is not None:
            raise UserError(
                f"{option('unit', unit)} is for {option('keep')}; name the unit of a limit with it, e.g. {unit}=0.5"
            )
        found: dict[str, Any] = {"budget": _budget(0.5 if to is None else to)}
        units = list(found["budget"])
    else:
        if to is not None:
            raise UserError(
                f"{option('to')} and {option('keep')} both say how small the student becomes; give one of them"
            )
        found = {"keep": _keep(keep)}
        if unit is not None:
            found["unit"] = _known_unit(unit, option("unit", unit))
        units = [unit or "parameters"]
    if batch is not None:
        if "latency" not in units:
            raise UserError(f"{option('batch', batch)} is for latency, which is no unit here; leave it out")
        found["batch"] = batch
    return found


def _keep(keep: Mapping[str, float]) -> dict[str, float]:
    """What is kept, checked by name; values are checked with the recipe."""
    for name in keep:
        if name not in FIGURES:
            raise UserError(f"{option('keep', name)}: nothing is called {name!r}; {did_you_mean(name, FIGURES)}")
    try:
        return ShrinkKeep(**keep).wanted
    except UserError as error:
        raise UserError(f"{option('keep')}: {error}") from error


def _known_unit(unit: str, where: str) -> str:
    if unit not in get_args(Unit):
        raise UserError(f"{where}: there is no unit {unit!r}; {did_you_mean(unit, get_args(Unit))}")
    return unit


def _kept(step: Mapping[str, Any]) -> str:
    unit = step.get("unit", "parameters")
    return f"as few {_NAMES.get(unit, unit)} as keep {ShrinkKeep(**step['keep']).words()}".replace(
        "few latency", "little latency"
    )


def _text(unit: str, limit: float) -> str:
    name = _NAMES.get(unit, unit)
    if unit == "latency" and limit > 1:
        return f"at most {limit:g} ms latency"
    return f"{limit:g} of its {name}" if limit <= 1 else f"at most {limit:,.0f} {name}"


def _is_file(source: str) -> bool:
    """Whether these weights are a file that does not say what it is of."""
    path = weights_path(source, "the weights")
    return source != "pretrained" and path.is_file() and read_local_dir(path) is None


def _teacher(source: str, model: str | None) -> dict[str, Any]:
    """The recipe's `teacher` section. A name of timm's means timm's model, also where a folder has that name; a file means itself."""
    path = weights_path(source, "MODEL_OR_FILE")
    if path.is_file() and read_local_dir(path) is None:
        if path.name.endswith(".safetensors") and is_artifact(path.parent):
            raise UserError(f"{source} is a part of an artifact; give its folder, {path.parent}")
        model = model or named_in(path)
        if model is None:
            raise UserError(
                f"{source} does not say which model it is of; add {option('model', 'NAME')} with timm's name of its architecture, e.g. "
                f"{option('model', 'vit_small_patch16_224')}"
            )
        weights.require_known(model)
        return {"model": model, "weights": _as_path(source)}
    if path.exists() and not (path.is_dir() and is_model(source.partition(".")[0])):
        own = _stored_name(path, source)
        if model is not None and model.partition(".")[0] != own.partition(".")[0]:
            raise UserError(f"{option('model', model)}: {source} is a {own}; leave {option('model')} out")
        return {"model": own, "weights": _as_path(source)}
    _require_timm(source, path)
    if model is not None and model != source:
        raise UserError(
            f"{option('model', model)} says what a weights file is of, and {source} is a pretrained model of timm's; leave it out, or "
            "give a file"
        )
    return {"model": source, "weights": "pretrained"}


def _as_text(source: Any) -> str:
    """What was given as the model to shrink, if that is a name or a path."""
    if isinstance(source, (str, os.PathLike)):
        return str(os.fspath(source))
    raise UserError(
        f"shrink takes the name of a model or the path of a file, not a {type(source).__name__}; for a model in memory give the folder of "
        "compressvit.save(model, FOLDER), or call compressvit.compress(model, [Shrink(budget={'parameters': 0.5})], calibration=images)"
    )


def _as_path(source: str) -> str:
    """A path that `teacher.weights` does not take for one of its words."""
    return f"./{source}" if source in ("pretrained", "train", "random") else source


def _stored_name(path: Path, source: str) -> str:
    """The architecture of the artifact, or the model of timm's, in a folder."""
    if is_artifact(path):
        return read_manifest(path).architecture
    if (stored := read_local_dir(path)) is not None:
        return stored.architecture
    inside = next((path / name for name in ("teacher", "student") if is_artifact(path / name)), None)
    hint = f"did you mean {inside}?" if inside else "give timm's name of a model, or a weights file"
    raise UserError(
        f"{source} is a folder without a model: it has neither {MANIFEST} nor the config.json of timm or transformers; {hint}"
    )


def _require_timm(source: str, path: Path) -> None:
    last = path.name
    if len(path.parts) > 1 or path.suffix in _FILES:
        hint = f"; timm's model is written {last}" if is_model(last.partition(".")[0]) and len(path.parts) > 1 else ""
        raise UserError(f"there is no file or folder {source}{hint}")
    try:
        weights.require_known(source)
    except UserError as error:
        raise UserError(f"there is no file or folder {source}, and {error}") from None


def _built(recipe: Mapping[str, Any]) -> nn.Module:
    """The teacher of a recipe, without values; that of a file has the classes of the file, as the recipe then says."""
    teacher = recipe["teacher"]
    built = teacher_architecture(_parsed(recipe)).build("meta")
    if _is_file(teacher["weights"]) and "num_classes" not in teacher:
        where = weights_path(teacher["weights"], "the file")
        teacher["num_classes"] = weights.classes_in_file(built, where, "the file")
        built = teacher_architecture(_parsed(recipe)).build("meta")
    return built


def _parsed(recipe: Mapping[str, Any]) -> Recipe:
    return parse_recipe(dumped(recipe))


def _require_smaller(teacher: nn.Module, step: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be made narrower, and a limit that it meets as it is."""
    Shrink.model_validate(step).places_of(teacher)
    whole = cost.cost(teacher, input_size(teacher)).as_dict()
    for unit, limit in step.get("budget", {}).items():
        if unit == "latency":
            if limit == 1:
                raise UserError(f"{option('to', 'latency=1')} is no faster than the teacher; give less, {SIZES}")
        elif (limit * whole[unit] if limit <= 1 else limit) >= whole[unit]:
            raise UserError(
                f"{option('to', f'{unit}={limit:g}')} is no smaller than the teacher, which has {whole[unit]:,} "
                f"{_NAMES.get(unit, unit)}; give less, {SIZES}"
            )
