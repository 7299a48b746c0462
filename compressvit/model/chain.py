"""How a model of no family runs: as a chain of modules, each of which takes what the one before it gave.

A forward pass without values tells which linear layers are called, and between which modules a tensor goes from hand to hand. The modules
of the chain stand in for blocks: what a transform needs of those is that they run one after the other and that nothing else joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from compressvit.model import surgery
from compressvit.model.linear import ChannelsFirst, is_pointwise, weight_shape
from compressvit.model.trace import IMAGES, Call, Key, Sum, Trace


@dataclass(frozen=True)
class Chain:
    """What a forward pass told of a model.

    Attributes:
        links: paths of the modules of the chain, in the order they run.
        layers: paths of the linear layers and point-wise convolutions in them that are called.
        outside: those that are called outside of them, but for the classifier.
        classifier: those that give the model's output.
        uncalled: those that are not called, whose weight something else reads, which would not find one in another layer, that see nothing
            of the images, or that are of a class of their own.
        channels_last: whether linear layers see maps (B, height, width, C).
        ends: of layers that end a residual branch, by path: a module before it that takes the residual stream, and the parameter of the
            LayerScale between the layer and the sum; "" without.
        changed: layers whose output is changed in place after them.
    """

    links: tuple[str, ...]
    layers: tuple[str, ...]
    outside: tuple[str, ...]
    classifier: tuple[str, ...]
    uncalled: tuple[str, ...]
    channels_last: bool
    ends: dict[str, tuple[str, str]]
    changed: frozenset[str]


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, Chain]] = WeakKeyDictionary()


def chain_of(model: nn.Module) -> Chain:
    """The chain of a model, which may be without values.

    Raises:
        UserError: a forward pass without values is not possible.
    """
    from compressvit.model.backbone import input_size  # which asks this module about models of no family

    structure = (input_size(model), *((path, type(module)) for path, module in model.named_modules()))
    known = _KNOWN.get(model)
    if known is None or known[0] != structure:
        known = structure, _traced(model)
        _KNOWN[model] = known
    return known[1]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer or point-wise convolution, of torch's or of a transform. One of another class computes what that
    says."""
    plain = surgery.kind_of(module) is nn.Linear or (surgery.kind_of(module) is nn.Conv2d and is_pointwise(module))
    return plain or hasattr(module, "effective_weight")


def _traced(model: nn.Module) -> Chain:
    from compressvit.model.backbone import head_paths  # which asks this module about models of no family

    trace = Trace(model)
    calls = trace.calls
    added = surgery.added_modules(model)
    linear = [path for path, module in model.named_modules() if path not in added and _multiplies(module)]
    by_path = {call.path: call for call in calls}
    read = trace.read | _read_by_torch(model)
    called = [
        path
        for path in linear
        if path in by_path and path not in read and by_path[path].seen and is_linear(model.get_submodule(path))
    ]
    heads = head_paths(model)
    classifier = [
        path for path in called if by_path[path].gives == trace.output or any(is_within(path, head) for head in heads)
    ]
    wanted = [path for path in called if path not in classifier]
    links = _longest([call for call in calls if call.path not in {*added, *wanted}], wanted)
    inside = [path for path in wanted if any(is_within(path, link) for link in links)]
    if 5 * len(inside) < 3 * len(wanted):  # one link: each layer then costs a pass through what is before it
        links, inside = ("",), wanted
    maps = sum(by_path[path].dimensions == 4 and not is_pointwise(model.get_submodule(path)) for path in inside)
    ends = {path: _end_of(model, by_path[path], trace, links, added) for path in inside}
    return Chain(
        links=links,
        layers=tuple(inside),
        outside=tuple(path for path in wanted if path not in inside),
        classifier=tuple(classifier),
        uncalled=tuple(path for path in linear if path not in called),
        channels_last=2 * maps > len(inside),
        changed=frozenset(path for path in inside if _is_changed(by_path[path])),
        ends={path: end for path, end in ends.items() if end is not None},
    )


_FAST = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # read their layers' weights where no gradient is asked for


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer or point-wise convolution, also of a class of its own."""
    return isinstance(module, nn.Linear) or is_pointwise(module) or hasattr(module, "effective_weight")


def _read_by_torch(model: nn.Module) -> set[str]:
    """Layers of torch's own modules that read weights in evaluation alone."""
    owners = [path for path, module in model.named_modules() if isinstance(module, _FAST)]
    return {f"{owner}.{name}" for owner in owners for name, _ in model.get_submodule(owner).named_children()}


def is_within(path: str, link: str) -> bool:
    """Whether a module is another one or in it; both by their paths, of which that of the model is empty."""
    return link == "" or path == link or path.startswith(f"{link}.")


def _end_of(
    model: nn.Module, layer: Call, trace: Trace, links: tuple[str, ...], added: set[str]
) -> tuple[str, str] | None:
    """Where what a layer gives is added to the residual stream, with nothing but dropout and one LayerScale between, and goes nowhere else:
    see `Chain.ends`."""
    link = next(link for link in links if is_within(layer.path, link))
    around = next((call for call in trace.calls if call.path == link), None)
    given, scale = {layer.gives}, ""
    later = [call for call in trace.calls if call.start > layer.end and _passes(model.get_submodule(call.path))]
    passing: dict[Key | None, Call] = {call.takes: call for call in later}
    products: dict[Key | None, Sum] = {product.of[0]: product for product in trace.sums if len(product.of) == 1}
    now: Key | None = layer.gives
    while (total := next((found for found in trace.sums if len(found.of) == 2 and now in found.of), None)) is None:
        if now is None or trace.reads[now] > 1:
            return None
        if (product := products.pop(now, None)) is not None:
            if scale or not is_within(product.parameter, link) or not _is_scale(model, layer.path, product.parameter):
                return None
            now, scale = product.gives, product.parameter
        elif (call := passing.pop(now, None)) is not None:
            now = call.gives
        else:
            return None
        given.add(now)
    stream = total.of[0] if total.of[1] in given else total.of[1]
    inside = around is None or around.start < total.at < around.end
    if stream in given or now is None or trace.reads[now] > 1 or not inside:
        return None
    for call in trace.calls:
        if call.takes != stream or call.start > layer.start or call.path in {link, *added}:
            continue
        fitted = _multiplies(model.get_submodule(call.path))  # what goes into it is asked for by itself
        if is_within(call.path, link) and not is_within(layer.path, call.path) and not fitted:
            return call.path, scale
    return None


def _is_scale(model: nn.Module, path: str, name: str) -> bool:
    """Whether a parameter has one number for every channel of what a layer gives, on the axis of the channels."""
    layer, shape = model.get_submodule(path), tuple(model.get_parameter(name).shape)
    width = weight_shape(layer)[0]
    own = (width, 1, 1) if isinstance(layer, (nn.Conv2d, ChannelsFirst)) else (width,)
    return shape in {(1,) * ahead + own for ahead in range(3)}


def _is_changed(call: Call) -> bool:
    return call.output is not None and call.gives is not None and call.output._version > call.gives[1]


def _passes(module: nn.Module) -> bool:
    """Whether a module gives what it takes, in evaluation. What gives the tensor itself, as timm's DropPath, needs not be asked."""
    return type(module) in (nn.Dropout, nn.Identity)


def _longest(calls: list[Call], layers: list[str]) -> tuple[str, ...]:
    """The chain that holds most of the layers; of such ones that with most links that hold any, and of those the shortest."""
    within = {call.path: sum(is_within(path, call.path) for path in layers) for call in calls}
    usable = [
        call for call in calls if call.path and call.takes and call.gives and call.first == (IMAGES,) == call.leaves
    ]
    best: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {}
    ending: dict[Key, list[Call]] = {}
    for call in sorted(usable, key=lambda call: call.end):
        held = within[call.path]
        score: tuple[int, int, int] = (0, 0, 0)
        path: tuple[str, ...] = ()
        for before in ending.get(call.takes, []):  # type: ignore[arg-type]
            if before.end < call.start and best[before.path][0] > score:
                score, path = best[before.path]
        best[call.path] = ((score[0] + held, score[1] + (held > 0), score[2] - 1), (*path, call.path))
        ending.setdefault(call.gives, []).append(call)  # type: ignore[arg-type]
    score, links = max(best.values(), key=lambda found: found[0], default=((0, 0, 0), ()))
    return links if score[0] else ()
