"""A cache before a model: what is there is read, and what is not is asked and kept. Here of a teacher; `features.py` has the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressvit import processes
from compressvit.data.input import InputConfig, Side
from compressvit.data.order import View
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.tasks.base import Task
from compressvit.training.asking import Answers, Asked, Features, Shown, Taken
from compressvit.training.cache import identity
from compressvit.training.cache.form import Form, form_of
from compressvit.training.cache.spec import Cache, CacheFiles
from compressvit.training.cache.spec import Features as FeatureFiles
from compressvit.training.cache.store import INDEX, Index, Store, create, is_free, read_index, refuse_size, view_bytes
from compressvit.training.spec import Training
from compressvit.training.terms import Term

_ALONE = 0.05  # of the largest value: how far an answer to one image may be from that among others, in bf16 as in fp32


class Kept:
    """What a model has computed for every image in every view, in a folder.

    Attributes:
        read, asked: how many images' this process has read, and for how many the model ran.
    """

    whose = "the teacher"  # what messages call the model

    def __init__(self, spec: CacheFiles, views: int, form: Any, store: Store, *, mixes: bool = False):
        self.spec, self.views, self.form, self.store, self._mixes = spec, views, form, store, mixes
        self.read = self.asked = 0
        self._tried = False

    def view(self, epoch: int) -> View:
        """What an epoch shows. What is mixed within a batch is an image of the batch's, so batches then come again, too."""
        return View(self.spec.seed, epoch % self.views, ordered=self._mixes)

    def shown(self, loader: Any, epoch: int, batch: int) -> Shown:
        """Which images a batch of an epoch has."""
        return Shown(self.view(epoch), loader.shown(batch), batch)

    def before(self, answers: Answers) -> Answers:
        """The teacher, asked for what is not there where its answers are kept."""
        return answers

    def within(self, model: nn.Module) -> Features | None:
        """The features of the trained model, where they are kept."""
        return None

    def evaluating(self, evaluate: Callable[[nn.Module], dict[str, Any]]) -> Callable[[nn.Module], dict[str, Any]]:
        """An evaluation during the phase, with what is kept of it."""
        return evaluate

    @torch.no_grad()
    def remember(self, images: torch.Tensor, shown: Shown, ask: Callable[[torch.Tensor], tuple[Any, ...]]) -> Any:
        """What `ask` gives for images (B, …), as the form decodes it: read where it is there, else asked and kept."""
        places = shown.places.tolist()
        assert len(places) == len(images), "every image has its place"
        rows, there = self.store.read(shown.view.number, places)
        missing = np.flatnonzero(~there)
        if len(missing):
            wanted = images if len(missing) == len(images) else images[torch.from_numpy(missing).to(images.device)]
            fresh = self._ask(wanted, ask)
            rows[missing] = fresh
            self.store.write(shown.view.number, [places[i] for i in missing], fresh)
        self.read, self.asked = self.read + len(places) - len(missing), self.asked + len(missing)
        return self.form.decode(torch.from_numpy(np.ascontiguousarray(rows)).to(images.device, non_blocking=True))

    def _ask(self, images: torch.Tensor, ask: Callable[[torch.Tensor], tuple[Any, ...]]) -> np.ndarray:
        form, encoded = self.form, self.form.encode(*ask(images))
        if not self._tried and len(images) > 1:
            self._tried = True
            among, alone = (form.named(*form.decode(rows)) for rows in (encoded[:1], form.encode(*ask(images[:1]))))
            _refuse_mixture(among, alone, self.whose)
        found: np.ndarray = encoded.cpu().numpy()
        return found

    def sync(self) -> None:
        """Wait until everything of this process is on the disk."""
        self.store.sync()

    def told(self) -> str:
        """How often the model ran, in all processes."""
        counts = processes.gathered((self.read, self.asked))
        read, asked = (sum(each) for each in zip(*counts, strict=True))
        return self._words(read, asked)

    def _words(self, read: int, asked: int) -> str:
        return f"{read:,} of the teacher's answers were read from {self.store.folder}, and it was asked for {asked:,}"


class TeacherCache(Kept):
    """A teacher's answers."""

    def before(self, answers: Answers) -> Answers:
        return _Remembered(self, answers)


class _Remembered:
    def __init__(self, cache: TeacherCache, answers: Answers):
        self._cache, self._answers = cache, answers

    def __call__(self, images: torch.Tensor, shown: Shown | None) -> tuple[Any, Taken]:
        assert shown is not None, "a loader that shows views"
        found: tuple[Any, Taken] = self._cache.remember(images, shown, lambda some: self._answers(some, None))
        return found

    def close(self) -> None:
        self._answers.close()
        self._cache.store.close()


def _refuse_mixture(among: Mapping[str, torch.Tensor], alone: Mapping[str, torch.Tensor], whose: str) -> None:
    """Raise a `UserError` where an answer to an image depends on the others of its batch."""
    for what, other in alone.items():
        if float((among[what] - other).abs().max()) > _ALONE * float(other.abs().max()):
            raise UserError(
                f"cache keeps an answer for every image, and {what} of {whose} for an image depends on the other images of the batch; "
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
    index = Index(images=images, bytes=form.bytes, identity=found)
    store = taken(spec, views, index, beside.parent / "teacher_cache", ("a teacher's answers", "answers to"))
    return TeacherCache(spec, views, form, store, mixes=bool(training.mixup or training.cutmix))


def taken(spec: Cache | FeatureFiles, views: int, index: Index, beside: Path, holds: tuple[str, str]) -> Store:
    """The files of a cache, which are made where there are none yet.

    Args:
        beside: the folder in which caches have theirs, if the recipe names no other.
        holds: what a cache holds, and what messages call that before what it is of.

    Raises:
        UserError: what is in the folder is of something else, or the files would be too large.
    """
    processes.first(lambda: refuse_size(spec, views, index.images, view_bytes(1, index.bytes)))
    folder = beside / identity.name_of(index.identity)
    if spec.folder is not None:
        folder = expanded(spec.folder, "cache.folder")
    processes.led(lambda: make(folder, index, *holds))
    return Store(folder, index)


def answers_of(
    teacher: Side | None,
    source: InputConfig,
    terms: Sequence[Term],
    device: torch.device,
    compiled: bool,
    cache: Kept | None,
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


def make(folder: Path, index: Index, whole: str, of: str) -> None:
    """Make the folder a cache, or see that it is the one that is meant."""
    if not (folder / INDEX).exists():
        # another run may have made it one since
        if not is_free(folder) and not (folder / INDEX).exists():
            raise UserError(f"cache.folder={folder} holds something other than {whole}; give an empty folder")
        create(folder, index)
    there = read_index(folder)
    differs = identity.difference(there.identity, index.identity)
    if differs is None and (there.images, there.bytes) != (index.images, index.bytes):
        differs = f"a row has {there.bytes} bytes there and {index.bytes} here"
    if differs is not None:
        raise UserError(
            f"cache.folder={folder} holds {of} something else: {differs}; give another folder, or remove them with "
            f"`compressvit cache clear {folder}`"
        )
