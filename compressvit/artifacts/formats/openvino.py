"""OpenVINO's own format, for Intel's processors: a file of the graph, and its weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressvit.artifacts.export import conversion_faults
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files

# what is compared: on processors with bfloat16 OpenVINO computes in that, unless it is told otherwise
_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@format_of_files("openvino")
class OpenVINO(Format):
    """NAME.xml and NAME.bin."""

    title = "OpenVINO"
    suffix = ".xml"
    packages = ("openvino",)
    install = "'compressvit[openvino]'"
    precisions = ("fp32", "fp16")
    computes = False
    runtime = "openvino"

    def beside(self, name: str) -> list[str]:
        return [f"{name.removesuffix(self.suffix)}.bin"]

    def write(self, source: Source, path: Path) -> None:
        import openvino

        with conversion_faults("OpenVINO's graph"):
            model = openvino.convert_model(_in_fp32(source).program)
            model.reshape([-1, *source.input.size])
            model.input(0).get_tensor().set_names({"images"})
            for output, name in zip(model.outputs, source.reference[1], strict=True):
                output.get_tensor().set_names({name})
            for key, value in source.metadata.items():
                model.set_rt_info(value, ["compressvit", key])
            openvino.save_model(model, path, compress_to_fp16=source.precision == "fp16")

    def open(self, path: Path, source: Source) -> nn.Module:
        import openvino

        settings = {**_IN_FLOAT32, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled: Any = openvino.Core().compile_model(path, "CPU", settings)

        def call(images: Tensor) -> list[Tensor]:
            found = compiled(images.numpy())
            return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

        return Opened(call)

    def how(self, path: Path) -> str:
        return f"openvino.Core().compile_model('{path}', 'CPU', {_IN_FLOAT32})"


def _in_fp32(source: Source) -> Any:
    """The graph with weights in float32: OpenVINO rounds those itself, and computes in what suits the processor."""
    from dataclasses import replace

    return replace(source, precision="fp32").graph
