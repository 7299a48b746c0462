"""The interface of a task, and the registry of tasks.

A task says what the outputs of a model mean. Training, evaluation, the run folder and the report ask it, and none of them knows which
tasks there are. One task is one file in `compressvit/tasks/`, or of a package that offers it (entry points `compressvit.tasks`); a recipe
names it by its word in `data.task`, where it is not the usual one of the data set.

Shapes: B images of a batch. *Outputs* are what the model returns in training and what `Task.run` returns in evaluation; *targets* are the
ground truth of a batch as `Task.collate` makes it of what the data set gives of each image.

Methods that compute import torch when they run, because reading a recipe or writing a report needs only the names of figures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compressvit.errors import UserError, did_you_mean
from compressvit.registry import Registry
from compressvit.tasks.answers import Answers, Measure
from compressvit.tasks.likeness import Likeness, of_tensors
from compressvit.tasks.quality import Quality
from compressvit.tasks.targets import at_least

if TYPE_CHECKING:  # a report and a recipe need the names of figures, and not torch
    import torch
    from torch import Tensor, nn

Result = dict[str, float | None]


@dataclass(frozen=True)
class Labels:
    """How many images of a batch have a label, and the largest label: known on the host, so that the device is not waited for."""

    count: int
    largest: int


class Mixing(ABC):
    """What mixes the images of a batch, and their targets, as mixup does."""

    @abstractmethod
    def choose(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """The part of a batch that can be mixed, before it goes to the device."""

    @abstractmethod
    def mix(self, images: Tensor, targets: Any, labels: Labels) -> tuple[Tensor, Any]:
        """Mix them on the device, without changing what it is given. May not wait for the device.

        Args:
            labels: what `Task.labels` said of the targets.
        """


class Metrics(ABC):
    """Accumulates the figures of one evaluation batch by batch.

    It keeps sums where the figures allow it. COCO's average precision needs every detection at the end: with masks, about 1 KB each.
    """

    @abstractmethod
    def add(self, outputs: Any, targets: Any, expected: Any | None) -> None:
        """Add a batch.

        Args:
            outputs: of the model, as `Task.run` returns them.
            targets: of the same images.
            expected: the teacher's outputs in the same form; None without a teacher.

        Raises:
            UserError: targets that do not fit the model.
        """

    def search(self) -> None:  # noqa: B027 - a default, not a gap
        """Called first where figures of a search are wanted, which costs more than a pass over the images: at the end of a run, not in
        training."""

    def index(self, outputs: Any, targets: Any, expected: Any | None) -> None:
        """Add a batch of labelled training images, for a task that `searches`, after `search` and before the first `add`; as there."""
        raise TypeError("this task searches in no index")

    @abstractmethod
    def result(self) -> Result:
        """Every figure by its key, over all images; None where a figure is not available. With a teacher, the teacher's own
        figures begin with `teacher_`."""


class Task(ABC):
    """What the outputs of a model mean.

    Attributes:
        name: its word, set by `task`.
        qualities: the figures that it measures, in the order in which they are shown. A key that another task has must mean the same.
        ranking: the keys of those that say how good a model is: `keep: best`, charts and tables go by the first that was measured.
        graded: the keys of what `Metrics` measures of one model against the ground truth alone.
        needs_class_count: whether nothing can be learned before it is known how many classes the data has.
        least_classes: of data from which something can be learned.
        supervised: whether it has a loss against the ground truth.
        outputs_are_logits: whether a model's outputs are logits of classes, which a student can learn from its teacher as soft labels.
        imitates: whether there is an `imitation`, for outputs that are no such logits.
        searches: whether there are figures that search for held-out images among labelled training images (`Metrics.index`).
        mixes: whether its targets can be mixed by mixup and cutmix.
        places: whether its targets are places in the image, so that what moves pixels must move them.
        progress_names: what the line that training prints of an epoch calls a figure, by its key, where not by its `in_text`.
        measures: what the images in a report can be chosen by.
        models: names of models that are made for it, where timm's own are not.
        pipeline: what the Hugging Face Hub calls it; None: nothing.
    """

    name: ClassVar[str]
    qualities: ClassVar[tuple[Quality, ...]] = ()
    ranking: ClassVar[tuple[str, ...]] = ()
    graded: ClassVar[tuple[str, ...]] = ()
    needs_class_count: ClassVar[bool] = False
    least_classes: ClassVar[int] = 1
    supervised: ClassVar[bool] = True
    outputs_are_logits: ClassVar[bool] = False
    imitates: ClassVar[bool] = False
    searches: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    places: ClassVar[bool] = False
    progress_names: ClassVar[Mapping[str, str]] = {}
    measures: ClassVar[Mapping[str, Measure]] = {}
    models: ClassVar[tuple[str, ...]] = ()
    pipeline: ClassVar[str | None] = None

    @abstractmethod
    def fits(self, model: nn.Module) -> bool:
        """Whether the outputs of a model can be read as this task's."""

    @property
    def main_quality(self) -> Quality:
        """The first figure of `ranking`: what a target of accuracy is compared with."""
        return next(quality for quality in self.qualities if quality.key == self.ranking[0])

    def head_size(self, classes: int | None) -> int | None:
        """How many outputs a new head has: what timm's `reset_classifier` is given.

        Args:
            classes: of the data; None where it has none, or where they are not known yet.

        Returns:
            None where the classes decide and are not known.
        """
        return classes

    def needs_classes(self, classes: int) -> int:
        """How many outputs a head must have at least, for data of `classes` classes."""
        return 0

    # Of the ground truth

    def reads(self, truth: Task) -> bool:
        """Whether it can read the ground truth of a set that is for the task `truth`. By default that is not checked."""
        return True

    def collate(self, targets: Sequence[Any]) -> Any:
        """The targets of a batch, from what the data set gives of each image: numbers as a tensor (B,), anything else as a list of B.

        The result holds tensors, lists and mappings, so that it can be moved to a device. An image without a label has the number −1.
        Another form than a list needs a `known` that finds those images.
        """
        import torch

        return torch.tensor(targets) if all(isinstance(target, Real) for target in targets) else list(targets)

    def known(self, targets: Any) -> Tensor:
        """Which images of a batch have a label, bool (B,). By default all but those whose target is a number below 0."""
        return at_least(targets, 0)

    def labels(self, targets: Any) -> Labels:
        """What `batch_figures` may have to know of the targets; asked before they go to the device."""
        return Labels(int(self.known(targets).sum()), -1)

    def check_set(self, targets: Any, classes: int | None, name: str) -> None:  # noqa: B027 - a default, not a gap
        """Refuse targets that cannot be learned from. By default none.

        Args:
            targets: those of a batch, or all targets of a data set that are known without reading images.
            classes: of the data, where it has any.
            name: of the set.

        Raises:
            UserError: with the remedy.
        """

    def check_batch(self, targets: Any, images: int, outputs: int, name: str) -> None:  # noqa: B027 - a default, not a gap
        """Refuse targets that a caller's own loader gives. By default none.

        Args:
            targets: of a batch.
            images: in the batch.
            outputs: of the student's head; 0 where nothing is learned from the targets.
            name: of the loader.

        Raises:
            UserError: with the remedy.
        """

    def placeholder(self, images: int) -> Any | None:
        """Targets without values on the meta device, to measure the memory of the loss; None: it is known only when it runs."""
        return None

    def mixing(self, mixup: float, cutmix: float, smoothing: float, outputs: int) -> Mixing:
        """What mixes batches; asked only of a task that `mixes`.

        Args:
            mixup, cutmix: their α; 0 for none.
            smoothing: of the labels.
            outputs: of the model's head.
        """
        raise TypeError(f"the task {self.name!r} cannot mix images")

    # In training

    def loss(self, outputs: Any, targets: Any, smoothing: float = 0.0) -> Tensor:
        """The loss against the ground truth, a scalar on the device.

        Args:
            outputs: what the model returns in training; may be in lower precision.
            targets: as `collate` and `mixing` make them.
            smoothing: of the labels; a task without labels to smooth ignores it.
        """
        raise TypeError(f"the task {self.name!r} learns nothing from the ground truth")

    def imitation(self, outputs: Any, expected: Any, temperature: float) -> dict[str, Tensor]:
        """The parts of the loss against the teacher's outputs by name, scalars, 0 where a student is its teacher; see `imitates`.

        Args:
            outputs: what the model returns in training; may be in lower precision.
            expected: what the teacher returns in eval mode, without gradients.
            temperature: logits of both are divided by it.

        Raises:
            UserError: the two models cannot be compared.
            NotImplementedError: on the meta device, where that depends on values.
        """
        raise TypeError(f"the task {self.name!r} has no loss against a teacher's outputs")

    def batch_figures(self, outputs: Any, expected: Any | None, targets: Any, labels: Labels) -> dict[str, Tensor]:
        """What a training loop logs of a batch beside its loss: scalars on the device by name. May not wait for the device.

        Args:
            outputs, expected: of the model and, where it runs too, its teacher.
            targets: as for `loss`.
            labels: what the targets were before mixup.
        """
        return {}

    # In evaluation

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """The outputs for images (B, C, H, W), in float32 at least."""
        return model(images).float()

    @abstractmethod
    def metrics(self, model: nn.Module, teacher: nn.Module | None, labelled: bool) -> Metrics:
        """A fresh accumulator.

        Args:
            model: what is evaluated.
            teacher: what it is compared with, if anything.
            labelled: whether the targets are the ground truth.
        """

    def comparable(self, outputs: Any, expected: Any) -> bool:
        """Whether the outputs of two models can be compared image by image."""
        return outputs.shape == expected.shape

    def against_teacher(self) -> list[Quality]:
        """The figures of a model compared with its teacher."""
        return [quality for quality in self.qualities if quality.key not in self.graded]

    def uncompared(self, model: nn.Module, teacher: nn.Module) -> str | None:
        """Why two models are not compared, or not in all figures, as a sentence; None if they are."""
        return None

    def ranked(self, result: Mapping[str, Any]) -> list[Quality]:
        """Those of `ranking` that were measured, in its order."""
        known = {quality.key: quality for quality in self.qualities}
        return [known[key] for key in self.ranking if result.get(key) is not None]

    def score(self, result: Mapping[str, Any]) -> float:
        """What `keep: best` compares evaluations by, the higher the better: the first figure of `ranking` that was measured.

        Raises:
            UserError: none was.
        """
        for quality in self.ranked(result):
            return -result[quality.key] if quality.lower_is_better else result[quality.key]
        raise UserError(
            "keep=best has nothing to compare: there are no labels, and the outputs of student and teacher differ in width; use keep=last"
        )

    def progress(self, result: Mapping[str, Any]) -> str:
        """What an evaluation found, in the line that training prints of an epoch."""
        named = [(self.progress_names.get(q.key, q.in_text), q) for q in self.ranked(result)]
        return "  ".join(f"{name} {q.number(result[q.key])}{q.unit}" for name, q in named)

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers | None:
        """A fresh collector of what `predictions.json` and the report's gallery show; None: they show nothing of this task.

        Args:
            model: what is evaluated.
            names: names of the classes, if they are known.
            labelled: whether the targets are the ground truth.
        """
        return None

    # In fitting

    def output_distance(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradients, squared and averaged over draws, are the metric of the outputs: how far they move with a layer's.

        Args:
            model: in eval mode.
            images: (B, C, H, W).
            generator: on the CPU; what is random is drawn from it.

        Raises:
            FloatingPointError: the outputs are not finite; its text says what they come from.
        """
        import torch

        outputs = self.run(model, images)
        direction = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return (outputs * direction).sum()

    # In an exported graph

    def graph(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        """What is exported of a model: a module from images (B, C, H, W) to one tensor or several, and their names."""
        return model, ("outputs",)

    def likeness(self, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
        """How alike the outputs of a graph are (those of `graph`) as two programs compute them."""
        return of_tensors(expected, found, tolerance)

    # In words

    def verdict(self, student: Mapping[str, Any], teacher: Mapping[str, Any], images: str) -> str | None:
        """How good a student is, as the end of a sentence that begins with "the student"; None where none of its figures is there.

        Args:
            student, teacher: figures by key.
            images: what the sentence calls the evaluation set.
        """
        for quality in self.ranked(student):
            theirs = teacher.get(quality.key)
            beside = "" if theirs is None else f" (the teacher {quality.text(theirs)})"
            return f"has {quality.had(student[quality.key])} on {images}{beside}"
        return None


TASKS: Registry[Task] = Registry("task", "compressvit.tasks")
T = TypeVar("T", bound=type[Task])


def task(name: str) -> Callable[[T], T]:
    """Register a task under its word. A second one of the same word is refused at import."""

    def register(kind: T) -> T:
        kind.name = name
        TASKS.add(name, kind(), kind.__module__)
        return kind

    return register


def find_task(name: str) -> Task:
    """The task of that word.

    Raises:
        UserError: there is none, or the package that offers it cannot be used.
    """
    if name in TASKS:
        return TASKS[name]
    raise UserError(TASKS.fault(name) or f"there is no task '{name}'; {did_you_mean(name, list(TASKS))}")


def task_of(model: nn.Module, name: str | None = None) -> Task:
    """The task of a model: that of a model made for one (`model.task`), the one of `name` where the model can do it, or the first that
    fits."""
    own = getattr(model, "task", None)
    if isinstance(own, str) and own in TASKS:
        return TASKS[own]
    if name is not None and find_task(name).fits(model):
        return TASKS[name]
    return next(task for task in TASKS.values() if task.fits(model))
