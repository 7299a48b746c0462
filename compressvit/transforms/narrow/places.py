"""Where a block can be made narrower: its MLP's hidden neurons, its attention's heads and their dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compressvit.fitting.lowrank import Tensor
from compressvit.model import surgery
from compressvit.model.backbone import Backbone, class_in_timm
from compressvit.model.calls import PARTS, be_called, layers_for
from compressvit.model.chain import chain_of
from compressvit.model.family import BlockInfo, Family, HeadOption
from compressvit.model.linear import is_pointwise, weight_shape
from compressvit.transforms.narrow.form import FC1, FC2, PROJ, QKV, BlockForm


@dataclass(frozen=True)
class Place:
    """The sublayers of one block that can be changed.

    Attributes:
        path: of the block.
        neurons: hidden neurons of its MLP; 0 where they cannot be removed.
        gated: whether a neuron is a pair of rows of `fc1` (SwiGLU and other gated linear units in one layer).
        heads, head_dim: of its attention; 0 without one that can be changed.
        options: what can be changed of its heads.
        qkv, fc1: the layers of queries, keys and values, and those into the neurons: one each, or those in its place.
        fc2: the layer that reads the neurons.
    """

    path: str
    neurons: int = 0
    gated: bool = False
    heads: int = 0
    head_dim: int = 0
    options: tuple[HeadOption, ...] = ()
    qkv: tuple[str, ...] = (QKV,)
    fc1: tuple[str, ...] = (FC1,)
    fc2: str = FC2

    @property
    def layers(self) -> list[str]:
        """Those that can be changed, in the order they run."""
        attention = [*self.qkv, PROJ] if self.options else []
        return [*attention, *([*self.fc1, self.fc2] if self.neurons else [])]

    def form(self, **sizes: Any) -> BlockForm:
        """A form of this block; sizes that are None stay as they are."""
        mlp = () if self.fc2 == FC2 else (self.fc1[0], self.fc2)
        return BlockForm(**sizes, parts=self.parts, mlp=mlp, qkv=self.own_qkv)

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of `attn.qkv` and `mlp.fc1` in whose place it has several layers."""
        return tuple(name for name, own in ((QKV, self.qkv), (FC1, self.fc1)) if len(own) > 1)

    @property
    def own_qkv(self) -> tuple[str, ...]:
        """`qkv` where it is three layers that are called otherwise than timm's."""
        return () if self.qkv in ((QKV,), PARTS[QKV][0]) else self.qkv

    def rows(self, kept: Tensor) -> Tensor:
        """The rows of `fc1`, or of each layer in its place, of the neurons `kept`."""
        return torch.cat([kept, kept + self.neurons]) if self.gated else kept


def places(model: nn.Module, backbone: Backbone) -> list[Place]:
    """The blocks of a model, in order; of one whose blocks are not timm's, its MLPs."""
    if not backbone.family.named_layers:
        return [Place(path, neurons, fc1=(fc1,), fc2=fc2) for path, fc1, fc2, neurons in plain_mlps(model)]
    return [_place(model, info, backbone.family) for info in backbone.blocks]


def _place(model: nn.Module, info: BlockInfo, family: Family) -> Place:
    block: Any = model.get_submodule(info.path)
    found = _neurons(block, info.path)
    attention: Any = getattr(block, "attn", None)
    stay = family.attention is None or attention is None or family.heads_stay(model, attention) is not None
    options = () if stay else family.head_options(attention)
    qkv = info.projections
    if len(qkv) > 1:
        options = tuple(option for option in options if option == "heads")
    if not options or not _plain(*map(block.get_submodule, qkv), attention.proj):
        return found
    heads = info.heads
    size = weight_shape(block.get_submodule(qkv[0]))[0] // (heads * (3 if len(qkv) == 1 else 1))
    return replace(found, heads=heads, head_dim=size, options=tuple(options), qkv=qkv)


def _neurons(block: Any, path: str) -> Place:
    """The neurons of a block's MLP that can be removed."""
    from timm.layers import GluMlp, Mlp, SwiGLU  # words and settings do not wait for it

    mlp: Any = getattr(block, "mlp", None)
    kind = None if mlp is None else class_in_timm(mlp, Mlp, GluMlp, SwiGLU)
    if kind not in (Mlp, GluMlp, SwiGLU) or not isinstance(mlp.norm, nn.Identity):
        return Place(path)
    fc1 = layers_for(block, FC1)
    layers = [block.get_submodule(name) for name in fc1]
    if not _plain(*layers, mlp.fc2):
        return Place(path)
    neurons = weight_shape(mlp.fc2)[1]
    if any(weight_shape(layer)[0] != neurons * (2 if kind is GluMlp else 1) for layer in layers):
        return Place(path)
    return Place(path, neurons, kind is GluMlp, fc1=fc1)


# What may stand between the layers of an MLP: each number alone, so that a neuron is one output of the first and one input of the second.
_ELEMENTWISE = (
    *(nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
)


def plain_mlps(model: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    """Path, names of the two layers, and number of neurons of every MLP of a model of no family that runs as it stands: timm's `Mlp` and
    `ConvMlp` without a norm, and an `nn.Sequential` within the model, of two layers with nothing but activations between them."""
    called = chain_of(model).layers
    for path, module in model.named_modules():
        names = _two_layers(module) if path else None
        if names is None or not all(f"{path}.{name}" in called for name in names):
            continue
        neurons, read = weight_shape(module.get_submodule(names[0]))[0], weight_shape(module.get_submodule(names[1]))[1]
        if neurons == read:
            yield path, *names, neurons


def _two_layers(module: nn.Module) -> tuple[str, str] | None:
    """The names of the two layers of a plain MLP; None of anything else."""
    from timm.layers import ConvMlp, Mlp  # words and settings do not wait for it

    if (kind := class_in_timm(module, Mlp, ConvMlp)) in (Mlp, ConvMlp):
        own = type(module).forward is kind.forward and isinstance(module.norm, nn.Identity)
        return ("fc1", "fc2") if own else None
    if type(module).forward is not nn.Sequential.forward:
        return None
    found = [(name, child) for name, child in module.named_children() if not isinstance(child, _ELEMENTWISE)]
    kinds = [isinstance(child, nn.Linear) for _, child in found]
    alike = len(found) == 2 and kinds[0] == kinds[1] and _plain(*(child for _, child in found))
    return (found[0][0], found[1][0]) if alike else None


def why_not(model: nn.Module, place: Place, family: Family, name: str) -> str:
    """Why a block has no such widths that can be changed, as an end of a sentence; "" where nothing more is known."""
    block: Any = model.get_submodule(place.path)
    part = getattr(block, "mlp" if name == "neurons" else "attn", None)
    if part is None:
        return ""
    if not isinstance(getattr(part, "norm", nn.Identity()), nn.Identity):
        return f": a norm inside the {type(part).__name__} is over all of them"
    if name == "neurons":
        return ""
    if getattr(part, "gate", None) is not None:
        return ": a gate is over all of them"
    stay = family.heads_stay(model, part)
    return "" if stay is None else f": it has heads, {stay}"


def _plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers, also where an earlier step has changed them: it is then that step which is refused."""
    from compressvit.transforms.low_rank.layer import Factored

    return all(isinstance(layer, (nn.Linear, Factored)) or is_pointwise(layer) for layer in layers)


def narrowable(found: Sequence[Place]) -> bool:
    """Whether anything in these blocks can be made narrower."""
    return any(place.neurons or place.options for place in found)


def set_outputs(layer: nn.Module, outputs: int) -> None:
    """Give a linear layer, or a point-wise convolution, so many outputs, in place; its values are then undefined."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    layer.weight = _resized(layer.weight, outputs, *layer.weight.shape[1:])
    if layer.bias is not None:
        layer.bias = _resized(layer.bias, outputs)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", outputs)


def set_inputs(layer: nn.Module, inputs: int) -> None:
    """Give it so many inputs, in place; its values are then undefined."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    outputs, _, *kernel = layer.weight.shape
    layer.weight = _resized(layer.weight, outputs, inputs, *kernel)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", inputs)


def _resized(parameter: torch.Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().new_zeros(shape), requires_grad=parameter.requires_grad)


def narrow_attention(model: nn.Module, place: Place, family: Family, heads: int, size: int) -> None:
    """Give the attention of a block so many heads of so many dimensions, in place; its values are then undefined."""
    path = f"{place.path}.attn" if place.path else "attn"
    kind = family.attention_of_heads(model.get_submodule(path))
    attention: Any = model.get_submodule(path) if kind is None else surgery.specialise(model, path, kind)
    block = model.get_submodule(place.path)
    for name in place.qkv:
        be_called(block, name)
        set_outputs(block.get_submodule(name), heads * size * (3 if len(place.qkv) == 1 else 1))
    set_inputs(block.get_submodule(PROJ), heads * size)
    for name in family.of_heads:
        vector = getattr(attention, name, None)
        if isinstance(vector, nn.Parameter):
            setattr(attention, name, _resized(vector, heads * size))
        elif vector is not None:  # a buffer that no file has
            setattr(attention, name, vector.new_zeros(heads * size))
    for name, axes in of_each_head(attention, family).items() if heads != place.heads else ():
        owner, _, own = name.rpartition(".")
        layer: Any = attention.get_submodule(owner)
        shape = [heads if axis in axes else count for axis, count in enumerate(getattr(layer, own).shape)]
        setattr(layer, own, _resized(getattr(layer, own), *shape))
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
    family.set_heads(attention, heads, size)


def of_each_head(attention: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    """Those of `Family.of_each_head` that this attention has."""
    own = {name for name, _ in attention.named_parameters()}
    return {name: axes for name, axes in family.of_each_head.items() if name in own}
