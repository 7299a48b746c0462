"""An HTML page taken apart: sections, figures, text, and everything that could make a browser load something."""

from __future__ import annotations

import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import vl_convert

VOID = {"meta", "link", "img", "br", "hr", "input"}


_draw = vl_convert.vegalite_to_svg


@functools.lru_cache(maxsize=1000)
def drawn(spec: str) -> str:
    """A Vega-Lite chart as SVG, which takes a twentieth of a second the first time."""
    return _draw(json.loads(spec))


class Page(HTMLParser):
    """`text` is what is visible; `figures` are {name, caption, spec}; `tables` are rows of cells."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.sections: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.images: list[dict[str, str]] = []
        self.text = ""
        self._json = False
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in said.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(said["id"])
        elif tag == "figure":
            self.figures.append({"name": said.get("data-chart"), "caption": "", "spec": None, "svg": False})
        elif tag == "svg":
            self.figures[-1]["svg"] = True
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(said)
        elif tag == "script":
            self._json = said.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script" and self._json:
            self.figures[-1]["spec"] = json.loads(data)
        elif inside == "script":
            self.scripts.append(data)
        elif inside == "style":
            self.styles.append(data)
        else:
            self.text += data + " "
            if "figcaption" in self.open:
                self.figures[-1]["caption"] += data
            if "table" in self.open and ("td" in self.open or "th" in self.open):
                self.tables[-1][-1][-1] += data

    @property
    def figure_names(self) -> list[str]:
        return [figure["name"] for figure in self.figures]

    def loads(self) -> list[str]:
        """What a browser would fetch by it: addresses in attributes that load, in styles, and in our own script."""
        found = []
        for tag, name, value in self.attributes:
            if name in (
                "src",
                "href",
                "xlink:href",
                "srcset",
                "action",
                "data",
                "poster",
                "background",
            ) and not value.startswith(("#", "data:image/")):
                found.append(f"{tag} {name}={value[:80]}")
            found += [f"{tag} {name}={url}" for url in re.findall(r"url\(([^)]*)\)", value) if not url.startswith("#")]
        for style in self.styles:
            found += re.findall(r"url\([^)]*\)|@import[^;]*|https?:[^\s;]*", style)
        own = self.scripts[-1] if self.scripts else ""
        found += re.findall(r"\bfetch\(|\bimport\b|XMLHttpRequest|https?:", own)
        return found
