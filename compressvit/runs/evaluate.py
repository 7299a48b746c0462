"""Evaluating models on a data set: within a run (`Scorer`), and for `compressvit evaluate`, a run's student or an artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from compressvit import processes
from compressvit.artifacts import artifact
from compressvit.artifacts.formats.base import Format, format_at
from compressvit.data.classes import other_classes
from compressvit.data.input import STATISTICS, Side, asked_statistics
from compressvit.data.loaders import Loader, eval_loader
from compressvit.data.opening import Datasets, open_data
from compressvit.data.samples import Samples
from compressvit.data.sets.base import evenly
from compressvit.data.spec import Data
from compressvit.errors import UserError, option
from compressvit.model import cost, stored
from compressvit.recipe.recipe import Recipe, load_recipe, parse_recipe
from compressvit.runs.files import read_results
from compressvit.runs.folder import RESOLVED, RunFolder
from compressvit.runs.job import pick_device, require_truth
from compressvit.runs.requirement import Requirement
from compressvit.runs.resources import resource_faults
from compressvit.runs.tables import how_judged, scores_table
from compressvit.tasks.base import Task, task_of
from compressvit.tasks.neighbours import INDEXED
from compressvit.tasks.qualities import intervals
from compressvit.terminal import Terminal
from compressvit.text import complain, printable
from compressvit.training.evaluate import Watch, evaluate


@dataclass(frozen=True)
class Scorer:
    """Evaluates models on held-out images, which are preprocessed for each model.

    Attributes:
        other_task: whether the student has another task than its teacher, so that the two are not compared.
    """

    datasets: Datasets
    data: Data
    device: torch.device
    other_task: bool = False

    def task(self, model: Side) -> Task:
        """What the outputs of a model mean."""
        return task_of(model.model, self.data.usual_task)

    def score(
        self, model: Side, teacher: Side | None = None, watch: Watch | None = None, *, search: bool = False
    ) -> dict[str, Any]:
        """Evaluate a model, compared with `teacher` if one is given; both are moved to the device.

        Args:
            search: also what takes a search, where the task has such figures: among held-out images and, if they have labels, training
                images.
        """
        model.model.to(self.device)
        if teacher is not None:
            teacher.model.to(self.device).eval()
        divided = processes.count() > 1
        return evaluate(
            model,
            eval_loader(self.datasets, self.data, model.input, self.device, distributed=divided),
            self.device,
            divided=divided,
            teacher=teacher,
            labelled=self.datasets.labelled,
            task=self.task(model),
            watch=watch,
            index=self._index(model) if search else None,
        )

    def _index(self, model: Side) -> Loader | tuple[()]:
        """The labelled training images in which a task searches, without augmentation; none where there are none."""
        train = self.datasets.train
        if not (self.task(model).searches and self.datasets.labelled and isinstance(train, Samples)):
            return ()
        part = train.part(evenly(len(train), INDEXED))
        datasets = replace(self.datasets, validation=part)
        return eval_loader(datasets, self.data, model.input, self.device, distributed=processes.count() > 1)

    def in_training(self, model: Side, teacher: Side | None) -> dict[str, Any]:
        """Scores during training; compared with the teacher if there is no ground truth for the model's task."""
        enough = self.datasets.labelled and self.task(model).supervised
        return self.score(model, None if enough else self.comparable(teacher))

    def comparable(self, teacher: Side | None) -> Side | None:
        """The teacher; None if the student has another task."""
        return None if self.other_task else teacher


def evaluate_path(
    path: str | Path,
    overrides: list[str],
    *,
    device: str,
    as_json: bool,
    require: Sequence[str] = (),
    trust: bool = False,
) -> int:
    """Evaluate an artifact, or what was exported for other programs, and print the scores. The data is that of its run, which `overrides`
    can change or replace.

    Args:
        require: what figures have to reach, as 'top1>=85'.
        trust: also read a file that can run code, where nothing says that it is the one that was exported.

    Returns:
        The exit code: 1 if a requirement is not met.

    Raises:
        UserError: there is nothing to evaluate at `path`, the data is unknown, it does not fit the model, or a requirement is of a figure
            that there is not.
    """
    wanted = [Requirement.of(text) for text in require]
    path = Path(path)
    fmt = None if (path / RESOLVED).is_file() else format_at(path)
    if fmt is not None and fmt.is_graph:
        _require_of_graph(fmt, wanted, device)
    folder = _in_run(path) if fmt else artifact_in(path)
    opened = fmt.read(path, trust=trust) if fmt else None
    model = opened.side.model if opened else artifact.load(folder)
    shown = path if fmt else folder
    _require_finite(model, shown)
    recipe = data_recipe(folder, overrides, "evaluate")
    require_truth(model, recipe.data, "artifact")
    where = torch.device("cpu") if fmt is not None and fmt.is_graph else pick_device(device)
    datasets = open_data(recipe.data)
    datasets.found += other_classes(datasets.class_names or (), stored.class_names(model) or (), "the model")
    side = _as_asked(opened.side, recipe.data, overrides) if opened else trained_side(model, recipe.data, overrides)
    with resource_faults(recipe.data):
        scores = Scorer(datasets.evidence(), recipe.data, where).score(side, search=True)
    result: dict[str, Any] = {
        "path": str(shown),
        "data": recipe.data.name,
        "reported_on": "validation" if datasets.test is None else "test",
        **_costs(side, fmt, path),
        **scores,
        "intervals": intervals(scores),
        "against_teacher": {} if fmt or overrides else _found_by_run(folder, task_of(model, recipe.data.usual_task)),
        "broken_images": datasets.broken.count,
        "data_notes": [asdict(note) for note in datasets.notes()],
        "weights_notes": [asdict(note) for note in (opened.notes if opened else ())],
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, model, recipe, datasets)
    return _met(wanted, result)


def _met(wanted: Sequence[Requirement], result: dict[str, Any]) -> int:
    """The exit code, once every requirement that is not met is told."""
    missed = [one for one in wanted if not one.met(result)]
    for one in missed:
        complain("compressvit", f"--require {one.text}: {one.key} is {result[one.key]:g}")
    return 1 if missed else 0


def _found_by_run(folder: Path, task: Task) -> dict[str, float]:
    """The figures of a run's student against its teacher, as the run found them on the same images; none where they are not known."""
    run = RunFolder(folder.parent)
    if folder.resolve() != run.student.resolve() or not (run.path / "results.json").is_file():
        return {}
    with suppress(UserError):  # a damaged file is told by who reads the run
        student = read_results(run.path).student
        found = {quality.key: getattr(student, quality.key, None) for quality in task.against_teacher()}
        return {key: value for key, value in found.items() if value is not None}
    return {}


def _costs(side: Side, fmt: Format | None, path: Path) -> dict[str, Any]:
    """What a model costs; of a graph that another program computes, the bytes of its files alone."""
    if fmt is None or not fmt.is_graph:
        return cost.cost(side.model, side.input.size).as_dict()
    files = [path, *(path.with_name(name) for name in fmt.parts(path.name))]
    return {"bytes": sum(file.stat().st_size for file in files if file.is_file())}


def _require_of_graph(fmt: Format, wanted: Sequence[Requirement], device: str) -> None:
    """Raise a `UserError` where something is asked that cannot be had of an exported graph."""
    if device not in ("auto", "cpu"):
        raise UserError(
            f"{option('device', device)}: a file of {fmt.title} is evaluated on the CPU; leave it out, or evaluate the artifact"
        )
    if lacking := next((one for one in wanted if one.key in ("parameters", "macs")), None):
        raise UserError(
            f"--require {lacking.text}: {lacking.key} are not counted in a file of {fmt.title}; ask it of the artifact"
        )


def _as_asked(side: Side, data: Data, overrides: Sequence[str]) -> Side:
    """An exported file, with what `overrides` of the data change of its input."""
    asked = [name for name in STATISTICS if any(override.startswith(f"data.{name}=") for override in overrides)]
    given = {name: value for name in asked if (value := getattr(data, name)) is not None}
    of_channels = data.model_copy(update={name: given.get(name) for name in ("mean", "std")})
    given |= asked_statistics(of_channels, side.input.channels)
    return Side(side.model, replace(side.input, **given))


def _in_run(file: Path) -> Path:
    """What stands for the artifact of an exported file or folder where its data is looked for: in a run's `exported/` that of the run."""
    file = file.resolve()
    return file.parent if (file.parent.parent / RESOLVED).is_file() else file


def _print(result: dict[str, Any], model: nn.Module, recipe: Recipe, datasets: Datasets) -> None:
    test = "" if datasets.test is None else ", its test"
    Terminal().print(scores_table(result, f"{result['path']} on {recipe.data.name}{test}"))
    for text in how_judged(result):
        print(text)
    for note in datasets.notes():
        print(f"data: {printable(note.text)}")
    for row in result["weights_notes"]:
        print(f"weights: {printable(row['text'])}")
    against = task_of(model, recipe.data.usual_task).against_teacher()
    known = result["against_teacher"]
    if known:
        found = (f"{quality.in_text} {quality.text(known[quality.key])}" for quality in against if quality.key in known)
        print(f"beside its teacher, as the run found it: {', '.join(found)}")
    if not datasets.labelled:
        print(
            "the images have no labels, so there is no accuracy"
            + "; `apply` compares a student with its teacher" * (not known)
        )
    elif against and not known:
        absent = " and no ".join(quality.in_text for quality in against)
        print(f"there is no {absent}: `apply` compares a student with its teacher")


def trained_side(model: nn.Module, data: Data, overrides: Sequence[str], *, recorded: bool = True) -> Side:
    """A trained model with the input that it was trained with, unless `overrides` of the data change that.

    Args:
        recorded: the model is from an artifact, or from another folder that records its input.
    """
    asked = any(override.startswith(tuple(f"data.{name}=" for name in STATISTICS)) for override in overrides)
    return Side.of(model, data, trained=not asked, own_crop=recorded)


def _require_finite(model: nn.Module, folder: Path) -> None:
    """Raise a `UserError` if a model's scores are not finite and thus meaningless."""
    wrong = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if wrong:
        raise UserError(
            f"{folder} cannot be evaluated: {wrong[0]} has values that are not finite ({len(wrong)} such tensors); its training diverged, "
            "or its teacher's weights are damaged"
        )


def artifact_in(path: Path) -> Path:
    """The artifact at a path, or that of the student if the path is a run folder.

    Raises:
        UserError: the path is neither.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give a run folder, or an artifact (a folder with {stored.MANIFEST})")
    if path.is_file() and path.suffix == ".safetensors":
        raise UserError(
            f"{path} is a file, which compressvit.load and `compressvit evaluate` alone read where `compressvit export` wrote it; give "
            f"the run folder or the artifact (a folder with {stored.MANIFEST}) that it was made from"
        )
    if path.is_file():
        raise UserError(f"{path} is a file; give a run folder, or an artifact (a folder with {stored.MANIFEST})")
    folder = path / "student" if (path / RESOLVED).is_file() else path
    if folder != path and not stored.is_artifact(folder):
        raise UserError(f"{path} is a run that has no student yet; finish it with `compressvit apply … --resume`")
    stored.read_manifest(folder)  # raises an error that explains the problem
    return folder


def data_recipe(folder: Path, overrides: list[str], asker: str) -> Recipe:
    """The recipe whose data is used with the artifact in `folder`: that of its run, or a minimal one for the overrides.

    Raises:
        UserError: an override does not concern the data, or the data is unknown.
    """
    wrong = [o for o in overrides if "=" in o and not o.startswith("data.")]
    if wrong:
        judged = any(sign in wrong[0] for sign in (">=", "<="))
        hint = f"; for a requirement write --require '{wrong[0]}', once for each" if judged else ""
        raise UserError(
            f"{asker} takes overrides of the data only, not '{wrong[0]}', e.g. data.name=digits data.root=FOLDER{hint}"
        )
    resolved = folder.parent / RESOLVED
    if resolved.is_file():
        return load_recipe(resolved, overrides)
    if not any(o.startswith("data.name=") for o in overrides):
        raise UserError(
            f"{folder} is not in a run folder, so its data is not known; "
            "add data.name=digits, or data.name=folder data.root=FOLDER"
        )
    frame = {"teacher": {"model": "vit_tiny_patch16_224"}, "data": {}, "steps": [{"finetune": {}}]}
    return parse_recipe(yaml.safe_dump(frame), "the data given", overrides)
