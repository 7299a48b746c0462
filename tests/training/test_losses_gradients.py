"""The losses' gradients, the matrices they must not build, and what low precision does to them.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from helpers.plain_losses import (
    FEATURE_FORMS,
    HIDDEN_FORMS,
    SHAPES,
    every_loss,
    naive_attention_relation,
    naive_hidden_relation,
    qkv,
    randn,
    relative_error,
    value_and_gradients,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressvit.training import losses

# --- gradients ------------------------------------------------------------------------------------------------------


def parts(side: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (side,) if isinstance(side, Tensor) else side


def leaves_like(side: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.detach().clone().requires_grad_() for part in parts(side))


def whole(leaves: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return leaves[0] if len(leaves) == 1 else leaves


@every_loss
def test_gradient_reaches_the_student_only(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> None:
    student_leaves, teacher_leaves = leaves_like(student), leaves_like(teacher)
    loss(whole(student_leaves), whole(teacher_leaves)).backward()
    assert all(leaf.grad is None for leaf in teacher_leaves)
    assert all(leaf.grad is not None and leaf.grad.norm() > 0 for leaf in student_leaves)


@pytest.mark.wide_unless(lambda student: not isinstance(student, tuple) or student[0].shape[1] < 4)
@every_loss
def test_gradients_agree_with_finite_differences(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda *leaves: loss(whole(leaves), teacher), leaves_like(student))


# --- memory ---------------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operator returns, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.seen += [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


def square_shapes(loss: Callable[..., Tensor], student: object, teacher: object, tokens: int) -> tuple[list, list]:
    """Shapes as large as an N×N matrix or with N twice in them: those of the forward and those of the backward pass."""
    found = []
    with Shapes() as forward:
        value = loss(student, teacher)
    with Shapes() as backward:
        value.backward()
    for shapes in (forward.seen, backward.seen):
        assert len(shapes) > 4
        found.append([shape for shape in shapes if math.prod(shape) >= tokens**2 or shape.count(tokens) > 1])
    return found[0], found[1]


@pytest.mark.parametrize("widths", [(16, 24), (24, 16), (16, 16)])
@pytest.mark.parametrize("form", HIDDEN_FORMS)
def test_hidden_relation_builds_no_token_by_token_matrix(form: str, widths: tuple[int, int]) -> None:
    student, teacher = randn(2, 300, widths[0], dtype=torch.float32), randn(2, 300, widths[1], seed=1)
    ours, reference = (
        functools.partial(losses.hidden_relation, form=form),
        functools.partial(naive_hidden_relation, form=form),
    )
    assert square_shapes(ours, student.requires_grad_(), teacher.float(), 300) == ([], [])
    assert all(square_shapes(reference, student, teacher.float(), 300))


@pytest.mark.wide_unless(lambda heads: heads == 1)
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_relation_builds_no_token_by_token_matrix(heads: int) -> None:
    student, teacher = qkv(2, 200, 24, dtype=torch.float32), qkv(2, 200, 32, seed=1, dtype=torch.float32)
    student = tuple(part.requires_grad_() for part in student)
    ours, reference = (functools.partial(f, heads=heads) for f in (losses.attention_relation, naive_attention_relation))
    assert square_shapes(ours, student, teacher, 200) == ([], [])
    assert all(square_shapes(reference, student, teacher, 200))


def saved_elements(loss: Callable[..., Tensor], student: object, teacher: object) -> int:
    """Elements that the forward pass keeps for the backward pass, each tensor counted once."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(student, teacher)
    assert value.requires_grad
    return sum(tensor.numel() for tensor in saved.values())


def test_chunks_are_not_kept_for_the_backward_pass() -> None:
    student, teacher = qkv(2, 300, 16), qkv(2, 300, 24, seed=1)
    student = tuple(part.requires_grad_() for part in student)
    hidden = functools.partial(losses.hidden_relation, form="softmax_ce")
    naive_hidden = functools.partial(naive_hidden_relation, form="softmax_ce")
    naive_attention = functools.partial(naive_attention_relation, heads=1)
    assert (
        saved_elements(hidden, student[0], teacher[0]) < 300**2 < saved_elements(naive_hidden, student[0], teacher[0])
    )
    assert saved_elements(losses.attention_relation, student, teacher) < 300**2
    assert saved_elements(naive_attention, student, teacher) > 300**2


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.wide_unless(lambda tokens: tokens < 1000)
@pytest.mark.parametrize(("tokens", "width"), [(49, 96), (300, 24), (3136, 96)])
def test_cosine_mse_is_accurate_where_student_and_teacher_nearly_coincide(tokens: int, width: int) -> None:
    teacher = randn(1, tokens, width, dtype=torch.float32)
    student = teacher + 1e-4 * randn(1, tokens, width, seed=1, dtype=torch.float32)
    value, gradient = value_and_gradients(losses.hidden_relation, student, teacher)
    reference, reference_gradient = value_and_gradients(naive_hidden_relation, student.double(), teacher.double())
    assert relative_error(value, reference) < 5e-5  # 2.3e-5, 1.1e-5, 7.1e-7 in the order of the parameters
    # Normalising rounds a token by up to 6e-8 of its length, which is 6e-4 of its distance to the teacher.
    assert relative_error(gradient, reference_gradient) < 1e-3  # 5.9e-4, 3.6e-4, 3.7e-4
    # The plain difference of squares has no correct digit here, so the test can fail.
    ours, theirs = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    squares = (ours.mT @ ours).square().sum() + (theirs.mT @ theirs).square().sum()
    difference = 49 * (squares - 2 * (ours.mT @ theirs).square().sum()) / tokens**2
    assert relative_error(difference, reference) > 0.9  # 1.0, 7.0, 6.5


@every_loss
def test_float32_is_close_to_float64(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> None:
    single_student, single_teacher = (whole(tuple(p.float() for p in parts(side))) for side in (student, teacher))
    value, reference = loss(single_student, single_teacher), loss(student, teacher)
    assert value.dtype == torch.float32
    assert reference.dtype == torch.float64
    assert relative_error(value, reference) < 1e-6  # 1.2e-7


@every_loss
def test_bfloat16_autocast_stays_near_float32(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> None:
    half_student, half_teacher = (tuple(part.bfloat16() for part in parts(side)) for side in (student, teacher))
    full_student, full_teacher = (whole(tuple(part.float() for part in side)) for side in (half_student, half_teacher))
    leaves = tuple(part.requires_grad_() for part in half_student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(whole(leaves), whole(half_teacher))
    value.backward()
    assert value.dtype == torch.float32
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    # Only attention_relation multiplies in bfloat16; the others are exact.
    assert relative_error(value, loss(full_student, full_teacher)) < 1e-3  # 1.4e-4


@pytest.mark.parametrize("form", HIDDEN_FORMS)
@pytest.mark.parametrize(("tokens", "student_width", "teacher_width"), SHAPES)
def test_autocast_does_not_touch_hidden_relation(
    tokens: int, student_width: int, teacher_width: int, form: str
) -> None:
    student = randn(2, tokens, student_width, dtype=torch.float32)
    teacher = randn(2, tokens, teacher_width, seed=1, dtype=torch.float32)
    plain = value_and_gradients(losses.hidden_relation, student, teacher, form)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = losses.hidden_relation(student, teacher, form)
    value.backward()
    assert torch.equal(value.detach(), plain[0])
    assert student.grad is not None
    assert torch.equal(student.grad, plain[1])


def test_a_student_and_a_teacher_of_different_precision() -> None:
    student, teacher = randn(2, 9, 4, dtype=torch.float32), randn(2, 9, 4, seed=1)
    for form in HIDDEN_FORMS:
        expected = losses.hidden_relation(student, teacher.bfloat16().float(), form)
        torch.testing.assert_close(losses.hidden_relation(student, teacher.bfloat16(), form), expected)
    for form in FEATURE_FORMS:
        expected = losses.feature(student, teacher.bfloat16().float(), form)
        torch.testing.assert_close(losses.feature(student, teacher.bfloat16(), form), expected)
