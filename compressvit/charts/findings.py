"""What a diagnostic found: a table, how it is drawn, and how to read it. The one form that tools, runs and the report share.

In a run folder a finding is `diagnostics/NAME.json` (whole, so that it can be drawn again), `.csv`, `.png` and `.svg`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from compressvit.errors import UserError
from compressvit.files import write_json, write_text
from compressvit.reading import Unreadable, read_json
from compressvit.text import printable_in

if TYPE_CHECKING:
    import altair as alt

Row = TypeVar("Row")


@dataclass(frozen=True)
class Finding:
    """A table of `records` and the chart that shows it.

    Attributes:
        name: of its files and its TensorBoard tag, e.g. 'cka' or 'gradients_shared'.
        title: one line above the picture.
        caption: how to read it, in one to three sentences, for a reader who does not know the paper.
        chart: a kind of `compressvit.charts.charts.CHARTS`, drawn with `options`.
        records: rows of JSON values, all with the same keys.
    """

    name: str
    title: str
    caption: str
    chart: str
    records: list[dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Names of classes and layers reach charts, pages and pictures through here; a control character ends the drawing process."""
        for key in ("name", "title", "caption", "records"):
            object.__setattr__(self, key, printable_in(getattr(self, key)))
        # Vega puts an axis's title into an expression, where `\\x07` would be the bell again
        object.__setattr__(self, "options", printable_in(self.options, "\ufffd"))

    def draw(self) -> alt.Chart:
        """The chart, without title and caption."""
        from altair.utils.schemapi import (
            debug_mode,
        )  # Altair takes a second to import, and recipes only name what is drawn

        from compressvit.charts import charts

        with debug_mode(False):  # a chart is checked when it is drawn, and not each of its parts before
            return charts.CHARTS[self.chart](self.records, **self.options)

    def write(self, folder: Path, *, pictures: bool = True) -> list[Path]:
        """Write `NAME.json`, `NAME.csv` and, unless disabled, `NAME.png` and `NAME.svg` into `folder`; returns their paths."""
        written = [folder / f"{self.name}.{suffix}" for suffix in ("json", "csv")]
        write_json(written[0], asdict(self), indent=1)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.records[0]) if self.records else [])
        writer.writeheader()
        writer.writerows(self.records)
        write_text(written[1], text.getvalue())
        if pictures and self.records:
            written += [folder / f"{self.name}.{suffix}" for suffix in ("png", "svg")]
            self.picture(*written[2:])
        return written

    def picture(self, *paths: Path) -> None:
        """Draw the chart with its title into PNG and SVG files."""
        from compressvit.charts import drawing

        drawing.save(self.draw(), *paths, title=self.title)

    def log(self, writer: Any, folder: Path) -> None:
        """Show the picture that `write` left in `folder` in TensorBoard, under `diagnostics/NAME`, as many steps on as it has moments."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        step = len({(record.get("phase"), record.get("epoch")) for record in self.records}) - 1
        file = folder / f"{self.name}.png"
        with Image.open(
            file
        ) as image:  # `add_image` would decode it and encode it again, which takes as long as drawing it
            width, height = image.size
            shades = len(image.getbands())
        picture = Summary.Image(width=width, height=height, colorspace=shades, encoded_image_string=file.read_bytes())
        named = Summary.Value(tag=f"diagnostics/{self.name}", image=picture)
        writer.file_writer.add_summary(Summary(value=[named]), step)


def read(path: Path) -> Finding:
    """Read what `Finding.write` wrote.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    from compressvit.charts import charts

    try:
        content = read_json(path, path.parent.parent)
        finding = Finding(**content)
        known = finding.chart in charts.CHARTS and isinstance(finding.records, list)
    except (Unreadable, TypeError) as error:
        raise UserError(f"{path} is damaged, or was written by another version of compressvit: {error}") from error
    if not known:
        raise UserError(f"{path} was written by another version of compressvit: its chart is {finding.chart!r}")
    return finding


def merged(earlier: Finding, later: Finding) -> Finding:
    """One finding of two measurements of the same thing; of one phase and epoch, the later one replaces the earlier.

    The chart gets a panel for each `when` (and for each of the panels that it has already), unless the later one's options speak of
    `when`, `phase` or `epoch` themselves.
    """
    measured = {(record.get("phase"), record.get("epoch")) for record in later.records}
    kept = [r for r in earlier.records if (r.get("phase"), r.get("epoch")) not in measured]
    records, options = kept + later.records, dict(later.options)
    if kept and not {"when", "phase", "epoch"} & {value for value in options.values() if isinstance(value, str)}:
        inner = options.get("facet")
        if inner is not None:
            records = [{**record, "panel": f"{record['when']}: {record[inner]}"} for record in records]
        options["facet"] = "panel" if inner is not None else "when"
    return replace(later, records=records, options=options)


def stretches(rows: Sequence[Row], count: int) -> Iterator[Sequence[Row]]:
    """At most `count` stretches of neighbouring rows, equally many in each (the last may be shorter): for curves of many steps."""
    size = max(1, math.ceil(len(rows) / count))
    return (rows[start : start + size] for start in range(0, len(rows), size))
