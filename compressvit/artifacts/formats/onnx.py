"""ONNX, for onnxruntime and what else reads it, with a short program beside it that answers for image files.

The file has what that program needs (`metadata_props`): size, normalisation, names of the classes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressvit.artifacts import predict
from compressvit.artifacts.export import DYNAMIC, INTEGERS, STATIC, onnx_program
from compressvit.artifacts.exported_model import GraphFile, Port, Reopened, reopened
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files
from compressvit.artifacts.int8 import RUNTIME, round_weights, round_weights_and_ranges
from compressvit.errors import UserError
from compressvit.reading import open_regular


@format_of_files("onnx")
class ONNX(Format):
    """One file; above 1.5 GiB the weights are in a second one."""

    title = "ONNX"
    suffix = ".onnx"
    packages = RUNTIME
    install = "'compressvit[onnx]'"
    precisions = ("fp32", "fp16", *INTEGERS)
    has_opset = True
    reads = True
    runtime = "onnxruntime"

    def beside(self, name: str) -> list[str]:
        return [f"{name.removesuffix(self.suffix)}_predict.py", *self.parts(name)]

    def parts(self, name: str) -> list[str]:
        return [f"{name}.data"]

    def write(self, source: Source, path: Path) -> None:
        program = onnx_program(source.graph, opset=source.opset, metadata=source.metadata)
        program.save(path)
        if source.precision == DYNAMIC:
            round_weights(path)
        elif source.precision == STATIC:
            round_weights_and_ranges(path, source.calibration)
        shutil.copyfile(str(predict.__file__), path.with_name(self.beside(path.name)[0]))

    def open(self, path: Path, source: Source) -> nn.Module:
        session, names = session_of(path), source.reference[1]
        return Opened(lambda images: outputs_of(session, names, images))

    def read(self, path: Path, *, trust: bool = False) -> Reopened:
        self.require("fp32", None)
        with open_regular(path):
            pass  # raises where it is a named pipe, or cannot be read
        try:
            session = session_of(path)
        except Exception as error:  # onnxruntime's own classes, of which it exports none
            raise UserError(f"{path} is not a model that onnxruntime reads: {str(error)[:300]}") from error
        takes, gives = (
            [Port(found.name, found.shape, found.type == "tensor(float)") for found in ports]
            for ports in (session.get_inputs(), session.get_outputs())
        )
        said = session.get_modelmeta().custom_metadata_map
        compute = partial(outputs_of, session)
        return reopened(path, GraphFile(said, takes, gives, compute))

    def chosen(self, path: Path) -> dict[str, Any]:
        import onnx

        found = onnx.load(str(path), load_external_data=False).opset_import
        return {"opset": next(int(entry.version) for entry in found if entry.domain in ("", "ai.onnx"))}

    def how(self, path: Path) -> str:
        return f"python {path.with_name(self.beside(path.name)[0])} IMAGE…   (needs onnxruntime, numpy and pillow)"


def session_of(path: Path) -> Any:
    """A file in onnxruntime, on as many threads of the CPU as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it cannot compute beforehand in fp16
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs_of(session: Any, names: Sequence[str], images: Tensor) -> list[Tensor]:
    """The outputs of these names for images (B, C, H, W)."""
    return [torch.from_numpy(values) for values in session.run(list(names), {"images": images.numpy()})]
