"""Fit the layers of a student in the order they run, each on what the fitted layers before it produce.

Fitted one by one, every layer assumes that all others are the teacher's, and the errors of a deep model add up. Here a layer sees the
student's own inputs x and is asked for the teacher's outputs y, so it also undoes what the layers before it lost. Where a layer ends a
residual branch, y is what makes the sum with the student's residual stream the teacher's. (Asymmetric reconstruction: Zhang et al.,
https://arxiv.org/abs/1505.06798, section 3.3; for transformers e.g. SVD-LLM, https://arxiv.org/abs/2403.07378, section 3.3.)

Only second moments are kept of a layer; the hidden states between blocks wait on the disk, so memory does not grow with images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressvit.backbone import describe
from compressvit.errors import UserError
from compressvit.files import disk_faults
from compressvit.lowrank import Tensor
from compressvit.source import frozen, not_finite

# The linear layer that ends each residual branch of a timm block: the branch's norm, the branch, and the scale of its output.
BRANCHES = {"attn.proj": ("norm1", "attn", "ls1"), "mlp.fc2": ("norm2", "mlp", "ls2")}
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass
class Sums:
    """Sums over tokens of a layer's inputs x (in,) and wanted outputs y (out,), in float64 on the CPU, weighted."""

    weight: float = 0.0
    x: Any = 0.0  # (in,)
    y: Any = 0.0  # (out,)
    xx: Any = 0.0  # (in, in)
    yx: Any = 0.0  # (out, in)
    yy: float = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x (T, in), y (T, out), weights (T, 1)."""
        weighted = x * weights
        self.weight += weights.sum().item()
        self.x = self.x + weighted.sum(dim=0).cpu().double()
        self.y = self.y + (y * weights).sum(dim=0).cpu().double()
        self.xx = self.xx + (weighted.mT @ x).cpu().double()
        self.yx = self.yx + (y.mT @ weighted).cpu().double()
        self.yy += (y.square() * weights).double().sum().item()

    def __add__(self, other: Sums) -> Sums:
        names = self.__dataclass_fields__
        return Sums(*(getattr(self, n) + getattr(other, n) for n in names))

    def moments(self, centre: bool) -> tuple[Tensor, Tensor]:
        """E[xᵀx] (in, in) and E[yᵀx] (out, in); of deviations from the means, with `centre`."""
        xx, yx = self.xx / self.weight, self.yx / self.weight
        if centre:
            mean = self.x / self.weight
            xx, yx = xx - torch.outer(mean, mean), yx - torch.outer(self.y / self.weight, mean)
        return xx, yx


@dataclass
class Regression:
    """What one layer is to learn: sums over two sets of images, so that a ridge is judged by images it was not fitted to."""

    fitted: Sums = field(default_factory=Sums)
    held_out: Sums = field(default_factory=Sums)
    _images: int = 0

    def add(self, x: Tensor, y: Tensor, weights: Tensor, images: int) -> None:
        """Add the tokens of a batch of images, one after the other: x (…, in), y (…, out), weights (…, 1). One in four is held out."""
        held_out = (torch.arange(images, device=x.device) + self._images) % 4 == 3
        self._images += images
        tokens = [t.reshape(images, -1, t.shape[-1]) for t in (x, y, weights)]
        for sums, mask in ((self.fitted, ~held_out), (self.held_out, held_out)):
            if mask.any():
                sums.add(*(t[mask].flatten(0, 1) for t in tokens))

    def solve(self, prior: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The matrix (out, in) that predicts y from x best, with a ridge towards `prior`, and the moment E[xᵀx] (in, in) of errors in it.

        The ridge is the one of `RIDGES` that does best on the held-out images, or none of them: where that is `prior` itself, few
        images have nothing to teach.

        Args:
            prior: the teacher's weight (out, in).
            bias: None if the layer has none, or one that must not change; with a bias that may, only deviations from the means count.
        """
        centre = bias is not None
        best, chosen = None, RIDGES[-1]
        if self.held_out.weight:
            xx, yx = self.held_out.moments(centre)
            for ridge in RIDGES:
                found = _ridge_regression(*self.fitted.moments(centre), prior, ridge)
                error = ((found @ xx - 2 * yx) * found).sum().item()
                if best is None or error < best:
                    best, chosen = error, ridge
        xx, yx = (self.fitted + self.held_out).moments(centre)
        return _ridge_regression(xx, yx, prior, chosen), xx

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias (out,) beside `weight` (out, in)."""
        sums = self.fitted + self.held_out
        return (sums.y - weight @ sums.x) / sums.weight

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Of `x weightᵀ + bias`, relative to y: the root of the mean squares' ratio."""
        sums = self.fitted + self.held_out
        squares = sums.yy + ((weight @ sums.xx - 2 * sums.yx) * weight).sum().item()
        if bias is not None:
            b = bias.double().cpu()
            squares += (2 * (weight @ sums.x - sums.y) @ b + sums.weight * b.square().sum()).item()
        return (max(squares, 0.0) / max(sums.yy, torch.finfo(torch.float64).tiny)) ** 0.5


def _ridge_regression(xx: Tensor, yx: Tensor, prior: Tensor, ridge: float) -> Tensor:
    level = ridge * xx.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.linalg.solve(xx + level * torch.eye(len(xx), dtype=torch.float64), yx + level * prior, left=False)


class _Reached(Exception):
    """A forward pass came to the module it was run for."""


class _Spool:
    """One tensor a batch, kept on the disk between two passes."""

    def __init__(self, folder: Path, name: str):
        self._stem, self._count = folder / name, 0

    def append(self, tensor: Tensor) -> None:
        np.save(self._file(self._count), tensor.cpu().numpy())
        self._count += 1

    def replace(self, index: int, tensor: Tensor) -> None:
        np.save(self._file(index), tensor.cpu().numpy())

    def read(self, index: int, device: torch.device) -> Tensor:
        return torch.from_numpy(np.load(self._file(index))).to(device)

    def __len__(self) -> int:
        return self._count

    def _file(self, index: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}_{index}.npy")


class _Side:
    """Teacher or student on its way through the blocks, with the hidden states of every batch before the present one."""

    def __init__(self, model: nn.Module, folder: Path, name: str):
        self.model = model
        self.path = describe(model).blocks[0].path
        self._hidden = _Spool(folder, name)

    @property
    def block(self) -> nn.Module:
        return self.model.get_submodule(self.path)

    def enter(self, images: Tensor) -> None:
        """Append a batch."""
        self._hidden.append(_look(self.model, images, {self.path: "input"}, self.path)[self.path])

    def advance(self, following: str, device: torch.device) -> None:
        """Take every batch through the present block, up to the one at `following`."""
        stage, _, number = following.rpartition(".blocks.")
        name = f"blocks.{number}"
        for i in range(len(self._hidden)):
            x = self.block(self.hidden(i, device))
            if stage != self.path.rpartition(".blocks.")[0]:  # Swin's patch merging stands between stages
                x = _look(self.model.get_submodule(stage), x, {name: "input"}, name)[name]
            self._hidden.replace(i, x)
        self.path = following

    def hidden(self, index: int, device: torch.device) -> Tensor:
        return self._hidden.read(index, device)


def fit_in_order(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    paths: Sequence[str],
    fit: Callable[[str, Regression], None],
    prefix_weights: Mapping[str, float],
) -> None:
    """Walk both models block by block and call `fit(path, regression)` for every linear layer of `paths`, in the order they run.

    Args:
        student: whose layers are fitted; `fit` changes its values in place. It has the teacher's blocks, in float32, and is moved to
            the device of the batches.
        teacher: in float32, on the device of the batches.
        batches: images (B, C, H, W), read once.
        paths: linear layers within blocks.
        prefix_weights: for every path, how much a prefix (class) token counts in the sums, in tokens.

    Raises:
        UserError: there is no image, a layer sees numbers that are not finite, or the disk is full.
    """
    blocks = [info.path for info in describe(student).blocks]
    wanted = {b: [p.removeprefix(f"{b}.") for p in paths if p.startswith(f"{b}.")] for b in blocks}
    while not wanted[blocks[-1]]:
        blocks.pop()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compressvit-")))
        stack.enter_context(disk_faults(folder))
        stack.enter_context(frozen(student))
        stack.enter_context(frozen(teacher))
        ours, theirs = _Side(student, folder, "student"), _Side(teacher, folder, "teacher")
        count, device = 0, torch.device("cpu")
        for images in batches:
            count, device = count + 1, images.device
            student.to(device)
            ours.enter(images)
            theirs.enter(images)
        if not count:
            raise UserError("there is no calibration image")
        for position, block in enumerate(blocks):
            if position:
                ours.advance(block, device)
                theirs.advance(block, device)
            for name in _in_order(ours.block, ours.hidden(0, device), wanted[block]):
                regression = Regression()
                for i in range(count):
                    x, y = _tokens(ours.block, theirs.block, name, ours.hidden(i, device), theirs.hidden(i, device))
                    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
                        raise not_finite(f"{block}.{name}")
                    weights = torch.ones(*x.shape[:-1], 1, device=device)
                    if prefix := getattr(student, "num_prefix_tokens", 0):
                        weights[:, :prefix] = prefix_weights[f"{block}.{name}"]
                    regression.add(x, y, weights, images=len(ours.hidden(i, device)))
                fit(f"{block}.{name}", regression)


def _tokens(ours: nn.Module, theirs: nn.Module, name: str, h_ours: Tensor, h_theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs (…, in) of the student's layer `name` of a block, and the outputs (…, out) it should have."""
    norm, branch, scale = BRANCHES.get(name, ("", "", ""))
    also = {norm: "input"} if norm else {}
    seen = _look(ours, h_ours, also | {name: "input"}, name)
    aim = _look(theirs, h_theirs, also | {name: "output"}, name)
    wanted = aim[name]
    if norm:
        residual = _into(ours, norm, branch, h_ours, aim[norm] - seen[norm])
        wanted = _corrected(wanted, residual, getattr(ours, scale, None), getattr(theirs, scale, None))
    return seen[name], wanted


def _look(block: nn.Module, hidden: Tensor, wanted: dict[str, str], until: str) -> dict[str, Tensor]:
    """Run a block up to its module `until`, and return the inputs or outputs of the modules in `wanted`."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, io in wanted.items():

            def see(module: nn.Module, inputs: tuple, output: Tensor | None = None, name: str = name) -> None:
                found[name] = inputs[0] if output is None else output
                if name == until:
                    raise _Reached

            module = block.get_submodule(name)
            hook = module.register_forward_pre_hook if io == "input" else module.register_forward_hook
            stack.callback(hook(see).remove)
        with suppress(_Reached):
            block(hidden)
    return found


def _into(block: nn.Module, norm: str, branch: str, hidden: Tensor, residual: Tensor) -> Tensor:
    """The residual stream's tokens in the order in which the branch has them (Swin's attention works in shifted windows)."""
    replaced = block.get_submodule(norm).register_forward_hook(lambda module, inputs, output: residual)
    try:
        return _look(block, hidden, {branch: "input"}, branch)[branch]
    finally:
        replaced.remove()


def _corrected(y: Tensor, residual: Tensor, ours: nn.Module | None, theirs: nn.Module | None) -> Tensor:
    """The output whose sum with the student's residual stream is what the teacher's y makes of its own: y and the difference of the
    streams, both behind timm's LayerScale where there is one."""
    gamma, of_teacher = getattr(ours, "gamma", None), getattr(theirs, "gamma", None)
    if gamma is None or of_teacher is None:
        return y + residual
    usable = gamma.abs() > 1e-3 * gamma.abs().mean()  # a dimension that is scaled away cannot be corrected here
    return torch.where(usable, (y * of_teacher + residual) / gamma, y)


def _in_order(block: nn.Module, hidden: Tensor, names: Sequence[str]) -> list[str]:
    """The modules of a block that are called `names`, in the order they run."""
    order: list[str] = []
    with ExitStack() as stack:
        for name in names:
            hook = block.get_submodule(name).register_forward_pre_hook(lambda m, i, name=name: order.append(name))
            stack.callback(hook.remove)
        block(hidden)
    return order
