"""The cache before a teacher: what is there is read, and what is not is asked and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressvit import processes
from compressvit.data.input import InputConfig, Side
from compressvit.data.order import View
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.tasks.base import Task
from compressvit.training.asking import Answers, Asked, Shown, Taken
from compressvit.training.cache import identity
from compressvit.training.cache.form import Form, form_of
from compressvit.training.cache.spec import Cache
from compressvit.training.cache.store import INDEX, Index, Store, create, is_free, read_index, refuse_size, view_bytes
from compressvit.training.spec import Training
from compressvit.training.terms import Term

_ALONE = 0.05  # of the largest value: how far an answer to one image may be from that among others, in bf16 as in fp32


class TeacherCache:
    """A teacher's answers in a folder.

    Attributes:
        read, asked: how many answers this process has read, and how many the teacher was asked for.
    """

    def __init__(self, spec: Cache, views: int, form: Form, store: Store, *, mixes: bool):
        self.spec, self.views, self.form, self.store, self._mixes = spec, views, form, store, mixes
        self.read = self.asked = 0

    def view(self, epoch: int) -> View:
        """What an epoch shows. What is mixed within a batch is an image of the batch's, so batches then come again, too."""
        return View(self.spec.seed, epoch % self.views, ordered=self._mixes)

    def shown(self, loader: Any, epoch: int, batch: int) -> Shown:
        """Which images a batch of an epoch has."""
        return Shown(self.view(epoch), loader.shown(batch), batch)

    def before(self, answers: Answers) -> Answers:
        """The teacher that is asked for what is not there."""
        return _Remembered(self, answers)

    def sync(self) -> None:
        """Wait until every answer of this process is on the disk."""
        self.store.sync()

    def told(self) -> str:
        """How often the teacher was asked, by all processes."""
        counts = processes.gathered((self.read, self.asked))
        read, asked = (sum(each) for each in zip(*counts, strict=True))
        return f"{read:,} of the teacher's answers were read from {self.store.folder}, and it was asked for {asked:,}"


class _Remembered:
    def __init__(self, cache: TeacherCache, answers: Answers):
        self._cache, self._answers, self._tried = cache, answers, False

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, shown: Shown | None) -> tuple[Any, Taken]:
        assert shown is not None, "a loader that shows views"
        cache, view = self._cache, shown.view.number
        places = shown.places.tolist()
        assert len(places) == len(images), "every image has its place"
        rows, there = cache.store.read(view, places)
        missing = np.flatnonzero(~there)
        if len(missing):
            wanted = images if len(missing) == len(images) else images[torch.from_numpy(missing).to(images.device)]
            fresh = self._ask(wanted)
            rows[missing] = fresh
            cache.store.write(view, [places[i] for i in missing], fresh)
        cache.read, cache.asked = cache.read + len(places) - len(missing), cache.asked + len(missing)
        return cache.form.decode(torch.from_numpy(np.ascontiguousarray(rows)).to(images.device, non_blocking=True))

    def _ask(self, images: torch.Tensor) -> np.ndarray:
        form, answered = self._cache.form, self._answers(images, None)
        encoded = form.encode(*answered)
        if not self._tried and len(images) > 1:
            self._tried = True
            alone = form.decode(form.encode(*self._answers(images[:1], None)))
            _refuse_mixture(form.decode(encoded[:1]), alone)
        return encoded.cpu().numpy()

    def close(self) -> None:
        self._answers.close()
        self._cache.store.close()


def _refuse_mixture(among: tuple[torch.Tensor, Taken], alone: tuple[torch.Tensor, Taken]) -> None:
    """Raise a `UserError` where an answer to an image depends on the others of its batch."""
    pairs = [("its outputs", among[0], alone[0])]
    pairs += [
        (f"{path} {io}", among[1][path][io], value) for path, taps in alone[1].items() for io, value in taps.items()
    ]
    for what, one, other in pairs:
        if float((one - other).abs().max()) > _ALONE * float(other.abs().max()):
            raise UserError(
                f"cache keeps an answer for every image, and {what} of the teacher for an image depends on the other images of the batch; "
                "leave cache out"
            )


def open_cache(
    spec: Cache,
    training: Training,
    loader: Any,
    teacher: Side,
    source: InputConfig,
    terms: Sequence[Term],
    task: Task,
    temperature: float,
    beside: Path,
) -> TeacherCache:
    """The cache of a distillation, which is made where there is none yet.

    Args:
        loader: of `train_loader`.
        source: what the student's images look like.
        temperature: at which the teacher's probabilities are compared.
        beside: the run folder.

    Raises:
        UserError: what is in the folder are other answers, or the files would be too large.
    """
    form = processes.first(lambda: form_of(spec, teacher, terms, task, temperature))
    found = _identity(spec, training, loader, teacher, source, form)
    images = found["data"]["images"]
    views = spec.views or training.epochs
    processes.first(lambda: refuse_size(spec.limit_gb, views, images, view_bytes(1, form.bytes)))
    folder = beside.parent / "teacher_cache" / identity.name_of(found)
    if spec.folder is not None:
        folder = expanded(spec.folder, "cache.folder")
    index = Index(images=images, bytes=form.bytes, identity=found)
    processes.led(lambda: _take(folder, index))
    return TeacherCache(spec, views, form, Store(folder, index), mixes=bool(training.mixup or training.cutmix))


def answers_of(
    teacher: Side | None,
    source: InputConfig,
    terms: Sequence[Term],
    device: torch.device,
    compiled: bool,
    cache: TeacherCache | None,
) -> Answers | None:
    """Who answers in training: the teacher, or a cache before it; None without a teacher. Arguments as of `Asked`."""
    if teacher is None:
        return None
    teacher.model.eval()
    asked = Asked(teacher, source, terms, device, compiled=compiled)
    return asked if cache is None else cache.before(asked)


def _identity(
    spec: Cache, training: Training, loader: Any, teacher: Side, source: InputConfig, form: Form
) -> dict[str, Any]:
    """What the answers depend on, for JSON."""
    mixing = None
    if training.mixup or training.cutmix:  # then on the other images of a batch
        batch = {"batch_size": loader.batch_size, "processes": processes.count()}
        mixing = {"mixup": training.mixup, "cutmix": training.cutmix, **batch}
    theirs = teacher.input.as_dict()
    return {
        "teacher": identity.of_teacher(teacher.model) | {"precision": training.precision},
        **loader.identity(),
        "teacher_input": None if teacher.input == source else theirs,
        "seed": spec.seed,
        "mixing": mixing,
        "kept": form.words(),
    }


def _take(folder: Path, index: Index) -> None:
    """Make the folder a cache, or see that it is the one that is meant."""
    if not (folder / INDEX).exists():
        if not is_free(folder):
            raise UserError(
                f"cache.folder={folder} holds something other than a teacher's answers; give an empty folder"
            )
        create(folder, index)
    there = read_index(folder)
    differs = identity.difference(there.identity, index.identity)
    if differs is None and (there.images, there.bytes) != (index.images, index.bytes):
        differs = f"an answer has {there.bytes} bytes there and {index.bytes} here"
    if differs is not None:
        raise UserError(
            f"cache.folder={folder} holds answers to something else: {differs}; give another folder, or remove them with "
            f"`compressvit cache clear {folder}`"
        )
