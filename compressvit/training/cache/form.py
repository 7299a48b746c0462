"""How a teacher's answer to one image is bytes: its largest logits, and tensors in bfloat16 or 8 bits.

An answer that has just been asked goes through the same bytes as one that is read, so that both give the same loss to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import model_name
from compressvit.model.cost import taking
from compressvit.model.shapes import RememberedShapes
from compressvit.model.taps import Tap, Taps
from compressvit.tasks.base import Task
from compressvit.training.asking import Taken
from compressvit.training.cache.spec import Cache
from compressvit.training.terms import Term

_OTHER = "leave cache out, or distil with other losses"
_LOWEST = -60_000.0  # of a logit below the largest one; float16 ends at -65504


class Part(Protocol):
    """A tensor of an answer. Encoded it is uint8 (B, bytes)."""

    @property
    def bytes(self) -> int: ...

    def encode(self, value: Tensor) -> Tensor: ...

    def decode(self, found: Tensor) -> Tensor: ...

    def words(self) -> str: ...


class TensorPart(Part, Protocol):
    """A part that keeps every value of a tensor, of which `shape` belongs to one image: of a tensor (B·r, …) it is (r, …)."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TopLogits:
    """The `top` largest of (B, classes) logits: the largest in float32, and 2 bytes of index and 2 of the distance from it for each.

    The distance, in float16, is off by at most 2⁻¹¹ of itself. The other classes get one logit, with which they have their share of the
    teacher's probability at the `temperature` of the loss: only how they share it is lost, so that the gradient of the cross-entropy by
    the student's logits is off by at most twice that share, summed over the classes.
    """

    top: int
    classes: int
    temperature: float

    @property
    def bytes(self) -> int:
        return 4 + 2 + 4 * self.top

    def encode(self, value: Tensor) -> Tensor:
        logits = value.float()
        values, index = logits.topk(self.top, dim=1)
        largest, left = values[:, :1], self.classes - self.top
        rest = torch.zeros_like(largest)
        if left:
            others = logits.scatter(1, index, -math.inf) / self.temperature
            rest = self.temperature * (others.logsumexp(1, keepdim=True) - math.log(left)) - largest
        distances = (values - largest).clamp(min=_LOWEST).half()
        parts = (largest, rest.clamp(min=_LOWEST).half(), index.to(torch.int16), distances)
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def decode(self, found: Tensor) -> Tensor:
        largest, rest, index, distances = _split(found, (4, 2, 2 * self.top, 2 * self.top))
        places = index.view(torch.int16).long() & 0xFFFF  # torch has hardly any operation on 16 bits without sign
        logits = rest.view(torch.float16).float().repeat(1, self.classes)
        # a damaged index would be outside; a row is compared with its checksum before it comes here
        logits = logits.scatter(1, places, distances.view(torch.float16).float())
        return logits + largest.view(torch.float32)

    def words(self) -> str:
        return f"the {self.top} largest of {self.classes} logits, the others by their share at temperature {self.temperature:g}"


@dataclass(frozen=True)
class Singles:
    """A tensor in float32, as it is.

    Attributes:
        shape: as of `Halves`.
    """

    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def encode(self, value: Tensor) -> Tensor:
        return value.float().reshape(-1, math.prod(self.shape)).contiguous().view(torch.uint8)

    def decode(self, found: Tensor) -> Tensor:
        return _own(found).view(torch.float32).reshape(-1, *self.shape[1:])

    def words(self) -> str:
        return f"{'×'.join(map(str, self.shape))} in fp32"


@dataclass(frozen=True)
class Halves:
    """A tensor in bfloat16, off by at most 2⁻⁸ of each value.

    Attributes:
        shape: of what belongs to one image: of a tensor (B·r, …) it is (r, …).
    """

    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def encode(self, value: Tensor) -> Tensor:
        return value.to(torch.bfloat16).reshape(-1, math.prod(self.shape)).contiguous().view(torch.uint8)

    def decode(self, found: Tensor) -> Tensor:
        return _own(found).view(torch.bfloat16).float().reshape(-1, *self.shape[1:])

    def words(self) -> str:
        return f"{'×'.join(map(str, self.shape))} in bf16"


@dataclass(frozen=True)
class Bytes:
    """A tensor in 8 bits, off by at most 1/254 of the largest value of its vector along the last axis, whose scale is in float32.

    Attributes:
        shape: as of `Halves`.
    """

    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) + 4 * math.prod(self.shape[:-1])

    def encode(self, value: Tensor) -> Tensor:
        vectors = value.float().reshape(-1, math.prod(self.shape[:-1]), self.shape[-1])
        scale = vectors.abs().amax(-1, keepdim=True) / 127
        whole = (vectors / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return torch.cat([whole.flatten(1).view(torch.uint8), scale.flatten(1).contiguous().view(torch.uint8)], dim=1)

    def decode(self, found: Tensor) -> Tensor:
        count = math.prod(self.shape[:-1])
        whole, scale = _split(found, (count * self.shape[-1], 4 * count))
        vectors = whole.view(torch.int8).float().reshape(-1, count, self.shape[-1])
        return (vectors * scale.view(torch.float32)[..., None]).reshape(-1, *self.shape[1:])

    def words(self) -> str:
        return f"{'×'.join(map(str, self.shape))} in int8"


def _split(found: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Columns of bytes, each where numbers may begin."""
    return [_own(part) for part in found.split(list(sizes), dim=1)]


def _own(part: Tensor) -> Tensor:
    """A copy in memory of its own; `contiguous` leaves a single row where it is."""
    return part.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Form:
    """The parts of an answer: the teacher's outputs, and what each of its taps sees."""

    outputs: Part
    taps: tuple[tuple[Tap, Part], ...]

    @property
    def bytes(self) -> int:
        """Of an answer to one image."""
        return sum(part.bytes for part in self._parts)

    @property
    def _parts(self) -> list[Part]:
        return [self.outputs, *(part for _, part in self.taps)]

    def encode(self, outputs: Tensor, taken: Taken) -> Tensor:
        """Answers to B images as bytes, uint8 (B, bytes)."""
        values = [outputs, *(taken[path][io] for (path, io), _ in self.taps)]
        return torch.cat([part.encode(value) for part, value in zip(self._parts, values, strict=True)], dim=1)

    def decode(self, found: Tensor) -> tuple[Tensor, Taken]:
        """The outputs, and what the taps have seen, in float32."""
        columns = found.split([part.bytes for part in self._parts], dim=1)
        taken: Taken = {}
        for ((path, io), part), column in zip(self.taps, columns[1:], strict=True):
            taken.setdefault(path, {})[io] = part.decode(column)
        return self.outputs.decode(columns[0]), taken

    def named(self, outputs: Tensor, taken: Taken) -> dict[str, Tensor]:
        """The tensors of an answer, by what messages call them."""
        taps = {f"{path} {io}": value for path, seen in taken.items() for io, value in seen.items()}
        return {"its outputs": outputs, **taps}

    def words(self) -> dict[str, str]:
        """What is kept, by name."""
        return {"outputs": self.outputs.words(), **{f"{path} {io}": part.words() for (path, io), part in self.taps}}


TENSORS: dict[str, Callable[[tuple[int, ...]], TensorPart]] = {"fp32": Singles, "bf16": Halves, "int8": Bytes}


def form_of(spec: Cache, teacher: Side, terms: Sequence[Term], task: Task, temperature: float) -> Form:
    """How the answers of a teacher are kept, found on the meta device.

    Raises:
        UserError: an answer is not made of tensors with as many rows for every image.
    """
    model = surgery.skeleton(teacher.model).eval()
    wanted = sorted({tap for term in terms for tap in term.teacher_taps})  # other orders of pairs read the same answers
    taps = Taps(model, wanted)
    seen = []
    for images in (2, 3):
        with torch.no_grad(), RememberedShapes(), taking(model, teacher.input.size):
            outputs = model(torch.empty(images, *teacher.input.size, device="meta"))
        seen.append((outputs, taps.pop()))
    kept, shape_of = TENSORS[spec.dtype], partial(rows_of, whose=f"{model_name(model)}, the teacher,", way=_OTHER)
    shape = shape_of("its outputs", [outputs for outputs, _ in seen])
    part: Part = kept(shape)
    if task.outputs_are_logits and len(shape) == 2 and shape[1] <= 2**16:
        part = TopLogits(min(spec.top, shape[1]), shape[1], temperature)
    parts = [(tap, kept(shape_of(" ".join(tap), [taken[tap[0]][tap[1]] for _, taken in seen]))) for tap in wanted]
    return Form(part, tuple(parts))


def rows_of(what: str, values: Sequence[Any], *, whose: str, way: str) -> tuple[int, ...]:
    """What of a tensor belongs to one image, from its values for two and for three images.

    Args:
        what, whose: what messages call it.
        way: what a user can do.

    Raises:
        UserError: it is no tensor with as many rows for every image.
    """
    two, three = values
    if all(isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 for value in values):
        rows = two.shape[0] // 2
        if (two.shape[0], three.shape[0]) == (2 * rows, 3 * rows) and two.shape[1:] == three.shape[1:]:
            return (rows, *two.shape[1:])
    found = f"a tensor {tuple(two.shape)} for 2 images" if isinstance(two, Tensor) else f"a {type(two).__name__}"
    raise UserError(
        f"cache keeps tensors with rows of their own for every image, and {what} of {whose} is {found}; {way}"
    )
