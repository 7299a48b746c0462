"""Benchmarks of students without training: a cell goes through the whole program, and is judged by what its file computes."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from compressvit import save
from compressvit.errors import UserError
from compressvit.model.ties import count_parameters
from compressvit.model.weights import build
from compressvit.runs.folder import RunFolder


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


def test_merged_adapters_stand_beside_others_and_compute_the_same(few_shot, capsys):
    program = importlib.import_module("merged_latency")
    program.main(["--models", "test_vit", "test_convnext", "--batches", "1", "2", "--rounds", "3", "--threads", "1"])
    out = capsys.readouterr().out
    differences = [float(line.rpartition(" ")[2]) for line in out.splitlines() if "differ by" in line]
    assert len(differences) == 2
    assert max(differences) < 1e-4  # measured 1e-6
    header, _, *rows = [line for line in out.rpartition("ratios to the backbone")[2].splitlines() if line]
    assert header == "| backbone | images | backbone | AdaptFormer | RepAdapter | RepAdapter, merged |"
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {name}", size] for name in ("test_vit", "test_convnext") for size in ("1", "2")
    ]
    adapted = program.variants("test_vit")
    assert type(adapted[program.MERGED].blocks[0]) is type(adapted[program.BACKBONE].blocks[0])
    assert adapted["RepAdapter"].blocks[0].attn.repadapter is not None


@pytest.mark.slow
def test_students_are_timed_in_every_runtime(few_shot, capsys):
    program = importlib.import_module("runtimes")
    chosen = ["low rank, pivoted", "repadapter"]
    words = ["--model", "test_vit", "--students", *chosen, "--runtimes", "eager", "pt2", "--rounds", "3"]
    program.main([*words, "--threads", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| | eager | pt2 |"
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == ["teacher", *chosen, program.MERGED]
    assert all(len(row.split(" | ")) == 3 for row in rows[2:])
    assert not any("| – " in row for row in rows)
