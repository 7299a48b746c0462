"""The losses against plain reference arithmetic, the laws they obey, and the texts of their errors.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.plain_losses import (
    HIDDEN_FORMS,
    SHAPES,
    entropy,
    naive_attention_relation,
    naive_hidden_relation,
    qkv,
    randn,
    relation_logits,
    soft_cross_entropy,
    value_and_gradients,
)
from torch.nn import functional as F

from compressvit.errors import UserError
from compressvit.training import losses

# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_prediction_is_the_batch_mean_of_kl_plus_entropy(temperature: float) -> None:
    student, teacher = randn(6, 11), randn(6, 11, seed=1)
    value = losses.prediction(student, teacher, temperature)
    target = (teacher / temperature).softmax(-1)
    divergence = F.kl_div((student / temperature).log_softmax(-1), target, reduction="batchmean")
    torch.testing.assert_close(value, divergence + entropy(teacher / temperature))
    torch.testing.assert_close(value, soft_cross_entropy(student / temperature, teacher / temperature))
    per_element = (-target * (student / temperature).log_softmax(-1)).mean()
    torch.testing.assert_close(value, 11 * per_element)


@pytest.mark.wide_unless(lambda tokens, heads: tokens < 13 or (tokens, heads) == (40, 1))
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "student_width", "teacher_width"), SHAPES)
def test_attention_relation_equals_the_reference(
    tokens: int, student_width: int, teacher_width: int, heads: int
) -> None:
    student, teacher = qkv(3, tokens, student_width), qkv(3, tokens, teacher_width, seed=1)
    ours = value_and_gradients(losses.attention_relation, student, teacher, heads)
    reference = value_and_gradients(naive_attention_relation, student, teacher, heads)
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("tokens", [9, 40])
def test_keys_and_values_may_be_of_other_tokens_than_queries(tokens: int) -> None:
    """As in CvT; 40 tokens are more than a relation head is wide, so that rows come in chunks."""
    student, teacher = (
        (q, *(part[:, :5] for part in others)) for q, *others in (qkv(3, tokens, 8), qkv(3, tokens, 12, seed=1))
    )
    ours = value_and_gradients(losses.attention_relation, student, teacher, 2)
    torch.testing.assert_close(ours, value_and_gradients(naive_attention_relation, student, teacher, 2))
    with pytest.raises(UserError, match=r"must agree in batch and tokens, .* got \(3, 5, 8\) and \(3, 4, 12\)"):
        losses.attention_relation(student, (*teacher[:2], teacher[2][:, :4]))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("tokens", [5, 40])
def test_the_kl_is_the_loss_less_the_entropy_of_the_teacher(tokens: int, heads: int) -> None:
    student, teacher = qkv(3, tokens, 8), qkv(3, tokens, 12, seed=1)
    loss, kl = losses.attention_relation([part.requires_grad_() for part in student], teacher, heads, with_kl=True)
    torch.testing.assert_close(loss.detach() - kl, naive_attention_relation(teacher, teacher, heads))
    torch.testing.assert_close(loss, losses.attention_relation(student, teacher, heads))
    assert loss.requires_grad
    assert not kl.requires_grad
    assert kl > 0.1


@pytest.mark.parametrize("form", HIDDEN_FORMS)
@pytest.mark.parametrize(("tokens", "student_width", "teacher_width"), SHAPES)
def test_hidden_relation_equals_the_reference(tokens: int, student_width: int, teacher_width: int, form: str) -> None:
    student, teacher = randn(3, tokens, student_width), randn(3, tokens, teacher_width, seed=1)
    ours = value_and_gradients(losses.hidden_relation, student, teacher, form)
    reference = value_and_gradients(naive_hidden_relation, student, teacher, form)
    torch.testing.assert_close(ours, reference)


def test_scale_is_a_factor_of_cosine_mse_and_of_nothing_else() -> None:
    student, teacher = randn(2, 9, 4), randn(2, 9, 6, seed=1)
    torch.testing.assert_close(
        losses.hidden_relation(student, teacher), 49 * losses.hidden_relation(student, teacher, scale=1.0)
    )
    plain = losses.hidden_relation(student, teacher, "softmax_ce")
    assert losses.hidden_relation(student, teacher, "softmax_ce", scale=3.0) == plain


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 3, 4, 7)])
def test_feature_equals_the_reference(shape: tuple[int, ...]) -> None:
    student, teacher = randn(*shape), randn(*shape, seed=1)
    cosine = 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    torch.testing.assert_close(losses.feature(student, teacher), cosine.mean())
    torch.testing.assert_close(losses.feature(student, teacher, "mse"), ((student - teacher) ** 2).mean())


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [5, 8, 40])
def test_equal_models_have_no_gap(tokens: int, dtype: torch.dtype) -> None:
    hidden, projections = randn(2, tokens, 8, dtype=dtype), qkv(2, tokens, 8, dtype=dtype)
    assert losses.hidden_relation(hidden, hidden.clone()) == 0.0
    assert losses.feature(hidden, hidden.clone()) == 0.0
    assert losses.feature(hidden, hidden.clone(), "mse") == 0.0
    assert losses.attention_relation(projections, projections, 2, with_kl=True)[1] == 0.0
    torch.testing.assert_close(losses.prediction(hidden[0], hidden[0], 2.0), entropy(hidden[0] / 2))
    own_entropy = entropy(relation_logits(hidden, hidden, 1))
    torch.testing.assert_close(losses.hidden_relation(hidden, hidden, "softmax_ce"), own_entropy)


def test_the_entropy_of_the_teacher_is_the_floor() -> None:
    teacher, projections = randn(2, 40, 8, seed=1), qkv(2, 40, 8, seed=1)
    for seed in range(5):
        noise = 0.1 * randn(2, 40, 8, seed=20 + seed)
        assert losses.hidden_relation(teacher + noise, teacher, "softmax_ce") > entropy(
            relation_logits(teacher, teacher, 1)
        )
        assert losses.prediction(teacher[0] + noise[0], teacher[0]) > entropy(teacher[0])
        assert losses.attention_relation([part + noise for part in projections], projections, with_kl=True)[1] > 0


def test_prediction_ignores_a_constant_added_to_the_logits() -> None:
    student, teacher, shift = randn(4, 9), randn(4, 9, seed=1), 100 * randn(4, 1, seed=2)
    value = losses.prediction(student, teacher, 3.0)
    torch.testing.assert_close(losses.prediction(student + shift, teacher - shift, 3.0), value)
    assert not torch.allclose(losses.prediction(2 * student, teacher, 3.0), value)


@pytest.mark.parametrize(("tokens", "student_width", "teacher_width"), SHAPES)
def test_cosine_mse_ignores_rotation_and_token_scale(tokens: int, student_width: int, teacher_width: int) -> None:
    student, teacher = randn(2, tokens, student_width), randn(2, tokens, teacher_width, seed=1)
    rotation, _ = torch.linalg.qr(randn(student_width, student_width, seed=2))
    lengths = randn(2, tokens, 1, seed=3).exp()
    value = losses.hidden_relation(student, teacher)
    torch.testing.assert_close(losses.hidden_relation(student @ rotation, teacher), value)
    torch.testing.assert_close(losses.hidden_relation(student * lengths, teacher), value)
    torch.testing.assert_close(losses.hidden_relation(student, teacher / lengths), value)
    # A rotated copy has the same relations, but exactly 0 is for equal inputs only.
    assert losses.hidden_relation(student @ rotation, student).abs() < 1e-13  # 3.5e-15
    assert not torch.allclose(losses.hidden_relation(student + 1, teacher), value)


@pytest.mark.wide_unless(lambda tokens: tokens < 40)
@pytest.mark.parametrize(("tokens", "student_width", "teacher_width"), SHAPES)
def test_relation_losses_ignore_the_order_of_tokens(tokens: int, student_width: int, teacher_width: int) -> None:
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    student, teacher = qkv(2, tokens, student_width), qkv(2, tokens, teacher_width, seed=1)
    student_moved, teacher_moved = ([part[:, order] for part in side] for side in (student, teacher))
    for heads in (1, 2):
        value = losses.attention_relation(student, teacher, heads)
        torch.testing.assert_close(losses.attention_relation(student_moved, teacher_moved, heads), value)
        assert not torch.allclose(losses.attention_relation(student_moved, teacher, heads), value)
    for form in HIDDEN_FORMS:
        value = losses.hidden_relation(student[0], teacher[0], form)
        torch.testing.assert_close(losses.hidden_relation(student_moved[0], teacher_moved[0], form), value)
        assert not torch.allclose(losses.hidden_relation(student_moved[0], teacher[0], form), value)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: losses.prediction(randn(2, 10), randn(2, 11)),
            "prediction: student and teacher must have one shape, got (2, 10) and (2, 11); "
            "a student of another width needs a projection first",
        ),
        (
            lambda: losses.prediction(randn(2, 3, 10), randn(2, 3, 10)),
            "prediction: logits must be (B, classes), got (2, 3, 10); move other axes into B",
        ),
        *(
            (
                lambda temperature=temperature: losses.prediction(randn(2, 10), randn(2, 10), temperature),
                f"prediction: temperature must be positive and finite, got {temperature}; 1.0 changes nothing",
            )
            for temperature in (0, -1.0, math.inf, math.nan)
        ),
        (
            lambda: losses.attention_relation(qkv(2, 5, 8)[:2], qkv(2, 5, 8)),
            "attention_relation: student_qkv must be three tensors (q, k, v) of one shape (B, N, C), but for N, "
            "got 2: (2, 5, 8), (2, 5, 8); join the attention heads into C first",
        ),
        (
            lambda: losses.attention_relation(qkv(2, 5, 8), [randn(2, 4, 5, 2)] * 3),
            "attention_relation: teacher_qkv must be three tensors (q, k, v) of one shape (B, N, C), but for N, "
            "got 3: (2, 4, 5, 2), (2, 4, 5, 2), (2, 4, 5, 2); join the attention heads into C first",
        ),
        (
            lambda: losses.attention_relation(qkv(2, 5, 8), qkv(2, 6, 8)),
            "attention_relation: student and teacher must agree in batch and tokens, only the width may differ, "
            "got (2, 5, 8) and (2, 6, 8); pair layers of one resolution and drop tokens only one has",
        ),
        *(
            (
                lambda heads=heads: losses.attention_relation(qkv(2, 5, 8), qkv(2, 5, 12), heads),
                f"attention_relation: heads={heads} does not divide the student's width 8 and the teacher's 12; "
                "these do: 1, 2, 4",
            )
            for heads in (0, 3, 8)
        ),
        (
            lambda: losses.hidden_relation(randn(2, 4, 4, 8), randn(2, 16, 8)),
            "hidden_relation: student_hidden must be (B, N, C), got (2, 4, 4, 8); flatten grids into N",
        ),
        (
            lambda: losses.hidden_relation(randn(2, 5, 8), randn(3, 5, 8)),
            "hidden_relation: student and teacher must agree in batch and tokens, only the width may differ, "
            "got (2, 5, 8) and (3, 5, 8); pair layers of one resolution and drop tokens only one has",
        ),
        (
            lambda: losses.hidden_relation(randn(2, 5, 8), randn(2, 5, 8), "cosine_mle"),
            "hidden_relation: unknown form 'cosine_mle'; did you mean 'cosine_mse'? (known: cosine_mse, softmax_ce)",
        ),
        (
            lambda: losses.feature(randn(5, 8), randn(5, 8), "l1"),
            "feature: unknown form 'l1'; (known: cosine, mse)",
        ),
        (
            lambda: losses.feature(randn(2, 5, 8), randn(2, 5, 12)),
            "feature: student and teacher must have one shape, got (2, 5, 8) and (2, 5, 12); "
            "a student of another width needs a projection first",
        ),
    ],
)
def test_error_texts(call: Callable[[], object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == text
