"""The site: links hold on it, and its reference has every key, word, verb and public name. `.ci/run` builds it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import compressvit
from compressvit.recipe.schema import json_schema
from compressvit.transforms.base import TRANSFORMS

ROOT = Path(__file__).parents[1]


def hook(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"hooks_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES, REFERENCE = hook("pages"), hook("reference")
KNOWN = PAGES.pages()


@pytest.fixture(scope="module")
def made():
    return REFERENCE.all_pages()


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "[shrink](docs/shrink.md)", "[shrink](shrink.md)"),
        ("README.md", "[docs/data.md](docs/data.md)", "[Data](data.md)"),
        ("README.md", "[b](benchmarks/README.md#adapters)", "[b](benchmarks.md#adapters)"),
        ("docs/shrink.md", "[r](../README.md#try-it)", "[r](index.md#try-it)"),
        ("docs/tutorials/shrink.md", "[r](../../README.md)", "[r](../index.md)"),
        ("docs/tutorials/method.md", "[examples/ia3](../../examples/ia3)", "[compressvit-ia3](../examples/ia3.md)"),
        ("docs/shrink.md", "[here](#budgets) [out](https://arxiv.org)", "[here](#budgets) [out](https://arxiv.org)"),
        ("docs/evidence.md", "![CKA](../benchmarks/pictures/dinov2_cka.png)", "![CKA](benchmarks/pictures/dinov2_cka.png)"),
        ("benchmarks/README.md", "![CKA](pictures/dinov2_cka.png)", "![CKA](benchmarks/pictures/dinov2_cka.png)"),
        ("docs/papers.md", "[published.yaml](../benchmarks/published.yaml)", "`published.yaml`"),
        ("docs/models.md", "[`adamixer`](../compressvit/model/detectors/adamixer.py)",
         "[`adamixer`](reference/detectors.md#compressvit.model.detectors.adamixer)"),
        ("docs/data.md", "[gone](gone.md)", "[gone](gone.md)"),  # the build fails
        ("docs/data.md", "```yaml\n[a](../LICENSE)\n```\n[b](../LICENSE)", "```yaml\n[a](../LICENSE)\n```\n`b`"),
    ],
)  # fmt: skip
def test_a_link_leads_to_a_page(file, text, expected):
    assert PAGES.with_links(text, file, KNOWN, None) == expected


def test_other_files_are_linked_in_the_repository_where_there_is_one():
    text = "[table](../benchmarks/published.yaml) [all](../tests) [shrink](shrink.md)"
    linked = PAGES.with_links(text, "docs/papers.md", KNOWN, "https://host/x")
    assert linked == (
        "[table](https://host/x/blob/main/benchmarks/published.yaml) [all](https://host/x/tree/main/tests) "
        "[shrink](shrink.md)"
    )


def test_the_navigation_has_every_page(made):
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for inner in (node.values() if isinstance(node, dict) else node) for leaf in leaves(inner)]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    texts = {place for place in KNOWN.values() if place.endswith(".md")}
    assert len(texts) > 15
    assert sorted(listed) == sorted(texts | set(made))


def test_every_key_of_a_recipe_stands_in_the_reference(made):
    text = "\n".join(made.values())
    schema = json_schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for key, field in section.get("properties", {}).items():
            if name in ("Step", "Entry"):  # words, which have headings
                assert f"\n## {key} {{#{key}}}\n" in text, key
                continue
            rows = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
            meaning = REFERENCE.cell(field.get("description", ""))
            assert any(meaning in row for row in rows), f"{name}.{key}"


def test_links_between_pages_of_the_reference_lead_to_a_heading(made):
    for page, text in made.items():
        for target, anchor in re.findall(r"\]\(([\w./]*)#([\w.]+)\)", text):
            place = f"reference/{target}" if target else page
            assert f"{{#{anchor}}}" in made[place], f"{page}: {target}#{anchor}"


def test_public_names_and_verbs_stand_in_the_reference(made):
    for name in compressvit._PUBLIC:
        assert f'heading: "compressvit.{name}"\n' in made["reference/python.md"]
    for spec in TRANSFORMS.values():
        assert f"::: {spec.__module__}.{spec.__name__}\n" in made["reference/classes.md"]
    for name in ("prediction", "attention_relation", "hidden_relation", "feature"):
        assert f"::: compressvit.training.losses.{name}\n" in made["reference/losses.md"]
    for verb in ("shrink", "apply", "recipes show", "schema"):
        assert f"## compressvit {verb}\n" in made["reference/verbs.md"]
    assert max(map(len, made["reference/verbs.md"].splitlines())) <= 90
