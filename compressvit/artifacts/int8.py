"""An ONNX file in int8, as onnxruntime rounds it: weights with a scale for each output, and what meets them with one of every batch
(dynamic), or with one that was measured on images beforehand (static).

Weights use 7 of the 8 bits (`reduce_range`): a processor without VNNI adds two products in 16 bits, which 8 bits exceed, and the file has
to compute the same wherever it is opened. On one with AVX2 alone, 8 bits made the largest error of four small models 1 to 12 times as large
(0.28 instead of 0.024 of the logits' range at worst).

Static files have pairs of QuantizeLinear and DequantizeLinear (QDQ), which OpenVINO and others read too.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from compressvit.artifacts.export import DYNAMIC, PACKAGES, STATIC, conversion_faults, quiet
from compressvit.errors import UserError, option

RUNTIME = (*PACKAGES, "onnxruntime")  # what writes such files, and opens them
_LARGEST = 0.75  # of the bytes of the file in float32; int8 is a quarter, and what is above is left as it is
_PIXELS = 4 * 224 * 224  # of the images that are measured at once, of which every tensor between layers is kept
_LAYERS = ("Conv", "MatMul", "Gemm")
_NAME = "ONNX in int8"  # to messages


def round_weights(path: Path) -> None:
    """Round the weights in a file to int8, a scale for each output; what meets them is rounded in every batch, with a scale of its own
    (onnxruntime's dynamic quantisation). A weight that layers share stays one.

    Raises:
        UserError: the file is in two parts, or few of its weights are those of a layer.
    """
    from onnxruntime import quantization

    before = path.stat().st_size
    _prepare(path, DYNAMIC)
    rounded = path.with_suffix(".rounded")
    with quiet("root"), conversion_faults(_NAME):  # it recommends a program to everybody
        quantization.quantize_dynamic(
            path,
            rounded,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=True,
            extra_options={"DefaultTensorType": 1},  # float, where the graph does not say
        )
    rounded.replace(path)
    _require_smaller(path.stat().st_size, before, DYNAMIC)


def round_weights_and_ranges(path: Path, batches: Sequence[Tensor]) -> None:
    """Round the weights in a file to int8, a scale for each output, and what meets them with scales measured on images (onnxruntime's
    static quantisation). A weight that layers share stays one.

    Layers of a stored weight are rounded: products of two activations, as in attention, and the outputs of layers stay in float32. On
    DINOv2-S that halves the error. Ranges are those of least relative entropy, which clip the few largest activations.

    Args:
        batches: images (B, C, H, W), normalised.

    Raises:
        UserError: the file is in two parts, or few of its weights are those of a layer.
    """
    import onnx
    from onnxruntime import quantization

    before = path.stat().st_size
    _prepare(path, STATIC)
    with TemporaryDirectory() as folder, quiet("root"), conversion_faults(_NAME):
        prepared, rounded = Path(folder) / "prepared.onnx", Path(folder) / "rounded.onnx"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            # what it calls optimisation would store what is computed of weights, layer by layer
            quantization.quant_pre_process(str(path), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
            names = _layers_of_stored_weights(onnx.load(str(prepared)).graph)
            quantization.quantize_static(
                prepared,
                rounded,
                _Reader(batches),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(_LAYERS),
                nodes_to_quantize=list(names),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                reduce_range=True,
                calibrate_method=quantization.CalibrationMethod.Entropy,
                extra_options={
                    "CalibStridedMinMax": 1,  # batches at once, whatever the method
                    "OpTypesToExcludeOutputQuantization": list(_LAYERS),
                },
            )
        made = onnx.load(str(rounded))
        del made.graph.value_info[:]  # shapes that were needed to measure
        onnx.save(made, str(path))
    _require_smaller(path.stat().st_size, before, STATIC)


class _Reader:
    """Images as onnxruntime's calibration asks for them."""

    def __init__(self, batches: Sequence[Tensor]):
        images = torch.cat(list(batches))
        self._parts = images.split(max(1, _PIXELS // (images.shape[-2] * images.shape[-1])))
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return len(self._parts)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._parts[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._left, None)
        return None if part is None else {"images": part.numpy()}


def _layers_of_stored_weights(graph: Any) -> Mapping[str, int]:
    """Names of the layers whose weight the file holds, and the bytes of each weight, with none where an earlier layer has the same."""
    import onnx

    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
    }
    found, seen = {}, set()
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type in _LAYERS else None
        if weight is not None and (node.op_type == "Conv" or len(weight.dims) == 2):
            found[node.name] = 0 if weight.name in seen else weight.ByteSize()
            seen.add(weight.name)
    return found


def _prepare(path: Path, precision: str) -> None:
    """Store weights as they are used, and raise a `UserError` where little of the file is weights of layers."""
    import onnx

    if path.with_name(f"{path.name}.data").exists():
        raise UserError(
            f"{option('precision', precision)}: onnxruntime rounds models in one file, and this one, above 1.5 GiB, needs two; use fp16"
        )
    before = path.stat().st_size
    _store_transposed(path)
    layers = _layers_of_stored_weights(onnx.load(str(path)).graph)
    _require_smaller(before - 3 * sum(layers.values()) // 4, before, precision)


def _require_smaller(after: int, before: int, precision: str) -> None:
    if after > _LARGEST * before:
        raise UserError(
            f"{option('precision', precision)}: onnxruntime finds few weights to round in this model, and its file would have {after:,} of "
            f"{before:,} bytes; use fp16, or the step `quantise`; where that has rounded it already, leave the precision out"
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
