"""Retrieval in the teacher's index, against sorting one query after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressvit.tasks import retrieval
from compressvit.tasks.retrieval import Retrieval


def measured(ours, theirs, size=7):
    found = Retrieval()
    for a, b in zip(ours.split(size), theirs.split(size), strict=True):
        found.add(a, b)
    return found.result()


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(40, 8, generator=generator)
    return theirs + 0.7 * torch.randn(40, 8, generator=generator), theirs


def test_it_is_what_sorting_finds(embeddings, monkeypatch):
    ours, theirs = embeddings
    whole = measured(ours * torch.rand(40, 1), theirs * 3)  # lengths do not count
    monkeypatch.setattr(retrieval, "_ROWS", 9)
    assert measured(ours, theirs) == pytest.approx(whole)
    a, b = ((x / x.norm(dim=1, keepdim=True)).double().numpy() for x in embeddings)
    own, found = [], {1: [], 10: []}
    for i in range(40):
        own.append(int(np.argmax(b @ a[i])) == i)
        others = [j for j in range(40) if j != i]
        by_student, by_teacher = (sorted(others, key=lambda j, q=q: -float(b[j] @ q)) for q in (a[i], b[i]))
        for depth, shares in found.items():
            shares.append(len(set(by_student[:depth]) & set(by_teacher[:depth])) / depth)
    assert whole["recall_self"] == pytest.approx(100 * np.mean(own))
    assert {0, 1} <= set(own)
    for depth, shares in found.items():
        assert whole[f"recall_{depth}"] == pytest.approx(100 * np.mean(shares))
        assert 10 < np.mean(shares) * 100 < 90


def test_a_model_finds_all_that_it_finds_itself(embeddings):
    """Also where an image is there twice, so that either may come first."""
    _, theirs = embeddings
    twice = torch.cat([theirs, theirs[:5]])
    assert measured(twice, twice) == {"recall_1": 100, "recall_10": 100, "recall_self": 100}


def test_what_is_found_in_any_case_is_not_measured(embeddings):
    ours, theirs = (x[:11] for x in embeddings)
    found = measured(ours, theirs)
    assert found["recall_10"] is None
    assert found["recall_1"] is not None
    assert measured(ours[:2], theirs[:2])["recall_1"] is None
    assert Retrieval().result() == {}
