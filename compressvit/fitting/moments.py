"""Moments of the inputs of a model's layers, and of the gradients at their outputs, on calibration images.

Second moments are summed up image by image, so memory does not grow with their number. Collected for each layer are that of its
inputs, `S = E[xᵀx]`, that of the gradients at its outputs, `G = E[gᵀg]`, which says how much an error there changes what the model
computes, and that of the inputs again with every token weighing `‖g‖²` (`compressvit.fitting.lowrank` uses them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.errors import UserError
from compressvit.fitting.lowrank import Metric, cholesky
from compressvit.fitting.sampling import TokenSample, gathered, seed_of
from compressvit.fitting.shares import number, summed
from compressvit.log import progress
from compressvit.model import surgery
from compressvit.model.backbone import changed_in_place, input_size, prefix_in
from compressvit.model.calls import called
from compressvit.model.linear import channels_last
from compressvit.model.modes import evaluating
from compressvit.model.shapes import RememberedShapes
from compressvit.tasks.base import task_of


@dataclass(frozen=True)
class Moments:
    """Moments of a linear layer's inputs x, and of the gradients g at its outputs, over all tokens.

    Attributes:
        inputs: E[xᵀx], (in, in).
        mean: E[x], (in,).
        tokens: number of tokens.
        drawn: how many of them were summed up, and stand for the others; None: all.
        outputs: E[gᵀg], (out, out); None without gradients, as are the following.
        important: E[‖g‖² xᵀx] / E‖g‖², (in, in): the inputs, each token weighted by its squared gradient.
        important_mean: E[‖g‖² x] / E‖g‖², (in,).
        prefix_weight: mean ‖g‖² of a prefix token, relative to that of the other tokens; at most the value at which the prefix tokens
            together weigh as much as all others.
    """

    inputs: torch.Tensor
    mean: torch.Tensor
    tokens: int
    outputs: torch.Tensor | None = None
    important: torch.Tensor | None = None
    important_mean: torch.Tensor | None = None
    prefix_weight: float = 1.0
    drawn: int | None = None

    def metric(self, ridge: float, output_ridge: float | None) -> Metric:
        """The metric in which errors of this layer's weight are measured.

        Without gradients, or with `output_ridge=None`, it measures the error of the layer's outputs. With gradients it measures the
        error of the model's outputs, by a Kronecker factorisation with an input and an output factor. Its input moment is the mean of
        two: one in which all tokens have equal weight, and one in which each is weighted by ‖g‖². The first alone would assume that
        gradients and inputs are independent; a class token, one among hundreds of patches, would then hardly count.

        Args:
            ridge: regularisation of the input moment, relative to its mean.
            output_ridge: the same for the gradients' moment.
        """
        if output_ridge is None or self.outputs is None or self.important is None or not says_something(self.outputs):
            return Metric(cholesky(self.inputs, ridge))
        return Metric(cholesky(self.weighed(), ridge), self.output_factor(output_ridge))

    def weighed(self) -> torch.Tensor:
        """The moment (in, in) of the inputs in the metric of the model's output: see `metric`. Without gradients E[xᵀx]."""
        return (self.inputs + self.important) / 2 if self._weighs else self.inputs  # type: ignore[operator]

    def weighed_mean(self) -> torch.Tensor:
        """The mean (in,) of the inputs in the same metric."""
        return (self.mean + self.important_mean) / 2 if self._weighs else self.mean  # type: ignore[operator]

    @property
    def _weighs(self) -> bool:
        """Whether there are gradients that say which tokens count."""
        return self.outputs is not None and says_something(self.outputs)

    def output_factor(self, ridge: float | None, scale: torch.Tensor | None = None) -> torch.Tensor | None:
        """The factor of a metric's output side: of the gradients with a ridge, where there are any; else of `scale` alone.

        Args:
            ridge: for the gradients; None not to use them.
            scale: |γ| (out,) of a LayerScale after the layer, before which the ridge is added: what is scaled down counts for less.
        """
        if ridge is None or self.outputs is None or not says_something(self.outputs):
            return None if scale is None else torch.diag(scale)
        if scale is None:
            return cholesky(self.outputs, ridge)
        return scale[:, None] * cholesky(self.outputs / torch.outer(scale, scale), ridge)


def collect_moments(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[torch.Tensor],
    *,
    outputs: bool,
    seed: int = 0,
    count: int | None = None,
    sample: TokenSample | None = None,
) -> dict[str, Moments]:
    """Run the images through the model and sum up the second moments at the linear layers `paths`.

    With `outputs` every batch is also propagated backwards: from labels drawn from the model's own prediction where there is a
    classifier (the Fisher information), else from random directions of the normalised final tokens, the prefix tokens together
    weighing as much as the others (the Gauss–Newton matrix of their mean squared error).

    Args:
        model: in float32, on the device of the batches; it is restored afterwards.
        paths: of linear layers.
        batches: images (B, C, H, W), read once; in several processes, those of this one.
        outputs: also collect the moments of gradients.
        seed: of the labels, or directions, that are drawn.
        count: number of batches, if it is known; for the display of progress.
        sample: of the tokens of every image; None for all.

    Returns:
        By path, sums over all tokens, of all processes, in float64 on the CPU.

    Raises:
        UserError: a layer's input or gradient is not finite (the first such layer is named), or there is no image.
    """
    sums = {path: _Sums() for path in paths}
    prefix = {path: prefix_in(model, path) for path in paths}
    generator = torch.Generator()

    def see_input(path: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = channels_last(module, inputs[0].detach())
        if not is_finite(x):
            raise not_finite(path)
        add = _whole if sample is None else partial(_part, sample, in_batch)
        see_gradient = add(sums[path], module, x, prefix[path])
        if path in changed:
            output = output.clone()  # torch calls no hook of a view that is changed in place
        if outputs:
            output.register_hook(see_gradient)
        return output

    changed, in_batch = changed_in_place(model), 0
    with _hooks(model, {path: partial(see_input, path) for path in paths}), frozen(model):
        for i, batch in enumerate(progress(batches, "measuring layers on batches of calibration images", count)):
            generator.manual_seed(seed_of(seed, number(i)))
            if sample is not None:
                sample.begin(number(i))
            in_batch = len(batch)
            with torch.set_grad_enabled(outputs):
                _run(model, batch.detach().clone().requires_grad_() if outputs else batch, outputs, generator)
    if not in_batch:
        raise UserError("there is no calibration image")
    return {path: summed(own).moments(path, outputs) for path, own in sums.items()}


See = Callable[[torch.Tensor], None]


def _whole(total: _Sums, module: nn.Module, x: torch.Tensor, prefix: int) -> See:
    """Add all tokens of a layer's inputs x (…, in); what it returns adds the gradient at its outputs."""
    total.add_inputs(x)
    return lambda g: total.add_gradients(x, prefix, channels_last(module, g))


def _part(sample: TokenSample, images: int, total: _Sums, module: nn.Module, x: torch.Tensor, prefix: int) -> See:
    """The same, of a sample of the tokens of every image."""
    x = x.reshape(images, -1, x.shape[-1])
    places, weights = sample.draw(images, x.shape[1], prefix)
    chosen, each = gathered(x, places), weights[..., :1].to(x.device)
    total.add_inputs(chosen, each, x.shape[1] * images)

    def see(g: torch.Tensor) -> None:
        g = channels_last(module, g)
        total.add_gradients(chosen, prefix, gathered(g.reshape(images, -1, g.shape[-1]), places), each)

    return see


@dataclass
class _Sums:
    """Sums over tokens, in float64 on the CPU; see `Moments`."""

    inputs: Any = 0.0
    mean: Any = 0.0
    tokens: int = 0
    drawn: int = 0
    outputs: Any = 0.0
    important: Any = 0.0
    important_mean: Any = 0.0
    prefix: Any = 0.0  # (2,): of ‖g‖² over prefix tokens and over the others
    counts: Any = 0.0  # (2,): their numbers

    def add_inputs(self, x: torch.Tensor, weights: torch.Tensor | None = None, tokens: int = 0) -> None:
        """Add inputs x (…, in); with weights (…, 1) they stand for so many `tokens`."""
        whole = x.numel() // x.shape[-1] if weights is None else tokens
        x = x.flatten(0, -2)
        weighted = x if weights is None else x * weights.flatten(0, -2)
        self.inputs = self.inputs + (weighted.mT @ x).cpu().double()
        self.mean = self.mean + weighted.sum(dim=0).cpu().double()
        self.tokens += whole
        self.drawn += len(x)

    def add_gradients(
        self, x: torch.Tensor, prefix: int, gradient: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        size = gradient.norm(dim=-1, keepdim=True)
        if weights is not None:  # the square root twice: in both factors of every product
            gradient, size = gradient * weights.sqrt(), size * weights.sqrt()
        g, weighted = gradient.flatten(0, -2), (x * size).flatten(0, -2)
        self.outputs = self.outputs + (g.mT @ g).cpu().double()
        self.important = self.important + (weighted.mT @ weighted).cpu().double()
        self.important_mean = self.important_mean + (weighted * size.flatten(0, -2)).sum(dim=0).cpu().double()
        parts = size.square().tensor_split([prefix], dim=1)
        self.prefix = self.prefix + torch.stack([part.sum() for part in parts]).cpu().double()
        counts = size.new_ones(size.shape) if weights is None else weights
        self.counts = self.counts + torch.stack([c.sum() for c in counts.tensor_split([prefix], dim=1)]).cpu().double()

    def moments(self, path: str, outputs: bool) -> Moments:
        """Those of the layer at `path`."""
        if not torch.isfinite(self.inputs).all() or (outputs and not torch.isfinite(self.outputs).all()):
            raise processes.told_once(not_finite(path))  # all processes have the same sums
        found = Moments(self.inputs / self.tokens, self.mean / self.tokens, self.tokens, drawn=self.drawn)
        if not outputs:
            return found
        size = self.prefix.sum().clamp(min=torch.finfo(torch.float64).tiny)
        first, others = self.prefix / self.counts.clamp(min=1)
        weight = (first / others).item() if self.counts[0] and others else 1.0
        weight = min(weight, (self.counts[1] / self.counts[0].clamp(min=1)).item())  # together no more than all others
        return replace(
            found,
            outputs=self.outputs / self.tokens,
            important=self.important / size,
            important_mean=self.important_mean / size,
            prefix_weight=weight,
        )


def says_something(outputs: torch.Tensor) -> bool:
    """False where no gradient reaches a layer, as with a classifier of one class."""
    return outputs.trace().item() > 1e-60


def is_finite(x: torch.Tensor) -> bool:
    """Whether all values are finite. The sum, which is 30 times as fast to check on a CPU, is finite only if they are, but may overflow."""
    return bool(x.sum().isfinite() or x.isfinite().all())


def not_finite(path: str) -> UserError:
    return UserError(
        f"{path} sees numbers that are not finite on the calibration images; check the teacher's weights and the images"
    )


def _run(model: nn.Module, batch: torch.Tensor, outputs: bool, generator: torch.Generator) -> None:
    if not outputs:
        model(batch)
        return
    try:
        task_of(model).output_distance(model, batch, generator).backward()
    except FloatingPointError as error:
        raise not_finite(str(error)) from error
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise UserError(
            f"{type(model).__name__} changes a tensor in place (as x += …) that its gradient needs, so what an error at a layer does "
            "to the output cannot be measured; give metric: inputs to low_rank, or metric: weights"
        ) from error


def tokens_at(model: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """How many tokens the linear layers at `paths` see of one image, but for those that see none; nothing is computed."""
    empty = surgery.skeleton(model).eval()
    seen: dict[str, int] = {}

    images = 4  # what is not of the images comes in odd numbers: 1, or all distances along a side

    def count(path: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if inputs[0].shape[0] % images == 0:  # else they are not of the images, as distances in Swin v2
            seen[path] = inputs[0].numel() // channels_last(module, inputs[0]).shape[-1] // images

    with _hooks(empty, {path: partial(count, path) for path in paths}), RememberedShapes(), torch.no_grad():
        empty(torch.empty(images, *input_size(model), device="meta", dtype=next(empty.parameters()).dtype))
    return seen


@contextmanager
def _hooks(model: nn.Module, hooks: dict[str, Any]) -> Iterator[None]:
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        with called(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of parameters; everything is as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
