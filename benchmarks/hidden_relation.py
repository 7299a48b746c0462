"""The hidden relation loss with C×C matrices against the released arithmetic with N×N matrices, in one run.

Forward and backward of `compressvit.losses.hidden_relation`, form "cosine_mse", in float32 on the CPU. The defaults are
the first stage of Swin at 224²: 3136 tokens, widths 96 and 128. Reproduce with

    python benchmarks/hidden_relation.py

What is measured:

- time: median wall time of forward and backward, the two implementations taking turns. The load average is printed too:
  where other work shares the cores, threads wait for each other in every small product and the ratio shrinks, which
  `--threads 1` avoids;
- memory: the peak, over one forward and backward, of the bytes in all tensor storages that an operator created and that
  are still alive, gradient included and inputs excluded. A dispatch mode sees every operator below autograd; a storage
  counts from its creation until it is freed. Scratch space inside an operator (packing buffers of a matrix product) is
  not seen;
- RSS: a cross-check that sees everything, allocator slack too. In a fresh process, after a small warm-up and with the
  inputs in place, the peak resident memory above its level before the call (Linux only; elsewhere n/a);
- errors: of the value and of the gradient (by its norm) of both, relative to the N×N form in float64.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressvit.training.losses import hidden_relation

MIB = 2**20


def naive(student: Tensor, teacher: Tensor) -> Tensor:
    """The released arithmetic: (B, N, C) each, two relation matrices (B, N, N), mean squared difference, times 49."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher.detach(), dim=-1)
    return 49 * (student @ student.mT - teacher @ teacher.mT).square().mean()


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"naive": naive, "ours": hidden_relation}


@dataclass(frozen=True)
class Case:
    """Student width, teacher width, and for equal widths the noise that sets the student apart from the teacher."""

    student_width: int
    teacher_width: int
    noise: float | None = None

    @property
    def name(self) -> str:
        return f"{self.student_width}/{self.teacher_width}" + (f" ±{self.noise:g}" if self.noise else "")

    def tensors(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(batch, tokens, self.teacher_width, generator=generator)
        student = torch.randn(batch, tokens, self.student_width, generator=generator)
        if self.noise is not None:
            student = teacher + self.noise * student
        return student.requires_grad_(), teacher


CASES = (Case(96, 128), Case(96, 96), Case(96, 96, noise=1e-4))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created under it; `peak` is the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # A view or an in-place result shares an input's storage: nothing was allocated.
                if storage._cdata not in self._known | inputs:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def exact(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of the N×N form in float64, one image at a time to stay within memory."""
    images = [
        value_and_gradient(naive, image[None].detach().double().requires_grad_(), target[None].double())
        for image, target in zip(student, teacher, strict=True)
    ]
    values, gradients = zip(*images, strict=True)
    return torch.stack(values).mean(), torch.cat(gradients) / len(images)


def relative_error(result: Tensor, reference: Tensor) -> float:
    return ((result.double() - reference).norm() / reference.norm()).item()


def value_and_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def peak_live_bytes(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> int:
    with LiveBytes() as counter:
        value_and_gradient(loss, student, teacher)
    return counter.peak


def peak_resident_bytes(implementation: str, case: Case, batch: int, tokens: int, threads: int) -> int | None:
    """To be called in a fresh process: None where the kernel offers no resettable high-water mark."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    torch.set_num_threads(threads)
    loss = IMPLEMENTATIONS[implementation]
    value_and_gradient(loss, *case.tensors(1, 2 * case.teacher_width))
    student, teacher = case.tensors(batch, tokens)
    reset.write_text("5")
    before = _status_bytes("VmRSS")
    value_and_gradient(loss, student, teacher)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def measure(case: Case, batch: int, tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as fresh:
        arguments = [(name, case, batch, tokens, threads) for name in IMPLEMENTATIONS]
        resident = dict(zip(IMPLEMENTATIONS, fresh.starmap(peak_resident_bytes, arguments, chunksize=1), strict=True))

    student, teacher = case.tensors(batch, tokens)
    value, gradient = exact(student, teacher)
    value_errors, gradient_errors = {}, {}
    for name, loss in IMPLEMENTATIONS.items():
        its_value, its_gradient = value_and_gradient(loss, student, teacher)
        value_errors[name] = relative_error(its_value, value)
        gradient_errors[name] = relative_error(its_gradient, gradient)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(repeats):
        for name, loss in IMPLEMENTATIONS.items():
            start = time.perf_counter()
            value_and_gradient(loss, student, teacher)
            seconds[name].append(time.perf_counter() - start)
    return {
        "case": asdict(case),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "peak_live_bytes": {name: peak_live_bytes(loss, student, teacher) for name, loss in IMPLEMENTATIONS.items()},
        "peak_resident_bytes": resident,
        "value": value.item(),
        "value_error": value_errors,
        "gradient_error": gradient_errors,
    }


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def table_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for case, result in zip(CASES, results, strict=True):
        times, live, resident = result["seconds"], result["peak_live_bytes"], result["peak_resident_bytes"]
        faster = times["naive"] / times["ours"]
        yield (
            case.name,
            "time, ms",
            f"{1e3 * times['naive']:.0f}",
            f"{1e3 * times['ours']:.1f}",
            f"{faster:.1f}x faster",
        )
        for measure_name, peak in (("peak memory, MiB", live), ("peak RSS, MiB", resident)):
            if None in peak.values():
                yield case.name, measure_name, "n/a", "n/a", "n/a"
            else:
                share = f"{100 * peak['ours'] / peak['naive']:.1f}%"
                yield case.name, measure_name, f"{peak['naive'] / MIB:.1f}", f"{peak['ours'] / MIB:.1f}", share
        for measure_name in ("value_error", "gradient_error"):
            error = result[measure_name]
            yield case.name, measure_name.replace("_", " "), f"{error['naive']:.1e}", f"{error['ours']:.1e}", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=3136, help="tokens per image (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    results = [measure(case, **settings) for case in CASES]

    print(f"python benchmarks/hidden_relation.py {' '.join(f'--{key} {value}' for key, value in settings.items())}")
    print(f"torch {torch.__version__}, CPU, float32, forward + backward; widths are student/teacher, ± noise on a copy")
    print(f"load average before the start: {load} on {os.cpu_count()} CPUs\n")
    print_table([("widths", "measure", "naive", "ours", "ratio"), *table_rows(results)])
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"settings": settings, "torch": torch.__version__, "load_average": load, "rows": results}, indent=2
            )
        )


if __name__ == "__main__":
    main()
