"""Sets that are read in the order of their shards, and what is counted while they stream."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from timm.data import IterableImageDataset
from torch.utils.data import get_worker_info

from compressvit import processes
from compressvit.data.notes import counted
from compressvit.data.pictures import Read, standard
from compressvit.errors import UserError
from compressvit.notes import Note

_TIMM = logging.getLogger(
    "timm.data.readers.reader_wds"
)  # a warning for each sample, or rest of a shard, that is passed over
_KINDS = tuple(Read)


class Stream(IterableImageDataset):
    """A streaming set of timm, with counts of what was passed over and of how pictures had to be converted.

    Pictures of a stream have no names, so they are counted by passes: the most that any pass through the set has met.

    Args:
        source: as `timm.data.create_dataset` makes it.
        workers: how many processes read it at once; 0 for this one.
        exif: turn pictures as their EXIF blocks say.
    """

    def __init__(self, source: IterableImageDataset, workers: int, *, exif: bool):
        super().__init__(None, reader=source.reader, transform=source.transform)
        self.exif, self._workers = exif, max(1, workers)
        # a row per worker, in memory shared with them: kinds of `Read`, then what was passed over
        self._pass = torch.zeros(max(1, workers), len(_KINDS) + 1, dtype=torch.int64).share_memory_()
        self._most = torch.zeros(len(_KINDS) + 1, dtype=torch.int64)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        worker = get_worker_info()
        row = self._pass[worker.id if worker is not None else 0]
        with _passed_over(row):
            for image, target in self.reader:
                image, done = standard(image, exif=self.exif)
                for column, kind in enumerate(_KINDS):
                    row[column] += kind in done
                yield (image if self.transform is None else self.transform(image)), target

    def dealt(self, *, training: bool, distributed: bool) -> Stream:
        """The set for one loader of this process, with timm's reader at its beginning.

        Args:
            training: timm deals the shards out and gives every process as many samples: each once an epoch where all of them, and all
                their workers, have as many shards of one size; otherwise it repeats some and leaves some out.
            distributed: this process's part. In evaluation every sample is in one: shards are dealt out as files where timm's reader
                says which there are, and otherwise the leader reads all.
        """
        rank, world = (processes.rank(), processes.count()) if distributed else (0, 1)
        dealt, reader = copy.copy(self), copy.copy(self.reader)
        dealt.reader = reader
        if hasattr(
            reader, "dist_num_replicas"
        ):  # where it has them it asked torch, which knows nothing of work that is done alone
            reader.ds = None
            reader.dist_rank, reader.dist_num_replicas = (rank, world) if training else (0, 1)
        files = self._files()
        if training and files is None and world > 1:
            self._require_samples(world)
        if training and files is not None and len(files) < world * self._workers and world > 1:
            raise UserError(
                f"{len(files)} shards to train on are too few for {world} processes with {self._workers} workers each: give as many, "
                f"fewer processes, or data.num_workers={len(files) // world}"
            )
        if not training and world > 1:
            if files is not None and len(files) >= world:
                reader.split_info = replace(reader.split_info, filenames=files[rank::world])
            elif rank:
                dealt.reader = ()
        return dealt

    def _require_samples(self, world: int) -> None:
        """Raise a `UserError` where a set of Hugging Face's that was downloaded, whose samples are dealt out evenly, has too few."""
        samples = getattr(self.reader, "num_samples", None)
        if getattr(self.reader, "builder", None) is None or samples is None or samples >= world * self._workers:
            return
        raise UserError(
            f"{samples} samples to train on are too few for {world} processes with {self._workers} workers each: give fewer processes, or "
            f"data.num_workers={samples // world}"
        )

    def _files(self) -> Sequence[str] | None:
        """The shards, where timm's reader says which it is going to read (that of WebDataset)."""
        split = getattr(self.reader, "split_info", None)
        known = is_dataclass(split) and any(field.name == "filenames" for field in fields(split))
        return split.filenames if known else None  # type: ignore[union-attr]

    def begin_pass(self) -> None:
        """To be called before the set is read from its beginning."""
        self._most.copy_(self.counts())
        self._pass.zero_()

    def counts(self) -> torch.Tensor:
        """The most of each kind that a pass has met here."""
        return torch.maximum(self._most, self._pass.sum(0))

    def take(self, counts: Sequence[torch.Tensor]) -> None:
        """Count what every process of the run has met: in parts that were dealt out, so the sum of all."""
        self._most.copy_(torch.stack(list(counts)).sum(0))
        self._pass.zero_()

    @property
    def broken(self) -> int:
        """How many samples could not be read."""
        return int(self.counts()[-1])

    @property
    def done(self) -> dict[Read, int]:
        """How many pictures each kind of conversion was needed for."""
        return dict(zip(_KINDS, self.counts()[:-1].tolist(), strict=True))

    def notes(self) -> list[Note]:
        """What was passed over."""
        text = f"{counted(self.broken, 'sample')} of the stream that could not be read passed over; timm's warnings say why"
        return [Note("passed_over", self.broken, text)] if self.broken else []


@contextmanager
def _passed_over(row: torch.Tensor) -> Iterator[None]:
    """Inside, count in the last column what timm's reader of WebDataset shards passes over, of which it only warns."""

    def count(record: logging.LogRecord) -> bool:
        row[-1] += record.levelno >= logging.WARNING
        return True

    _TIMM.addFilter(count)
    try:
        yield
    finally:
        _TIMM.removeFilter(count)
