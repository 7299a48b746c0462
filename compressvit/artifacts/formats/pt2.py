"""A program of `torch.export`, for Python without compressvit and timm, for AOTInductor, and for what else takes such programs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files

METADATA = "compressvit.json"  # among the extra files of the archive


@format_of_files("pt2")
class PT2(Format):
    """One file."""

    title = "pt2 (torch.export)"
    suffix = ".pt2"
    runtime = "torch"

    def write(self, source: Source, path: Path) -> None:
        program = source.graph.program
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # long, and with paths of this machine
            node.meta.pop("nn_module_stack", None)
        program.example_inputs = None
        torch.export.save(program, path, extra_files={METADATA: json.dumps(source.metadata, indent=2)})

    def open(self, path: Path, source: Source) -> nn.Module:
        module = torch.export.load(path).module()
        return Opened(lambda images: module(images))  # not the module itself, which has no eval mode to be put into

    def how(self, path: Path) -> str:
        return f"torch.export.load('{path}').module()(images)"
