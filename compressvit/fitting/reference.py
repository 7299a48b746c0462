"""The source of a student's values: the model before the transforms, with its moments on calibration images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from compressvit import processes
from compressvit.data.photographs import Photographed
from compressvit.errors import UserError
from compressvit.fitting.choices import Choices
from compressvit.fitting.held_out import Seen
from compressvit.fitting.judge import Judge, OnCalibration
from compressvit.fitting.lowrank import Metric
from compressvit.fitting.moments import Moments, collect_moments, is_finite
from compressvit.fitting.sampling import TokenSample
from compressvit.fitting.shares import Asks, own, unasked
from compressvit.log import progress
from compressvit.model.backbone import input_size
from compressvit.model.linear import effective_weight

log = logging.getLogger("compressvit")

LEAST_IMAGES = 8  # that differ; a fit to fewer is a fit to them alone, and one to a single one is refused
LEAST_TOKENS = 1 / 16  # for each input of a layer; a fit to fewer is refused, one to fewer than 1 is told
STRONG_RIDGE = 1.0  # in parts of a moment's mean: what such images do not show counts as much as what they do

_ONE_COLOUR = 1e-3  # the most by which normalised values of an image of one colour differ; a level of 8 bits is 0.015
_BATCH = 16  # images that are propagated together, if they come as one tensor
T = TypeVar("T")
Images = torch.Tensor | Iterable[Any] | Callable[[], Iterable[Any]]


class Reference:
    """The model as it was before the transforms of one call, and its moments on calibration images.

    Args:
        model: a copy that may be moved and converted to float32; its values are not changed.
        images: calibration images without labels, normalised for the model: a tensor (N, C, H, W), batches (also a
            loader's pairs of images and targets, or `Photographed`), or a function that returns batches. None: no images; asking for
            moments then raises a `UserError`.
        tokens: how many tokens of every image are summed up besides its prefix tokens; None for all.
        device: the one at hand, on which latency counts; by default that of the images, if they come as a tensor, or else of the model.
        choices: what is known already, and is kept.
        judge: of students, where a size follows from what they lose; by default their outputs on held-out calibration images.
        asks: the other processes of a run to take part in a pass over the images (`compressvit.transforms.shares`).
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images | None = None,
        tokens: int | None = None,
        device: torch.device | None = None,
        choices: Choices | None = None,
        judge: Judge | None = None,
        asks: Asks = unasked,
    ):
        self.model = model
        self.choices = choices or Choices()
        self._own_judge = judge
        self.asks = asks
        self.judge: Judge = judge or OnCalibration(self)
        self.tokens = tokens
        given = images if isinstance(images, torch.Tensor) else next(model.parameters(), torch.empty(0))
        self.device = given.device if device is None else device
        # what can be iterated only once is kept: a few hundred images
        self._images = list(images) if isinstance(images, Iterator) else images
        self._moments: dict[str, Moments] = {}
        self._known: dict[Any, Any] = {}
        self._different: set[bytes] = set()
        self._varied = False  # whether an image has more than one colour
        self._seen, self._count = Seen(), 0  # of one pass, by all processes
        self._batches = [0]  # in it, of each process

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
        """The same images, and what is known and judges, for another model."""
        return Reference(model, self._images, self.tokens, self.device, self.choices, self._own_judge, self.asks)

    def sample(self) -> TokenSample | None:
        """The tokens that a pass over the images sums up, the same in every pass; None for all."""
        return None if self.tokens is None else TokenSample(self.tokens)

    def known(self, key: Any, compute: Callable[[], T]) -> T:
        """What `compute` gave when it was first asked for `key`: choices that a plan and the fit after it both need."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def weight(self, path: str) -> torch.Tensor:
        """The weight (out, in) of the linear layer at `path`, in float64 on the CPU."""
        weight: torch.Tensor = effective_weight(self.model.get_submodule(path)).detach().cpu().double()
        if not torch.isfinite(weight).all():
            raise UserError(f"the weight of {path} holds numbers that are not finite; check the teacher's weights")
        return weight

    def batches(self) -> Iterator[torch.Tensor]:
        """The calibration images in float32, which the model is converted to, and moved to the device they come on; in several processes,
        the share of this one.

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
        self._seen, self._count = Seen(), 0
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
            self._count += len(images)
            yield images.detach().float()
        self._meet()

    def _meet(self) -> None:
        """Know after a pass what all processes have seen in it."""
        self._batches = processes.gathered(len(self._seen.sizes))
        if processes.count() == 1:
            return
        if not all(self._batches):
            raise processes.told_once(
                UserError(
                    f"no calibration image of process {self._batches.index(0)} can be read, and every process needs one; give more images, "
                    "or start fewer processes"
                )
            )
        everyone = processes.gathered((self._seen, self._count, self._different, self._varied))
        seen, counts, different, varied = zip(*everyone, strict=True)
        self._seen, self._count = Seen.together(seen), sum(counts)
        self._different, self._varied = set().union(*different), any(varied)

    def _require_finite(self) -> None:
        """Raise a `UserError` that names the damaged tensor, where the images would only show which layer is reached by it first."""
        wrong = next((name for name, tensor in self.model.named_parameters() if not is_finite(tensor)), None)
        if wrong is not None:
            raise UserError(f"{wrong} holds numbers that are not finite; check the teacher's weights")

    def _refuse_alike(self) -> None:
        """Raise a `UserError` where the images that were seen show nothing of what the model does on others."""
        count = self._count
        ways_out = f"give at least {LEAST_IMAGES} different photographs (a few hundred are better)"
        if len(self._different) < 2:
            given = (
                "there is only one calibration image" if count == 1 else f"all {count:,} calibration images are alike"
            )
            raise UserError(
                f"{given}, and a fit to it would hold for no other; {ways_out}, or measure errors without images (metric=weights)"
            )
        if not self._varied:
            raise UserError(
                f"the {count:,} calibration images have one colour each, on which a model does not do what it does on photographs; "
                f"{ways_out}"
            )

    def _batch_count(self) -> int | None:
        """The number of batches, if it is known in advance."""
        if isinstance(self._images, torch.Tensor):
            return -(-len(self._images) // _BATCH)
        return len(self._images) if isinstance(self._images, Sized) else None

    def _look_at(self, images: torch.Tensor, photographs: torch.Tensor | None) -> None:
        small = F.adaptive_avg_pool2d(images.detach().float(), 8)
        self._seen.add(small, photographs)
        if not self._varied:
            spread = images.detach().flatten(2)
            self._varied = bool((spread.amax(dim=2) - spread.amin(dim=2) > _ONE_COLOUR).any())
        if len(self._different) < LEAST_IMAGES:
            rounded = small.mul(64).round().nan_to_num().cpu()
            self._different |= {image.numpy().tobytes() for image in rounded}

    def held_out(self) -> torch.Tensor:
        """Which images of the last pass through `batches` judge a fit to the others, bool (N,); see `compressvit.fitting.held_out`."""
        return torch.cat(own(self._seen.held_out().split(self._seen.sizes), self._batches))

    def moments(self, paths: Sequence[str], *, outputs: bool) -> dict[str, Moments]:
        """The moments of the linear layers at `paths`; what was computed before is not computed again.

        Args:
            outputs: also those of the gradients.

        Raises:
            UserError: the model holds, or a layer sees, numbers that are not finite; or the images are alike, of one colour, or far too
                few for a layer.
        """
        known = self._moments
        wanted = [path for path in paths if path not in known or (outputs and known[path].outputs is None)]
        if wanted:
            self._require_finite()
            with self.asks("moments", [self.model], paths=wanted, outputs=outputs):
                known |= self.collect(wanted, outputs=outputs)
            self._refuse_alike()
            _require_enough(known, wanted)
            if self.too_alike:
                log.warning(
                    "there are only %d distinct calibration images, fewer than %d: layers are fitted one by one, with strong "
                    "regularisation; give more distinct images for a better start",
                    len(self._different),
                    LEAST_IMAGES,
                )
        return {path: known[path] for path in paths}

    def collect(self, paths: Sequence[str], *, outputs: bool) -> dict[str, Moments]:
        """The moments of these layers, from a pass over the images; see `collect_moments`."""
        count, sample = self._batch_count(), self.sample()
        return collect_moments(self.model, paths, self.batches(), outputs=outputs, count=count, sample=sample)

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


def _require_enough(moments: dict[str, Moments], paths: Sequence[str]) -> None:
    """Warn where fewer tokens than inputs were summed up, and raise a `UserError` where much fewer were."""
    tokens = {path: moments[path].drawn or moments[path].tokens for path in paths}
    inputs = {path: len(moments[path].mean) for path in paths}
    path = min(paths, key=lambda path: tokens[path] / inputs[path])
    given = f"the calibration images give {tokens[path]:,} tokens for the {inputs[path]:,} inputs of {path}"
    if tokens[path] < LEAST_TOKENS * inputs[path]:
        raise UserError(
            f"{given}, which is less than one for {1 / LEAST_TOKENS:.0f} inputs and too few for any fit; give "
            f"{math.ceil(inputs[path] / tokens[path])} times as many images, so that there is one for each"
        )
    if tokens[path] < inputs[path]:
        log.warning("%s: directions they do not cover are regularised; give more images for a better start", given)
    for path in paths:
        spread = moments[path].inputs.trace() - moments[path].mean.square().sum()
        if spread <= 1e-6 * moments[path].inputs.trace():
            log.warning("all calibration images look the same to %s; its errors are regularised, not measured", path)
            return


def _wrong_images(given: str, size: tuple[int, int, int]) -> UserError:
    return UserError(
        f"calibration takes images of the model's size: a tensor (N, {', '.join(map(str, size))}), or batches of such (a loader's pairs "
        f"of images and targets too), not {given}"
    )
