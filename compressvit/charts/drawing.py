"""Charts as picture files, and as parts of an HTML page.

Altair's charts are data (Vega-Lite): vl-convert draws them into files without a browser or a network, and on a page Vega draws them again,
with values shown at the pointer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from compressvit.files import write_atomically

QUIET = {  # what is not data takes little ink, in files and on pages
    "font": "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif",
    "axis": {
        "gridOpacity": 0.5,
        "titleFontWeight": "normal",
        "labelFontSize": 10.5,
        "titleFontSize": 11.5,
        "tickSize": 4,
        "labelSeparation": 6,
    },
    "legend": {"titleFontWeight": "normal", "symbolStrokeWidth": 2, "labelFontSize": 10.5},
    "header": {"labelFontSize": 11.5},
    "title": {"anchor": "start", "frame": "group", "fontSize": 13, "fontWeight": 600, "offset": 10},
    "view": {"strokeOpacity": 0.4},
}
_PPI = 144  # pixels per inch
_INK = {
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.12,
        "domainColor": "currentColor",
        "domainOpacity": 0.4,
        "tickColor": "currentColor",
        "tickOpacity": 0.4,
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor"},
    "header": {"labelColor": "currentColor", "titleColor": "currentColor"},
    "title": {"color": "currentColor"},
    "view": {"stroke": "currentColor", "strokeOpacity": 0.15},
}


def save(chart: alt.Chart, *paths: Path, title: str | None = None) -> None:
    """Draw a chart once and write it to each path, as PNG or SVG by the path's suffix. The writes are atomic."""
    spec = _specified(chart, QUIET)
    svg = vl_convert.vegalite_to_svg(spec if title is None else {**spec, "title": title})
    for path in paths:
        content = vl_convert.svg_to_png(svg, ppi=_PPI) if path.suffix == ".png" else svg.encode()
        write_atomically(path, partial(_write, content))


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def for_page(chart: alt.Chart) -> tuple[dict[str, Any], str]:
    """The chart for an HTML page: as Vega-Lite, for `vegaEmbed` in mode 'vega-lite', and drawn, as an SVG element.

    Text and axes are of the page's own text colour, on no background, so that they follow its theme, also in print.
    """
    spec = {**_specified(chart, _merged(QUIET, _INK)), "background": "transparent"}
    # The drawn one stands in until Vega has drawn its own, or where scripts are blocked; a name for every mark would double its size.
    svg = vl_convert.vegalite_to_svg({**spec, "config": {**spec["config"], "aria": False}})
    del spec["$schema"]  # an address; the page names the mode instead
    return spec, svg


def _specified(chart: alt.Chart, config: Mapping[str, Any]) -> dict[str, Any]:
    """The chart as Vega-Lite. Altair's `properties` would copy all of its data."""
    spec = chart.to_dict()
    return {**spec, "config": _merged(spec.get("config", {}), config)}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two Vega-Lite configurations in one; the second wins."""
    both = {**first, **second}
    return {
        k: {**first[k], **second[k]} if isinstance(v, dict) and k in first and k in second else v
        for k, v in both.items()
    }


def column(charts: Sequence[alt.Chart]) -> Any:
    """Charts one below the other, each with its own scales, to be saved as one picture."""
    panels = [chart.copy(deep=False) for chart in charts]
    for panel in panels:
        panel.usermeta = alt.Undefined  # which only a whole picture has
    return alt.vconcat(*panels, spacing=30).resolve_scale(color="independent")
