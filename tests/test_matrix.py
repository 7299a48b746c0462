"""docs/matrix.md says what plans say; what comes after a plan is checked by the contract, and by the program that writes the page."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from compressvit.testing.models import examples

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = ("vit", "davit")  # others in the wide suite


@pytest.fixture(scope="module")
def program():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("support_matrix")


@pytest.mark.wide_unless(lambda name: name == "vit")
@pytest.mark.parametrize("name", [name for name, example in examples().items() if example.tried != "decoder"])
def test_the_page_says_what_is_refused(program, name):
    said = program.refusals(program.PAGE.read_text(encoding="utf-8"))
    for step, kind in program.transforms().items():
        assert said[step, name] == bool(program.planned(kind, name)), f"{step} on {name}: write the page anew"


def test_every_pair_is_in_the_page(program):
    said = program.refusals(program.PAGE.read_text(encoding="utf-8"))
    assert said.keys() == {(step, name) for step in program.transforms() for name in program.models()}
    assert not any(examples()[name].tried == "decoder" for _, name in said)


def test_one_column_can_be_written_anew(program, monkeypatch, tmp_path):
    """What the page says of the others is read from it, and stays to the letter."""
    text = program.PAGE.read_text(encoding="utf-8")
    assert program.page(program.told(text), program.models()) == text
    monkeypatch.setattr(program, "tried", lambda kind, name: (("export", "of a test"),))
    monkeypatch.setattr("sys.argv", ["support_matrix.py", "--models", "swin", "--output", str(tmp_path / "page.md")])
    assert program.main() == 0
    after, before = program.told((tmp_path / "page.md").read_text(encoding="utf-8")), program.told(text)
    assert {pair for pair in before if after[pair] != before[pair]} == {(s, n) for s, n in before if n == "swin"}
    assert after["lora", "swin"] == (("export", "of a test"),)


def test_a_refusal_is_read_as_one(program):
    text = "| | vit<br>`v` | davit<br>`d` |\n| --- | --- | --- |\n| `lora` | merge 2 | no 1 |\n| `ssf` | yes | yes |\n"
    assert program.refusals(text) == {
        ("lora", "vit"): False,
        ("lora", "davit"): True,
        ("ssf", "vit"): False,
        ("ssf", "davit"): False,
    }
