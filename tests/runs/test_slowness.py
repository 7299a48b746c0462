"""Where a student was measured to be slower than its teacher, that is told with the reason that is known."""

from __future__ import annotations

import json

import pytest
from helpers.images import GRAY, side
from helpers.runs import QUICK, done
from helpers.training import tiny_vit
from torch import nn

from compressvit.data.input import Side
from compressvit.model import cost
from compressvit.report.record import read_run
from compressvit.report.sections import details
from compressvit.runs.export import print_export
from compressvit.runs.slowness import UNPACKED, operations, slowness
from compressvit.terminal import Terminal
from compressvit.transforms import LowRank, Multiplex, Quantise
from compressvit.transforms.applying import compress

SLOWER = (1.01, 1.2, 1.4)
TOLD = "the student is slower than its teacher"


@pytest.fixture(scope="module")
def teacher():
    return side(tiny_vit(embed_dim=48).eval())


def reason(teacher, *steps):
    found = slowness(Side(compress(teacher.model, list(steps)), GRAY), teacher, SLOWER)
    assert found.startswith(TOLD)
    return found


def test_what_is_not_slower_beyond_the_interval_is_not_told(teacher):
    student = Side(compress(teacher.model, [LowRank(rank=2, metric="weights")]), GRAY)
    assert slowness(student, teacher, (1.0, 1.2, 1.5)) is None
    assert slowness(student, teacher, (0.7, 0.9, 0.99)) is None
    assert slowness(student, teacher, (1.001, 1.2, 1.5)) is not None


def test_the_reason_is_what_its_layers_do(teacher):
    low_rank = reason(teacher, LowRank(rank=2, metric="weights"))
    assert "layers of low rank are two products each" in low_rank
    assert "MACs" not in low_rank
    assert UNPACKED not in low_rank
    assert UNPACKED in reason(teacher, Quantise(bits=4, metric="weights"))
    more = reason(teacher, Multiplex(share=2, mlp_conv=3))
    assert "operations for an image, the teacher" in more
    assert "low rank" not in more
    assert "and because it has 1." in more
    assert "nor its MACs (1.00 of them) say why" in slowness(teacher, teacher, SLOWER)


def test_operations_are_those_that_compute():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 2)

        def forward(self, images):
            return self.fc(images.flatten(1).view(-1, 64)).relu_()  # a product with its bias, and in place

    assert operations(side(Model())) == 2


@pytest.fixture
def slow(monkeypatch):
    """Every student takes twice as long as its teacher."""
    monkeypatch.setattr(cost, "latencies", lambda *_, **__: cost.Latencies([[1.0, 2.0]] * 12))


def test_a_run_its_page_and_its_results_tell_it(slow, tmp_path):
    (tmp_path / "recipe.yaml").write_text(QUICK)
    out = done("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert TOLD in out
    told = json.loads((tmp_path / "run" / "results.json").read_text())["slower"]
    assert told.startswith(TOLD)
    assert f"T{told[1:]}." in details(read_run(tmp_path / "run"))


@pytest.mark.wide
def test_a_measured_plan_and_a_frontier_tell_it(slow, recipe, finished, tmp_path):
    words = [recipe, f"teacher.weights={finished / 'teacher'}", "steps=[{low_rank: {budget: {parameters: 0.7}}}]"]
    words += ["teacher.finetune=null", "calibration.images=16"]
    assert TOLD in done("plan", *words, "--measure")
    assert f"budget 0.7: {TOLD}" in done("frontier", *words, "--budgets", 0.7, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("int8", "likely because rounding what meets"),
        ("fp16", "likely because few processors"),
        ("fp32", "in PyTorch\n"),
    ],
)
def test_an_exported_file_too(precision, words, tmp_path):
    result = {
        **{"artifact": "a", "written": "b", "input_size": [1, 8, 8], "format": "onnx", "precision": precision},
        **{
            "artifact_bytes": 10,
            "exported_bytes": 5,
            "runtime": "onnxruntime",
            "ranges_of": None,
            "compared_on": "images",
        },
        **{
            "agreement_text": "same",
            "difference": 0.0,
            "tolerance": 0.5,
            "bytes": {"b": 5},
            "how": "",
            "latency_on": "cpu",
        },
        **{"latency_ms": {"artifact": 1.0, "exported": 2.0}, "latency_ratio": SLOWER},
    }
    with (tmp_path / "shown").open("w+") as file:
        print_export(result, Terminal(file=file, width=80))
        file.seek(0)
        shown = file.read()
    assert "it is slower than the artifact is in PyTorch" in shown
    assert words in shown
