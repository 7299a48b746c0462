"""Thousands of recipes, artifacts and weight files with random damage: each is read, or refused in a sentence; no trace, no hang, no
memory, and no model is another one than what was written."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.bounds import SEEDS, Faults
from helpers.hostile import BOMBS
from helpers.models import build, outputs
from helpers.mutate import (
    clear,
    damage_file,
    damage_yaml,
    shown,
    with_odd_value,
)
from helpers.runs import RECIPE, TINY
from torch import nn

import compressvit
from compressvit import LowRank, Multiplex
from compressvit.artifacts.adapter import load_adapter, save_adapter
from compressvit.errors import UserError
from compressvit.files import save_checkpoint
from compressvit.model.weights import load_file
from compressvit.recipe.recipe import load_recipe, require_known_models
from compressvit.recipe.shipped import shipped_recipes
from compressvit.runs.plan import plan_recipe
from compressvit.transforms.adapters import Adapters
from compressvit.transforms.lora import LoRA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="bounds of a process are Linux's"),
]
RECIPES, ARTIFACTS, WEIGHTS = 150, 80, 50  # of each seed


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: _loops(), "ExceededError"),
        (lambda: _suppresses(_loops), "ExceededError"),
        (lambda: bytearray(3 * 2**30), "MemoryError"),
        (lambda: _refuses(lambda: torch.zeros(2**30)), "a lack of memory became UserError"),
    ],
)
def test_a_fault_is_noted(read, words, monkeypatch):
    monkeypatch.setattr("helpers.bounds.SECONDS", 0.2)
    faults = Faults()
    faults.attempt(read, "it")
    assert len(faults) == 1
    assert words in faults[0]


def _loops() -> None:
    while True:
        pass


def _suppresses(work: Callable[[], object]) -> None:
    with suppress(Exception):
        work()


def _refuses(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        raise UserError("it does not fit") from error


# ------------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("seed", SEEDS)
def test_recipes(seed, tmp_path):
    chance, faults = random.Random(seed), Faults()
    shipped = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
    file = tmp_path / "recipe.yaml"
    for number in range(RECIPES):
        small = chance.random() < 0.6
        damaged = damage_yaml(chance.choice([TINY, RECIPE] if small else shipped), chance)
        file.write_bytes(damaged)
        words = []
        if chance.random() < 0.1:
            bombs = [bomb[:20_000] for bomb in BOMBS.values()]
            key = chance.choice(
                [
                    "seed",
                    "data.root",
                    "steps.0",
                    "steps.1.distill.lr",
                    "teacher.args",
                    "x" * 500,
                    "a.b.c",
                    "steps[0]",
                    ".",
                ]
            )
            words = [f"{key}={chance.choice([*bombs, '[', '2024', '1e3', '{a: 1}', '/a #b', '', '*a', '!!int x'])}"]

        def read(words=words, small=small):
            recipe = load_recipe(file, words)
            require_known_models(recipe)
            if small:
                plan_recipe(recipe, "recipe")

        faults.attempt(read, f"{seed}/{number} {words}: {damaged[:3000]!r}")
    faults.none_of(RECIPES)


# ------------------------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Small artifacts of every form, each with what it computes."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = {
        "plain": [],
        "shared": [Multiplex(share=2)],
        "low rank": [LowRank(rank=3, metric="weights")],
        "adapters": [Adapters()],
        "lora": [LoRA()],
    }
    models = {name: compressvit.compress(build("vit"), steps) for name, steps in made.items()}
    return [(compressvit.save(model, folder / name), outputs(model)) for name, model in models.items()]


@pytest.mark.parametrize("seed", SEEDS)
def test_artifacts(seed, artifacts, tmp_path):
    chance, faults = random.Random(seed), Faults()
    for number in range(ARTIFACTS):
        original, expected = chance.choice(artifacts)
        path = shutil.copytree(original, tmp_path / "a")
        manifest, tensors = path / "compressvit.json", path / "model.safetensors"
        kind = chance.randrange(10)
        if kind < 6:
            content = with_odd_value(json.loads(manifest.read_text()), chance)
            if kind < 4 and isinstance(content, dict):  # as somebody edits it who knows of the checksum
                content.pop("checksum", None)
            manifest.write_text(json.dumps(content))
        else:
            damage_file(tensors if kind < 8 else chance.choice([manifest, tensors]), chance)
        said = shown(manifest)

        def read(path=path, sealed=kind >= 4, expected=expected):
            model = compressvit.load(path)
            if sealed:
                assert torch.equal(outputs(model), expected), "another model"

        faults.attempt(read, f"{seed}/{number} {original.name} {kind}: {said}")
        clear(path)
    faults.none_of(ARTIFACTS)


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    """Files of weights of every form that are read into a model."""
    folder = tmp_path_factory.mktemp("weights")
    model = build("vit")
    compressvit.save(model, folder / "artifact")
    save_checkpoint(folder / "plain.pt", model.state_dict())
    save_checkpoint(
        folder / "wrapped.pt", {"epoch": 3, "model": {f"module.{k}": v for k, v in model.state_dict().items()}}
    )
    save_adapter(compressvit.compress(model, [LoRA(rank=2)]), folder / "adapter.safetensors")
    shutil.copy(folder / "artifact" / "model.safetensors", folder / "plain.safetensors")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:  # all of them can be read
        _read_weights(file, build("vit"))
    return files


def _read_weights(file: Path, model: nn.Module) -> None:
    if file.name == "adapter.safetensors":
        load_adapter(model, file)
    else:
        load_file(model, file, "teacher.weights")


@pytest.mark.parametrize("seed", SEEDS)
def test_weight_files(seed, weight_files, tmp_path):
    chance, faults = random.Random(seed), Faults()
    for number in range(WEIGHTS):
        original, model = chance.choice(weight_files), build("vit")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        file = Path(shutil.copy(original, tmp_path / original.name))
        damage_file(file, chance)
        said = shown(file)

        def read(file=file, model=model, before=before):
            try:
                _read_weights(file, model)
            except UserError:
                now = model.state_dict()
                assert now.keys() == before.keys(), "a refused file has changed the model"
                assert all(torch.equal(tensor, before[name]) for name, tensor in now.items()), (
                    "a refused file has changed the model"
                )
                raise

        faults.attempt(read, f"{seed}/{number} {file.name}: {said}")
        clear(file)
    faults.none_of(WEIGHTS)
