"""Tables on a terminal of 80 columns: what does not fit beside each other is listed, and no path is broken."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from compressvit.report.compare import cells, compare
from compressvit.runs.tables import ledger_table
from compressvit.terminal import Terminal, print_table
from compressvit.transforms import LedgerEntry

PATH = "backbone.layers.2.blocks.17.attn.qkv"


def shown(width: int, path: str) -> list[str]:
    numbers = {"before": 1_769_472, "after": 24_576, "weight_error": 0.1234, "output_error": 0.01}
    entry = LedgerEntry(step="lors", path=path, change=f"shares the weight of {path}; + private rank 8", **numbers)
    file = io.StringIO()
    print_table(ledger_table([entry]), Terminal(file=file, width=width))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_path_in_a_ledger_stays_whole(width):
    lines = shown(width, PATH)
    assert sum(PATH in line for line in lines) >= 1
    assert all(len(line) <= width or PATH in line for line in lines)
    text = " ".join(lines)
    assert all(number in text for number in ("1,769,472", "24,576", "0.123", "0.010"))


def test_a_ledger_that_fits_is_a_table():
    assert "┃" in "".join(shown(160, PATH))
    assert "┃" not in "".join(shown(80, PATH))
    assert "┃" in "".join(shown(80, "fc"))


@pytest.mark.parametrize("width", range(40, 101, 4))
def test_results_are_never_cut(width):
    table = Table(title="Results")
    for heading in ("", "teacher", "student", "student / teacher"):
        table.add_column(heading)
    table.add_row("same first class as the teacher", "70.28 % (65.4–74.8)", "63.89 % (58.8–68.7)", "0.909 (0.9–1.0)")
    file = io.StringIO()
    print_table(table, Terminal(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("same first class as the teacher" in line for line in lines)
    assert all(words in file.getvalue() for words in ("70.28 %", "(65.4–74.8)", "63.89 %", "(58.8–68.7)", "(0.9–1.0)"))
    assert ("┃" in file.getvalue()) == (width >= 76)


def test_lists_have_every_cell_with_its_heading():
    table = Table(title="Runs of one recipe")
    for heading in ("student", "seeds", "a long\nheading", "empty"):
        table.add_column(heading, overflow="fold")
    table.add_row("multiplex_share_2_mlp_conv_7", "3", "98.06 ± 0.10", "")
    table.add_row("low_rank", "1", "97.50", "")
    file = io.StringIO()
    print_table(table, Terminal(file=file, width=30))
    assert file.getvalue().splitlines() == [
        "Runs of one recipe",
        "multiplex_share_2_mlp_conv_7",
        "  seeds 3",
        "  a long heading 98.06 ± 0.10",
        "low_rank",
        "  seeds 1",
        "  a long heading 97.50",
    ]


@pytest.mark.parametrize("width", [60, 80])
def test_compare_keeps_to_the_terminal(finished, width):
    file = io.StringIO()
    (row,) = compare([finished], console=Terminal(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(file.getvalue().split())
    assert f"{row['parameters']:,.0f}" in text
    assert f"{row['top1']:.2f}" in text
    assert f"run {finished.name} seeds 1" in text
    assert f"file {row['bytes'] / 1e3:,.1f} kB" in text


def test_runs_are_called_as_shortly_as_tells_them_apart(finished):
    (row,) = compare([finished], console=Terminal(quiet=True))

    def names(*runs):
        heads, rows = cells([{**row, "runs": list(some)} for some in runs])
        return [cell[heads.index("run")] for cell in rows]

    assert names(["/x/a/first"], ["/x/b/second"]) == ["first", "second"]
    assert names(["/x/a/run"], ["/x/b/run", "/x/b/other"]) == ["a/run", "b/run, b/other"]
    assert names(["/run"], ["/b/run"]) == ["/run", "b/run"]
