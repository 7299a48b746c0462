"""Measuring the table of `compressvit.transforms.shrink.latency`.

All modules are run in turns with the whole model, and what counts of each is its part of the whole in the same round, so that load on the
machine affects all alike. One thread of a CPU is timed by its own time, which has nothing of other programs in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe, input_size
from compressvit.model.cost import in_turns, latencies
from compressvit.model.family import BlockInfo, Family
from compressvit.model.linear import is_pointwise, weight_shape
from compressvit.transforms.low_rank.pivoted_layer import Join, Split
from compressvit.transforms.narrow.form import FC2, PROJ
from compressvit.transforms.narrow.places import Place, narrow_attention
from compressvit.transforms.shrink.latency import Kind, LatencyTable, Timed, device_name
from compressvit.transforms.shrink.prices import Prices

log = logging.getLogger("compressvit")

MULTIPLE = 8  # of all sizes that are measured
ROUNDS, SECONDS = 15, 6.0  # at most, but at least three rounds
_NOISY = 1.3  # by how much modules may take longer one by one than within the model, or less
_SHORT = 0.2  # milliseconds; what takes less is repeated within a round
Call = Callable[[], Any]


@torch.inference_mode()
def measure(
    model: nn.Module, found: Sequence[Place], *, batch: int, device: torch.device, dtype: torch.dtype
) -> LatencyTable:
    """Measure what the modules of a model take on a device.

    Args:
        model: with values; it is not changed.
        found: its blocks.
        batch: images at once.

    Raises:
        UserError: a batch does not fit into the device's memory, or the device cannot compute in that precision.
    """
    try:
        return _measure(model, found, batch, device, dtype)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"latency cannot be measured: {batch} images at once do not fit into the memory of {device}; give a smaller batch"
        ) from error


def _measure(
    model: nn.Module, found: Sequence[Place], batch: int, device: torch.device, dtype: torch.dtype
) -> LatencyTable:
    model = surgery.deep_copy(model).to(device, dtype).eval()
    images = torch.randn(batch, *input_size(model), device=device, dtype=dtype)
    like = _alike(model, found)
    places = [place for place in found if like[place.path] == place.path]
    seen = _inputs(model, images, places)
    rest = _without_parts(model, images, found)
    keys: list[tuple[Kind, str, tuple[int, ...]]] = []
    calls: list[Call] = [lambda: model(images), lambda: rest(images)]
    family = describe(model).family
    for place in places:
        block = _Block(model.get_submodule(place.path), place, family, seen)
        for kind, sizes, call in block.calls():
            keys.append((kind, place.path, sizes))
            calls.append(call)
    counts = [1, 1, *(_repeats(call, device) for call in calls[2:])]
    calls = [call if count == 1 else _repeated(call, count) for call, count in zip(calls, counts, strict=True)]
    times = in_turns(calls, device=device, rounds=ROUNDS, seconds=SECONDS, clock=clock_of(device))
    whole = times.medians[0]
    rows = [
        Timed(kind=kind, of=path, sizes=sizes, milliseconds=whole * times.ratio(i)[1] / counts[i])
        for i, (kind, path, sizes) in enumerate(keys, 2)
    ]
    table = LatencyTable(
        device=device_name(device),
        threads=torch.get_num_threads(),
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        whole=whole,
        like=like,
        rows=tuple(rows),
    )
    log.info("latency of %d modules measured in %d rounds, on %s", len(rows), len(times.rounds), table.where())
    return _within_the_whole(model, found, table, whole * max(0.0, 1 - times.ratio(1)[1]))


def _without_parts(model: nn.Module, images: torch.Tensor, found: Sequence[Place]) -> nn.Module:
    """What is left of a model without the attention and the MLP of its blocks, for images of this size."""
    rest = surgery.deep_copy(model)
    parts = [rest.get_submodule(path) for place in found for path in _parts_of(place)]

    def pass_through(module: nn.Module, given: tuple, output: torch.Tensor) -> None:
        vars(module)["forward"] = partial(_through, torch.empty_like(output))

    handles = [part.register_forward_hook(pass_through) for part in parts]
    rest(images)
    for handle in handles:
        handle.remove()
    return rest


def _parts_of(place: Place) -> list[str]:
    """The paths of what can be changed in a block."""
    return [f"{place.path}.{part}" for part in ["attn"] * bool(place.options) + ["mlp"] * bool(place.neurons)]


def _through(output: torch.Tensor, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
    """Stands for an attention or an MLP and takes no time: returns its input, or an output of another shape."""
    return x if x.shape == output.shape else output


def _within_the_whole(model: nn.Module, found: Sequence[Place], table: LatencyTable, parts: float) -> LatencyTable:
    """The table with all modules scaled so that those of the model take together what they do within it, `parts` milliseconds: one by one
    they find their inputs and weights nearer or farther."""
    prices = Prices.of(model, found, ("latency",), table)
    scale = parts / sum(float(prices.part(block, part)[0]) for block, part in prices.parts())
    if not 1 / _NOISY < scale < _NOISY:
        log.warning(
            "latency: within the model its modules take %.2f of what they take one by one; other programs may be busy on this machine, so "
            "predictions are rough",
            scale,
        )
    rows = [row.model_copy(update={"milliseconds": scale * row.milliseconds}) for row in table.rows]
    return LatencyTable(**{**dict(table), "rows": tuple(rows)})  # a copy would keep what the table was interpolated by


def ratio(student: nn.Module, teacher: nn.Module, *, batch: int, device: torch.device) -> tuple[float, float, float]:
    """How much longer a student takes than its teacher: the median of the ratios of rounds in turns, between the ends of its interval."""
    models = [teacher.to(device).eval(), student.to(device).eval()]
    sizes = [input_size(model) for model in models]
    times = latencies(models, sizes, device=device, batch=batch, rounds=ROUNDS, seconds=SECONDS, clock=clock_of(device))
    return times.ratio(1)


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock by which models on a device are compared, in seconds."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _alike(model: nn.Module, found: Sequence[Place]) -> dict[str, str]:
    """For every block, the first one of its shape."""
    blocks = {info.path: info for info in describe(model).blocks}
    first: dict[Any, str] = {}
    return {place.path: first.setdefault(_shape(model, place, blocks[place.path]), place.path) for place in found}


def _shape(model: nn.Module, place: Place, info: BlockInfo) -> tuple[Any, ...]:
    shapes = tuple(weight_shape(model.get_submodule(f"{place.path}.{layer}")) for layer in place.layers)
    return shapes, place.heads, info.resolution, info.window, info.shift is not None and any(info.shift)


def _inputs(model: nn.Module, images: torch.Tensor, places: Sequence[Place]) -> dict[str, tuple[tuple, dict]]:
    """What comes into the attention and the MLP of these blocks."""
    seen: dict[str, tuple[tuple, dict]] = {}
    handles = []
    for place in places:
        for path in _parts_of(place):

            def see(module: nn.Module, given: tuple, named: dict, path: str = path) -> None:
                seen[path] = given, named

            handles.append(model.get_submodule(path).register_forward_pre_hook(see, with_kwargs=True))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Given(nn.Module):
    """Stands for a layer and takes no time: returns what it was given before."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


class _Block:
    """The modules of one block, in all sizes that are measured."""

    def __init__(self, block: nn.Module, place: Place, family: Family, seen: dict[str, tuple[tuple, dict]]):
        self.block, self.place, self.family = block, place, family
        self.seen = {part: seen[path] for part in ("attn", "mlp") if (path := f"{place.path}.{part}") in seen}

    def calls(self) -> Iterator[tuple[Kind, tuple[int, ...], Call]]:
        """What is timed: its kind, its sizes, and the function."""
        yield from self._layers()
        if "attn" in self.seen:
            place = self.place
            sizes = {(place.heads, size) for size in _sizes(place.head_dim)} if "head_dim" in place.options else set()
            counts = (
                {max(1, place.heads * part // 4) for part in range(1, 5)} if "heads" in place.options else {place.heads}
            )
            for heads, size in sorted(sizes | {(count, place.head_dim) for count in counts}):
                yield "attention", (heads, size), self._attention(heads, size)
        if "mlp" in self.seen:
            for neurons in sorted({max(1, self.place.neurons * part // 4) for part in range(1, 5)}):
                yield "mlp", (neurons,), self._mlp(neurons)

    def _layers(self) -> Iterator[tuple[Kind, tuple[int, ...], Call]]:
        part = "mlp" if "mlp" in self.seen else "attn"
        x = self.seen[part][0][0]
        layer = self.block.get_submodule((self.place.fc1 if part == "mlp" else self.place.qkv)[0])
        channels = 1 if is_pointwise(layer) else -1
        few, many = self._widths()
        reads = x.new_empty(x.numel() // x.shape[channels] * many[-1]).normal_()

        def of(width: int) -> torch.Tensor:
            """Inputs of so many channels, in the same memory whatever their number, as those of a model are near."""
            shape = list(x.shape)
            shape[channels] = width
            return reads[: x.numel() // x.shape[channels] * width].view(shape)

        for inputs, outputs in sorted({(a, b) for a in few for b in many} | {(b, a) for a in few for b in many}):
            yield "linear", (inputs, outputs), _bound(_linear(layer, inputs, outputs), of(inputs))
        for width in sorted({*few[:: max(1, len(few) // 3)], few[-1]}):
            half = max(1, width // 2)
            yield "split", (width,), _splitting(Split(width, half, channels, x.device), of(width), of(half))
            yield "join", (width,), _bound(Join(width, channels, x.device), of(half), of(max(1, width - half)))

    def _widths(self) -> tuple[list[int], list[int]]:
        """Of the narrower and of the wider side of layers."""
        shapes = [weight_shape(self.block.get_submodule(layer)) for layer in self.place.layers]
        narrow, wide = max(min(shape) for shape in shapes), max(max(shape) for shape in shapes)
        few = _multiples(narrow, [1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1])
        return few, sorted(
            {*few, *(width for width in _multiples(wide, [1 / 4, 3 / 8, 1 / 2, 3 / 4, 1]) if width > narrow)}
        )

    def _attention(self, heads: int, size: int) -> Call:
        given, named = self.seen["attn"]
        alone = nn.ModuleDict({"attn": surgery.deep_copy(self.block.get_submodule("attn"))})
        narrow_attention(alone, replace(self.place, path=""), self.family, heads, size)
        attention, x = alone["attn"], given[0]
        for name, shape in _shapes_given(alone, self.place.qkv, partial(attention, *given, **named)).items():
            alone.set_submodule(name, _Given(x.new_empty(shape).normal_()))
        alone.set_submodule(PROJ, _Given(torch.empty_like(x)))
        return _bound(attention, *given, **named)

    def _mlp(self, neurons: int) -> Call:
        alone = nn.ModuleDict({"mlp": surgery.deep_copy(self.block.get_submodule("mlp"))})
        given, named = self.seen["mlp"]
        x = given[0]
        shape = list(x.shape)
        for name in self.place.fc1:
            shape[1 if is_pointwise(alone.get_submodule(name)) else -1] = neurons * (2 if self.place.gated else 1)
            alone.set_submodule(name, _Given(x.new_empty(shape).normal_()))
        alone.set_submodule(FC2, _Given(torch.empty_like(x)))
        return _bound(alone["mlp"], *given, **named)


def _shapes_given(block: nn.Module, names: Sequence[str], run: Call) -> dict[str, tuple[int, ...]]:
    """The shapes of what layers of a block give when it runs: keys and values may have fewer tokens than queries."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, module: nn.Module, given: tuple, output: torch.Tensor) -> None:
        found[name] = tuple(output.shape)

    handles = [block.get_submodule(name).register_forward_hook(partial(see, name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _sizes(whole: int) -> list[int]:
    return _multiples(whole, [part / 8 for part in range(1, 9)])


def _multiples(whole: int, parts: Sequence[float]) -> list[int]:
    """Multiples of 8 near these parts of a width, and 8 itself; the whole as it is."""
    near = {round(part * whole / MULTIPLE) * MULTIPLE for part in parts}
    return sorted({min(MULTIPLE, whole), *(width for width in near if 0 < width < whole), whole})


def _linear(like: nn.Module, inputs: int, outputs: int) -> nn.Module:
    kind: Any = nn.Conv2d if is_pointwise(like) else nn.Linear
    weight: torch.Tensor = like.get_parameter("weight")
    kernel = (1,) if kind is nn.Conv2d else ()
    layer = skip_init(kind, inputs, outputs, *kernel, device=weight.device, dtype=weight.dtype)
    for parameter in layer.parameters():
        parameter.normal_(std=0.02)
    return layer


def _bound(module: nn.Module, *given: Any, **named: Any) -> Call:
    return lambda: module(*given, **named)


def _splitting(split: Split, x: torch.Tensor, more: torch.Tensor) -> Call:
    return lambda: split(x)[0] + more


def _repeats(call: Call, device: torch.device) -> int:
    """How often a short function is called within a round."""
    clock = clock_of(device)
    start = clock()
    call()
    if 1000 * (clock() - start) > 10 * _SHORT:  # also the first time, which takes longer
        return 1
    milliseconds = in_turns([call], device=device, rounds=3, clock=clock).medians[0]
    return min(10, max(1, round(_SHORT / max(milliseconds, 1e-6))))


def _repeated(call: Call, count: int) -> Call:
    def repeated() -> None:
        for _ in range(count):
            call()

    return repeated
