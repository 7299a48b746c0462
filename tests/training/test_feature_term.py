"""The feature term: prefix tokens have their share, and where there are none the tokens are compared as they are."""

from __future__ import annotations

import pytest
import torch

from compressvit.training import losses
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import Batch, build_terms

SPEC = Distill(losses={"prediction": {"weight": 0}, "feature": {"weight": 2.0, "form": "mse", "prefix": 0.3}}).losses


def batch(tokens: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, tokens, 4, generator=generator) for _ in range(2))
    taps = [{"norm": {"output": x}} for x in (student, teacher)]
    return Batch(student[:, 0], teacher[:, 0], *taps, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_prefix_tokens_have_their_share_together(prefix):
    (term,) = build_terms(SPEC, [], classes=0, prefix_tokens=prefix)
    assert term.weight == 2
    example = batch()
    student, teacher = (side["norm"]["output"] for side in (example.student_taps, example.teacher_taps))
    value, parts = term.function(example)
    if not prefix:
        assert parts == {}
        expected = (student - teacher).square().mean()
    else:
        first, others = ((student - teacher)[:, part].square().mean() for part in (slice(prefix), slice(prefix, None)))
        torch.testing.assert_close(parts["feature_prefix"], first)
        torch.testing.assert_close(parts["feature_patches"], others)
        expected = 0.3 * first + 0.7 * others
    torch.testing.assert_close(value, expected)
    assert losses.feature(student, teacher, "mse").item() == pytest.approx((student - teacher).square().mean().item())
