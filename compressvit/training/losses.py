"""Distillation losses: predictions, attention relations, hidden relations, plain features.

Every function takes the student first and returns one scalar. Only the student receives a gradient: the teacher's tensors
are detached inside. Reductions run in at least float32, and in float64 for float64 inputs, regardless of autocast.
Relation losses compute their gradient with their value, keep nothing else for the backward pass, and have no second
derivative (`relations.py`).

B is the batch (in Swin's attention: batch times windows), N the tokens, C the width. If N exceeds the width, no function
builds an N×N matrix, forward or backward, because it would exceed its inputs in size (Swin's first stage: N = 3136, C = 96).

Paper: MiniViT, https://arxiv.org/abs/2204.07154 (weight distillation).
Code: https://github.com/microsoft/Cream/tree/main/MiniViT; its hidden relation differs from the paper's, so both forms are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from compressvit.errors import UserError, did_you_mean
from compressvit.training import relations

__all__ = ["attention_relation", "cka", "feature", "hidden_relation", "prediction"]


def prediction(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's predictions against the teacher's, `−Σ softmax(t/T) · log_softmax(s/T)`, in nats.

    Summed over the classes and averaged over the batch, without a factor T². (DeiT's code averages over all elements,
    which divides the value by the number of classes.) The floor is the entropy of the teacher's predictions, not 0.

    Args:
        student_logits: (B, classes).
        teacher_logits: (B, classes).
        temperature: T, above 0; divides both sets of logits.

    Raises:
        UserError: the shapes differ or are not (B, classes), or the temperature is not a positive finite number.

    Source: MiniViT, prediction-level distillation; the reduction is the released code's.
    """
    _require_same_shape("prediction", student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise UserError(
            f"prediction: logits must be (B, classes), got {_shape(student_logits)}; move other axes into B"
        )
    if not 0 < temperature < math.inf:
        raise UserError(f"prediction: temperature must be positive and finite, got {temperature}; 1.0 changes nothing")
    student, teacher = _in_common_precision(student_logits, teacher_logits)
    log_student = F.log_softmax(student / temperature, dim=-1)
    return -(F.softmax(teacher / temperature, dim=-1) * log_student).sum(dim=-1).mean()


@overload
def attention_relation(
    student_qkv: Sequence[Tensor], teacher_qkv: Sequence[Tensor], heads: int = 1, *, with_kl: Literal[False] = False
) -> Tensor: ...
@overload
def attention_relation(
    student_qkv: Sequence[Tensor], teacher_qkv: Sequence[Tensor], heads: int = 1, *, with_kl: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def attention_relation(
    student_qkv: Sequence[Tensor], teacher_qkv: Sequence[Tensor], heads: int = 1, *, with_kl: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy between the token relations of an attention layer of the student and one of the teacher, in nats.

    For each ordered pair (i, j) of {q, k, v}: split the width into relation heads, form
    `softmax(X_i X_jᵀ / sqrt(C/heads))`, and take the cross-entropy of the student's rows against the teacher's.
    Mean over batch, relation heads and rows, then over the nine pairs. Relation heads are not attention heads: the two
    models may differ in attention heads and in width.

    The floor is the entropy of the teacher's relations, not 0; the KL divergence shows how much is left to learn.

    Args:
        student_qkv: the full query, key and value projections, three tensors (B, N, C_student); keys and values may have another N.
        teacher_qkv: three tensors (B, N, C_teacher), with the student's B and N of each.
        heads: relation heads; must divide both widths.
        with_kl: also return the KL divergence (the loss minus the teacher's entropy), detached.

    Returns:
        The loss, a scalar; with `with_kl`, the pair (loss, KL).

    Raises:
        UserError: there are not three tensors per model, their shapes do not match, or `heads` does not divide a width; in
            the backward pass, a second derivative is asked for.

    The matrix products run in the inputs' dtype or the one chosen by autocast, as in attention; softmax and reductions do not.
    The gradient is computed with the value, some windows, images or heads at a time, or some of their rows if N exceeds the
    width of a relation head; what is kept for the backward pass has the size of the student's q, k and v.

    Source: MiniViT, self-attention distillation.
    """
    for side, projections in (("student", student_qkv), ("teacher", teacher_qkv)):
        shapes = [_shape(projection) for projection in projections]
        alike = {(projection.ndim, projection.shape[:1], projection.shape[-1:]) for projection in projections}
        if len(shapes) != 3 or len(alike) > 1 or projections[0].ndim != 3:
            raise UserError(
                f"attention_relation: {side}_qkv must be three tensors (q, k, v) of one shape (B, N, C), but for N, "
                f"got {len(shapes)}: {', '.join(shapes)}; join the attention heads into C first"
            )
    for ours, theirs in zip(student_qkv, teacher_qkv, strict=True):
        _require_same_tokens("attention_relation", ours, theirs)
    widths = student_qkv[0].shape[-1], teacher_qkv[0].shape[-1]
    if heads < 1 or widths[0] % heads or widths[1] % heads:
        common = math.gcd(*widths)
        raise UserError(
            f"attention_relation: heads={heads} does not divide the student's width {widths[0]} and the teacher's "
            f"{widths[1]}; these do: {', '.join(str(d) for d in range(1, common + 1) if common % d == 0)}"
        )

    loss, kl = relations.cross_entropy(student_qkv, teacher_qkv, heads, with_kl)
    return (loss, kl) if with_kl else loss


def hidden_relation(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    form: Literal["cosine_mse", "softmax_ce"] = "cosine_mse",
    scale: float = 49.0,
) -> Tensor:
    """Distance between the token relations of two hidden states, which may differ in width.

    - "cosine_mse", the released code: `scale · mean((Ŝ Ŝᵀ − T̂ T̂ᵀ)²)` over B, N and N, of L2-normalised tokens Ŝ, T̂.
      Exactly 0 for equal inputs; for unequal inputs with equal relations, rounding can make it slightly negative.
    - "softmax_ce", the paper: cross-entropy of the rows of `softmax(S Sᵀ / sqrt(C_student))` against those of
      `softmax(T Tᵀ / sqrt(C_teacher))`, in nats, mean over B and rows. The floor is the teacher's entropy.

    Args:
        student_hidden: (B, N, C_student).
        teacher_hidden: (B, N, C_teacher).
        form: one of the two above.
        scale: factor for "cosine_mse"; "softmax_ce" ignores it. The released code uses 49, the area of a Swin window, in
            every stage.

    Raises:
        UserError: the tensors are not (B, N, C) with equal B and N, or `form` is unknown; in the backward pass, a second
            derivative is asked for.

    If N exceeds the larger width, "cosine_mse" needs only C×C matrices, and "softmax_ce" processes some rows at a time. The
    gradient is computed with the value, and kept in the size of the student's tokens. Autocast is disabled inside. With unequal
    widths the C×C form is a difference of squares: if TF32 products are allowed, it is accurate to three digits of the squares,
    not of the difference.

    Source: MiniViT, hidden-state distillation.
    """
    _require_form("hidden_relation", form, ("cosine_mse", "softmax_ce"))
    for side, hidden in (("student", student_hidden), ("teacher", teacher_hidden)):
        if hidden.ndim != 3:
            raise UserError(
                f"hidden_relation: {side}_hidden must be (B, N, C), got {_shape(hidden)}; flatten grids into N"
            )
    _require_same_tokens("hidden_relation", student_hidden, teacher_hidden)
    with _autocast_off(student_hidden):
        if form == "softmax_ce":
            student, teacher = _in_common_precision(student_hidden, teacher_hidden)
            return relations.cross_entropy([student], [teacher], 1)[0]
        batch, tokens, _ = student_hidden.shape
        return scale * relations.squared_distance(student_hidden, teacher_hidden) / (batch * tokens)


def feature(student: Tensor, teacher: Tensor, form: Literal["cosine", "mse"] = "cosine") -> Tensor:
    """Distance between features of equal shape: "cosine", the mean of 1 − cosine over tokens, or "mse".

    Args:
        student: (..., C).
        teacher: the same shape.
        form: "cosine" compares the vectors along the last axis; "mse" is the mean squared error over every element.

    Raises:
        UserError: the shapes differ or `form` is unknown.
    """
    _require_form("feature", form, ("cosine", "mse"))
    _require_same_shape("feature", student, teacher)
    student, teacher = _in_common_precision(student, teacher)
    if form == "mse":
        return F.mse_loss(student, teacher)
    # ½‖Ŝ − T̂‖² equals 1 − cosine without the cancellation that would round small angles to zero in float32.
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(dim=-1).mean() / 2


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − linear CKA of the tokens of two hidden states, which may differ in width; 0 where they are equal up to rotation and scale.

    Every token of every image is a sample: `CKA = ‖SᵀT‖² / (‖SᵀS‖ ‖TᵀT‖)` of all tokens of the batch, less their mean, in Frobenius norms.
    The value of a batch is of its tokens alone: over micro-batches that are accumulated it is averaged. With hardly more tokens than the
    widths, as of the last stage of a Swin in small batches, all tokens look alike, and the loss is small whatever they are.

    Args:
        student: (B, N, C_student).
        teacher: (B, N, C_teacher).

    Raises:
        UserError: the tensors are not (B, N, C) with equal B and N.

    Autocast is disabled inside. The products are C×C, or where there are fewer tokens than the widths, of tokens by tokens.

    Source: Kornblith et al., https://arxiv.org/abs/1905.00414, equations 4 and 5 with the linear kernel.
    """
    for side, hidden in (("student", student), ("teacher", teacher)):
        if hidden.ndim != 3:
            raise UserError(f"cka: {side} must be (B, N, C), got {_shape(hidden)}; flatten grids into N")
    _require_same_tokens("cka", student, teacher)
    student, teacher = _in_common_precision(student, teacher)
    with _autocast_off(student):
        # of norm 1, so that no product overflows
        s, t = (x / x.norm().clamp(min=1e-12) for x in (_centred(student), _centred(teacher)))
        if len(s) < min(s.shape[1], t.shape[1]):
            kernels = s @ s.mT, t @ t.mT
            shared, own = (kernels[0] * kernels[1]).sum(), [kernel.norm() for kernel in kernels]
        else:
            shared, own = (s.mT @ t).square().sum(), [(x.mT @ x).norm() for x in (s, t)]
        return 1 - shared / (own[0] * own[1]).clamp(min=1e-12)


def _centred(hidden: Tensor) -> Tensor:
    """All tokens (B·N, C), less their mean."""
    flat = hidden.flatten(0, 1)
    return flat - flat.mean(dim=0)


def _in_common_precision(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _require_same_shape(function: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise UserError(
            f"{function}: student and teacher must have one shape, got {_shape(student)} and {_shape(teacher)}; "
            "a student of another width needs a projection first"
        )


def _require_same_tokens(function: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            f"{function}: student and teacher must agree in batch and tokens, only the width may differ, "
            f"got {_shape(student)} and {_shape(teacher)}; pair layers of one resolution and drop tokens only one has"
        )


def _require_form(function: str, form: str, known: Sequence[str]) -> None:
    if form not in known:
        raise UserError(f"{function}: unknown form '{form}'; {did_you_mean(form, known)}")
