"""The examples of CONTRIBUTING.md for families and data sets pass the tests printed beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import compressvit
from compressvit.data.data_set import SETS
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.model.family import FAMILIES
from compressvit.registry import Registry

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


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
