"""The losses against plain reference arithmetic, the laws they obey, and the matrices they must not build.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressvit import losses
from compressvit.errors import UserError

# (N, C_student, C_teacher), on both sides of every switch between direct, C×C and chunked arithmetic.
SHAPES = [(5, 8, 8), (5, 8, 12), (8, 8, 8), (10, 8, 12), (12, 8, 12), (13, 8, 12), (40, 8, 8), (40, 12, 8), (40, 8, 16)]
HIDDEN_FORMS = ("cosine_mse", "softmax_ce")
FEATURE_FORMS = ("cosine", "mse")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for each other on a busy machine made this file ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "student_width", "teacher_width"), SHAPES)
def test_attention_relation_equals_the_reference(
    tokens: int, student_width: int, teacher_width: int, heads: int
) -> None:
    student, teacher = qkv(3, tokens, student_width), qkv(3, tokens, teacher_width, seed=1)
    ours = value_and_gradients(losses.attention_relation, student, teacher, heads)
    reference = value_and_gradients(naive_attention_relation, student, teacher, heads)
    torch.testing.assert_close(ours, reference)


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
        assert len(shapes) > 5
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
            "attention_relation: student_qkv must be three tensors (q, k, v) of one shape (B, N, C), "
            "got 2: (2, 5, 8), (2, 5, 8); join the attention heads into C first",
        ),
        (
            lambda: losses.attention_relation(qkv(2, 5, 8), [randn(2, 4, 5, 2)] * 3),
            "attention_relation: teacher_qkv must be three tensors (q, k, v) of one shape (B, N, C), "
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
