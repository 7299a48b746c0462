"""What `helpers.mutants` damages: recipes, artifacts and files of weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
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
from helpers.hostile import BOMBS
from helpers.models import build, outputs
from helpers.mutate import Chance, damage_file, damage_yaml, places, shown, with_odd_value
from helpers.runs import RECIPE, TINY, answered


class Mutant(NamedTuple):
    """Something damaged: the kind of damage, what it was, and what reads it."""

    kind: str
    said: str
    read: Callable[[], object]


class Subject:
    """Something to damage.

    Args:
        folder: an empty one, for what is copied before it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def make(self) -> None:
        """Make what takes threads that a process forked from this one would wait for in vain: those that draw charts."""

    def begin(self) -> None:
        """Called in every process that reads mutants, before its memory is bounded."""

    def mutant(self, chance: Chance, folder: Path) -> Mutant:
        """One of them, damaged, in an empty folder."""
        raise NotImplementedError


class Recipes(Subject):
    """The shipped recipes and two small ones, which are also planned."""

    def __init__(self, folder: Path):
        self._shipped = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
        assert len(self._shipped) > 20

    def mutant(self, chance: Chance, folder: Path) -> Mutant:
        file, small = folder / "recipe.yaml", chance.random() < 0.4
        text = chance.choice([TINY, RECIPE] if small else self._shipped)
        several = self._several(text, chance) if chance.random() < 0.2 else None
        damaged = damage_yaml(text, chance) if several is None else several
        kind, words = chance.did, []
        if chance.random() < 0.1:
            kind, words = "an odd override", [self._override(chance)]
        file.write_bytes(damaged)
        by_command = chance.random() < 0.3

        def read() -> None:
            if by_command:  # of which the exit code counts too
                answered(*(["plan", file, *words] if small else ["validate", file]))
                return
            recipe = load_recipe(file, words)
            require_known_models(recipe)
            if small:
                plan_recipe(recipe, "recipe")

        return Mutant(kind, f"{words} {damaged[:3000]!r}", read)

    def _several(self, text: str, chance: Chance) -> bytes | None:
        """Several values damaged, or a part of one recipe put into another; None where that is deeper than YAML can be written."""
        with suppress(RecursionError):
            return self._several_of(text, chance)
        return None

    def _several_of(self, text: str, chance: Chance) -> bytes:
        content = yaml.safe_load(text)
        if chance.random() < 0.5:
            for _ in range(chance.choice([2, 3, 8])):
                content = with_odd_value(content, chance)
            chance.did = "several values"
        else:
            other = yaml.safe_load(chance.choice(self._shipped))
            part, here = other, content
            for key in chance.choice(list(places(other))[1:]):
                part = part[key]
            path = chance.choice(list(places(content))[1:])
            for key in path[:-1]:
                here = here[key]
            if isinstance(here, list) and chance.random() < 0.5:
                here.insert(path[-1], copy.deepcopy(part))
            else:
                here[path[-1]] = copy.deepcopy(part)
            chance.did = "a part of another recipe"
        return yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogateescape")

    def _override(self, chance: Chance) -> str:
        bombs = [bomb[:20_000] for bomb in BOMBS.values()]
        keys = [
            "seed", "data.root", "steps.0", "steps.1.distill.lr", "teacher.args", "x" * 500, "a.b.c", "steps[0]", ".", "", "steps.-1",
            "steps.99999999999", "data", "teacher.weights", "data..root", "steps.0.multiplex.share",
        ]  # fmt: skip
        values = [*bombs, "[", "2024", "1e3", "{a: 1}", "/a #b", "", "*a", "!!int x", "nan", "-1", "null", "9" * 4000]
        return f"{chance.choice(keys)}={chance.choice(values)}"


class Artifacts(Subject):
    """Small artifacts of every form, each with what it computes. One that is loaded all the same computes that too, unless the checksum was
    taken off its manifest."""

    def __init__(self, folder: Path):
        made = {
            "plain": [],
            "shared": [Multiplex(share=2)],
            "low rank": [LowRank(rank=3, metric="weights")],
            "adapters": [Adapters()],
            "lora": [LoRA()],
        }
        models = {name: compressvit.compress(build("vit"), steps) for name, steps in made.items()}
        self._originals = [(compressvit.save(model, folder / name), outputs(model)) for name, model in models.items()]

    def mutant(self, chance: Chance, folder: Path) -> Mutant:
        original, expected = chance.choice(self._originals)
        path = shutil.copytree(original, folder / "a")
        manifest, tensors = path / "compressvit.json", path / "model.safetensors"
        number = chance.randrange(10)
        if number < 6:
            content = with_odd_value(json.loads(manifest.read_text()), chance)
            if number < 4 and isinstance(content, dict):  # as somebody edits it who knows of the checksum
                content.pop("checksum", None)
            manifest.write_text(json.dumps(content))
        else:
            damage_file(tensors if number < 8 else chance.choice([manifest, tensors]), chance)

        def read() -> None:
            model = compressvit.load(path)
            if number >= 4:
                assert torch.equal(outputs(model), expected), "another model"

        return Mutant(chance.did, f"{original.name} {number}: {shown(manifest)}", read)


class Weights(Subject):
    """Files of weights of every form that are read into a model, which a file that is refused does not change."""

    def __init__(self, folder: Path):
        model = build("vit")
        state = model.state_dict()
        compressvit.save(model, folder / "artifact")
        save_checkpoint(folder / "plain.pt", state)
        save_checkpoint(folder / "wrapped.pt", {"epoch": 3, "model": {f"module.{k}": v for k, v in state.items()}})
        save_adapter(compressvit.compress(model, [LoRA(rank=2)]), folder / "adapter.safetensors")
        shutil.copy(folder / "artifact" / "model.safetensors", folder / "plain.safetensors")
        self._originals = sorted(file for file in folder.iterdir() if file.is_file())
        assert len(self._originals) == 4
        for file in self._originals:  # all of them can be read
            self._read(file, build("vit"))

    def mutant(self, chance: Chance, folder: Path) -> Mutant:
        original, model = chance.choice(self._originals), build("vit")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        file = Path(shutil.copy(original, folder / original.name))
        damage_file(file, chance)

        def read() -> None:
            try:
                self._read(file, model)
            except UserError:
                now = model.state_dict()
                same = now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
                assert same, "a refused file has changed the model"
                raise

        return Mutant(chance.did, f"{file.name}: {shown(file)}", read)

    def _read(self, file: Path, model: nn.Module) -> None:
        if file.name == "adapter.safetensors":
            load_adapter(model, file)
        else:
            load_file(model, file, "teacher.weights")
