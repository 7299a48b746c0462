"""Sums over a sample of tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build, images_for

from compressvit.fitting.moments import collect_moments
from compressvit.fitting.sampling import TokenSample, gathered


def test_prefix_tokens_are_always_there_and_others_stand_for_all():
    places, weights = TokenSample(6, seed=3).draw(images=5, tokens=20, prefix=2)
    assert places.shape == (5, 8)
    assert weights.shape == (5, 8, 2)
    assert (places[:, :2] == torch.arange(2)).all()
    assert (places[:, 2:] >= 2).all()
    assert all(len(set(row)) == 8 for row in places.tolist())  # none twice
    assert weights[..., 0].sum(dim=1).tolist() == pytest.approx([20.0] * 5)
    assert weights[..., 1].tolist() == [[1.0, 1.0] + [0.0] * 6] * 5
    assert len({tuple(row) for row in places.tolist()}) == 5  # drawn anew in every image
    again, _ = TokenSample(6, seed=3).draw(images=5, tokens=20, prefix=2)
    assert again.equal(places)


@pytest.mark.parametrize("count", [None, 18, 50])
def test_all_tokens_are_taken_where_there_are_no_more(count):
    places, weights = TokenSample(count).draw(images=3, tokens=20, prefix=2)
    assert places is None
    assert (weights[..., 0] == 1).all()
    tokens = torch.randn(3, 20, 4)
    assert gathered(tokens, places) is tokens


def test_moments_of_a_sample_are_those_of_all_tokens_on_average():
    model = build("vit")  # 16 patches and a class token
    images = images_for(model, 32)
    path = "blocks.1.mlp.fc1"
    whole = collect_moments(model, [path], images.split(8), outputs=True)[path]
    drawn = [
        collect_moments(model, [path], images.split(8), outputs=True, sample=TokenSample(4, seed=seed))[path]
        for seed in range(12)
    ]
    for name in ("inputs", "outputs", "important"):
        wanted = getattr(whole, name)
        each = torch.stack([getattr(moments, name) for moments in drawn])
        errors = (each - wanted).norm(dim=(1, 2))
        # of twelve that are right on average 1/√12 = 0.29 is left; measured 0.28, 0.30, 0.33
        assert (each.mean(dim=0) - wanted).norm() < 0.45 * errors.mean()
        assert errors.min() > 1e-6 * wanted.norm()  # they are samples
    assert drawn[0].tokens == whole.tokens
    weights = [moments.prefix_weight for moments in drawn]
    assert sum(weights) / 12 == pytest.approx(whole.prefix_weight, rel=0.1)  # measured 0.01
