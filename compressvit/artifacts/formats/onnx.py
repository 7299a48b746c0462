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
from compressvit.artifacts.export import PACKAGES, conversion_faults, onnx_program, quiet
from compressvit.artifacts.exported_model import GraphFile, Port, Reopened, reopened
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files
from compressvit.errors import UserError, option
from compressvit.reading import open_regular


@format_of_files("onnx")
class ONNX(Format):
    """One file; above 1.5 GiB the weights are in a second one."""

    title = "ONNX"
    suffix = ".onnx"
    packages = (*PACKAGES, "onnxruntime")
    install = "'compressvit[onnx]'"
    precisions = ("fp32", "fp16", "int8")
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
        if source.precision == "int8":
            round_weights(path)
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


def round_weights(path: Path) -> None:
    """Round the weights in a file to int8, a scale for each output; what meets them is rounded in every batch, with a scale of its own
    (onnxruntime's dynamic quantisation). A weight that layers share stays one."""
    from onnxruntime import quantization

    if path.with_name(f"{path.name}.data").exists():
        raise UserError(
            f"{option('precision', 'int8')}: onnxruntime rounds models in one file, and this one needs two, being above 1.5 GiB; use fp16"
        )
    rounded, before = path.with_suffix(".rounded"), path.stat().st_size
    _store_transposed(path)
    with quiet("root"), conversion_faults("ONNX in int8"):  # it recommends a program to everybody
        quantization.quantize_dynamic(
            path,
            rounded,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": 1},  # float, where the graph does not say
        )
    rounded.replace(path)
    if (after := path.stat().st_size) > 0.75 * before:
        raise UserError(
            f"{option('precision', 'int8')}: onnxruntime finds few weights to round in this model, and its file would have {after:,} of "
            f"{before:,} bytes; use fp16, or the step `quantise`"
        )


def _store_transposed(path: Path) -> None:
    """Store weights that a file holds in one arrangement and uses in the other, as those that layers share, as they are used: what rounds
    weights takes stored ones alone."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    turned = [node for node in turned if len(stored[node.input[0]].dims) == 2]
    others = {name for node in graph.node if node not in turned for name in node.input}
    made: dict[str, str] = {}  # names of the results, by that of the weight
    renamed: dict[str, str] = {}
    for node in turned:
        source = node.input[0]
        if source not in made:
            made[source] = node.output[0]
            values = numpy_helper.to_array(stored[source]).T.copy()
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        renamed[node.output[0]] = made[source]
        graph.node.remove(node)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    for source in made.keys() - others:
        graph.initializer.remove(stored[source])
    onnx.save(model, str(path))


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
