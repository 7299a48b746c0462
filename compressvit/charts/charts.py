"""Charts by Altair: four kinds, each drawn from a list of records (one dictionary per mark), as PNG, SVG or part of a page.

Colours are legible on white and on black; what depends on a theme (text, axes, background) is set in `compressvit.charts.drawing`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import altair as alt

Records = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT = 560, 300  # pixels, before a page makes them fit
COLOURS = ("#3182bd", "#e6842a", "#31a354", "#a05fc4", "#d6616b", "#8c8c8c", "#17a2a2", "#b8860b", "#e377c2", "#7f6a4f")
SHAPES = ("circle", "diamond", "triangle-up", "square")
SEQUENTIAL: Literal["viridis"] = "viridis"  # the same on white and on black


def heatmap(
    records: Records,
    *,
    x: str,
    y: str,
    colour: str,
    titles: Mapping[str, str] | None = None,
    facet: str | None = None,
    domain: Sequence[float] | None = (0.0, 1.0),
    best: str | None = None,
) -> alt.Chart:
    """Squares at (x, y), in the order of the records.

    Args:
        titles: of the fields whose names are not fit for display.
        facet: a field: a panel for each of its values.
        domain: of the colours; None for that of the data.
        best: a field that is true where a square is to be marked.
    """
    titles = titles or {}
    columns, rows = _order(records, x), _order(records, y)
    side = max(8, min(28, 420 // max(len(columns), len(rows), 1)))
    label: dict[str, Any] = {"labelOverlap": False, "labelFontSize": 7 if side < 14 else 9, "labelLimit": 160}
    base = alt.Chart(_data(records)).encode(
        x=alt.X(x, type="nominal", sort=columns, title=titles.get(x, x), axis=alt.Axis(labelAngle=-90, **label)),
        y=alt.Y(y, type="nominal", sort=rows, title=titles.get(y, y), axis=alt.Axis(**label)),
        tooltip=_tooltip(records, titles),
    )
    limits: dict[str, Any] = {"domain": list(domain), "clamp": True} if domain else {}
    scale = alt.Scale(scheme=SEQUENTIAL, **limits)
    legend = alt.Legend(gradientLength=120, title=titles.get(colour, colour))
    chart: Any = base.mark_rect().encode(color=alt.Color(colour, type="quantitative", scale=scale, legend=legend))
    if best is not None:
        marks = base.transform_filter(alt.datum[best]).mark_point(
            shape="circle", size=side * 2, stroke="white", filled=False
        )
        chart = chart + marks
    chart = chart.properties(width=side * len(columns), height=side * len(rows))
    return (
        chart.facet(alt.Facet(facet, type="nominal", sort=_order(records, facet), title=None), columns=2)
        if facet
        else chart
    )


def lines(
    records: Records,
    *,
    x: str,
    y: str,
    colour: str | None = None,
    titles: Mapping[str, str] | None = None,
    facet: str | None = None,
    low: str | None = None,
    high: str | None = None,
    scales: Mapping[str, str] | None = None,
    points: bool = True,
    domain: Sequence[float] | None = None,
    ramp: bool = False,
) -> alt.Chart:
    """A line for every value of `colour`, along x (numbers, or names in the order of the records).

    Args:
        facet: a field: a panel for each of its values, with a y axis of its own.
        low, high: fields of a band around the line.
        scales: 'log' or 'symlog' by field.
        points: mark the values.
        domain: of y; None for that of the data.
        ramp: colours in an order (depth, cycles) instead of by kind.
    """
    titles, scales = titles or {}, scales or {}
    numbers = all(isinstance(r[x], (int, float)) for r in records)
    y_scale = _scale(records, scales, y)
    if domain:
        y_scale |= {"domain": list(domain)}
    axis: dict[str, Any] = {
        "x": alt.X(
            x,
            type="quantitative",
            title=titles.get(x, x),
            scale=alt.Scale(**{**_scale(records, scales, x), "nice": False}),
            axis=alt.Axis(tickMinStep=1) if all(isinstance(r[x], int) for r in records) else alt.Axis(),
        )
        if numbers
        else alt.X(
            x,
            type="nominal",
            sort=_order(records, x),
            title=titles.get(x, x),
            axis=alt.Axis(labelAngle=-60, labelLimit=160),
        ),
        "y": alt.Y(y, type="quantitative", title=titles.get(y, y), scale=alt.Scale(**y_scale)),
    }
    if colour:
        axis["color"] = _colour(records, colour, titles, ramp)
    base = alt.Chart(_data(records))
    marks: Any = base.mark_line(point=alt.OverlayMarkDef(size=22) if points else False, strokeWidth=1.6).encode(
        **axis, tooltip=_tooltip(records, titles)
    )
    if low and high:
        band = {**axis, "y": alt.Y(low, type="quantitative", title=titles.get(y, y), scale=alt.Scale(**y_scale))}
        marks = base.mark_area(opacity=0.2).encode(**band, y2=alt.Y2(high)) + marks
    return _framed(marks, records, facet)


def bars(
    records: Records,
    *,
    x: str,
    y: str,
    colour: str | None = None,
    titles: Mapping[str, str] | None = None,
    facet: str | None = None,
    behind: str | None = None,
    stacked: bool = False,
    over: bool = False,
    note: str | None = None,
    scales: Mapping[str, str] | None = None,
    ramp: bool = False,
) -> alt.Chart:
    """Horizontal bars of length x, a row for every value of y, in the order of the records.

    Args:
        behind: a field; a grey bar of this length is drawn behind each.
        stacked: bars of one row follow one another instead of lying side by side.
        over: bars of one row are drawn over one another in the order of the records, so the first should be the longest.
        note: a field of the row that is written at its right end.
    """
    titles, scales = titles or {}, scales or {}
    rows = _order(records, y)
    place = alt.Y(y, type="nominal", sort=rows, title=titles.get(y, y), axis=alt.Axis(labelLimit=220))
    kind = scales.get(x, "linear")
    ticks: dict[str, Any] = (
        {"axis": alt.Axis(values=_round_numbers(records, x), format=",d")} if kind == "symlog" else {}
    )
    scale: dict[str, Any] = {"type": kind}
    length: dict[str, Any] = {"title": titles.get(x, x), "scale": alt.Scale(**scale), **ticks}
    encode: dict[str, Any] = {"y": place, "tooltip": _tooltip(records, titles)}
    if colour:
        encode["color"] = _colour(records, colour, titles, ramp)
    beside = colour if not (stacked or over) else None
    if beside:
        encode["yOffset"] = alt.YOffset(beside, type="nominal", sort=_order(records, beside))
    base = alt.Chart(_data(records))
    drawn = base.mark_bar() if colour else base.mark_bar(color=COLOURS[0])
    marks: Any = drawn.encode(x=alt.X(x, type="quantitative", stack="zero" if stacked else None, **length), **encode)
    if behind:
        encode.pop("color", None)
        marks = (
            base.mark_bar(color=COLOURS[5], opacity=0.3).encode(
                x=alt.X(behind, type="quantitative", **length), **encode
            )
            + marks
        )
    if note:  # the labels of a second axis, because an axis has a place of its own however narrow the picture is
        notes = {str(record[y]): str(record[note]) for record in records}
        right = alt.Axis(orient="right", ticks=False, domain=False, labelExpr=f"({json.dumps(notes)})[datum.value]")
        invisible = base.mark_point(opacity=0).encode(y=alt.Y(y, type="nominal", sort=rows, title=None, axis=right))
        marks = (invisible + marks).resolve_axis(y="independent")
    step = 14 if len(rows) > 12 else 20
    each = max(1, len(_order(records, beside)) * 0.6) if beside else 1
    return _framed(marks, records, facet, height=int(step * each * len(rows)))


def points(
    records: Records,
    *,
    x: str,
    y: str,
    colour: str | None = None,
    titles: Mapping[str, str] | None = None,
    facet: str | None = None,
    label: str | None = None,
    error: str | None = None,
    joined: bool = False,
    scales: Mapping[str, str] | None = None,
    front: str | None = None,
    levels: Mapping[str, float] | None = None,
    span: bool = False,
) -> alt.Chart:
    """One point per record at (x, y): both numbers, or y a name, with one row per name in the order of the records.

    Args:
        label: a field that is written beside the points.
        error: a field: half the length of a bar through the point, along y.
        front: a field that is true for the points of the Pareto front, which a line joins from left to right.
        joined: draw a line through the points of each kind.
        span: where y is a name, draw a bar between the points of a row.
        levels: horizontal dashed lines: their values of y by label.
    """
    titles, scales = titles or {}, scales or {}
    rows = _order(records, y) if any(isinstance(record[y], str) for record in records) else []
    place = _place(records, x, y, titles, scales, rows)
    kind = {"color": _colour(records, colour, titles, False)} if colour else {}
    base = alt.Chart(_data(records))
    tip = _tooltip(records, titles)
    marks: Any = base.mark_point(size=46, opacity=0.85, filled=True).encode(
        **place, **kind, **_shape(records, colour, titles), tooltip=tip
    )
    if span and colour:  # the first kind is larger, under a small dot where both are in one place
        first = _order(records, colour)[0]
        under = base.transform_filter(alt.datum[colour] == first).mark_circle(size=130, opacity=1)
        marks = under.encode(**place, **kind, tooltip=tip) + marks.transform_filter(alt.datum[colour] != first)
    if span:
        ends = base.mark_rule(color=COLOURS[5], strokeWidth=2, opacity=0.6)
        marks = ends.encode(y=place["y"], x=alt.X(f"min({x}):Q"), x2=alt.X2(f"max({x}):Q")) + marks
    if joined:
        marks = base.mark_line(strokeWidth=1).encode(**place, **kind) + marks
    if front:
        dashed = base.transform_filter(alt.datum[front]).mark_line(color=COLOURS[5], strokeDash=[4, 3])
        marks = dashed.encode(**place) + marks
    if error:
        low = alt.Y("_low", type="quantitative", title=titles.get(y, y))
        bar = base.transform_calculate(
            _low=f"datum['{y}'] - datum['{error}']", _high=f"datum['{y}'] + datum['{error}']"
        )
        marks = bar.mark_rule().encode(**{**place, "y": low}, **kind, y2="_high:Q") + marks
    if levels:
        marks = _levels(base, levels, place["y"].to_dict()) + marks
    if label:
        text = base.mark_text(align="left", dx=6, dy=12, fontSize=10, color=COLOURS[5])
        marks = marks + text.encode(**place, text=f"{label}:N")
    return _framed(marks, records, facet, height=18 * len(rows) + 12 if rows else HEIGHT)


def _place(
    records: Records, x: str, y: str, titles: Mapping[str, str], scales: Mapping[str, str], rows: Sequence[Any]
) -> dict[str, Any]:
    """The axes of points: numbers along x, and along y numbers or the names in `rows`."""
    across: dict[str, Any] = {"nice": False} if rows and x not in scales else {}
    scale = alt.Scale(padding=12, **_scale(records, scales, x), **across)
    place: dict[str, Any] = {"x": alt.X(x, type="quantitative", title=titles.get(x, x), scale=scale)}
    if rows:
        axis = alt.Axis(labelLimit=220, grid=True)
        place["y"] = alt.Y(y, type="nominal", sort=rows, title=titles.get(y, y), axis=axis)
    else:
        scale = alt.Scale(padding=12, **_scale(records, scales, y))
        place["y"] = alt.Y(y, type="quantitative", title=titles.get(y, y), scale=scale)
    return place


CHARTS: dict[str, Callable[..., alt.Chart]] = {"heatmap": heatmap, "lines": lines, "bars": bars, "points": points}


def _framed(marks: Any, records: Records, facet: str | None, height: int = HEIGHT) -> Any:
    """With its size; on a page these charts may take the width that there is, where a heatmap keeps its squares."""
    if facet is None:
        return marks.properties(
            width=WIDTH, height=height, usermeta={"fit": "fill", "height": "any" if height == HEIGHT else "rows"}
        )
    panels = marks.properties(width=WIDTH // 2 - 30, height=height if height != HEIGHT else HEIGHT * 2 // 3)
    split = panels.facet(alt.Facet(facet, type="nominal", sort=_order(records, facet), title=None), columns=2)
    split = split.resolve_scale(y="independent").resolve_axis(
        x="independent"
    )  # a last row that is not full has no axis under it
    return split.properties(usermeta={"fit": "fill"})


def _scale(records: Records, scales: Mapping[str, str], field: str) -> dict[str, Any]:
    """From the smallest to the largest value: a logarithmic axis that is rounded to powers of ten is mostly empty."""
    kind = scales.get(field, "linear")
    found: dict[str, Any] = {"type": "log", "nice": False} if kind == "log" else {"type": kind, "zero": False}
    values = {record[field] for record in records if isinstance(record[field], (int, float))}
    if len(values) == 1 and kind != "symlog":  # an axis of one value has a tick that is rounded as if there were others
        only = float(values.pop())
        found["domain"] = [only / 2, only * 2] if kind == "log" else [only - 1, only + 1]
    return found


def _levels(base: alt.Chart, levels: Mapping[str, float], axis: Mapping[str, Any]) -> Any:
    """Dashed lines across the whole width, each with its name at the left end; in every panel where there are panels."""
    once = base.transform_aggregate(number="count()")  # one mark, however many records there are
    marks = []
    for name, value in levels.items():
        place = alt.YDatum(value, type="quantitative", title=axis["title"], scale=alt.Scale(**axis["scale"]))
        marks.append(once.mark_rule(color=COLOURS[5], strokeDash=[5, 4]).encode(y=place))
        text = once.mark_text(align="left", dx=4, dy=-6, color=COLOURS[5], text=name)
        marks.append(text.encode(y=place, x=alt.value(0)))
    return alt.layer(*marks)


def _round_numbers(records: Records, field: str) -> list[int]:
    """0, 1, 2, 5, 10, 20, … up to the largest value: the ticks of a symlog axis, on which Vega crowds them."""
    most = max((int(record[field]) for record in records), default=0)
    return [n for n in (0, *(d * 10**p for p in range(len(str(most))) for d in (1, 2, 5))) if n <= most]


def _data(records: Records) -> alt.Data:
    return alt.Data(values=[dict(record) for record in records])


def _order(records: Records, field: str) -> list[Any]:
    return list(dict.fromkeys(record[field] for record in records))


def _colour(records: Records, field: str, titles: Mapping[str, str], ramp: bool) -> alt.Color:
    kinds = _order(records, field)
    scale = (
        alt.Scale(
            domain=kinds, scheme=alt.SchemeParams(name=SEQUENTIAL, extent=[0.2, 0.85])
        )  # its ends vanish on black or white
        if ramp
        else alt.Scale(domain=kinds, range=[COLOURS[i % len(COLOURS)] for i in range(len(kinds))])
    )
    columns: dict[str, Any] = {"columns": 2} if len(kinds) > 15 else {}
    legend = alt.Legend(
        title=titles.get(field, field),
        symbolLimit=40,
        symbolOpacity=1,  # also where the marks are bands
        labelLimit=260,
        **columns,
    )
    return alt.Color(field, type="nominal", sort=kinds, scale=scale, legend=legend)


def _shape(records: Records, field: str | None, titles: Mapping[str, str]) -> dict[str, Any]:
    """Where there are more kinds than colours: a colour comes again, in another shape."""
    kinds = _order(records, field) if field else []
    if field is None or len(kinds) <= len(COLOURS):
        return {}
    forms = [SHAPES[i // len(COLOURS) % len(SHAPES)] for i in range(len(kinds))]
    colour: Any = _colour(records, field, titles, False).to_dict()
    legend = colour["legend"]  # the same, so that Vega makes one of both
    scale = alt.Scale(domain=kinds, range=forms)
    return {"shape": alt.Shape(field, type="nominal", sort=kinds, scale=scale, legend=alt.Legend(**legend))}


def _tooltip(records: Records, titles: Mapping[str, str]) -> list[alt.Tooltip]:
    shown = []
    for field, value in records[0].items() if records else ():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        digits: dict[str, Any] = {"format": ",.4~g"} if isinstance(value, float) else {}
        shown.append(
            alt.Tooltip(
                field,
                type="quantitative" if number else "nominal",
                title=titles.get(field) or field,  # an axis may go without a title, a pointer may not
                **digits,
            )
        )
    return shown
