"""`evaluate`: what a run's student, or an artifact on its own, gets right on a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from compressvit.artifacts import artifact
from compressvit.data.input import input_config
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.errors import UserError
from compressvit.model import cost, stored
from compressvit.recipe.recipe import Recipe, parse_recipe
from compressvit.runs.folder import RESOLVED
from compressvit.runs.preflight import pick_device
from compressvit.training.evaluate import evaluate


def evaluate_path(path: str | Path, overrides: list[str], *, device: str, as_json: bool) -> int:
    """Evaluate and print; the data is that of the run the artifact lies in, changed or given by `overrides`.

    Raises:
        UserError: nothing to evaluate at `path`, no data known, or the data does not fit the model.
    """
    folder = artifact_in(Path(path))
    model = artifact.load(folder)
    recipe = data_recipe(folder, overrides, "evaluate")
    where = pick_device(device)
    datasets = open_data(recipe.data)
    config = input_config(model, recipe.data)
    loader = eval_loader(datasets, recipe.data, config, where)
    result: dict[str, Any] = {
        "path": str(folder),
        "data": recipe.data.name,
        **cost.cost(model, (config.channels, config.height, config.width)).as_dict(),
        **evaluate(model.to(where), loader, where, labelled=datasets.labeled),
        "broken_images": datasets.broken.count,
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    table = Table(title=f"{folder} on {recipe.data.name}", title_justify="left", show_header=False)
    for key, value in result.items():
        if key not in ("path", "data") and value is not None:
            percent = " %" if key in ("top1", "top5") else ""
            table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:.4f}{percent}")
    Console().print(table)
    if not datasets.labeled:
        print("the images have no labels, so there is no accuracy; `apply` compares a student with its teacher")
    return 0


def artifact_in(path: Path) -> Path:
    """The artifact at a path, or the student's of the run there.

    Raises:
        UserError: neither is there.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give a run folder, or an artifact (a folder with {stored.MANIFEST})")
    if path.is_file():
        raise UserError(f"{path} is a file; give a run folder, or an artifact (a folder with {stored.MANIFEST})")
    folder = path / "student" if (path / RESOLVED).is_file() else path
    if folder != path and not stored.is_artifact(folder):
        raise UserError(f"{path} is a run that has no student yet; `compressvit apply … --resume` finishes it")
    stored.read_manifest(folder)  # says what is wrong with it
    return folder


def data_recipe(folder: Path, overrides: list[str], asker: str) -> Recipe:
    """The recipe whose data is used with the artifact in `folder`: the run's, or a frame around what the overrides say.

    Raises:
        UserError: overrides of something else, or no data known.
    """
    wrong = [o for o in overrides if "=" in o and not o.startswith("data.")]
    if wrong:
        raise UserError(
            f"{asker} takes overrides of the data only, not '{wrong[0]}', e.g. data.name=digits data.root=FOLDER"
        )
    resolved = folder.parent / RESOLVED
    if resolved.is_file():
        return parse_recipe(resolved.read_text(encoding="utf-8"), str(resolved), overrides)
    if not any(o.startswith("data.name=") for o in overrides):
        raise UserError(
            f"{folder} does not lie in a run folder, so it does not say on which data to look at it; "
            "add data.name=digits, or data.name=folder data.root=FOLDER"
        )
    frame = {"teacher": {"model": "vit_tiny_patch16_224"}, "data": {}, "steps": [{"finetune": {}}]}
    return parse_recipe(yaml.safe_dump(frame), "the data given", overrides)
