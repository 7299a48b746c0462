"""Where every method starts: the spread of each tensor it adds, what is exactly zero, and how many parameters there are.

The values are those of the papers' released code, or, where a comment says so, ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import pytest
import timm
import torch
from torch import Tensor, nn

from compressvit.model import surgery
from compressvit.transforms import (
    IRPE,
    LORS,
    PHM,
    SSF,
    TRANSFORMS,
    VPT,
    Adapters,
    AdaptFormer,
    Compacter,
    FacT,
    LoRA,
    LowRank,
    Multiplex,
    RepAdapter,
    Transform,
)
from compressvit.transforms.applying import compress

M, H, BLOCKS, PATCH = 192, 12, 4, 8
SLOTS = 12 * BLOCKS  # M×M pieces of all projections, of a model whose MLP is 4 M wide
SHARED = ("attn.qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")  # which `lors` starts anew
ADOPTED = tuple(f"{layer}.up.bias" for layer in ("qkv", "proj", "fc1", "fc2"))  # of the layer that `low_rank` replaces
ADD_NOTHING = {"align", "bitfit", "freeze", "head_norm", "load_weights", "narrow"}  # or nothing that has parameters
FITTED_ONLY = {"shrink", "quantise"}  # tests of their own: tests/transforms/shrink, tests/transforms/quantise
ON_A_DECODER = {"adaptive_lors"}  # tests/transforms/lors/test_adaptive.py


@dataclass(frozen=True)
class Uniform:
    """Within ±bound."""

    bound: float

    def holds(self, values: Tensor) -> None:
        assert values.abs().max() <= self.bound * (1 + 1e-6)
        spread(values, self.bound / sqrt(3), kurtosis=1.8)


@dataclass(frozen=True)
class Normal:
    """Around `mean`; of a truncated normal only what is cut off, beyond a hundred deviations, would differ."""

    std: float
    mean: float = 0.0

    def holds(self, values: Tensor) -> None:
        spread(values - self.mean, self.std, kurtosis=3.0)
        assert (values - self.mean).abs().max() > 1.8 * self.std  # a uniform distribution ends at √3


@dataclass(frozen=True)
class Constant:
    value: float

    def holds(self, values: Tensor) -> None:
        assert (values == self.value).all()


@dataclass(frozen=True)
class Identity:
    """Of H×H matrices."""

    def holds(self, values: Tensor) -> None:
        assert (values.reshape(-1, H, H) == torch.eye(H)).all()


ZERO, ONE = Constant(0.0), Constant(1.0)
Law = Uniform | Normal | Constant | Identity


def spread(values: Tensor, std: float, kurtosis: float) -> None:
    """Mean zero and this standard deviation, to five standard errors of each."""
    count = values.numel()
    assert count >= 100, "too few to say anything"
    assert values.mean().abs() < 5 * std / sqrt(count)
    assert abs(values.std().item() / std - 1) < 5 * sqrt((kurtosis - 1) / (4 * count))


def xavier(rows: int, columns: int, gain: float = 1.0) -> Uniform:
    return Uniform(gain * sqrt(6 / (rows + columns)))


def linear(inputs: int) -> Uniform:
    """As PyTorch starts a linear layer of so many inputs."""
    return Uniform(1 / sqrt(inputs))


BOTTLENECK = {"down.weight": linear(M), "up.weight": ZERO}
NORM = {"norm.weight": ONE, "norm.bias": ZERO}
ROOT2 = sqrt(2)

# Method, added parameters, and by the end of a name how its values start; the first end that fits counts.
STARTS: list[tuple[Transform, int, dict[str, Law]]] = [
    (Adapters(), BLOCKS * 2 * 2 * M * 24, BOTTLENECK),  # ours: the identity
    (
        Adapters(init="noise", bias=True),
        BLOCKS * 2 * (2 * M * 24 + 24 + M),
        {"weight": Normal(0.02), "bias": ZERO},
    ),
    (AdaptFormer(), BLOCKS * (2 * M * 64 + 64 + M), {**BOTTLENECK, "bias": ZERO}),
    (
        AdaptFormer(init="normal"),  # the paper's
        BLOCKS * (2 * M * 64 + 64 + M),
        {"down.weight": Normal(sqrt(2 / M)), "up.weight": ZERO, "bias": ZERO},
    ),
    (
        RepAdapter(),
        BLOCKS * 2 * (M * 8 + 8 + M * 8 // 2 + M),
        {"down.weight": xavier(M, 8), "up_weight": ZERO, "bias": ZERO},
    ),
    (LoRA(), BLOCKS * 2 * 2 * 8 * M, {"lora.down": linear(M), "lora.up": ZERO}),
    (SSF(), 2 * (BLOCKS * 11 + 2) * M, {"scale": ONE, "shift": ZERO}),  # ours: the identity
    (SSF(std=0.02), 2 * (BLOCKS * 11 + 2) * M, {"scale": Normal(0.02, mean=1.0), "shift": Normal(0.02)}),
    (
        FacT(),
        2 * M * 16 + 16**3 + SLOTS * 16,
        {"u": linear(M), "v": ZERO, "core": xavier(16 * 16, 16 * 16), "mix": xavier(SLOTS, 16)},
    ),
    (
        FacT(form="tt"),
        2 * M * 16 + SLOTS * 16**2,
        {"u": linear(M), "v": ZERO, "fc2.fact.sigma": linear(4 * 16), "sigma": linear(16)},
    ),
    (
        PHM(),  # ours: the upper projection is zero
        BLOCKS * 2 * (2 * 12**3 + 2 * M * 24 // 12 + 24 + M),
        {"rule": Normal(0.01), "down.weight": xavier(2, 16, ROOT2), "up.weight": ZERO, "bias": ZERO},
    ),
    (
        PHM(init="noise"),
        BLOCKS * 2 * (2 * 12**3 + 2 * M * 24 // 12 + 24 + M),
        {"rule": Normal(0.01), "weight": xavier(2, 16, ROOT2), "bias": ZERO},
    ),
    (
        Compacter(),  # ours: the upper projection is zero
        12**3 + BLOCKS * 2 * 3 * (M + 24),
        {
            "rule": Normal(1e-4),
            "down.right": xavier(16, 1, ROOT2),
            "down.left": xavier(2, 1, ROOT2),
            "up.right": xavier(2, 1, ROOT2),
            "up.left": ZERO,
            "bias": ZERO,
        },
    ),
    (
        Compacter(init="noise"),
        12**3 + BLOCKS * 2 * 3 * (M + 24),
        {
            "rule": Normal(1e-4),
            "down.right": xavier(16, 1, ROOT2),
            "down.left": xavier(2, 1, ROOT2),
            "up.right": xavier(2, 1, ROOT2),
            "up.left": xavier(16, 1, ROOT2),
            "bias": ZERO,
        },
    ),
    (VPT(prompts=10), BLOCKS * 10 * M, {"tokens": xavier(3 * PATCH**2, M)}),
    (IRPE(), BLOCKS * (M // H) * (49 + 1), {"table": ZERO}),
    (
        Multiplex(share=2, mixing_bias=True, mlp_conv=7),  # ours: the identity
        BLOCKS * (2 * (H * H + H) + 2 * M + M * (49 + 1)),
        {"mix.weight": Identity(), "mix.bias": ZERO, "conv.weight": ZERO, "conv.bias": ZERO, **NORM},
    ),
    (
        Multiplex(share=2, mixing_bias=True, mlp_conv=7, form="reference"),
        BLOCKS * (2 * (H * H + H) + 2 * M + M * (49 + 1)),
        {
            "mix.weight": Normal(0.02),
            "mix.bias": ZERO,
            "conv.weight": Uniform(1 / 7),
            "conv.bias": Uniform(1 / 7),
            **NORM,
        },
    ),
    (
        LORS(rank=8, share=2, init="scratch"),
        BLOCKS * 8 * (4 * M + 2 * M + 5 * M + 5 * M),
        {
            "fc2.low_rank.down": Uniform(sqrt(6 / (4 * M))),
            "low_rank.down": Uniform(sqrt(6 / M)),
            "low_rank.up": ZERO,
            "attn.qkv.weight": Normal(0.02),
            "attn.proj.weight": Normal(0.02),
            "fc1.weight": xavier(M, 4 * M),
            "fc2.weight": xavier(M, 4 * M),
        },
    ),
    (
        LORS(rank=8, share=2, init="scratch", shared_init="kaiming"),  # the paper's
        BLOCKS * 8 * (4 * M + 2 * M + 5 * M + 5 * M),
        {
            "fc2.low_rank.down": Uniform(sqrt(6 / (4 * M))),
            "low_rank.down": Uniform(sqrt(6 / M)),
            "low_rank.up": ZERO,
            "attn.qkv.weight": Uniform(sqrt(6 / M)),
            "attn.proj.weight": Uniform(sqrt(6 / M)),
            "fc1.weight": Uniform(sqrt(6 / M)),
            "fc2.weight": Uniform(sqrt(6 / (4 * M))),
        },
    ),
    (
        LowRank(rank=8, init="scratch"),  # ours: no paper trains it from noise
        BLOCKS * 8 * (4 * M + 2 * M + 5 * M + 5 * M),
        {"fc2.down.weight": linear(4 * M), "down.weight": linear(M), "up.weight": Normal(0.02)},
    ),
]


def started(spec: Transform) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": PATCH, "embed_dim": M, "depth": BLOCKS, "num_heads": H, "num_classes": 5}
    return compress(timm.create_model("vit_tiny_patch16_224", **sizes), [spec])


@pytest.mark.parametrize(
    ("spec", "count", "laws"), STARTS, ids=[f"{i}-{spec.name}" for i, (spec, _, _) in enumerate(STARTS)]
)
def test_a_method_starts_as_its_paper_or_its_option_says(spec, count, laws):
    model = started(spec)
    added = {n for n in surgery.added_parameters(model) if not n.endswith(ADOPTED)}
    named = dict(model.named_parameters())  # a shared tensor once
    assert sum(named[n].numel() for n in added & named.keys()) == count
    found: dict[str, list[Tensor]] = {}
    for name, parameter in named.items():
        end = next((end for end in laws if name.endswith(end)), None)
        assert end is not None or name not in added, f"{name} has no law"
        if end is not None and (name in added or end in SHARED):
            found.setdefault(end, []).append(parameter.detach().flatten())
    assert found.keys() == laws.keys()
    for end, values in found.items():
        laws[end].holds(torch.cat(values).double())


def test_every_method_has_a_row():
    assert {spec.name for spec, _, _ in STARTS} == TRANSFORMS.keys() - ADD_NOTHING - ON_A_DECODER - FITTED_ONLY
