"""What each part of a block can become, and the error that is expected of it."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build, images_for

from compressvit.fitting.hull import Forms
from compressvit.fitting.lowrank import truncation_errors
from compressvit.fitting.reference import Reference
from compressvit.model.backbone import describe
from compressvit.transforms import Shrink
from compressvit.transforms.narrow.teacher import Settings, TeacherBlock
from compressvit.transforms.shrink.offers import Methods, offers
from compressvit.transforms.shrink.prices import Prices
from compressvit.transforms.shrink.spec import ShrinkBudget


@pytest.fixture
def of_attention(monkeypatch):
    """The errors of all forms of the attention of one block, by its head dimension and the ranks of its layers."""
    monkeypatch.setattr(Forms, "efficient", lambda self: self)

    def measured(teacher: torch.nn.Module) -> dict[tuple[int, int, int], float]:
        step = Shrink(budget=ShrinkBudget(parameters=0.5))
        place = step.places_of(teacher)[1]
        reference = Reference(teacher, images_for(teacher, 24))
        block = TeacherBlock(place, reference, describe(teacher).family, Settings(1e-3, 0.1))
        found = offers(place, Prices.of(teacher, [place], ("parameters",)), Methods(heads=False, multiple=1), block)
        forms = found[f"{place.path}.attn"]
        return {
            (form.head_dim or place.head_dim, form.ranks.get("attn.qkv", 0), form.ranks.get("attn.proj", 0)): error
            for form, error in zip(forms.forms, forms.errors, strict=True)
        }

    return measured


def test_a_rank_costs_no_more_in_narrower_heads(of_attention):
    """Narrower heads have other units, of queries, keys and values; an error in them is still one of the teacher's."""
    torch.manual_seed(0)
    teacher = build("vit")
    block = teacher.blocks[1].attn
    with torch.no_grad():  # values a hundred times as large, and the model is the same
        block.qkv.weight.chunk(3)[2].mul_(100)
        block.qkv.bias.chunk(3)[2].mul_(100)
        block.proj.weight.div_(100)
    errors = of_attention(teacher)
    whole = max(size for size, _, _ in errors)
    narrower = [(size, rank) for size, rank, other in errors if size < whole and rank and not other]
    assert narrower
    for size, rank in narrower:
        if (whole, rank, 0) in errors:
            added = errors[size, rank, 0] - errors[size, 0, 0]
            assert (
                added < errors[whole, rank, 0]
            )  # measured 0.41 of it; 110 with a ridge in units of the narrower heads


def test_an_error_counts_as_often_as_its_layer_sees_tokens(monkeypatch):
    """Keys and values of CvT see 16 of the 64 tokens of the first stage."""
    monkeypatch.setattr(Forms, "efficient", lambda self: self)
    teacher = build("cvt")
    step = Shrink(budget=ShrinkBudget(parameters=0.5))
    place = step.places_of(teacher)[0]
    reference = Reference(teacher, images_for(teacher, 24))
    block = TeacherBlock(place, reference, describe(teacher).family, Settings(1e-3, 0.1))
    prices = Prices.of(teacher, [place], ("parameters",))
    forms = offers(place, prices, Methods(heads=False, multiple=8), block)[f"{place.path}.attn"]
    found = {tuple(form.ranks.items()): error for form, error in zip(forms.forms, forms.errors, strict=True)}
    for name, tokens in (("attn.proj_q", 64), ("attn.proj_k", 16), ("attn.proj_v", 16)):
        lost = truncation_errors(block.weight(name), block.centred(name), 1e-3, block.metric(name))[8]
        assert found[((name, 8),)] == pytest.approx(tokens * lost.item(), rel=1e-9)
