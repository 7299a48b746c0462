"""compressvit: compress pretrained vision transformers, distil the student, and show the evidence.

The public names are imported on first use, so that `import compressvit` and `compressvit --help` do not wait for torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Classes of transforms are also public names; they are looked up in the registry.
_PUBLIC = {
    "apply": "compressvit.runs.apply",
    "shrink": "compressvit.runs.shrink",
    "compress": "compressvit.transforms.applying",
    "distill": "compressvit.runs.distill",
    "save": "compressvit.artifacts.artifact",
    "load": "compressvit.artifacts.artifact",
    "materialise": "compressvit.transforms.applying",
    "merge": "compressvit.artifacts.merge",
    "export": "compressvit.runs.export",
    "push": "compressvit.report.push",
    "sweep": "compressvit.report.sweep",
    "count_parameters": "compressvit.model.ties",
    "save_adapter": "compressvit.artifacts.adapter",
    "load_adapter": "compressvit.artifacts.adapter",
    "remove_adapter": "compressvit.artifacts.adapter",
    "Recipe": "compressvit.recipe.recipe",
    "UserError": "compressvit.errors",
}
_MODULES = {
    "losses": "compressvit.training.losses",
    "ties": "compressvit.model.ties",
    "diagnostics": "compressvit.diagnostics",
}


class _Modules(MetaPathFinder, Loader):
    """Makes `from compressvit.losses import …` import the module that `compressvit.losses` names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "compressvit" and name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        # The import system puts the returned object into sys.modules: the module itself, not a copy.
        name = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = importlib.import_module(_MODULES[name])


sys.meta_path.append(_Modules())


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "__all__":
        return __dir__()
    if name[:1].isupper():  # a class; names of submodules also arrive here, before they are imported
        spec = _transforms().class_called(name)
        if spec is not None:
            return spec
    close = difflib.get_close_matches(name, __dir__() if name[:1].isupper() else _PUBLIC, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise AttributeError(f"module 'compressvit' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    own = [spec.__name__ for word, spec in _transforms().items() if _transforms().is_own(word)]
    return sorted({"__version__", *_MODULES, *_PUBLIC, *own})


def _transforms() -> Any:
    return importlib.import_module("compressvit.transforms.base").TRANSFORMS
