"""The HTML page: template, style, the content from `sections`, charts, and one copy of Vega's code."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jinja2
import vl_convert
from markupsafe import Markup

from compressvit import __version__
from compressvit.charts import drawing
from compressvit.charts.findings import Finding
from compressvit.report import sections
from compressvit.report.record import Run
from compressvit.report.training import curves, phases
from compressvit.text import printable

_HERE = Path(__file__).parent


class Page:
    """A page under construction. Vega's code takes a second to bundle, so this starts at once in the background.

    Args:
        images: whether the pictures of the data that a run kept are on it; otherwise no reader shows any, whatever a chart may hold.
    """

    def __init__(self, images: bool = True) -> None:
        self._images = images
        # without a snippet it exports what `page.js` uses; the type stub wrongly requires a snippet
        bundle = cast(Callable[[], str], vl_convert.javascript_bundle)
        self._bundle: Future[str] = ThreadPoolExecutor(1).submit(bundle)
        self._numbers = 0

    def figure(self, finding: Finding) -> dict[str, Any]:
        """The data of a finding for the template.

        Raises:
            Exception: any error of Altair or Vega if options and records do not fit the chart.
        """
        content: dict[str, Any] = {
            "name": finding.name,
            "title": finding.title,
            "caption": finding.caption,
            "spec": None,
        }
        if finding.records:
            spec, svg = drawing.for_page(finding.draw())
            self._numbers += 1
            content |= {"spec": Markup(_data_block(spec)), "svg": Markup(_with_own_names(svg, f"f{self._numbers}_"))}
        return content

    def html(self, heading: str, facts: Sequence[str], runs: Sequence[Run], comparison: dict[str, Any] | None) -> str:
        """The page; with a comparison, each run gets only a short section."""
        contents = [self.short(run) if comparison else self.whole(run) for run in runs]
        drawn = bool(self._numbers)
        scripts = [_script(text) for text in (self._bundle.result(), _text("page.js"))] if drawn else []
        return _template().render(
            heading=heading,
            facts=facts,
            contents=_contents(contents, comparison),
            comparison=comparison,
            runs=contents,
            version=__version__,
            style=Markup(_text("style.css")),
            scripts=[Markup(script) for script in scripts],
            policy=Markup(_policy(scripts, self._images)),
            images=self._images,
        )

    def short(self, run: Run) -> dict[str, Any]:
        """The section of a run among others."""
        return {
            "title": sections.title(run),
            "facts": sections.facts(run),
            "verdict": sections.verdict(run),
            "measures": sections.measures(run),
            "recipe_text": run.recipe_text,
            "overrides": sections.overrides(run.environment.command) if run.environment else [],
            "resolved_text": run.resolved_text,
            "commands": sections.reproduction(run),
            "hash": sections.student_hash(run),
            "log": sections.log_end(run),
            "notes": run.notes,
        }

    def whole(self, run: Run) -> dict[str, Any]:
        """The section of a single run."""
        predictions = run.predictions
        classes = sections.class_chart(predictions) if predictions else None
        measure = sections.measure_of(predictions) if predictions else None
        content = {
            "details": sections.details(run),
            "phases": [
                {"name": name, "charts": self._figures(run, curves(name, lines))}
                for name, lines in phases(run.metrics).items()
            ],
            "sizes": sections.sizes(run.results),
            "ledger": sections.ledger(run.results),
            "predictions": predictions is not None,
            "compared": bool(predictions and predictions.compared),
            "classes": next(iter(self._figures(run, [classes])), None) if classes else None,
            "confusions": predictions.confusions if predictions else None,
            "confusions_in_all": predictions.confusions_in_all if predictions else None,
            "gallery": sections.gallery(run) if self._images else [],
            "left_out": 0 if self._images or predictions is None else len(predictions.examples),
            "examples": measure.caption if measure else "",
            "drawn": predictions.drawn if predictions else None,
            "diagnostics": self._figures(run, run.findings),
            "environment": sections.environment(run),
        }
        return {**content, **self.short(run)}  # last, because charts that cannot be drawn add notes

    def _figures(self, run: Run, findings: Sequence[Finding]) -> list[dict[str, Any]]:
        """The findings that can be drawn; a note for each that cannot."""
        drawn = []
        for finding in findings:
            try:
                drawn.append(self.figure(finding))
            except Exception as error:  # a finding comes from a file and may be invalid in any way
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                run.notes.append(f"The chart of {finding.name} cannot be drawn, and is left out: {reason}.")
        return drawn


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    return environment.get_template("page.html")


def _contents(runs: Sequence[dict[str, Any]], comparison: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Anchor and text of every section."""
    if comparison:
        return [("comparison", "Comparison"), *((f"run-{n}", run["facts"][0]) for n, run in enumerate(runs, 1))]
    named = [
        ("verdict", "Results", True),
        ("asked", "Recipe", True),
        ("training", "Training", runs[0]["phases"]),
        ("ledger", "Changes", runs[0]["ledger"]),
        ("predictions", "Predictions", runs[0]["predictions"]),
        ("diagnostics", "Diagnostics", runs[0]["diagnostics"]),
        ("reproduce", "Reproduction", True),
    ]
    return [(anchor, text) for anchor, text, there in named if there]


def _shown(value: Any) -> Any:
    """What the template prints of a value: whatever text comes from a run has no control characters in the page."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """JavaScript code, escaped so that no text in it can end the script element."""
    return re.sub(r"</(script)", r"<\\/\1", text, flags=re.IGNORECASE)


def _data_block(content: Any) -> str:
    """JSON, escaped so that no text in it can end the script element."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _with_own_names(svg: str, prefix: str) -> str:
    """The SVG drawing with identifiers that are unique on the page."""
    names = set(re.findall(r'\sid="([^"]+)"', svg))
    for name in names:
        svg = svg.replace(f'id="{name}"', f'id="{prefix}{name}"').replace(f"url(#{name})", f"url(#{prefix}{name})")
    return svg


def _policy(scripts: Sequence[str], images: bool) -> str:
    """The content security policy: the page may run its own scripts and show its own images, without any network access."""
    allowed = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    shown = "data:" if images else "'none'"
    return f"default-src 'none'; script-src {allowed or repr('none')}; style-src 'unsafe-inline'; img-src {shown}"
