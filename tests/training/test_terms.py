"""A loss term of another package is a key of `losses`, as compressvit's own are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.process import python

from compressvit.training.phases.distill import Distill
from compressvit.training.terms import TERMS, LossTerm, build_terms, loss_term
from compressvit.training.terms.section import losses_section

MODULE = '''
import torch
from pydantic import Field
from compressvit.training.terms import LossTerm, Term, loss_term


@loss_term("stillness")
class StillnessTerm(LossTerm):
    """Mean square of what leaves a block, to the power of `half`."""

    weight: float = Field(0.0, ge=0)
    half: float = Field(1.0, gt=0, description="An exponent.")

    def build(self, setting):
        path = setting.pairs[-1].student.path

        def function(batch):
            seen = batch.student_taps[path]["output"]
            return seen.square().mean() ** self.half, {"stillness_largest": seen.detach().abs().max()}

        return Term(self.name, self.weight, function, ((path, "output"),))
'''
PROGRAM = """
import sys
from compressvit.cli import main
recipe, folder, *more = sys.argv[1:]
apply = ["apply", "--no-report", recipe, "--output", folder, *more]
for words in (["schema"], ["schema", "distill.losses.stillness"], ["plan", recipe, *more], apply):
    code = main(words)
    assert code == 0, (words, code)
    print("=====")
"""


def test_a_term_of_an_installed_package(recipe, tmp_path):
    """In a process of its own, because the keys of recipes are settled once."""
    (tmp_path / "stillness.py").write_text(MODULE)
    info = tmp_path / "stillness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stillness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compressvit.terms]\nstillness = stillness\n")
    folder = tmp_path / "run"
    words = [
        "steps.1.distill.losses.stillness={weight: 0.5, half: 2}",
        "steps.1.distill.epochs=1",
        "data.limit_train=16",
    ]
    done = python("-c", PROGRAM, recipe, folder, *words, path=[tmp_path])
    assert done.code == 0, done.err
    schema, keys, plan, _ = done.out.split("=====")[:4]
    losses = json.loads(schema)["$defs"]["Losses"]["properties"]
    assert list(losses) == [*losses_section().model_fields, "stillness"]
    assert "An exponent." in keys
    assert "stillness" in plan
    assert "stillness" in json.loads((folder / "plan.json").read_text())["steps"][-1]["loss_bytes"]
    assert "stillness" in (folder / "resolved.yaml").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["phase"] == "1_distill" and row["kind"] == "train"]
    assert trained
    for row in trained:
        assert row["stillness"] > 0
        assert row["stillness_largest"] > 0
        parts = [row[name] for name in losses if name in row]
        assert len(parts) >= 4
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)


LATE = """
from pydantic import Field
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import LossTerm, loss_term


@loss_term("late")
class Late(LossTerm):
    weight: float = Field(0.0, ge=0)


print(Distill(losses={"late": {"weight": 2}}).losses.late.weight)
"""


def test_a_term_that_is_registered_after_the_phase_was_imported_is_a_key():
    done = python("-c", LATE)
    assert done.out.strip() == "2.0", done.err


def test_a_package_whose_term_cannot_be_loaded_is_named_with_the_reason(recipe, tmp_path):
    (tmp_path / "stillness.py").write_text("raise RuntimeError('no such physics')")
    info = tmp_path / "stillness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: still-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compressvit.terms]\nstillness = stillness\n")
    words = ["plan", str(recipe), "steps.1.distill.losses.stillness={weight: 1}"]
    done = python("-m", "compressvit", *words, path=[tmp_path])
    assert done.code == 2
    fault = "unknown key; the loss term 'stillness' of the package still-losses cannot be used: RuntimeError: no such physics"
    assert fault in " ".join(done.err.split())


def test_the_keys_stand_in_the_order_in_which_they_are_added_up():
    own = ["prediction", "attention_relation", "hidden_relation", "feature", "labels", "torchdistill"]
    assert list(losses_section().model_fields) == [*own, "cka"]  # others follow
    assert sorted(name for name in TERMS if name in own) == sorted(own)
    weights = {name: {"weight": 1} for name in ("labels", "feature", "prediction")}
    terms = build_terms(Distill(losses=weights).losses, [], classes=4)
    assert [term.name for term in terms] == ["prediction", "feature", "labels"]


def test_a_key_for_every_file_of_the_room():
    room = Path(sys.modules["compressvit.training.terms"].__file__).parent
    files = {path.stem for path in room.glob("*.py")} - {"__init__", "base", "section", "building"}
    assert {name for name in TERMS if TERMS[name].__module__.startswith("compressvit.")} == files


def test_a_word_is_taken_once():
    with pytest.raises(TypeError, match="two loss terms are called 'labels'"):

        @loss_term("labels")
        class Second(LossTerm):
            """Another."""
