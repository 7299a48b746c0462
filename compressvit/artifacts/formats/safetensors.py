"""An artifact in one file of safetensors: its tensors, each shared one once, and in the header its manifest.

`compressvit.load(FILE)` reads it; others read its tensors, whose names are those of the model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from compressvit.artifacts import artifact
from compressvit.artifacts.export import PRECISIONS
from compressvit.artifacts.exported_model import Reopened
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files
from compressvit.data.input import Side
from compressvit.data.spec import Data
from compressvit.files import usual_mode
from compressvit.model import surgery
from compressvit.model.header import MANIFEST, TENSORS


@format_of_files("safetensors")
class Safetensors(Format):
    """One file."""

    title = "safetensors"
    suffix = ".safetensors"
    computes = False
    reads, is_graph = True, False
    runtime = "compressvit"

    def write(self, source: Source, path: Path) -> None:
        model = surgery.deep_copy(source.model).to(PRECISIONS[source.precision])
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = artifact.save(model, Path(folder) / "artifact", input_config=source.input.as_dict())
            manifest = (made / MANIFEST).read_text(encoding="utf-8")
            save_file(load_file(made / TENSORS), path, metadata={"format": "pt", **source.metadata, MANIFEST: manifest})
        usual_mode(path)

    def open(self, path: Path, source: Source) -> nn.Module:
        return Opened(source.task.graph(artifact.load(path).float())[0])

    def read(self, path: Path, *, trust: bool = False) -> Reopened:
        model = artifact.load(path).float()
        return Reopened(Side.of(model, Data(name="images"), trained=True, own_crop=True))

    def how(self, path: Path) -> str:
        return f"compressvit.load('{path}')   (takes images in the precision of the file; with .float() in float32)"
