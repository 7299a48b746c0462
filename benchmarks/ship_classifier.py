"""A classifier as it is shipped: a teacher and students that `compressvit shrink` made of it, each in float32, and in int8 with ranges of
every batch and with measured ones, for onnxruntime and OpenVINO.

Of every file: bytes, also as a part of those that the plan of the run says of the artifact; accuracy on the held-out images with its 95 %
interval; how often its class is the teacher's; and latency in its runtime, all files in turns. It writes table.md, and table.json.

    python benchmarks/ship_classifier.py --teacher ARTIFACT --students RUN RUN --data FOLDER --output runs/ship_classifier
"""

from __future__ import annotations

import argparse
import itertools
import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shrink_dinov2 import with_interval
from shrink_measures import CPU

import compressvit
from compressvit.artifacts.formats.base import FORMATS
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import write_json, write_text
from compressvit.model import cost
from compressvit.model.stored import read_manifest
from compressvit.runs.evaluate import artifact_in
from compressvit.runs.folder import RunFolder
from compressvit.tasks.qualities import qualities
from compressvit.training.evaluate import evaluate

PRECISIONS = ("fp32", "int8", "int8-static")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Export and measure every file; the teacher's in float32 is the first."""
    data = Data(name="folder", root=arguments.data)
    folders = [artifact_in(path) for path in (arguments.teacher, *arguments.students)]
    plans = [_plan(path) for path in arguments.students]
    planned = [plans[0].teacher.bytes, *(plan.student.bytes for plan in plans)]
    found: list[dict[str, Any]] = []
    for i, (folder, size) in enumerate(zip(folders, planned, strict=True)):
        share = read_manifest(folder).parameters / read_manifest(folders[0]).parameters
        name = f"{100 * share:.1f} % of the parameters" if i else "teacher"
        for to, precision in itertools.product(arguments.to, PRECISIONS):
            if precision not in FORMATS[to].precisions:
                continue
            told = compressvit.export(
                folder,
                to,
                arguments.output / f"{i}_{precision}{FORMATS[to].suffix}",
                precision=precision,
                overwrite=True,
                overrides=["data.name=folder", f"data.root={arguments.data}"],
                images=arguments.images if precision == "int8-static" else None,
            )
            row = {"name": f"{name}, {to}, {precision}", "bytes": told["exported_bytes"], "planned": size}
            print(f"{row['name']}: {told['agreement_text']}", flush=True)
            found.append({**row, "to": to, "file": told["written"]})
    sides = [FORMATS[row["to"]].read(Path(row["file"])).side for row in found]
    datasets = open_data(data)
    teachers: list[int] = []
    for row, side in zip(found, sides, strict=True):
        classes: list[int] = []
        watch = partial(_classes, classes)
        row.update(evaluate(side, eval_loader(datasets, data, side.input, CPU), CPU, watch=watch))
        teachers = teachers or classes
        row["agreement"] = 100 * sum(map(operator.eq, classes, teachers)) / len(classes)
        row["interval"] = qualities()["top1"].interval(row["top1"], row["images"])
        print(f"{row['name']}: {row['top1']:.2f} %, as the teacher {row['agreement']:.2f} %", flush=True)
    models, sizes = [side.model for side in sides], [side.input.size for side in sides]
    times = cost.latencies(models, sizes, device=CPU, rounds=arguments.rounds, seconds=600)
    for i, row in enumerate(found):
        row |= {"latency_ms": times.medians[i], "latency_ratio": times.ratio(i)}
    return found


def _classes(found: list[int], images: torch.Tensor, targets: Any, outputs: torch.Tensor, expected: Any) -> None:
    found += outputs.argmax(dim=1).tolist()


def _plan(path: Path) -> Any:
    plan = RunFolder(path).plan()
    if plan is None:
        raise UserError(f"--students {path} is no folder of a run with a plan")
    return plan


def table(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    heads = ["", "file", "of the planned bytes", "accuracy", "as the teacher", "latency"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in found:
        low, middle, high = row["latency_ratio"]
        columns = [row["name"], f"{row['bytes'] / 1e6:.1f} MB", f"{row['bytes'] / row['planned']:.3f}"]
        columns += [with_interval((row["top1"], *row["interval"]), 1), f"{row['agreement']:.1f}"]
        lines.append(f"| {' | '.join([*columns, with_interval((middle, low, high), 2)])} |")
    first = found[0]
    text = (
        f"Percent, of {first['images']:,} images; in brackets Wilson's 95 % interval. Latency of one image with {cost.threads_text()}, "
        f"as a part of the first row's {first['latency_ms']:.1f} ms; in brackets the 99 % interval of the median ratio."
    )
    return "\n".join([*lines, "", text, ""])


def main(given: Sequence[str] | None = None) -> None:
    """Export, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="its artifact")
    parser.add_argument(
        "--students", type=Path, required=True, nargs="+", metavar="RUN", help="of `compressvit shrink`"
    )
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, and a folder per class in each")
    parser.add_argument(
        "--to", nargs="+", choices=("onnx", "openvino"), default=["onnx"], help="the first is compared with"
    )
    parser.add_argument("--images", type=int, default=256, help="of train/ that ranges are measured on")
    parser.add_argument("--output", type=Path, default=Path("runs/ship_classifier"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="of latency")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    try:
        found = rows(arguments)
    except UserError as error:
        parser.error(str(error))
    write_json(arguments.output / "table.json", found)
    write_text(arguments.output / "table.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
