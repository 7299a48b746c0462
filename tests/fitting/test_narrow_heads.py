"""Heads with fewer dimensions: what they compute are products, and nothing is lost where those have that rank."""

from __future__ import annotations

import pytest
import torch

from compressvit.fitting.narrow_heads import head_blocks, outputs_of, products

HEADS, SIZE, WIDTH = 3, 8, 24
TOKENS = 400


def attention(rank: int = SIZE, seed: int = 0):
    """qkv and its bias, the output projection, and inputs; the products of queries and keys, and of values and output, have `rank`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias = draw(3, HEADS, SIZE, WIDTH), draw(3, HEADS, SIZE)
    for part in (0, 2):  # queries and values in a subspace of each head
        low = draw(HEADS, SIZE, rank) @ draw(HEADS, rank, SIZE)
        weight[part], bias[part] = low @ weight[part], (low @ bias[part][..., None])[..., 0]
    x = draw(TOKENS, WIDTH) @ draw(WIDTH, WIDTH) + draw(WIDTH)
    return weight.reshape(-1, WIDTH), bias.flatten(), draw(WIDTH, HEADS * SIZE), x


def decomposed(weight, bias, projection, x, gradients=None):
    inputs, mean = x.mT @ x / len(x), x.mean(dim=0)
    queries, keys = outputs_of(weight, bias, inputs, mean, HEADS)
    values = (x @ weight[2 * HEADS * SIZE :].mT + bias[2 * HEADS * SIZE :]).mT
    return products(queries, keys, gradients, projection, values @ values.mT / len(x))


def computed(weight, bias, projection, x, size):
    """The logits (H, N, N) on the teacher's scale, and what the output projection makes of every head's values (H, N, out)."""
    q, k, v = (x @ weight.mT + bias).reshape(len(x), 3, HEADS, size).permute(1, 2, 0, 3)
    out = torch.stack([v[h] @ projection[:, h * size : (h + 1) * size].mT for h in range(HEADS)])
    return q @ k.mT / size**0.5, out


@pytest.mark.parametrize("by_gradients", [False, True])
def test_products_of_that_rank_lose_nothing(by_gradients):
    weight, bias, projection, x = attention(rank=3)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(HEADS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    found = decomposed(weight, bias, projection, x, drawn @ drawn.mT if by_gradients else None)
    assert found.errors[3] < 1e-4 * found.errors[0]  # measured 3e-6, of the ridges
    maps = found.maps(3)
    own, own_bias = maps.narrow(weight, bias)
    logits, out = computed(own, own_bias, maps.projection(projection), x, 3)
    wanted, of_teacher = computed(weight, bias, projection, x, SIZE)
    assert (logits - wanted).norm() < 1e-5 * wanted.norm()  # measured 2e-8
    assert (out - of_teacher).norm() < 1e-5 * of_teacher.norm()  # measured 1e-8


def test_all_dimensions_are_the_teachers_function():
    weight, bias, projection, x = attention()
    found = decomposed(weight, bias, projection, x)
    assert len(found.errors) == SIZE + 1
    assert found.errors[-1] == 0
    assert (found.errors.diff() <= 0).all()
    maps = found.maps(SIZE)
    logits, out = computed(*maps.narrow(weight, bias), maps.projection(projection), x, SIZE)
    wanted, of_teacher = computed(weight, bias, projection, x, SIZE)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(out, of_teacher)


def test_the_error_is_that_of_the_output():
    """Of the values, whose metric is exact: the mean square of what the output projection makes of what is lost."""
    weight, bias, projection, x = attention()
    weight[: 2 * HEADS * SIZE] = 0  # queries and keys lose nothing
    bias[: 2 * HEADS * SIZE] = 0
    found = decomposed(weight, bias, projection, x)
    maps = found.maps(5)
    _, out = computed(*maps.narrow(weight, bias), maps.projection(projection), x, 5)
    _, wanted = computed(weight, bias, projection, x, SIZE)
    lost = (out - wanted).square().sum(dim=(1, 2)) / TOKENS
    assert lost.sum().item() == pytest.approx(found.errors[5].item(), rel=1e-3)  # measured 1.6e-4, of the ridge


def test_moments_follow_the_maps():
    weight, bias, projection, x = attention()
    maps = decomposed(weight, bias, projection, x).maps(4)
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(TOKENS, len(weight), generator=generator, dtype=torch.float64)
    back = torch.block_diag(*maps.back.flatten(0, 1))  # y = back y'
    narrower = gradients @ back
    torch.testing.assert_close(maps.of_outputs(gradients.mT @ gradients), narrower.mT @ narrower)
    values = torch.randn(TOKENS, HEADS * SIZE, generator=generator, dtype=torch.float64)
    into = values @ torch.block_diag(*maps.into[2]).mT
    torch.testing.assert_close(maps.of_values(values.mT @ values), into.mT @ into)
    assert head_blocks(values.mT @ values, HEADS).shape == (HEADS, SIZE, SIZE)


def test_both_sides_of_a_product_get_one_size():
    """However far apart they are in the metrics, as with gradients that are small."""
    weight, bias, projection, x = attention()
    generator = torch.Generator().manual_seed(1)
    drawn = 1e-4 * torch.randn(HEADS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    maps = decomposed(weight, bias, projection, x, drawn @ drawn.mT).maps(4)
    even = maps.balanced(weight, bias, projection)
    sizes, columns = [], []
    for each in (maps, even):
        rows, own = each.narrow(weight, bias)
        sizes.append(torch.cat([rows, own[:, None]], dim=1).norm(dim=1).reshape(3, -1))
        columns.append(each.projection(projection).norm(dim=0))
    (query, key, value), column = sizes[1], columns[1]
    assert sizes[0][1].div(sizes[0][0]).median() > 1e4
    assert query.allclose(key)
    assert value.allclose(column)
    before, after = (computed(*each.narrow(weight, bias), each.projection(projection), x, 4) for each in (maps, even))
    assert all(new.allclose(old, rtol=1e-9, atol=1e-9) for new, old in zip(after, before, strict=True))
    gradients = torch.eye(3 * HEADS * SIZE, dtype=torch.float64)
    assert even.back.mT.matmul(even.into.mT).allclose(maps.back.mT.matmul(maps.into.mT))
    assert even.of_outputs(gradients).isfinite().all()
