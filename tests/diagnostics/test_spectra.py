"""What weights alone say (spectra), and what layers would lose by sharing one weight, in the weights or in their outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import build, equal_within_stages, images_for

from compressvit import Align, LowRank, compress
from compressvit.diagnostics.similarity import sharing_finding, sharing_losses
from compressvit.diagnostics.spectra import effective_rank, singular_values, spectra_findings
from compressvit.errors import UserError
from compressvit.fitting.reference import Reference


def test_effective_rank_counts_directions():
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0
    assert 1 < effective_rank(np.array([1.0, 0.1])) < 2


def test_a_low_rank_student_has_the_singular_values_that_were_kept():
    teacher = build("vit")
    student = compress(teacher, [LowRank(rank=5, metric="weights", sequential=False)])
    theirs, ours = singular_values(teacher), singular_values(student)
    assert list(ours) == list(theirs)
    for path, values in ours.items():
        assert values[:5] == pytest.approx(theirs[path][:5], rel=1e-5)
        assert values[5:] == pytest.approx(0, abs=1e-5)
    ranks, curves = spectra_findings({"teacher": teacher, "student": student})
    assert all(record["effective_rank"] <= 5.001 for record in ranks.records if record["model"] == "student")
    last = {r["model"]: r["relative"] for r in curves.records if r["layer"] == "mlp.fc1" and r["block"] == 0}
    assert last["student"] < 1e-5 < last["teacher"], "each by its name"
    assert len({r["weights"] for r in curves.records}) == 2 * 4, "a panel for each"


def test_equal_layers_lose_nothing_by_sharing():
    model = equal_within_stages(build("vit"))
    assert all(record["loss"] == 0 for record in sharing_losses(model))
    apart = [record for record in sharing_losses(build("vit")) if record["block"] != record["other"]]
    assert all(0.6 < record["loss"] < 0.8 for record in apart)  # unrelated: about 0.71


def test_alignment_finds_a_permuted_layer():
    model = equal_within_stages(build("vit"))
    with torch.no_grad():
        mlp = model.blocks[1].mlp
        order = torch.randperm(mlp.fc1.out_features, generator=torch.Generator().manual_seed(0))
        for tensor in (mlp.fc1.weight, mlp.fc1.bias):
            tensor.copy_(tensor[order])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    plain, aligned = (
        next(
            r["loss"]
            for r in sharing_losses(model, aligned=a)
            if (r["layer"], r["block"], r["other"]) == ("mlp.fc1", "blocks.0", "blocks.1")
        )
        for a in (False, True)
    )
    assert plain > 0.5
    assert aligned == 0
    assert sharing_finding(sharing_losses(model), outputs=False).draw() is not None


def test_with_images_it_is_the_outputs_that_count():
    """Weights that differ where no input goes lose nothing by sharing, and the error is that of the best shared weight."""
    model = build("vit")
    images = images_for(model, 32)
    first, second = model.blocks[0].attn.qkv, model.blocks[1].attn.qkv
    with torch.no_grad():
        model.blocks[0].norm1.weight[3:] = 0  # only three inputs vary, around their biases
        model.blocks[1].norm1.weight[3:] = 0
        for block in model.blocks[:2]:
            block.norm1.bias.zero_()
        second.weight.copy_(first.weight)
        second.weight[:, 3:] += 1.0
    found = {
        (r["layer"], r["block"], r["other"]): r["loss"]
        for r in sharing_losses(model, reference=Reference(model, images))
    }
    pair = ("attn.qkv", "blocks.0", "blocks.1")
    assert found[pair] < 1e-4
    assert next(r["loss"] for r in sharing_losses(model) if (r["layer"], r["block"], r["other"]) == pair) > 0.1
    assert all(0 < loss < 1 for (_, one, other), loss in found.items() if {one, other} == {"blocks.2", "blocks.3"})
    with pytest.raises(UserError, match="give one"):
        sharing_losses(model, reference=Reference(model, images), aligned=True)


def test_the_shared_weight_is_the_best_one():
    model = build("vit")
    images = images_for(model, 64)
    reference = Reference(model, images)
    found = {(r["layer"], r["block"], r["other"]): r["loss"] for r in sharing_losses(model, reference=reference)}
    paths = ["blocks.1.mlp.fc1", "blocks.3.mlp.fc1"]
    moments = [reference.moments([path], outputs=False)[path].inputs.double() for path in paths]
    weights = [reference.weight(path) for path in paths]

    def error(shared):
        lost = sum(((w - shared) @ s @ (w - shared).mT).trace() for w, s in zip(weights, moments, strict=True))
        return (lost / sum((w @ s @ w.mT).trace() for w, s in zip(weights, moments, strict=True))).sqrt().item()

    loss = found["mlp.fc1", "blocks.1", "blocks.3"]
    assert loss < error((weights[0] + weights[1]) / 2)
    assert loss < min(error(w) for w in weights)
    assert loss == pytest.approx(found["mlp.fc1", "blocks.3", "blocks.1"], abs=1e-6)


def test_alignment_lowers_the_loss_as_the_step_does():
    model = build("vit")
    one = compress(model, [Align(share=4, rounds=1)])
    expected = [r["loss"] for r in sharing_losses(one) if r["block"] == "blocks.0"]
    found = [r["loss"] for r in sharing_losses(model, aligned=True) if r["block"] == "blocks.0"]
    assert found == pytest.approx(expected, abs=1e-9)


def test_weights_that_are_not_finite_have_no_spectrum():
    model = build("vit")
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[0, 0] = float("nan")
    for call in (
        lambda: singular_values(model),
        lambda: sharing_losses(model),
        lambda: sharing_losses(model, aligned=True),
    ):
        with pytest.raises(UserError, match=r"the weight of blocks.1.attn.proj holds numbers that are not finite"):
            call()


def test_layers_that_see_nothing_lose_nothing():
    model = build("vit")
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight.zero_()
            block.norm1.bias.zero_()
    found = sharing_losses(model, reference=Reference(model, images_for(model, 16)))
    assert all(record["loss"] == 0 for record in found if record["layer"] == "attn.qkv")
