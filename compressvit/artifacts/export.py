"""A model as one graph for other programs: `torch.export`, and ONNX.

The graph takes any number of images of one size, and computes what the model does in eval mode; of a detector, its detections. Models with
`low_rank`, shared weights and adapters are exported as they are; `materialise` or `merge` them before, where plain layers are wanted.
`compressvit export` writes such graphs, and other formats (`compressvit.artifacts.formats`), and compares each file with the model.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import re
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compressvit.errors import UserError, option
from compressvit.files import disk_faults, put
from compressvit.model import surgery
from compressvit.model.modes import evaluating
from compressvit.tasks.base import Task, task_of

PACKAGES = ("onnx", "onnxscript")
SEAL = "export.json"  # in a folder that `compressvit export` wrote: the metadata; only such a folder is replaced
_REASON = 300  # characters of what an exporter says
DYNAMIC, STATIC = INTEGERS = (
    "int8",
    "int8-static",
)  # with scales of every batch, and with those of images measured beforehand
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGE = 1024  # numbers: what needs no image is computed beforehand, unless it or one of its parts has more than that


class Graph(NamedTuple):
    """A model as a program of `torch.export` from images (B, C, H, W) to tensors, and the names of these."""

    program: torch.export.ExportedProgram
    names: tuple[str, ...]


class InPrecision(nn.Module):
    """A model of lower precision, from images in float32 to outputs in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Any:
        found = self.model(images.to(self.dtype))
        return _in_float32(found) if isinstance(found, Tensor) else tuple(map(_in_float32, found))


def _in_float32(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values


def exported(model: nn.Module, images: Tensor, task: Task | None = None, *, precision: str = "fp32") -> Graph:
    """A model as a graph, which computes without compressvit.

    Args:
        model: any model that compressvit trains; it is not changed.
        images: (B, C, H, W) as the model takes them. The graph takes batches of any other B, of the same C, H, W and kind.
        task: what the outputs mean; None: the model's. Of classes the graph gives logits (B, classes), of classes of pixels
            logits (B, classes, H, W); of detection `boxes` (B, 100, 4),
            (x0, y0, x1, y1) in widths and heights of the image, `scores` (B, 100), falling, and `labels` (B, 100), all zero after an
            image's last detection, of which a small AdaMixer has no more than queries × classes; of a model of masks also `masks`
            (B, 100, 28, 28), the probability that a point of the box belongs to the object.
        precision: 'fp32': the model as it is; 'fp16', 'bf16': weights and arithmetic of that, images and outputs in float32.

    Raises:
        UserError: `torch.export` cannot make a graph of it.
    """
    dtype = PRECISIONS[precision]
    lower = dtype != torch.float32
    task = task or task_of(model)
    module, names = task.graph(surgery.deep_copy(model).to(dtype) if lower else model)
    if lower:
        module = InPrecision(module, dtype)
    two = images[:1].expand(2, -1, -1, -1).contiguous()  # a batch of one would stay one
    faults = conversion_faults(f"a graph in {precision}")
    with evaluating(module), _mask_units_unfused(module), torch.no_grad(), warnings.catch_warnings(), faults:
        if lower:
            module(two)  # torchvision's anchors take over the precision now, which they may not while a graph is made
        warnings.filterwarnings("ignore", ".*create_unbacked_symint.* is deprecated")  # torchvision's nms
        program = torch.export.export(module, (two,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    return Graph(program, names)


@contextmanager
def _mask_units_unfused(module: nn.Module) -> Iterator[None]:
    """Within, attention in Hiera's mask units is computed step by step: fused it has five dimensions, and ONNX's has four."""
    found = [m for m in module.modules() if getattr(m, "use_mask_unit_attn", False) and getattr(m, "fused_attn", False)]
    for attention in found:
        vars(attention)["fused_attn"] = False
    try:
        yield
    finally:
        for attention in found:
            vars(attention)["fused_attn"] = True


@contextmanager
def conversion_faults(what: str) -> Iterator[None]:
    """Turn the errors of an exporter into a `UserError` with what they begin with: what it can make depends on the model, which may be
    anybody's, and on its version."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # exporters' classes have no common base, and what they meet is anybody's model
        words = re.sub(r"Check '.+?' failed at \S+:", "", str(error)).split()  # OpenVINO's own source
        reason = textwrap.shorten(" ".join(words) or type(error).__name__, _REASON, placeholder=" …").rstrip(".")
        raise UserError(
            f"this model could not be made into {what}: {reason}. Try another {option('to')} or {option('precision')}"
        ) from error


def require_packages(what: str, names: Sequence[str], install: str) -> None:
    """Raise a `UserError` with the command that installs them if some of the packages are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install {install}")


def write_onnx(
    graph: Graph, file: Path, *, opset: int | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a graph in ONNX: from `images` to tensors with the graph's names.

    A weight that layers share is in it once, and the parts of a weight that is a sum or product stay parts: the file is little larger than
    the model's numbers.

    Args:
        file: is replaced as a whole, or not at all. Above 1.5 GiB torch puts the weights of a model into a second file, here FILE.data in
            the same folder, which is replaced first; who moves one moves both.
        opset: version of ONNX's operators; None: torch's own choice.
        metadata: is kept in the file (`metadata_props`).

    Raises:
        UserError: a package is missing, torch writes no such opset, or the file cannot be written.
    """
    require_packages("ONNX", PACKAGES, "'compressvit[onnx]'")
    written = onnx_program(graph, opset=opset, metadata=metadata)
    with replacing(file) as scratch:
        written.save(scratch / file.name)


def onnx_program(graph: Graph, *, opset: int | None = None, metadata: Mapping[str, str] | None = None) -> Any:
    """A graph as torch's program in ONNX, which has a method `save`; see `write_onnx`, which has the arguments and what is raised."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize_ir

    with torch.no_grad(), warnings.catch_warnings(), quiet("onnxscript"), conversion_faults("ONNX"):
        # with gradients attention would come apart otherwise than in the program
        warnings.simplefilter("ignore")  # onnxscript's of its own use of torch
        written = torch.onnx.export(
            graph.program,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=opset,
            input_names=["images"],
            output_names=list(graph.names),
        )
        assert written is not None, "dynamo gives a program"
        # torch's own call would compute the effective weight of every low-rank or shared layer, and store that
        optimize_ir(written.model, input_size_limit=LARGE, output_size_limit=LARGE)
    take_rows(written.model.graph)
    common.DeduplicateInitializersPass(size_limit=2**40)(written.model)
    common.ClearMetadataAndDocStringPass()(written.model)  # the stack of every operation, with paths of this machine
    found = written.model.opset_imports[""]
    if opset is not None and found != opset:
        raise UserError(
            f"{option('opset', opset)}: torch {torch.__version__} writes this model in opset {found}, not in {opset}; leave it out, or "
            f"give one from 18 to {max(found, 20)}"
        )
    written.model.metadata_props.update(metadata or {})
    return written


def take_rows(graph: Any) -> None:
    """Let every `Gather` along the last axis of an ONNX graph take rows of the transpose instead.

    onnxruntime copies value by value along the last axis, which takes as long as a third of all products of a student with pivoted layers;
    transposing twice and copying rows takes a tenth of that.

    Args:
        graph: of onnx_ir; is changed.
    """
    import onnx_ir as ir

    transposed: dict[Any, Any] = {}  # several layers may take parts of one tensor
    for node in list(graph):
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) == 0:
            continue
        x, which = node.inputs
        if x.shape is None or which.shape is None or len(which.shape) != 1:
            continue
        rank = len(x.shape)
        if rank < 2 or node.attributes.get_int("axis", 0) % rank != rank - 1:
            continue
        swap = {"perm": [*range(rank - 2), rank - 1, rank - 2]}
        first = [] if x in transposed else [ir.node("Transpose", [x], attributes=swap)]
        rows = transposed.setdefault(x, first[0].outputs[0] if first else None)
        taken = ir.node("Gather", [rows, which], attributes={"axis": rank - 2})
        back = ir.node("Transpose", [taken.outputs[0]], attributes=swap)
        replaced = [*first, taken, back]
        ir.convenience.replace_nodes_and_values(graph, node, [node], replaced, node.outputs, back.outputs)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Without the warnings of a package's log: onnxscript's name operations that it leaves as they are, torch's have traces of files that
    are no programs."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder for what is to be `target` and the files beside it, under the names that they will have, since a graph names the file of
    its weights. At the end of the block they replace what is there, `target` itself last; where it raises, nothing is changed."""
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}."
        for left in target.parent.glob(f"{glob.escape(prefix)}*.part"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=target.parent) as folder:
            scratch = Path(folder)
            yield scratch
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == target.name):
                _move(path, target.with_name(path.name))


def _move(path: Path, target: Path) -> None:
    """Put a file, or the files of a folder, in the place of others."""
    if not path.is_dir():
        put(path, target)
        return
    target.mkdir(exist_ok=True)
    for file in sorted(
        path.iterdir(), key=lambda file: file.name != SEAL
    ):  # first, so that what is interrupted can be made again
        put(file, target / file.name)
