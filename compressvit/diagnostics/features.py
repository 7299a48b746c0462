"""What the layers of a model make of images: features by module path, batch by batch.

Taps are outputs of modules. Without any named, they are the blocks, in order, which are the layers of the literature's pictures.
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
from compressvit.model.modes import evaluating
from compressvit.model.taps import Taps

Batches = Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    Attributes:
        side: the model, put into eval mode while it is looked at, and what its images look like.
        taps: paths of the modules whose outputs are compared, in the order in which they run.
    """

    side: Side
    taps: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        return self.side.model


def subject(side: Side, taps: Sequence[str] | None = None) -> Subject:
    """A model with its taps: those given, or its blocks.

    Raises:
        UserError: the blocks of the model are not known, so the taps must be given.
    """
    return Subject(side, block_paths(side.model) if taps is None else tuple(taps))


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks of a timm model, in order.

    Raises:
        UserError: they are not known.
    """
    if family_of(model) is None:
        stages = [name for name, _ in model.named_children()]
        raise UserError(
            f"the blocks of {model_name(model)} are not known to compressvit; name the modules to look at as taps, "
            f"e.g. {', '.join(stages[:4])}"
        )
    return tuple(info.path for info in describe(model).blocks)


def require_taps(one: Subject) -> None:
    """Raise a `UserError` for a tap that is no module of the model, with near names; the model may be on the meta device."""
    Taps(one.model, [(path, "output") for path in one.taps]).close()


@torch.no_grad()
def features(subject: Subject, images: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """The outputs at the taps for a batch, as they leave the modules: {path: (B, …)}.

    Raises:
        UserError: no image, a tap that is not a module (the error gives similar names) or has no row per image, or features that are
            not finite: the first layer of the model is named.
    """
    if not len(images):
        raise UserError("features were asked for without any image; give at least one")
    return next(walk([subject], lambda: [images], device, len(images), size=len(images)))[0]


@torch.no_grad()
def walk(
    subjects: Sequence[Subject], batches: Batches, device: torch.device, images: int, *, size: int = 64, least: int = 1
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Features of several models on the same images, batch by batch.

    Args:
        subjects: the models; moved to `device`, and left in the mode they were in.
        batches: gives batches of images (B, C, H, W), as the first subject takes them; every other gets them as it takes them.
        images: how many images at most.
        size: of the batches that are made of them. The last is between `least` and `size + least` images.
        least: the smallest batch that is of use; a smaller rest goes to the batch before it.

    Yields:
        For every subject {path: (B, …)}; emptied when the next batch is asked for.

    Raises:
        UserError: as `features` does.
    """
    own = [one.side.converter(subjects[0].side.input) for one in subjects]
    with _watched(subjects, device) as taps:
        for batch in regrouped(batches(), images, size, least):
            batch = batch.to(device)
            seen = []
            for one, convert, watcher in zip(subjects, own, taps, strict=True):
                one.model(convert(batch))
                seen.append(_usable(one, watcher.pop(), len(batch)))
            yield seen
            for values in seen:  # whoever still holds them: the next pass needs the room
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
    """The first `images` images in batches of `size`; a rest smaller than `least` goes to the batch before it."""
    waiting: list[torch.Tensor] = []
    count = left = 0
    left = images
    for batch in batches:
        batch = batch[:left]
        left -= len(batch)
        waiting.append(batch)
        count += len(batch)
        while count >= size + least:  # so that what remains is always enough
            whole = torch.cat(waiting)
            yield whole[:size]
            waiting, count = [whole[size:]], count - size
        if left <= 0:
            break
    if count:
        yield torch.cat(waiting)


def tokens(feature: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """An output of a block as tokens (B, N, C): a grid is (B, H, W, C) or (B, C, H, W), as the model's family has it."""
    if feature.ndim == 3:
        return feature
    if feature.ndim == 2:
        return feature[:, None]
    family = family_of(model)
    if family is not None and family.layout == "channels_last":
        return rearrange(feature, "b h w c -> b (h w) c")
    return rearrange(feature, "b c h w -> b (h w) c")


def _usable(one: Subject, found: Mapping[str, Mapping[str, object]], images: int) -> dict[str, torch.Tensor]:
    """What the taps gave, in their order, looked at in the order of the model."""
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
    """Raise a `UserError` that names a layer whose features are not finite; to be asked in the order of the layers."""
    if not torch.isfinite(value).all():
        raise UserError(
            f"the features of '{path}' are not finite, and it is the first such layer; check the weights of the model up to there"
        )
