"""3,000 recipes, artifacts and run folders with random damage: each is read, or refused in a sentence; no trace, no hang, no memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
import warnings

import pytest
import yaml
from helpers.hostile import ESC
from helpers.models import build
from helpers.mutate import bounded, clear, replace_file, with_odd_bytes, with_odd_value
from helpers.runs import RECIPE, TINY, run

import compressvit
from compressvit import LowRank, Multiplex
from compressvit.errors import UserError
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
ROUNDS, RECIPES, ARTIFACTS, RUNS = 10, 150, 100, 50


def attempt(read, faults: list[str], what: str) -> None:
    """Call `read`, which may refuse with a `UserError`; note anything else."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except UserError as error:
        if len(str(error)) > 20_000:
            faults.append(f"{what}: a message of {len(str(error)):,} characters")
    except BaseException as error:  # whatever it is, it is what this test looks for
        if isinstance(error, KeyboardInterrupt):
            raise
        faults.append(f"{what}: {''.join(traceback.format_exception(error)[-3:])}")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_recipes(seed, tmp_path):
    chance, faults = random.Random(seed), []
    shipped = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
    for number in range(RECIPES):
        small = chance.random() < 0.6
        text = chance.choice([TINY, RECIPE] if small else shipped)
        if chance.random() < 0.7:
            content = with_odd_value(yaml.safe_load(text), chance)
            damaged = yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogateescape")
        else:
            damaged = with_odd_bytes(text.encode(), chance)
        file = tmp_path / "recipe.yaml"
        file.write_bytes(damaged)

        def read(file=file, small=small):
            recipe = load_recipe(file)
            require_known_models(recipe)
            if small:
                plan_recipe(recipe, "recipe")

        attempt(read, faults, f"{seed}/{number}: {damaged[:3000]!r}")
    assert not faults, f"{len(faults)} of {RECIPES}\n\n" + "\n\n".join(faults)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Small artifacts of every form."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = {
        "plain": [],
        "shared": [Multiplex(share=2)],
        "low rank": [LowRank(rank=3, metric="weights")],
        "adapters": [Adapters()],
        "lora": [LoRA()],
    }
    return [compressvit.save(compressvit.compress(build("vit"), steps), folder / name) for name, steps in made.items()]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_artifacts(seed, artifacts, tmp_path):
    chance, faults = random.Random(seed), []
    for number in range(ARTIFACTS):
        path = shutil.copytree(chance.choice(artifacts), tmp_path / "a")
        manifest, tensors = path / "compressvit.json", path / "model.safetensors"
        content = json.loads(manifest.read_text())
        kind = chance.randrange(10)
        if kind < 7:
            content.pop("checksum", None)
            manifest.write_text(json.dumps(with_odd_value(content, chance)))
        elif kind == 7:
            manifest.write_bytes(with_odd_bytes(manifest.read_bytes(), chance))
        elif kind == 8:
            tensors.write_bytes(with_odd_bytes(tensors.read_bytes(), chance))
        else:
            replace_file(chance.choice([manifest, tensors]), chance)
        said = manifest.read_bytes()[:2500] if manifest.is_file() and not manifest.is_symlink() else b""
        attempt(lambda path=path: compressvit.load(path), faults, f"{seed}/{number} {path.name} {kind}: {said!r}")
        clear(path)
    assert not faults, f"{len(faults)} of {ARTIFACTS}\n\n" + "\n\n".join(faults)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_run_folders(seed, finished, tmp_path):
    chance, faults = random.Random(seed), []
    for number in range(RUNS):
        folder = shutil.copytree(finished, tmp_path / "run")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        file = chance.choice(
            [p for p in files if p.suffix in (".json", ".jsonl", ".yaml")] if chance.random() < 0.7 else files
        )
        kind = chance.randrange(10)
        if kind < 6 and file.suffix == ".json":
            file.write_text(json.dumps(with_odd_value(json.loads(file.read_text()), chance)))
        elif kind < 6 and file.suffix == ".jsonl":
            lines = file.read_text().splitlines()
            at = chance.randrange(len(lines))
            lines[at] = json.dumps(with_odd_value(json.loads(lines[at]), chance))
            file.write_text("\n".join(lines))
        elif kind < 6 and file.suffix == ".yaml":
            content = with_odd_value(yaml.safe_load(file.read_text()), chance)
            file.write_bytes(yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogateescape"))
        elif kind < 9:
            file.write_bytes(with_odd_bytes(file.read_bytes(), chance))
        else:
            replace_file(file, chance)
        said = file.read_bytes()[:1500] if file.is_file() and os.path.getsize(file) and not file.is_symlink() else b""

        def read(folder=folder, number=number):
            for words in (("report", folder), ("compare", folder)) if number % 5 else (("evaluate", folder),):
                code, out, err = run(*words)
                if code not in (0, 2) or "Traceback" in out + err or ESC in out + err:
                    log = err.partition("trace is in ")[2].partition(";")[0]
                    trace = open(log).read()[-1500:] if log else ""  # noqa: SIM115
                    raise AssertionError(f"{words[0]}: {code} {err}\n{trace}")

        attempt(read, faults, f"{seed}/{number} {file.relative_to(folder)} {kind}: {said!r}")
        clear(folder)
    assert not faults, f"{len(faults)} of {RUNS}\n\n" + "\n\n".join(faults)
