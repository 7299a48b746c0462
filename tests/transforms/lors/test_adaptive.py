"""Adaptive LORS: the formula, the fit to a trained decoder, what it is merged to, and what is refused. The laws are in tests/contract."""

from __future__ import annotations

import pytest
import torch
from helpers.models import images_for

from compressvit.errors import UserError
from compressvit.fitting.generated import best_term, fit_shared_generators, fit_terms, query_factor
from compressvit.fitting.moments import Moments
from compressvit.testing.models import build, outputs
from compressvit.transforms import LORS, AdaptiveLORS, applying
from compressvit.transforms.applying import compress
from compressvit.transforms.lors.adaptive import AdaptiveTerm, generated
from compressvit.transforms.record import compression_of


def decoder_images(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_a_term_is_the_formula():
    torch.manual_seed(0)
    term = AdaptiveTerm(dim=5, groups=2, matrices=((3, 3), (4, 2)), rank=2, terms=2)
    for parameter in term.parameters():
        torch.nn.init.normal_(parameter)
    query = torch.randn(2, 7, 5)
    found = term(query).unflatten(-1, (2, 3 * 3 + 4 * 2))
    cores = term.core(query).view(2, 7, 2, 2, 2, 2, 2)  # matrix, term, group, r, r
    for m, shape, part in ((0, (3, 3), slice(0, 9)), (1, (4, 2), slice(9, 17))):
        for g in range(2):
            expected = sum(term.up[m][k, g] @ cores[:, :, m, k, g] @ term.down[m][k, g] for k in range(2))
            assert torch.allclose(found[:, :, g, part].unflatten(-1, shape), expected, atol=1e-5)
    weight, bias = term.product()
    assert torch.allclose(query @ weight.mT + bias, term(query), atol=1e-5)


def test_the_paper_starts_from_the_shared_generator_alone():
    model = build("adamixer")
    made = compress(model, [AdaptiveLORS(rank=2, terms=1, init="scratch", generator="zero")])
    generators = [stage.mixing.generator for stage in made.decoder.stages]
    assert all(layer.weight is generators[0].weight and layer.bias is generators[0].bias for layer in generators)
    assert (generators[0].weight == 0).all()
    assert generators[0].bias.abs().max() <= 32**-0.5
    for layer in generators:
        assert (layer.terms(torch.randn(3, 32)) == 0).all()
        for factor in (*layer.terms.up, *layer.terms.down):
            bound = (6 / factor.shape[-1]) ** 0.5
            assert 0.5 * bound < factor.abs().max() <= bound
    kaiming = compress(model, [AdaptiveLORS(rank=2, terms=1, init="scratch")]).decoder.stages[0].mixing.generator
    assert 0.9 * (6 / 32) ** 0.5 < kaiming.weight.abs().max() <= (6 / 32) ** 0.5


def test_what_has_the_rank_of_a_term_is_found_exactly():
    torch.manual_seed(0)
    parts = torch.randn(6, 2), torch.randn(2, 2, 5), torch.randn(2, 7)
    tensor = torch.einsum("ar,rsd,sb->abd", *(part.double() for part in parts))
    term = best_term(tensor, 2)
    assert torch.allclose(term.product(), tensor, atol=1e-7)  # by squares, so half of the digits
    assert torch.allclose(term.up.mT @ term.up, torch.eye(2, dtype=torch.float64), atol=1e-9)


def test_more_terms_leave_less():
    torch.manual_seed(0)
    tensor = torch.randn(8, 8, 5, dtype=torch.float64)
    errors = [(tensor - sum(t.product() for t in fit_terms(tensor, [2] * k, 2))).norm() for k in (1, 2, 3)]
    assert errors[0] > 1.02 * errors[1] > 1.04 * errors[2]


def test_what_is_shared_plus_low_rank_is_found_again():
    """Tensors that are one tensor plus a term each are fitted almost exactly; plain sharing would lose the terms."""
    torch.manual_seed(0)
    shared = torch.randn(8, 6, 5, dtype=torch.float64)
    tensors = [
        shared + torch.einsum("ar,rsd,sb->abd", torch.randn(8, 1), torch.randn(1, 1, 5), torch.randn(1, 6)).double()
        for _ in range(6)
    ]
    found, terms = fit_shared_generators(tensors, [[1]] * 6, rounds=30)
    lost = sum((t - found - sum(x.product() for x in own)).norm() ** 2 for t, own in zip(tensors, terms, strict=True))
    alone = sum((t - torch.stack(tensors).mean(0)).norm() ** 2 for t in tensors)
    assert lost < 0.02 * alone  # measured 0.001


def test_errors_are_those_of_the_generated_matrices():
    """‖T L‖² is the mean over queries of ‖W(q)‖²."""
    torch.manual_seed(0)
    queries = torch.randn(500, 4, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.1, 1.0]) + 1
    factor = query_factor(Moments(queries.mT @ queries / 500, queries.mean(0), 500), ridge=0.0)
    tensor = torch.randn(3, 2, 5, dtype=torch.float64)
    made = torch.einsum("abd,nd->nab", tensor, torch.cat([queries, torch.ones(500, 1)], dim=1))
    assert (tensor @ factor).square().sum().item() == pytest.approx(made.square().sum((1, 2)).mean().item(), rel=1e-4)


def test_the_fit_beats_the_shared_generator_alone_and_is_what_the_ledger_says():
    model = build("adamixer")
    errors = {}
    for terms in (0, 1, 2):
        made = compress(model, [AdaptiveLORS(rank=2, terms=terms)], calibration=decoder_images())
        ledger = compression_of(made).ledger
        errors[terms] = sum(entry.output_error for entry in ledger)
        with torch.no_grad():
            query = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
            ours = made.decoder.stages[1].mixing.generator(query)
            theirs = model.decoder.stages[1].mixing.generator(query)
        assert (ours - theirs).norm() < theirs.norm()
    assert errors[0] > 1.05 * errors[1] > 1.1 * errors[2]


def test_enough_rank_is_the_teacher_itself():
    model = build("adamixer")
    made = compress(model, [AdaptiveLORS(rank=4, terms=4)], calibration=decoder_images())
    before, after = outputs(model), outputs(made)
    smaller = compress(model, [AdaptiveLORS(rank=2, terms=1)], calibration=decoder_images())
    assert (after - before).norm() < 0.3 * (outputs(smaller) - before).norm()


def test_generated_tensors_are_in_the_order_of_the_mixing():
    model = build("adamixer")
    mixing = model.decoder.stages[0].mixing
    query = torch.randn(32)
    (first, *_), *_ = generated(mixing.generator, mixing)
    made = torch.einsum("abd,d->ab", first, torch.cat([query, torch.ones(1)]).double())
    assert torch.allclose(made.float(), mixing.generator(query)[:64].view(8, 8), atol=1e-5)


def test_static_lors_takes_the_projection():
    model = build("adamixer")
    static = LORS(of="decoder", targets=("mixing.projection",), share=3, rank=2, metric="weights")
    made = compress(model, [AdaptiveLORS(rank=2, terms=1, init="scratch"), static])
    layers = [stage.mixing.projection for stage in made.decoder.stages]
    assert all(layer.weight is layers[0].weight for layer in layers)
    assert layers[0].low_rank is not layers[1].low_rank


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"terms": (1, 2)}, r"adaptive_lors.terms lists 2 numbers, \[1, 2\], but the decoder of adamixer has 3 stages"),
        ({"rank": 9}, r"adaptive_lors.rank=9 is more than the matrices 8×8 and 8×4 can have; the largest is 4"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(UserError, match=text):
        AdaptiveLORS(**{"rank": 2, "terms": 1, **options}).plan(build("adamixer"))


def test_of_decoder_needs_one():
    with pytest.raises(
        UserError, match="lors: vit_tiny_patch16_224 is no detector, so it has no decoder; leave `of` out"
    ):
        LORS(of="decoder", rank=2, share=2).plan(build("vit"))


def test_transforms_work_on_the_backbone_inside():
    from compressvit import LowRank, Multiplex

    model = build("adamixer")
    made = compress(model, [Multiplex(share=2)])
    assert {entry.path.partition(".")[0] for entry in compression_of(made).ledger} == {"backbone"}
    images = images_for(model)
    assert torch.isfinite(made(images).logits).all()
    made = compress(model, [LowRank(rank=4)], calibration=decoder_images())
    errors = [entry.output_error for entry in compression_of(made).ledger]
    assert errors
    assert all(error is not None for error in errors)


def test_private_terms_alone_have_no_generator():
    model = build("adamixer")
    made = compress(model, [AdaptiveLORS(rank=2, terms=1, init="scratch", shared=False)])
    generators = [stage.mixing.generator for stage in made.decoder.stages]
    assert {name for layer in generators for name, _ in layer.named_parameters()} == {
        name for name, _ in AdaptiveTerm(2, 1, ((2, 2), (2, 2)), 1, 1).named_parameters(prefix="terms")
    }
    query = torch.randn(3, 32)
    for layer in generators:
        assert torch.equal(layer(query), layer.terms(query))
        assert torch.equal(layer(query)[0], layer(query)[1])  # at first the same for every query
        assert layer(query).abs().min() > 0  # nothing is learned from zero
    with pytest.raises(UserError, match="shared: false with terms: 0 leaves a stage without matrices"):
        AdaptiveLORS(rank=2, terms=(1, 0, 1), shared=False).plan(model)


def test_layers_of_a_decoder_are_not_fitted_in_order(monkeypatch):
    """Nothing walks through the backbone for them."""
    monkeypatch.setattr(applying, "fit_in_order", None)
    static = LORS(of="decoder", targets=("mixing.projection",), share=3, rank=2)
    made = compress(build("adamixer"), [static], calibration=decoder_images())
    assert all(entry.output_error for entry in compression_of(made).ledger)


def test_a_shared_generator_with_terms_loses_less_than_terms_alone():
    model = build("adamixer")
    errors = {}
    for shared in (True, False):
        made = compress(model, [AdaptiveLORS(rank=2, terms=1, shared=shared)], calibration=decoder_images())
        errors[shared] = sum(entry.output_error for entry in compression_of(made).ledger)
    assert errors[True] < errors[False]
