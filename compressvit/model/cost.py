"""What a model costs: parameters, bytes on disk, multiply-accumulates, latency, and the memory its losses keep."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload

from compressvit.errors import UserError
from compressvit.model import surgery, ties
from compressvit.model.backbone import model_name
from compressvit.model.header import TYPES
from compressvit.model.shapes import RememberedShapes


@dataclass(frozen=True)
class Cost:
    """`parameters` count a shared tensor once; `bytes` is the size of model.safetensors; `macs` is for one image."""

    parameters: int
    bytes: int
    macs: int

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count on a skeleton: no weights are read and no image is computed.

    Args:
        model: on any device, also 'meta'.
        input_size: (C, H, W) of an image.

    Raises:
        UserError: the model does not take images of that size.
    """
    with taking(model, input_size):
        products = macs(model, input_size)
    return Cost(ties.count_parameters(model), file_bytes(model), products)


@contextmanager
def taking(model: nn.Module, input_size: tuple[int, int, int]) -> Iterator[None]:
    """Within, what a forward pass of a model raises becomes a `UserError` that it does not take images of that size."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError) as error:
        size = "×".join(map(str, input_size))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model_name(model)} does not take images of {size}: {reason}") from error


def file_bytes(model: nn.Module) -> int:
    """Size in bytes of the `model.safetensors` that `save` would write; works on the meta device.

    A safetensors file is 8 bytes of length, a JSON header padded to 8 bytes, and the data.
    """
    header: dict[str, Any] = {}
    offset = 0
    state = ties.unique_state(model)
    # The writer orders tensors by falling element size, then by name; only the digits of the offsets depend on it.
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": header_word(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def header_word(dtype: torch.dtype) -> str:
    """What a safetensors file calls a type."""
    name = str(dtype).removeprefix("torch.")
    return TYPES.get(name, name)


def header_bytes(model: nn.Module) -> int:
    """Bytes of the model's file before its tensor data."""
    state = ties.unique_state(model)
    return file_bytes(model) - sum(t.numel() * t.element_size() for t in state.values())


def macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates for one image of `input_size` (C, H, W).

    Matrix products and convolutions, attention products included, and one per element of a LayerNorm (its scale and shift).
    This is the convention of the Swin and MiniViT figures; softmax, GELU and additions are not counted.
    """
    empty = surgery.skeleton(model).eval()
    with _Products() as counter, torch.no_grad():
        empty(torch.empty(1, *input_size, device="meta", dtype=next(empty.parameters()).dtype))
    return counter.total


class _Products(RememberedShapes):
    """Counts multiply-accumulates by torch's formulas, without the sums by module of its own counter, which take most of the time."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton

        super().__init__()
        self.total = 0
        self._formulas = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func not in _WHOLE:
            with self:  # what it consists of is counted
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
            _WHOLE.add(func)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket is torch.ops.aten.native_layer_norm:
            self.total += args[0].numel()
        elif func.overloadpacket in self._formulas:
            self.total += self._formulas[func.overloadpacket](*args, **kwargs, out_val=found) // 2
        return found


_WHOLE: set[OpOverload] = set()  # operations that consist of no others


CONFIDENCE = 0.99  # of the interval of a ratio of latencies


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of models that were measured alternately: a list for every round, with a number for every model."""

    rounds: list[list[float]]

    @property
    def medians(self) -> list[float]:
        """Of every model."""
        return [statistics.median(column) for column in zip(*self.rounds, strict=True)]

    def ratio(self, model: int, reference: int = 0) -> tuple[float, float, float]:
        """How much slower a model is than another: the median of the ratios within a round, between the ends of its interval.

        The interval contains the median of all possible rounds with `CONFIDENCE`, whatever their distribution is, because how many of
        the rounds lie below that median is binomial: of 30 rounds it is between the 8th ratios from either end. Of fewer than 12 it is
        between the smallest and the largest, which of fewer than 8 is less than was promised (of 3 rounds 75 %).
        """
        ratios = sorted(taken[model] / taken[reference] for taken in self.rounds)
        count, outside, below = len(ratios), 0, 1.0
        while 2 * below <= (1 - CONFIDENCE) * 2**count:  # sums of binomial coefficients
            outside += 1
            below += math.comb(count, outside)
        outside = max(0, outside - 1)
        return ratios[outside], statistics.median(ratios), ratios[count - 1 - outside]


def threads_text() -> str:
    """How many threads PyTorch uses, as '2 threads'."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


@torch.inference_mode()
def latencies(
    models: Sequence[nn.Module],
    input_sizes: Sequence[tuple[int, int, int]],
    *,
    device: torch.device,
    batch: int = 1,
    rounds: int = 30,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Latencies:
    """Time a batch of images (by default one) of each model, alternately, so that load on the machine affects all equally.

    Args:
        models: on `device`; they are put into eval mode.
        input_sizes: (C, H, W) of each model's image.
        batch: images at once.
        rounds, seconds, clock: see `in_turns`.
    """
    calls = []
    for model, size in zip(models, input_sizes, strict=True):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        calls.append(partial(model.eval(), torch.randn(batch, *size, device=device, dtype=dtype)))
    return in_turns(calls, device=device, rounds=rounds, seconds=seconds, clock=clock)


def in_turns(
    calls: Sequence[Callable[[], Any]],
    *,
    device: torch.device,
    rounds: int = 30,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Latencies:
    """Time functions, alternately.

    Args:
        calls: what is timed; they compute on `device`.
        rounds: measurements of each, after one warm-up run.
        seconds: stop early after so long, with at least 3 rounds.
        clock: in seconds; `seconds` are its, too.
    """

    def once(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (clock() - start)

    for call in calls:
        once(call)
    times: list[list[float]] = []
    end = clock() + seconds
    while len(times) < rounds and (len(times) < 3 or clock() < end):
        order = [(i + len(times)) % len(calls) for i in range(len(calls))]  # the order changes, too
        taken = {i: once(calls[i]) for i in order}
        times.append([taken[i] for i in range(len(calls))])
    return Latencies(times)


@torch.inference_mode()
def break_even_rank(
    in_features: int,
    out_features: int,
    tokens: int,
    *,
    pivoted: Callable[[int], nn.Module] | None = None,
    rounds: int = 7,
) -> tuple[int, int]:
    """The largest rank at which a low-rank linear layer costs less than the dense one, in MACs and in time measured on this machine.

    Args:
        in_features, out_features: of the layer.
        tokens: of one image.
        pivoted: makes the layer of a rank, where that is pivoted, so that every rank below the full one has fewer MACs; None: two factors.
        rounds: measurements of each rank, made alternately; the fastest counts.

    Returns:
        Both ranks. The measured one is the largest of those that were faster, tried at eighths of the other up to 1.5 × the other or, if
        pivoted, up to the other; 0 if none was.
    """
    by_macs = (
        min(in_features, out_features) - 1 if pivoted else in_features * out_features // (in_features + out_features)
    )
    ranks = sorted({max(1, by_macs * eighth // 8) for eighth in range(1, 9 if pivoted else 13)})
    x = torch.randn(tokens, in_features)
    dense = nn.Linear(in_features, out_features)
    factored = [
        pivoted(rank)
        if pivoted
        else nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features))
        for rank in ranks
    ]
    best = [math.inf] * (1 + len(ranks))
    for _ in range(rounds):
        for i, layer in enumerate([dense, *factored]):
            start = time.perf_counter()
            layer(x)
            best[i] = min(best[i], time.perf_counter() - start)
    faster = [rank for rank, seconds in zip(ranks, best[1:], strict=True) if seconds < best[0]]
    return by_macs, max(faster, default=0)


def saved_bytes(function: Callable[[], Any], exclude: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `function`, each storage once; works on the meta device.

    Args:
        function: the computation.
        exclude: tensors that stay in memory regardless; their storage is not counted.
    """
    alive = {t.untyped_storage()._cdata for t in exclude}
    sizes: dict[int, int] = {}
    held = []  # a storage that is freed could lend its address to the next

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage._cdata not in alive:
            sizes[storage._cdata] = storage.nbytes()
        return tensor.detach()  # an output that its own graph keeps would keep the graph, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(function())
    held.clear()  # the graph has `pack`, and with it this list: they would keep each other, for good
    return sum(sizes.values())
