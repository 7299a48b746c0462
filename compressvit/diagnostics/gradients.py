"""ℓ2 norms of the gradient over training: per block and per kind of parameter, shared tensors per use (MiniViT, figure 4).

Paper: MiniViT: Compressing Vision Transformers with Weight Multiplexing, CVPR 2022, https://arxiv.org/abs/2204.07154

Norms are those of the accumulated gradient of an optimiser step, before clipping. For a shared tensor, only the gradient of the block's
own use counts in the block's norm, so norms of blocks with and without sharing are comparable.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.data.input import Side
from compressvit.diagnostics.base import FOLDER, Watched, diagnostic, refuse_compiled
from compressvit.diagnostics.gradient_findings import gradient_findings
from compressvit.diagnostics.uses import Uses
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe, family_of, head_names
from compressvit.rows import append_row, read_rows, rewrite_rows
from compressvit.training.spec import Training
from compressvit.training.terms.base import OF_TERMS

ROWS = "gradients.jsonl"
GROUPS = ("attention", "MLP", "norms", "transforms", "embeddings", "head", "other")
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token", "downsample", "stem")


class GradientRow(BaseModel):
    """A row of `gradients.jsonl`.

    Attributes:
        norms: by layer and kind of parameter.
        shared: by block, for the tensors that it shares: the gradient norm of its `own` use, and that of the `sum` over all uses, which is
            in `.grad`.
    """

    phase: str
    epoch: int
    step: int
    norms: dict[str, dict[str, float]]
    shared: dict[str, dict[Literal["own", "sum"], float]]


@diagnostic("gradients")
class Gradients(Watched):
    """Norms of the gradient over training, per block and per kind of parameter; shared tensors per use."""

    every: int = Field(
        10, ge=1, description="Record every this many optimiser steps; the first step of a phase is always recorded."
    )

    def summary(self) -> str:
        return f"every {self.every} optimiser steps" if self.every > 1 else "every optimiser step"

    def refuse(self, phase: Training, student: Side, teacher: Side | None) -> None:
        refuse_compiled(self.name, phase)

    def watch(self, model: nn.Module, phase: str, folder: Path) -> GradientWatch:
        return GradientWatch(model, phase, folder / ROWS, self.every)


class GradientWatch:
    """Writes a `GradientRow` every `every` steps of one phase.

    Args:
        model: hooks are registered on blocks that share; `close` removes them.
        phase: name of the phase.
        path: file of the rows; rows of other phases are kept.
        every: interval in optimiser steps; step 1 is always recorded.
    """

    def __init__(self, model: nn.Module, phase: str, path: Path, every: int):
        self._model, self._phase, self._path, self._every = model, phase, path, every
        self._places = places(model)
        blocks = [info.path for info in describe(model).blocks] if family_of(model) else []
        self._uses = Uses(model, blocks)
        self._begun = False

    def before(self, steps: int) -> None:
        if not self._begun:
            self._begin(steps)
        self._uses.recording = self._due(steps + 1)

    def after(self, step: int, epoch: int, scale: float) -> None:
        if not self._due(step):
            return
        row = self._row(step, epoch, scale)
        self._uses.clear()
        if row is not None:
            append_row(self._path, row)

    def findings(self) -> list[Finding]:
        rows = read_rows(self._path, GradientRow) if self._path.is_file() else []
        return gradient_findings([row.model_dump() for row in rows]) if rows else []

    def close(self) -> None:
        self._uses.close()

    def _due(self, step: int) -> bool:
        return step == 1 or step % self._every == 0

    def _begin(self, steps: int) -> None:
        """Drop rows of steps that will be repeated, because the run stopped after its last checkpoint."""
        self._begun = True
        if self._path.is_file():
            rows = read_rows(self._path, GradientRow)
            rewrite_rows(self._path, (row for row in rows if row.phase != self._phase or row.step <= steps))

    def _row(self, step: int, epoch: int, scale: float) -> GradientRow | None:
        """The row of a step; None if a norm is not finite, in which case mixed precision skips the step."""
        named = self._model.named_parameters()
        tensors = {name: p.grad for name, p in named if name in self._places and p.grad is not None}
        found = [
            torch.linalg.vector_norm(g, dtype=torch.float64 if g.device.type != "mps" else None)  # MPS has no float64
            for g in [*tensors.values(), *self._uses.gradients.values()]
        ]
        values = torch.stack(found).tolist() if found else []  # a single synchronisation with the device
        if not all(map(math.isfinite, values)):
            return None
        sums = dict(zip(tensors, values[: len(tensors)], strict=True))
        own = dict(zip(self._uses.gradients, (v / scale for v in values[len(tensors) :]), strict=True))

        shared: dict[str, dict[Literal["own", "sum"], float]] = {}
        for path, names in self._uses.names.items():
            if names:
                whole = [sums.get(first, 0.0) for first in names]
                uses = [own.get(name, 0.0) for name in names.values()]
                shared[path] = {"own": math.hypot(*uses), "sum": math.hypot(*whole)}
        per_use = {first for names in self._uses.names.values() for first in names}
        norms: dict[str, dict[str, float]] = {layer: {} for layer, _ in self._places.values()}
        for name, value in [*((n, v) for n, v in sums.items() if n not in per_use), *own.items()]:
            layer, group = self._places[name]
            norms[layer][group] = math.hypot(norms[layer].get(group, 0.0), value)
        known = {layer: groups for layer, groups in norms.items() if groups}
        return GradientRow(phase=self._phase, epoch=epoch, step=step, norms=known, shared=shared)


def gradient_rows(run: Path, phase: str | None = None, *, last: bool = False) -> list[dict[str, Any]]:
    """The rows that a run recorded.

    Args:
        run: the run folder; the run need not be finished.
        phase: return only the rows of this phase.
        last: without `phase`, return only the rows of the last phase that has any.

    Raises:
        UserError: the run recorded no rows, or none of that phase.
    """
    path = run / FOLDER / ROWS
    rows = read_rows(path, GradientRow) if path.is_file() else []
    if not rows:
        raise UserError(
            f"{run} has no gradients; a run records them if its recipe has `diagnostics: [gradients]`, e.g. "
            "compressvit apply RECIPE 'diagnostics=[gradients]'"
        )
    known = list(dict.fromkeys(row.phase for row in rows))
    if phase is not None and phase not in known:
        raise UserError(f"{run} has no gradients of a phase {phase!r}; it has those of {', '.join(known)}")
    wanted = phase or (known[-1] if last else None)
    return [row.model_dump() for row in rows if wanted in (None, row.phase)]


def places(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Layer and kind (of `GROUPS`) of every parameter, a shared one under each of its names, in the order of the model; of what its loss
    terms train, none.

    Layers are blocks, named by their paths, and modules outside of blocks, e.g. 'patch_embed' or 'layers.1.downsample'.
    """
    blocks = [info.path for info in describe(model).blocks] if family_of(model) else []
    head = head_names(model)
    added = surgery.added_parameters(model)
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, own = name.rpartition(".")
        if name.startswith(f"{OF_TERMS}."):
            continue
        layer = next((block for block in blocks if name.startswith(f"{block}.")), None) or _outside(name)
        kind = type(model.get_submodule(path)).__mro__
        if name in added:
            group = "transforms"
        elif name in head:
            group = "head"
        elif any(word in name.split(".") for word in _EMBEDDINGS):
            group = "embeddings"
        elif own == "gamma" or any(c.__name__.endswith(("Norm", "Norm2d", "LayerScale")) for c in kind):
            group = "norms"
        elif f"{layer}.attn." in name:
            group = "attention"
        elif f"{layer}.mlp." in name:
            group = "MLP"
        else:
            group = "other"
        found[name] = (layer, group)
    return found


def _outside(name: str) -> str:
    """The layer of a parameter outside of the blocks."""
    parts = name.split(".")
    numbered = len(parts) > 3 and parts[1].isdecimal()
    return ".".join(parts[: (3 if parts[2] == "downsample" else 2) if numbered else 1])
