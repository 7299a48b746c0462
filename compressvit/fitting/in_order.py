"""Fit the layers of a student in the order they run, each on what the fitted layers before it produce.

Fitted one by one, every layer assumes that all others are the teacher's, and the errors of a deep model add up. Here a layer sees the
student's own inputs x and is asked for the teacher's outputs y, so it also undoes what the layers before it lost. Where a layer ends a
residual branch, y is what makes the sum with the student's residual stream the teacher's. (Asymmetric reconstruction: Zhang et al.,
https://arxiv.org/abs/1505.06798, section 3.3; for transformers e.g. SVD-LLM, https://arxiv.org/abs/2403.07378, section 3.3.)

For each layer only second moments are kept, of all tokens or of a sample. The hidden states between blocks, and what the teacher's layers
of one block give, wait in temporary files (TMPDIR), so memory does not grow with images where those are on a disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compressvit import processes
from compressvit.errors import UserError
from compressvit.fitting.held_out import every_fourth
from compressvit.fitting.kept import Kept
from compressvit.fitting.lowrank import Tensor
from compressvit.fitting.moments import frozen, is_finite, not_finite
from compressvit.fitting.regression import Regression
from compressvit.fitting.sampling import TokenSample, gathered
from compressvit.fitting.shares import as_the_leader_has, number
from compressvit.fitting.spool import Spool, scratch_folder
from compressvit.fitting.walk import Side, look, watched
from compressvit.log import progress
from compressvit.model.backbone import describe, prefix_in
from compressvit.model.calls import called
from compressvit.model.family import BlockInfo, Branch
from compressvit.model.linear import channels_last

log = logging.getLogger("compressvit")

_LEAST_SCALE = 1e-3  # of the mean; what LayerScale makes smaller counts as that


@dataclass(frozen=True)
class LayerFit:
    """How one layer is fitted to its targets.

    Attributes:
        fit: sets the values of the layer it is given (and of whatever else it keeps), and returns the relative error that is left.
        prefix_weight: the weight of a prefix (class) token relative to other tokens.
    """

    fit: Callable[[nn.Module, Regression], float]
    prefix_weight: float = 1.0


def fit_in_order(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    fits: Mapping[str, LayerFit],
    held_out: Callable[[], Tensor] | None = None,
    sample: TokenSample | None = None,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Walk both models block by block and fit every linear layer named in `fits`, in the order they run.

    Args:
        student: whose layers are fitted, in place. It has the teacher's blocks, in float32, and is moved to the device of the batches.
            A layer that ends no residual branch may have other outputs than the teacher's; its `fit` sees the teacher's.
        teacher: in float32, on the device of the batches.
        batches: images (B, C, H, W), read once; in several processes, those of this one.
        fits: by path; linear layers within blocks. They are the leader's: the others take the values that it has found.
        held_out: asked once the images are read: which of them judge a fit, bool (N,). None: every fourth.
        sample: of the tokens that are summed up; None for all.
        kept: has the values of blocks that an interrupted fit was done with, which are not fitted again, and takes those of the others.

    Returns:
        By path, the relative error of what a layer computes from what it was asked for.

    Raises:
        UserError: there is no image, a layer sees numbers that are not finite, or there is no room for the hidden states.
    """
    backbone = describe(student)
    blocks = list(backbone.blocks)
    wanted = {b.path: [p.removeprefix(b.whole("")) for p in fits if b.holds(p)] for b in blocks}
    while blocks and not wanted[blocks[-1].path]:
        blocks.pop()
    errors: dict[str, float] = {}
    with torch.no_grad(), scratch_folder() as folder, frozen(student), frozen(teacher), ExitStack() as stack:
        stack.enter_context(called(student, teacher))
        ours, theirs = Side(student, folder, "student"), Side(teacher, folder, "teacher")
        for side in (ours, theirs):
            stack.callback(side.close)
        sizes, device = _enter(ours, theirs, batches)
        judges = (every_fourth(torch.arange(sum(sizes))) if held_out is None else held_out()).split(sizes)
        drawn = sample or TokenSample(None)
        for position, block in enumerate(progress(blocks, "fitting layers block by block", len(blocks))):
            if position:
                ours.advance(block, device)
            following = blocks[position + 1] if position + 1 < len(blocks) else None
            names = _in_order(ours.block, ours.hidden(0, device), wanted[block.path])
            paths = [block.whole(name) for name in names]
            known = _known(kept, ours.block, block.path, paths)
            branches = backbone.family.branches_in(student, block.path)
            asked = [] if known is not None else _asked(ours, names, branches, folder, drawn)
            prefix = prefix_in(student, block.path)
            _ask(asked, theirs, following, device, prefix, backbone.family.changed_in(teacher, block.path))
            errors |= _fit_layers(asked, ours, theirs, fits, judges, device) if known is None else known
            if known is None and kept:
                kept.write(block.path, {path: errors[path] for path in paths})
            if following is not None:
                theirs.info = following
    return errors


def _fit_layers(
    asked: Sequence[_Asked],
    ours: Side,
    theirs: Side,
    fits: Mapping[str, LayerFit],
    judges: Sequence[Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Fit the layers of the present block; returns the remaining relative errors by path."""
    errors: dict[str, float] = {}
    for layer in asked:
        path = ours.info.whole(layer.name)
        scale = scale_behind(ours.block, layer.branch)
        regression = Regression(None if scale is None else scale[layer.outputs])
        for i, (hidden, seen) in enumerate(ours.seen(layer.sees, layer.name, device)):
            x, y, weights = layer.pair(ours.block, theirs.block, i, hidden, seen, fits[path])
            if not (is_finite(x) and is_finite(y)):
                raise not_finite(path)
            regression.add(x, y, weights, judges[i])
        whole = regression.over_processes()
        errors[path] = processes.led(partial(fits[path].fit, ours.block.get_submodule(layer.name), whole))
        as_the_leader_has(ours.block)
    return errors


def _known(kept: Kept | None, block: nn.Module, name: str, paths: Sequence[str]) -> dict[str, float] | None:
    """Set the values of a block that was fitted before the run stopped, and return its errors; None for another block."""
    errors = processes.led(lambda: kept.read(name, paths) if kept else None)
    if errors is not None:
        as_the_leader_has(block)
        log.info("%s was fitted before the run stopped", name)
    return errors


def _enter(ours: Side, theirs: Side, batches: Iterable[Tensor]) -> tuple[list[int], torch.device]:
    """Take the images up to the first block of both models; the sizes of the batches, and where they are."""
    sizes, device = [], torch.device("cpu")
    for images in batches:
        sizes.append(len(images))
        device = images.device
        ours.model.to(device)
        ours.enter(images)
        theirs.enter(images)
    if not sizes:
        raise UserError("there is no calibration image")
    return sizes, device


class _Asked:
    """What the teacher asks of one layer of the present block, batch by batch.

    Attributes:
        name: of the layer within its block.
        branch: the residual branch that the layer ends, if it ends one.
        outputs: which of the branch's outputs the layer gives.
    """

    def __init__(self, name: str, branch: Branch | None, outputs: slice | Tensor, folder: Path, sample: TokenSample):
        self.name, self.branch, self.outputs = name, branch, outputs
        self._sample = sample
        self._outputs, self._streams = Spool(folder, f"{name}_outputs"), Spool(folder, f"{name}_stream")
        self._places: list[Tensor | None] = []  # (B, tokens) of a batch in the order of the layer; None for all
        self._weights: list[Tensor] = []
        self._orders: dict[tuple[int, ...], Tensor | None] = {}

    def note(self, block: nn.Module, hidden: Tensor, found: Mapping[str, Tensor], prefix: int) -> None:
        """Keep what the teacher's block made of the batch `hidden`.

        Args:
            found: outputs of layers and, of branches, what comes into their norms.
        """
        images = len(hidden)
        self._sample.begin(number(len(self._weights)))
        output = channels_last(block.get_submodule(self.name), found[self.name])
        output = output.reshape(images, -1, output.shape[-1])
        places, weights = self._sample.draw(images, output.shape[1], prefix)
        self._places.append(places)
        self._weights.append(weights)
        self._outputs.append(gathered(output, places))
        if self.branch:
            self._streams.append(self._in_layer(block, hidden, found[self.branch.norm], places))

    def _in_layer(self, block: nn.Module, hidden: Tensor, stream: Tensor, places: Tensor | None) -> Tensor:
        """The residual stream's tokens that stand where the layer has `places` (Swin's attention works in shifted windows)."""
        assert self.branch is not None
        if self.branch.in_place:
            return gathered(channels_last(block.get_submodule(self.name), stream).flatten(1, -2), places)
        shape = tuple(stream.shape[1:])
        if shape not in self._orders:
            self._orders[shape] = _order(block, self.branch, hidden[:1], stream[:1])
        order = self._orders[shape]
        stream = stream.flatten(1, -2)
        if order is None:
            return gathered(stream, places)
        chosen = order.expand(len(stream), -1) if places is None else order[places]
        return gathered(stream, chosen.clamp(min=0)) * (chosen >= 0)[..., None]  # padding has no stream

    @property
    def sees(self) -> dict[str, str]:
        """What `pair` needs to know of the student's block."""
        return ({self.branch.norm: "input"} if self.branch else {}) | {self.name: "input"}

    def pair(
        self, ours: nn.Module, theirs: nn.Module, index: int, hidden: Tensor, seen: Mapping[str, Tensor], fit: LayerFit
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch, the inputs (B, tokens, in) of the student's layer, the outputs (B, tokens, out) it should have, and weights.

        Args:
            seen: by the student's block, of what `sees` names.
        """
        device = hidden.device
        places, weights = self._places[index], self._weights[index].to(device)
        x = channels_last(ours.get_submodule(self.name), seen[self.name])
        x = gathered(x.reshape(len(hidden), -1, x.shape[-1]), places)
        y = self._outputs.read(index, device)
        if self.branch:
            lost = self._streams.read(index, device) - self._in_layer(ours, hidden, seen[self.branch.norm], places)
            scales = (self.branch.gamma(block) for block in (ours, theirs))
            y = _corrected(y, lost[..., self.outputs], *(None if g is None else g[self.outputs] for g in scales))
        prefix = weights[..., 1]  # 1 where a token is a prefix token
        return x, y, torch.where(prefix > 0, weights[..., 0] * fit.prefix_weight, weights[..., 0])[..., None]


def _asked(
    ours: Side, names: Sequence[str], branches: Mapping[str, Branch], folder: Path, drawn: TokenSample
) -> list[_Asked]:
    """Of each of these layers of the present block, what the teacher will be asked."""
    paths = {name: drawn.of(ours.info.whole(name)) for name in names}
    return [_Asked(name, *_end_of(ours.block, name, branches), folder, paths[name]) for name in names]


def _ask(
    asked: Sequence[_Asked],
    theirs: Side,
    following: BlockInfo | None,
    device: torch.device,
    prefix: int,
    changed: Container[str],
) -> None:
    """Take every batch through the teacher's block once, up to the following one, and keep what its layers give."""
    wanted = {layer.name: "output" for layer in asked}
    wanted |= {layer.branch.norm: "input" for layer in asked if layer.branch}
    for i in range(len(theirs)):
        hidden = theirs.hidden(i, device)
        found: dict[str, Tensor] = {}
        with watched(theirs.block, wanted, found, changed=changed):
            output = theirs.block(hidden)
        for layer in asked:
            layer.note(theirs.block, hidden, found, prefix)
        if following is not None:
            theirs.leave(i, output, following)


def _order(block: nn.Module, branch: Branch, hidden: Tensor, stream: Tensor) -> Tensor | None:
    """Of every token of a branch, its place (tokens,) in the residual stream, −1 for padding; None where the order is the same."""
    count = stream[0, ..., 0].numel()
    numbers = torch.arange(1, count + 1, device=stream.device, dtype=stream.dtype).reshape(stream.shape[:-1])
    found = _into(block, branch.norm, branch.branch, hidden, numbers[..., None].expand(stream.shape).contiguous())
    places = found[..., 0].flatten().round().long() - 1
    return None if places.equal(torch.arange(count, device=places.device)) else places


def _into(block: nn.Module, norm: str, branch: str, hidden: Tensor, residual: Tensor) -> Tensor:
    """The residual stream's tokens in the order in which the branch has them (Swin's attention works in shifted windows)."""
    replaced = block.get_submodule(norm).register_forward_hook(lambda module, inputs, output: residual)
    try:
        return look(block, hidden, {branch: "input"}, branch)[branch]
    finally:
        replaced.remove()


def _end_of(block: nn.Module, name: str, branches: Mapping[str, Branch]) -> tuple[Branch | None, slice | Tensor]:
    """The residual branch that a layer of a block ends, if it ends one, and which of its outputs the layer gives: one that consists of
    others says it of each (`outputs_of`)."""
    if name in branches:
        return branches[name], slice(None)
    whole, _, part = name.rpartition(".")
    outputs_of = getattr(block.get_submodule(whole), "outputs_of", None) if whole in branches else None
    outputs = None if outputs_of is None else outputs_of(part)
    return (None, slice(None)) if outputs is None else (branches[whole], outputs)


def _corrected(y: Tensor, residual: Tensor, gamma: Tensor | None, of_teacher: Tensor | None) -> Tensor:
    """The output whose sum with the student's residual stream is what the teacher's y makes of its own: y and the difference of the
    streams, both after a LayerScale `gamma` if there is one."""
    if gamma is None or of_teacher is None:
        return y + residual
    usable = gamma.abs() > _LEAST_SCALE * gamma.abs().mean()  # a dimension that is scaled away cannot be corrected here
    return torch.where(usable, (y * of_teacher + residual) / gamma, y)


def scale_behind(block: nn.Module, branch: Branch | None) -> Tensor | None:
    """|γ| (out,) of the LayerScale after a residual branch, if there is one; in float64 on the CPU."""
    gamma = branch.gamma(block) if branch else None
    if gamma is None:
        return None
    scale = gamma.detach().abs().cpu().double()
    return scale.clamp(min=_LEAST_SCALE * scale.mean().item())


def _in_order(block: nn.Module, hidden: Tensor, names: Sequence[str]) -> list[str]:
    """The modules of a block that are called `names`, in the order they run."""
    order: list[str] = []
    with ExitStack() as stack:
        for name in names:
            hook = block.get_submodule(name).register_forward_pre_hook(lambda m, i, name=name: order.append(name))
            stack.callback(hook.remove)
        block(hidden)
    return order
