"""Texts that stand outside of docs/ become pages of the site, and links lead to pages.

The same Markdown reads right on a code host: there a link is a path from one file to another. On the site a link to a text becomes one
to its page, a link to a module of the package one to its reference, and any other file is linked in the repository, where pyproject.toml
names one, or named as code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[2]
# Texts outside of docs/, and what their pages are called.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/ia3/README.md": "examples/ia3.md",
}
# Modules that texts link to, and where the site speaks of them.
MODULES = {
    f"compressvit/model/detectors/{name}.py": f"reference/detectors.md#compressvit.model.detectors.{name}"
    for name in ("adamixer", "faster_rcnn", "mask_rcnn")
}
PICTURES = "benchmarks/pictures"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def repository() -> str | None:
    """The address of the repository, if pyproject.toml names it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^"?(?:repository|source)"? *= *"(https?://[^"]+?)/?"', text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def pages() -> dict[str, str]:
    """Of every text and picture of the repository that is on the site, its place there; folders stand for their README.md."""
    own = {f"docs/{path.relative_to(ROOT / 'docs').as_posix()}": path for path in (ROOT / "docs").rglob("*.md")}
    found = {file: file.removeprefix("docs/") for file in own} | OUTSIDE | MODULES
    found |= {name: name for path in sorted((ROOT / PICTURES).iterdir()) if (name := f"{PICTURES}/{path.name}")}
    return found | {
        str(PurePosixPath(file).parent): page for file, page in found.items() if file.endswith("/README.md")
    }


def with_links(text: str, file: str, known: Mapping[str, str], repo: str | None) -> str:
    """The text of a page with links that hold on the site.

    Args:
        text: Markdown.
        file: where it stands in the repository, e.g. 'docs/shrink.md'.
        known: places on the site, by files of the repository.
        repo: the address of the repository, if there is one.
    """
    here = str(PurePosixPath(known[file]).parent)

    def changed(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        path = os.path.normpath(PurePosixPath(file).parent / path)
        if path in known:
            place, _, inner = known[path].partition("#")
            to = os.path.relpath(place, here) + (f"#{anchor or inner}" if anchor or inner else "")
            return f"{mark}[{title(path) if label in (target, path) else label}]({to})"
        if not (ROOT / path).exists():
            return match[0]  # mkdocs will complain
        if repo:
            kind = "raw" if mark else "tree" if (ROOT / path).is_dir() else "blob"
            return f"{mark}[{label}]({repo}/{kind}/main/{path})"
        return label if "`" in label else f"`{label}`"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(changed, part) for part in parts[::2]]
    return "".join(parts)


def title(file: str) -> str:
    """The first heading of a text."""
    path = ROOT / file
    text = (path / "README.md" if path.is_dir() else path).read_text(encoding="utf-8")
    return text.partition("\n")[0].lstrip("# ")


# ----------------------------------------------------------------------------------------------- called by mkdocs


def on_config(config: Any) -> Any:
    from pymdownx.slugs import slugify

    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # anchors of headings as on a code host
    config.repo_url = config.repo_url or repository()
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for file, page in pages().items():
        if not file.startswith("docs") and "#" not in page and (ROOT / file).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    known = pages()
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # which has one line
    file = next((file for file, place in known.items() if place == page.file.src_uri and (ROOT / file).is_file()), None)
    return markdown if file is None else with_links(markdown, file, known, config.repo_url)
