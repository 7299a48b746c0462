"""Adaptive LORS: layers that generate matrices out of a query share one generator and keep private low-rank terms.

Paper: LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking, CVPR 2024, https://arxiv.org/abs/2403.04303, §3.3

In a stack of decoder stages (AdaMixer) each stage generates the matrices that mix channels and points: `W_i(q)`. They become

    W_i(q) = W_shared(q) + Σ_k P_ik Z_ik(q) Q_ik

with one linear generator of `W_shared` for all stages, a small private one of `Z_ik` (r, r), and private factors P, Q that do not depend on
q. The projection after the mixing takes static LORS: `lors: {of: decoder, targets: [mixing.projection]}`.

The paper trains from random initialisation. Given a trained decoder, generator and terms are fitted to its generators; see
`compressvit.fitting.generated`. `shared: false` leaves `W_shared` out, and `terms: 0` the private terms, as in the paper's ablation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.generated import Term, fit_shared_generators, fit_terms, query_factor
from compressvit.fitting.lowrank import TINY
from compressvit.fitting.reference import Reference
from compressvit.log import progress
from compressvit.model import surgery, ties
from compressvit.model.backbone import describe, model_name
from compressvit.model.detectors.decoder import AdaptiveMixing
from compressvit.model.family import Need
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform
from compressvit.transforms.claims import Claim, drops, slot, tie, values, weight
from compressvit.transforms.low_rank.base import at_least
from compressvit.transforms.record import require_free
from compressvit.transforms.term import new_like

Matrices = tuple[tuple[int, int], ...]


class AdaptiveTerm(nn.Module):
    """`Σ_k P_k Z_k(q) Q_k` for every group and matrix that a generator gives, in the order in which it gives them.

    Args:
        dim: D, of a query.
        groups: G.
        matrices: rows and columns of a group's matrices.
        rank: r.
        terms: K.
    """

    def __init__(self, dim: int, groups: int, matrices: Matrices, rank: int, terms: int, device=None, dtype=None):
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.rank, self.terms, self.groups = rank, terms, groups
        self.core = nn.Linear(dim, terms * groups * len(matrices) * rank * rank, **like)
        self.up = nn.ParameterList(torch.empty(terms, groups, rows, rank, **like) for rows, _ in matrices)
        self.down = nn.ParameterList(torch.empty(terms, groups, rank, columns, **like) for _, columns in matrices)

    @torch.no_grad()
    def reset(self) -> None:
        """Start as zero, as in the paper: the generator of Z zero, P and Q Kaiming-uniform."""
        nn.init.zeros_(self.core.weight)
        nn.init.zeros_(self.core.bias)
        for factor in (*self.up, *self.down):
            for matrix in factor.flatten(0, 1):
                nn.init.kaiming_uniform_(matrix)

    @torch.no_grad()
    def reset_alone(self) -> None:
        """Start without a shared generator: the same matrices for every query, as a dense generator does, but not zero, from which nothing
        is learned. The paper does not say how."""
        self.reset()
        bound = self.core.in_features**-0.5
        nn.init.uniform_(self.core.bias, -bound, bound)

    def forward(self, query: torch.Tensor) -> torch.Tensor:  # (…, D) -> (…, G · entries of a group's matrices)
        cores = self.core(query).unflatten(-1, (len(self.up), self.terms, self.groups, self.rank, self.rank)).unbind(-5)
        made = [
            torch.einsum("kgar,...kgrs,kgsb->...gab", up, core, down).flatten(-2)
            for up, core, down in zip(self.up, cores, self.down, strict=True)
        ]
        return torch.cat(made, dim=-1).flatten(-2)

    def product(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight (out, D) and the bias (out,) of the linear layer that computes the same."""
        zero = self.core.weight.new_zeros(1, self.core.in_features)
        bias = self(zero)[0]
        return (self(torch.eye(zero.shape[1]).to(zero)) - bias).mT, bias

    @torch.no_grad()
    def set_terms(self, terms: Sequence[Sequence[Sequence[Term]]]) -> None:
        """Take over terms by group, matrix and k."""
        size = (len(self.up), self.terms, self.groups, self.rank, self.rank)
        weight, bias = self.core.weight.view(*size, -1), self.core.bias.view(size)
        for g, of_group in enumerate(terms):
            for m, of_matrix in enumerate(of_group):
                for k, term in enumerate(of_matrix):
                    self.up[m][k, g] = term.up.to(self.up[m])
                    self.down[m][k, g] = term.down.to(self.down[m])
                    weight[m, k, g] = term.core[..., :-1].to(weight)
                    bias[m, k, g] = term.core[..., -1].to(bias)


class AdaptiveLowRankLinear(nn.Linear):
    """A generator of matrices with private terms in its slot."""

    slots = ("terms",)

    terms: AdaptiveTerm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.terms(x)


class PrivateGenerator(nn.Module):
    """A generator of matrices that is private terms alone. It is the same object that was a linear layer."""

    slots = ("terms",)

    terms: AdaptiveTerm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.terms(x)


class AdaptiveLORSPlan(Plan):
    """A resolved `AdaptiveLORS`: by path of a stage's mixing, the number of its terms."""

    foldable: ClassVar[bool] = True
    starts: ClassVar[tuple[str, ...]] = ("init", "generator", "rounds", "ridge")

    terms: dict[str, Annotated[int, Field(ge=0)]]
    rank: int
    init: Literal["fit", "scratch"]
    generator: Literal["kaiming", "zero"]
    shared: bool = True
    rounds: int
    ridge: float

    @property
    def layers(self) -> list[str]:
        """Paths of the generators."""
        return [f"{path}.generator" for path in self.terms]

    def drops(self, model: nn.Module) -> set[str]:
        return set() if self.shared else {f"{path}.{name}" for path in self.layers for name in ("weight", "bias")}

    def claims(self, model: nn.Module) -> list[Claim]:
        if self.shared:
            found = [tie([f"{path}.{name}" for path in self.layers]) for name in ("weight", "bias")]
        else:
            found = drops(self.drops(model))
        found += [claim for path in self.layers for claim in (slot(path, "terms"), weight(path))]
        if self.init == "fit":
            found += [values(path, "adaptive_lors.init", "give adaptive_lors.init=scratch") for path in self.layers]
        return found

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return record(model, self.layers, lambda path: self._add(model, path), lambda: self._share(model))

    def _share(self, model: nn.Module) -> None:
        if self.shared:
            ties.tie(model, [[f"{path}.{name}" for path in self.layers] for name in ("weight", "bias")])

    def _add(self, model: nn.Module, path: str) -> str:
        mixing = _mixing(model, path.rpartition(".")[0])
        count = self.terms[path.rpartition(".")[0]]
        first = self.layers[0]
        shared = f"owns the generator of {len(self.layers)} stages" if path == first else f"shares that of {first}"
        if not count:
            return shared
        like = new_like(mixing.generator.weight)
        term = AdaptiveTerm(mixing.generator.in_features, mixing.groups, mixing.matrices, self.rank, count, **like)
        private = f"{count} private terms of rank {self.rank}"
        if self.shared:
            surgery.specialise(model, path, AdaptiveLowRankLinear)
        else:
            surgery.exchange(model, path, nn.Linear, PrivateGenerator, {})
        surgery.fill_slot(model, path, "terms", term)
        return f"{shared}; + {private}" if self.shared else f"{private} in place of the generator"

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        layers: list[Any] = [student.get_submodule(path) for path in self.layers]
        if self.init == "fit":
            self._fit(student, layers, reference)
        elif self.shared:
            self._start_from_noise(layers)
        else:
            for layer in layers:
                layer.terms.reset_alone()

    def _start_from_noise(self, layers: Sequence[Any]) -> None:
        if self.generator == "zero":
            nn.init.zeros_(layers[0].weight)
        else:
            nn.init.kaiming_uniform_(layers[0].weight)
        bound = layers[0].in_features ** -0.5
        nn.init.uniform_(layers[0].bias, -bound, bound)
        for layer in layers:
            if isinstance(layer, AdaptiveLowRankLinear):
                layer.terms.reset()

    def _fit(self, student: nn.Module, layers: Sequence[Any], reference: Reference) -> None:
        mixing = _mixing(student, next(iter(self.terms)))
        moments = reference.moments(self.layers, outputs=False)
        factor = _mean_factor([query_factor(moments[path], self.ridge) for path in self.layers])
        whole = [generated(reference.model.get_submodule(path), mixing) for path in self.layers]
        ranks = [[self.rank] * count for count in self.terms.values()]
        pieces, terms = [], [[[] for _ in range(mixing.groups)] for _ in layers]  # type: ignore[var-annotated]
        parts = list(product(range(mixing.groups), range(len(mixing.matrices))))
        for group, matrix in progress(parts, "fitting generators", len(parts)):
            weighed = [of_layer[group][matrix] @ factor for of_layer in whole]
            if self.shared:
                shared, fitted = fit_shared_generators(weighed, ranks, self.rounds)
                pieces.append(_unweighed(shared, factor).flatten(0, 1))
            else:
                fitted = [fit_terms(tensor, own, self.rounds) for tensor, own in zip(weighed, ranks, strict=True)]
            for found, of_layer in zip(terms, fitted, strict=True):
                found[group].append([Term(t.up, _unweighed(t.core, factor), t.down) for t in of_layer])
        if self.shared:
            values_of_shared = torch.cat(pieces)
            layers[0].weight.copy_(values_of_shared[:, :-1])
            layers[0].bias.copy_(values_of_shared[:, -1])
        for layer, found in zip(layers, terms, strict=True):
            if isinstance(layer, (AdaptiveLowRankLinear, PrivateGenerator)):
                layer.terms.set_terms(found)

    @torch.no_grad()
    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        if self.init == "scratch":
            return {}
        moments = reference.moments(self.layers, outputs=False)
        found = {}
        for path in self.layers:
            wanted, have = (_whole(model.get_submodule(path)) for model in (reference.model, student))
            factor = query_factor(moments[path], 0.0)
            lost = have - wanted
            found[path] = (
                (lost[:, :-1].norm() / wanted[:, :-1].norm().clamp(min=TINY)).item(),
                ((lost @ factor).norm() / (wanted @ factor).norm().clamp(min=TINY)).item(),
            )
        return found

    def fitted(self) -> set[str]:
        if not self.shared:
            return set()
        return {f"{path}.{name}" for path in self.layers for name in ("weight", "bias")}

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Give every stage a generator of its own, which computes the sum."""
        wholes = {path: _whole(model.get_submodule(path)) for path in self.layers}
        for path, whole in wholes.items():
            layer: Any = model.get_submodule(path)
            like = layer.weight if self.shared else layer.terms.core.weight
            parts = {"weight": whole[:, :-1], "bias": whole[:, -1]}
            dense = {
                name: nn.Parameter(part.to(like), requires_grad=like.requires_grad) for name, part in parts.items()
            }
            if isinstance(layer, PrivateGenerator):
                surgery.exchange(model, path, PrivateGenerator, nn.Linear, dense)
                continue
            if isinstance(layer, AdaptiveLowRankLinear):
                surgery.generalise(model, path, nn.Linear)
            layer.weight, layer.bias = dense["weight"], dense["bias"]


def _mixing(model: nn.Module, path: str) -> AdaptiveMixing:
    module = model.get_submodule(path)
    assert isinstance(module, AdaptiveMixing)
    return module


def _whole(layer: nn.Module) -> torch.Tensor:
    """Weight and bias (out, D + 1) of the plain generator that computes the same, in float64 on the CPU."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    if isinstance(layer, nn.Linear):
        parts.append((layer.weight, layer.bias))
    if isinstance(layer, (AdaptiveLowRankLinear, PrivateGenerator)):
        parts.append(layer.terms.product())
    return sum(torch.cat([weight, bias[:, None]], dim=1).detach().cpu().double() for weight, bias in parts)  # type: ignore[return-value]


def generated(layer: nn.Module, mixing: AdaptiveMixing) -> list[list[torch.Tensor]]:
    """A generator as tensors (rows, columns, D + 1), by group and matrix."""
    by_group = _whole(layer).unflatten(0, (mixing.groups, -1))
    sizes = [rows * columns for rows, columns in mixing.matrices]
    return [
        [part.unflatten(0, shape) for part, shape in zip(of_group.split(sizes), mixing.matrices, strict=True)]
        for of_group in by_group
    ]


def _mean_factor(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The factor of the mean of several moments: what is shared is weighed by the queries of all stages."""
    return torch.linalg.cholesky(torch.stack([factor @ factor.mT for factor in factors]).mean(0))


def _unweighed(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`tensor · L⁻¹` over the last dimension."""
    flat = tensor.flatten(0, -2)
    return torch.linalg.solve_triangular(factor, flat, upper=False, left=False).view_as(tensor)


@transform("adaptive_lors", AdaptiveLORSPlan)
class AdaptiveLORS(Transform):
    """Decoder stages share the generator of their mixing matrices, with private low-rank terms each (adaptive LORS)."""

    needs: ClassVar[tuple[Need, ...]] = ("decoder",)
    instead = "it works on adamixer; for the layers of a backbone take lors"
    changes_at_start = True
    blind_at_start: ClassVar[dict[str, str]] = {
        "terms.up.0": "with init: scratch the generator of the matrix between the factors starts at zero",
        "terms.up.1": "the same",
        "terms.down.0": "the same",
        "terms.down.1": "the same",
    }

    rank: int = Field(16, ge=1, description="Rank r of every term.")
    terms: int | tuple[int, ...] = Field(
        (1, 1, 2, 2, 3, 3),
        description="The paper's K: number of terms of each stage; one number, or one per stage. 0: the shared generator alone.",
    )
    init: Literal["fit", "scratch"] = Field(
        "fit",
        description="fit: shared generator and terms from the trained decoder's, the error measured in the generated matrices over the "
        "queries of calibration images; scratch: random as in the paper, terms starting at zero.",
    )
    generator: Literal["kaiming", "zero"] = Field(
        "kaiming",
        description="With init: scratch, the weight of the shared generator: kaiming as in the paper, or zero as in the released code.",
    )
    shared: bool = Field(
        True, description="false: private terms alone, without a shared generator (the paper's ablation)."
    )
    rounds: int = Field(
        2, ge=0, description="Number of times the shared generator is refitted to what the terms leave."
    )
    ridge: float = Field(1e-3, ge=0, description="Regularisation of the queries' second moment, relative to its mean.")

    @field_validator("terms")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        return at_least(0, "terms", value)

    @property
    def needs_images(self) -> bool:
        return self.init == "fit"

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            AdaptiveLORS(rank=2, terms=(1, 0, 2), init="scratch"),
            AdaptiveLORS(rank=2, terms=1, init="scratch", generator="zero"),
            AdaptiveLORS(rank=2, terms=1, init="scratch", shared=False),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> AdaptiveLORSPlan:
        stages = describe(model, "decoder", asker=self.name, instead=self.instead, part="decoder").blocks
        paths = [f"{stage.path}.mixing" for stage in stages]
        if len(paths) < 2:
            raise UserError(f"adaptive_lors shares among stages, and the decoder of {model_name(model)} has only one")
        counts = (self.terms,) * len(paths) if isinstance(self.terms, int) else self.terms
        if len(counts) != len(paths):
            raise UserError(
                f"adaptive_lors.terms lists {len(counts)} numbers, {list(counts)}, but the decoder of {model_name(model)} has {len(paths)} "
                "stages; give one number, or one per stage"
            )
        smallest = min(side for shape in _mixing(model, paths[0]).matrices for side in shape)
        if self.rank > smallest:
            raise UserError(
                f"adaptive_lors.rank={self.rank} is more than the matrices {_shapes(model, paths[0])} can have; the largest is {smallest}"
            )
        if not self.shared and 0 in counts:
            raise UserError(
                "adaptive_lors: shared: false with terms: 0 leaves a stage without matrices; give it at least 1"
            )
        settings = self.model_dump(include={"rank", "init", "generator", "shared", "rounds", "ridge"})
        plan = AdaptiveLORSPlan(terms=dict(zip(paths, counts, strict=True)), **settings)
        require_free(model, self.name, plan.claims(model))
        return plan


def _shapes(model: nn.Module, path: str) -> str:
    return " and ".join(f"{rows}×{columns}" for rows, columns in _mixing(model, path).matrices)
