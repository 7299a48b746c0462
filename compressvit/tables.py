"""Tables for a person: costs, the ledger of the transforms, teacher and student side by side."""

from __future__ import annotations

import itertools
from typing import Any

from rich.table import Table

from compressvit.cost import Cost
from compressvit.transforms import LedgerEntry


def cost_table(rows: list[tuple[str, Cost]], title: str) -> Table:
    """Parameters, disk and MACs, each with its share of the first row's."""
    table = Table(title=title, title_justify="left")
    for column in ("", "parameters", "bytes on disk", "MACs"):
        table.add_column(column, justify="left" if not column else "right")
    first = rows[0][1]
    for name, row in rows:
        values = [(row.parameters, first.parameters), (row.bytes, first.bytes), (row.macs, first.macs)]
        table.add_row(name, *(f"{v:,}" + ("" if row is first else f" ({v / of:.1%})") for v, of in values))
    return table


def megabytes(size: float) -> str:
    """Bytes as '12.3 MB' (10⁶)."""
    return f"{size / 1e6:,.1f} MB"


def ledger_table(ledger: list[LedgerEntry]) -> Table:
    """What the transforms did, step by step and path by path; a shared tensor counts at its first path."""
    table = Table(title="Ledger (a shared tensor counts at its first path)", title_justify="left")
    measured = any(entry.weight_error is not None for entry in ledger)
    for column in ("step", "path", "change"):
        table.add_column(column, overflow="fold")
    for column in ("parameters before", "after", *(("error of weight", "of output") if measured else ())):
        table.add_column(column, justify="right")
    for step, group in itertools.groupby(ledger, lambda entry: entry.step):
        entries = list(group)
        for entry in entries:
            errors = ["" if e is None else f"{e:.3f}" for e in (entry.weight_error, entry.output_error)]
            table.add_row(
                step, entry.path, entry.change, f"{entry.before:,}", f"{entry.after:,}", *errors[: 2 * measured]
            )
        before, after = sum(e.before for e in entries), sum(e.after for e in entries)
        table.add_section()
        table.add_row(step, "sum", "", f"{before:,}", f"{after:,}")
        table.add_section()
    return table


def results_table(results: dict[str, Any], title: str) -> Table:
    """Teacher and student side by side."""
    teacher, student = results["teacher"], results["student"]
    table = Table(title=title, title_justify="left")
    for column in ("", "teacher", "student", "student / teacher"):
        table.add_column(column, justify="left" if not column else "right")

    def row(label: str, key: str, text: Any) -> None:
        if teacher.get(key) is None and student.get(key) is not None:
            table.add_row(label, "", text(student[key]), "")
        elif student.get(key) is not None:
            table.add_row(
                label, text(teacher[key]), text(student[key]), f"{student[key] / max(teacher[key], 1e-12):.3f}"
            )

    row("parameters (unique)", "parameters", lambda v: f"{v:,}")
    if student.get("trained_adapter", 0) + student.get("trained_head", 0) < student["parameters"]:
        row("trained, without the classifier", "trained_adapter", lambda v: f"{v:,}")
        row("trained, of the classifier", "trained_head", lambda v: f"{v:,}")
    row("bytes on disk", "bytes", megabytes)
    row("stored beside the backbone", "adapter_bytes", lambda v: f"{v / 1e3:,.1f} kB")
    row("MACs per image", "macs", lambda v: f"{v / 1e6:,.2f} M")
    row("latency", "latency_ms", lambda v: f"{v:.2f} ms")
    row("top-1", "top1", lambda v: f"{v:.2f} %")
    row("top-5", "top5", lambda v: f"{v:.2f} %")
    if student.get("agreement") is not None:
        table.add_row("same first class as the teacher", "", f"{student['agreement']:.2f} %", "")
    if student.get("cosine") is not None:
        table.add_row("cosine of the outputs", "", f"{student['cosine']:.4f}", "")
    if student.get("cosine_patches") is not None:
        table.add_row("cosine of the patch tokens", "", f"{student['cosine_patches']:.4f}", "")
    return table
