"""Features of the layers of a model: outputs by module path, batch by batch.

Taps are outputs of modules; by default those of the blocks, in order, which are the layers in the literature's figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn

from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.model.backbone import describe, family_of, model_name
from compressvit.model.chain import chain_of
from compressvit.model.modes import evaluating
from compressvit.model.taps import Taps

Batches = Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model and its taps.

    Attributes:
        side: the model, which is put into eval mode meanwhile, with size and normalisation of its images.
        taps: paths of the modules whose outputs are recorded, in execution order.
    """

    side: Side
    taps: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        return self.side.model


def subject(side: Side, taps: Sequence[str] | None = None) -> Subject:
    """A model with the given taps, or with its blocks as taps.

    Raises:
        UserError: the model's family is unknown, so the taps must be given.
    """
    return Subject(side, block_paths(side.model) if taps is None else tuple(taps))


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks of a model, in order; of one of no family, of the modules that run one after the other.

    Raises:
        UserError: it has no such parts.
    """
    try:
        found = tuple(info.path for info in describe(model).blocks)
    except UserError as error:
        stages = [name for name, _ in model.named_children()]
        raise UserError(f"{error}; name the modules to look at as taps, e.g. {', '.join(stages[:4])}") from error
    if found == ("",):
        stages = [name for name, _ in model.named_children()]
        raise UserError(
            f"the parts of {model_name(model)} do not run one after the other, so that none stand for blocks; name the modules to look at "
            f"as taps, e.g. {', '.join(stages[:4])}"
        )
    return found


def require_taps(one: Subject) -> None:
    """Raise a `UserError` with similar names for a tap that is not a module of the model, which may be on the meta device."""
    Taps(one.model, [(path, "output") for path in one.taps]).close()


@torch.no_grad()
def features(subject: Subject, images: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """The unchanged outputs of the taps for a batch: {path: (B, …)}.

    Raises:
        UserError: there are no images, a tap is not a module (the message suggests similar names) or does not output one row per image,
            or features are not finite (the message names the first such layer).
    """
    if not len(images):
        raise UserError("features were asked for without any image; give at least one")
    return next(walk([subject], lambda: [images], device, len(images), size=len(images)))[0]


@torch.no_grad()
def walk(
    subjects: Sequence[Subject],
    batches: Batches,
    device: torch.device,
    images: int,
    *,
    size: int = 64,
    least: int = 1,
    mine: Callable[[int], bool] = lambda number: True,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Features of several models on the same images, batch by batch.

    Args:
        subjects: the models; they are moved to `device`, and keep their train or eval mode.
        batches: returns batches of images (B, C, H, W), normalised for the first subject; they are converted for the others.
        images: maximum number of images.
        size: number of images in the batches that are formed. The last has between `least` and `size + least` images.
        least: the smallest usable batch; a smaller remainder is added to the batch before it.
        mine: whether the batch of a number, from 0, is wanted; others are read and passed over.

    Yields:
        For every subject {path: (B, …)}; the dictionaries are emptied when the next batch is requested.

    Raises:
        UserError: as `features` does.
    """
    own = [one.side.converter(subjects[0].side.input) for one in subjects]
    with _watched(subjects, device) as taps:
        for number, batch in enumerate(regrouped(batches(), images, size, least)):
            if not mine(number):
                continue
            batch = batch.to(device)
            seen = []
            for one, convert, watcher in zip(subjects, own, taps, strict=True):
                one.model(convert(batch))
                seen.append(_usable(one, watcher.pop(), len(batch)))
            yield seen
            for values in seen:  # also for a caller that still holds them: the next pass needs the memory
                values.clear()


@contextmanager
def _watched(subjects: Sequence[Subject], device: torch.device) -> Iterator[list[Taps]]:
    taps: list[Taps] = []
    try:
        for one in subjects:
            taps.append(Taps(one.model.to(device), [(path, "output") for path in one.taps]))
        with evaluating(*(one.model for one in subjects)):
            yield taps
    finally:
        for watcher in taps:
            watcher.close()


def regrouped(batches: Iterable[torch.Tensor], images: int, size: int, least: int = 1) -> Iterator[torch.Tensor]:
    """The first `images` images in batches of `size`; a remainder smaller than `least` is added to the batch before it."""
    waiting: list[torch.Tensor] = []
    count = left = 0
    left = images
    for batch in batches:
        batch = batch[:left]
        left -= len(batch)
        waiting.append(batch)
        count += len(batch)
        while count >= size + least:  # so that the remainder is always large enough
            whole = torch.cat(waiting)
            yield whole[:size]
            waiting, count = [whole[size:]], count - size
        if left <= 0:
            break
    if count:
        yield torch.cat(waiting)


def tokens(feature: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """An output of a block as tokens (B, N, C); grids are (B, H, W, C) or (B, C, H, W), depending on the model's family."""
    if feature.ndim == 3:
        return feature
    if feature.ndim == 2:
        return feature[:, None]
    family = family_of(model)
    if chain_of(model).channels_last if family is None else family.layout == "channels_last":
        return rearrange(feature, "b h w c -> b (h w) c")
    return rearrange(feature, "b c h w -> b (h w) c")


def _usable(one: Subject, found: Mapping[str, Mapping[str, object]], images: int) -> dict[str, torch.Tensor]:
    """The outputs of the taps in their given order, checked in the order of the model."""
    order = {path: i for i, (path, _) in enumerate(one.model.named_modules())}
    usable = {}
    for path in sorted(one.taps, key=order.__getitem__):
        value = found.get(path, {}).get("output")
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"tap '{path}' gives {'nothing' if value is None else type(value).__name__}, not a tensor; tap a module inside it"
            )
        if len(value) != images:
            raise UserError(
                f"tap '{path}' gives {len(value)} rows for {images} images, so a row is not an image (inside window attention it is a "
                "window); tap the enclosing module"
            )
        require_finite(path, value)
        usable[path] = value
    return {path: usable[path] for path in one.taps}


def require_finite(path: str, value: torch.Tensor) -> None:
    """Raise a `UserError` if the features of a layer are not finite; call it in the order of the layers to name the first."""
    if not torch.isfinite(value).all():
        raise UserError(
            f"the features of '{path}' are not finite, and it is the first such layer; check the weights of the model up to there"
        )
