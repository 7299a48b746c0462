"""The report in a real browser: every chart is drawn by Vega, nothing is complained about, nothing is asked of the network."""

from __future__ import annotations

import shutil
import time

import pytest
from helpers.browser import CHROMIUM, tab
from helpers.runs import done

from compressvit.charts.findings import Finding

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")

LAYERS = [f"blocks.{i}.mlp.fc1" for i in range(12)]
GRID = [{"a": a, "b": b, "v": 0.5, "best": a == b} for a in LAYERS for b in LAYERS]
CURVE = [
    {"x": x, "y": 1.0 + x, "low": 0.5 + x, "high": 2.0 + x, "k": k, "p": p}
    for x in range(9)
    for k in "ab"
    for p in "pq"
]
SIZES = [
    {"layer": layer, "n": n + 1, "all": 20, "k": k, "said": f"{n}"} for n, layer in enumerate(LAYERS) for k in "ab"
]
DOTS = [{"x": 1.0 + x, "y": 2.0 * x, "k": k, "e": 0.5, "front": x > 4, "p": k} for x in range(9) for k in "ab"]
XY = {"x": "x", "y": "y", "colour": "k"}
ROWS = {"x": "n", "y": "layer"}

# Every kind of chart with every option, as other tools may write them.
DIAGNOSTICS = {
    "heatmap": ("heatmap", GRID, {"x": "a", "y": "b", "colour": "v", "best": "best"}),
    "heatmap_panels": ("heatmap", GRID, {"x": "a", "y": "b", "colour": "v", "facet": "best", "domain": None}),
    "lines_band": ("lines", [r for r in CURVE if r["p"] == "p"], {**XY, "low": "low", "high": "high", "ramp": True}),
    "lines_panels": ("lines", CURVE, {**XY, "facet": "p", "scales": {"y": "log"}, "points": False}),
    "lines_names": ("lines", [{"x": n, "y": 1.0} for n in LAYERS], {"x": "x", "y": "y", "domain": (0, 1)}),
    "bars_behind": ("bars", SIZES[::2], {**ROWS, "behind": "all"}),
    "bars_over": ("bars", SIZES, {**ROWS, "colour": "k", "over": True, "note": "said", "scales": {"n": "symlog"}}),
    "bars_beside": ("bars", SIZES, {**ROWS, "colour": "k"}),
    "bars_panels": ("bars", SIZES, {**ROWS, "colour": "k", "stacked": True, "facet": "k"}),
    "points_front": ("points", DOTS, {**XY, "front": "front", "error": "e", "label": "k", "scales": {"x": "log"}}),
    "points_panels": ("points", DOTS, {**XY, "facet": "p", "joined": True, "levels": {"teacher": 3.0}}),
    "points_rows": ("points", SIZES, {**ROWS, "colour": "k", "span": True}),
}


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory, vega):
    """The report of a run with many diagnostics."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("browser") / "run")
    for name, (chart, records, options) in DIAGNOSTICS.items():
        Finding(name, name, "How to read it.", chart, records, options).write(folder / "diagnostics", pictures=False)
    done("report", folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with tab() as opened:
        yield opened


@pytest.fixture
def opened(browser, page):
    """The page, 1200 pixels wide and light."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page, 1200)
    return browser


def test_every_chart_is_drawn_and_nothing_is_asked_for(opened, page):
    assert opened.value("document.querySelectorAll('figure[data-state=live] .vega-embed svg').length") == 9 + len(
        DIAGNOSTICS
    )
    marks = "[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('.vega-embed .role-mark > *').length)"
    assert min(opened.value(marks)) > 0
    assert opened.complaints == []
    assert {url.split(":")[0] for url in opened.requests} == {"file", "data"}
    assert [url for url in opened.requests if url.startswith("file:")] == [page.as_uri()]


def test_images_are_decoded(opened):
    sizes = opened.value("[...document.images].map(i => i.naturalWidth)")
    assert sizes
    assert set(sizes) == {8}


def test_colours_follow_the_theme_while_the_page_is_open(opened):
    ink = """(() => {
        const fill = f => getComputedStyle(f.querySelector('.vega-embed .role-axis-label text, .vega-embed .role-legend-label text')).fill;
        return [getComputedStyle(document.body).color, ...new Set([...document.querySelectorAll('figure')].map(fill))];
    })()"""
    light = opened.value(ink)
    opened.look(1200, "dark")
    dark = opened.value(ink)
    assert len(set(light)) == len(set(dark)) == 1, "text in charts has the colour of the page's text"
    assert set(light) != set(dark)
    assert opened.complaints == []


def test_a_phone_needs_no_scrolling_sideways(opened):
    widths = "[...document.querySelectorAll('.vega-embed svg')].map(s => [s.getBoundingClientRect().width, s.viewBox.baseVal.width])"
    assert max(shown for shown, _ in opened.value(widths)) > 700
    opened.look(400, "light")
    opened.wait(
        f"{widths}.every(([shown, drawn]) => shown <= 368 && shown > 0.9 * drawn)"
    )  # drawn again, not only shrunk
    assert opened.value("document.documentElement.scrollWidth") == 400
    assert opened.complaints == []


def test_paper_shows_what_a_screen_folds_away(opened):
    folded = "[...document.querySelectorAll('details')].map(d => d.lastElementChild.checkVisibility({contentVisibilityAuto: true}))"
    assert not any(opened.value(folded))
    opened.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert len(opened.value(folded)) >= 3, "the resolved recipe, the ledger, the environment"
        opened.wait(f"{folded}.every(seen => seen)")  # the medium changes a moment after the call
        assert opened.value("document.querySelector('#ledger').getBoundingClientRect().height") > 200
    finally:
        opened.call("Emulation.setEmulatedMedia", media="")


def test_a_picture_is_there_without_scripts(opened, page):
    opened.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened.call("Page.navigate", url=page.as_uri())
        time.sleep(1)  # in which scripts would have drawn
        root = opened.call("DOM.getDocument")["root"]["nodeId"]
        found = {
            query: len(opened.call("DOM.querySelectorAll", nodeId=root, selector=query)["nodeIds"])
            for query in (".chart > svg", "[data-state=live]", "footer")
        }
        assert found == {".chart > svg": 9 + len(DIAGNOSTICS), "[data-state=live]": 0, "footer": 1}
    finally:
        opened.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_pointer_reads_values(opened):
    place = opened.value("""(() => {
        const figure = document.querySelector('figure[data-chart=bars_beside]');
        figure.scrollIntoView({block: 'center', behavior: 'instant'});
        const box = figure.querySelector('.mark-rect path[aria-roledescription=bar]').getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    })()""")
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    opened.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    assert "blocks.0.mlp.fc1" in opened.value("document.querySelector('#vg-tooltip-element').textContent")
    assert opened.complaints == []
