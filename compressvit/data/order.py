"""The order of an epoch, and what is random in it: one draw decides both. An epoch that shows a `View` shows what it showed before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from compressvit import processes
from compressvit.data.data_set import find_set
from compressvit.data.spec import Data
from compressvit.data.streams import Stream
from compressvit.errors import UserError


@dataclass(frozen=True)
class View:
    """One of several looks at every image of a set: its augmentation is a function of these and of the image's place in the set.

    Attributes:
        seed: of all views.
        number: of this one, from 0.
        ordered: whether the order of the images is a function of the view, too, so that batches come again.
    """

    seed: int
    number: int
    ordered: bool = False

    def seed_of(self, *what: int) -> int:
        """A seed (31 bits) for an image, or for something else that numbers name."""
        return int(np.random.SeedSequence([self.seed, self.number, *what]).generate_state(1)[0]) >> 1


def refuse_views(data: Data) -> None:
    """Raise a `UserError` where the images of a set cannot be shown in views."""
    if find_set(data.name).streams:
        raise UserError(
            f"cache: {data.name} streams its images, which have no numbers by which what is kept is found again; unpack the "
            "shards and read them with data.name=folder, or leave cache out"
        )
    if data.augment.repeats > 1:
        raise UserError(
            f"cache: data.augment.repeats={data.augment.repeats} shows an image several times in an epoch, and a view has one row for it; "
            "set repeats=1, with more views instead"
        )


def _draw(distributed: bool) -> int:
    """One number from torch's global generator; that of the leader for all processes."""
    drawn = int(torch.randint(2**62, ()))
    return processes.told(drawn) if distributed else drawn


class StreamEpoch:
    """Tells a streaming set, which shuffles its shards by an epoch's number, that a new one begins."""

    def __init__(self, dataset: Stream, distributed: bool):
        self.dataset, self.distributed = dataset, distributed
        self.batch_seeds = random.Random(0)

    def draw(self) -> None:
        seed = _draw(self.distributed)
        self.dataset.set_epoch(seed % 2**31)  # timm counts epochs in 32 bits
        self.batch_seeds = random.Random(seed)


class Order(Sampler):
    """Yields (index, seed) pairs: the order of an epoch, and what is random in it, from one draw.

    Over several processes training deals images out, as many to each, and leaves the rest of an epoch's order out; evaluation deals out
    batches, and leaves out none.
    """

    def __init__(self, count: int, training: bool, distributed: bool, repeats: int = 1, batch: int = 1):
        self.count, self.training, self.distributed = count, training, distributed
        self.repeats, self.batch = repeats, batch
        self.rank, self.world = (processes.rank(), processes.count()) if distributed else (0, 1)
        self.seed = 0
        self.batch_seeds = random.Random(0)
        self.view: View | None = None  # that epochs show, from the next one on
        self.pairs: list[tuple[int, int | View | None]] = []  # of the epoch
        self.skipped = 0  # at the beginning, which an iteration before had
        self._placed = 0

    def draw(self) -> None:
        """Starts an epoch."""
        if not self.training:
            return
        self._placed = 0
        self.seed = _draw(self.distributed)
        if self.view is not None and self.view.ordered:
            self.seed = self.view.seed_of()
        self.batch_seeds = random.Random(self.seed + self.rank)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.count, generator=generator).tolist()
        total = len(self) * self.world
        seeds = torch.randint(2**31, (total,), generator=generator).tolist()
        mine = range(self.rank, total, self.world)
        self.pairs = [(order[i // self.repeats % self.count], self.view or seeds[i]) for i in mine]

    def next_places(self, count: int) -> list[int]:
        """The places in the set of the images that this process has next, for who sees its batches in order."""
        self._placed += count
        return [place for place, _ in self.pairs[self._placed - count : self._placed]]

    def __len__(self) -> int:
        return self.count // self.world if self.training else len(self._dealt())

    def _dealt(self) -> list[int]:
        """The images of every batch that is this process's."""
        whole, size = range(self.count), self.batch
        return [i for start in whole[self.rank * size :: self.world * size] for i in whole[start : start + size]]

    def __iter__(self) -> Iterator[tuple[int, int | View | None]]:
        pairs = self.pairs if self.training else [(i, None) for i in self._dealt()]
        return iter(pairs[self.skipped :])
