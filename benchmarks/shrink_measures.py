"""What a student made by `shrink_dinov2.py` is judged by: the teacher's features of held-out crops, retrieval in the teacher's index,
k-NN accuracy on labelled sets, costs, and latency in turns with the teacher."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from paired_precision import drawn
from torch import nn

from compressvit.data.input import input_config
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import Datasets, open_data
from compressvit.data.spec import Data
from compressvit.model import cost
from compressvit.model.backbone import input_size
from compressvit.model.weights import build, hash_tensors, load_file
from compressvit.tasks.base import task_of
from compressvit.tasks.neighbours import INDEXED, Neighbours
from compressvit.tasks.qualities import intervals
from compressvit.tasks.retrieval import Retrieval

CPU = torch.device("cpu")
DRAWS = 1000  # resampled sets of images
BATCHES = (1, 16)  # of latency


def of_program(arguments: argparse.Namespace) -> tuple[nn.Module, Data, Datasets, dict[str, Any]]:
    """The teacher without a classifier, the crops, opened, and what a finished cell depends on, from `--model --size --weights --data`."""
    data = Data(name="images", root=arguments.data, batch_size=32)
    teacher = build(arguments.model, img_size=arguments.size, num_classes=0).eval()
    load_file(teacher, arguments.weights, "--weights")
    datasets = open_data(data)
    settings = {
        "model": arguments.model,
        "size": arguments.size,
        "weights": hash_tensors(teacher.state_dict()),
        "crops": datasets.fingerprint(),
    }
    return teacher, data, datasets, settings


@dataclass(frozen=True)
class Judge:
    """Measures students of one teacher.

    Attributes:
        teacher: without a classifier.
        data: the crops, with a validation split.
        knn: labelled sets, by name.
        knn_size: height and width of their images, in pixels, to which the position embeddings are resampled.
        rounds: of latency.
    """

    teacher: nn.Module
    data: Data
    knn: Sequence[Data]
    knn_size: int
    rounds: int = 30

    @cached_property
    def _datasets(self) -> Datasets:
        return open_data(self.data)

    @cached_property
    def _theirs(self) -> list[Any]:
        """The teacher's features of the held-out crops, batch by batch; 0.24 GB for 601 crops of 257 tokens."""
        return list(self._features(self.teacher))

    @cached_property
    def _teachers_classes(self) -> dict[str, list[bool]]:
        return {data.name: self._recognised(self.teacher, data) for data in self.knn}

    @torch.inference_mode()
    def _features(self, model: nn.Module) -> Iterator[Any]:
        task, config = task_of(model), input_config(self.teacher, self.data)
        for images, _ in eval_loader(self._datasets, self.data, config, CPU):
            yield task.run(model.eval(), images)

    def figures(self, student: nn.Module) -> dict[str, Any]:
        """All of them. `class_token` and `patches` are the cosines of every held-out crop, `knn` says of every test image whether it was
        given its class; intervals and differences follow from these."""
        return {
            **costs(student, self.teacher),
            **self.nearness(student),
            **self.recognition(student),
            **latency(student, self.teacher, self.rounds),
        }

    @torch.inference_mode()
    def nearness(self, student: nn.Module) -> dict[str, Any]:
        """Cosines of the class token and (mean of each crop) of the patch tokens with the teacher's, and recall in percent."""
        retrieval, pooled, patches = Retrieval(), [], []
        for ours, theirs in zip(self._features(student), self._theirs, strict=True):
            pooled += F.cosine_similarity(ours.pooled, theirs.pooled, dim=1).tolist()
            patches += F.cosine_similarity(ours.patches, theirs.patches, dim=-1).mean(dim=1).tolist()
            retrieval.add(ours.pooled, theirs.pooled)
        found = {"images": len(pooled), **retrieval.result()}
        return {"class_token": _rounded(pooled), "patches": _rounded(patches), "recall": found}

    def recognition(self, student: nn.Module) -> dict[str, Any]:
        """Whether every test image was given its class by its nearest neighbours, by the student and by the teacher."""
        own = {data.name: self._recognised(student, data) for data in self.knn}
        return {"knn": own, "knn_of_teacher": self._teachers_classes}

    @torch.inference_mode()
    def _recognised(self, model: nn.Module, data: Data) -> list[bool]:
        resized: Any = copy.deepcopy(model).eval()
        resized.set_input_size(img_size=(self.knn_size, self.knn_size))
        datasets, config = open_data(data), input_config(resized, data)
        task, neighbours, right = task_of(resized), Neighbours(), []
        for images, labels in eval_loader(replace(datasets, validation=datasets.train), data, config, CPU):
            neighbours.index(task.run(resized, images).pooled, labels)
        for images, labels in eval_loader(datasets, data, config, CPU):
            right += (neighbours.classes(task.run(resized, images).pooled) == labels).tolist()
        return right


def costs(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Parameters, bytes and multiply-accumulates, of both."""
    own, whole = (cost.cost(model, input_size(teacher)).as_dict() for model in (student, teacher))
    return {"costs": own, "costs_of_teacher": whole}


def latency(student: nn.Module, teacher: nn.Module, rounds: int) -> dict[str, Any]:
    """Ratios to the teacher's, with the ends of their intervals, by the images in a batch."""
    found, models, sizes = {}, [teacher, student], [input_size(teacher)] * 2
    for batch in BATCHES:
        times = cost.latencies(models, sizes, device=CPU, batch=batch, rounds=rounds, seconds=60)
        found[str(batch)] = {"ratio": times.ratio(1), "teacher_ms": times.medians[0]}
    return {"latency": found, "threads": torch.get_num_threads()}


def labelled_set(name: str, images: int) -> Data:
    """A set with as many images in the index as the project's k-NN has, and so many test images, evenly taken."""
    return Data(name=name, limit_train=INDEXED, limit_val=images)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval over resampled images."""
    each = np.asarray(values, dtype=float)
    means = drawn(len(each), DRAWS) @ each / len(each)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(each.mean()), float(low), float(high)


def recall(found: Mapping[str, Any], depth: int) -> tuple[float, float, float] | None:
    """In percent, with the interval that the project's reports have; None of too few images."""
    value = found[f"recall_{depth}"]
    return None if value is None else (value, *intervals(found)[f"recall_{depth}"])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]
