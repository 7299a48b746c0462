"""The source of a student's values: the model before the transforms, and moments of its layers on calibration images.

Second moments are summed up image by image, so memory does not grow with their number. Collected for each layer are that of its
inputs, `S = E[xᵀx]`, that of the gradients at its outputs, `G = E[gᵀg]`, which says how much an error there changes what the model
computes, and that of the inputs again with every token weighing `‖g‖²` (`compressvit.fitting.lowrank` uses them).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.data.photographs import Photographed
from compressvit.errors import UserError
from compressvit.fitting.held_out import Seen
from compressvit.fitting.lowrank import Metric, cholesky
from compressvit.log import progress
from compressvit.model import surgery
from compressvit.model.backbone import input_size
from compressvit.model.linear import channels_last, effective_weight
from compressvit.model.modes import evaluating
from compressvit.tasks.base import task_of

log = logging.getLogger("compressvit")

LEAST_IMAGES = 8  # that differ; a fit to fewer is a fit to them alone
STRONG_RIDGE = 1.0  # in parts of a moment's mean: what such images do not show counts as much as what they do

_BATCH = 16  # images that are propagated together, if they come as one tensor
Images = torch.Tensor | Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Moments:
    """Moments of a linear layer's inputs x, and of the gradients g at its outputs, over all tokens.

    Attributes:
        inputs: E[xᵀx], (in, in).
        mean: E[x], (in,).
        tokens: number of tokens.
        outputs: E[gᵀg], (out, out); None without gradients, as are the following.
        important: E[‖g‖² xᵀx] / E‖g‖², (in, in): the inputs, each token weighted by its squared gradient.
        prefix_weight: mean ‖g‖² of a prefix token, relative to that of the other tokens; at most the value at which the prefix tokens
            together weigh as much as all others.
    """

    inputs: torch.Tensor
    mean: torch.Tensor
    tokens: int
    outputs: torch.Tensor | None = None
    important: torch.Tensor | None = None
    prefix_weight: float = 1.0

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
        if output_ridge is None or self.outputs is None or self.important is None or not _says_something(self.outputs):
            return Metric(cholesky(self.inputs, ridge))
        return Metric(cholesky((self.inputs + self.important) / 2, ridge), self.output_factor(output_ridge))

    def output_factor(self, ridge: float | None, scale: torch.Tensor | None = None) -> torch.Tensor | None:
        """The factor of a metric's output side: of the gradients with a ridge, where there are any; else of `scale` alone.

        Args:
            ridge: for the gradients; None not to use them.
            scale: |γ| (out,) of a LayerScale after the layer, before which the ridge is added: what is scaled down counts for less.
        """
        if ridge is None or self.outputs is None or not _says_something(self.outputs):
            return None if scale is None else torch.diag(scale)
        if scale is None:
            return cholesky(self.outputs, ridge)
        return scale[:, None] * cholesky(self.outputs / torch.outer(scale, scale), ridge)


class Reference:
    """The model as it was before the transforms of one call, and its moments on calibration images.

    Args:
        model: a copy that may be moved and converted to float32; its values are not changed.
        images: calibration images without labels, normalised for the model: a tensor (N, C, H, W), batches (also a
            loader's pairs of images and targets, or `Photographed`), or a function that returns batches. None: no images; asking for
            moments then raises a `UserError`.
    """

    def __init__(self, model: nn.Module, images: Images | None = None):
        self.model = model
        # what can be iterated only once is kept: a few hundred images
        self._images = list(images) if isinstance(images, Iterator) else images
        self._moments: dict[str, Moments] = {}
        self._different: set[bytes] = set()
        self._seen = Seen()

    @property
    def too_alike(self) -> bool:
        """Whether the images seen so far are so few, or so similar, that a fit to them would not generalise."""
        return 0 < len(self._different) < LEAST_IMAGES

    def require_images(self, asker: str) -> None:
        """Raise a `UserError` with the ways out if there are no calibration images."""
        if self._images is None:
            raise UserError(
                f"{asker} measures errors on calibration images, and none were given: pass compress(…, calibration=images), "
                "where a few hundred without labels are enough, or measure errors in the weights alone (metric=weights)"
            )

    def with_model(self, model: nn.Module) -> Reference:
        """The same images for another model."""
        return Reference(model, self._images)

    def weight(self, path: str) -> torch.Tensor:
        """The weight (out, in) of the linear layer at `path`, in float64 on the CPU."""
        weight: torch.Tensor = effective_weight(self.model.get_submodule(path)).detach().cpu().double()
        if not torch.isfinite(weight).all():
            raise UserError(f"the weight of {path} holds numbers that are not finite; check the teacher's weights")
        return weight

    def batches(self) -> Iterator[torch.Tensor]:
        """The calibration images in float32, which the model is converted to, and moved to the device they come on.

        Raises:
            UserError: a batch is not a tensor (B, C, H, W) that the model takes.
        """
        assert self._images is not None, "require_images comes first"
        size = input_size(self.model)
        batches = self._images() if callable(self._images) else self._images
        if isinstance(batches, torch.Tensor):
            batches = batches.split(_BATCH)
        if not isinstance(batches, Iterable):
            raise _wrong_images(type(batches).__name__, size)
        self._seen = Seen()
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, torch.Tensor):
                raise _wrong_images(f"batches of {type(images).__name__}", size)
            if images.ndim != 4 or images.shape[1] != size[0]:
                raise _wrong_images(f"a batch of shape {tuple(images.shape)}", size)
            if tuple(images.shape[1:]) != size and not getattr(self.model, "dynamic_img_size", False):
                raise _wrong_images(f"a batch of shape {tuple(images.shape)}", size)
            if not images.is_floating_point():
                raise _wrong_images(f"images of {images.dtype}, which are not normalised", size)
            self.model.to(images.device, torch.float32)
            self._look_at(images, batch.photographs if isinstance(batch, Photographed) else None)
            yield images.detach().float()

    def _batch_count(self) -> int | None:
        """The number of batches, if it is known in advance."""
        if isinstance(self._images, torch.Tensor):
            return -(-len(self._images) // _BATCH)
        return len(self._images) if isinstance(self._images, Sized) else None

    def _look_at(self, images: torch.Tensor, photographs: torch.Tensor | None) -> None:
        small = F.adaptive_avg_pool2d(images.detach().float(), 8)
        self._seen.add(small, photographs)
        if len(self._different) < LEAST_IMAGES:
            rounded = small.mul(64).round().nan_to_num().cpu()
            self._different |= {image.numpy().tobytes() for image in rounded}

    def held_out(self) -> torch.Tensor:
        """Which images of the last pass through `batches` judge a fit to the others, bool (N,); see `compressvit.fitting.held_out`."""
        return self._seen.held_out()

    def moments(self, paths: Sequence[str], *, outputs: bool) -> dict[str, Moments]:
        """The moments of the linear layers at `paths`; what was computed before is not computed again.

        Raises:
            UserError: a layer sees numbers that are not finite.
        """
        wanted = [
            path for path in paths if path not in self._moments or (outputs and self._moments[path].outputs is None)
        ]
        if wanted:
            self._moments |= collect_moments(
                self.model, wanted, self.batches(), outputs=outputs, count=self._batch_count()
            )
            _warn_of_few(self._moments, wanted)
            if self.too_alike:
                log.warning(
                    "there are only %d distinct calibration images, fewer than %d: layers are fitted one by one, with strong "
                    "regularisation; give more distinct images for a better start",
                    len(self._different),
                    LEAST_IMAGES,
                )
        return {path: self._moments[path] for path in paths}

    def metrics(self, paths: Sequence[str], kind: str, ridge: float, output_ridge: float) -> dict[str, Metric]:
        """What errors of the layers at `paths` are measured in: 'weights', 'inputs' or 'outputs'."""
        if kind == "weights":
            return dict.fromkeys(paths, Metric())
        moments = self.moments(paths, outputs=kind == "outputs")
        if self.too_alike:
            ridge, output_ridge = max(ridge, STRONG_RIDGE), max(output_ridge, STRONG_RIDGE)
        of_outputs = output_ridge if kind == "outputs" else None
        found = progress(moments.items(), "factorising the moments of layers", len(moments))
        return {path: own.metric(ridge, of_outputs) for path, own in found}


def collect_moments(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[torch.Tensor],
    *,
    outputs: bool,
    seed: int = 0,
    count: int | None = None,
) -> dict[str, Moments]:
    """Run the images through the model and sum up the second moments at the linear layers `paths`.

    With `outputs` every batch is also propagated backwards: from labels drawn from the model's own prediction where there is a
    classifier (the Fisher information), else from random directions of the normalised final tokens, the prefix tokens together
    weighing as much as the others (the Gauss–Newton matrix of their mean squared error).

    Args:
        model: in float32, on the device of the batches; it is restored afterwards.
        paths: of linear layers.
        batches: images (B, C, H, W), read once.
        outputs: also collect the moments of gradients.
        seed: of the labels, or directions, that are drawn.
        count: number of batches, if it is known; for the display of progress.

    Returns:
        By path, sums over all tokens in float64 on the CPU.

    Raises:
        UserError: a layer's input or gradient is not finite (the first such layer is named), or there is no image.
    """
    sums = {path: _Sums() for path in paths}
    prefix = getattr(model, "num_prefix_tokens", 0)
    generator = torch.Generator().manual_seed(seed)

    def see_input(path: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x = channels_last(module, inputs[0].detach())
        if not is_finite(x):
            raise not_finite(path)
        sums[path].add_inputs(x)
        if outputs:
            output.register_hook(lambda g: sums[path].add_gradients(x, prefix, channels_last(module, g)))

    images = 0
    with _hooks(model, {path: partial(see_input, path) for path in paths}), frozen(model):
        for batch in progress(batches, "measuring layers on batches of calibration images", count):
            images += len(batch)
            with torch.set_grad_enabled(outputs):
                _run(model, batch.detach().clone().requires_grad_() if outputs else batch, outputs, generator)
    if not images:
        raise UserError("there is no calibration image")
    for path, total in sums.items():
        if not torch.isfinite(total.inputs).all() or (outputs and not torch.isfinite(total.outputs).all()):
            raise not_finite(path)
    return {path: total.moments(outputs) for path, total in sums.items()}


@dataclass
class _Sums:
    """Sums over tokens, in float64 on the CPU; see `Moments`."""

    inputs: Any = 0.0
    mean: Any = 0.0
    tokens: int = 0
    outputs: Any = 0.0
    important: Any = 0.0
    prefix: Any = 0.0  # (2,): of ‖g‖² over prefix tokens and over the others
    counts: Any = 0.0  # (2,): their numbers

    def add_inputs(self, x: torch.Tensor) -> None:
        x = x.flatten(0, -2)
        self.inputs = self.inputs + (x.mT @ x).cpu().double()
        self.mean = self.mean + x.sum(dim=0).cpu().double()
        self.tokens += len(x)

    def add_gradients(self, x: torch.Tensor, prefix: int, gradient: torch.Tensor) -> None:
        size = gradient.norm(dim=-1, keepdim=True)
        g, weighted = gradient.flatten(0, -2), (x * size).flatten(0, -2)
        self.outputs = self.outputs + (g.mT @ g).cpu().double()
        self.important = self.important + (weighted.mT @ weighted).cpu().double()
        parts = size.square().tensor_split([prefix], dim=1)
        self.prefix = self.prefix + torch.stack([part.sum() for part in parts]).cpu().double()
        self.counts = self.counts + torch.tensor([float(part.numel()) for part in parts])

    def moments(self, outputs: bool) -> Moments:
        found = Moments(self.inputs / self.tokens, self.mean / self.tokens, self.tokens)
        if not outputs:
            return found
        size = self.prefix.sum().clamp(min=torch.finfo(torch.float64).tiny)
        first, others = self.prefix / self.counts.clamp(min=1)
        weight = (first / others).item() if self.counts[0] and others else 1.0
        weight = min(weight, (self.counts[1] / self.counts[0].clamp(min=1)).item())  # together no more than all others
        return replace(found, outputs=self.outputs / self.tokens, important=self.important / size, prefix_weight=weight)


def _says_something(outputs: torch.Tensor) -> bool:
    """False where no gradient reaches a layer, as with a classifier of one class."""
    return outputs.trace().item() > 1e-60


def _wrong_images(given: str, size: tuple[int, int, int]) -> UserError:
    return UserError(
        f"calibration takes images of the model's size: a tensor (N, {', '.join(map(str, size))}), or batches of such (a loader's pairs "
        f"of images and targets too), not {given}"
    )


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


def tokens_at(model: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """How many tokens the linear layers at `paths` see of one image; nothing is computed."""
    empty = surgery.skeleton(model).eval()
    seen: dict[str, int] = {}

    def count(path: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen[path] = inputs[0].numel() // channels_last(module, inputs[0]).shape[-1]

    with _hooks(empty, {path: partial(count, path) for path in paths}), torch.no_grad():
        empty(torch.empty(1, *input_size(model), device="meta", dtype=next(empty.parameters()).dtype))
    return seen


def _warn_of_few(moments: dict[str, Moments], paths: Sequence[str]) -> None:
    few = [path for path in paths if moments[path].tokens < len(moments[path].mean)]
    if few:
        log.warning(
            "the calibration images give %d tokens for the %d inputs of %s: directions they do not cover are regularised; "
            "give more images for a better start",
            moments[few[0]].tokens,
            len(moments[few[0]].mean),
            few[0],
        )
    for path in paths:
        spread = moments[path].inputs.trace() - moments[path].mean.square().sum()
        if spread <= 1e-6 * moments[path].inputs.trace():
            log.warning("all calibration images look the same to %s; its errors are regularised, not measured", path)
            return


@contextmanager
def _hooks(model: nn.Module, hooks: dict[str, Any]) -> Iterator[None]:
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
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
