"""A run that begins with the student of another, transforms and all (`student.weights: RUN/student`)."""

from __future__ import annotations

import pytest
import torch
import yaml
from helpers.runs import TINY, done, refused

import compressvit
from compressvit.runs.files import read_results
from compressvit.transforms.record import compression_of

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run that shares its blocks and trains nothing after that."""
    folder = tmp_path_factory.mktemp("first")
    content = yaml.safe_load(TINY) | {"steps": [{"multiplex": {"share": 2}}]}
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    done("apply", "--no-report", folder / "r.yaml", "--output", folder / "run")
    return folder / "run"


def written(path, first, steps, **student):
    """A recipe that begins with the student of `first`; its file."""
    content = yaml.safe_load(TINY)
    content["teacher"] = {"model": "vit_tiny_patch16_224", "weights": str(first / "teacher")}
    content |= {"student": {"weights": str(first / "student"), **student}, "steps": steps}
    (path / "r.yaml").write_text(yaml.safe_dump(content))
    return path / "r.yaml"


def test_it_is_trained_on_with_its_transforms(first, tmp_path):
    recipe = written(tmp_path, first, [{"distill": {"epochs": 1, "lr": 1e-9, "weight_decay": 0.0}}])
    assert f"{read_results(first).student.parameters:,}" in done("plan", recipe)
    done("apply", "--no-report", recipe, "--output", tmp_path / "run")
    before, after = (compressvit.load(folder / "student") for folder in (first, tmp_path / "run"))
    assert [plan.transform for plan in compression_of(after).plans] == ["multiplex"]
    assert not torch.equal(before.head.weight, after.head.weight), "it was trained"
    assert torch.allclose(before(IMAGES), after(IMAGES), atol=1e-5)  # measured 1.5e-7
    assert "nothing to do" in done("apply", "--no-report", tmp_path / "run", "--resume")


def test_further_transforms_come_after_its_own(first, tmp_path):
    recipe = written(tmp_path, first, [{"lora": {"rank": 2}}, {"finetune": {"epochs": 1}}])
    done("apply", "--no-report", recipe, "--output", tmp_path / "run")
    student = compressvit.load(tmp_path / "run" / "student")
    assert [plan.transform for plan in compression_of(student).plans] == ["multiplex", "lora"]
    assert student(IMAGES).isfinite().all()


def test_what_the_artifact_says_is_not_said_again(first, tmp_path):
    recipe = written(tmp_path, first, [{"distill": {"epochs": 1}}], args={"depth": 2})
    message = refused("apply", recipe, "--output", tmp_path / "run")
    assert (
        f"student.args: {first / 'student'} was made by transforms and says itself which model it is; leave student.args out"
        in message
    )
    assert not (tmp_path / "run").exists()
