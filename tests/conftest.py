"""Fixtures that several files share; torch on one thread, so that tests run side by side do not fight for cores."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from compressvit.artifacts import artifact
from compressvit.transforms import Transform
from compressvit.transforms.applying import compress

pytest.register_assert_rewrite("helpers")  # before its import, so that its assertions also tell what they saw

from helpers.contract import ARTIFACT, teacher  # noqa: E402
from helpers.models import build  # noqa: E402
from helpers.runs import RECIPE, TINY, done  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _wide_terminal():
    """So that no line of a table or message is broken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "240")
        yield


# --- runs


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The file of `RECIPE`; the tests of the command line have one of their own."""
    path = tmp_path_factory.mktemp("engine") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def finished(recipe):
    """A finished run of `recipe` with an override. Not to be changed: copy it first."""
    folder = recipe.parent / "finished"
    done("apply", recipe, "--output", folder, "seed=3")
    return folder


# --- the contract of a transform


@pytest.fixture(scope="session")
def fit(tmp_path_factory) -> Callable[..., Transform]:
    """Give a spec that reads an artifact one that fits a backbone after some transforms."""

    @functools.cache
    def artifact_of(backbone: str, before: tuple[Transform, ...]) -> Path:
        return artifact.save(compress(build(backbone, seed=7), before), tmp_path_factory.mktemp("artifact") / "student")

    def fit(spec: Transform, backbone: str, before: Sequence[Transform] = ()) -> Transform:
        if getattr(spec, "artifact", None) != ARTIFACT:
            return spec
        structure = tuple(s for s in before if not s.plan_class.loads_values)
        return spec.model_copy(update={"artifact": str(artifact_of(backbone, structure))})

    return fit


@pytest.fixture(scope="session")
def student(fit) -> Callable[[Transform, str], nn.Module]:
    """The compressed model of a case; a copy, so that a test may do with it what it likes."""
    made: dict[tuple[Transform, str], nn.Module] = {}

    def student(spec: Transform, backbone: str) -> nn.Module:
        if (spec, backbone) not in made:
            torch.manual_seed(3)
            made[spec, backbone] = compress(teacher(backbone), [fit(spec, backbone)])
        return copy.deepcopy(made[spec, backbone])

    return student


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A recipe with a `lors` step, and the folder of a run whose teacher it can take."""
    folder = tmp_path_factory.mktemp("lors")
    recipe = folder / "lors.yaml"
    recipe.write_text(TINY.replace("multiplex: {share: 2}", "low_rank: {rank: 3}").replace("epochs: 1}", "epochs: 6}"))
    done("apply", recipe, "--output", folder / "run", "calibration.images=32")
    return recipe, folder / "run"
