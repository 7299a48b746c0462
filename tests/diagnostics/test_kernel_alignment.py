"""Laws of CKA: invariances, the estimators against their published formulas, streams against all images at once, edge cases."""

from __future__ import annotations

import pytest
import torch

from compressvit.diagnostics.kernel_alignment import MinibatchCKA, centred_gram, cka
from compressvit.errors import UserError

KERNELS = ("linear", "rbf")


def related(count: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two representations that have something in common: (count, 20) and (count, 30)."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 20, generator=chance) * torch.linspace(0.1, 2, 20)
    mix = torch.randn(20, 30, generator=torch.Generator().manual_seed(99))
    return x, x @ mix + 2 * torch.randn(count, 30, generator=chance)


def hsic_by_song(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Equation 5 of Song et al., term by term."""
    n = len(k)
    k, m = (a - torch.diag(a.diagonal()) for a in (k, m))
    one = torch.ones(n, dtype=k.dtype)
    last = 2 / (n - 2) * (one @ k @ m @ one)
    return (torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - last) / (n * (n - 3))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_representation_is_like_itself(kernel, unbiased):
    x, y = related()
    assert cka(x, x, kernel, unbiased=unbiased) == pytest.approx(1, abs=1e-12)  # measured: 2e-16
    assert 0.2 < cka(x, y, kernel, unbiased=unbiased) < 0.95


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_rotations_scales_and_shifts_change_nothing(kernel, unbiased):
    x, y = related()
    turn = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    changed = 1e-17 * (x.double() @ turn) + 1e-16
    assert cka(changed, 1e17 * y.double(), kernel, unbiased=unbiased) == pytest.approx(
        cka(x, y, kernel, unbiased=unbiased), abs=1e-9
    )


def test_other_linear_maps_do_change_it():
    x, y = related()
    assert abs(cka(x * torch.linspace(1, 20, 20), y) - cka(x, y)) > 0.01


def test_linear_cka_is_the_published_formula():
    x, y = (a.double() - a.double().mean(0) for a in related())
    expected = (y.mT @ x).norm() ** 2 / ((x.mT @ x).norm() * (y.mT @ y).norm())
    assert cka(x, y) == pytest.approx(expected.item(), rel=1e-12)


def test_the_unbiased_estimator_is_songs():
    x, y = (a.double() for a in related(12))
    k, m = x @ x.mT, y @ y.mT
    expected = hsic_by_song(k, m) / (hsic_by_song(k, k) * hsic_by_song(m, m)).sqrt()
    assert cka(x, y, unbiased=True) == pytest.approx(expected.item(), rel=1e-10)


def test_few_images_in_wide_layers_do_not_look_alike():
    chance = torch.Generator().manual_seed(0)
    values = [
        [
            cka(torch.randn(16, 500, generator=chance), torch.randn(16, 500, generator=chance), unbiased=u)
            for _ in range(40)
        ]
        for u in (False, True)
    ]
    biased, unbiased = (torch.tensor(v).mean().item() for v in values)
    assert biased > 0.9  # measured: 0.97
    assert abs(unbiased) < 0.03  # measured: 0.016


@pytest.mark.wide_unless(lambda kernel: kernel == "linear")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stream_is_all_images_at_once_within_its_interval(kernel):
    inside = 0
    for seed in range(20):
        x, y = related(640, seed)
        stream = MinibatchCKA(["x"], ["x", "y"], kernel)
        for rows in torch.arange(640).split(64):
            stream.add({"x": x[rows]}, {"x": x[rows], "y": y[rows]})
        result = stream.result()
        assert result.values[0, 0].item() == pytest.approx(1, abs=1e-12)
        assert 0 < result.half_width[0, 1] < 0.05  # measured: at most 0.021
        inside += abs(result.values[0, 1].item() - cka(x, y, kernel, unbiased=True)) <= result.half_width[0, 1].item()
    assert inside >= 18  # of 20; measured: 20 and 20


def test_one_batch_is_exact_and_has_no_interval():
    x, y = related()
    stream = MinibatchCKA(["x"], ["y"])
    stream.add({"x": x}, {"y": y})
    result = stream.result()
    assert result.values.item() == pytest.approx(cka(x, y, unbiased=True), abs=1e-12)
    assert result.half_width is None
    assert (result.images, result.batches) == (64, 1)


def test_batches_of_any_size_from_four():
    x, y = related(100)
    stream = MinibatchCKA(["x"], ["y"])
    for rows in torch.arange(100).split([50, 42, 4, 4]):
        stream.add({"x": x[rows]}, {"y": y[rows]})
    assert stream.result().images == 100
    assert stream.result().values.item() == pytest.approx(cka(x, y, unbiased=True), abs=0.05)  # measured: 0.0015


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "constant", [torch.zeros(64, 5), torch.full((64, 5), 3.3), torch.randn(1, 500).expand(64, 500) * 1e6]
)
def test_a_constant_layer_tells_nothing(kernel, constant):
    x, _ = related()
    assert cka(x, constant, kernel) == cka(constant, constant, kernel) == 0
    stream = MinibatchCKA(["x", "flat"], ["x", "flat"], kernel)
    for rows in torch.arange(64).split(16):
        both = {"x": x[rows], "flat": constant[rows]}
        stream.add(both, both)
    result = stream.result()
    assert result.values.isfinite().all()
    assert result.half_width.isfinite().all()
    assert torch.allclose(result.values, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("unbiased", [False, True])
def test_rbf_where_most_images_coincide(unbiased):
    """Their median distance is 0, so σ is that of the images that differ."""
    x, y = related(32)
    x[:24] = 0
    values = [cka(a, b, "rbf", unbiased=unbiased) for a, b in ((x, x), (x, y), (1e6 * x, y))]
    assert values[0] == pytest.approx(1, abs=1e-9)
    assert -0.5 < values[1] < 1
    assert values[2] == pytest.approx(values[1], abs=1e-6)
    stream = MinibatchCKA(["x"], ["y"], "rbf")
    stream.add({"x": x}, {"y": y})
    assert stream.result().values.item() == pytest.approx(cka(x, y, "rbf", unbiased=True), abs=1e-9)


def test_half_precision_is_summed_in_float64():
    x, y = related()
    exact = cka(x.half().double(), y.half().double())
    assert cka(x.half(), y.half()) == pytest.approx(exact, abs=1e-12)


def test_many_features_go_in_parts(monkeypatch):
    x, _ = related()
    whole = centred_gram(x)
    monkeypatch.setattr("compressvit.diagnostics.kernel_alignment._CHUNK", 7)
    assert torch.allclose(centred_gram(x), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.randn(8, 3), torch.randn(7, 3), ("7 images", "8", "the same images")),
        (torch.randn(3, 3), torch.randn(3, 3), ("3 images are too few", "at least 4")),
        (torch.tensor([[1.0, float("nan")]] * 8), torch.randn(8, 3), ("x has 8 features that are not finite",)),
        (torch.randn(8, 3), torch.full((8, 2), float("inf")), ("y has 16 features that are not finite",)),
        (torch.randn(8), torch.randn(8, 3), ("x has the shape (8,)", "(images, features)")),
    ],
)
def test_what_cannot_be_compared(x, y, words):
    for call in (lambda: cka(x, y, unbiased=True), lambda: MinibatchCKA(["x"], ["y"]).add({"x": x}, {"y": y})):
        with pytest.raises(UserError) as error:
            call()
        assert all(word in str(error.value) for word in words)


def test_no_image_at_all():
    with pytest.raises(UserError, match="none were given"):
        MinibatchCKA(["x"], ["y"]).result()


def test_the_public_names_are_there():
    import compressvit

    torch.manual_seed(0)
    x = torch.randn(8, 5)
    assert compressvit.diagnostics.cka(x, x) == pytest.approx(1)
    for name in compressvit.diagnostics.__all__:
        assert getattr(compressvit.diagnostics, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ckaa'"):
        _ = compressvit.diagnostics.ckaa
