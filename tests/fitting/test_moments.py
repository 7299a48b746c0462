"""What is summed up over calibration images, against the same sums written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressvit.fitting.lowrank import Metric
from compressvit.fitting.moments import Moments, collect_moments, is_finite

PREFIX, TOKENS, INNER, OUT = 1, 5, 4, 3
SEED = 3


class Tokens(nn.Module):
    """One linear layer over tokens, the first of which is a prefix token; logits, or tokens where there are no classes."""

    num_prefix_tokens = PREFIX

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.layer = nn.Linear(INNER, OUT)
        self.head = nn.Linear(OUT, max(1, num_classes))

    def forward_features(self, images: Tensor) -> Tensor:  # (B, 1, N, in) -> (B, N, out)
        return self.layer(images[:, 0]).square()

    def forward(self, images: Tensor) -> Tensor:
        x = self.forward_features(images)
        return self.head(3 * x[:, 0] + x[:, 1:].mean(dim=1))


def gradients(model: Tokens, images: Tensor) -> Tensor:
    """Of the loss at the layer's outputs, by the definition: (B, N, out)."""
    generator = torch.Generator().manual_seed(SEED)
    seen = []
    hook = model.layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    if model.num_classes:
        logits = model(images)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = -logits.log_softmax(-1)[torch.arange(len(images)), labels].sum()
    else:
        tokens = model.forward_features(images)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True)
        direction = torch.randn(tokens.shape, generator=generator)
        direction[:, :PREFIX] *= ((TOKENS - PREFIX) / PREFIX) ** 0.5  # together as much as all others
        loss = (tokens * direction).sum()
    hook.remove()
    return torch.autograd.grad(loss, seen)[0]


@pytest.mark.parametrize("num_classes", [6, 0], ids=["classifier", "headless"])
def test_the_moments_are_their_definition(num_classes):
    torch.manual_seed(0)
    model = Tokens(num_classes)
    images = torch.randn(7, 1, TOKENS, INNER) + 0.5
    images[:, :, :PREFIX] *= 2
    found = collect_moments(model, ["layer"], [images], outputs=True, seed=SEED)["layer"]
    x, g = images[:, 0].double().reshape(-1, INNER), gradients(model, images)
    size = g.double().square().sum(-1)  # ‖g‖² of every token
    g = g.double().reshape(-1, OUT)
    importance = size.reshape(-1)
    assert found.tokens == len(x)
    for name, expected in {
        "inputs": sum(torch.outer(row, row) for row in x) / len(x),
        "mean": x.mean(dim=0),
        "outputs": sum(torch.outer(row, row) for row in g) / len(g),
        "important": sum(i * torch.outer(row, row) for i, row in zip(importance, x, strict=True)) / importance.sum(),
    }.items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-6, msg=name)
    ratio = size[:, :PREFIX].mean() / size[:, PREFIX:].mean()
    most = (TOKENS - PREFIX) / PREFIX
    assert found.prefix_weight == pytest.approx(min(ratio.item(), most), rel=1e-5)
    # a batch at a time the sums are the same, though other labels are drawn
    split = collect_moments(model, ["layer"], images.split(2), outputs=False)["layer"]
    torch.testing.assert_close(split.inputs, found.inputs, rtol=1e-5, atol=1e-6)


def test_a_prefix_token_counts_for_its_gradient_up_to_all_others_together():
    torch.manual_seed(0)
    model = Tokens(6)
    images = torch.randn(7, 1, TOKENS, INNER)
    weights = []
    for scale in (0.05, 3, 300):

        def forward(images: Tensor, scale: float = scale) -> Tensor:
            x = model.forward_features(images)
            return model.head(scale * x[:, 0] + x[:, 1:].mean(dim=1))

        model.forward = forward
        weights.append(collect_moments(model, ["layer"], [images], outputs=True)["layer"].prefix_weight)
    assert 0 < weights[0] < 0.5
    assert weights[0] < weights[1] <= weights[2] == (TOKENS - PREFIX) / PREFIX


def test_in_the_outputs_metric_a_token_counts_half_as_any_other_and_half_by_its_gradient():
    """L Lᵀ of the input side is (E[xᵀx] + E[‖g‖² xᵀx] / E‖g‖²) / 2, and of inputs alone without the second half."""
    torch.manual_seed(0)

    def moment(size: int) -> Tensor:
        rows = torch.randn(50, size, dtype=torch.float64)
        return rows.mT @ rows / 50

    moments = Moments(moment(4), torch.zeros(4), 50, outputs=moment(3), important=moment(4))

    def of(metric: Metric) -> tuple[Tensor, Tensor | None]:
        return metric.input @ metric.input.mT, None if metric.output is None else metric.output @ metric.output.mT

    def ridged(matrix: Tensor, ridge: float) -> Tensor:
        return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)

    inputs, outputs = of(moments.metric(0.01, 0.2))
    torch.testing.assert_close(inputs, ridged((moments.inputs + moments.important) / 2, 0.01))
    torch.testing.assert_close(outputs, ridged(moments.outputs, 0.2))
    inputs, outputs = of(moments.metric(0.01, None))
    torch.testing.assert_close(inputs, ridged(moments.inputs, 0.01))
    assert outputs is None


def test_behind_a_layer_scale_the_output_side_is_scaled_after_its_ridge():
    torch.manual_seed(0)
    rows = torch.randn(50, 3, dtype=torch.float64)
    gradients = rows.mT @ rows / 50
    scale = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    moments = Moments(eye, torch.zeros(3), 50, outputs=gradients, important=eye)
    factor = moments.output_factor(0.2, scale)
    plain = gradients / torch.outer(scale, scale)  # the moment of the gradients behind the scale
    expected = torch.diag(scale) @ (plain + 0.2 * plain.diagonal().mean() * eye) @ torch.diag(scale)
    torch.testing.assert_close(factor @ factor.mT, expected)
    torch.testing.assert_close(moments.output_factor(None, scale), torch.diag(scale))
    assert moments.output_factor(None) is None


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # their sum is not
        ([1.0, float("nan")], False),
        ([float("inf"), float("-inf")], False),
    ],
)
def test_values_are_finite_if_each_of_them_is(values, finite):
    assert is_finite(torch.tensor(values)) is finite
