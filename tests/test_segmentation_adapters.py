"""The benchmark of adapters under a segmenter: its cells can be planned, differences are drawn picture by picture, and it runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.masked_scenes import masked_scenes
from safetensors.torch import save_file

from compressvit.recipe.recipe import parse_recipe
from compressvit.recipe.shipped import find_recipe
from compressvit.tasks.overlap import sampled


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("segmentation_adapters")


@pytest.fixture
def benchmark(program, tmp_path):
    base = yaml.safe_load(find_recipe(program.RECIPE).read_text(encoding="utf-8"))
    base.pop("steps")
    base["data"] |= {"root": "x", "num_classes": 3}
    base["teacher"]["backbone"] = "x.safetensors"
    return program.Benchmark(base, tmp_path)


def test_every_cell_is_a_recipe_that_starts_from_what_comes_before_it(program, benchmark):
    for name, cell in program.CELLS.items():
        recipe = parse_recipe(yaml.safe_dump(benchmark.recipe(name, 2)))
        starts = [recipe.teacher.weights, recipe.student.weights] if cell.half else []
        before = [str(benchmark.folder(other, 2) / "student") for other in program.needs(name)]
        assert [start for start in starts if start != "teacher"] == before
        assert list(program.CELLS).index(name) > max(
            [list(program.CELLS).index(other) for other in program.needs(name)], default=-1
        )
        last = recipe.steps[-1].spec
        if cell.method is None:
            assert last.budget.parameters == last.budget.macs == 0.5
            continue
        rate, backbone = program.RATES[cell.method]
        assert (last.epochs, last.backbone_lr) == (6, backbone)
        assert last.lr == pytest.approx(rate * (0.1 if cell.half else 1))


def test_a_difference_of_the_same_pictures_is_narrower_than_either(program):
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(50, 400, (60, 3), generator=generator)
    hard = torch.rand(60, 1, generator=generator)
    ours, theirs = (torch.stack([(true * (1 - hard) * share).long(), true, true], dim=1) for share in (0.8, 0.9))
    first, second = (sampled(counts)["miou"] for counts in (ours, theirs))
    low, high = program.interval([second - first] * 2)
    alone = program.interval([first])
    assert low < float((second - first)[0]) < high
    assert low > 0
    assert high - low < 0.3 * (alone[1] - alone[0])


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was_stopped(program, tmp_path, monkeypatch, capsys):
    masked_scenes(tmp_path / "data", "training", 8)
    masked_scenes(tmp_path / "data", "validation", 4)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    small = yaml.safe_load(find_recipe(program.RECIPE).read_text(encoding="utf-8"))
    small["teacher"]["args"] |= {"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": 2}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setattr(program, "RECIPE", str(tmp_path / "small.yaml"))
    words = f"x --data {tmp_path / 'data'} --backbone {tmp_path / 'vit.safetensors'} --size 64 --epochs 1 --seeds 0 --classes 3"
    monkeypatch.setattr(sys, "argv", f"{words} --cells repadapter half_full --output {tmp_path / 'out'}".split())
    program.main()
    assert "4 cells are to be run" in capsys.readouterr().out
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]
    assert list(cells) == ["linear", "repadapter", "half", "half_full"]
    parameters = {name: cell["seeds"]["0"]["parameters"] for name, cell in cells.items()}
    assert parameters["half"] == parameters["half_full"] < 0.55 * parameters["linear"]
    assert cells["repadapter"]["difference"]["from"] == "linear"
    assert cells["linear"]["seeds"]["0"]["trained"] < cells["repadapter"]["seeds"]["0"]["trained"]
    program.main()
    assert "0 cells are to be run" in capsys.readouterr().out
