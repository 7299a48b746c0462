"""Latency of students where they run: in PyTorch, compiled, as a program of `torch.export`, and as files of ONNX and OpenVINO.

A ViT and students of it that differ in what makes them small: fewer neurons and head dimensions (`narrow`), low rank in two factors and
pivoted, shared blocks with mixes of heads (`multiplex`), shared and private terms (`lors`), an adapter as it is and merged. Weights are
random, mixes are moved off the identity, where they would be left out, and nothing is fitted: times do not depend on values. In every
runtime all models take turns in one process, and a ratio is to the teacher in the same runtime, of one round; the median of the ratios is
printed with its 99 % interval. The teacher's own row is its latency in each runtime as a part of that in PyTorch.

    python benchmarks/runtimes.py --threads 1
    python benchmarks/runtimes.py --threads 1 --runtimes eager onnx --batch 16 --students 'low rank, pivoted' multiplex

Runtimes whose packages are missing are passed over: `pip install -e '.[onnx,openvino]'`; compiling needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from shrink_dinov2 import with_interval
from shrink_measures import CPU
from torch import nn

import compressvit
from compressvit import LORS, LowRank, Multiplex, Narrow, RepAdapter, UserError, compress
from compressvit.artifacts.formats.base import FORMATS
from compressvit.log import log
from compressvit.model import cost

PLAIN = {"metric": "weights"}


def _factors(pivoted: bool) -> Any:
    return LowRank(budget={"macs": 0.5}, pivoted=pivoted, sequential=False, **PLAIN)


STUDENTS: dict[str, tuple[Any, ...]] = {
    "narrow": (Narrow(neurons=0.5, head_dim=0.5),),
    "low rank, two factors": (_factors(False),),
    "low rank, pivoted": (_factors(True),),
    "multiplex": (Multiplex(share=2, mlp_conv=0),),
    "multiplex, convolution": (Multiplex(share=2, mlp_conv=7),),
    "lors": (LORS(share=2, rank=16, **PLAIN),),
    "repadapter": (RepAdapter(width=8),),
}
MERGED = "repadapter, merged"
RUNTIMES = ("eager", "compiled", "pt2", "onnx", "openvino")


def moved(model: nn.Module) -> nn.Module:
    """With every parameter that starts as an identity or as zero somewhere else."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def models(architecture: str, names: Sequence[str], images: torch.Tensor) -> dict[str, nn.Module]:
    """The teacher and its students, by name."""
    torch.manual_seed(0)
    teacher = timm.create_model(architecture).eval()
    seen = [torch.randn(16, *images.shape[1:])]  # by a fit, which asks for several
    found = {"teacher": teacher}
    for name in names:
        student = moved(compress(teacher, list(STUDENTS[name]), calibration=seen))
        found[name] = student
        if name == "repadapter":
            found[MERGED] = compressvit.merge(student).eval()
    return found


def opened(runtime: str, model: nn.Module, folder: Path) -> Callable[[torch.Tensor], Any]:
    """A model as a function of images in a runtime.

    Raises:
        UserError: a package is missing, or the runtime does not take the model.
    """
    if runtime == "eager":
        return model
    if runtime == "compiled":
        return torch.compile(model, dynamic=False)
    form = FORMATS[runtime]
    form.require("fp32", None)
    artifact = folder / "artifact"
    compressvit.save(model, artifact)
    told = compressvit.export(artifact, runtime, folder / f"model{form.suffix}", overwrite=True)
    return form.read(Path(told["written"])).side.model


def measured(
    runtime: str, given: dict[str, nn.Module], images: torch.Tensor, rounds: int
) -> tuple[dict[str, tuple[float, float, float]], float]:
    """The ratio of every model to the teacher in a runtime, between the ends of its interval, and the teacher's milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        calls, names = [], []
        for number, (name, model) in enumerate(given.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            try:
                call = opened(runtime, model, place)
                with torch.inference_mode():
                    call(images)
            except UserError as error:
                if not number:
                    raise
                log.warning("%s in %s: %s", name, runtime, error)
                continue
            names.append(name)
            calls.append(lambda call=call: call(images))
        with torch.inference_mode():
            times = cost.in_turns(calls, device=CPU, rounds=rounds, seconds=900)
    return {name: times.ratio(i) for i, name in enumerate(names)}, times.medians[0]


def table(found: dict[str, tuple[dict[str, Any], float]], names: Sequence[str]) -> str:
    """In Markdown, a column for each runtime."""
    lines = [f"| | {' | '.join(found)} |", f"|{' --- |' * (len(found) + 1)}"]
    base = next(iter(found.values()))[1]
    teacher = [f"{milliseconds:.1f} ms ({milliseconds / base:.2f})" for _, milliseconds in found.values()]
    lines.append(f"| teacher | {' | '.join(teacher)} |")
    for name in names[1:]:
        ratios = [each.get(name) for each, _ in found.values()]
        columns = ["–" if r is None else with_interval((r[1], r[0], r[2]), 2) for r in ratios]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join([*lines, ""])


def main(given: Sequence[str] | None = None) -> None:
    """Measure in every runtime, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name of the teacher (%(default)s)")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), metavar="STUDENT")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), metavar="RUNTIME")
    parser.add_argument("--batch", type=int, default=1, help="images at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    size = timm.create_model(arguments.model, pretrained=False).default_cfg["input_size"]
    images = torch.randn(arguments.batch, *size, generator=torch.Generator().manual_seed(0))
    made = models(arguments.model, arguments.students, images)
    found: dict[str, tuple[dict[str, Any], float]] = {}
    for runtime in arguments.runtimes:
        try:
            found[runtime] = measured(runtime, made, images, arguments.rounds)
        except UserError as error:
            print(f"{runtime} is passed over: {error}")
            continue
        print(f"{runtime}: done", flush=True)
    print(f"one batch of {arguments.batch}, {cost.threads_text()}; ratios to the teacher in the same runtime\n")
    print(table(found, list(made)))


if __name__ == "__main__":
    main()
