"""One image at a time: sets in memory, sets on disk, and the files among them that cannot be decoded."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from compressvit import processes
from compressvit.data.annotated import truth_of
from compressvit.data.bands import Bands, Picture
from compressvit.data.clips import ClipFiles
from compressvit.data.files import PictureFiles
from compressvit.data.notes import notes_of_reading
from compressvit.data.order import View
from compressvit.data.photographs import numbered, photographs
from compressvit.data.pictures import (
    MODES,
    Read,
    picture_shape,
    read_picture,
    refuse_shortage,
    require_channels,
    standard,
)
from compressvit.data.sets.base import evenly
from compressvit.data.spec import Clip, Data
from compressvit.data.streams import Stream
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.notes import Note
from compressvit.tasks.targets import NO_IMAGE, NO_LABEL

log = logging.getLogger("compressvit")

MAX_CONSECUTIVE_BROKEN = 50

# what a set that opens its files itself passes on of Pillow, for a file that is not an image or ends early; `BrokenPicture` is a ValueError
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's CPU generators start from `seed`; after, they go on as before.

    None leaves them alone.
    """
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Samples(Dataset):
    """A map-style set, or a subset of one.

    An item is `(transform(image), target)`; without a transform the image is a PIL image of 8 bits a channel. An image without a
    label has target NO_LABEL (-1). Loaders ask for a whole batch as (index, seed) pairs: the seed of its first pair
    decides its augmentation, so that it depends neither on the worker that reads it nor on what was drawn before. With a `View` in
    place of the seed every image has a seed of its own.

    A file that cannot be decoded is flagged in `broken`, uint8 (N,) in memory shared with loader workers. While
    `training` the next good sample takes its place; otherwise a black image with target NO_IMAGE (-2). How the other files had
    to be converted is recorded in `done`, int16 (N,), as bits of `Read`. A `part` records both in its whole, too. An image
    that a model of so many `channels` cannot be given is as one that cannot be decoded.

    Args:
        exif: turn images as their EXIF blocks say.
        whole: the set of which this is a part, and the place in it of every sample.
    """

    def __init__(
        self,
        source: Any,
        indices: Sequence[int] | None = None,
        labelled: bool = True,
        *,
        exif: bool = False,
        whole: tuple[Samples, Sequence[int]] | None = None,
    ):
        self.source, self.labelled, self.exif, self._whole = source, labelled, exif, whole
        self.indices = range(len(source)) if indices is None else indices
        self.broken = torch.zeros(len(self.indices), dtype=torch.uint8).share_memory_()
        self.done = torch.zeros(len(self.indices), dtype=torch.int16).share_memory_()
        self.transform: Any = None
        self.channels: int | None = None  # of the model that `transform` is for
        self.placed = False  # whether `transform` takes and returns the target, too
        self.training = False
        self._photographs: dict[str | None, torch.Tensor] = {}  # by `data.group_by`

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def clips(self) -> Clip | None:
        """Which frames are taken of its videos; None of a set of images."""
        return self.source.clip if isinstance(self.source, ClipFiles) else None

    @property
    def noun(self) -> str:
        """What messages call a sample."""
        return "image" if self.clips is None else "video"

    def part(self, positions: Sequence[int]) -> Samples:
        """The samples at these positions, as a set of their own."""
        indices = [self.indices[i] for i in positions]
        return Samples(self.source, indices, self.labelled, exif=self.exif, whole=(self, positions))

    def _record(self, position: int, done: int, *, broken: bool = False) -> None:
        """How the file at a position was read, here and in the set that this one is a part of."""
        self.broken[position], self.done[position] = int(broken), done
        if self._whole is not None:
            whole, positions = self._whole
            whole._record(positions[position], done, broken=broken)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self._sample(index)
        if self.transform is None:
            return image, target
        return self.transform(image, target) if self.placed else (self.transform(image), target)

    def __getitems__(self, keys: Sequence[tuple[int, int | View | None]]) -> list[tuple[Any, Any]]:
        drawn = keys[0][1]
        if isinstance(drawn, View):
            return [self._viewed(index, drawn) for index, _ in keys]
        with seeded(drawn):
            return [self[index] for index, _ in keys]

    def _viewed(self, index: int, view: View) -> tuple[Any, Any]:
        with seeded(view.seed_of(index)):
            return self[index]

    def _sample(self, index: int) -> tuple[Picture, Any]:
        tries = min(MAX_CONSECUTIVE_BROKEN, len(self)) if self.training else 1
        for position in range(index, index + tries):
            position %= len(self)
            if self.broken[position]:
                continue
            try:
                image, target, done = self.read(position, self.channels)
            except _DECODE_ERRORS as error:
                refuse_shortage(error)  # of a set that opens its files itself
                # BrokenFiles.report finds the reason again: a worker has no way to reach the run's log
                self._record(position, 0, broken=True)
                continue
            self._record(position, int(done))
            return image, target if self.labelled and target is not None else NO_LABEL
        return _black(self.channels), NO_IMAGE

    def read(self, position: int, channels: int | None = None) -> tuple[Picture, Any, Read]:
        """The decoded image of 8 bits a channel, for a model of so many, its stored target, and what was done to read it. Raises as
        `read_picture`, or whatever a set that opens its files itself raises where one is broken."""
        index = self.indices[position]
        if isinstance(self.source, ClipFiles):
            return self.source.read(index, channels, training=self.training)
        if isinstance(self.source, PictureFiles):
            path, target = self.source.samples[index]
            image, done = read_picture(path, exif=self.exif, channels=channels)
            target = truth_of(image, target)
        elif isinstance(self.source, ImageDataset):
            # timm's own __getitem__ replaces a broken file without a word, so the file is opened here
            file, target, *_ = self.source.reader[index]
            with file:
                image, done = read_picture(file, exif=self.exif, channels=channels)
        else:
            image, target = self.source[index]
            # a set of torchvision's whose files are read by `read_picture` gives what that gives
            image, done = image if isinstance(image, tuple) else standard(image, exif=self.exif)
            if channels is not None:
                require_channels(image, channels)
        return image, target, done

    def identity(self) -> str:
        """A hash of the names and labels of all images, wherever their folder is; of what is in memory, its size."""
        found = hashlib.sha256(f"{type(self.source).__name__} {len(self.source)}".encode())
        files = self.source.samples if isinstance(self.source, PictureFiles) else []
        folders = {os.path.dirname(path) for path, _ in files}
        try:
            shared = os.path.commonpath(folders) if folders else ""
        except ValueError:  # a list of absolute and relative paths
            shared = ""
        for path, target in files:
            found.update(f"{path[len(shared) :]}\0{target}\n".encode(errors="surrogateescape"))
        found.update(str(list(self.indices)).encode())
        return found.hexdigest()

    def glimpse(self, count: int) -> str:
        """A hash of the decoded pixels of up to `count` images, evenly taken: `identity` knows names and labels alone."""
        found = hashlib.sha256()
        for place in evenly(len(self), count):
            try:
                image = self.read(place)[0]
            except _DECODE_ERRORS:
                continue
            found.update(np.asarray(image.values if isinstance(image, Bands) else image).tobytes())
        return found.hexdigest()

    def photographs(self, data: Data) -> torch.Tensor:
        """The number of the photograph of every sample, int64 (N,), as `data.group_by` says; without paths each is one of its own."""
        by = data.group_by
        if by not in self._photographs:  # a million paths take seconds
            if isinstance(self.source, ImageDataset) or getattr(self.source, "samples", None):
                root = f"{expanded(data.root, 'data.root')}/" if data.root else ""
                paths = [self.name(i).removeprefix(root) for i in range(len(self))]
                self._photographs[by] = numbered(photographs(paths, by)[0])
            else:
                self._photographs[by] = torch.arange(len(self))
        return self._photographs[by]

    def shapes(self, count: int, channels: int) -> list[tuple[int, int, int]]:
        """Height and width in pixels, and channels, of up to `count` files, evenly taken, as their headers say for a model of `channels`;
        nothing of what cannot be read, or is no file."""
        if not isinstance(self.source, PictureFiles):
            return []
        chosen = (self.source.samples[self.indices[i]][0] for i in range(0, len(self), max(1, len(self) // count)))
        found = (picture_shape(path, channels) for path in islice(chosen, count))
        return [shape for shape in found if shape is not None]

    def name(self, position: int) -> str:
        """The path of a sample, or something that stands for it in a set without paths."""
        index, path = self.indices[position], None
        if isinstance(self.source, ImageDataset):
            path = self.source.filename(index, absolute=True)
            if isinstance(self.source.reader, ReaderImageInTar):
                path = f"{self.source.reader.root}: {path}"
        elif files := getattr(self.source, "samples", None):
            path = files[index][0]
        return str(path) if path else f"{type(self.source).__name__}[{index}]"


def _black(channels: int | None) -> Picture:
    """What stands for an image that cannot be read, for a model of so many channels."""
    return (
        Image.new("L", (8, 8)) if channels is None or channels in MODES else Bands(np.zeros((8, 8, channels), np.uint8))
    )


class BrokenFiles:
    """The image files of a run that could not be decoded, whichever loader worker noticed; samples of streams are only counted."""

    def __init__(self, *sets: Any):
        self._sets = [s for s in sets if isinstance(s, Samples)]
        self._streams = [s for s in sets if isinstance(s, Stream)]
        self._reported: set[tuple[int, int]] = set()

    def _found(self) -> list[tuple[int, int]]:
        # of a copy: torch counts and then fills, and the processes that load images may write in between
        return [(k, int(i)) for k, s in enumerate(self._sets) for i in s.broken.clone().nonzero().flatten()]

    @property
    def count(self) -> int:
        """How many broken files were met so far; a file that was never read is not counted."""
        return self._files + sum(stream.broken for stream in self._streams)

    @property
    def _files(self) -> int:
        return sum(int(s.broken.count_nonzero()) for s in self._sets)

    @property
    def paths(self) -> list[str]:
        """Their paths: the training set's first, in the order of each set."""
        return [self._sets[k].name(i) for k, i in self._found()]

    def notes(self) -> list[Note]:
        """What was done to the pictures that were read so far, and what was passed over in streams."""
        counts = {
            kind: sum(int((s.done & int(kind) > 0).sum()) for s in self._sets)
            + sum(s.done[kind] for s in self._streams)
            for kind in Read
        }
        passed_over = [note for stream in self._streams for note in stream.notes()]
        return passed_over + notes_of_reading(
            counts, exif=any([*(s.exif for s in self._sets), *(s.exif for s in self._streams)])
        )

    def gather(self) -> None:
        """Know of those that other processes of the run have met."""
        found = processes.gathered([(samples.broken.clone(), samples.done.clone()) for samples in self._sets])
        for samples, *parts in zip(self._sets, *found, strict=True):
            for broken, done in parts:
                samples.broken |= broken
                samples.done |= done
        for stream, *counts in zip(
            self._streams, *processes.gathered([s.counts() for s in self._streams]), strict=True
        ):
            stream.take(counts)

    def report(self, channels: int | None = None) -> None:
        """Logs each newly found file once, with the reason.

        Args:
            channels: of the model that they were read for.

        Raises:
            UserError: 50 consecutive files (or the whole set, if smaller) are broken.
        """
        # before the flags are looked at: a worker may raise more of them meanwhile, which the next call then finds
        new = [key for key in self._found() if key not in self._reported]
        if not new:
            return
        for samples in self._sets:
            run = min(MAX_CONSECUTIVE_BROKEN, len(samples))
            flags = torch.cat([samples.broken, samples.broken[: run - 1]])  # the search for a replacement wraps around
            if flags.unfold(0, run, 1).all(1).any():
                first = int(samples.broken.argmax())
                raise UserError(
                    f"{run} consecutive {samples.noun} files cannot be decoded ({int(samples.broken.count_nonzero())} of "
                    f"{len(samples)} so far), such as {samples.name(first)} ({_reason(samples, first, channels)}); that is "
                    f"more than a few bad files: check that data.root holds intact {samples.noun}s"
                )
        for key in new:
            self._reported.add(key)
            samples, position = self._sets[key[0]], key[1]
            reason = _reason(samples, position, channels)
            log.warning("skipped a broken %s: %s: %s", samples.noun, samples.name(position), reason)


def _reason(samples: Samples, position: int, channels: int | None) -> str:
    """Why an image cannot be read for a model of so many channels."""
    try:
        samples.read(position, channels)
    except UnidentifiedImageError:
        return "it is not an image"
    except _DECODE_ERRORS as error:
        return str(error) or type(error).__name__
    return "it could not be read before"
