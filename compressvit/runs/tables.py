"""Tables for the console: costs, the plan, the ledger of the transforms, teacher and student side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compressvit.runs.files import Figures, StagePlan
from compressvit.tasks.qualities import qualities

if TYPE_CHECKING:
    from rich.console import Console

    from compressvit.runs.files import CachePlan, Costs, DataPlan, RecipePlan, Results
    from compressvit.transforms import LedgerEntry


def cost_table(rows: Sequence[tuple[str, Costs]], title: str) -> Table:
    """Parameters, bytes and MACs, each also relative to the first row."""
    table = Table(title=title, title_justify="left")
    for column in ("", "parameters", "bytes on disk", "MACs"):
        table.add_column(column, justify="left" if not column else "right")
    first = rows[0][1]
    for name, row in rows:
        values = [(row.parameters, first.parameters), (row.bytes, first.bytes), (row.macs, first.macs)]
        table.add_row(name, *(f"{v:,}" + ("" if row is first else f" ({v / of:.1%})") for v, of in values))
    return table


def megabytes(size: float) -> str:
    """Bytes as '12.3 MB' (10⁶), or as '12.3 kB' below 0.1 MB."""
    return f"{size / 1e6:,.1f} MB" if size == 0 or size >= 1e5 else f"{size / 1e3:,.1f} kB"


def cache_text(cache: CachePlan) -> str:
    """What a cache takes on the disk."""
    views = f"{cache.views} view{'s' * (cache.views > 1)}"
    if cache.images is None or cache.bytes is None:
        size = megabytes(1000 * cache.views * cache.answer_bytes)
        return f"{cache.of}: {views} in {cache.answer_bytes:,} bytes an image, {size} for every 1,000 images"
    whole, held_out = cache.bytes, ""
    if cache.held_out and cache.held_out_bytes:
        whole += cache.held_out * cache.held_out_bytes
        held_out = f", and {cache.held_out:,} held out in {cache.held_out_bytes:,}"
    kept = f"{views} of {cache.images:,} images in {cache.answer_bytes:,} bytes each{held_out}"
    return f"{cache.of}: {kept}, {megabytes(whole)} when all are there"


def cost_text(unit: str, value: float) -> str:
    """What a model costs in a unit of budgets."""
    if unit == "parameters":
        return f"{value:,.0f}"
    texts = {key: text for _, key, text in _measures()}
    return texts["latency_ms" if unit == "latency" else unit](value)


def ledger_table(ledger: list[LedgerEntry]) -> Table:
    """What the transforms did, by step and path; a shared tensor counts at its first path."""
    table = Table(title="Ledger (a shared tensor counts at its first path)", title_justify="left")
    kinds = {"weight_error": "error of\nweight", "output_error": "error of\noutput"}
    measured = [kind for kind in kinds if any(getattr(entry, kind) is not None for entry in ledger)]
    table.add_column("path", overflow="fold")
    table.add_column("change", overflow="fold", min_width=20)
    for column in ("parameters\nbefore", "after", *(kinds[kind] for kind in measured)):
        table.add_column(column, justify="right")
    for step, group in itertools.groupby(ledger, lambda entry: entry.step):
        entries = list(group)
        for entry in entries:
            errors = (getattr(entry, kind) for kind in measured)
            cells = ("" if error is None else f"{error:.3f}" for error in errors)
            table.add_row(entry.path, entry.change, f"{entry.before:,}", f"{entry.after:,}", *cells)
        before, after = sum(e.before for e in entries), sum(e.after for e in entries)
        table.add_section()
        table.add_row(step, "sum", f"{before:,}", f"{after:,}")
        table.add_section()
    return table


def results_table(results: Results, title: str) -> Table:
    """Teacher and student side by side."""
    table = Table(title=title, title_justify="left")
    for column in ("", "teacher", "student", "student / teacher"):
        table.add_column(column, justify="left" if not column else "right")
    for cells in results_rows(results.teacher, results.student):
        table.add_row(*cells)
    return table


def results_rows(teacher: Costs, student: Costs) -> list[tuple[str, str, str, str]]:
    """Name, teacher's value, student's value and ratio of every measure; a ratio may be empty."""
    rows = []
    for label, key, text in _measures(adapted=student.adapted):
        ours, theirs = student.value(key), teacher.value(key)
        if ours is None:
            continue
        mine, of_teacher = (interval_text(model.figures, key) for model in (student, teacher))
        if theirs is None:
            rows.append((label, "", text(ours) + mine, ""))
            continue
        ratio = f"{ours / max(theirs, 1e-12):.3f}"
        if key == "latency_ms":  # noise is larger than a third digit
            known = student.latency_ratio if isinstance(student, Figures) else None
            ratio = ratio_text(known) if known else f"{float(ratio):.2f}"
        rows.append((label, text(theirs) + of_teacher, text(ours) + mine, ratio))
    return rows


def scores_table(scores: Mapping[str, Any], title: str) -> Table:
    """One model's costs and scores, under the labels of `results_table`."""
    table = Table(title=title, title_justify="left", show_header=False)
    count: Callable[[Any], str] = lambda v: f"{v:,}"  # noqa: E731
    further = (
        ("loss", "loss", lambda v: f"{v:.4f}"),
        ("images", "images", count),
        ("broken images", "broken_images", count),
    )
    for label, key, text in (*_measures(), *further):
        if scores.get(key) is not None:
            table.add_row(label, text(scores[key]) + interval_text(scores, key))
    return table


def interval_text(figures: Mapping[str, Any], key: str) -> str:
    """The interval of a figure over images, as ' (96.1–98.3)'; empty if it has none."""
    found = figures.get("intervals", {}).get(key)
    return f" ({found[0]:.1f}–{found[1]:.1f})" if found else ""


def how_judged(figures: Mapping[str, Any]) -> list[str]:
    """What was searched in what, what stands in brackets, and what a student lost, for the lines below a table."""
    found, images = [], figures.get("images") or 0
    if figures.get("recall_10") is not None:
        found.append(f"retrieval: the student's embeddings of {images:,} held-out images, in an index of the teacher's")
    if figures.get("knn") is not None:
        found.append(
            f"neighbours: the class of {images:,} held-out images, by votes of the nearest of {figures.get('indexed') or 0:,} training "
            "images (k-NN)"
        )
    if intervals := figures.get("intervals"):
        of_images = any(quality.of_images and quality.key in intervals for quality in qualities().values())
        begin = "shares of images: " * of_images
        found.append(f"{begin}in brackets 95 % intervals over the {images:,} held-out images")
    differences = figures.get("differences", {})
    for quality in qualities().values():
        if quality.key in differences:
            low, points, high = map(quality.number, differences[quality.key])
            found.append(
                f"{quality.in_text}, teacher − student: {points} points (95 % interval {low} to {high}, image by image)"
            )
    return found


def _measures(*, adapted: bool = False) -> list[tuple[str, str, Callable[[Any], str]]]:
    """The measures of a model in the order of the tables: label, key, and how a value is written."""
    trained: list[tuple[str, str, Callable[[Any], str]]] = [
        ("trained, without the classifier", "trained_adapter", lambda v: f"{v:,}"),
        ("trained, in the classifier", "trained_head", lambda v: f"{v:,}"),
    ]
    return [
        ("parameters (unique)", "parameters", lambda v: f"{v:,}"),
        *(trained if adapted else []),
        ("bytes on disk", "bytes", megabytes),
        ("stored in addition to the backbone", "adapter_bytes", lambda v: f"{v / 1e3:,.1f} kB"),
        ("MACs per image", "macs", lambda v: f"{v / 1e6:,.2f} M"),
        ("latency", "latency_ms", lambda v: f"{v:.2f} ms"),
        *((quality.long, quality.key, quality.text) for quality in qualities().values()),
    ]


def _stage_table(stages: Sequence[StagePlan]) -> Table:
    """Where a student's parameters are; what blocks share has columns where they share anything."""
    shared = any(row.shared for row in stages)
    only = sum(row.stage.isdigit() for row in stages) == 1  # a ViT's
    table = Table(title="Parameters of the student", title_justify="left")
    for column in ("stage", "parameters", *(("shared by blocks", "private") if shared else ())):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in stages:
        cells = [f"{row.parameters:,}", f"{row.shared:,}", f"{row.private:,}"]
        table.add_row("blocks" if only and row.stage.isdigit() else row.stage, *cells[: 3 if shared else 1])
    return table


def print_plan(plan: RecipePlan, console: Console) -> None:
    """Tables for a person."""
    console.print(
        cost_table(
            [("teacher", plan.teacher), ("student", plan.student)],
            title=f"{plan.recipe}: {plan.teacher.model}, images {'×'.join(map(str, plan.input_size or ()))}",
        )
    )
    if plan.provisional:
        steps, verb = " and ".join(plan.provisional), "chooses" if len(plan.provisional) == 1 else "choose"
        console.print(
            f"the student is provisional: {steps} {verb} by what is measured later; see the notes", highlight=False
        )
    for line in _input_lines(plan):
        console.print(line, highlight=False)
    if plan.stages:
        console.print(_stage_table(plan.stages))
    for step in plan.steps:
        console.print(Text.assemble((step.step, "bold"), f"  {step.summary}"), highlight=False)
        if step.layers_rule:
            pairs = ", ".join(f"{s}↔{t}" for s, t in step.layers) or "none"
            console.print(f"  layer pairs (student↔teacher): {pairs}  ({step.layers_rule})", highlight=False)
        if step.loss_bytes:
            parts = ", ".join(f"{name} {megabytes(size)}" for name, size in step.loss_bytes.items())
            total = megabytes(step.loss_bytes_total)
            console.print(
                f"  memory of the losses for a batch, kept for the backward pass: {total} in fp32  ({parts})",
                highlight=False,
            )
        if step.cache is not None:
            console.print(f"  {cache_text(step.cache)}", highlight=False)
    for name, summary in plan.diagnostics.items():
        console.print(Text.assemble("diagnostics: ", (name, "bold"), f"  {summary}"), highlight=False)
    if plan.data is not None:
        print_data(plan.data, console)
    texts = [f"weights: {note.text}" for note in plan.weights] + [f"figures: {text}" for text in plan.figures]
    for text in (*texts, *(f"note: {note}" for note in plan.notes)):
        console.print(text, highlight=False)
    for conflict in plan.conflicts:
        console.print(Text.assemble(("conflict:", "red"), f" {conflict}"), highlight=False)


def _input_lines(plan: RecipePlan) -> list[str]:
    """What images are made into for evaluation and fits, of teacher and student apart where that differs."""
    if plan.inputs["teacher"] == plan.inputs["student"]:
        return [f"images: {_input_text(plan.inputs['student'])}"]
    return [f"images of the {whose}: {_input_text(config)}" for whose, config in plan.inputs.items()]


def _input_text(config: Mapping[str, Any]) -> str:
    _, height, width = config["input_size"]
    mode = "" if config["crop_mode"] == "center" else f" ({config['crop_mode']})"
    frames = config.get("frames") or 1  # each of which has the same statistics
    mean, std = (
        " ".join(f"{value:.4g}" for value in config[key][: len(config[key]) // frames]) for key in ("mean", "std")
    )
    each = f", of each of {frames} frames" if frames > 1 else ""
    return (
        f"{height}×{width}, crop {config['crop_pct']:g}{mode}, {config['interpolation']}, mean {mean}, std {std}{each}"
    )


def print_data(data: DataPlan, console: Console) -> None:
    """How many images there are, and what was passed over or guessed about them."""
    test = "" if data.test is None else f" for validation, {data.test:,} for the test"
    console.print(f"data: {data.train:,} images to train on, {data.validation:,} held out{test}", highlight=False)
    for note in data.notes:
        console.print(f"data: {note.text}", highlight=False)


def how_measured(where: str, batch: int = 1) -> str:
    """How latencies were measured, for the line below their table.

    Args:
        where: device and threads.
        batch: images at once.
    """
    return f"batch {batch} on {where}, the models in turns, medians of up to 30 rounds; in brackets the 99 % interval of the median ratio"


def latency_spread(results: Results) -> str:
    """What a run gives in brackets beside its median ratio of latencies."""
    confidence = results.student.latency_confidence
    return (
        "the quartiles of the rounds"
        if confidence is None
        else f"the {100 * confidence:g} % interval of the median ratio"
    )


def ratio_text(ratio: Sequence[float]) -> str:
    """A ratio of latencies, as '1.89 (1.81–1.97)': the median of all rounds, and in brackets `latency_spread`."""
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"
