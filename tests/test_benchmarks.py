"""What decides the figures of the benchmarks: how a rate is chosen, and that no table mixes runs of two recipes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from compressvit import save
from compressvit.errors import UserError
from compressvit.model.ties import count_parameters
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.folder import RunFolder
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans


@pytest.fixture
def few_shot(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("few_shot_adapters")


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
    low, high = matches.intervals([ours, theirs], [theirs, theirs], draws=200)["ap"]
    difference = (ours.precision() - theirs.precision()).mean() / 2
    alone = [ours.precision(times).mean() for times in matches.drawn(40, 200)]
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
def shrink(few_shot):
    return importlib.import_module("shrink_dinov2")


@pytest.fixture
def peers(few_shot):
    return importlib.import_module("shrink_peers")


def small_vit(**args):
    torch.manual_seed(0)
    return build("test_vit", {"img_size": 32, "num_classes": 0, "depth": 2, **args}).eval()


def test_a_cell_goes_through_the_whole_program_and_is_made_once(shrink, tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 13)):
        (tmp_path / "crops" / split).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "crops" / split / f"{'abcdefghijklm'[i]}.png")
    save_file(small_vit().state_dict(), tmp_path / "teacher.safetensors")
    measures = importlib.import_module("shrink_measures")
    monkeypatch.setattr(measures, "build", lambda name, **args: build(name, {**args, "depth": 2}))
    monkeypatch.setattr(measures, "INDEXED", 100)
    output = ["--output", str(tmp_path / "out")]
    data = [
        "--data",
        str(tmp_path / "crops"),
        "--weights",
        str(tmp_path / "teacher.safetensors"),
        "--model",
        "test_vit",
    ]
    sizes = [
        "--size",
        "32",
        "--knn",
        "digits",
        "--knn-images",
        "20",
        "--knn-size",
        "16",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    command = [*data, *sizes, *output, "--cells", "head_dim"]
    shrink.main(command)
    found = json.loads((tmp_path / "out" / "head_dim.json").read_text())
    assert (found["crops"], len(found["class_token"]), len(found["patches"])) == (12, 13, 13)
    assert [len(found[key]["digits"]) for key in ("knn", "knn_of_teacher")] == [20, 20]
    assert 0 < found["recall"]["recall_10"] <= 100
    assert 0.3 < np.mean(found["class_token"]) < 0.9999
    # what heads alone reach is what shrink says they reach
    assert f"the smallest that head_dim reach is {found['costs']['parameters']:,}" in found["note"]
    told = capsys.readouterr().out
    assert "1 of 1 cells are to be run" in told
    monkeypatch.setattr(shrink.Benchmark, "run", lambda *_: pytest.fail("a finished cell was run again"))
    shrink.main(command)
    shrink.main([*output, "--table-only"])
    table = capsys.readouterr().out
    assert table.count("| head_dim † | 12 |") == 2
    assert "Others" not in table
    with pytest.raises(SystemExit, match="holds cells of other size, weights, knn"):
        shrink.main([*data, *output, "--size", "16", "--knn", "--cells", "head_dim"])


def test_cells_stand_in_tables_and_the_smallest_are_those_that_shrink_offers(shrink):
    cells = importlib.import_module("shrink_cells")
    shown = [name for table in cells.TABLES for name in cells.in_table(table)]
    assert set(shown) == set(cells.CELLS)
    model = build("vit_small_patch14_dinov2", device="meta", num_classes=0)
    least = {name: cell.smallest.plan(model).forms for name, cell in cells.CELLS.items() if cell.smallest}
    assert {name: (forms["blocks.0"].heads, forms["blocks.0"].head_dim) for name, forms in least.items()} == {
        "head_dim": (None, 8),
        "heads": (2, None),
        "head_dim_heads": (None, 8),
    }


def test_what_a_cell_takes_is_known_from_those_before(few_shot):
    resumable = importlib.import_module("resumable")
    done = {"a": {"minutes": 9.0, "crops": 100, "fit": {"minutes": 4.0}}}
    assert resumable.expected_minutes(300, {}) == 0
    assert resumable.expected_minutes(50, done) == 9
    assert resumable.expected_minutes(300, done) == 9 + 2 * 4


def test_folding_means_replaces_neurons_that_do_not_vary(peers):
    teacher, images = small_vit(mlp_ratio=8), torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        for block in teacher.blocks:
            block.mlp.fc1.weight[12:] = 0
            block.mlp.fc1.bias[12:] = 1.0
    given = teacher(images)
    errors = {}
    for name in ("variance", "magnitude"):
        student = peers.PEERS[name](teacher, lambda: images.split(8))
        assert 0.49 < count_parameters(student) / count_parameters(teacher) <= 0.5
        errors[name] = (student(images) - given).abs().max().item()
    assert errors["variance"] < 1e-4 < 0.1 < errors["magnitude"]  # 1e-6 and 2


def test_torch_pruning_is_asked_for_where_it_is_missing(peers, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match="pip install torch-pruning"):
        peers.PEERS["torch_pruning_magnitude"](small_vit(), lambda: [])


def test_an_interval_of_a_difference_over_images_holds_its_mean(few_shot):
    measures = importlib.import_module("shrink_measures")
    mean, low, high = measures.mean_and_interval([1.0] * 30 + [0.0] * 70)
    assert mean == 0.3
    assert 0.19 < low < 0.24 < 0.36 < high < 0.41  # 0.3 ± 1.96 · 0.046
    assert measures.mean_and_interval([0.5] * 10) == (0.5, 0.5, 0.5)


def test_a_classifier_is_judged_on_every_domain(few_shot, tmp_path, monkeypatch, capsys):
    program = importlib.import_module("shrink_classifiers")
    generator, lists = np.random.default_rng(0), {"photo": [], "sketch": []}
    for split, count in (("train", 4), ("val", 4)):
        for label, name in enumerate(("cat", "dog", "hen")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                file = f"{split}/{name}/{'abcd'[i]}.png"
                Image.fromarray(pixels).resize((32, 32)).save(tmp_path / file)
                if split == "val":
                    lists["sketch" if i else "photo"].append(f"{file} {label}\n")
    for domain, lines in lists.items():
        (tmp_path / f"{domain}_test.txt").write_text("".join(lines))
    teacher = small_vit(num_classes=3)
    torch.nn.init.normal_(teacher.head.weight)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    monkeypatch.setattr(program, "build", lambda name, *given, **args: build(name, *given, **{**args, "depth": 2}))
    command = ["--data", str(tmp_path), "--weights", str(tmp_path / "teacher.safetensors"), "--model", "test_vit"]
    sizes = ["--size", "32", "--rounds", "2", "--threads", "1", "--cells", "all_75", "--output", str(tmp_path / "out")]
    program.main([*command, *sizes])
    found = json.loads((tmp_path / "out" / "all_75.json").read_text())
    assert {name: len(part["right"]) for name, part in found["domains"].items()} == {"photo": 3, "sketch": 9}
    parts = found["domains"].values()
    assert any(any(part["teacher_right"]) for part in parts)
    assert not all(all(part["teacher_right"]) for part in parts)
    for part in parts:
        both = zip(part["right"], part["teacher_right"], part["agrees"], strict=True)
        assert all(ours == theirs for ours, theirs, agree in both if agree)
    assert "| all | 12 |" in capsys.readouterr().out
    save_file(small_vit(num_classes=2).state_dict(), tmp_path / "teacher.safetensors")
    with pytest.raises(SystemExit):
        program.main([*command, *sizes])
    assert "has a classifier of 2 classes" in capsys.readouterr().err


@pytest.mark.wide
def test_a_rounded_student_is_judged_as_its_file_is_read(few_shot, tmp_path, monkeypatch, capsys):
    program = importlib.import_module("quantise_dinov2")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        (tmp_path / "crops" / split).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "crops" / split / f"{'abcdefghijklm'[i]}.png")
    save_file(small_vit().state_dict(), tmp_path / "teacher.safetensors")
    measures = importlib.import_module("shrink_measures")
    monkeypatch.setattr(measures, "build", lambda name, **args: build(name, **{**args, "depth": 2}))
    output = ["--output", str(tmp_path / "out")]
    data = ["--data", str(tmp_path / "crops"), "--weights", str(tmp_path / "teacher.safetensors")]
    sizes = ["--model", "test_vit", "--size", "32", "--rounds", "2", "--threads", "1"]
    program.main([*data, *sizes, *output, "--cells", "int4", "int8_plain"])
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("int4", "int8_plain")}
    assert found["int4"]["bytes"] == found["int4"]["costs"]["bytes"] < found["int8_plain"]["bytes"]
    assert 0.5 < np.mean(found["int4"]["class_token"]) < np.mean(found["int8_plain"]["class_token"]) < 1
    assert "2 of 2 cells are to be run" in capsys.readouterr().out
    program.main([*output, "--table-only"])
    assert "| 4 bits | 12 |" in capsys.readouterr().out


@pytest.mark.wide
def test_what_is_shipped_is_measured_file_by_file(few_shot, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    program = importlib.import_module("ship_classifier")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{i}.png")
    folder = save(small_vit(num_classes=2), tmp_path / "artifact")
    size = (folder / "model.safetensors").stat().st_size
    cost = types.SimpleNamespace(bytes=size)
    monkeypatch.setattr(program, "PRECISIONS", ("fp32", "int8-static"))
    monkeypatch.setattr(RunFolder, "plan", lambda self: types.SimpleNamespace(teacher=cost, student=cost))
    data = ["--data", str(tmp_path / "set"), "--rounds", "2", "--threads", "1"]
    program.main(["--teacher", str(folder), "--students", str(folder), *data, "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["name"] for row in found[:2]] == ["teacher, onnx, fp32", "teacher, onnx, int8-static"]
    assert all(row["bytes"] == Path(row["file"]).stat().st_size for row in found)
    assert found[1]["bytes"] < 0.75 * found[0]["bytes"]
    for ours, theirs in zip(found[2:], found[:2], strict=True):  # the same artifact
        assert (ours["top1"], ours["agreement"]) == (theirs["top1"], theirs["agreement"])
    assert (found[0]["agreement"], found[0]["images"]) == (100, 10)
    assert "| 100.0 % of the parameters, onnx, int8-static |" in (tmp_path / "out" / "table.md").read_text()
