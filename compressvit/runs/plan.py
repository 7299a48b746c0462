"""What a recipe will do and what it will cost, before anything runs: built on the meta device, without weights or data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from compressvit.artifacts.merge import DENSE_ADAPTERS, merged_copy
from compressvit.data.input import InputConfig, class_mismatch, input_config
from compressvit.data.spec import Data, known_classes
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.fitting.moments import tokens_at
from compressvit.model import surgery, ties
from compressvit.model.backbone import describe, family_of
from compressvit.model.cost import Cost, break_even_rank, cost
from compressvit.model.weights import copy_matching
from compressvit.recipe.recipe import Merge, Recipe
from compressvit.runs.models import build_student, build_teacher, student_body, trains_teacher
from compressvit.training import optimisation as opt
from compressvit.training.loss_memory import loss_bytes
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.phases.prune.neurons import amounts, cycles, prices, prunable_plan, select, shrink_
from compressvit.training.phases.prune.spec import Prune
from compressvit.training.phases.sparsify import Sparsify, sparsify_
from compressvit.training.spec import Training
from compressvit.training.terms import terms_of_phase
from compressvit.transforms import LedgerEntry, Transform
from compressvit.transforms.applying import apply_plans
from compressvit.transforms.low_rank.layer import FactoredLinear
from compressvit.transforms.record import compression_of, trained_parameters

_PLACEHOLDER_CLASSES = 1000  # of a new classifier, while nobody knows the data's


@dataclass
class StepPlan:
    """One step: the ledger of a transform, or the loss terms, layer pairs and memory of a phase."""

    step: str
    summary: str
    ledger: list[LedgerEntry] = field(default_factory=list)
    layers: list[tuple[int, int]] = field(default_factory=list)
    layers_rule: str = ""
    loss_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class StagePlan:
    """Parameters of one stage of the student: `shared` are used by more than one block and counted once."""

    stage: str
    parameters: int
    shared: int
    private: int


@dataclass
class RecipePlan:
    """What `compressvit plan` prints. `conflicts` is empty when the recipe can run."""

    recipe: str
    teacher_model: str
    teacher: Cost
    student: Cost
    input_size: tuple[int, int, int]
    stages: list[StagePlan]
    steps: list[StepPlan]
    notes: list[str]
    conflicts: list[str]
    diagnostics: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `teacher.parameters`, `student.parameters`, `student.bytes`, `student.macs`, …"""
        content = asdict(self)
        content["teacher"] = {"model": content.pop("teacher_model"), **content["teacher"]}
        for step in content["steps"]:
            step["loss_bytes_total"] = sum(step["loss_bytes"].values())
        return content


def plan_recipe(recipe: Recipe, name: str = "recipe", *, classes: int | None = None) -> RecipePlan:
    """Plan a recipe without weights, data or training.

    Conflicts between steps are collected in the result; a step that cannot be applied is left out of what follows.

    Args:
        recipe: what to plan; `name` is what messages call it.
        classes: of the opened data set, where the recipe's data does not tell.

    Raises:
        UserError: timm cannot build the teacher or the student at all.
    """
    teacher = build_teacher(recipe, classes=classes, device="meta")
    if recipe.student.head == "new" and not recipe.data.labelled:
        raise UserError(
            f"student.head=new is a classifier of the data's classes, but the images of data '{recipe.data.name}' have none; leave it out"
        )
    unknown = recipe.student.head == "new" and not (known_classes(recipe.data) or classes)
    student = build_student(recipe, teacher, classes=_PLACEHOLDER_CLASSES if unknown else classes, meta=True)
    teacher_input = input_config(teacher, recipe.data)
    size = input_config(student, recipe.data)
    conflicts: list[str] = []
    if recipe.student.weights == "teacher":
        try:
            copy_matching(student_body(recipe, teacher, meta=True), teacher)
        except UserError as error:
            conflicts.append(str(error))
    notes: list[str] = [] if recipe.student.head == "new" else _data_notes(recipe, teacher, classes)
    given = recipe.teacher.weights
    if given not in ("train", "pretrained") and not expanded(given, "teacher.weights").exists():
        notes.append(
            f"teacher.weights: there is no {given} yet; an artifact would also say with which arguments and classes the teacher is built, "
            "and this plan goes by the recipe alone"
        )
    if recipe.teacher.finetune is not None and recipe.teacher.weights not in ("train", "pretrained"):
        notes.append(
            "the teacher given is trained further, as teacher.finetune says; teacher.finetune=null keeps it as it is"
        )
    steps: list[StepPlan] = []
    if trains_teacher(recipe):
        how = recipe.teacher.finetune or Finetune()
        try:
            _refuse_phase(how, teacher, recipe.data)
        except UserError as error:
            conflicts.append(f"teacher.finetune: {error}")
        conflicts += _diagnostics_refused(recipe, "teacher.finetune", how, teacher, None)
        text = _phase_summary(how, recipe.data)
        steps.append(StepPlan("teacher.finetune", text if recipe.teacher.finetune else f"{text} (defaults)"))
    counts = trained_parameters(student)
    for index, step in enumerate(recipe.steps):
        where = f"steps[{index}].{step.name}"
        if isinstance(step.spec, Training):  # before a prune takes some away
            counts = trained_parameters(student)
        try:
            if isinstance(step.spec, Transform):
                steps.append(_plan_transform(where, step.spec, student))
            elif isinstance(step.spec, Merge):
                steps.append(_plan_merge(where, student))
            else:
                steps.append(_plan_phase(where, step.spec, student, teacher, recipe.data, size, teacher_input))
        except UserError as error:
            conflicts.append(f"{where}: {error}")
            continue
        if isinstance(step.spec, Training):
            conflicts += _diagnostics_refused(recipe, where, step.spec, student, teacher)
    for where, phase in recipe.phases().items():
        notes += [f"{where}: {text}" for entry in recipe.diagnostics if (text := entry.spec.note(phase))]
        if phase.warmup_epochs > phase.epochs:
            notes.append(
                f"{where}: the warm-up of {phase.warmup_epochs:g} epochs is longer than the phase of {phase.epochs}, "
                f"so the rate never reaches its peak; shorten warmup_epochs"
            )
    last_index = len(recipe.steps) - 1 - recipe.merges
    if last_index >= 0 and not isinstance(recipe.steps[last_index].spec, Training):
        last = f"no step trains the student after steps[{last_index}].{recipe.steps[last_index].name}"
        notes.append(f"{last}: what comes out is the student as the transforms initialise it")
    for index, step in enumerate(recipe.steps):
        if isinstance(step.spec, Transform):
            notes += [f"steps[{index}].{step.name}: {sentence}" for sentence in step.spec.provisional]
    notes += _break_even_notes(student)
    end = trained_parameters(student)
    if sum(end.values()) < ties.count_parameters(student):
        left = "" if end == counts else f" (in the end {end['trained_adapter']:,}, if every adapter loses alike)"
        notes.append(
            f"the last phase trains {counts['trained_adapter']:,} parameters{left} and {counts['trained_head']:,} of the classifier; "
            "the others are frozen"
        )
    if unknown:
        notes.append(
            f"the new classifier is counted with {_PLACEHOLDER_CLASSES:,} classes here; it gets those of the data, which only opening "
            "it tells"
        )
    if any(group[0] not in surgery.added_parameters(student) for group in compression_of(student).ties):
        notes.append("sharing cuts parameters and disk, not MACs or latency: every block still runs")
    costs = [cost(m, (c.channels, c.height, c.width)) for m, c in ((teacher, teacher_input), (student, size))]
    return RecipePlan(
        recipe=name,
        teacher_model=recipe.teacher.model,
        teacher=costs[0],
        student=costs[1],
        input_size=(size.channels, size.height, size.width),
        stages=_stages(student),
        steps=steps,
        notes=notes,
        conflicts=conflicts,
        diagnostics={entry.name: entry.spec.summary() for entry in recipe.diagnostics},
    )


def _diagnostics_refused(
    recipe: Recipe, where: str, phase: Training, student: nn.Module, teacher: nn.Module | None
) -> list[str]:
    refused = []
    for entry in recipe.diagnostics:
        try:
            entry.spec.refuse(phase, student, teacher)
        except UserError as error:
            refused.append(f"{where}: {error}")
    return refused


def require_no_conflicts(plan: RecipePlan) -> None:
    """Raise one `UserError` with every conflict of a plan, if it has any."""
    if plan.conflicts:
        count = len(plan.conflicts)
        raise UserError(f"{plan.recipe}: {count} conflict{'s' * (count > 1)}\n  " + "\n  ".join(plan.conflicts))


def _plan_transform(where: str, spec: Transform, student: nn.Module) -> StepPlan:
    plan = spec.plan(student)
    ledger = apply_plans(student, [plan])
    before, after = sum(e.before for e in ledger), sum(e.after for e in ledger)
    return StepPlan(
        where, f"{len(ledger)} modules, {before:,} → {after:,} parameters" if ledger else "no structure", ledger
    )


def _plan_merge(where: str, student: nn.Module) -> StepPlan:
    """Merges the skeleton: what cannot be merged is found here, before anything is trained."""
    merged = merged_copy(student)
    kind = DENSE_ADAPTERS if compression_of(merged).plans else "a plain timm model"
    return StepPlan(where, f"merged/, {ties.count_parameters(merged):,} parameters: {kind}")


def _plan_phase(
    where: str,
    spec: Training,
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    size: InputConfig,
    teacher_size: InputConfig,
) -> StepPlan:
    _refuse_phase(spec, student, data)
    step = StepPlan(where, _phase_summary(spec, data))
    if isinstance(spec, Distill):
        _refuse_other_classes(spec, student, teacher)
        pairs, step.layers_rule = match_layers(student, teacher, spec.layers)
        step.layers = [(p.student.index, p.teacher.index) for p in pairs]
        terms = terms_of_phase(spec, student, pairs)
        step.loss_bytes = loss_bytes(student, teacher, terms, data.batch_size, size, teacher_size)
    if isinstance(spec, Sparsify):
        sparsify_(student, spec.model_copy(update={"score": "random"}), list)
        step.summary += f"; keeps {spec.keep:.0%} of the weights of adapters"
    if isinstance(spec, Prune):
        step.summary = _prune_summary(spec, student)
    return step


def _prune_summary(spec: Prune, student: nn.Module) -> str:
    """Shrinks the student as if every adapter lost the same share: which neurons go is known after training."""
    plan = prunable_plan(student)
    start, price = dict(plan.widths), prices(student, plan)
    total = cycles(spec.target, spec.rate, start, price, spec.scope, plan.least)
    if total is None:
        return f"removes {spec.rate:.0%} of the neurons a cycle while top-1 is at least {spec.target.accuracy:g} %"
    unit, wanted, have = amounts(spec.target, start, price)
    keep = {path: torch.arange(hidden) for path, hidden in start.items() if hidden}
    if total:
        nothing = {path: torch.zeros(hidden) for path, hidden in start.items() if hidden}
        keep = select(nothing, total, spec.model_copy(update={"scope": "local"}), start, price, plan.least)
    shrink_(student, keep)
    return (
        f"{total + 1} trainings and {total} removals: {have:,} → at most {wanted:,} {unit} of adapters "
        f"(counted here as the same share of each; scores decide)"
    )


def _refuse_other_classes(spec: Distill, student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = (getattr(model, "num_classes", 0) for model in (student, teacher))
    if spec.losses.prediction.weight and ours and theirs and ours != theirs:
        raise UserError(
            f"losses.prediction compares classes, but the student has {ours} and the teacher {theirs}; set losses.prediction.weight=0, "
            "or give both the same classifier"
        )


def _refuse_phase(spec: Training, model: nn.Module, data: Data) -> None:
    """Raise a `UserError` for what would only be found out when the phase begins, possibly after hours."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "there is nothing to train: earlier steps froze every parameter, and the model has no classifier; give it one with "
            "student.head=new, or remove the step that freezes"
        )
    opt.build_optimizer(model, spec, data.batch_size, torch.device("meta"))
    if spec.drop_path is not None:
        describe(model)
    if (spec.mixup or spec.cutmix) and data.batch_size < 2:
        raise UserError(
            "mixup and cutmix mix the images of a batch in pairs; give data.batch_size of at least 2, or set both to 0"
        )
    if isinstance(spec, (Finetune, Prune, Sparsify)) and not model.num_classes:
        raise UserError(
            f"{spec.name} learns from labels, but the model has no classifier (num_classes=0); give it one with student.head=new, "
            "or distil it with losses.feature instead"
        )
    if spec.needs_labels and not data.labelled:
        raise UserError(
            f"the phase learns from labels, but the images of data '{data.name}' have none; distil with losses.labels.weight=0"
        )


def _phase_summary(spec: Training, data: Data) -> str:
    length = f"{spec.epochs} epoch{'s' * (spec.epochs > 1)}" + (
        f", at most {spec.max_steps} steps" if spec.max_steps else ""
    )
    batch = f"batch {data.batch_size}" + (f"×{spec.accumulate}" if spec.accumulate > 1 else "")
    rate = spec.peak_lr(data.batch_size)
    return f"{length}, {batch}, {spec.optimizer}, lr {rate:.3g}, {spec.precision}"


def _data_notes(recipe: Recipe, teacher: nn.Module, classes: int | None) -> list[str]:
    mismatch = class_mismatch(known_classes(recipe.data) or classes, getattr(teacher, "num_classes", 0))
    return [mismatch] if mismatch else []


def _break_even_notes(student: nn.Module) -> list[str]:
    """For layers that are low rank alone: from which rank on they are slower than dense ones."""
    layers = {p: m for p, m in student.named_modules() if isinstance(m, FactoredLinear)}
    if not layers:
        return []
    tokens = tokens_at(student, list(layers))
    shapes: dict[tuple[int, int, int], str] = {}
    for path, layer in layers.items():
        shapes.setdefault((layer.in_features, layer.out_features, tokens[path]), path)
    texts = []
    for (inner, out, count), path in shapes.items():
        by_macs, measured = break_even_rank(inner, out, count)
        texts.append(f"{path} ({out}×{inner}, {count} tokens) {by_macs} / {measured}")
    return [
        "low rank alone is faster than the dense layer up to rank (by MACs / as measured here, one image, "
        f"{torch.get_num_threads()} threads): {'; '.join(texts)}"
    ]


def _stages(student: nn.Module) -> list[StagePlan]:
    if family_of(student) is None:
        return []
    tied = {name for group in ties.tied_groups(student) for name in group}
    owner = {info.path: info.stage for info in describe(student).blocks}
    rows = {stage: [0, 0] for stage in [*sorted(set(owner.values())), "rest"]}
    for name, parameter in student.named_parameters():
        stage = next((s for path, s in owner.items() if name.startswith(f"{path}.")), "rest")
        rows[stage][0 if name in tied else 1] += parameter.numel()
    return [
        StagePlan("embedding, downsampling, head" if s == "rest" else str(s), shared + private, shared, private)
        for s, (shared, private) in rows.items()
    ]
