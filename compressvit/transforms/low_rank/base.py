"""Shared by `low_rank` and `lors`: target layers, ranks (given or chosen within a budget), and fitting to a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import nn

from compressvit.errors import UserError, did_you_mean
from compressvit.fitting.allocate import Budget
from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.lowrank import TINY, Metric, cholesky, spectrum
from compressvit.fitting.reference import Reference
from compressvit.fitting.regression import Regression
from compressvit.model import surgery, ties
from compressvit.model.backbone import Backbone, Part, describe, model_name
from compressvit.model.calls import layers_for
from compressvit.model.chain import chain_of
from compressvit.model.linear import effective_weight, is_pointwise, weight_shape
from compressvit.transforms.base import LedgerEntry, Plan, Transform
from compressvit.transforms.claims import Claim, values, weight
from compressvit.transforms.low_rank.layer import Factored, set_bias_, unfactor
from compressvit.transforms.record import require_free

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
S = TypeVar("S", bound="RankStep")


class RankPlan(Plan):
    """Low-rank linear layers, with or without a shared weight, and how their values are fitted."""

    foldable: ClassVar[bool] = True
    starts: ClassVar[tuple[str, ...]] = ("init", "metric", "sequential", "ridge", "output_ridge")

    ranks: dict[str, Annotated[int, Field(ge=0)]]
    dense: tuple[str, ...] = ()  # layers that were considered and stay dense
    metric: Literal["weights", "inputs", "outputs"]
    sequential: bool = False  # the value in artifacts from before the option existed
    ridge: float
    output_ridge: float

    @property
    def paths(self) -> list[str]:
        """All layers, in the order of the plan."""
        return list(self.ranks)

    def change(self, model: nn.Module) -> dict[str, str]:
        """Change the structure of the layers; returns the ledger text of each by path."""
        raise TypeError(f"{type(self).__name__} does not define change")

    def claims(self, model: nn.Module) -> list[Claim]:
        alone = {name.rpartition(".")[0] for name in self.drops(model)}
        found = [weight(path) for path, rank in self.ranks.items() if rank or path in alone]
        if getattr(self, "init", None) != "scratch":
            found += [
                values(path, f"{self.transform}.init", f"give {self.transform}.init=scratch") for path in self.paths
            ]
        return found

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        before = ties.count_at_paths(model, self.paths)
        texts = self.change(model)
        after = ties.count_at_paths(model, self.paths)
        whole = ties.count_at_paths(model, self.dense)
        return [LedgerEntry(path, texts[path], before[path], after[path]) for path in self.paths] + [
            LedgerEntry(path, "stays dense", count, count) for path, count in whole.items()
        ]

    def layer_fits(self, student: nn.Module, reference: Reference) -> dict[str, LayerFit]:
        """Refit low-rank factors and biases to the outputs of the fitted layers before them."""
        if not (self.sequential and self.paths):
            return {}
        by_gradient = self.metric == "outputs"
        moments = reference.moments(self.paths, outputs=by_gradient)
        if reference.too_alike:
            return {}
        shared = {name for group in ties.tied_groups(student) for name in group}
        return {
            path: LayerFit(
                partial(self._fit, student.get_submodule(path), path, f"{path}.bias" not in shared, reference),
                moments[path].prefix_weight if by_gradient else 1.0,
            )
            for path in self.paths
        }

    def _fit(
        self, target: Any, path: str, own_bias: bool, reference: Reference, working: Any, regression: Regression
    ) -> float:
        """Fit one layer of the working copy and copy the values to the student's layer `target`; returns the remaining error."""
        zeros = torch.zeros(weight_shape(working)[0], dtype=torch.float64)
        bias = zeros if working.bias is None else working.bias.cpu().double()
        free = own_bias and working.bias is not None
        if self.ranks[path]:
            # the weight added to the product of the factors: the shared weight, or zero
            fixed: Any = working.weight.cpu().double() if isinstance(working, nn.Linear) else 0.0
            wanted, moment = regression.solve(reference.weight(path), None if free else bias)
            ridge = self.output_ridge if self.metric == "outputs" else None
            outer = reference.moments([path], outputs=False)[path].output_factor(ridge, regression.scale)
            factors = spectrum(wanted - fixed, Metric(cholesky(moment, self.ridge), outer)).factors(self.ranks[path])
            for layer in (working, target):
                layer.set_factors(*factors)
        whole = effective_weight(working).cpu().double()
        if free:
            bias = regression.whole.best_bias(whole)
            for layer in (working, target):
                set_bias_(layer, bias)
        return regression.error(whole, bias)

    @torch.no_grad()
    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        measures = reference.metrics(self.paths, "inputs", 0.0, 0.0) if self.metric != "weights" else {}
        result = {}
        for path in self.paths:
            wanted = reference.weight(path)
            lost = wanted - effective_weight(student.get_submodule(path)).cpu().double()
            output_error = None
            if path in measures:
                output_error = (
                    measures[path].squared_norm(lost) / max(measures[path].squared_norm(wanted), TINY)
                ) ** 0.5
            result[path] = ((lost.norm() / wanted.norm().clamp(min=TINY)).item(), output_error)
        return result

    def fold(self, model: nn.Module) -> None:
        """Replace every layer by timm's own linear layer with its effective weight; no weight is shared afterwards."""
        # All weights first: assigning one would change its siblings, which still share it.
        weights = {}
        for path in self.paths:
            layer = model.get_submodule(path)
            trained = any(p.requires_grad for p in layer.parameters())
            weights[path] = nn.Parameter(effective_weight(layer).detach().clone(), requires_grad=trained)
        for path, dense in weights.items():
            layer = model.get_submodule(path)
            if isinstance(layer, Factored):
                unfactor(model, path, dense)
                continue
            if self.ranks[path]:
                surgery.generalise(model, path, nn.Linear)
            layer.weight = dense


class RankStep(Transform):
    """Options of a step that assigns a rank to each linear layer."""

    budget_units: ClassVar[tuple[str, ...]] = tuple(Budget.model_fields)
    convolutions: ClassVar[bool] = False  # point-wise convolutions (1×1, stride 1, no groups) are targets, too

    rank: int | tuple[int, ...] | None = Field(
        None, description="Rank: one number, or one per block. Alternatively give `budget`."
    )
    budget: Budget | None = Field(
        None,
        description="Instead of a rank: what the student may cost. Ranks are allocated where they reduce the error most for their cost; a "
        "layer that shares no weight stays dense if that is cheaper.",
    )
    of: Part = Field(
        "backbone",
        description="Of a detector: whose layers, those of its backbone or of its decoder, whose blocks are its stages.",
    )
    targets: tuple[str, ...] = Field(
        TARGETS,
        min_length=1,
        description="Linear layers of a block, by path within it; * matches any part. Attention layers are skipped if blocks have "
        "none. attn.qkv and mlp.fc1 are also the layers that some blocks have in their place: q_proj, k_proj, v_proj; fc1_g, fc1_x.",
    )
    sequential: bool = Field(
        True,
        description="Fit layers, with their biases, in the order they run: each on the outputs of the fitted layers before it, towards the "
        "teacher's hidden states. False: fit each as if all other layers were the teacher's. Ignored if nothing is measured on images, and "
        "in a decoder, whose stages take more than hidden states.",
    )
    ridge: float = Field(
        1e-3,
        ge=0,
        description="Regularisation of the inputs' second moment, relative to its mean (at least 1e-6): errors on other inputs also count.",
    )
    output_ridge: float = Field(
        0.1, ge=0, description="The same for the gradients' second moment, with `metric: outputs`."
    )

    @field_validator("rank")
    @classmethod
    def _not_negative(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        return at_least(0, "rank", value)

    @property
    def pivots(self) -> bool:
        """Whether a layer that shares no weight gets the pivoted form, r² cheaper than two factors."""
        return False

    @property
    def fits_in_order(self) -> bool:
        """Whether layers are fitted in the order they run."""
        return self.sequential and self.needs_images and self.of == "backbone"

    def with_budget(self: S, unit: str, value: float) -> S:
        """A copy of the step with this budget in place of its own ranks or budget."""
        return self.model_validate({**self.model_dump(), "rank": None, "budget": {unit: value}})

    def require_rank_or_budget(self, init: str) -> None:
        """Raise a ValueError unless exactly one of rank and budget is given; a budget also needs values to measure errors on."""
        if (self.rank is None) == (self.budget is None):
            raise ValueError(f"{self.name} needs a rank or a budget" + (", not both" if self.budget else ""))
        if self.budget and init == "scratch":
            raise ValueError(
                "a budget is allocated by the errors of a teacher's weights, which init: scratch does not use"
            )

    def budget_note(self, metric: str) -> list[str]:
        """What a plan without values assumes about the ranks within a budget."""
        on = measured_on(metric)
        text = f"ranks are uniform in this plan; the run allocates the same budget by the errors it measures {on}"
        return [text] if self.budget else []

    def backbone(self, model: nn.Module) -> Backbone:
        return describe(model, *self.needed(), asker=self.name, instead=self.instead, part=self.of)

    def _fits(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, Factored)) or (self.convolutions and is_pointwise(module))

    def target_paths(self, model: nn.Module, backbone: Backbone) -> dict[str, str]:
        """The layers that the patterns mean, by path, each with the path of its block.

        Raises:
            UserError: as `find_targets`; of a model whose blocks are not timm's, also for a layer that nothing calls.
        """
        if backbone.family.named_layers:
            names = self.find_targets(model, backbone)
            return {f"{block.path}.{name}": block.path for name in names for block in backbone.blocks}
        found = self._called_layers(model)
        return {path: next(info.path for info in backbone.blocks if info.holds(path)) for path in found}

    def _called_layers(self, model: nn.Module) -> list[str]:
        """Of a model whose blocks are not timm's, the layers that the patterns mean, by their path in the model or any end of it; all
        where the patterns are the default ones."""
        chain = chain_of(model)
        known = [path for path in chain.layers if self._fits(model.get_submodule(path))]
        if self.targets == TARGETS:
            return known
        found: list[str] = []
        for pattern in self.targets:
            matches = [path for path in known if fnmatch(path, pattern) or fnmatch(path, f"*.{pattern}")]
            if not matches:
                uncalled = [path for path in chain.uncalled if fnmatch(path, pattern) or fnmatch(path, f"*.{pattern}")]
                outside = [path for path in chain.outside if fnmatch(path, pattern) or fnmatch(path, f"*.{pattern}")]
                hint = did_you_mean(pattern, known, list_at_most=8)
                if outside:
                    hint = f"{outside[0]} is called outside of the modules that run one after the other, and stays as it is"
                if uncalled:
                    hint = (
                        f"something reads the weight of {uncalled[0]} without calling it, which would not see another layer there, or "
                        "it is of a class of its own, or sees nothing of the images"
                    )
                raise UserError(
                    f"{self.name}.targets: {pattern!r} matches no linear layer of {model_name(model)} that can be replaced; {hint}"
                )
            found += [path for path in matches if path not in found]
        return found

    def find_targets(self, model: nn.Module, backbone: Backbone) -> list[str]:
        """The relative paths that match the patterns; every block has them.

        Raises:
            UserError: a pattern matches nothing, or a block has no linear layer at a path that the first one has.
        """
        block = model.get_submodule(backbone.blocks[0].path)
        of_steps = surgery.added_modules(block)  # layers added by earlier steps
        known = [name for name, module in block.named_modules() if self._fits(module) and name not in of_steps]
        absent = tuple(f"{part}." for part in ("attn", "mlp") if part not in backbone.parts)
        asked = [pattern for pattern in self.targets if not (pattern in TARGETS and pattern.startswith(absent))]
        found: list[str] = []
        for pattern in asked or self.targets:
            matches = [name for name in known if any(fnmatch(name, own) for own in layers_for(block, pattern))]
            if not matches:
                raise UserError(
                    f"{self.name}.targets: {pattern!r} matches no linear layer of {backbone.blocks[0].path} of {model_name(model)}; "
                    + did_you_mean(pattern, known)
                )
            found += [name for name in matches if name not in found]
        modules = dict(model.named_modules())
        for path in (f"{block.path}.{target}" for target in found for stage in backbone.stages for block in stage):
            if path not in modules or not self._fits(modules[path]):
                target = next(t for t in found if path.endswith(f".{t}"))
                raise UserError(
                    f"{self.name}.targets: {path} of {model_name(model)} is no linear layer, as {target} is in its first block; name "
                    "targets that every block has"
                )
        return found

    def per_block(self, model: nn.Module, backbone: Backbone, name: str) -> dict[str, int]:
        """Expand an option that is one number, or one per block, to one per block.

        Raises:
            UserError: the list does not have one number per block.
        """
        value: int | tuple[int, ...] = getattr(self, name)
        blocks = [block.path for block in backbone.blocks]
        numbers = (value,) * len(blocks) if isinstance(value, int) else value
        if len(numbers) != len(blocks):
            raise UserError(
                f"{self.name}.{name} lists {len(numbers)} numbers, but {model_name(model)} has {len(blocks)} blocks; "
                "give one number, or one per block"
            )
        return dict(zip(blocks, numbers, strict=True))

    def refuse_ranks(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Raise a `UserError` for a layer that is low rank already, or cannot have the rank."""
        require_free(model, self.name, (weight(path) for path in ranks))
        for path, rank in ranks.items():
            outputs, inputs = weight_shape(model.get_submodule(path))
            most = min(inputs, outputs)
            if rank > most:
                raise UserError(
                    f"{self.name}: rank {rank} of {path} is larger than its {outputs}×{inputs} weight "
                    f"allows; it can be at most {most}"
                )


def measured_on(metric: str) -> str:
    """Where errors in this metric are measured, in words."""
    return "in the weights" if metric == "weights" else "on the calibration images"


def at_least(least: int, name: str, value: Any) -> Any:
    """Check the option `name` (a number, several, or None): raise a ValueError if a number is below `least`, else return it."""
    numbers: Iterable[int] = (value,) if isinstance(value, int) else value or ()
    for number in numbers:
        if number < least:
            raise ValueError(f"{name} is at least {least}, not {number}")
    return value
