"""PHM adapters: bottleneck adapters whose projections are sums of Kronecker products.

Paper: Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex Multiplications with 1/n Parameters,
ICLR 2021, https://arxiv.org/abs/2102.08597; as a baseline of MiMi, https://arxiv.org/abs/2311.03873

`H = Σ_{k≤n} A_k ⊗ W_k`, A (n, n, n), W (n, out/n, in/n), with biases: 2·n³ + 2·M·h'/n + h' + M parameters an adapter. W of the
upper projection is zero at the start, so the model is unchanged. Merging multiplies the products out: what is left are `adapters`
with biases, which compute the same in fewer operations and more parameters.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.layers.adapter import Bottleneck
from compressvit.layers.phm import PHMLinear
from compressvit.source import Source
from compressvit.transforms.adapters import Activation, AdaptersPlan, Place, adapter_widths, sublayer_width
from compressvit.transforms.base import Transform, transform


class PHMPlan(AdaptersPlan):
    """Resolved PHM adapters."""

    prunable = False  # a neuron is no row of its own in a Kronecker product
    foldable = True
    rank: ClassVar[int | None] = None  # of W_k: full

    n: int

    def bottleneck(self, model: nn.Module, path: str, hidden: int) -> Bottleneck:
        like, width = sublayer_width(model, path)
        options: dict[str, Any] = {"rank": self.rank, "device": like.device, "dtype": like.dtype}
        return Bottleneck(
            PHMLinear(width, hidden, self.n, **options), PHMLinear(hidden, width, self.n, **options), self.act
        )

    def fold(self, model: nn.Module) -> AdaptersPlan:
        """Every projection becomes dense, with the matrix that its products add up to."""
        for bottleneck in self.bottlenecks(model).values():
            for projection in ("down", "up"):
                setattr(bottleneck, projection, getattr(bottleneck, projection).as_dense())
        return AdaptersPlan(widths=self.widths, bias=True, act=self.act)


def require_divisible(asker: str, n: int, widths: dict[str, int], model: nn.Module) -> None:
    """Raise a `UserError` unless n divides the width and the neurons of every adapter."""
    for path, hidden in widths.items():
        width = sublayer_width(model, path)[1]
        for what, size in (("width", width), ("bottleneck", hidden)):
            if size % n:
                near = [d for d in range(1, size + 1) if width % d == 0 and hidden % d == 0]
                raise UserError(
                    f"{asker}.n={n} does not divide the {what} {size} of {path} ({width} channels, {hidden} neurons); "
                    f"n can be one of {near or [1]} there, or give another ratio"
                )


@transform("phm", PHMPlan)
class PHM(Transform):
    """Adapters whose projections are sums of Kronecker products (PHM)."""

    freezes = True

    n: int = Field(12, ge=1, description="Number of products; divides the width and the neurons of every adapter.")
    ratio: float = Field(1 / 8, gt=0, description="Neurons as a share of the block's width M.")
    places: tuple[Place, ...] = Field(
        ("attn", "mlp"), min_length=1, description="Sublayers that get one, of those that a block has."
    )
    act: Activation = Field("gelu", description="timm's name of the activation between the projections.")

    def plan(self, model: nn.Module, source: Source | None = None) -> PHMPlan:
        widths = adapter_widths(model, self.name, self.places, None, self.ratio)
        require_divisible(self.name, self.n, widths, model)
        plan_class: Any = self.plan_class  # Compacter's is another
        return plan_class(widths=widths, bias=True, act=self.act, n=self.n)
