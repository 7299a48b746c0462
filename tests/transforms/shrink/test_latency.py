"""Latency as a unit of the budget of `shrink`: what the table says, what is chosen by it, and that it is measured once."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from helpers.latency import CPU, table_of
from helpers.models import build, images_for

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.fitting.choices import Choices
from compressvit.fitting.reference import Reference
from compressvit.model import cost, surgery
from compressvit.model.backbone import describe, input_size
from compressvit.transforms import Shrink
from compressvit.transforms.applying import compress, plan_transforms
from compressvit.transforms.low_rank.pivoted_layer import is_pivoted
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import places
from compressvit.transforms.record import compression_of
from compressvit.transforms.shrink import spec, stopwatch
from compressvit.transforms.shrink.corrected import corrected
from compressvit.transforms.shrink.latency import Grid, LatencyTable, device_name
from compressvit.transforms.shrink.plan import ShrinkPlan
from compressvit.transforms.shrink.prices import Prices
from compressvit.transforms.shrink.spec import ShrinkBudget


@pytest.fixture
def measured(monkeypatch):
    """A table in place of a measurement; what was asked for is listed."""
    asked: list[dict] = []

    def measure(model, found, **options):
        asked.append(options)
        return table_of(model, found, order=measured_order[0], batch=options["batch"])

    measured_order = [0.0]
    asked_and_order = type("Asked", (), {"asked": asked, "order": measured_order})
    monkeypatch.setattr(spec, "measure", measure)
    monkeypatch.setattr(spec, "ratio", lambda *models, **options: (0.5, 0.6, 0.7))
    return asked_and_order


def shrunk(teacher, **settings):
    """The structure of a student, and its plan."""
    plan = Shrink(metric="weights", **{"multiple": 4, **settings}).plan(teacher, Reference(surgery.deep_copy(teacher)))
    student = surgery.deep_copy(teacher)
    plan.apply(student)
    return student, plan


def predicted(teacher, student, plan):
    """The ratio by the table, from the student's own layers."""
    table, total = plan.latency.table, plan.latency.table.whole
    before = {place.path: place for place in places(teacher, describe(teacher))}
    after = {place.path: place for place in places(student, describe(student))}
    for path, place in before.items():
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            old, new = (model.get_submodule(f"{path}.{name}") for model in (teacher, student))
            total -= table.layer(path, old.out_features, old.in_features)
            rank = getattr(new, "rank", None)
            total += table.layer(path, new.out_features, new.in_features, rank, pivoted=is_pivoted(new))
        total += table.attention(path, after[path].heads, after[path].head_dim)
        total -= table.attention(path, place.heads, place.head_dim)
        total += table.mlp(path, after[path].neurons) - table.mlp(path, place.neurons)
    return total / table.whole


@pytest.mark.wide_unless(lambda budget: len(budget) == 1)
@pytest.mark.parametrize("budget", [{"latency": 0.6}, {"latency": 0.7, "macs": 0.75, "parameters": 0.8}], ids=str)
def test_the_limit_holds_and_the_prediction_is_that_of_the_students_layers(measured, budget):
    teacher = build("vit")
    student, plan = shrunk(teacher, budget=ShrinkBudget(**budget))
    assert predicted(teacher, student, plan) == pytest.approx(plan.latency.predicted, rel=1e-9)
    assert plan.latency.predicted <= budget["latency"] + 1e-9
    costs = [cost.cost(model, input_size(model)).as_dict() for model in (student, teacher)]
    for unit in budget.keys() - {"latency"}:
        assert costs[0][unit] <= budget[unit] * costs[1][unit]
    shares = [plan.latency.predicted / budget["latency"]]
    shares += [costs[0][unit] / costs[1][unit] / budget[unit] for unit in budget.keys() - {"latency"}]
    assert max(shares) > 0.9  # measured 0.97


def test_a_layer_that_sees_fewer_tokens_takes_less():
    """Of CvT, keys and values: 5 tokens in the last stage, where queries are 17; and so many go into the measured attention."""
    model = build("cvt")
    found = places(model, describe(model))
    prices = Prices.of(model, found, ("latency",), table_of(model, found))
    path = found[-1].path
    rows = {name: prices.dense(path, name, 32, 32)[0] for name in ("attn.proj_q", "attn.proj_k", "attn.proj_v")}
    assert rows["attn.proj_k"] == rows["attn.proj_v"] == pytest.approx(rows["attn.proj_q"] * 5 / 17)
    seen = stopwatch._inputs(model, images_for(model), found)
    block = stopwatch._Block(model.get_submodule(path), found[-1], describe(model).family, seen)
    given = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        kept = stopwatch._Given.forward
        patch.setattr(stopwatch._Given, "forward", lambda self, x: given.append(kept(self, x)) or given[-1])
        block._attention(2, 8)()
    assert [tuple(output.shape) for output in given] == [(2, 17, 16), (2, 5, 16), (2, 5, 16), (2, 17, 32)]


@pytest.mark.wide_unless(lambda unit: unit == "bytes")
@pytest.mark.parametrize("unit", ["parameters", "macs", "bytes"])
def test_prices_are_those_of_the_student_that_is_built(unit):
    teacher = build("vit")
    student, plan = shrunk(teacher, budget=ShrinkBudget(**{unit: 0.6}))
    found = places(teacher, describe(teacher))
    prices = Prices.of(teacher, found, (unit,))
    parts = sum(prices.part(*part, plan.forms.get(part[0]))[0] - prices.part(*part)[0] for part in prices.parts())
    whole, own = (getattr(cost.cost(model, input_size(model)), unit) for model in (teacher, student))
    if unit == "bytes":  # without the header
        own, whole = own - cost.header_bytes(student), whole - cost.header_bytes(teacher)
    assert whole + parts == own


def test_a_low_rank_layer_has_the_form_that_is_faster(measured):
    teacher = build("vit")
    settings = {"budget": ShrinkBudget(latency=0.7), "methods": ("rank",)}
    for order, form, pivots in ((0.0, "auto", True), (0.004, "auto", False), (0.004, True, True)):
        measured.order[0] = order
        student, _ = shrunk(teacher, pivoted=form, **settings)
        assert {is_pivoted(module) for module in student.modules() if hasattr(module, "rank")} == {pivots}


def test_what_is_not_faster_is_not_offered(measured):
    teacher = build("vit")
    measured.order[0] = 1.0  # a pivoted layer is never faster than a dense one
    with pytest.raises(UserError, match=r"latency .*the smallest that rank reach is"):
        shrunk(teacher, budget=ShrinkBudget(latency=0.9), methods=("rank",), pivoted=True)
    found = places(teacher, describe(teacher))  # nor where it would save something else
    for order, forms in ((1.0, []), (0.0, [True])):
        prices = Prices.of(teacher, found, ("latency", "parameters"), table_of(teacher, found, order=order), True)
        assert [pivoted for pivoted, _ in prices.low_rank("blocks.0", "mlp.fc1", 128, 32, 8)] == forms


def test_the_table_is_in_the_plan_and_nothing_is_measured_again(measured, monkeypatch, tmp_path):
    teacher = build("vit")
    student = compress(teacher, [step(batch=4)])
    (plan,) = compression_of(student).plans
    assert [tuple(options.values()) for options in measured.asked] == [(4, CPU, torch.float32)]
    assert plan.latency.table.where() == f"{device_name(CPU)}, {cost.threads_text()}, batch 4, float32"
    assert plan.latency.measured == (0.5, 0.6, 0.7)

    def refuse(*given, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(spec, "measure", refuse)
    monkeypatch.setattr(spec, "ratio", refuse)
    again = artifact.load(artifact.save(student, tmp_path / "student"))
    assert compression_of(again).plans == [plan]
    images = images_for(teacher, 2)
    with torch.no_grad():
        assert torch.equal(again(images), student.eval()(images))


def step(**settings):
    cheap = {"budget": ShrinkBudget(latency=0.7), "metric": "weights", "methods": ("neurons",), "multiple": 4}
    return Shrink(**{**cheap, **settings})


def test_an_interrupted_run_does_not_measure_again_on_the_same_device(measured, tmp_path):
    teacher, path = build("vit"), tmp_path / "choices.json"

    def plan():
        step().plan(teacher, Reference(surgery.deep_copy(teacher), choices=Choices(path)))

    plan()
    plan()
    assert len(measured.asked) == 1
    for old, new in ((f'"threads": {torch.get_num_threads()}', '"threads": 64'), ('"threads"', '"processors"')):
        path.write_text(path.read_text().replace(old, new))
        plan()
    assert len(measured.asked) == 3
    path.write_text("{")
    with pytest.raises(UserError, match=f"Remove {path}"):
        plan()


def test_a_target_below_the_floor_is_refused_before_images_are_read(measured):
    teacher = build("vit")

    def images():
        raise AssertionError("images were read")

    for budget, text in (
        ({"latency": 0.26}, r"latency .the smallest that .* ms latency, 0\.\d+ of the teacher's .*measured on cpu"),
        ({"latency": 1.0}, "is no smaller than the teacher"),
        ({"latency": 1e6}, "1,000,000.00 ms latency is no smaller"),
        (
            {"parameters": 0.01},
            r"1,235 parameters .the smallest that neurons reach is [\d,]+ parameters, 0.47",
        ),
        (
            {"latency": 0.9, "macs": 0.01},
            r"budget of [\d,]+ macs .the smallest that [^;]* macs, 0.\d+ of the teacher's [\d,]+. cannot",
        ),
    ):
        with pytest.raises(UserError, match=text):
            compress(teacher, [step(budget=ShrinkBudget(**budget), metric="outputs")], images)


def test_a_student_that_is_measured_to_be_slower_than_predicted_is_made_smaller(measured, monkeypatch):
    teacher, found = build("vit"), []

    def ratio(student, whole, **options):
        """By parameters, of which all but the teacher have a fifth more."""
        sizes = [sum(p.numel() for p in model.parameters()) for model in (student, whole)]
        found.append(0.2 + sizes[0] / sizes[1])
        return (found[-1],) * 3

    monkeypatch.setattr(spec, "ratio", ratio)
    settings = {"budget": ShrinkBudget(latency=0.8), "methods": ("neurons", "rank")}
    plan = step(**settings).plan(teacher, Reference(surgery.deep_copy(teacher)))
    assert found[0] > 1.02 * 0.8
    assert plan.latency.measured[1] == max(m for m in found if m <= 1.02 * 0.8)


def planned(*measurements):
    """Plans with a prediction and what is measured of it."""
    table = LatencyTable(device="cpu", threads=1, batch=1, dtype="float32", whole=1.0, like={}, rows=())
    values = dict(measurements)

    def timed(plan):
        known = {"table": table, "predicted": plan.latency.predicted, "measured": values[plan.latency.predicted]}
        return ShrinkPlan(forms={}, latency=known)

    def within(limit):
        below = [predicted for predicted in values if predicted <= limit + 1e-9]
        if not below:
            raise UserError("too small")
        return ShrinkPlan(forms={}, latency={"table": table, "predicted": max(below)})

    return timed, within


@pytest.mark.parametrize(
    ("measurements", "chosen"),
    [
        ({0.5: 0.51}, 0.5),  # near enough
        ({0.5: 0.4}, 0.5),  # what is faster than predicted stays
        ({0.5: 0.6, 0.375: 0.5}, 0.375),  # on a line through the teacher
        ({0.5: 0.6, 0.37: 0.4, 0.43: 0.49}, 0.43),  # too small, so a second one lies between
        ({0.5: 0.6, 0.37: 0.55, 0.3: 0.46}, 0.3),
    ],
)
def test_the_limit_is_corrected_along_a_line(measurements, chosen):
    timed, within = planned(*((p, (m, m, m)) for p, m in measurements.items()))
    assert corrected(within(0.5), 0.5, timed, within).latency.predicted == chosen


@pytest.mark.parametrize(
    ("measurements", "chosen", "told"),
    [
        ({0.5: 0.6}, 0.5, "measured 0.60 (0.60–0.60): a faster student would be smaller"),
        ({0.5: 1.2, 0.4: 0.4}, 0.5, "measured 1.20 (1.20–1.20): too little"),  # slower than the teacher
        ({0.5: 0.9, 0.1: 0.4}, 0.5, "measured 0.90 (0.90–0.90): too little"),  # the line meets the limit below 0
        ({0.5: 0.6, 0.375: 0.56, 0.2: 0.54, 0.1: 0.57}, 0.2, "measured 0.54 (0.54–0.54): 3 corrections"),
    ],
)
def test_a_limit_that_is_missed_is_told_and_the_fastest_is_taken(measurements, chosen, told, caplog):
    timed, within = planned(*((p, (m, m, m)) for p, m in measurements.items()))
    with caplog.at_level(logging.WARNING, logger="compressvit"):
        assert corrected(within(0.5), 0.5, timed, within).latency.predicted == chosen
    (message,) = caplog.messages
    assert message.startswith(f"latency: asked for 0.50, {told}")


def test_a_plan_without_values_goes_by_macs(measured):
    teacher = build("vit")
    (plan,) = plan_transforms(teacher, [step()])
    assert plan.latency is None
    assert not measured.asked
    empty = surgery.skeleton(teacher)
    plan.apply(empty)
    shares = [cost.macs(model, input_size(model)) for model in (empty, teacher)]
    assert 0.6 < shares[0] / shares[1] <= 0.7
    assert "latency is taken to fall as multiply-accumulates do" in step().provisional[1]


@pytest.mark.wide_unless(lambda latency: latency == 0.9)
@pytest.mark.parametrize(("latency", "least", "most"), [(0.9, 0.5, 0.6), (50, 0.5, 0.6), (0.4, 0.3, 0.4)])
def test_a_plan_without_values_holds_a_limit_of_macs_in_numbers_beside_that_of_latency(latency, least, most):
    teacher = build("vit")
    whole = cost.macs(teacher, input_size(teacher))
    budget = ShrinkBudget(latency=latency, macs=float(int(0.6 * whole)))
    empty = surgery.skeleton(teacher)
    step(budget=budget, methods=("neurons", "head_dim")).plan(surgery.skeleton(teacher)).apply(empty)
    share = cost.macs(empty, input_size(empty)) / whole
    assert least < share <= most  # measured 0.564, 0.564 and 0.394


def test_milliseconds_are_not_assumed_in_a_plan_and_it_says_so():
    assert "nothing is assumed of a latency in milliseconds" in step(budget=ShrinkBudget(latency=50)).provisional[1]


@pytest.mark.wide_unless(lambda name: name != "swin")
@pytest.mark.parametrize("name", ["vit", "swin", "hiera", "cvt"])
def test_a_real_table_has_all_that_a_budget_asks_for_and_is_what_it_counts_with(name, monkeypatch):
    monkeypatch.setattr(stopwatch, "ROUNDS", 3)
    teacher = build(name)
    found = places(teacher, describe(teacher))
    table = stopwatch.measure(teacher, found, batch=2, device=CPU, dtype=torch.float32)
    assert table.batch == 2
    assert table.is_of(CPU)
    rows = {(row.kind, row.of, row.sizes): row.milliseconds for row in table.rows}
    assert len(rows) == len(table.rows)
    prices, total = Prices.of(teacher, found, ("latency",), table), 0.0
    for place in found:
        like = table.like[place.path]
        assert {kind for kind, of, _ in rows if of == like} == {"linear", "split", "join", "attention", "mlp"}
        whole = {"attn": ("attention", (place.heads, place.head_dim)), "mlp": ("mlp", (place.neurons,))}
        tokens = {layer: prices.tokens[f"{place.path}.{layer}"] for layer in place.layers}
        for part, names in (("attn", (*place.qkv, "attn.proj")), ("mlp", (*place.fc1, place.fc2))):
            layers = [teacher.get_submodule(f"{place.path}.{name}") for name in names]
            sizes = [(layer.in_features, layer.out_features) for layer in layers]
            shares = [tokens[name] / tokens[place.fc1[0]] for name in names]  # rows are of the tokens of the MLP
            price = sum(rows["linear", like, size] * share for size, share in zip(sizes, shares, strict=True))
            price += rows[(whole[part][0], like, whole[part][1])]
            assert prices.part(place.path, part)[0] == pytest.approx(price, rel=1e-9)
            total += price
            for inputs, outputs in sizes:  # the narrowest that is offered, on both sides
                assert {("linear", like, (8, outputs)), ("linear", like, (inputs, 8))} <= rows.keys()
        narrow = BlockForm(head_dim=place.head_dim // 2) if "head_dim" in place.options else BlockForm(heads=1)
        assert prices.part(place.path, "attn", narrow)[0] != prices.part(place.path, "attn")[0]
    assert total < table.whole


@pytest.mark.wide
def test_a_real_table_is_kept_and_decides_without_being_measured_again(monkeypatch):
    monkeypatch.setattr(stopwatch, "ROUNDS", 3)
    teacher, asked = build("vit"), []

    def once(model, found, **options):
        """The sizes that are measured, at prices of their own: what can be reached does not depend on this machine."""
        asked.append(options)
        table = stopwatch.measure(model, found, **options)
        rows = [row.model_copy(update={"milliseconds": math.prod(row.sizes) / 1e4}) for row in table.rows]
        table = LatencyTable(**{**dict(table), "rows": tuple(rows)})
        prices = Prices.of(model, found, ("latency",), table)
        return table.model_copy(update={"whole": 1.2 * float(sum(prices.part(*part)[0] for part in prices.parts()))})

    monkeypatch.setattr(spec, "measure", once)
    monkeypatch.setattr(spec, "ratio", lambda *models, **options: (0.5, 0.6, 0.7))
    known, plans = Choices(), []
    for limit in (0.9, 0.8):
        reference = Reference(surgery.deep_copy(teacher), choices=known)
        plans.append(step(budget=ShrinkBudget(latency=limit), methods=("neurons", "head_dim")).plan(teacher, reference))
    assert len(asked) == 1
    assert plans[0].latency.table == plans[1].latency.table
    assert plans[1].latency.predicted < plans[0].latency.predicted <= 0.9


def test_between_sizes_the_table_is_interpolated():
    grid = Grid(
        {(a, b): float(a * b) for a, b in [(8, 8), (8, 16), (8, 64), (16, 8), (16, 16), (16, 64), (64, 8), (64, 16)]}
    )
    assert grid.at((8, 64)) == 512
    assert grid.at((12, 12)) == 144
    assert grid.at((40, 12)) == 480
    assert grid.at((4, 8)) == 64  # no less than the smallest
    assert Grid({(8,): 1.0, (16,): 3.0}).at((12,)) == 2.0
