"""The examples of CONTRIBUTING.md work as printed: families and data sets with their tests, a transform, a loss term."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers.models import build

import compressvit
from compressvit.data.data_set import SETS
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.model.family import FAMILIES
from compressvit.registry import Registry
from compressvit.training.terms.base import TERMS, Batch, TermSetting
from compressvit.transforms import TRANSFORMS

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks_of(heading: str) -> list[str]:
    """The Python code of a section."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def registered(code: str, registry: Registry[Any], monkeypatch) -> dict[str, Any]:
    """Run a definition outside the package; what it registers is taken out again after the test."""
    len(registry)
    for table in ("_entries", "_modules"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    names: dict[str, Any] = {"__name__": "outside"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_transform_adapts_and_merges(monkeypatch):
    definition, test = blocks_of("How to add a transform")
    names = registered(definition, TRANSFORMS, monkeypatch)
    exec(compile(test, "CONTRIBUTING.md", "exec"), names)
    (laws,) = names["test_contract"].pytestmark
    assert len(laws.args[1]) > 50
    model = build("vit").eval()
    student = compressvit.compress(model, [names["Shift"]()]).eval()
    images = torch.randn(2, *model.patch_embed.proj.weight.shape[1:2], *model.patch_embed.img_size)
    assert torch.equal(student(images), model(images))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad and not name.startswith("head")}
    assert len(trained) == 4
    for name, parameter in trained.items():
        assert name.endswith("mlp.fc2.shift.offset")
        torch.nn.init.normal_(parameter)
    merged = compressvit.merge(student)
    assert set(merged.state_dict()) == set(model.state_dict())
    assert torch.allclose(merged(images), student(images), atol=1e-5)
    assert not torch.allclose(merged(images), model(images), atol=1e-1)


def test_the_loss_term_is_a_mean_square(monkeypatch):
    (definition,) = blocks_of("How to add a loss term")
    term = registered(definition, TERMS, monkeypatch)["StillnessTerm"](weight=0.5)
    path = "blocks.3"
    tap = SimpleNamespace(student=SimpleNamespace(path=path))
    built = term.build(TermSetting(pairs=(tap,)))
    assert (built.name, built.weight, built.student_taps) == ("stillness", 0.5, ((path, "output"),))
    tokens = torch.tensor([[[1.0, 3.0]]])
    loss, more = built.function(Batch(tokens, None, {path: {"output": tokens}}, {}, None))
    assert (loss.item(), more) == (5.0, {})


@pytest.mark.parametrize(
    ("heading", "registry"), [("How to add a family of backbones", FAMILIES), ("How to add a data set", SETS)]
)
def test_an_example_passes_its_test(heading: str, registry: Registry[Any], monkeypatch, tmp_path):
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    definition, test = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert f"`{registry.group}`" in section
    assert all(Path(room).is_dir() for room in re.findall(r"`(compressvit/\S+)/NAME\.py`", section)), section
    len(registry)  # found, so that what is added below can be taken out again
    for table in ("_entries", "_modules"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    names = {"torch": torch, "timm": timm, "compressvit": compressvit, "open_data": open_data, "Data": Data}
    exec(compile(definition, "CONTRIBUTING.md", "exec"), {"__name__": "outside", **names})
    own: dict = dict(names)
    exec(compile(test, "CONTRIBUTING.md", "exec"), own)
    (name,) = (name for name in own if name.startswith("test_"))
    own[name](*([tmp_path] if "tmp_path" in own[name].__code__.co_varnames else []))
