"""RepAdapter: linear adapters before or after the sublayers of a frozen backbone, which merge into them: no cost at inference.

Paper: Towards Efficient Visual Adaption via Structural Re-parameterization, https://arxiv.org/abs/2302.08106

`φ(x) = x + s·(B(A x + a) + b)` on what enters attention and MLP (`place: block`) or attention alone; A (h', M), B in g groups, no
activation, dropout between the two in training. A Xavier, the rest zero: the identity at the start. M·h' + h' + M·h'/g + M
parameters each. In ConvNeXt φ sits between the norm and the MLP: before the depth-wise convolution it would make that one dense.

The paper's figure 4 compares placements: `place` says of which sublayers, `position` whether φ acts on what enters them or on what leaves
them (before LayerScale and the residual), and `act` gives φ an activation, with which it does not merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import nn
from torch.fx import wrap

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.affine import merge_after_, merge_before_, refuse_tied
from compressvit.model.backbone import model_name, projection
from compressvit.model.calls import layers_within
from compressvit.model.linear import weight_shape
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.bottleneck import Activation, at_tokens
from compressvit.transforms.on_blocks import OnBlocks
from compressvit.transforms.term import TermPlan, new_like

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

Position = Literal["before", "after"]

# Of a sublayer: what φ merges into.
LAYER: dict[Position, dict[str, str]] = {
    "before": {"attn": "qkv", "mlp": "fc1"},
    "after": {"attn": "proj", "mlp": "fc2"},
}


class RepBottleneck(nn.Module):
    """`s · (B act(A x + a) + b)`, zero at the start: A dense (h, M), B in g groups, (M, h/g).

    Hidden slice k feeds output slice k (RepAdapter, eq. 5).

    Args:
        width: M.
        hidden: h; h and M must be divisible by g.
        groups: g.
        scale: s.
        dropout: between A and B, in training.
        act: timm's name of an activation between A and B; None for none, as in the paper.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        groups: int,
        scale: float,
        dropout: float = 0.1,
        act: str | None = None,
        device=None,
        dtype=None,
    ):
        from timm.layers import create_act_layer

        super().__init__()
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.up_weight = nn.Parameter(
            torch.empty(groups, width // groups, hidden // groups, device=device, dtype=dtype)
        )
        self.up_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.act = nn.Identity() if act is None else create_act_layer(act)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise A Xavier-uniform and the rest to zero, as in the paper's code."""
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = rearrange(self.dropout(self.act(self.down(x))), "... (g k) -> ... g k", g=self.up_weight.shape[0])
        out = torch.einsum("...gk,gok->...go", hidden, self.up_weight)
        return self.scale * (rearrange(out, "... g o -> ... (g o)") + self.up_bias)

    @torch.no_grad()
    def as_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """R (M, M) and c (M,) in float64, so that `x + self(x) = R x + c` in eval mode, without an activation."""
        down, bias = self.down.weight.double(), self.down.bias.double()
        up = torch.block_diag(*self.up_weight.double())
        identity = torch.eye(down.shape[1], dtype=torch.float64, device=down.device)
        return identity + self.scale * up @ down, self.scale * (up @ bias + self.up_bias.double())


class WithRepAdapter(surgery.Mixin):
    """Mixin for a sublayer: `φ(x) = x + repadapter(x)` on its input, so that φ can be merged into its first projection.

    In Swin this comes after windows are padded, so padded tokens become φ(0), exactly as with the merged projection.
    """

    slots = ("repadapter",)

    repadapter: nn.Module | None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.repadapter is not None:
            x = x + at_tokens(self.repadapter, x, self)
        return super().forward(x, *args, **kwargs)


class WithRepAdapterAfter(surgery.Mixin):
    """Of a sublayer: `φ(y) = y + repadapter_after(y)` on what leaves it, so that its last projection can take φ in."""

    slots = ("repadapter_after",)

    repadapter_after: nn.Module | None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = super().forward(x, *args, **kwargs)
        return y if self.repadapter_after is None else y + at_tokens(self.repadapter_after, y, self)


class RepAdapterPlan(TermPlan):
    """A resolved `RepAdapter`: the sublayers that have one."""

    mixin = WithRepAdapter
    slot = "repadapter"
    folds_last = True  # `W R` needs the complete W, including the updates of other steps

    paths: tuple[str, ...]
    width: int
    groups: int
    scale: float
    dropout: float
    position: Position = "before"
    act: str | None = None
    unbiased: str | None = None  # a layer that would have to take in a shift, and has no bias
    apart: Mapping[str, tuple[str | None, ...]] = Field(
        default_factory=dict
    )  # `Family.biases_apart` of layers without a bias
    behind: str | None = None  # what stands between φ before an attention and the layers it would merge into

    @property
    def foldable(self) -> bool:  # type: ignore[override]  # of this plan, not of all
        """Without an activation, into layers with biases right behind it."""
        return self.act is None and self.unbiased is None and self.behind is None

    @property
    def extension(self) -> tuple[type, str]:
        if self.position == "after":  # another slot, so that one step can act before a sublayer and another after it
            return WithRepAdapterAfter, "repadapter_after"
        return super().extension

    @property
    def sites(self) -> Iterable[str]:
        return self.paths

    def term(self, module: nn.Module, path: str) -> tuple[nn.Module, str]:
        layer = module.get_submodule(_layers(module, path, self.position)[0])
        width = weight_shape(layer)[1 if self.position == "before" else 0]
        options = (self.width, self.groups, self.scale, self.dropout, self.act)
        kind = "linear" if self.act is None else self.act
        text = f"+ {kind} bottleneck of {self.width} in {self.groups} groups, scale {self.scale:g}"
        return RepBottleneck(width, *options, **new_like(next(layer.parameters()))), text

    def folds_into(self, path: str) -> list[str]:
        return []  # `fold` knows the model, and which layers its sublayers have

    def fold_term(self, module: nn.Module, term: Any, path: str) -> None:
        """Into the projection after it, `W' = W R`, `b' = b + W c` with `φ(x) = R x + c`, or before it, `W' = R W`, `b' = R b + c`."""
        for name in _layers(module, path, self.position):
            layer, (r, c) = module.get_submodule(name), term.as_affine()
            if self.position == "after":
                merge_after_(layer, r, c)
            elif name in self.apart:
                merge_before_(layer, r, c, [b if b is None else module.get_parameter(b) for b in self.apart[name]])
            else:
                merge_before_(layer, r, c)

    def fold(self, model: nn.Module) -> None:
        if self.act is not None:
            raise UserError(
                f"repadapter cannot be folded: with act: {self.act} it is not linear, so no projection can take it in. Leave act out, "
                "or ship the artifact as it is"
            )
        if self.behind is not None:
            raise UserError(
                f"repadapter cannot be folded: {self.behind} stands between what enters the attention of {model_name(model)} and its "
                "queries, keys and values. Adapt after the sublayers (position: after) or the MLP alone (place: mlp), or ship the artifact "
                "as it is"
            )
        if self.unbiased is not None:
            how = " (qkv_bias=True)" if self.unbiased.endswith(".qkv") else ""
            raise UserError(
                f"repadapter cannot be folded: {self.unbiased} has no bias to take in its shift. Adapt after the sublayers "
                "(position: after) or the MLP alone (place: mlp), build the model with that bias"
                f"{how}, or ship the artifact as it is"
            )
        refuse_tied(model, self.transform, [f"{name}.weight" for name in _merged(model, self.paths, self.position)])
        super().fold(model)


def _merged(model: nn.Module, paths: Iterable[str], position: Position) -> list[str]:
    """Paths of the layers that φ merges into."""
    return [f"{path}.{name}" for path in paths for name in _layers(model.get_submodule(path), path, position)]


def _layers(sublayer: nn.Module, path: str, position: Position) -> tuple[str, ...]:
    """Within the sublayer at `path`: the layer that φ merges into, or those in its place."""
    part = path.rpartition(".")[2]
    return layers_within(sublayer, part, LAYER[position][part])


def _are_there(model: nn.Module, paths: Iterable[str], name: str, biases: Iterable[str | None]) -> bool:
    """Whether the layers `name` among the paths have those parameters beside them."""
    of_it = [path.rpartition(".")[0] for path in paths if path.rpartition(".")[2] == name]
    wanted = [bias for bias in biases if bias is not None]
    return bool(of_it) and all(
        getattr(model.get_submodule(path), bias, None) is not None for path in of_it for bias in wanted
    )


@transform("repadapter", RepAdapterPlan)
class RepAdapter(OnBlocks):
    """Linear adapters before or after attention and MLP, merged into the projections for inference (RepAdapter)."""

    freezes = True
    blind_at_start: ClassVar[dict[str, str]] = dict.fromkeys(
        ("down.weight", "down.bias"), "the second projection starts at zero"
    )

    width: int = Field(8, ge=1, description="Hidden neurons h'.")
    groups: int = Field(2, ge=1, description="Groups g of the second projection; must divide h' and M.")
    scale: float = Field(1.0, gt=0, description="Scale s; the paper chooses it per task from 0.1, 0.5, 1, 5, 10.")
    place: Literal["block", "attention", "mlp"] = Field(
        "block", description="Sublayers that are adapted. block: attention and MLP; attention, mlp: one of them."
    )
    position: Position = Field(
        "before",
        description="before: on what enters the sublayers, as in the paper; after: on what leaves them (its figure 4). Two "
        "steps may do both.",
    )
    act: Activation | None = Field(
        None,
        description="timm's name of an activation between the projections; null for none, as in the paper. With one it does not merge.",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout between the projections in training.")

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            RepAdapter(width=4, scale=0.5),
            RepAdapter(width=4, groups=4, position="after", blocks=("1-1",)),
            RepAdapter(width=4, groups=1, place="mlp", act="gelu"),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> RepAdapterPlan:
        backbone, chosen = self.backbone(model), self.chosen(model)
        wanted = {"block": ("attn", "mlp"), "attention": ("attn",), "mlp": ("mlp",)}[self.place]
        parts = tuple(part for part in backbone.parts if part in wanted)
        if not parts:
            raise UserError(
                f"repadapter.place=attention, but the blocks of {model_name(model)} have no attention; use place=block"
            )
        for what, size in [("width", self.width), *((info.path, info.width) for info in chosen)]:
            if size % self.groups:
                raise UserError(
                    f"repadapter.groups={self.groups} does not divide the {size} of {what}; it can be one of "
                    f"{[g for g in range(1, self.width + 1) if self.width % g == 0 and size % g == 0]}"
                )
        paths = tuple(f"{info.path}.{part}" for info in chosen for part in parts)
        into = {p: projection(model, p, f"repadapter.place={self.place}") for p in _merged(model, paths, self.position)}
        without = [path for path, layer in into.items() if getattr(layer, "bias", None) is None]
        apart = {
            name: biases
            for name, biases in backbone.family.biases_apart.items()
            if _are_there(model, without, name, biases)
        }
        unbiased = next((path for path in without if path.rpartition(".")[2] not in apart), None)
        behind = backbone.family.before_qkv if self.position == "before" and "attn" in parts else None
        settings = self.model_dump(include={"width", "groups", "scale", "dropout", "position", "act"})
        return RepAdapterPlan(paths=paths, unbiased=unbiased, apart=apart, behind=behind, **settings)
