"""Low-rank and shared approximations in a metric: exact where they can be, never worse than the simpler one elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressvit.fitting.lowrank import Metric, cholesky, factor_of, fit_shared, left_out, spectrum, truncation_errors


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int, tokens: int = 200) -> torch.Tensor:
    """Second moment of correlated inputs: some directions matter a hundred times more than others."""
    x = matrix(tokens, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    return (x @ matrix(size, size, seed=seed + 1)).mT @ (x @ matrix(size, size, seed=seed + 1)) / tokens


def metric(out: int, inner: int, seed: int = 5, *, outputs: bool = True) -> Metric:
    return Metric(cholesky(moment(inner, seed), 1e-6), cholesky(moment(out, seed + 7), 1e-6) if outputs else None)


METRICS = {"weights": Metric(), "inputs": metric(12, 20, outputs=False), "outputs": metric(12, 20)}


@pytest.mark.parametrize("kind", METRICS)
def test_full_rank_is_exact(kind):
    weight = matrix(12, 20)
    up, down = spectrum(weight, METRICS[kind]).factors(12)
    assert (up @ down - weight).abs().max() < 1e-8  # measured 3e-11


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_error_is_what_the_dropped_singular_values_say(kind, rank):
    weight, g = matrix(12, 20), METRICS[kind]
    found = spectrum(weight, g)
    up, down = found.factors(rank)
    assert up.shape == (12, rank)
    assert down.shape == (rank, 20)
    assert g.squared_norm(weight - up @ down) == pytest.approx(found.values[rank:].square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(12, 20), (20, 12)])
def test_the_errors_of_all_ranks_are_those_of_the_decomposition(out, inner, outputs, ridge):
    weight, of_inputs, of_outputs = matrix(out, inner), moment(inner, 5), moment(out, 12) if outputs else None
    whole = left_out(spectrum(weight, Metric(cholesky(of_inputs, ridge), factor_of(of_outputs))).values)
    errors = truncation_errors(weight, of_inputs, ridge, of_outputs)
    assert len(errors) == 13
    assert (errors - whole).abs().max() < 1e-5 * whole[0]  # measured 1e-7, the least ridge of outputs that are factored
    assert errors[-1] == 0


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_truncation_in_a_metric_beats_plain_truncation_there(kind):
    weight, g = matrix(12, 20), METRICS[kind]
    for rank in (1, 3, 8):
        errors = []
        for used in (g, Metric()):
            up, down = spectrum(weight, used).factors(rank)
            errors.append(g.squared_norm(weight - up @ down))
        assert errors[0] < 0.9 * errors[1]  # measured 0.03 to 0.55


def test_whitened_truncation_is_the_best_change_of_the_outputs():
    inputs = matrix(300, 20, seed=3) * torch.logspace(0, -2, 20, dtype=torch.float64)
    weight = matrix(12, 20)
    g = Metric(cholesky(inputs.mT @ inputs / 300, 0.0))
    up, down = spectrum(weight, g).factors(4)
    best = spectrum(inputs @ weight.mT).values[4:].square().sum() / 300  # of all rank-4 outputs
    assert (inputs @ (weight - up @ down).mT).square().sum().item() / 300 == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("kind", METRICS)
def test_the_shared_matrix_alone_is_a_minimum(kind):
    weights = [matrix(12, 20, seed=i) for i in range(3)]
    metrics = (
        [METRICS["weights"]] * 3
        if kind == "weights"
        else [metric(12, 20, i, outputs=kind == "outputs") for i in range(3)]
    )

    def error(x: torch.Tensor) -> float:
        return sum(g.squared_norm(w - x) for w, g in zip(weights, metrics, strict=True))

    shared, factors = fit_shared(weights, metrics, [0, 0, 0], rounds=0)
    assert all(up.shape[1] == 0 for up, _ in factors)
    assert error(shared) <= error(sum(weights) / 3) * (1 + 1e-9)
    for seed in range(5):
        assert error(shared + 1e-2 * matrix(12, 20, seed=40 + seed)) > error(shared)
    if kind == "weights":
        assert (shared - sum(weights) / 3).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["weights", "inputs", "outputs"])
def test_no_round_makes_the_fit_worse(kind):
    weights = [matrix(12, 20, seed=9) + 0.5 * matrix(12, 20, seed=i) for i in range(3)]
    metrics = [Metric()] * 3 if kind == "weights" else [metric(12, 20, i, outputs=kind == "outputs") for i in range(3)]
    errors = []
    for rounds in range(5):
        shared, factors = fit_shared(weights, metrics, [2, 3, 2], rounds)
        errors.append(
            sum(
                g.squared_norm(w - shared - up @ down)
                for w, g, (up, down) in zip(weights, metrics, factors, strict=True)
            )
        )
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


def test_equal_layers_need_no_terms():
    weights = [matrix(12, 20)] * 3
    shared, factors = fit_shared(weights, [metric(12, 20, i) for i in range(3)], [2, 2, 2], rounds=2)
    assert (shared - weights[0]).abs().max() < 1e-6
    assert max((up @ down).abs().max().item() for up, down in factors) < 1e-6


def test_a_ridge_makes_a_singular_moment_usable():
    x = matrix(3, 20)
    root = cholesky(x.mT @ x / 3, 1e-3)
    assert root.isfinite().all()
    weight = matrix(12, 20)
    up, down = spectrum(weight, Metric(root)).factors(12)
    assert (up @ down - weight).abs().max() < 1e-6
