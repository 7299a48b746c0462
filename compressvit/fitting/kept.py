"""Values of the blocks that a fit in order is done with, so that one that was interrupted goes on after them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from compressvit.errors import UserError
from compressvit.files import write_atomically

log = logging.getLogger("compressvit")


class Kept:
    """A file a block, of the values and the remaining errors of its fitted layers.

    Args:
        folder: of the files.
        what: the fit, as a text; files of another one are not read.
        models: that have the layers, under the same paths, and take the values.
    """

    def __init__(self, folder: Path, what: str, models: Sequence[nn.Module]):
        self._folder, self._models = folder, models
        self._what = hashlib.sha256(what.encode()).hexdigest()

    def read(self, block: str, paths: Iterable[str]) -> dict[str, float] | None:
        """Set the values of the layers at `paths` in all models, and return their errors; None if they were not kept."""
        file, wanted = self._file(block), list(paths)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                about = opened.metadata() or {}
                if about.get("fit") != self._what:
                    return None
                errors: dict[str, float] = json.loads(about["errors"])
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if set(errors) != set(wanted):
                return None
            for model in self._models:
                for path in wanted:
                    own = {
                        name.removeprefix(f"{path}:"): v for name, v in values.items() if name.startswith(f"{path}:")
                    }
                    model.get_submodule(path).load_state_dict(own)
        except (OSError, SafetensorError, UserError, ValueError, KeyError, RuntimeError) as error:
            log.warning("%s cannot be read, so %s is fitted again: %s", file, block, str(error).splitlines()[0])
            return None
        return errors

    def write(self, block: str, errors: dict[str, float]) -> None:
        """Keep the values of the layers that have `errors`, as the first model has them."""
        values: dict[str, torch.Tensor] = {}
        for path in errors:
            state = self._models[0].get_submodule(path).state_dict()
            values |= {f"{path}:{name}": value.detach().cpu().clone() for name, value in state.items()}
        about = {"fit": self._what, "errors": json.dumps(errors)}
        write_atomically(self._file(block), lambda scratch: save_file(values, scratch, metadata=about))

    def _file(self, block: str) -> Path:
        return self._folder / f"{block}.safetensors"


def forget(folder: Path) -> None:
    """Remove what was kept, once the fit is done."""
    shutil.rmtree(folder, ignore_errors=True)
