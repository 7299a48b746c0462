"""timm's Swin v2: what is refused."""

from __future__ import annotations

import pytest
from helpers.models import build

from compressvit.errors import UserError
from compressvit.transforms import IRPE, VPT, Narrow


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (IRPE(), "is a Swin v2, which has a relative position table already"),
        (VPT(), r"is a Swin v2, which does not say so \(`Family.prompts`\); adapt it with adapters"),
        (Narrow(head_dim=4), r"whose attention .* norms them together \(cosines\)"),
    ],
    ids=["irpe", "vpt", "head_dim"],
)
def test_what_is_refused_and_why(spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build("swin_v2"))
