"""The console that everything is printed to. rich is imported here, so import this where something is printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from compressvit.text import printable


class Terminal(Console):
    """A console on which text is only text: `[/x]` in a path is printed as it stands, and nothing in a name moves the cursor.

    What is to be bold or coloured is a `rich.text.Text`.

    Args:
        like: a console whose settings and file are used, for one that a caller gave.
        settings: of a `rich.console.Console` otherwise.
    """

    def __init__(self, like: Console | None = None, **settings: Any):
        super().__init__(**settings)
        if like is not None:
            vars(self).update(vars(like))

    def render_str(self, text: str, **settings: Any) -> Text:
        """A string as rich's text, here before widths are measured; also of tables' titles and cells."""
        return super().render_str(printable(text), **{**settings, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything, among them those of a `Text`, which is not made by `render_str`."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def print_table(table: Table, console: Console) -> None:
    """Print a table. Where it is too wide its rows are listed: the first cell whole, so that a path can be copied, and below it the others,
    each after its heading; nothing is left out."""
    unbounded = console.options.update(width=10_000)
    whole = table.columns[0]
    whole.no_wrap = True
    whole.min_width = max((Measurement.get(console, unbounded, cell).maximum for cell in whole.cells), default=0)
    if Measurement.get(console, unbounded, table).minimum <= console.width:
        console.print(table)
        return
    console.print(table.title, highlight=False)
    headings = [str(column.header).replace("\n", " ") for column in table.columns]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        items = [f"{heading} {cell}" for heading, cell in zip(headings[1:], others, strict=True) if cell]
        console.print(str(first), highlight=False, soft_wrap=True)
        for line in wrapped_items("  ".join(items), console.width - 2).splitlines():
            console.print(f"  {line}", highlight=False)


def wrapped_items(text: str, width: int) -> str:
    """Break a line of items, which are separated by two spaces, between items, never between a label and its value."""
    lines = [""]
    for item in text.split("  "):
        longer = f"{lines[-1]}  {item}" if lines[-1] else item
        if lines[-1] and len(longer) > width:
            lines.append(item)
        else:
            lines[-1] = longer
    return "\n".join(lines)
