"""The one table of published figures, benchmarks/published.yaml: counted, and quoted right wherever it is quoted."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from compressvit.model import cost, ties, weights
from compressvit.model.backbone import head_names
from compressvit.model.surgery import deep_copy
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.files import RecipePlan
from compressvit.runs.plan import plan_recipe
from compressvit.transforms import IRPE, TRANSFORMS, Multiplex, Plan, Transform
from compressvit.transforms.applying import apply_plans
from compressvit.transforms.record import trained_names

ROOT = Path(__file__).parents[1]
TABLE: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks" / "published.yaml").read_text(encoding="utf-8"))
TRAINED, COMPRESSED, ADAPTED = TABLE["trained"], TABLE["compressed"], TABLE["adapted"]
MATRIX, MODELS = TABLE["matrix"], TABLE["models"]
BY_LABEL = {entry["label"]: entry for entry in [*TRAINED, *COMPRESSED]}


@functools.cache
def plan_of(recipe: str, *overrides: str) -> RecipePlan:
    """The transforms of a shipped recipe; its phases change no structure, and take long to plan."""
    shipped = load_recipe(recipe, list(overrides))
    transforms = tuple(step for step in shipped.steps if isinstance(step.spec, Transform))
    assert transforms
    return plan_recipe(shipped.model_copy(update={"steps": transforms}))


def built(backbone: str) -> nn.Module:
    return deep_copy(_built(TABLE["backbones"][backbone]))


@functools.cache
def _built(name: str) -> nn.Module:
    return weights.build(name, device="meta")


# ------------------------------------------------------------------------------------------------------ the table is right


def test_every_figure_has_a_source():
    entries = [*TRAINED, *COMPRESSED, *ADAPTED, *MATRIX, *MODELS]
    assert len(BY_LABEL) == len(TRAINED) + len(COMPRESSED), "labels differ"
    for entry in entries:
        assert entry["paper"] in TABLE["papers"], entry
        assert entry["from"].partition(":")[0] in ("formula", "code"), entry
    assert {entry["paper"] for entry in entries} | {"irpe"} == set(TABLE["papers"]), "no paper without a figure"


def test_every_method_that_trains_a_part_is_in_the_table():
    methods = {word for entry in TRAINED if entry["step"] for word in entry["step"]}
    # `head_norm` has no parameters
    assert methods == {name for name, spec in TRANSFORMS.items() if trains_a_part(spec)} - {"head_norm"}


def trains_a_part(spec: type[Transform]) -> bool:
    """Whether a method freezes the rest of the model."""
    return spec.plan_class.trains is not Plan.trains


@pytest.mark.wide_unless(lambda backbone: backbone == "vit_b")
@pytest.mark.parametrize("backbone", TABLE["backbones"])
@pytest.mark.parametrize("entry", TRAINED, ids=lambda entry: entry["label"])
def test_trained_parameters(entry, backbone):
    model = built(backbone)
    for name, options in (entry["step"] or {}).items():
        apply_plans(model, [TRANSFORMS[name](**options).plan(model)])
    trained = trained_names(model)
    heads = head_names(model)
    assert heads
    assert trained is None or heads <= trained
    named = [(n, p) for n, p in model.named_parameters() if n not in heads]
    assert sum(p.numel() for n, p in named if trained is None or n in trained) == entry[backbone]
    assert sum(p.numel() for _, p in named if p.requires_grad) == entry[backbone], "what is counted is what learns"


@pytest.mark.wide_unless(lambda entry: entry["recipe"] == "lors_deit_ti_cifar100")
@pytest.mark.parametrize("entry", COMPRESSED, ids=lambda entry: entry["label"])
def test_compressed_parameters_and_macs(entry):
    plan = plan_of(entry["recipe"], *entry.get("overrides", ()))
    assert plan.conflicts == []
    assert (plan.teacher.parameters, plan.student.parameters) == (entry["teacher"], entry["student"])
    assert sum(stage.parameters for stage in plan.stages) == plan.student.parameters
    assert [round(whole.macs / 1e9, 3) for whole in (plan.teacher, plan.student)] == entry["gmacs"]
    if printed := entry.get("printed"):
        assert f"{entry['student'] / 1e6:.0f}M" == printed


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry["label"])
def test_models_have_their_published_size(entry):
    side = entry["side"]
    model = weights.build(entry["model"], {"img_size": side}, device="meta")
    assert ties.count_parameters(model) == entry["parameters"]
    assert f"{entry['parameters'] / 1e6:.0f}M" == entry["printed"]
    assert round(cost.macs(model, (3, side, side)) / 1e9, 3) == entry["gmacs"]
    assert entry["gmacs"] / entry["printed_gmacs"] == pytest.approx(1, abs=0.02)  # measured −0.0015 to 0.0154


@pytest.mark.parametrize("entry", MATRIX, ids=lambda entry: entry["label"])
def test_mimi_on_every_backbone_of_its_paper(entry):
    """Its recipe, with adapters of M/8 and as it ships, of M/2, of which an eighth stays."""
    formula = sum(count * 2 * 2 * width * (width // 8) for width, count in entry["blocks"].items())
    assert formula == entry["trained"]
    start = ["teacher.weights=random", f"teacher.model={entry['model']}"]
    for more, times in (["steps.0.adapters.ratio=0.125"], 1), ([], 4):
        plan = plan_recipe(load_recipe("mimi_swin_t", [*start, *more]))
        assert plan.conflicts == []
        (adapters, _) = plan.steps
        assert sum(row.after - row.before for row in adapters.ledger) == times * formula
        assert len(adapters.ledger) == 2 * sum(entry["blocks"].values())
        (note,) = (note for note in plan.notes if "the last phase trains" in note)
        trained, left, *_ = integers(note)
        assert trained == times * formula
        if entry["blocks"].keys() != {96, 192, 384, 768} or times == 4:  # 12 neurons halve to 6, 3 and 1
            assert left == trained // 8


@pytest.mark.parametrize("entry", ADAPTED, ids=lambda entry: entry["recipe"])
def test_adapters_of_a_recipe(entry):
    recipe = load_recipe(entry["recipe"])
    model = deep_copy(_built(recipe.teacher.model.partition(".")[0]))
    for step in recipe.steps:
        if isinstance(step.spec, Transform):
            apply_plans(model, [step.spec.plan(model)])
    trained = (trained_names(model) or set()) - head_names(model)
    assert sum(model.get_parameter(name).numel() for name in trained) == entry["trained"]
    if neurons := entry.get("neurons"):
        (prune,) = (step.spec for step in recipe.steps if step.spec.name == "prune")
        widths = model._compression.plans[0].widths
        assert [sum(widths.values()), int(prune.target.neurons * sum(widths.values()))] == neurons


@pytest.mark.parametrize(
    ("backbone", "share", "mixing_bias", "mlp_conv", "label"),
    [
        ("swin_tiny_patch4_window7_224", (2, 2, 6, 2), True, 7, "Mini-Swin-T"),
        ("swin_base_patch4_window7_224", 2, True, 7, "Mini-Swin-B"),
        ("deit_base_patch16_224", 2, False, 0, "the same with its class token"),
    ],
)
def test_compressed_parameters_from_python(backbone, share, mixing_bias, mlp_conv, label):
    teacher = deep_copy(_built(backbone))
    Multiplex(share=share, mixing_bias=mixing_bias, mlp_conv=mlp_conv).plan(teacher).apply(teacher)
    assert ties.count_parameters(teacher) == BY_LABEL[label]["student"]


def test_irpe_adds_64_times_49_parameters_a_layer_to_deit_b():
    with torch.device("meta"):
        teacher = timm.create_model("deit_base_patch16_224", class_token=False, global_pool="avg", fc_norm=False)
    ledger = IRPE().plan(teacher).apply(teacher)
    assert [e.after - e.before for e in ledger] == [64 * 49] * 12
    assert BY_LABEL["Mini-DeiT-B"]["student"] - BY_LABEL["Mini-DeiT-B without iRPE"]["student"] == 12 * 64 * 49


def test_the_reference_form_costs_the_same():
    plan, reference = plan_of("mini_swin_t"), plan_of("mini_swin_t", "steps.0.multiplex.form=reference")
    assert plan.student == reference.student


# ----------------------------------------------------------------------------------------------- and is quoted as it stands


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table of a page of docs/ that begins with this heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text.count(heading) == 1, heading
    lines = text.partition(heading)[2].splitlines()[1:]  # after the rule
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:end]]


def integers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


# The row of docs/adapt.md, by its steps: the entries it quotes, in its order.
ROWS = {
    "`adapters`": ["adapters, M/8"],
    "`adaptformer`": ["AdaptFormer, h' = 64"],
    "`repadapter`": ["RepAdapter"],
    "`lora`": ["LoRA, r = 8"],
    "`ssf`": ["SSF"],
    "`fact`": ["FacT-TK, r = 16"],
    "`phm`, `compacter`": ["PHM", "Compacter"],
    "`vpt`": ["VPT, deep, 10 prompts"],
    "`bitfit`": ["BitFit"],
    "`freeze`": ["attention", "MLP", "linear probe"],
}


def test_the_documentation_quotes_what_every_method_trains():
    found = rows("adapt.md", "| step | what is trained | Swin-T | ViT-B/16 | merges |\n")
    assert {row[0] for row in found} == set(ROWS)
    for steps, _, swin_t, vit_b, _ in found:
        entries = [BY_LABEL[label] for label in ROWS[steps]]
        assert integers(swin_t) == [entry["swin_t"] for entry in entries], steps
        assert integers(vit_b) == [entry["vit_b"] for entry in entries], steps


def recipes_of(cell: str) -> list[str]:
    """`mini_swin_t` / `_s` → mini_swin_t, mini_swin_s."""
    first, *others = re.findall(r"`(\w+)`", cell)
    return [first, *(first.rpartition("_")[0] + other for other in others)]


def test_the_documentation_quotes_what_every_recipe_costs():
    quoted = set()
    entries = {entry["recipe"]: entry for entry in COMPRESSED if "overrides" not in entry}
    starts = {entry["recipe"]: entry for entry in ADAPTED}
    for recipes, _, parameters, macs in rows("recipes.md", "| recipe | teacher → student | parameters | MACs |\n"):
        names = recipes_of(recipes)
        if any(name in entries for name in names):
            found = [entries[name] for name in names]
            assert integers(parameters) == [n for e in found for n in (e["teacher"], e["student"])], recipes
            expected = [giga for entry in found for giga in entry["gmacs"]]
            numbers = re.findall(r"\d+\.\d+", macs)
            assert len(numbers) == len(expected), recipes
            for number, giga in zip(numbers, expected, strict=True):
                places = len(number.partition(".")[2])
                assert abs(float(number) - giga) <= 0.5 * 10**-places + 0.0005, (recipes, number, giga)
            quoted |= set(names)
        elif names[0] in starts:
            entry = starts[names[0]]
            kept = entry.get("neurons", [])[::-1]  # keeps 552 of 4,416
            assert integers(parameters) == [entry["trained"], *kept], recipes
            quoted.add(names[0])
    assert quoted == set(entries) | set(starts)


@pytest.mark.wide
def test_a_benchmark_prints_the_table_and_refuses_another_count(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    costs = importlib.import_module("adapter_costs")
    assert costs.PUBLISHED == TABLE
    entries = [BY_LABEL[label] for label in ("BitFit", "LoRA, r = 8")]
    monkeypatch.setitem(costs.PUBLISHED, "trained", entries)
    monkeypatch.setattr(costs, "PRUNINGS", ())
    monkeypatch.setattr("sys.argv", ["adapter_costs.py", "--model", TABLE["backbones"]["vit_b"], "--classes", "100"])
    costs.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(entries)
    for line, entry in zip(lines, entries, strict=True):
        label, trained, both, *_ = line.strip("| ").split(" | ")
        assert label == entry["label"]
        assert integers(trained) == [entry["vit_b"]]
        assert integers(both) == [entry["vit_b"] + 100 * 769]
    monkeypatch.setitem(costs.PUBLISHED, "trained", [{**entries[0], "vit_b": 7}])
    with pytest.raises(SystemExit, match=r"BitFit trains 102,912 parameters here, and 7 by published\.yaml"):
        costs.main()


def test_no_other_test_or_benchmark_repeats_a_figure():
    """Each stands in the table alone, so that it can be mended in one place."""
    figures = {n for e in TRAINED for n in (e["swin_t"], e["vit_b"])} | {
        n for e in COMPRESSED for n in (e["teacher"], e["student"])
    }
    figures = {n for n in figures if n > 99_999}  # a smaller one may stand for something else
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert len(files) > 50
    for file in files:
        repeated = {int(n.replace("_", "")) for n in re.findall(r"\b\d+(?:_\d+)*\b", file.read_text("utf-8"))} & figures
        assert not repeated, f"{file.name} repeats {repeated}"
