"""`compressvit.distill`: train a student of `compress` with a `DataLoader` of your own, using the `distill` phase of recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from compressvit.artifacts import artifact
from compressvit.data.input import Side, input_config
from compressvit.data.spec import Data
from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError, did_you_mean
from compressvit.files import disk_faults, write_json
from compressvit.log import RunLog
from compressvit.model import surgery
from compressvit.model.modes import evaluating
from compressvit.reading import read_json
from compressvit.runs.batches import LoadedBatches
from compressvit.runs.folder import RunFolder, flat, refuse_processes
from compressvit.runs.job import pick_device
from compressvit.runs.owned import refuse_links
from compressvit.tasks.base import Task, find_task, task_of
from compressvit.training import optimisation as opt
from compressvit.training.evaluate import evaluate
from compressvit.training.loop import Interrupted, Phase
from compressvit.training.pairs import Likeness
from compressvit.training.phases import Setting
from compressvit.training.phases.distill import Distill
from compressvit.training.stage import Stage

Images = Callable[[torch.Tensor], torch.Tensor]
_OPTIONS = "distill.json"  # what the training in a folder was started with
_LAYERS_IMAGES = 256  # for layers='auto', as many as recipes take by default


@dataclass(frozen=True)
class Distilled:
    """What `distill` made.

    Attributes:
        student: the model that was given, trained, in eval mode, on the device it was trained on.
        figures: of the student on the validation images, beside its teacher: `images`, `top1`, `top5` and `loss` (None without labels),
            `agreement` and `cosine` (None where the outputs differ in width), and the teacher's as `teacher_top1`, …; empty without
            validation images.
        kept_epoch: the epoch whose weights it ends with; 0 for those it was given.
        folder: where it was written, if anywhere.
    """

    student: nn.Module
    figures: dict[str, Any]
    kept_epoch: int
    folder: Path | None


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_loader: Iterable[Any],
    *,
    validation: Iterable[Any] | None = None,
    device: str = "auto",
    output: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    teacher_input: Images | None = None,
    task: str | None = None,
    console: Console | None = None,
    **options: Any,
) -> Distilled:
    """Train a student in place to reproduce its teacher, on batches of your own.

    Args:
        student: e.g. what `compress` returns.
        teacher: what it learns from; it is not changed.
        train_loader: with a length, gives batches of images (B, C, H, W) that are normalised for the student, alone or with targets
            (B,) of class indices, −1 where an image has none, or those of another `task`. Shuffling and augmentation are its own.
        validation: batches likewise, to evaluate on.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …
        output: a folder for `student/` (an artifact), `metrics.jsonl`, `run.log`, TensorBoard's files and the checkpoint.
        resume: continue the training in `output`, which has to have the same options.
        seed: of what is random in the training itself (dropout, mixup, …).
        teacher_input: turns a batch of the student's into the teacher's. By default it is resized and normalised anew where timm's
            configurations of the two models differ.
        task: a word for what outputs and targets mean; None: classes where the student has a classifier, else features.
        console: where progress goes; `Console(quiet=True)` shows nothing.
        **options: of the `distill` phase, as recipes have them: `epochs`, `lr`, `losses`, `layers`, `keep`, ….

    Raises:
        UserError: a batch, an option or a pair of models that does not do.
        compressvit.training.loop.Interrupted: stopped by a signal, after a checkpoint.

    Example:
        >>> student = compressvit.compress(teacher, [compressvit.Multiplex(share=2)])  # doctest: +SKIP
        >>> done = compressvit.distill(student, teacher, train_loader, validation=val_loader, epochs=5)  # doctest: +SKIP
        >>> done.figures["agreement"]  # doctest: +SKIP
        96.4
    """
    refuse_processes()
    spec = _options(options)
    where = pick_device(device)
    _refuse_models(student, teacher)
    meaning = _task(task, student)
    batches = LoadedBatches(train_loader, "train_loader", student, meaning, spec.needs_labels)
    held_out = LoadedBatches(validation, "validation", student, meaning) if validation is not None else None
    ours, theirs = _sides(student, teacher, batches.first, teacher_input)
    _refuse(spec, ours, theirs, batches, held_out)
    folder = _folder(output, student, resume, spec.model_dump(mode="json") | {"seed": seed, "task": task})
    bench = _Bench(ours, theirs, batches, held_out, where)
    report = bench.train(spec, folder, seed, console)
    figures = bench.evaluate(student, theirs)
    if folder is not None:
        with disk_faults(folder.student):
            artifact.save(student, folder.student, input_config=ours.input.as_dict())
    return Distilled(student, figures, report["kept_epoch"], folder.path if folder is not None else None)


@dataclass(frozen=True)
class _Bench:
    """Two models and the batches to train and to evaluate on."""

    ours: Side
    theirs: Side
    batches: LoadedBatches
    held_out: LoadedBatches | None
    device: torch.device

    def train(self, spec: Distill, folder: RunFolder | None, seed: int, console: Console | None) -> dict[str, Any]:
        """The phase, in a folder if there is one; returns what it reports."""
        with TemporaryDirectory() as scratch, folder.owned() if folder is not None else nullcontext():
            phase = Phase("distill", 1, seed, (folder or RunFolder(scratch)).checkpoint("distill"))
            log = RunLog(folder.path if folder is not None else None, console)
            return _run(spec, self.stage(phase, log), self.ours.model, folder)

    def stage(self, phase: Phase, log: RunLog) -> Stage:
        return Stage(
            phase=phase,
            input=self.ours.input,
            teacher=self.theirs,
            device=self.device,
            log=log,
            batch_size=self.batches.batch_size,
            loader=lambda: self.batches,
            evaluate=self.in_training,
            likeness=self.likeness,
            task=self.batches.task,
        )

    def in_training(self, model: nn.Module) -> dict[str, Any]:
        """Scores during training: against the teacher where there is no ground truth for the task."""
        enough = self.held_out is not None and self.held_out.labelled and self.batches.task.supervised
        return self.evaluate(model, None if enough else self.theirs)

    def evaluate(self, model: nn.Module, teacher: Side | None) -> dict[str, Any]:
        """Scores on the validation images; none without any."""
        if self.held_out is None:
            return {}
        model.to(self.device)
        if teacher is not None:
            teacher.model.to(self.device).eval()
        ours, task = Side(model, self.ours.input), self.batches.task
        return evaluate(ours, self.held_out, self.device, teacher=teacher, labelled=self.held_out.labelled, task=task)

    def likeness(self, student: nn.Module) -> Likeness:
        """For layers='auto': CKA on training images."""
        ours = Side(student, self.ours.input)
        batches = lambda: (images for images, _ in self.batches)  # noqa: E731
        return likeness(ours, self.theirs, batches, self.device, images=_LAYERS_IMAGES)


@dataclass(frozen=True)
class _Converted(Side):
    """A teacher whose images are made by a function of the caller's."""

    convert: Images

    def converter(self, source: Any) -> Images:
        return self.convert


def _options(options: dict[str, Any]) -> Distill:
    """The phase with these options."""
    unknown = next((name for name in options if name not in Distill.model_fields), None)
    if unknown is not None:
        hint = did_you_mean(unknown, Distill.model_fields)
        raise UserError(f"distill has no option {unknown!r}; {hint or '`compressvit schema distill` lists them'}")
    try:
        return Distill(**options)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg'].removeprefix('Value error, ')}" for f in error.errors()]
        raise UserError(f"distill: {'; '.join(faults)}; `compressvit schema distill` explains the options") from None


def _task(name: str | None, student: nn.Module) -> Task:
    if name is None:
        return task_of(student)
    found = find_task(name)
    if not found.fits(student):
        raise UserError(
            f"task={name!r}: the student's outputs cannot be read as those of that task; give a student with its head, or leave task out"
        )
    return found


def _refuse_models(student: nn.Module, teacher: nn.Module) -> None:
    for whose, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise UserError(f"the {whose} is a {type(model).__name__}, not a model")
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if dtypes != {torch.float32}:
            given = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "nothing"
            raise UserError(
                f"the {whose} has parameters of {given}, and is trained and asked in float32; give {whose}.float(), with "
                "precision='bf16' for autocast"
            )
    if student is teacher:
        raise UserError(
            "student and teacher are the same model; give compress(teacher, […]), or a copy, as the student"
        )


def _sides(
    student: nn.Module, teacher: nn.Module, images: torch.Tensor, teacher_input: Images | None
) -> tuple[Side, Side]:
    """What the images of both look like, by two of the student's; those are found to be what the models take."""
    images, shape = images[:2], tuple(images.shape[1:])
    _try(student, images, f"the student does not take images of shape {shape}", "")
    ours = replace(input_config(student, Data(name="images")), channels=shape[0], height=shape[1], width=shape[2])
    # a model that timm did not build does not say what it takes
    known = input_config(teacher, Data(name="images")) if hasattr(teacher, "pretrained_cfg") else ours
    theirs = Side(teacher, known) if teacher_input is None else _Converted(teacher, known, teacher_input)
    converted = theirs.converter(ours)(images)
    size = tuple(converted.shape[1:])
    way = "; teacher_input=FUNCTION converts the student's images to the teacher's"
    _try(teacher, converted, f"the teacher does not take images of shape {size}", way)
    return Side(student, ours), replace(theirs, input=replace(known, channels=size[0], height=size[1], width=size[2]))


def _refuse(
    spec: Distill, student: Side, teacher: Side, batches: LoadedBatches, held_out: LoadedBatches | None
) -> None:
    """All that the phase's plan refuses, and what only a Python call can get wrong."""
    if spec.keep == "best" and held_out is None:
        raise UserError(
            "keep='best' needs evaluations, and there are no validation batches; give validation=LOADER, or keep='last'"
        )
    if held_out is not None and held_out.shape != batches.shape:
        raise UserError(
            f"the images of train_loader are {batches.shape} and those of validation {held_out.shape}; give them one size"
        )
    unlabelled = None if batches.labelled else "the batches of train_loader"
    skeletons = [replace(side, model=surgery.skeleton(side.model)) for side in (student, teacher)]
    spec.plan(Setting(skeletons[0], skeletons[1], batches.batch_size, unlabelled, batches.task))


def _try(model: nn.Module, images: torch.Tensor, fault: str, way: str) -> None:
    like = next(model.parameters())
    try:
        with evaluating(model), torch.inference_mode():
            model(images.to(like.device))
    except Exception as error:  # whatever a model raises at images that it does not take
        raise UserError(f"{fault}: {error}{way}") from error


def _folder(output: str | Path | None, student: nn.Module, resume: bool, options: dict[str, Any]) -> RunFolder | None:
    """The folder to write into; `options` are kept there, and a training that is continued has the same."""
    if output is None:
        if resume:
            raise UserError("resume=True continues from the checkpoint in output; give output=FOLDER")
        return None
    folder = RunFolder(output)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file; give the path of a folder as output")
    if resume:
        _refuse_other_options(folder.path / _OPTIONS, options)
        refuse_links(folder.path.resolve())
        return folder
    if folder.path.exists() and any(folder.path.iterdir()):
        raise UserError(
            f"{folder.path} is not empty; give resume=True to continue the training in it, or another output"
        )
    artifact.require_storable(student)
    with disk_faults(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.path / _OPTIONS, options)
    return folder


def _refuse_other_options(file: Path, options: dict[str, Any]) -> None:
    """A training is continued as it was started. (The models and the batches are the caller's word.)"""
    if not file.is_file():
        raise UserError(f"resume=True: there is no training in {file.parent} (no {file.name}); start it without resume")
    try:
        before = flat(read_json(file))
    except ValueError as error:
        raise UserError(f"resume=True: {file} is damaged ({error}); start a training in another output") from error
    now = flat(json.loads(json.dumps(options)))
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"resume=True: the training in {file.parent} was started with other options: {'; '.join(changed)}. Give the same ones, or "
            "another output"
        )


def _run(spec: Distill, stage: Stage, student: nn.Module, folder: RunFolder | None) -> dict[str, Any]:
    opt.seed_everything(stage.phase.seed)
    try:
        return spec.run(student, stage)[1]
    except Interrupted as stop:
        on = "nothing was kept: output=FOLDER keeps a checkpoint" if folder is None else "go on with resume=True"
        stop.args = (f"the training was stopped; {on}",)
        raise
    finally:
        stage.log.close()
