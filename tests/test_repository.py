"""What stands in the repository beside the code: that it is readable for those who read it by programs, and of this version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import compressvit

ROOT = Path(__file__).parents[1]


def project() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license", "type"} <= set(said)
    assert (str(said["version"]), said["license"]) == (compressvit.__version__, project()["license"]["text"])
    assert project()["version"] == compressvit.__version__


def test_templates_of_issues_have_what_a_form_needs():
    templates = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(templates) == 2
    for path in templates:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        names = [field["id"] for field in form["body"]]
        assert len(set(names)) == len(names)
        for field in form["body"]:
            assert field["type"] in {"textarea", "checkboxes", "dropdown", "input", "markdown"}
            assert field["attributes"]["label"]
            if field["type"] == "dropdown":
                assert all(isinstance(choice, str) for choice in field["attributes"]["options"]), (
                    "No is a truth value in YAML"
                )


def test_every_dependency_has_a_lower_bound():
    lines = project()["dependencies"]
    lines += [line for extra in project()["optional-dependencies"].values() for line in extra]
    free = {line for line in lines if not re.fullmatch(r"[\w-]+>=[\d.]+", line) and not line.startswith("compressvit[")}
    assert free == {"types-PyYAML"}


def test_the_lower_bounds_are_tried_on_tests_that_are_there():
    words = (ROOT / ".ci" / "lower_bounds").read_text().split()
    tests = [word for word in words if word.startswith("tests/")]
    assert len(tests) > 8
    assert all((ROOT / test).exists() for test in tests)
