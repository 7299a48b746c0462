"""`apply`: run a recipe from top to bottom, and leave the student and the evidence in a run folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from compressvit.artifacts import artifact
from compressvit.charts.plots import ranks_finding
from compressvit.data.input import input_config, renormalise
from compressvit.data.loaders import calibration_batches, train_loader
from compressvit.data.opening import Datasets, open_data
from compressvit.data.spec import known_classes
from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError
from compressvit.files import disk_faults, write_text
from compressvit.log import RunLog, log
from compressvit.model import stored
from compressvit.model.old import current_word
from compressvit.recipe.recipe import Merge, Recipe
from compressvit.runs import tensorboard
from compressvit.runs.folder import RunFolder
from compressvit.runs.merge import merge_folder, print_merge
from compressvit.runs.models import build_student, build_teacher, load_teacher, require_student_file, trains_teacher
from compressvit.runs.outcome import Scorer, finish, score_words
from compressvit.runs.plan import plan_recipe, require_no_conflicts
from compressvit.runs.preflight import pick_device, refuse_labels, refuse_own_inputs
from compressvit.runs.recorder import Recorder
from compressvit.runs.tables import ledger_table, print_plan
from compressvit.training import optimisation as opt
from compressvit.training.loop import Phase, Teacher, train
from compressvit.training.pairs import match_layers_once
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.phases.prune.cycles import prune_and_train
from compressvit.training.phases.prune.spec import Prune
from compressvit.training.phases.sparsify import Sparsify, sparsify_
from compressvit.training.spec import Training
from compressvit.training.terms import labels_term, terms_of_phase
from compressvit.transforms import LedgerEntry, Transform
from compressvit.transforms.applying import transform_
from compressvit.transforms.record import compression_of


def apply(
    recipe: Recipe,
    *,
    name: str,
    recipe_text: str,
    output: str | Path,
    command: list[str],
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    report: Callable[[Path], object] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a recipe.

    Everything that can be refused is refused before the folder is touched: conflicts between steps, a missing data set,
    weights that cannot be had.

    Args:
        recipe: what to do; `recipe_text` is its text as given, kept in the folder, and `name` what messages call it.
        output: the run folder.
        command: what was typed, kept in `environment.json`.
        resume, overwrite: what to do with a folder that is not empty.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …
        report: called with the run folder when its results are there, before a merge.

    Returns:
        The content of `results.json`.

    Raises:
        UserError: something asked for cannot be done.
        compressvit.distill.engine.Interrupted: stopped by a signal, after a checkpoint.
    """
    console = console or Console()
    folder = RunFolder(output)
    folder.refuse_or_clear(recipe, resume=resume, overwrite=overwrite)
    plan = plan_recipe(recipe, name)
    require_no_conflicts(plan)
    where = pick_device(device)
    for step in recipe.steps:
        if isinstance(step.spec, Transform):
            step.spec.require_inputs()
    if overwrite:
        refuse_own_inputs(recipe, folder)
    datasets = open_data(recipe.data)
    refuse_labels(recipe, datasets)
    if known_classes(recipe.data) is None and datasets.num_classes:
        plan = plan_recipe(recipe, name, classes=datasets.num_classes)
        require_no_conflicts(plan)
    opt.seed_everything(recipe.seed)
    teacher = build_teacher(recipe, classes=datasets.num_classes)
    require_student_file(recipe, teacher, datasets.num_classes)
    taught = resume and folder.teacher.is_dir()
    if taught:
        teacher = _trained_teacher(folder)
    else:
        load_teacher(recipe, teacher)
    if not resume:
        folder.open(recipe, recipe_text, plan.as_dict(), command, overwrite=overwrite)
    voice = RunLog(folder.path, console, partial(tensorboard.tag_of, tags=tensorboard.scalar_tags(recipe)))
    try:
        voice.show(lambda to: print_plan(plan, to))
        run = _Run(recipe, folder, datasets, where, voice)
        if trains_teacher(recipe) and not taught:
            run.train_teacher(teacher)
            # As a resumed run does: its training left marks on it, such as drop path.
            teacher = _trained_teacher(folder)
        teacher.to(where).eval()
        student = run.make_student(teacher)
        results = finish(
            run.scorer,
            folder,
            voice,
            teacher=teacher,
            student=student,
            teacher_cost=plan.teacher.as_dict(),
            phases=run.phases,
        )
        if report is not None:
            report(folder.path)
        if recipe.merges:  # last, because a merge that is not exact is refused
            voice.show(partial(print_merge, merge_folder(folder.path, device=str(where))))
    except UserError as error:
        log.error("%s", error, extra={"already_shown": True})
        raise
    finally:
        voice.close()
    return results


def _trained_teacher(folder: RunFolder) -> nn.Module:
    """The teacher that an earlier part of the run trained."""
    try:
        return artifact.load(folder.teacher)
    except UserError as error:
        raise UserError(
            f"--resume: {error}\n  Remove {folder.teacher}: --resume then writes it again from its checkpoint"
        ) from error


def _keep_transformed(student: nn.Module, ledger: list[LedgerEntry], path: Path, config: dict[str, Any]) -> None:
    write_text(path.with_suffix(".ledger.json"), json.dumps([asdict(entry) for entry in ledger], indent=2) + "\n")
    with disk_faults(path):  # last: where it is, the ledger is
        artifact.save(student, path, input_config=config)


def _read_transformed(path: Path) -> tuple[nn.Module, list[LedgerEntry]]:
    """The student that an earlier part of the run made, with its record of errors, which an artifact does not have."""
    try:
        student = artifact.load(path)
        ledger = [LedgerEntry(**e) for e in json.loads(path.with_suffix(".ledger.json").read_text(encoding="utf-8"))]
    except (UserError, OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume: {error}\n  Remove {path}: --resume then makes it again") from error
    done = compression_of(student)
    words = {plan.transform for plan in done.plans}
    ledger = [replace(entry, step=current_word(entry.step, words)) for entry in ledger]
    done.ledger[len(done.ledger) - len(ledger) :] = ledger
    return student, ledger


@dataclass
class _Run:
    recipe: Recipe
    folder: RunFolder
    datasets: Datasets
    device: torch.device
    log: RunLog
    phases: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # what each phase began with and which weights it kept

    def __post_init__(self) -> None:
        self.scorer = Scorer(self.recipe, self.datasets, self.device)
        self.diagnostics = Recorder(self.recipe, self.folder.path, self.datasets, self.device, self.log)

    def train_teacher(self, teacher: nn.Module) -> None:
        """The phase before the steps; its result is an artifact of its own, never part of the student's."""
        spec = self.recipe.teacher.finetune or Finetune()
        phase = Phase("teacher", 0, self.recipe.seed, self.folder.checkpoint("teacher"))
        self._train(teacher, spec, phase, None)
        with disk_faults(self.folder.teacher):
            artifact.save(teacher, self.folder.teacher, input_config=input_config(teacher, self.recipe.data).as_dict())

    def make_student(self, teacher: nn.Module) -> nn.Module:
        """Run the steps, top to bottom. Neighbouring transforms are planned and initialised together."""
        opt.seed_everything(self.recipe.seed, 1)
        student = build_student(self.recipe, teacher, classes=self.datasets.num_classes)
        waiting: list[Transform] = []
        for index, step in enumerate(self.recipe.steps):
            if isinstance(step.spec, Transform):
                waiting.append(step.spec)
                continue
            if isinstance(step.spec, Merge):  # of what is written in the end
                break
            name = f"{index}_{step.name}"
            phase = Phase(name, index + 1, self.recipe.seed, self.folder.checkpoint(name))
            start = None
            if waiting:
                student = self._transform(student, waiting, index)
                if not phase.checkpoint.is_file():  # a resumed run has said it before
                    start = self.scorer.score(student, self.scorer.comparable(teacher))
                    self.log.scalars(f"{index - 1}_{waiting[-1].name}", "evaluate", 0, start)
                    self.log.say(f"before training: {score_words(start)}")
            waiting = []
            if isinstance(step.spec, Sparsify):
                left = self._sparsify(student, step.spec, phase)
                self.phases[name] = {**self._train(student, step.spec, phase, teacher), "weights_left": left}
            elif isinstance(step.spec, Prune):
                student, self.phases[name] = self._prune(student, step.spec, phase, start, teacher)
            else:
                self.phases[name] = self._train(student, step.spec, phase, teacher, start)
        if waiting:
            student = self._transform(student, waiting, len(self.recipe.steps))
        return student

    def _transform(self, student: nn.Module, specs: list[Transform], index: int) -> nn.Module:
        """Apply neighbouring transforms. What was learned from images is kept: it takes long, and where the order of sums is another
        (threads, a GPU) a resumed run would find other ranks, which its checkpoint does not fit."""
        opt.seed_everything(self.recipe.seed, 2, index)
        student.cpu()
        kept = self.folder.transformed(f"{index - 1}_{specs[-1].name}")
        if stored.is_artifact(kept):
            student, ledger = _read_transformed(kept)
            self.log.say(f"{kept.name}: read from {kept}, as it was before the run stopped")
        else:
            ledger = transform_(student, specs, self._calibration_images(student))
            if any(spec.needs_images for spec in specs):
                config = input_config(student, self.recipe.data)
                _keep_transformed(student, ledger, kept, config.as_dict())
        if ledger:
            self.log.show(ledger_table(ledger))
        self._draw_ranks(student)
        return student

    def _draw_ranks(self, student: nn.Module) -> None:
        """A bar chart of the rank of every low-rank layer, where there are any."""
        ranks: dict[str, int | None] = {}
        for plan in compression_of(student).plans:
            ranks |= getattr(plan, "ranks", {}) | dict.fromkeys(getattr(plan, "dense", ()))
        if ranks:
            layers: dict[str, Any] = {path: student.get_submodule(path) for path in ranks}
            full = {path: min(layer.in_features, layer.out_features) for path, layer in layers.items()}
            order = [path for path, _ in student.named_modules() if path in ranks]
            self.folder.keep(ranks_finding({path: ranks[path] for path in order}, full))

    def _calibration_images(self, student: nn.Module) -> Callable[[], Iterator[torch.Tensor]]:
        config = input_config(student, self.recipe.data)
        return partial(
            calibration_batches,
            self.datasets,
            self.recipe.data,
            config,
            self.device,
            images=self.recipe.calibration.images,
            seed=self.recipe.seed,
        )

    def _prune(
        self, model: nn.Module, spec: Prune, phase: Phase, start: dict[str, Any] | None, teacher: nn.Module
    ) -> tuple[nn.Module, dict[str, Any]]:
        def train_cycle(m: nn.Module, cycle: Phase, moments: dict[str, dict[str, Any]]) -> dict[str, Any]:
            return self._train(m, spec, cycle, teacher, start, moments)

        model, told, history = prune_and_train(
            model,
            spec,
            phase,
            self.log,
            train_cycle=train_cycle,
            evaluate=lambda m: self.scorer.score(m, None),
            gradients=lambda m: self._gradients(m, spec),
        )
        self.diagnostics.allocation(phase.name, spec.scope, history)
        return model, told

    def _sparsify(self, model: nn.Module, spec: Sparsify, phase: Phase) -> dict[str, int]:
        opt.seed_everything(phase.seed, phase.number, 1000)  # the scores' images are those of any run
        left = sparsify_(model, spec, lambda: self._labelled_batches(model, spec.gradient_batches), phase.seed)
        if not phase.checkpoint.is_file():  # a resumed run has said it before
            self.log.say(f"{phase.name}: {sum(left.values()):,} weights of adapters are left ({spec.score})")
            self.log.scalars(phase.name, "weights", 0, dict(left))
        return left

    def _labelled_batches(self, model: nn.Module, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first batches of a pass over the training set, on the device."""
        loader = train_loader(self.datasets, self.recipe.data, input_config(model, self.recipe.data), self.device)
        model.to(self.device)
        return [(x.to(self.device), y.to(self.device)) for x, y in itertools.islice(loader, count)]

    def _gradients(self, model: nn.Module, spec: Prune) -> dict[str, torch.Tensor]:
        """Sum of the gradients of the ground truth's loss over some training batches, by name of the trained parameters."""
        model.eval().zero_grad()
        for images, targets in self._labelled_batches(model, spec.gradient_batches):
            F.cross_entropy(model(images), targets, ignore_index=-1).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    def _train(
        self,
        model: nn.Module,
        spec: Training,
        phase: Phase,
        teacher: nn.Module | None,
        start: dict[str, Any] | None = None,
        moments: dict[str, dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        config = input_config(model, self.recipe.data)
        loader = train_loader(self.datasets, self.recipe.data, config, self.device)
        guide = None
        if isinstance(spec, Distill):
            assert teacher is not None, "only the teacher itself is trained without one"
            theirs = input_config(teacher, self.recipe.data)
            guide = Teacher(teacher, lambda images: renormalise(images, config, theirs))
            alike = likeness(
                model,
                teacher,
                self._calibration_images(model),
                self.device,
                images=self.recipe.calibration.images,
                teacher_input=guide.input,
            )
            pairs, how = match_layers_once(
                model, teacher, spec.layers, alike, phase.checkpoint.with_suffix(".layers.json")
            )
            terms = terms_of_phase(spec, model, pairs)
            self.log.say(
                f"{phase.name}: {', '.join(t.name for t in terms)}; layer pairs {', '.join(map(str, pairs)) or 'none'} ({how})"
            )
            teacher.to(self.device)
        else:
            terms = [labels_term(1.0, spec.smoothing)]
        model.to(self.device)
        with self.diagnostics.watching(model, phase.name) as watches:
            return train(
                model,
                spec,
                phase,
                terms,
                loader,
                start=start,
                moments=moments,
                batch_size=self.recipe.data.batch_size,
                device=self.device,
                log=self.log,
                evaluate=lambda m: self.scorer.in_training(m, teacher),
                teacher=guide,
                watches=watches,
                measure=partial(self.diagnostics.measure, phase.name, teacher),
            )
