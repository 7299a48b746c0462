"""What a plan tells beside its tables: of the teacher, of phases, of ranks, and of the figures at the end."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from compressvit import processes
from compressvit.data.input import STATISTICS, class_mismatch, stand_ins
from compressvit.errors import UserError
from compressvit.fitting.moments import tokens_at
from compressvit.model.backbone import family_of, model_name
from compressvit.model.chain import chain_of
from compressvit.model.cost import break_even_rank, threads_text
from compressvit.model.linear import weight_shape
from compressvit.recipe.recipe import Recipe
from compressvit.runs.heads import is_untold, untold_note
from compressvit.runs.job import Job
from compressvit.runs.models import has_own_head, missing_yet
from compressvit.tasks.base import task_of
from compressvit.training.optimisation import few_updates, steps_per_epoch
from compressvit.transforms.low_rank.layer import Factored
from compressvit.transforms.low_rank.pivoted_layer import is_pivoted, pivoted_linear


def teacher_notes(job: Job) -> list[str]:
    recipe = job.recipe
    notes = []
    if recipe.student.head != "new":
        needed = task_of(job.teacher.model, recipe.data.usual_task).needs_classes(job.classes or 0)
        heads = getattr(job.teacher.model, "num_classes", 0)
        if is_untold(recipe, job.architecture.args):
            mismatch = untold_note(recipe, (job.classes or 0) * recipe.data.labelled, needed, heads)
        else:
            mismatch = class_mismatch(needed, heads, new_head=has_own_head(recipe))
        notes += [mismatch] if mismatch else []
    if job.architecture.trained:
        ours, theirs = job.student.input.as_dict(), job.teacher.input.as_dict()
        unlike = [key for key in STATISTICS if getattr(recipe.data, key) is not None and ours[key] != theirs[key]]
        notes += [
            f"data.{key} is the student's: {_short(ours[key])}. The teacher keeps its own, {_short(theirs[key])}, with which it was trained"
            for key in unlike
        ]
    guessed = (stand_ins(side.model, side.input) for side in (job.teacher, job.student))
    notes += [text for text in dict.fromkeys(guessed) if text]
    notes += missing_yet(recipe)
    if recipe.teacher.finetune is not None and recipe.teacher.weights not in ("train", "pretrained"):
        notes.append(
            "the teacher given is trained further, as teacher.finetune says; teacher.finetune=null keeps it as it is"
        )
    return notes


def figures(job: Job) -> list[str]:
    """What is to be known of the figures at the end of a run."""
    found, task = [], task_of(job.student.model, job.recipe.data.usual_task)
    if job.recipe.student.head == "new":
        absent = " and no ".join(quality.in_text for quality in task.against_teacher())
        found += [f"the student has a new head, so it is not compared with its teacher: there is no {absent}"] * bool(
            absent
        )
    elif text := task.uncompared(job.student.model, job.teacher.model):
        found.append(text)
    for model in (job.teacher.model, job.student.model):
        if (family := family_of(model)) is not None and family.latency:
            found.append(f"the latency of a {family.title} depends on {family.latency}")
    return list(dict.fromkeys(found))


def _short(value: Any) -> str:
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, list) else str(value)


def phase_notes(recipe: Recipe) -> list[str]:
    """Notes of phases and transforms, and a note on transforms that no phase trains."""
    notes: list[str] = []
    for where, phase in recipe.phases().items():
        notes += [f"{where}: {text}" for entry in recipe.diagnostics if (text := entry.spec.note(phase))]
        if phase.warmup_epochs > phase.epochs:
            notes.append(
                f"{where}: the warm-up of {phase.warmup_epochs:g} epochs is longer than the phase of {phase.epochs}, "
                f"so the learning rate never reaches its peak; shorten warmup_epochs"
            )
    parts = recipe.parts()
    if parts and parts[-1].phase is None:
        index = parts[-1].start + len(parts[-1].transforms) - 1
        last = f"no step trains the student after steps[{index}].{recipe.steps[index].name}"
        notes.append(f"{last}: the result is the student as the transforms initialise it")
    for part in parts:
        for index, spec in enumerate(part.transforms, part.start):
            notes += [f"steps[{index}].{spec.name}: {sentence}" for sentence in spec.provisional]
    return notes


def average_notes(recipe: Recipe, images: int) -> list[str]:
    """Notes of phases that end before the average of their weights has the decay asked for, of so many images to train on."""
    batches = max(1, images // (recipe.data.batch_size * processes.count()))
    notes = []
    for where, phase in recipe.phases().items():
        if phase.ema is not None:
            steps = phase.epochs * steps_per_epoch(batches, phase.accumulate)
            note = few_updates(phase.ema, min(steps, phase.max_steps or steps))
            notes += [f"{where}: {note}"] if note else []
    return notes


def provisional_steps(recipe: Recipe) -> list[str]:
    """The steps whose size follows from a budget and whose choices wait for what a run measures."""
    return [
        f"steps[{index}].{spec.name}"
        for part in recipe.parts()
        for index, spec in enumerate(part.transforms, part.start)
        if spec.budget_units and spec.provisional
    ]


def chain_notes(model: nn.Module) -> list[str]:
    """Of a model of no family, which layers can be changed and which stay."""
    if family_of(model) is not None:
        return []
    try:
        chain = chain_of(model)
    except UserError:  # then no step works on it, which is told where one is asked for
        return []
    stay = [
        f"{len(paths)} {why} (first {paths[0]})"
        for paths, why in (
            (chain.uncalled, "whose weight is read without a call, or that see nothing of the images"),
            (chain.outside, "that are not in the chain"),
        )
        if paths
    ]
    count = len(chain.links)
    chained = (
        f"a chain of {count} modules"
        if chain.links != ("",)
        else "the model as a whole, because no modules follow one another"
    )
    return [
        f"{model_name(model)} is of no family that compressvit knows: {len(chain.layers)} linear layers can be changed, in {chained}"
        + (f"; {' and '.join(stay)} stay as they are" if stay else "")
    ]


def break_even_notes(student: nn.Module) -> list[str]:
    """Notes on low-rank layers without a shared weight: the rank above which they are slower than dense layers."""
    layers = {p: m for p, m in student.named_modules() if isinstance(m, Factored)}
    if not layers:
        return []
    tokens = tokens_at(student, list(layers))
    shapes: dict[tuple[int, int, int, bool], str] = {}
    for path, layer in layers.items():
        outputs, inputs = weight_shape(layer)
        shapes.setdefault((inputs, outputs, tokens[path], is_pivoted(layer)), path)
    texts = []
    for (inner, out, count, pivots), path in shapes.items():
        by_macs, measured = break_even_rank(
            inner, out, count, pivoted=partial(pivoted_linear, inner, out) if pivots else None
        )
        texts.append(f"{path} ({out}×{inner}, {count} tokens) {by_macs} / {measured}")
    return [
        "low rank alone is faster than the dense layer up to rank (by MACs / as measured here, one image, "
        f"{threads_text()}): {'; '.join(texts)}"
    ]
