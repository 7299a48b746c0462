"""The relation losses compute their gradient in the forward pass, in pieces: equal to the plain form, nothing kept, taps dropped.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers.plain_losses import (
    HIDDEN_FORMS,
    naive_attention_relation,
    naive_hidden_relation,
    qkv,
    randn,
    relative_error,
    value_and_gradients,
)
from helpers.training import tiny_vit
from torch import Tensor

from compressvit.errors import UserError
from compressvit.model.taps import Taps
from compressvit.training import losses, relations
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import Batch, total_of, unread_by
from compressvit.training.terms.base import SIDES


def of_hidden(form: str, tokens: int, widths: tuple[int, int]) -> tuple[Callable[..., Tensor], ...]:
    sides = randn(5, tokens, widths[0], dtype=torch.float32), randn(5, tokens, widths[1], seed=1, dtype=torch.float32)
    return (
        functools.partial(losses.hidden_relation, form=form),
        functools.partial(naive_hidden_relation, form=form),
        *sides,
    )


def of_attention(heads: int, tokens: int, widths: tuple[int, int]) -> tuple[Callable[..., Tensor], ...]:
    sides = qkv(5, tokens, widths[0], dtype=torch.float32), qkv(5, tokens, widths[1], seed=1, dtype=torch.float32)
    plain, ours = naive_attention_relation, losses.attention_relation
    return functools.partial(ours, heads=heads), functools.partial(plain, heads=heads), *sides


def doubled(side: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return side.double() if isinstance(side, Tensor) else tuple(part.double() for part in side)


CASES = {
    **{f"hidden-{form}-{n}": of_hidden(form, n, (24, 32)) for form in HIDDEN_FORMS for n in (20, 60)},
    "hidden-alike": of_hidden("cosine_mse", 60, (24, 24)),
    **{f"attention-{heads}-{n}": of_attention(heads, n, (24, 32)) for heads, n in ((1, 20), (4, 20), (1, 60))},
}
every_case = pytest.mark.parametrize(("ours", "plain", "student", "teacher"), CASES.values(), ids=CASES)


@pytest.mark.parametrize("at_once", [1, 3000, 2**19])  # elements: rows of one head or one image, some of them, all
@every_case
def test_pieces_of_any_size_give_the_plain_form(monkeypatch, at_once, ours, plain, student, teacher):
    monkeypatch.setitem(relations._AT_ONCE, "cpu", at_once)
    found = value_and_gradients(ours, student, teacher)
    expected = value_and_gradients(plain, doubled(student), doubled(teacher))
    assert relative_error(found[0], expected[0]) < 1e-6  # 9.2e-8
    for gradient, reference in zip(found[1:], expected[1:], strict=True):
        assert relative_error(gradient, reference) < 5e-6  # 4.4e-7


@every_case
def test_the_gradient_is_times_what_comes_from_outside(ours, plain, student, teacher):
    once = value_and_gradients(ours, student, teacher)[1:]
    thrice = value_and_gradients(lambda *sides: ours(*sides) * 3 - 7, student, teacher)[1:]
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)


@every_case
def test_a_second_derivative_is_refused(ours, plain, student, teacher):
    leaf = torch.stack(student if isinstance(student, tuple) else (student,)).requires_grad_()
    value = ours(leaf if len(leaf) == 3 else leaf[0], teacher)
    with pytest.raises(
        UserError, match=r"no second derivative, which create_graph=True asks for, because .*; leave them out of what"
    ):
        torch.autograd.grad(value, leaf, create_graph=True)
    # the gradient of one term among others can be asked for again and again
    value = ours(leaf if len(leaf) == 3 else leaf[0], teacher)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_case
def test_without_a_gradient_none_is_computed(monkeypatch, ours, plain, student, teacher):
    value = value_and_gradients(ours, student, teacher)[0]
    leaves = doubled(student)
    leaves = tuple(leaf.float().requires_grad_() for leaf in (leaves if isinstance(leaves, tuple) else (leaves,)))
    given = leaves if len(leaves) > 1 else leaves[0]
    for name in ("_slopes", "_SquaredDistance", "_CrossEntropy"):
        monkeypatch.delattr(relations, name)
    with torch.no_grad():
        assert torch.equal(ours(given, teacher), value)
    assert torch.equal(ours(student, teacher), value)
    with pytest.raises(NameError):
        ours(given, teacher)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_loses_no_small_gradient(dtype, most):
    """The mean over 10,240 rows has gradients below the least number of float16; the loss is scaled in training, after it is computed."""
    student, teacher = (0.1 * randn(640, 16, 8), randn(640, 16, 8, seed=1))
    student, teacher = student.to(dtype), teacher.to(dtype)
    ours = functools.partial(losses.attention_relation, with_kl=False)
    for loss, sides in (
        (losses.hidden_relation, (student, teacher)),
        (ours, ((student, -student, student * 2), (teacher, teacher + 1, teacher * 2))),
    ):
        found = value_and_gradients(lambda *both, loss=loss: loss(*both) * 2**16, *sides)
        wide = value_and_gradients(loss, *(doubled(side) for side in sides))
        for gradient, reference in zip(found[1:], wide[1:], strict=True):
            assert gradient.dtype == dtype
            assert relative_error(gradient, 2**16 * reference) < most  # 7.4e-4 and 5.8e-3


def test_what_no_term_reads_any_more_is_dropped():
    student, teacher = tiny_vit(), tiny_vit(seed=1)
    spec = Distill(losses={"cka": {"weight": 1.0}, "feature": {"weight": 1.0}})
    terms = spec.terms(student, match_layers(student, teacher, ((0, 0), (1, 1)))[0], teacher=teacher)
    taps = [
        Taps(m, [t for term in terms for t in side(term)]) for m, side in zip((student, teacher), SIDES, strict=True)
    ]
    images, totals = randn(2, 1, 8, 8, dtype=torch.float32), []
    for unread in ((), (unread_by(terms),)):
        logits = student(images), teacher(images).detach()
        batch = Batch(*logits, *(tap.pop() for tap in taps), torch.zeros(2, dtype=torch.long), *unread)
        totals.append(total_of(terms, batch)[0])
        for taken, norm in ((batch.student_taps, "norm"), (batch.teacher_taps, "norm")):
            left = {path for path, seen in taken.items() if seen}
            blocks = {"blocks.0", "blocks.1", "blocks.0.attn.qkv", "blocks.1.attn.qkv"}
            assert left == ({norm} if unread else {norm} | blocks)  # `feature` does not say what it has read
    assert torch.equal(*totals)


def test_a_tap_stays_until_the_last_term_has_read_it():
    taps = [{"a": {"output": torch.zeros(1)}, "b": {"output": torch.zeros(1)}} for _ in range(2)]
    unread = Counter({("a", "output"): 2}), Counter({("a", "output"): 1})
    batch = Batch(torch.zeros(1), None, *taps, None, unread)
    for left in ([1, 0], [0, 0], [0, 0]):
        batch.used([("a", "output"), ("b", "output")], [("a", "output")])
        assert [len(side["a"]) for side in taps] == left
    assert all(side["b"] for side in taps), "nobody said how often it would be read"
