"""docs/papers.md: the tests that it names are there, its exact figures stand in them, and what is computed from the published table."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressvit.recipe.recipe import load_recipe
from compressvit.runs.files import RecipePlan
from compressvit.runs.plan import plan_recipe
from compressvit.transforms import Transform

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "papers.md"
PUBLISHED = (ROOT / "benchmarks" / "published.yaml").read_text(encoding="utf-8")
TABLE: dict[str, Any] = yaml.safe_load(PUBLISHED)
VIT_B = {entry["label"]: entry["vit_b"] for entry in TABLE["trained"]}
PAPERS = {"MiniViT", "LORS", "MiMi", "RepAdapter", "AdaptFormer"}
STATUSES = {"exact", "small scale", "different", "not measured", "out of reach", "not built"}
NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
NUMBER = re.compile(r"\d[\d_]*(?:\.\d+)?")


@functools.cache
def source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def claims() -> list[tuple[str, str, str]]:
    """Claim, status and evidence of every row, below the headings of the papers."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert rows[0] == "| claim | status | evidence |"
        for row in rows[2:]:
            claim, status, evidence = (cell.strip() for cell in row.strip("|").split(" | "))
            found.append((claim, status, evidence))
    return found


def numbers(text: str) -> set[str]:
    return {number.replace("_", "") for number in NUMBER.findall(text)}


def test_every_paper_has_a_section_and_every_claim_a_status():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^## (.*)$", text, re.MULTILINE)) == PAPERS
    assert {status for _, status, _ in claims()} <= STATUSES
    assert (
        set(re.findall(r"^\| ([a-z ]+) \| [^|]+ \|$", text.partition("\n## ")[0], re.MULTILINE)) - {"status"}
        == STATUSES
    )
    assert len(claims()) > 50


def test_the_tests_that_are_named_are_there():
    named = NAMED.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 40
    for file, name in named:
        functions = {node.name for node in ast.parse(source(file)).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"


@pytest.mark.parametrize(("claim", "evidence"), [(c, e) for c, s, e in claims() if s == "exact"])
def test_an_exact_figure_is_in_the_published_table_or_in_the_test(claim, evidence):
    named = NAMED.findall(evidence)
    assert named, f"{claim}: exact, and no test is named"
    known = numbers(PUBLISHED).union(*(numbers(source(file)) for file, _ in named))
    for figure in re.findall(r"\*\*([\d.,]+)\*\*", evidence):
        assert figure.replace(",", "") in known, f"{claim}: {figure} is nowhere asserted"


@pytest.mark.parametrize(("claim", "evidence"), [(c, e) for c, s, e in claims() if s == "small scale"])
def test_a_small_scale_has_a_command_and_says_its_interval(claim, evidence):
    (command,) = re.findall(r"`((?:python|compressvit) [^`]+)`", evidence)
    program, argument = command.split()[:2]
    assert program == "compressvit" or (ROOT / argument).is_file(), f"{claim}: {command}"
    assert re.search(r"±|no interval|noise of|\(\d+\.\d+, \d+\.\d+\)", evidence), claim


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((\.\.[^)#]+)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target


# ------------------------------------------------------------------------------------------------ what follows from the table


@functools.cache
def plan_of(recipe: str, *overrides: str) -> RecipePlan:
    shipped = load_recipe(recipe, list(overrides))
    return plan_recipe(
        shipped.model_copy(update={"steps": tuple(s for s in shipped.steps if isinstance(s.spec, Transform))})
    )


def test_mini_swin_in_a_mask_rcnn():
    plan = plan_of("mini_swin_detection")
    assert (plan.teacher.parameters, plan.student.parameters) == (47_797_615, 31_511_026)


def test_swin_b_becomes_48_percent_smaller():
    (entry,) = (entry for entry in TABLE["compressed"] if entry["recipe"] == "mini_swin_b")
    student, teacher = (round(entry[model] / 1e6) for model in ("student", "teacher"))
    assert entry["printed"] == f"{student}M"
    assert round(100 * (1 - student / teacher)) == 48
    assert round(100 * (1 - entry["student"] / entry["teacher"]), 1) == 47.1


@pytest.mark.wide_unless(lambda recipe: recipe == "mini_swin_t")
@pytest.mark.parametrize("recipe", ["mini_swin_t", "mini_swin_s", "mini_swin_b", "mini_swin_b_384"])
def test_the_transforms_of_mini_swin_cost_about_2_percent(recipe):
    whole = plan_of(recipe).student
    sharing = plan_of(recipe, "steps.0.multiplex.head_mixing=false", "steps.0.multiplex.mlp_conv=0").student
    assert 1.01 < whole.parameters / sharing.parameters < 1.025
    assert 1.01 < whole.macs / sharing.macs < 1.032


def test_a_repadapter_has_a_quarter_fewer_weights_than_a_plain_adapter():
    width, hidden, groups = 768, 8, 2
    biases = 12 * 2 * (hidden + width)
    plain = 12 * 2 * 2 * width * hidden
    assert VIT_B["RepAdapter"] - biases == 12 * 2 * (width * hidden + width * hidden // groups)
    assert 100 * (1 - (VIT_B["RepAdapter"] - biases) / plain) == 25


def test_repadapter_saves_94_6_percent_of_the_storage_of_vtab():
    tasks, backbone = 19, VIT_B["full fine-tuning"]
    saved = [
        round(100 * (1 - (backbone + tasks * VIT_B[label]) / (tasks * backbone)), 1)
        for label in ("RepAdapter, attention alone", "RepAdapter")
    ]
    assert saved == [94.6, 94.5]


def test_adaptformer_trains_less_than_2_percent():
    backbone, adapters, classifier = VIT_B["full fine-tuning"], VIT_B["AdaptFormer, h' = 64"], 100 * (768 + 1)
    assert round(100 * adapters / backbone, 1) == 1.4
    assert round(100 * (adapters + classifier) / backbone, 1) == 1.5


def test_table_1_of_lors():
    stages, query, rank = 6, 256, 16
    rows, columns = 128, 64  # of the spatial mixing
    dense = query * rows * columns
    adaptive = [dense / stages + terms * (query * rank**2 + rank * (rows + columns)) for terms in (1, 2, 3)]
    assert [round(100 * each / dense, 1) for each in adaptive] == [19.9, 23.2, 26.5]
    inputs, outputs = 32_768, 256  # of the projection
    static = inputs * outputs / stages + 8 * (inputs + outputs)
    assert round(100 * static / (inputs * outputs), 1) == 19.8
