"""Which batch would fit where memory ran out in a training, by what is known without values."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compressvit.data.input import Side
from compressvit.model import surgery
from compressvit.model.cost import saved_bytes
from compressvit.model.shapes import RememberedShapes
from compressvit.runs.files import RecipePlan
from compressvit.runs.job import Job

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container
# Of what the device has. A guess: the rest is for fragments, kernels, and what an operation needs within itself.
_USABLE = 0.9
_MOST = 4  # images, from which the bytes of one are counted
_COPIES = 4  # of what is trained: weights, gradient, and two moments of Adam


@dataclass(frozen=True)
class Need:
    """Bytes that a training step takes in float32: `fixed`, whatever the batch, and `image` for each of its images."""

    fixed: int
    image: int

    def most_images(self, memory: int) -> int:
        """The largest batch for which so many bytes are enough."""
        return max(0, int(_USABLE * memory) - self.fixed) // max(1, self.image)


def need(job: Job, plan: RecipePlan) -> Need:
    """What the largest training step of a job needs, by its plan."""
    parts = [_of_model(job.student, trained=True)]
    if job.recipe.teacher.finetune is not None:
        parts.append(_of_model(job.teacher, trained=True))
    fixed, image = max(p.fixed for p in parts), max(p.image for p in parts)
    losses = max((step.loss_bytes_total for step in plan.steps), default=0)
    if losses:
        fixed += _of_model(job.teacher, trained=False).fixed
        image += losses // job.recipe.data.batch_size
    return Need(fixed, image)


def _of_model(side: Side, *, trained: bool) -> Need:
    model = surgery.skeleton(side.model)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if not trained:
        return Need(weights, 0)
    changed = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    kept = [_kept(model.train(), side, count) for count in (1, _MOST)]
    return Need(weights + (_COPIES - 1) * changed, (kept[1] - kept[0]) // (_MOST - 1))


def _kept(model: nn.Module, side: Side, count: int) -> int:
    """Bytes that autograd keeps of a forward pass of so many images."""
    images = torch.empty(count, *side.input.size, device="meta")
    with RememberedShapes():
        return saved_bytes(lambda: model(images), [*model.parameters(), *model.buffers()])


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device, or the container that a process runs in, has in all; None if that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # there is none, or its limit is "max"
        found = min(found, int(_CGROUP.read_text()))
    return found


def what_fits(job: Job, plan: RecipePlan) -> str:
    """Which batch would fit, in a sentence; nothing where that is not known."""
    with suppress(Exception):  # a model that has no sizes without values; the error that is being told is another one
        memory, takes, now = memory_of(job.device), need(job, plan), job.recipe.data.batch_size
        if memory is None:
            return ""
        most = takes.most_images(memory)
        known = (
            f"By the plan a training step takes about {_size(takes.fixed)} and {_size(takes.image)} for every image in fp32, and "
            f"{job.device} has {_size(memory)}"
        )
        if most >= now:
            return f"{known}, which is enough for {now}: see what else uses it. "
        if most < 1:
            return f"{known}, which is not enough for one. "
        return f"{known}: data.batch_size={most} would fit, with accumulate={-(-now // most)} in the phase for about the same step. "
    return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
