"""Batches for training and evaluation.

Transforms, collation and per-batch normalisation on the device are timm's. Added here: one draw at the start of an
epoch decides everything that is random in it, so that an epoch does not depend on the number of workers or on where a
run was resumed; and whole-batch indexing for small sets held in memory, many times faster than image by image.
"""

from __future__ import annotations

import copy
import dataclasses
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from compressvit import processes
from compressvit.data.clip_transform import ClipTransform
from compressvit.data.collation import Targets, collate
from compressvit.data.image_transform import image_transform
from compressvit.data.input import InputConfig
from compressvit.data.opening import Datasets
from compressvit.data.order import Order, StreamEpoch, View
from compressvit.data.photographs import Photographed, spread
from compressvit.data.pictures import BrokenPicture
from compressvit.data.pixel_batches import pixel_batches
from compressvit.data.placed_transform import PlacedTransform
from compressvit.data.samples import Samples, seeded
from compressvit.data.spec import Augment, Data
from compressvit.data.streams import Stream
from compressvit.data.workers import RestartingLoader
from compressvit.errors import UserError
from compressvit.tasks.base import Task, find_task

_LOOKED_AT = 16  # images, to tell a set from another one with the same names
CALIBRATION_BATCH = 16  # gradients may be wanted, for which an evaluation batch would be too large


class Loader(PrefetchLoader):
    """Batches `(images, targets)` on the device: float32 (B, C, H, W) normalised, and targets as the task collates them, int64 (B,) of
    classes.

    Attributes:
        batch_size: images per batch and process.
        made_of: of a training set, the data, its section of the recipe, and the augmentation.
    """

    made_of: tuple[Datasets, Data, Augment]

    def __init__(
        self,
        batches: DataLoader,
        epoch: Order | StreamEpoch | None,
        config: InputConfig,
        device: torch.device,
        **erasing: Any,
    ):
        super().__init__(batches, mean=config.mean, std=config.std, channels=config.channels, device=device, **erasing)
        self.batch_size, self.config = batches.batch_size, config
        self._epoch = epoch
        if self.random_erasing is not None and epoch is not None:
            self.random_erasing = _SeededErasing(self.random_erasing, epoch, device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        if self._epoch is not None:
            self._epoch.draw()  # at once, where timm's own iterator does nothing before its first batch is asked for
        batches: Iterator[tuple[torch.Tensor, Any]] = super().__iter__()
        return ((images, targets.value if isinstance(targets, Targets) else targets) for images, targets in batches)

    def show(self, view: View) -> None:
        """Have the next epochs show this view; for data that `refuse_views` does not refuse."""
        assert isinstance(self._epoch, Order), "images that have places"
        self._epoch.view = view

    def shown(self, batch: int) -> torch.Tensor:
        """The places in the training set of the images of a batch of this epoch, int64 (B,); -1 where another image stands in for one that
        cannot be read."""
        assert isinstance(self._epoch, Order), "there is a view"
        size = self.batch_size or 1
        places = torch.tensor([place for place, _ in self._epoch.pairs[batch * size : (batch + 1) * size]])
        broken = getattr(self.dataset, "broken", None)
        return places if broken is None else torch.where(broken[places] > 0, -1, places)

    def identity(self) -> dict[str, Any]:
        """What the images of a view depend on besides its seed and number, for JSON."""
        datasets, data, augment = self.made_of
        train = datasets.train
        assert isinstance(train, Samples), "streams show no views"
        look: dict[str, Any] = {"files": train.identity(), "pixels": train.glimpse(_LOOKED_AT)}
        if train.clips is not None:  # a glimpse is of one frame
            look["clip"] = train.clips.model_dump(mode="json", include={"sampling", "stride"})
        return {
            "data": {"name": data.name, "images": len(train), **look},
            "preprocessing": {**self.config.as_dict(), "exif": data.exif},
            "augmentation": augment.model_dump(mode="json"),
        }


def train_loader(
    datasets: Datasets,
    data: Data,
    config: InputConfig,
    device: torch.device,
    *,
    batch_size: int | None = None,
    drop_last: bool = True,
    distributed: bool | None = None,
) -> Loader:
    """Shuffled, augmented batches; a target of -1 is an image without a label.

    `iter(loader)` draws once from torch's global generator. That draw decides the order and the augmentation of the
    epoch, whatever `num_workers` is and whatever is drawn while it runs. In a streaming set it decides the order of the
    shards; what their reader and augmentation draw follows the global generators, and depends on `num_workers`.

    A set smaller than a batch is one whole batch. Small sets in memory (digits, fashion_mnist) use no workers unless
    each image is augmented by itself (random crop, colour jitter, auto_augment).

    Args:
        batch_size: images per batch and process; None = `data.batch_size`.
        drop_last: leave out an incomplete last batch.
        distributed: each process of the run gets its own part, cut by the draw of the leader; None: if there are several. Batch i of all
            of them together has the images of batch i of one process with as many images.

    Raises:
        UserError: while iterating, when a label is out of range or 50 consecutive files are broken.
    """
    augment = data.augment
    divided = processes.count() > 1 if distributed is None else distributed
    if divided and isinstance(datasets.train, Samples) and len(datasets.train) < processes.count():
        raise UserError(
            f"data.name={data.name}: {len(datasets.train)} images to train on are too few for {processes.count()} processes; start fewer"
        )
    batches = _batches(datasets, data, config, device, batch_size or data.batch_size, drop_last, divided, augment)
    loader = Loader(
        *batches,
        config,
        device,
        re_prob=augment.random_erasing,
        re_mode=augment.erasing_mode,
        re_count=augment.erasing_count,
    )
    loader.made_of = datasets, data, augment
    return loader


def eval_loader(
    datasets: Datasets,
    data: Data,
    config: InputConfig,
    device: torch.device,
    *,
    batch_size: int | None = None,
    distributed: bool = False,
) -> Loader:
    """The validation set in its own order, without augmentation; draws nothing from the global generators.

    Broken files are left out, so a batch may be smaller than others. A target of -1 is an image without a label. With
    `distributed` the batches are dealt out to the processes of the run in turn; the number of batches may differ by one.
    """
    size = batch_size or data.eval_batch_size or data.batch_size
    clips = getattr(datasets.validation, "clips", None)
    beside = config if clips is None else config.beside(clips.views * clips.crops)
    return Loader(*_batches(datasets, data, config, device, size, False, distributed, None), beside, device)


def calibration_batches(
    datasets: Datasets, data: Data, config: InputConfig, device: torch.device, *, images: int, seed: int
) -> Iterator[Photographed]:
    """Normalised batches of about `images` training images, drawn by `seed`, without augmentation or labels.

    They are of as many different photographs as possible (`data.group_by`). A streaming set gives its first ones. Broken files are left
    out. To several processes batches are dealt out in turn, but for those of a stream, which each of them gets.
    """
    subset, part = datasets.train, None
    if isinstance(subset, Samples):
        drawn = torch.randperm(len(subset), generator=torch.Generator().manual_seed(seed))
        found = subset.photographs(data)
        batches = [*spread(drawn, found)[:images].split(CALIBRATION_BATCH)]
        chosen = torch.cat(batches[processes.rank() :: processes.count()])
        of = found[chosen]
        subset = part = subset.part(chosen.tolist())
    loader = eval_loader(
        dataclasses.replace(datasets, validation=subset), data, config, device, batch_size=CALIBRATION_BATCH
    )
    done = 0  # of the set, with its broken files
    left = images
    for batch, _ in loader:
        if part is None:
            yield Photographed(batch[:left], None)
        else:
            read = (part.broken[done:] == 0).nonzero().flatten()[: len(batch)] + done
            done = int(read[-1]) + 1
            yield Photographed(batch, of[read])
        left -= len(batch)
        if left <= 0:
            return


class _SeededErasing(RandomErasing):
    """timm's random erasing, which draws from the global generators, with one seed of the epoch per batch."""

    def __init__(self, erase: RandomErasing, epoch: Order | StreamEpoch, device: torch.device):
        vars(self).update(vars(erase))  # timm has set it up
        self.epoch = epoch
        self.devices = [device] if device.type == "cuda" else []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if isinstance(self.epoch, Order) and (view := self.epoch.view) is not None:
            places = self.epoch.next_places(len(images))  # batches come here in their order
            for image, place in zip(images.split(1), places, strict=True):
                self._erased(image, view.seed_of(place, 1))  # in place, as timm does it
            return images
        return self._erased(images, self.epoch.batch_seeds.getrandbits(31))

    def _erased(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(self.devices), seeded(seed):
            if self.devices:
                torch.cuda.manual_seed(seed)
            return super().__call__(images)


class _CheckedLoader(RestartingLoader):
    """A DataLoader that names broken files and refuses impossible labels as it goes, in the main process."""

    datasets: Datasets
    name: str
    task: Task
    channels: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | Targets]]:  # type: ignore[override]
        if isinstance(self.dataset, Stream):
            self.dataset.begin_pass()
        try:
            for batch in self.batches():
                self.datasets.broken.report(self.channels)
                if batch is not None:
                    images, targets = batch
                    self.task.check_set(targets, self.datasets.num_classes, self.name)
                    yield images, targets if isinstance(targets, torch.Tensor) else Targets(targets)
        except Exception as error:  # workers end whatever it was; what is not of a picture goes on as it is
            self.end_workers()
            if isinstance(error, BrokenPicture):  # of a stream; others count theirs
                reason = str(error).rstrip().rpartition("BrokenPicture: ")[2]  # a worker adds its trace
                raise UserError(f"data.name={self.name}: an image cannot be used: {reason}") from error
            raise


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A signal to the whole process group (Ctrl-C, a job scheduler) must not end the workers before the checkpoint is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _batches(
    datasets: Datasets,
    data: Data,
    config: InputConfig,
    device: torch.device,
    batch_size: int,
    drop_last: bool,
    distributed: bool,
    augment: Augment | None,
) -> tuple[_CheckedLoader, Order | StreamEpoch | None]:
    """uint8 batches on the CPU, for training when there is an `augment`, and what starts their epochs."""
    training, task = augment is not None, find_task(data.usual_task)
    source: Any = datasets.train if training else datasets.validation
    dataset: Any = None
    order: Order | None = None
    epoch: Order | StreamEpoch | None = None
    if isinstance(source, Samples):
        repeats = augment.repeats if augment is not None else 1
        order = epoch = Order(len(source), training, distributed, repeats, max(1, min(batch_size, len(source))))
        batch_size = max(1, min(batch_size, len(order)))
        dataset = pixel_batches(source, config, augment)
    in_memory = dataset is not None
    workers = 0 if in_memory else data.num_workers  # indexing is quicker than a queue between processes
    if not in_memory:
        dataset = copy.copy(source)  # the same files, and the same record of broken ones, prepared for this model
        clips = getattr(source, "clips", None)
        prepare: Any = PlacedTransform if task.places else image_transform
        prepare = prepare if clips is None else partial(ClipTransform, clip=clips)
        dataset.transform, dataset.training = prepare(config, augment, exif=data.exif), training
        dataset.placed, dataset.channels = task.places, config.channels
    if isinstance(source, Stream):
        dataset = dataset.dealt(training=training, distributed=distributed)
        dataset.set_loader_cfg(num_workers=workers)
        epoch = StreamEpoch(dataset, distributed) if training else None
    loader = _CheckedLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=_as_it_is if in_memory else partial(collate, task=task),
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and order is not None,  # a stream's workers take their seed when they start
        # a DataLoader draws a seed for its workers; ours need none, and evaluation must not disturb training
        generator=torch.Generator() if order is not None or not training else None,
    )
    loader.datasets, loader.name, loader.task, loader.channels = datasets, data.name, task, config.channels
    return loader, epoch
