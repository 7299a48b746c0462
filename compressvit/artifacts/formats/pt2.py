"""A program of `torch.export`, for Python without compressvit and timm, for AOTInductor, and for what else takes such programs.

Such a file is a program, and an archive that may hold pickles: reading one can run any code (`torch.export.load`). Beside ours lies a file
with its checksum, NAME.pt2.sha256, as `sha256sum` writes it, and a file is read again only where it has that checksum, or is trusted. A
checksum says that a file is the one that was exported, and not who made the two.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressvit.artifacts.archive import NotInspected, inspected
from compressvit.artifacts.export import quiet
from compressvit.artifacts.exported_model import GraphFile, Port, Reopened, reopened
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files
from compressvit.errors import UserError, switch
from compressvit.files import write_text
from compressvit.reading import Unreadable, open_regular, read_text

METADATA = "compressvit.json"  # among the extra files of the archive


@format_of_files("pt2")
class PT2(Format):
    """One file, and its checksum beside it."""

    title = "pt2 (torch.export)"
    suffix = ".pt2"
    reads = True
    runtime = "torch"

    def beside(self, name: str) -> list[str]:
        return [f"{name}.sha256"]

    def write(self, source: Source, path: Path) -> None:
        program = source.graph.program
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # long, and with paths of this machine
            node.meta.pop("nn_module_stack", None)
        program.example_inputs = None
        torch.export.save(program, path, extra_files={METADATA: json.dumps(source.metadata, indent=2)})
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write_text(path.with_name(self.beside(path.name)[0]), f"{digest}  {path.name}\n")

    def open(self, path: Path, source: Source) -> nn.Module:
        module = torch.export.load(path).module()
        return Opened(lambda images: module(images))  # not the module itself, which has no eval mode to be put into

    def read(self, path: Path, *, trust: bool = False) -> Reopened:
        with open_regular(path) as file:
            content = file.read()
        if not trust:
            content = self._require_ours(path, content)
        extra = {METADATA: ""}
        try:
            with warnings.catch_warnings(), quiet("torch.export"):
                warnings.simplefilter("ignore")
                program = torch.export.load(io.BytesIO(content), extra_files=extra)
            module = program.module()
        except Exception as error:  # whatever torch meets in a damaged one
            reason = (str(error).splitlines() or [""])[0][:300]
            raise UserError(f"{path} is not a program that torch reads: {type(error).__name__}: {reason}") from error
        said = _said(extra[METADATA])
        takes, gives = _ports(program, said)

        def compute(names: Sequence[str], images: Tensor) -> list[Tensor]:
            found = module(images)
            by_name = dict(
                zip((port.name for port in gives), [found] if isinstance(found, Tensor) else found, strict=True)
            )
            return [by_name[name] for name in names]

        return reopened(path, GraphFile(said, takes, gives, compute))

    def _require_ours(self, path: Path, content: bytes) -> bytes:
        """The archive to read: of what was inspected alone.

        Raises:
            UserError: the file has not the checksum that an export wrote beside it, or holds what none writes.
        """
        sidecar = path.with_name(self.beside(path.name)[0])
        why = "reading a .pt2 can run code that is in it"
        ways = f"export it again, or give {switch('trust')} where you trust whoever made it"
        try:
            expected = read_text(sidecar, most=4096).split()
        except Unreadable as error:
            missing = f"there is no {sidecar.name} beside it, with the checksum that `compressvit export` writes"
            raise UserError(
                f"{path} is not opened: {why}, and {missing if error.missing else error}; {ways}"
            ) from error
        if not expected or expected[0] != hashlib.sha256(content).hexdigest():
            raise UserError(
                f"{path} is not opened: {why}, and its checksum is not that in {sidecar.name}, so it is not what was exported; {ways}"
            )
        try:
            return inspected(content)
        except NotInspected as fault:
            raise UserError(
                f"{path} is not opened: {why}, and {fault}, which no export of compressvit with this torch writes; {ways}"
            ) from fault

    def how(self, path: Path) -> str:
        return f"torch.export.load('{path}').module()(images)"


def _said(text: str) -> dict[str, str]:
    """The metadata of an archive; none where they are not as we write them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str)} if isinstance(content, dict) else {}


def _ports(program: Any, said: dict[str, str]) -> tuple[list[Port], list[Port]]:
    """What a program takes, and what it gives under the names of its metadata: those of the graph are no user's."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    takes = [_port("images" if i == 0 else name, values.get(name)) for i, name in enumerate(signature.user_inputs)]
    try:
        names = json.loads(said.get("outputs", "[]"))
    except (ValueError, RecursionError):
        names = []
    gives = [_port(str(name), values.get(node)) for name, node in zip(names, signature.user_outputs, strict=False)]
    return takes, gives


def _port(name: str, value: Any) -> Port:
    """An input or output; a side that varies is no number."""
    if not isinstance(value, Tensor):
        return Port(name, (), is_float32=False)
    return Port(name, [side if isinstance(side, int) else None for side in value.shape], value.dtype == torch.float32)
