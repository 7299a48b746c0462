"""Every dotted name of the package that a text or a docstring mentions is there, and every link within the texts leads somewhere: texts
outlive what they speak of."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.rglob("compressvit/**/*.py"),
        *ROOT.glob("tools/*.py"),
    ]
    if path.name != "CHANGELOG.md"  # what is past may be gone
)
NAME = re.compile(r"(?<![\w./-])compressvit(?:\.[A-Za-z_]\w*)+")
NO_NAMES = {"compressvit.json", "compressvit.CLASS"}  # a file, a placeholder
GROUPS = re.compile(
    r"compressvit\.(transforms|phases|terms|diagnostics|sets|families|formats|boards|tasks)$"
)  # of entry points


def resolved(name: str) -> object:
    """What a dotted name stands for: a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_is_mentioned_is_there(path):
    for name in sorted(set(NAME.findall(path.read_text(encoding="utf-8"))) - NO_NAMES):
        if GROUPS.match(name):
            continue
        try:
            resolved(name)
        except AttributeError as error:
            pytest.fail(f"{path.relative_to(ROOT)} mentions {name}: {error}")


def test_the_texts_were_seen():
    assert len(TEXTS) > 100
    assert resolved("compressvit.load") is not None
    with pytest.raises(AttributeError):
        resolved("compressvit.no_such_module.name")


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}"
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.relative_to(ROOT)} links to {link}"


def test_no_text_has_the_marks_of_a_merge():
    files = [*TEXTS, *PAGES, *ROOT.rglob("tests/**/*.py"), *ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/*.py")]
    marked = [path for path in files if re.search(r"^(<{7}|>{7}) ", path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert not marked
