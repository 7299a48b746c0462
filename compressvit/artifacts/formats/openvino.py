"""OpenVINO's own format, for Intel's processors: a file of the graph, and its weights beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from compressvit.artifacts.export import STATIC, conversion_faults, onnx_program, require_packages
from compressvit.artifacts.exported_model import GraphFile, Port, Reopened, reopened
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files
from compressvit.artifacts.int8 import RUNTIME, round_weights_and_ranges
from compressvit.errors import UserError
from compressvit.reading import open_regular

# what is compared: on processors with bfloat16 OpenVINO computes in that, unless it is told otherwise
_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@format_of_files("openvino")
class OpenVINO(Format):
    """NAME.xml and NAME.bin."""

    title = "OpenVINO"
    suffix = ".xml"
    packages = ("openvino",)
    install = "'compressvit[openvino]'"
    precisions = ("fp32", "fp16", STATIC)
    computes = False
    reads = True
    runtime = "openvino"

    def require(self, precision: str, opset: int | None) -> None:
        super().require(precision, opset)
        if precision == STATIC:
            require_packages(f"{self.title} in int8", RUNTIME, "'compressvit[onnx]'")

    def parts(self, name: str) -> list[str]:
        return [f"{name.removesuffix(self.suffix)}.bin"]

    def write(self, source: Source, path: Path) -> None:
        import openvino

        with conversion_faults("OpenVINO's graph"):
            model = _rounded(source) if source.precision == STATIC else openvino.convert_model(_in_fp32(source).program)
            model.reshape([-1, *source.input.size])
            model.input(0).get_tensor().set_names({"images"})
            for output, name in zip(model.outputs, source.reference[1], strict=True):
                output.get_tensor().set_names({name})
            for key, value in source.metadata.items():
                model.set_rt_info(value, ["compressvit", key])
            openvino.save_model(model, path, compress_to_fp16=source.precision == "fp16")

    def open(self, path: Path, source: Source) -> nn.Module:
        compiled, names = _compiled(path), source.reference[1]
        return Opened(lambda images: _outputs_of(compiled, names, images))

    def read(self, path: Path, *, trust: bool = False) -> Reopened:
        self.require("fp32", None)
        for name in (path.name, *self.parts(path.name)):
            with open_regular(path.with_name(name)):
                pass  # raises where it is missing, a named pipe, or cannot be read
        try:
            compiled, said = _compiled(path), _metadata(path)
            takes, gives = ([_port(found) for found in ports] for ports in (compiled.inputs, compiled.outputs))
        except Exception as error:  # OpenVINO's own classes, and whatever its parser meets
            raise UserError(f"{path} is not a model that OpenVINO reads: {str(error)[:300]}") from error
        return reopened(path, GraphFile(said, takes, gives, partial(_outputs_of, compiled)))

    def how(self, path: Path) -> str:
        return f"openvino.Core().compile_model('{path}', 'CPU', {_IN_FLOAT32})"


def _compiled(path: Path) -> Any:
    import openvino

    settings = {**_IN_FLOAT32, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino.Core().compile_model(path, "CPU", settings)


def _outputs_of(compiled: Any, names: Sequence[str], images: Tensor) -> list[Tensor]:
    """The outputs of these names for images (B, C, H, W)."""
    found = compiled(images.numpy())
    return [torch.from_numpy(found[name].copy()) for name in names]


def _metadata(path: Path) -> dict[str, str]:
    import openvino

    graph: Any = openvino.Core().read_model(path)
    if not graph.has_rt_info(["compressvit"]):
        return {}
    return {key: value.astype(str) for key, value in graph.get_rt_info(["compressvit"]).astype(dict).items()}


def _port(found: Any) -> Port:
    sides = [side.get_length() if side.is_static else None for side in found.partial_shape]
    return Port(next(iter(sorted(found.names)), ""), sides, found.element_type.get_type_name() == "f32")


def _rounded(source: Source) -> Any:
    """The graph in int8, of the file in ONNX."""
    import openvino

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx_program(source.graph).save(file)
        round_weights_and_ranges(file, source.calibration)
        return openvino.convert_model(file)


def _in_fp32(source: Source) -> Any:
    """The graph with weights in float32: OpenVINO rounds those itself, and computes in what suits the processor."""
    from dataclasses import replace

    return replace(source, precision="fp32").graph
