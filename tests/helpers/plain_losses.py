"""The losses in plain arithmetic, inputs for them, and every loss as a case."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from compressvit.training import losses

# (N, C_student, C_teacher), on both sides of every switch between direct, C×C and chunked arithmetic.
SHAPES = [(5, 8, 8), (5, 8, 12), (8, 8, 8), (10, 8, 12), (12, 8, 12), (13, 8, 12), (40, 8, 8), (40, 12, 8), (40, 8, 16)]
HIDDEN_FORMS = ("cosine_mse", "softmax_ce")
FEATURE_FORMS = ("cosine", "mse")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(batch: int, tokens: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(randn(batch, tokens, width, seed=10 * seed + part, dtype=dtype) for part in range(3))


def soft_cross_entropy(predicted: Tensor, target: Tensor) -> Tensor:
    return (-target.softmax(-1) * predicted.log_softmax(-1)).sum(-1).mean()


def entropy(logits: Tensor) -> Tensor:
    return soft_cross_entropy(logits, logits)


def relation_logits(left: Tensor, right: Tensor, heads: int) -> Tensor:
    per_head = "b n (h c) -> b h n c"
    left, right = rearrange(left, per_head, h=heads), rearrange(right, per_head, h=heads)
    return torch.einsum("bhnc,bhmc->bhnm", left, right) / left.shape[-1] ** 0.5


def naive_attention_relation(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], heads: int) -> Tensor:
    total = torch.zeros((), dtype=student[0].dtype)
    for i, j in itertools.product(range(3), repeat=2):
        ours, theirs = (relation_logits(side[i], side[j], heads) for side in (student, teacher))
        total = total + soft_cross_entropy(ours, theirs)
    return total / 9


def naive_hidden_relation(student: Tensor, teacher: Tensor, form: str = "cosine_mse") -> Tensor:
    if form == "softmax_ce":
        return soft_cross_entropy(relation_logits(student, student, 1), relation_logits(teacher, teacher, 1))
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return 49 * ((student @ student.mT - teacher @ teacher.mT) ** 2).mean()


def value_and_gradients(
    loss: Callable[..., Tensor], student: Tensor | tuple[Tensor, ...], *rest: object
) -> list[Tensor]:
    student = (student,) if isinstance(student, Tensor) else student
    leaves = tuple(part.detach().clone().requires_grad_() for part in student)
    value = loss(leaves if len(leaves) > 1 else leaves[0], *rest)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


def cases() -> list[object]:
    """(loss, student, teacher) for every function and form, the relation losses direct and chunked."""
    found: list[object] = []

    def add(name: str, loss: Callable[..., Tensor], student: object, teacher: object) -> None:
        found.append(pytest.param(loss, student, teacher, id=name))

    add("prediction", functools.partial(losses.prediction, temperature=2.0), randn(3, 5), randn(3, 5, seed=1))
    for form in FEATURE_FORMS:
        add(f"feature-{form}", functools.partial(losses.feature, form=form), randn(2, 3, 4), randn(2, 3, 4, seed=1))
    for (tokens, *widths), form in itertools.product(
        [(3, 4, 4), (3, 4, 6), (5, 4, 6), (7, 3, 3), (7, 3, 2)], HIDDEN_FORMS
    ):
        name = f"hidden_relation-{form}-{tokens}x{widths[0]}x{widths[1]}"
        loss = functools.partial(losses.hidden_relation, form=form)
        add(name, loss, randn(2, tokens, widths[0]), randn(2, tokens, widths[1], seed=1))
    for tokens, width, heads in [(3, 4, 1), (4, 4, 2)]:
        name = f"attention_relation-{tokens}x{width}-{heads}"
        loss = functools.partial(losses.attention_relation, heads=heads)
        add(name, loss, qkv(2, tokens, width), qkv(2, tokens, width + 2, seed=1))
    return found


every_loss = pytest.mark.parametrize(("loss", "student", "teacher"), cases())
