"""The benchmark of a Mini-Swin under a detector: its cells can be planned, it runs, and does not run twice."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.scenes import scenes
from safetensors.torch import load_file, save_file

from compressvit.model.ties import count_parameters
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("mini_swin_detection")


@pytest.fixture
def benchmark(program, tmp_path):
    base = {
        "detector": "faster_rcnn",
        "backbone": "x.safetensors",
        "args": {"backbone": "swin_tiny_patch4_window7_224", "img_size": 64, "channels": 8, "representation": 8},
        "data": {"name": "coco", "root": "x", "num_classes": 3},
        "training": {"lr": 4e-4},
        "epochs": {"whole": 4, "further": 2},
    }
    return program.Benchmark(base, tmp_path)


def test_cells_differ_in_what_they_say_and_in_nothing_else(program, benchmark):
    recipes = {name: benchmark.recipe(name, 1) for name in program.CELLS}
    for name, content in recipes.items():
        recipe = parse_recipe(yaml.safe_dump(content))
        cell, phase = program.CELLS[name], recipe.steps[-1].spec
        assert (phase.epochs, phase.lr, recipe.seed) == ((2, 1e-4, 1) if cell.further else (4, 4e-4, 1))
        started_from = content["teacher"].get("weights") if cell.further else content["teacher"]["backbone"]
        assert started_from == (str(benchmark.folder("swin", 1) / "student") if cell.further else "x.safetensors")
        transforms = [step.spec for step in recipe.steps if isinstance(step.spec, Transform)]
        assert len(transforms) == cell.mini
        model = build("faster_rcnn", benchmark.base["args"], device="meta")
        whole = count_parameters(model)
        apply_plans(model, [spec.plan(model) for spec in transforms])
        assert (count_parameters(model) < 0.8 * whole) == cell.mini
    terms = {name: recipes[name]["steps"][-1]["distill"]["losses"] for name in ("prediction", "relations", "features")}
    weights = {name: {term for term, value in losses.items() if value["weight"]} for name, losses in terms.items()}
    labelled = {"prediction", "labels"}
    assert weights == {
        "prediction": labelled,
        "relations": {*labelled, "attention_relation", "hidden_relation"},
        "features": {*labelled, "feature"},
    }


def test_a_shorter_swin_has_the_first_blocks_of_its_file(program, tmp_path):
    torch.manual_seed(0)
    args = {"embed_dim": 12, "num_heads": (1, 1, 2, 2), "num_classes": 5}
    whole = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 4, 1), **args)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    kept = load_file(program.shorter(tmp_path / "whole.safetensors", 2, tmp_path / "short.safetensors"))
    short = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), **args)
    missing, further = short.load_state_dict(kept, strict=False)
    assert (missing, further) == (["head.fc.weight", "head.fc.bias"], [])
    assert torch.equal(short.layers[2].blocks[1].mlp.fc1.weight, whole.layers[2].blocks[1].mlp.fc1.weight)


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was_stopped(program, tmp_path, monkeypatch, capsys):
    scenes(tmp_path / "data", "train", 8)
    scenes(tmp_path / "data", "val", 4)
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2, 4, 2))
    save_file(model.state_dict(), tmp_path / "swin.safetensors")
    words = (
        f"x --model swin_tiny_patch4_window7_224 --backbone {tmp_path / 'swin.safetensors'} --data {tmp_path / 'data'}"
    )
    words += f" --blocks 2 --size 64 --batch-size 4 --epochs 1 --further 1 --seeds 0 --output {tmp_path / 'out'}"
    words += " --cells swin mini relations"
    monkeypatch.setattr(sys, "argv", words.split())
    program.main()
    assert "3 cells are to be run" in capsys.readouterr().out
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]
    assert list(cells) == ["swin", "mini", "relations"]
    assert cells["mini"]["seeds"]["0"]["parameters"] < cells["swin"]["seeds"]["0"]["parameters"]
    assert cells["relations"]["ap_difference"]["seeds"] == [0]
    program.main()
    assert "0 cells are to be run" in capsys.readouterr().out
