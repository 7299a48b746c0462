"""What decides the figures of the benchmarks: how a rate is chosen, and that no table mixes runs of two recipes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from compressvit.model.ties import count_parameters
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans


@pytest.mark.parametrize(
    ("scores", "following"),
    [
        ({1e-3: 80, 5e-3: 90}, [5e-3 * 4]),
        ({1e-3: 90, 5e-3: 80}, [1e-3 / 4]),
        ({1e-3: 90, 5e-3: 90}, [1e-3 / 4]),
        ({1e-3: 80, 5e-3: 90, 2e-2: 85}, []),
        ({1e-3: 80, 5e-3: 90, 2e-2: 90}, []),
        ({1e-3: 80, 5e-3: 85, 2e-2: 90}, [8e-2]),
    ],
)
def test_rates_go_on_while_the_best_is_at_an_edge(few_shot, scores, following):
    assert few_shot.beyond(scores) == pytest.approx(following)


def test_a_finished_run_of_another_recipe_is_not_taken(few_shot, tmp_path):
    run = few_shot.run
    for name, text in (("results.json", '{"student": {}}'), ("seconds.json", "1.5"), ("recipe.yaml", "seed: 0\n")):
        (tmp_path / name).write_text(text)
    assert run("seed: 0\n", tmp_path, None) == {"student": {}, "seconds": 1.5}
    with pytest.raises(SystemExit, match="holds a finished run of another recipe"):
        run("seed: 1\n", tmp_path, None)


def test_the_modules_have_the_shares_of_the_papers_table_1(few_shot):
    table = importlib.import_module("lors_table1")
    dense, made = map(table.counts, table.decoders())
    assert (dense.decoder, made.decoder, made.mixing) == (135_536_424, 35_348_264, 25_940_480)
    by_stage = [100 * (made.generator + 6 * terms) / dense.generator for terms in made.terms]
    assert [round(share, 1) for share in by_stage] == [19.9, 19.9, 23.2, 23.2, 26.5, 26.5]
    assert round(100 * (made.projection + made.low_rank) / dense.projection, 1) == 19.8


# ------------------------------------------------------------------------------------------------------- average precision


def some_images(count: int = 12) -> tuple[list[np.ndarray], list[np.ndarray], list[list[bool]]]:
    """Boxes of three classes, detections near them and elsewhere, and one crowd; each detection has a score of its own."""
    generator = np.random.default_rng(0)
    truth, found, crowd = [], [], []
    for image in range(count):
        boxes = np.concatenate([generator.uniform(0, 60, (3, 2)), generator.uniform(8, 40, (3, 2))], axis=1)
        labels = generator.integers(0, 3, (3, 1))
        truth.append(np.concatenate([boxes, labels], axis=1))
        near = np.concatenate([boxes + generator.normal(0, 2.5, (3, 4)), boxes + generator.normal(0, 12, (3, 4))])
        scores = generator.uniform(0, 1, (6, 1))
        found.append(np.concatenate([near, scores, np.tile(labels, (2, 1))], axis=1))
        crowd.append([image == 3, False, False])
    return truth, found, crowd


def by_pycocotools(matches, truth, found, crowd):
    judged = matches._judged(truth, found, 3, crowd)
    with contextlib.redirect_stdout(io.StringIO()):
        judged.accumulate()
        judged.summarize()
    return judged.stats[:2] * 100


def test_precision_of_resampled_images_is_that_of_a_set_with_these_images(few_shot):
    matches = importlib.import_module("paired_precision")
    truth, found, crowd = some_images()
    whole = matches.Matches(truth, found, 3, crowd)
    for times in (np.ones(12, dtype=int), np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12))):
        chosen = [image for image, n in enumerate(times) for _ in range(n)]
        expected = by_pycocotools(matches, *([part[i] for i in chosen] for part in (truth, found, crowd)))
        by_threshold = whole.precision(times)
        assert [by_threshold.mean(), by_threshold[0]] == pytest.approx(expected, abs=1e-9)
        assert 1 < by_threshold.mean() < by_threshold[0] < 99


def test_a_difference_of_pairs_is_narrower_than_that_of_either(few_shot):
    matches = importlib.import_module("paired_precision")
    truth, found, crowd = some_images(40)
    better = [np.concatenate([box[:3], box[3:] * 0]) for box in found]
    ours, theirs = (matches.Matches(truth, which, 3, crowd) for which in (better, found))
    same = matches.intervals([ours], [ours], draws=40)
    assert same == {"ap": [0.0, 0.0], "ap50": [0.0, 0.0]}
    low, high = matches.intervals([ours, theirs], [theirs, theirs], draws=100)["ap"]
    difference = (ours.precision() - theirs.precision()).mean() / 2
    alone = [ours.precision(times).mean() for times in matches.drawn(40, 100)]
    assert low < difference < high
    assert high - low < np.quantile(alone, 0.975) - np.quantile(alone, 0.025)


def test_few_boxes_and_no_detections(few_shot):
    matches = importlib.import_module("paired_precision")
    truth, found, _ = some_images(4)
    sparse = [part if i == 1 else part[:0] for i, part in enumerate(truth)]
    ours, nothing = (matches.Matches(sparse, which, 3) for which in (found, [part[:0] for part in found]))
    assert np.isnan(ours.precision(np.array([1.0, 0.0, 2.0, 1.0]))).all()
    assert nothing.precision().tolist() == [0.0] * 10
    low, high = matches.intervals([ours], [nothing], draws=50)["ap50"]
    assert 0 < low <= high <= 100


# --------------------------------------------------------------------------------------------------------- LORS, detection


@pytest.fixture
def lors(few_shot):
    return importlib.import_module("lors_detection")


@pytest.fixture
def benchmark(lors, tmp_path):
    base = yaml.safe_load(lors.find_recipe(lors.RECIPE).read_text(encoding="utf-8"))
    tiny = {"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": 1}, "img_size": 64}
    base["teacher"]["args"] |= tiny
    base["data"]["root"] = "x"
    return lors.Benchmark(base, tmp_path)


def test_every_cell_can_be_planned_and_comes_after_what_it_starts_from(lors, benchmark):
    cells = lors.order(list(lors.CELLS), [0, 1])
    assert cells[:3] == [("dense", 0), ("dense", 1), ("lors", 0)]
    assert len(set(cells)) == len(cells) == 2 * len(lors.CELLS)
    before = []
    for name, seed in cells:
        before.append(benchmark.folder(name, seed))
        recipe = parse_recipe(yaml.safe_dump(benchmark.recipe(name, seed)))
        if lors.CELLS[name].trained:
            assert Path(recipe.teacher.weights).parent in before[:-1]
        assert benchmark.folder(lors.compared_with(name), seed) in before
        if seed:
            continue
        model = build("adamixer", {**benchmark.base["teacher"]["args"], **lors.CELLS[name].args}, device="meta")
        dense = count_parameters(model.decoder)
        transforms = [step.spec for step in recipe.steps if isinstance(step.spec, Transform)]
        for spec in transforms:
            apply_plans(model, [spec.plan(model)])
        assert count_parameters(model.decoder) < dense if transforms else lors.CELLS[name].steps == ()


def test_all_cells_are_trained_alike_but_for_their_length(lors, benchmark):
    whole, further = benchmark.recipe("dense", 0)["steps"][-1], benchmark.recipe("fit", 0)["steps"][-1]
    assert benchmark.recipe("lors", 0)["steps"][-1] == whole
    assert benchmark.recipe("dense_longer", 0)["steps"] == [further]
    short = benchmark.recipe("lors_short", 0)["steps"][-1]["finetune"]
    assert {**short, "epochs": 12, "evaluate_every": 12} == whole["finetune"]
    assert short["epochs"] == further["finetune"]["epochs"]


def test_remembered_features_are_the_features(lors, benchmark):
    torch.manual_seed(0)
    model = build("adamixer", benchmark.base["teacher"]["args"], num_classes=3).eval()
    images, runs = torch.randn(3, 3, 64, 64), []
    expected = model(images).logits
    model.backbone.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append("looked at"))
    with lors.remembered_features():
        model(images)
        model(images)
        assert len(runs) == 2  # a fit looks at the backbone itself
        model.backbone.blocks[0].mlp._forward_pre_hooks.clear()
        model.backbone.blocks[0].mlp.forward = record(model.backbone.blocks[0].mlp.forward, runs)
        for chosen in ([0, 1], [2, 1, 0], [0, 1, 2]):
            assert torch.allclose(model(images[chosen]).logits, expected[:, chosen], atol=1e-5)
        assert runs[2:] == [2, 1]  # images for which the backbone ran
    model(images)
    assert runs[-1] == 3


def record(forward, runs):
    def recorded(x):
        runs.append(len(x))
        return forward(x)

    return recorded


def test_a_comparison_with_a_detector_that_finds_too_little_is_void(lors, benchmark, monkeypatch):
    monkeypatch.setattr(lors.Benchmark, "finished", lambda self, name, seed: True)
    monkeypatch.setattr(lors.Benchmark, "cell", lambda self, name, seed: {"ap50": [25.0, 36.0][seed]})
    lors.require_objects_found(benchmark, "dense", [0, 1])
    with pytest.raises(SystemExit, match=r"void: dense reaches AP50 25.00 \(25.0\) %, and below 30 %"):
        lors.require_objects_found(benchmark, "dense", [0])


# ------------------------------------------------------------------------------------------------- smaller without training


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("soak")


def rows_of(rss: list[float], files: float = 9) -> list[dict[str, float]]:
    return [{"seconds": i, "rss_mib": value, "files": files, "threads": 1} for i, value in enumerate(rss)]


def test_a_soak_sees_what_grows_after_its_beginning(soak):
    assert soak.grown(rows_of([100, 200, 300, 400, *[500] * 16])) == {}
    leak = [500 + 2 * i for i in range(100)]
    assert soak.fifths(rows_of(leak), "rss_mib") == [519, 559, 599, 639, 679]
    assert soak.grown(rows_of(leak)) == {"rss_mib": 80}
    rows = rows_of([500] * 60) + rows_of([500] * 40, files=13)
    assert soak.grown(rows) == {"files": 4}
    found = soak.now()
    assert found.keys() == {"rss_mib", "files", "threads"}


@pytest.mark.slow
def test_a_short_soak_is_flat(soak, tmp_path):
    runs, rows = soak.soak(1.5, tmp_path)
    assert runs >= 2
    assert soak.grown(rows) == {}


# --------------------------------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("paper", ["adaptformer", "repadapter", "mimi"])
def test_every_cell_of_an_ablation_is_a_recipe_and_differs_in_what_it_says(few_shot, paper):
    program = importlib.import_module("adapter_ablations")
    cells = program.PAPERS[paper]
    key_of = {"mimi": "prune"}.get(paper, paper)
    usual = cells[program.USUAL[paper]][2][key_of]
    task = few_shot.Task({}, Path(), 36, "fp32")
    for name, (varied, _, step) in cells.items():
        steps = program.steps_of(step, 1e-3, task)
        entries = parse_recipe(yaml.safe_dump(recipe_of_few_shots(steps))).steps
        assert [entry.spec.name for entry in entries] == [
            *(["adapters", "prune"] if "prune" in step else [*step, "finetune"])
        ]
        if key_of == "prune" and key_of in step:
            assert entries[1].spec.epochs * (1 + program.removals(step["prune"])) == 36
        if key_of in step:
            different = {key for key in {**usual, **step[key_of]} if step[key_of].get(key) != usual.get(key)}
            assert different == (set(varied.split(", ")) if name != program.USUAL[paper] else set())


def recipe_of_few_shots(steps):
    teacher = {"model": "vit_tiny_patch16_224", "weights": "random"}
    return {"teacher": teacher, "data": {"name": "digits"}, "steps": steps}


def test_the_curve_has_finished_cells_of_both_methods(few_shot, tmp_path):
    program = importlib.import_module("adapter_ablations")
    for name, scores in {"width_4": (70, 72), "vpt_16": (60, 61), "serial": (50, 50), "width_16": ()}.items():
        for seed, score in enumerate(scores):
            (folder := tmp_path / f"final/{name}_seed{seed}").mkdir(parents=True)
            student = {"top1": score, "trained_adapter": 10 * len(name)}
            (folder / "results.json").write_text(json.dumps({"student": student}))
    points = program.curve(tmp_path, [0, 1, 2])
    assert [(point["method"], point["trained"], point["top1"]) for point in points] == [
        ("AdaptFormer", 70, 71.0),
        ("VPT", 60, 60.5),
    ]
    assert "| blocks |" not in (text := program.table("adaptformer", tmp_path, [0, 1, 2]))
    assert "| form | after the MLP | 60 | 50.00 (50.00, 50.00) |" in text
    program.picture(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
