"""A model as one graph for other programs: `torch.export`, and ONNX.

The graph takes any number of images of one size, and computes what the model does in eval mode; of a detector, its detections. Models with
`low_rank`, shared weights and adapters are exported as they are; `materialise` or `merge` them before, where plain layers are wanted.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.files import disk_faults
from compressvit.model.modes import evaluating
from compressvit.tasks.base import Task, task_of

PACKAGES = ("onnx", "onnxscript")


class Graph(NamedTuple):
    """A model as a program of `torch.export` from images (B, C, H, W) to tensors, and the names of these."""

    program: torch.export.ExportedProgram
    names: tuple[str, ...]


def exported(model: nn.Module, images: Tensor, task: Task | None = None) -> Graph:
    """A model as a graph, which computes without compressvit.

    Args:
        model: any model that compressvit trains; it is not changed.
        images: (B, C, H, W) as the model takes them. The graph takes batches of any other B, of the same C, H, W and kind.
        task: what the outputs mean; None: the model's. Of classes the graph gives logits (B, classes); of detection `boxes` (B, 100, 4),
            (x0, y0, x1, y1) in widths and heights of the image, `scores` (B, 100), falling, and `labels` (B, 100), all zero after an
            image's last detection, of which a small AdaMixer has no more than queries × classes; of a model of masks also `masks`
            (B, 100, 28, 28), the probability that a point of the box belongs to the object.
    """
    module, names = (task or task_of(model)).graph(model)
    two = images[:1].expand(2, -1, -1, -1).contiguous()  # a batch of one would stay one
    with evaluating(module), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint.* is deprecated")  # torchvision's nms
        program = torch.export.export(module, (two,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    return Graph(program, names)


def write_onnx(graph: Graph, file: Path) -> None:
    """Write a graph in ONNX: from `images` to tensors with the graph's names.

    Args:
        file: is replaced as a whole, or not at all. Above 1.5 GiB torch puts the weights of a model into a second file, here FILE.data in
            the same folder, which is replaced first; who moves one moves both.

    Raises:
        UserError: a package is missing, or the file cannot be written.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'compressvit[onnx]'")
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
    ):  # with gradients attention would come apart otherwise than in the program
        warnings.simplefilter("ignore")  # onnxscript's of its own use of torch
        written = torch.onnx.export(
            graph.program, dynamo=True, verbose=False, input_names=["images"], output_names=list(graph.names)
        )
    assert written is not None, "dynamo gives a program"
    with disk_faults(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{file.name}."
        for left in file.parent.glob(f"{glob.escape(prefix)}*.part"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        # in a folder of its own under its own name, because the graph names the file of its weights
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=file.parent) as scratch:
            written.save(Path(scratch) / file.name)
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == file.name):  # itself last
                os.replace(path, file.with_name(path.name))
