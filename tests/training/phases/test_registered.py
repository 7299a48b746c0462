"""A phase that somebody else registers goes through recipes, plan, apply, compare and report without an edit elsewhere."""

from __future__ import annotations

import json

import pytest
from helpers.page import Page
from helpers.process import python
from helpers.runs import TINY, metrics

from compressvit.training.phases import PHASES, PhaseSpec, phase

pytestmark = pytest.mark.wide  # a process of its own

PROGRAM = '''
import sys
from typing import ClassVar

from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.training.phases import PHASES, PhaseSpec, phase


@phase("norms")
class Norms(PhaseSpec):
    """Train nothing but the norms."""

    label_fields: ClassVar = ("biases",)
    biases: bool = Field(True, description="Also their biases.")

    def plan(self, setting):
        plan = super().plan(setting)
        if not self._norms(setting.student.model):
            raise UserError("norms trains norms, and the model has none")
        plan.summary += f"; {len(self._norms(setting.student.model))} norms"
        return plan

    def run(self, model, stage):
        model.requires_grad_(False)
        for norm in self._norms(model):
            norm.weight.requires_grad_(True)
            norm.bias.requires_grad_(self.biases)
        model, report = super().run(model, stage)
        return model, {**report, "norms": len(self._norms(model))}

    def _norms(self, model):
        return [m for m in model.modules() if isinstance(m, nn.LayerNorm)]


from compressvit.cli import main

for words in (
    ["plan", RECIPE, "--json"],
    ["apply", RECIPE, "--output", RUN, "seed=3"],
    ["compare", RUN],
    ["schema", "norms"],
):
    code = main(words)
    assert code == 0, (words, code)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a recipe with such a phase, and what the verbs printed."""
    folder = tmp_path_factory.mktemp("norms")
    recipe = folder / "norms.yaml"
    recipe.write_text(TINY.replace("distill: {epochs: 1}", "norms: {epochs: 2, biases: false, log_every: 1}"))
    names = f"RECIPE, RUN = {str(recipe)!r}, {str(folder / 'run')!r}\n"
    answer = python("-c", names + PROGRAM)
    assert answer.code == 0, answer.err
    return folder / "run", " ".join(answer.out.split())


def test_it_is_planned(run):
    plan = json.loads((run[0] / "plan.json").read_text())
    step = plan["steps"][-1]
    assert step["step"] == "steps[1].norms"
    assert step["summary"].endswith("; 5 norms")


def test_it_is_run(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert results["phases"]["1_norms"]["norms"] == 5
    assert results["phases"]["1_norms"]["kept_epoch"] == 2
    assert results["student"]["trained_adapter"] + results["student"]["trained_head"] == 5 * 16
    assert {line["step"] for line in metrics(run[0], phase="1_norms", kind="train")} == {1, 2, 3, 4}


def test_it_is_compared_documented_and_reported(run):
    assert "multiplex share 2 + norms biases False" in run[1]
    assert "Also their biases." in run[1]
    assert "1_norms" in (run[0] / "report.html").read_text()
    assert Page(run[0] / "report.html").sections


def test_a_word_is_taken_once():
    assert {"distill", "finetune", "prune", "sparsify"} <= set(PHASES)
    with pytest.raises(TypeError, match="two phases are called 'finetune'"):
        phase("finetune")(type("Other", (PhaseSpec,), {}))
