"""The plan of `narrow` and `shrink`: a form for every block, its structure, and the fit of its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.lowrank import TINY
from compressvit.fitting.reference import Reference
from compressvit.model import ties
from compressvit.model.backbone import describe, model_name
from compressvit.model.calls import whole_layer
from compressvit.model.linear import effective_weight
from compressvit.transforms.base import LedgerEntry, Plan
from compressvit.transforms.claims import Claim, narrows, orders, values, weight
from compressvit.transforms.low_rank.layer import Factored, factor, unfactor
from compressvit.transforms.low_rank.pivoted_layer import pivot
from compressvit.transforms.narrow.fit import BlockFit
from compressvit.transforms.narrow.form import FC1, FC2, PROJ, QKV, BlockForm
from compressvit.transforms.narrow.places import (
    Place,
    narrow_attention,
    of_each_head,
    places,
    set_inputs,
    set_outputs,
)
from compressvit.transforms.narrow.teacher import Settings, TeacherBlock


class NarrowPlan(Plan):
    """Blocks with fewer neurons, fewer or narrower heads, and low-rank layers, in timm's own modules under the same paths.

    Attributes:
        forms: of the blocks that change, by path.
        pivoted: whether low-rank layers have the pivoted form (`compressvit.fitting.pivoted`), but for those that a form calls factored.
        metric: what errors are measured in, see `NarrowStep`.
        sequential: fitted in the order the layers run.
        ridge, output_ridge: of the moments.
    """

    foldable: ClassVar[bool] = True
    left: ClassVar[str] = (
        "its layers are plain, and its blocks have fewer neurons or narrower heads, each its own, which timm's constructors cannot "
        "build, so this is an artifact that compressvit loads"
    )
    starts: ClassVar[tuple[str, ...]] = ("metric", "sequential", "ridge", "output_ridge")

    forms: dict[str, BlockForm]
    pivoted: bool = True
    metric: Literal["outputs", "weights"] = "outputs"
    sequential: bool = True
    ridge: float = 1e-3
    output_ridge: float = 0.1

    @property
    def paths(self) -> list[str]:
        """The layers that change, in the order they run."""
        return [f"{path}.{layer}" for path, form in self.forms.items() for layer in form.in_order()]

    def claims(self, model: nn.Module) -> list[Claim]:
        found: list[Claim] = []
        for path, form in self.forms.items():
            layers = form.in_order()
            found += [weight(f"{path}.{layer}") for layer in layers if layer in form.ranks]
            found += [narrows(f"{path}.{layer}") for layer in layers]
            found += [values(f"{path}.{layer}", self.transform, f"leave {self.transform} out") for layer in layers]
        return [*found, *(orders(path) for path in self.forms)]

    def drops(self, model: nn.Module) -> set[str]:
        ranked = [f"{path}.{layer}" for path, form in self.forms.items() for layer in form.ranks]
        return {
            f"{path}.{name}" for path in ranked for name, _ in model.get_submodule(path).named_parameters(recurse=False)
        }

    def resizes(self, model: nn.Module) -> set[str]:
        found: set[str] = set()
        for path, form in self.forms.items():
            narrower = [*form.own(FC1), *form.own(FC2)] * bool(form.neurons)
            if form.heads or form.head_dim:
                narrower += [*form.own(QKV), PROJ]
                found |= {f"{path}.attn.{name}" for name in _beside(model, path, form)}
            of_layers = [name for layer in narrower for name in _changing(layer, form) if layer not in form.ranks]
            found |= {f"{path}.{name}" for name in of_layers}
        return found & {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def fitted(self) -> set[str]:
        return {f"{path}.{side}.weight" for path in self.paths for side in ("down", "up")}

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        found = self._places(model)
        owned = {
            f"{path}.attn" for path, form in self.forms.items() if _beside(model, path, form)
        }  # whose row has these, too
        rows: dict[str, list[str]] = {}
        for path in self.paths:
            attention = path.rpartition(".")[0]
            rows.setdefault(attention if attention in owned else path, []).append(path)
        before = ties.count_at_paths(model, rows)
        texts: dict[str, str] = {}
        for place in found:
            texts |= self._change(model, place, self.forms[place.path])
        after = ties.count_at_paths(model, rows)
        said = {row: "; ".join(dict.fromkeys(texts[path] for path in paths)) for row, paths in rows.items()}
        return [LedgerEntry(row, said[row], before[row], after[row]) for row in rows]

    def _places(self, model: nn.Module) -> list[Place]:
        found = {place.path: place for place in places(model, describe(model, asker=self.transform))}
        absent = next((path for path in self.forms if path not in found), None)
        if absent is not None:
            raise UserError(f"{self.transform}: {model_name(model)} has no block {absent}; it has {', '.join(found)}")
        return [found[path] for path in self.forms]

    def _change(self, model: nn.Module, place: Place, form: BlockForm) -> dict[str, str]:
        """Change one block in place; returns the ledger's text of every layer by path."""
        block = model.get_submodule(place.path)
        texts: dict[str, list[str]] = {f"{place.path}.{layer}": [] for layer in form.layers()}

        def say(layers: Iterable[str], text: str) -> None:
            for layer in layers:
                texts[f"{place.path}.{layer}"].append(text)

        if form.neurons:
            for name in place.fc1:
                set_outputs(block.get_submodule(name), form.neurons * (2 if place.gated else 1))
            set_inputs(block.get_submodule(place.fc2), form.neurons)
            say((*place.fc1, place.fc2), f"{form.neurons:,} of {place.neurons:,} neurons")
        if form.heads or form.head_dim:
            heads, size = form.heads or place.heads, form.head_dim or place.head_dim
            narrow_attention(model, place, describe(model).family, heads, size)
            of_heads = f"{heads} of {place.heads} heads" if form.heads else f"{heads} heads"
            of_size = f" of {size} instead of {place.head_dim} dimensions" if form.head_dim else ""
            say((*place.qkv, PROJ), of_heads + of_size)
        for layer, rank in form.ranks.items():
            pivoted = self.pivoted and layer not in form.factored
            (pivot if pivoted else factor)(model, f"{place.path}.{layer}", rank)
            say((layer,), f"{'pivoted ' * pivoted}rank {rank}")
        return {path: ", ".join(parts) for path, parts in texts.items()}

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        fits = self._block_fits(student, reference)
        for fit in fits:
            fit.keep_others()
        if not self.layer_fits(student, reference):  # which set all values, and start from the teacher's
            for fit in fits:
                fit.start()

    def layer_fits(self, student: nn.Module, reference: Reference) -> dict[str, LayerFit]:
        if not self.sequential or self.metric == "weights" or reference.too_alike:
            return {}
        return {path: fit for block in self._block_fits(student, reference) for path, fit in block.fits().items()}

    def _block_fits(self, student: nn.Module, reference: Reference) -> list[BlockFit]:
        settings = Settings.of(self)
        if settings.images:
            reference.moments(self.paths, outputs=True)  # all in one pass over the images
        family = describe(reference.model).family
        return [
            BlockFit(TeacherBlock(place, reference, family, settings), self.forms[place.path], student)
            for place in self._places(reference.model)
        ]

    @torch.no_grad()
    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        """Of layers that have the teacher's size; for the others there is only the error that the fit in order leaves."""
        found: dict[str, tuple[float | None, float | None]] = {}
        for path in self.paths:
            own, wanted = effective_weight(student.get_submodule(path)).detach().cpu().double(), reference.weight(path)
            found[path] = (None, None)
            if own.shape == wanted.shape:
                found[path] = (((wanted - own).norm() / wanted.norm().clamp(min=TINY)).item(), None)
        return found

    def fold(self, model: nn.Module) -> Plan | None:
        """Make low-rank layers dense; neurons and heads stay as they are. The result is plain unless blocks are narrower."""
        for path, form in self.forms.items():
            for layer in form.ranks:
                place = f"{path}.{layer}"
                module = model.get_submodule(place)
                assert isinstance(module, Factored)
                trained = any(p.requires_grad for p in module.parameters())
                dense = nn.Parameter(effective_weight(module).detach().clone(), requires_grad=trained)
                unfactor(model, place, dense)
        left = {
            path: form.model_copy(update={"ranks": {}, "factored": ()})
            for path, form in self.forms.items()
            if form.neurons or form.heads or form.head_dim
        }
        return self.model_copy(update={"forms": left}) if left else None


def _changing(layer: str, form: BlockForm) -> tuple[str, ...]:
    """The parameters of a layer that change with the width between it and the one after it, or before it."""
    first = layer in form.own(FC1) or whole_layer(layer) == QKV
    return (f"{layer}.weight", f"{layer}.bias") if first else (f"{layer}.weight",)


def _beside(model: nn.Module, path: str, form: BlockForm) -> list[str]:
    """The parameters of a block's attention beside its layers that change with its heads."""
    if not (form.heads or form.head_dim):
        return []
    family, attention = describe(model).family, model.get_submodule(f"{path}.attn")
    found = [name for name in family.of_heads if attention._parameters.get(name) is not None]
    return [*found, *of_each_head(attention, family)] if form.heads else found


def smaller(forms: Mapping[str, BlockForm]) -> dict[str, BlockForm]:
    """Those of the forms that change their block."""
    return {path: form for path, form in forms.items() if form.layers()}
