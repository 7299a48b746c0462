"""Where a model is cut in two: before the cut what is often frozen, after it what is trained.

Of a detector, segmenter or video model what its backbone gives is cut off, and of a classifier of timm what its classifier is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import family_of, head_paths, input_size, model_name
from compressvit.model.cost import taking
from compressvit.model.modules import as_timm
from compressvit.model.shapes import RememberedShapes

# Gives the features of images: `take(images, compute)`, where `compute(images)` computes them.
Take = Callable[[Tensor, Callable[[Tensor], Any]], Any]

POOLED = "forward_head"


@dataclass(frozen=True)
class Cut:
    """A cut, and what runs before it.

    Attributes:
        path: of the module that gives the features; '' for the model itself.
        method: of timm's, that which gives them: `forward_intermediates` maps, `forward_features` tokens or a map, and `forward_head`,
            with `pre_logits`, a vector.
    """

    path: str
    method: str

    @property
    def words(self) -> str:
        """What messages call what is before it."""
        return f"the {self.path}" if self.path else "what is before the classifier"

    def before(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The modules before the cut, by their paths in the model."""
        heads = () if self.path else tuple(head_paths(model))
        inside = {path: module for path, module in model.named_modules() if _within(path, self.path)}
        return {path: module for path, module in inside.items() if not any(_within(path, head) for head in heads)}

    @contextmanager
    def through(self, model: nn.Module, take: Take) -> Iterator[None]:
        """Within, the model does not compute features but has them from `take`, and computes the rest from them."""
        owner: Any = model.get_submodule(self.path)
        replaced = _pooled(owner, take) if self.method == POOLED else {self.method: _taken(owner, self.method, take)}
        kept = {name: vars(owner)[name] for name in replaced if name in vars(owner)}
        vars(owner).update(replaced)
        try:
            yield
        finally:
            for name in replaced:
                del vars(owner)[name]
            vars(owner).update(kept)


def cut_of(model: nn.Module) -> Cut:
    """Where a model is cut.

    Raises:
        UserError: it has no backbone of its own, and is no classifier as timm has them.
    """
    family = family_of(model)
    if family is not None and family.body is not None:
        return Cut(family.body, family.body_method)
    if not head_paths(model) or not hasattr(model, "forward_features") or not hasattr(model, POOLED):
        raise UserError(
            f"cache keeps what a backbone gives, or what is before the classifier in a model of timm, and {model_name(model)} has neither; "
            "leave cache out"
        )
    # of two classifiers, or one that is a convolution, each is given something else
    pooled = isinstance(as_timm(model).get_classifier(), nn.Linear) and _only_classifies(model)
    return Cut("", POOLED if pooled else "forward_features")


def _only_classifies(model: nn.Module) -> bool:
    """Whether the classifier is all that runs after the vector that timm's `forward_head` gives with `pre_logits`. Some models norm it
    first, or add what a classifier of the tokens says."""
    skeleton, size, called = surgery.skeleton(model).eval(), input_size(model), set[nn.Module]()
    for module in skeleton.modules():
        module.register_forward_hook(lambda module, *_: called.add(module))
    whole: Any = as_timm(skeleton)
    with torch.no_grad(), RememberedShapes(), taking(skeleton, size):
        features = whole.forward_features(torch.empty(2, *size, device="meta"))
        called.clear()
        whole.forward_head(features, pre_logits=True)
        before = set(called)
        whole.forward_head(features)
    return called - before <= set(whole.get_classifier().modules())


def _within(path: str, whole: str) -> bool:
    return not whole or path == whole or path.startswith(f"{whole}.")


def _taken(owner: Any, method: str, take: Take) -> Callable[..., Any]:
    original = getattr(owner, method)

    def replacement(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        return take(images, lambda some: original(some, *args, **kwargs))

    return replacement


def _pooled(owner: Any, take: Take) -> dict[str, Callable[..., Any]]:
    """timm's two halves of a forward pass: the first one hands the images on, and the second one has the vectors."""
    features, head = owner.forward_features, owner.forward_head

    def compute(images: Tensor) -> Tensor:
        found: Tensor = head(features(images), pre_logits=True)
        return found

    def given(images: Tensor, pre_logits: bool = False) -> Tensor:
        vectors: Tensor = take(images, compute)
        return vectors if pre_logits else owner.get_classifier()(vectors)

    return {"forward_features": lambda images, *args, **kwargs: images, POOLED: given}
