"""Which calibration images judge a fit: one in four, and none of a photograph that the fit has seen.

Held out one by one, the crops of a photograph are on both sides; the ridge that does best on them is too small, and more crops make the
fit worse.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from compressvit.data.photographs import numbered
from compressvit.fitting.lowrank import Tensor
from compressvit.fitting.shares import in_order

log = logging.getLogger("compressvit")

EVERY = 4  # the last of so many images, or photographs, is held out
NEIGHBOURS = 8  # images before and after one that are compared with it
# Alike are images whose colours differ by so small a part of what those of images far apart do; in how many more of the images that is so
# of neighbours for them to be taken as crops or frames of the same photographs. Measured on crops of photographs: 0.46 (two of each) and
# more (eight of each: 0.50 of 64 images, 0.72 of 640); shuffled 0.02, one of each 0.03, handwritten digits at most 0.04, and 0.19 sorted.
ALIKE, RELATED = 0.2, 0.25


class Seen:
    """What is known of the images of one pass: their photographs, or else their colours, from 8 × 8 thumbnails."""

    def __init__(self) -> None:
        self._photographs: list[Tensor | None] = []
        self._colours: list[Tensor] = []

    def add(self, thumbnails: Tensor, photographs: Tensor | None) -> None:
        """A batch: thumbnails (B, C, 8, 8), and the numbers of their photographs (B,) where they are known."""
        self._photographs.append(photographs)
        levels = torch.tensor([0.05, 0.5, 0.95], device=thumbnails.device)
        self._colours.append(thumbnails.flatten(2).quantile(levels, dim=2).permute(1, 2, 0).flatten(1).cpu())

    @classmethod
    def together(cls, parts: Sequence[Seen]) -> Seen:
        """What processes have seen that had batches in turn, as if one had seen it all."""
        whole = cls()
        whole._photographs = in_order([part._photographs for part in parts])
        whole._colours = in_order([part._colours for part in parts])
        return whole

    @property
    def sizes(self) -> list[int]:
        """Of the batches."""
        return [len(colours) for colours in self._colours]

    def held_out(self) -> Tensor:
        """The images that judge a fit, bool (N,): those of every fourth photograph, in the order of their first images, or of the last of
        fewer. Where photographs are not known, every image is one of its own; but where neighbours are alike, the last quarter of
        the images is held out."""
        known = [numbers for numbers in self._photographs if numbers is not None]
        if known and len(known) == len(self._photographs):
            return every_fourth(torch.cat(known))
        colours = torch.cat(self._colours) if self._colours else torch.empty(0, 3)
        if _related(colours):
            log.info(
                "neighbouring calibration images are alike, as crops of one photograph are: the last quarter of them judges the fit"
            )
            return torch.arange(len(colours)) >= _last_quarter(colours)
        return every_fourth(torch.arange(len(colours)))


def every_fourth(photographs: Tensor) -> Tensor:
    """The images of every fourth photograph, or of the last of fewer, bool (N,); `photographs` has the number of each, (N,)."""
    found = numbered(photographs.tolist())
    held_out = found % EVERY == EVERY - 1
    count = len(found.unique())
    if count == len(found):
        return held_out
    if count == 1:
        log.warning(
            "all %d calibration images are of one photograph, so none can judge a fit to the others, and layers stay close to the "
            "teacher's; give images of more photographs",
            len(found),
        )
        return held_out
    log.info("%d calibration images of %d photographs, of which every fourth judges the fit", len(found), count)
    return held_out if held_out.any() else found == count - 1


def _related(colours: Tensor) -> bool:
    """Whether neighbours in the order of the images are much more often alike than images that are far apart."""
    count = len(colours)
    if count < 5 * NEIGHBOURS:
        return False
    lags = [lag for lag in range(-NEIGHBOURS, NEIGHBOURS + 1) if lag]
    near, far = (
        torch.stack([(colours - colours.roll(start + lag, 0)).norm(dim=1) for lag in lags]) for start in (0, count // 2)
    )
    alike = ALIKE * far.median()
    shares = [(distances.amin(dim=0) < alike).double().mean().item() for distances in (near, far)]
    return shares[0] - shares[1] >= RELATED


def _last_quarter(colours: Tensor) -> int:
    """Where it begins: the place, at most `NEIGHBOURS` from the exact one, at which the images before and after it differ most."""
    exact = len(colours) - len(colours) // EVERY

    def gap(place: int) -> float:
        before, after = colours[place - NEIGHBOURS : place], colours[place : place + NEIGHBOURS]
        return torch.cdist(before, after).min().item()

    return max(range(exact - NEIGHBOURS, exact + NEIGHBOURS + 1), key=gap)
