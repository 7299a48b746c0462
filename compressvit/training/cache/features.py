"""The features of what a phase does not train, computed once for every image in every view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressvit import processes
from compressvit.data.input import Side
from compressvit.data.samples import Samples
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe, family_of, model_name
from compressvit.model.cost import taking
from compressvit.model.cut import Cut, cut_of
from compressvit.model.modes import evaluating
from compressvit.model.shapes import RememberedShapes
from compressvit.training import optimisation as opt
from compressvit.training.asking import Shown
from compressvit.training.cache import identity
from compressvit.training.cache.cache import Kept, make, taken
from compressvit.training.cache.form import TENSORS, Singles, TensorPart, rows_of
from compressvit.training.cache.held_out import HASH, HeldOut
from compressvit.training.cache.spec import Features
from compressvit.training.cache.store import HELD_OUT, Index, Store, view_bytes
from compressvit.training.spec import Training

_HOLDS = ("features of a model", "features of")
_SAME = 1e-3  # of the largest value: how far features in training may be from those in eval mode
_RATES = ("p", "drop_prob", "prob", "dropout")  # as torch and timm call the probability of leaving something out


@dataclass(frozen=True)
class FeatureForm:
    """The tensors of the features of an image.

    Attributes:
        listed: whether the model has them as a list, or one without.
    """

    parts: tuple[TensorPart, ...]
    listed: bool

    @property
    def bytes(self) -> int:
        """Of the features of one image."""
        return sum(part.bytes for part in self.parts)

    def encode(self, *values: Tensor) -> Tensor:
        """Features of B images as bytes, uint8 (B, bytes)."""
        return torch.cat([part.encode(value) for part, value in zip(self.parts, values, strict=True)], dim=1)

    def decode(self, found: Tensor) -> tuple[Tensor, ...]:
        """The features in float32."""
        columns = found.split([part.bytes for part in self.parts], dim=1)
        return tuple(part.decode(column) for part, column in zip(self.parts, columns, strict=True))

    def named(self, *values: Tensor) -> dict[str, Tensor]:
        """The tensors, by what messages call them."""
        return {_name(i): value for i, value in enumerate(values)}

    def words(self) -> dict[str, str]:
        """What is kept, by name."""
        return {_name(i): part.words() for i, part in enumerate(self.parts)}


def _name(index: int) -> str:
    return f"tensor {index + 1}"


def form_of_features(spec: Features, side: Side, cut: Cut) -> FeatureForm:
    """How features are kept, found on the meta device.

    Raises:
        UserError: they are not made of tensors with as many rows for every image.
    """
    model, seen = surgery.skeleton(side.model).eval(), list[Any]()

    def take(images: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        seen.append(compute(images))
        return seen[-1]

    for images in (2, 3):
        with torch.no_grad(), RememberedShapes(), taking(model, side.input.size), cut.through(model, take):
            model(torch.empty(images, *side.input.size, device="meta"))
    whose, way = f"{cut.words} in {model_name(model)}", "leave cache out"
    if len(seen) != 2:
        raise UserError(
            f"cache keeps the features that a model takes once, and it does not take those of {whose}; {way}"
        )
    two, three = (_tensors(found) for found in seen)
    shapes = [rows_of(_name(i), pair, whose=whose, way=way) for i, pair in enumerate(zip(two, three, strict=True))]
    return FeatureForm(tuple(TENSORS[spec.dtype](shape) for shape in shapes), isinstance(seen[0], (list, tuple)))


def _tensors(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


class FeatureCache(Kept):
    """The features before a cut."""

    whose = "what is frozen"

    def __init__(self, cut: Cut, held_out: HeldOut | None, *args: Any):
        super().__init__(*args)
        self.cut, self._held_out = cut, held_out

    def within(self, model: nn.Module) -> _Given:
        return _Given(self, model)

    def evaluating(self, evaluate: Callable[[nn.Module], dict[str, Any]]) -> Callable[[nn.Module], dict[str, Any]]:
        return evaluate if self._held_out is None else self._held_out.evaluating(evaluate)

    def _words(self, read: int, asked: int) -> str:
        where = self.store.folder
        told = f"the features of {read:,} images were read from {where}, and those of {asked:,} were computed"
        if self._held_out is None:
            return told
        counts = processes.gathered((self._held_out.read, self._held_out.asked))
        read, asked = (sum(each) for each in zip(*counts, strict=True))
        return f"{told}; of held-out images {read:,} and {asked:,}"


class _Given:
    """Gives a model its features."""

    def __init__(self, cache: FeatureCache, model: nn.Module):
        self._cache, self._model, self._compared = cache, model, False

    @contextmanager
    def given(self, shown: Shown | None) -> Iterator[None]:
        assert shown is not None, "a loader that shows views"

        def take(images: Tensor, compute: Callable[[Tensor], Any]) -> Any:
            values = self._cache.remember(images, shown, lambda some: self._computed(some, compute))
            return list(values) if self._cache.form.listed else values[0]

        with self._cache.cut.through(self._model, take):
            yield

    def _computed(self, images: Tensor, compute: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
        found = _tensors(compute(images))
        if not self._compared:
            self._compared = True
            with evaluating(self._model):
                _refuse_other(found, _tensors(compute(images)), self._cache.cut)
        return found

    def close(self) -> None:
        self._cache.store.close()


def _refuse_other(training: Sequence[Tensor], evaluated: Sequence[Tensor], cut: Cut) -> None:
    """Raise a `UserError` where a frozen part computes something else in training than in eval mode."""
    for one, other in zip(training, evaluated, strict=True):
        if not float((one - other).abs().max()) <= _SAME * float(other.abs().max()):
            raise UserError(
                f"cache keeps features that are the same whenever they are computed, and those of {cut.words} are others in training "
                "than in eval mode; name it in `frozen`, which keeps it in eval mode, or leave cache out"
            )


def refuse_moving(model: nn.Module, spec: Training, cut: Cut) -> None:
    """Raise a `UserError` where what is before a cut is trained, or is not the same function in every step.

    Args:
        model: on any device, before the phase.
        spec: the options of the phase.
    """
    modules = opt.frozen_modules(model, spec)
    frozen = {id(parameter) for module in modules for parameter in module.parameters()}
    still = {id(inner) for module in [*modules, *opt.frozen_norms(model)] for inner in module.modules()}
    for path, module in cut.before(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in frozen:
                raise UserError(_trained(model, f"{path}.{name}" if path else name, cut))
        if id(module) not in still and (fault := _moves(module, spec)):
            raise UserError(
                f"cache keeps features that are the same in every step, and {path or model_name(model)} {fault}; name it in `frozen`, "
                "which keeps it in eval mode, or leave cache out"
            )
    if spec.drop_path and any(id(model.get_submodule(block.path)) not in still for block in describe(model).blocks):
        raise UserError(
            f"cache keeps features that are the same in every step, and drop_path={spec.drop_path:g} leaves out blocks at random; set "
            "drop_path=0, or leave cache out"
        )


def _trained(model: nn.Module, name: str, cut: Cut) -> str:
    """What to say of a parameter that is trained before the cut."""
    fault = f"cache keeps the features of {cut.words}, which must be frozen, and {name} is trained"
    if name in surgery.added_parameters(model):
        return f"{fault}, which an earlier step added there; leave cache out"
    return f"{fault}; {'set backbone_lr=0' if cut.path else 'put `freeze: {train: head}` before the phase'}, or leave cache out"


def _moves(module: nn.Module, spec: Training) -> str | None:
    """What a module does in training that it does not do in every step alike."""
    if isinstance(module, _BatchNorm):
        return "norms by the statistics of a batch"
    if isinstance(module, DropPath) and spec.drop_path is not None:  # the phase sets it
        return None
    rates = [getattr(module, name, None) for name in _RATES]
    drops = "drop" in type(module).__name__.lower() or isinstance(module, nn.MultiheadAttention)
    rate = next((r for r in rates if isinstance(r, float) and r > 0), None) if drops else None
    return None if rate is None else f"leaves something out at random (with probability {rate:g})"


def planned_features(spec: Features, training: Training, side: Side) -> dict[str, Any]:
    """What a plan knows of the files.

    Raises:
        UserError: the features cannot be kept.
    """
    cut = cut_of(side.model)
    refuse_moving(side.model, training, cut)
    form = form_of_features(spec, side, cut)
    return {
        "of": f"the features of {cut.words}",
        "views": spec.views or training.epochs,
        "answer_bytes": view_bytes(1, form.bytes),
        "held_out_bytes": view_bytes(1, sum(Singles(part.shape).bytes for part in form.parts) + HASH),
    }


def open_features(spec: Features, training: Training, loader: Any, side: Side, beside: Path) -> FeatureCache:
    """The cache of a phase whose features are kept, which is made where there is none yet.

    Args:
        loader: of `train_loader`.
        side: the model before the phase, and what its images look like.
        beside: the run folder.

    Raises:
        UserError: the features cannot be kept, or what is in the folder are others, or the files would be too large.
    """
    model, cut = side.model, cut_of(side.model)
    refuse_moving(model, training, cut)
    form = processes.first(lambda: form_of_features(spec, side, cut))
    family = family_of(model)
    found = {
        "features": {
            "model": model_name(model.get_submodule(cut.path)),
            # which of its maps are read
            "for": family.name if family is not None and cut.path else "a classifier",
            "method": cut.method,
            **identity.of_part(model, cut.before(model)),
            "precision": training.precision,
        },
        **loader.identity(),
        "seed": spec.seed,
        "kept": form.words(),
    }
    index = Index(images=found["data"]["images"], bytes=form.bytes, identity=found)
    views = spec.views or training.epochs
    store = taken(spec, views, index, beside.parent / "feature_cache", _HOLDS)
    left = spec.limit_gb * 1e9 - views * view_bytes(index.images, index.bytes)
    held_out = _held_out(cut, form, found, loader, store.folder, left)
    return FeatureCache(cut, held_out, spec, views, form, store)


def _held_out(
    cut: Cut, form: FeatureForm, found: dict[str, Any], loader: Any, folder: Path, left: float
) -> HeldOut | None:
    """The features of held-out images; None of a stream, or where they would take more than the `left` bytes."""
    exact = FeatureForm(tuple(Singles(part.shape) for part in form.parts), form.listed)
    datasets, data, _ = loader.made_of
    validation, clips = datasets.validation, data.clip.shown
    images = len(validation) * clips if isinstance(validation, Samples) else 0
    if not isinstance(validation, Samples) or view_bytes(images, exact.bytes + HASH) > left:
        return None
    identified = {
        "features": {**found["features"], "precision": "fp32"},  # of an evaluation
        "held_out": {"images": images, "files": validation.identity()},
        "preprocessing": found["preprocessing"],
        "kept": exact.words(),
    }
    index = Index(images=images, bytes=exact.bytes + HASH, identity=identified)
    inside = folder / f"{HELD_OUT}{identity.name_of(identified)}"
    processes.led(lambda: make(inside, index, *_HOLDS))
    batch = min(data.eval_batch_size or data.batch_size, len(validation)) * clips
    return HeldOut(cut, exact, Store(inside, index), batch)
