"""The console that everything is printed to. rich is imported here, so import this where something is printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
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
