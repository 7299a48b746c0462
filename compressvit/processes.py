"""The processes of one run, which a launcher such as torchrun starts and tells their place (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR).

All run the same program. Process 0 *leads*: it alone writes, prints, and does what is not worth dividing; `led` gives the others its
result. What is divided among them asks `count`, which is 1 inside `led`: there the leader works as if it were alone, until it asks the
others to do something `together`.
torch is imported only where there are several processes.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, repeat
from typing import Any, TypeVar

from compressvit.errors import UserError, option, switch

T = TypeVar("T")

_WAIT = timedelta(days=30)  # for a leader that fits, or tests on all images; one that has died is noticed at once
_group: Any = None  # of all processes, over the network of the hosts: for what is decided, not for gradients
_alone = 0  # how deep in `led`
_helped: list[bool] = []  # of every `led` the leader is in, whether the others wait for what it asks `together`
_apart = False  # whether the leader has left what was done `together`, where the others cannot be told
_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "connection refused", "remote process")


class ToldElsewhere(UserError):
    """What ends the run was told by another process."""


def launched() -> int:
    """How many processes a launcher has started.

    Raises:
        UserError: WORLD_SIZE is no number.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal():
        raise UserError(f"WORLD_SIZE={text} is no number of processes; a launcher such as torchrun sets it")
    return max(1, int(text))


def place() -> int:
    """The place of this process among those of the launcher, from 0."""
    text, count = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    return int(text) if text.isdecimal() and count not in ("0", "1") else 0


def launch() -> str | None:
    """What a launch of torchrun has in common with the launches anew after a process had ended; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name}, process {os.getppid()}" if name == "none" else name


def restarted() -> bool:
    """Whether torchrun has started the processes anew, after one of them had ended."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def told_once(error: UserError) -> UserError:
    """An error that every process finds, as that of this process: only the leader's is told."""
    return error if leads() else ToldElsewhere(str(error))


def count() -> int:
    """How many processes share the work here: 1 in a program that no launcher started, and inside `led`."""
    if _group is None or _alone:
        return 1
    import torch.distributed as dist

    return dist.get_world_size(_group)


def rank() -> int:
    """The place of this process among the `count`; 0 where that is 1."""
    if count() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank(_group)


def leads() -> bool:
    """Whether this process writes and prints; also that of a program that no launcher started."""
    return place() == 0


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Connect the processes of a launcher for the time of the block; without a launcher, nothing.

    Args:
        device: on which they are going to work; GPUs are given to them in the order of the processes of a host.

    Raises:
        UserError: the launcher has told this process too little, or another process has ended.
    """
    global _group, _apart
    if launched() == 1 or _group is not None:
        yield
        return
    import torch.distributed as dist

    _group, own = _connected(device)
    any_of(0)  # every process is connected before one of them can end
    if not leads():
        logging.getLogger("compressvit").setLevel(logging.ERROR)
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"process {place()} cannot go on, because another process of the run has ended ({reason}); what that one says tells why. Start "
            f"them again with {switch('resume')}"
        ) from error
    finally:
        _group, _apart = None, False
        if own:
            dist.destroy_process_group()


def _connected(device: str) -> tuple[Any, bool]:
    """The group for decisions, and whether torch's groups are of our making."""
    import torch
    import torch.distributed as dist

    if ":" in device:
        kind = option("device", device.partition(":")[0])
        raise UserError(
            f"{option('device', device)} is one device, and there are {launched()} processes; give {kind}, of which each takes its own"
        )
    if own := not dist.is_initialized():
        needed = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if needed:
            raise UserError(
                f"WORLD_SIZE={launched()}, but {', '.join(needed)} is not set: start the processes with torchrun, or have your launcher "
                "set it (docs/processes.md shows how)"
            )
        backend = "gloo"
        if device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(device_of_process())
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend)
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"process {place()} of {launched()} could not connect to the others: {reason}") from error
    return dist.new_group(backend="gloo", timeout=_WAIT), own


def device_of_process() -> int:
    """The number of the GPU that is this process's.

    Raises:
        UserError: the host has too few.
    """
    import torch

    text, there = os.environ.get("LOCAL_RANK") or "0", torch.cuda.device_count()
    if not text.isdecimal():
        raise UserError(f"LOCAL_RANK={text} is no number of a process; a launcher such as torchrun sets it")
    local = int(text)
    if local >= there:
        raise UserError(
            f"process {local} of this host has no GPU of its own: there are {there}; start as many processes as there are GPUs, or hide "
            "the GPUs with CUDA_VISIBLE_DEVICES= to work on CPUs"
        )
    return local


def told(value: T) -> T:
    """The leader's value, in every process."""
    if count() == 1:
        return value
    import torch.distributed as dist

    held = [value if rank() == 0 else None]
    dist.broadcast_object_list(held, src=0, group=_group)
    return held[0]  # type: ignore[return-value]


def led(work: Callable[[], T], helping: Callable[[Any], None] | None = None) -> T:
    """Have the leader alone do something; every process waits for its result, which it gets as a copy.

    Args:
        helping: what the others do meanwhile with every request that the leader makes by `together`.

    Raises:
        What `work` raises, in the leader; in the others `ToldElsewhere`, or KeyboardInterrupt where a signal stopped it.
    """
    if count() == 1:
        return work()
    if rank() == 0:
        return _led(work, helping is not None)
    while True:
        state, value = told(("", None))
        if state == "asked":
            assert helping is not None, "the leader asks where there is help"
            helping(value)
            continue
        if state == "done":
            return value  # type: ignore[return-value]
        any_of(0)
        if value is not None:
            raise KeyboardInterrupt(value)
        raise ToldElsewhere("another process of the run has ended it, and tells why")


def _led(work: Callable[[], T], helped: bool) -> T:
    global _alone
    _alone += 1
    _helped.append(helped)
    try:
        value = work()
    except BaseException as error:
        _alone -= 1
        _helped.pop()
        stopped = isinstance(error, KeyboardInterrupt)
        if not _apart:
            with suppress(RuntimeError):  # of one that has died, which is not what ends the run
                told(("failed", (error.args or (signal.SIGINT,))[0] if stopped else None))
                any_of(0)  # all know of it before this process ends, and with it their connection
        raise
    _alone -= 1
    _helped.pop()
    told(("done", value))
    return value


@contextmanager
def together(request: Any) -> Iterator[None]:
    """In the leader, within a `led` that has help: hand the others a request; in the block all of them share the work again.

    Elsewhere, nothing. An error in the block ends this process without a word to the others, which see that it has ended.
    """
    global _alone, _apart
    if not (_helped and _helped[-1]):
        yield
        return
    depth, _alone = _alone, 0
    try:
        told(("asked", request))
        yield
    except BaseException:
        _apart = True
        raise
    finally:
        _alone = depth


def first(work: Callable[[], T]) -> T:
    """Have every process do something, the leader before the others, so that what is wrong is found, and told, once."""
    if count() == 1:
        return work()
    made: list[T] = []
    led(lambda: made.append(work()))
    if rank():
        made.append(alone(work))
    any_of(0)  # what the leader does next, e.g. with files, comes after what the others have done
    return made[0]


def alone(work: Callable[[], T]) -> T:
    """Do something in every process as if it were the only one."""
    global _alone
    _alone += 1
    try:
        return work()
    finally:
        _alone -= 1


def any_of(value: int) -> int:
    """The largest of a small number of all processes, e.g. of a signal that only some have received yet."""
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_group)
    return int(largest)


def everywhere(true: Any) -> Any:
    """Whether a boolean scalar on the device is true in every process, without waiting for the device."""
    if count() == 1:
        return true
    import torch.distributed as dist

    least = true.float()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least > 0


def alike(tensors: Iterable[Any]) -> None:
    """Give tensors of every process the leader's values, in place."""
    if count() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)


def gathered(value: T) -> list[T]:
    """The values of all processes, in every one of them."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_group)
    return values


def totals(values: Sequence[Any]) -> list[Any]:
    """Sums over the processes, each of a number or of a tensor on the CPU; a process without anything of a tensor gives 0."""
    if count() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    sums = []
    each = gathered([tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in values])
    for value, shapes in zip(values, zip(*each, strict=True), strict=True):
        shape = next((shape for shape in shapes if shape is not None), None)
        total = torch.zeros(shape or (), dtype=torch.float64) + value
        dist.all_reduce(total, group=_group)
        sums.append(type(value)(total.item()) if shape is None else total)
    return sums


def means(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Of as many rows of values by name in every process, the means over the processes that have the value."""
    if count() == 1 or not rows:
        return rows
    found = []
    for same in zip(*gathered(rows), strict=True):
        names = dict.fromkeys(name for row in same for name in row)
        values = {name: [row[name] for row in same if name in row] for name in names}
        found.append({name: sum(each) / len(each) for name, each in values.items()})
    return found


def led_for(work: Callable[[], T], otherwise: T, helping: Callable[[Any], None] | None = None) -> T:
    """As `led`, where the others need no copy of the result: they get `otherwise`."""
    made: list[T] = []
    led(lambda: made.append(work()), helping)
    return made[0] if made else otherwise


def in_turn(parts: Iterable[T]) -> Iterator[T]:
    """What all processes make, handed to the leader: one item of each, in their order, then the next of each; the others get nothing.

    With items of batches that were dealt out in that way, the leader sees them in the order of a single process.
    """
    if count() == 1:
        yield from parts
        return
    import torch.distributed as dist

    left, world = chain(((True, part) for part in parts), repeat((False, None))), count()
    for item in left:
        if rank():
            dist.send_object_list([item], dst=0, group=_group)
        else:
            if item[0]:
                yield item[1]  # type: ignore[misc]
            for other in range(1, world):  # one after the other: outputs can be large
                held: list[Any] = [None]
                dist.recv_object_list(held, src=other, group=_group)
                there, part = held[0]
                if there:
                    yield part
        if not any_of(int(item[0])):
            return
