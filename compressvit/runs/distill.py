"""`compressvit.distill`: train a student of `compress` with a `DataLoader` of your own, using the `distill` phase of recipes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import nn

from compressvit import processes
from compressvit.artifacts import artifact
from compressvit.data.input import Side, input_config
from compressvit.data.spec import Data
from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError
from compressvit.files import disk_faults, write_json
from compressvit.log import RunLog
from compressvit.model import surgery
from compressvit.model.modes import evaluating
from compressvit.reading import read_json
from compressvit.runs.batches import LoadedBatches, refuse_cache
from compressvit.runs.boards.base import Board, begin, find_boards, opened
from compressvit.runs.finish import save_student
from compressvit.runs.folder import RunFolder, flat
from compressvit.runs.job import pick_device
from compressvit.runs.owned import refuse_links
from compressvit.runs.resources import resource_faults
from compressvit.tasks.base import Task, find_task, task_of
from compressvit.training import optimisation as opt
from compressvit.training.evaluate import evaluate
from compressvit.training.loop import Interrupted, Phase
from compressvit.training.pairs import Likeness
from compressvit.training.phases import Setting
from compressvit.training.phases.distill import Distill
from compressvit.training.sharding import divided as sharding
from compressvit.training.stage import Stage
from compressvit.training.stopping import Signals

Images = Callable[[torch.Tensor], torch.Tensor]
_OPTIONS = "distill.json"  # the options with which the training in a folder was started
_LAYERS_IMAGES = 256  # for layers='auto'; the default of recipes


@dataclass(frozen=True)
class Distilled:
    """The result of `distill`.

    Attributes:
        student: the given model after training, in eval mode, on the device of the training.
        figures: scores on the validation images: `images` (their number), `top1`, `top5` and `loss` (None without labels), `agreement`
            and `cosine` (None if the outputs differ in width), and `teacher_top1`, … of the teacher; empty without validation images.
        kept_epoch: the epoch whose weights the student has; 0 for the initial ones.
        folder: the output folder, if there is one.
    """

    student: nn.Module = field(repr=False)
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
        student: e.g. the result of `compress`.
        teacher: the model to learn from; it is not changed.
        train_loader: has a length, and yields batches of images (B, C, H, W) normalised for the student, alone or with targets: class
            indices (B,), −1 for an image without one, or the targets of another `task`. It does its own shuffling and augmentation. In one
            of several processes (torchrun) it gives the part of this one, with as many batches as in the others.
        validation: batches of the same form for evaluation; of several processes that of the leader is evaluated.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …; of several processes each takes its own.
        output: a folder for `student/` (an artifact), `metrics.jsonl`, `run.log`, TensorBoard's files and the checkpoint.
        resume: continue the training in `output`, which must have been started with the same options.
        seed: seed of the randomness in the training itself (dropout, mixup, …).
        teacher_input: converts a batch for the student to one for the teacher. By default the images are resized and normalised anew if
            timm's configurations of the two models differ.
        task: name of the task, i.e. what outputs and targets mean; None: classes if the student has a classifier, else features.
        console: shows progress; `Console(quiet=True)` shows nothing.
        **options: options of the `distill` phase, as in recipes: `epochs`, `lr`, `losses`, `layers`, `keep`, ….

    Raises:
        UserError: a batch or an option is invalid, or the models do not fit each other.
        compressvit.training.loop.Interrupted: stopped by a signal; in the training after writing a checkpoint.

    Example:
        >>> student = compressvit.compress(teacher, [compressvit.Multiplex(share=2)])  # doctest: +SKIP
        >>> done = compressvit.distill(student, teacher, train_loader, validation=val_loader, epochs=5)  # doctest: +SKIP
        >>> done.figures["agreement"]  # doctest: +SKIP
        96.4
    """
    given = _Given(device, output, resume, seed, teacher_input, task, console)
    with processes.joined(device):
        return _distilled(Distill(**options), student, teacher, train_loader, validation, given)


@dataclass(frozen=True)
class _Given:
    """What a caller gives beside models and batches."""

    device: str
    output: str | Path | None
    resume: bool
    seed: int
    teacher_input: Images | None
    task: str | None
    console: Console | None


def _distilled(
    spec: Distill,
    student: nn.Module,
    teacher: nn.Module,
    train_loader: Iterable[Any],
    validation: Iterable[Any] | None,
    given: _Given,
) -> Distilled:
    refuse_cache(spec)
    where, output, task = pick_device(given.device), given.output, given.task
    _refuse_models(student, teacher)
    meaning = _task(task, student)
    batches = LoadedBatches(train_loader, "train_loader", student, meaning, spec.needs_labels)
    held_out = LoadedBatches(validation, "validation", student, meaning) if validation is not None else None
    ours, theirs = _sides(student, teacher, batches.first, given.teacher_input)
    _refuse(spec, ours, theirs, batches, held_out)
    settings = spec.model_dump(mode="json") | {"seed": given.seed, "task": task}
    folder = processes.led(lambda: _folder(output, student, given.resume, settings))
    bench = _Bench(ours, theirs, batches, held_out, where)
    with _Stoppable(folder):
        report = bench.train(spec, folder, given.seed, given.console if processes.leads() else Console(quiet=True))
        figures = bench.evaluate(student.to(where), theirs, search=True)
    return Distilled(student, figures, report["kept_epoch"], folder.path if folder is not None else None)


@contextmanager
def _owned(folder: RunFolder | None) -> Iterator[list[Board]]:
    """The boards of a run in a folder, which is locked until the end of the block; none where there is no folder."""
    if folder is None:
        yield []
        return

    def begun() -> list[Board]:
        stack.enter_context(folder.owned())
        boards = stack.enter_context(opened(find_boards(()), folder.path, None, new=False))
        begin(boards)
        return list(boards)

    with ExitStack() as stack:
        yield processes.led_for(begun, [])


@dataclass(frozen=True)
class _Bench:
    """Two models and the batches to train and to evaluate on."""

    ours: Side
    theirs: Side
    batches: LoadedBatches
    held_out: LoadedBatches | None
    device: torch.device

    def train(self, spec: Distill, folder: RunFolder | None, seed: int, console: Console | None) -> dict[str, Any]:
        """Run the phase, in a folder if there is one, where the student is then written; returns the phase's report."""
        with TemporaryDirectory() as scratch, _owned(folder) as boards:
            phase = Phase("distill", 1, seed, (folder or RunFolder(scratch)).checkpoint("distill"))
            log = RunLog(folder.path if folder is not None and processes.leads() else None, console, boards=boards)
            report = _run(spec, self.stage(phase, log), self.ours.model, folder)
            if folder is not None:
                processes.led(lambda: save_student(self.ours, folder.student))
            return report

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
        """Scores during training; compared with the teacher if there is no ground truth for the task."""
        enough = self.held_out is not None and self.held_out.labelled and self.batches.task.supervised
        return self.evaluate(model, None if enough else self.theirs)

    def evaluate(self, model: nn.Module, teacher: Side | None, *, search: bool = False) -> dict[str, Any]:
        """Scores on the validation images, those that take a search among them only if asked for; empty without such images."""
        if (held_out := self.held_out) is None:
            return {}
        with sharding.whole(model, None if teacher is None else teacher.model):
            return processes.led(lambda: self._evaluate(model, teacher, held_out, search=search))

    def _evaluate(
        self, model: nn.Module, teacher: Side | None, held_out: LoadedBatches, *, search: bool
    ) -> dict[str, Any]:
        if teacher is not None:
            teacher.model.to(self.device).eval()
        return evaluate(
            Side(model.to(self.device), self.ours.input),
            held_out,
            self.device,
            teacher=teacher,
            labelled=held_out.labelled,
            task=self.batches.task,
            index=() if search else None,
        )

    def likeness(self, student: nn.Module) -> Likeness:
        """For layers='auto': CKA on training images."""
        ours = Side(student, self.ours.input)
        batches = lambda: (images for images, _ in self.batches)  # noqa: E731
        return likeness(ours, self.theirs, batches, self.device, images=_LAYERS_IMAGES)


@dataclass(frozen=True)
class _Converted(Side):
    """A teacher whose images are converted by a function of the caller."""

    convert: Images

    def converter(self, source: Any) -> Images:
        return self.convert


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
    """The inputs of both models; two of the student's images are used to check that the models accept them."""
    images, shape = images[:2], tuple(images.shape[1:])
    _try(student, images, f"the student does not take images of shape {shape}", "")
    ours = input_config(student, Data(name="images")).at(shape)
    # a model not built by timm does not describe its input
    known = input_config(teacher, Data(name="images")) if hasattr(teacher, "pretrained_cfg") else ours
    theirs = Side(teacher, known) if teacher_input is None else _Converted(teacher, known, teacher_input)
    way = "; teacher_input=FUNCTION converts the student's images to the teacher's"
    try:
        converted = theirs.converter(ours)(images)
    except UserError as error:  # of other channels
        raise UserError(f"{error}{way}") from error
    size = tuple(converted.shape[1:])
    _try(teacher, converted, f"the teacher does not take images of shape {size}", way)
    return Side(student, ours), replace(theirs, input=known.at(size))


def _refuse(
    spec: Distill, student: Side, teacher: Side, batches: LoadedBatches, held_out: LoadedBatches | None
) -> None:
    """Raise all errors of the phase's plan, and those that only a Python call can make."""
    if spec.keep == "best" and held_out is None:
        raise UserError(
            "keep='best' needs evaluations, and there are no validation batches; give validation=LOADER, or keep='last'"
        )
    if held_out is not None and held_out.shape != batches.shape:
        raise UserError(
            f"the images of train_loader are {batches.shape} and those of validation {held_out.shape}; give them one size"
        )
    if len(set(lengths := processes.gathered(len(batches)))) > 1:
        raise processes.told_once(
            UserError(
                f"train_loader has {', '.join(map(str, lengths))} batches in the {len(lengths)} processes, which all have to take as many "
                "steps; give a DistributedSampler, and drop_last=True"
            )
        )
    unlabelled = None if batches.labelled else "the batches of train_loader"
    skeletons = [replace(side, model=surgery.skeleton(side.model)) for side in (student, teacher)]
    spec.plan(Setting(skeletons[0], skeletons[1], batches.batch_size, unlabelled, batches.task))


def _try(model: nn.Module, images: torch.Tensor, fault: str, way: str) -> None:
    like = next(model.parameters())
    try:
        with evaluating(model), torch.inference_mode():
            model(images.to(like.device))
    except Exception as error:  # a model may raise anything for images that it does not accept
        raise UserError(f"{fault}: {error}{way}") from error


def _folder(output: str | Path | None, student: nn.Module, resume: bool, options: dict[str, Any]) -> RunFolder | None:
    """Prepare the output folder; `options` are stored there, and a resumed training must have the same."""
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
    """Refuse to resume a training with other options. (Models and batches cannot be checked.)"""
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
        with resource_faults():
            return spec.run(student, stage)[1]
    finally:
        stage.log.close()


class _Stoppable(Signals):
    """Turns a signal into an `Interrupted` where the training does not wait for it, too: while the student is written or judged."""

    def __init__(self, folder: RunFolder | None):
        super().__init__()
        self.kept = "nothing was kept: output=FOLDER keeps a checkpoint" if folder is None else "go on with resume=True"

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted(error.args[0] if error.args else signal.SIGINT, None, "")
        if isinstance(error, Interrupted):
            error.args = (f"the training was stopped; {self.kept}",)
            raise error
