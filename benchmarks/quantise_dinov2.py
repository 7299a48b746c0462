"""DINOv2 ViT-S/14 in few bits a weight: plainly rounded, with error feedback, within 13 and 10 MB, and made smaller first.

Every cell is a student that is fitted to crops of train/ without labels and judged on those of val/: bytes of its file as it is written,
cosine of the class token and of the patch tokens with the teacher's, and latency in turns with the teacher. A finished cell is a JSON file
and is not made again, so the program can be stopped and started.

    python benchmarks/quantise_dinov2.py --data crops --weights FILE --output runs/quantise_dinov2
    python benchmarks/quantise_dinov2.py --output runs/quantise_dinov2 --table-only
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from resumable import finished, require_same, run
from shrink_dinov2 import MODEL, shares, with_interval
from shrink_measures import CPU, Judge, costs, mean_and_interval, of_program
from torch import nn

import compressvit
from compressvit import Quantise, Shrink
from compressvit.data.input import input_config
from compressvit.data.loaders import calibration_batches
from compressvit.errors import UserError
from compressvit.files import write_text
from compressvit.fitting.reference import Reference
from compressvit.model import cost
from compressvit.model.backbone import input_size
from compressvit.model.header import TENSORS
from compressvit.transforms import Transform
from compressvit.transforms.applying import transform_

TOKENS = 48  # of each crop that are summed up, as `compressvit shrink` does
Steps = tuple[str, tuple[Transform, ...]]


def _megabytes(size: int, *before: Transform, text: str = "", **options: Any) -> Steps:
    return (
        f"{text}3 to 8 bits within {size} MB",
        (*before, Quantise(budget={"bytes": size * 1e6}, **options)),
    )


def _smaller(share: float) -> Shrink:
    return Shrink(budget={"parameters": share, "macs": share})


def _together(size: float, **others: float) -> tuple[Transform, ...]:
    """Structure and bits from one budget."""
    before = Shrink(budget={"bytes": size * 1e6, **others}, rounded=True)
    return before, Quantise(budget={"bytes": size * 1e6})


CELLS: dict[str, Steps] = {
    "int8_plain": ("8 bits, plainly rounded", (Quantise(bits=8, metric="weights"),)),
    "int4_plain": ("4 bits, plainly rounded", (Quantise(bits=4, metric="weights"),)),
    "int4": ("4 bits", (Quantise(bits=4),)),
    "int4_alone": ("4 bits, each layer as if the others were not rounded", (Quantise(bits=4, sequential=False),)),
    "int4_gptq": ("4 bits, scales and codes not improved in turns", (Quantise(bits=4, sweeps=0),)),
    "int3": ("3 bits", (Quantise(bits=3),)),
    "mb_13": _megabytes(13),
    "mb_10": _megabytes(10),
    "mb_8": _megabytes(8, choices=(2, 3, 4, 5, 6, 8)),
    "three_quarters_mb_10": _megabytes(10, _smaller(0.75), text="75 % of parameters and MACs, then "),
    "half_mb_8": _megabytes(8, _smaller(0.5), text="50 % of parameters and MACs, then "),
    "together_mb_10": ("structure and 3 to 8 bits chosen together within 10 MB", _together(10)),
    "together_mb_7": ("structure and 3 to 8 bits chosen together within 7 MB", _together(7)),
    "three_quarters_mb_7": _megabytes(7, _smaller(0.75), text="75 % of parameters and MACs, then "),
    "half_mb_7": _megabytes(7, _smaller(0.5), text="50 % of parameters and MACs, then "),
}


class Benchmark:
    """The cells of one teacher on one folder of crops.

    Args:
        arguments: of the program.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.output: Path = arguments.output
        self.teacher, self.data, self.datasets, settings = of_program(arguments)
        self.judge = Judge(self.teacher, self.data, [], arguments.size, arguments.rounds)
        self.crops = min(arguments.crops, len(self.datasets.train))
        config = input_config(self.teacher, self.data)
        images = partial(calibration_batches, self.datasets, self.data, config, CPU, images=self.crops, seed=0)
        self.reference = Reference(copy.deepcopy(self.teacher), images, TOKENS)  # is measured once for all cells
        require_same(self.output, settings | {"crops": [settings["crops"], self.crops]})

    def crops_of(self, name: str) -> int:
        """How many crops a student is fitted to."""
        return self.crops

    def run(self, name: str) -> dict[str, Any]:
        """Make and judge the student of a cell."""
        student = copy.deepcopy(self.teacher)
        started, spent = time.perf_counter(), time.process_time()
        transform_(student, CELLS[name][1], self.reference)
        took = {"minutes": (time.perf_counter() - started) / 60, "cpu_seconds": time.process_time() - spent}
        student, size = read_back(student)
        sizes = [input_size(self.teacher)] * 2
        times = cost.latencies([self.teacher, student], sizes, device=CPU, rounds=self.judge.rounds)
        return {
            "cell": name,
            "crops": self.crops,
            "fit": took,
            "bytes": size,
            **costs(student, self.teacher),
            **self.judge.nearness(student),
            "latency": times.ratio(1),
            "threads": torch.get_num_threads(),
        }

    def words(self, content: Mapping[str, Any]) -> str:
        """Its bytes and cosines."""
        class_token, patches = (mean_and_interval(content[key])[0] for key in ("class_token", "patches"))
        return f"{content['bytes'] / 1e6:.2f} MB, class token {class_token:.4f}, patches {patches:.4f}"

    def write_tables(self) -> None:
        """Of what is finished."""
        write_table(self.output)


def read_back(student: nn.Module) -> tuple[nn.Module, int]:
    """The student as its artifact is loaded, and the bytes of its file."""
    with TemporaryDirectory() as folder:
        path = compressvit.save(student.eval(), Path(folder) / "student")
        return compressvit.load(path), (path / TENSORS).stat().st_size


def write_table(output: Path) -> str:
    """Write `table.md` of what is finished."""
    done = finished(output, CELLS)
    heads = ["", "crops", "file", "parameters", "MACs", "class token", "patches", "CPU s", "latency, 1 image"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(_row(key, done[key]) for key in done), ""]
    text = "\n".join(lines)
    write_text(output / "table.md", text)
    return text


def _row(name: str, content: Mapping[str, Any]) -> str:
    text, steps = CELLS[name]
    crops = f"{content['crops']:,}" if any(step.needs_images for step in steps) else "–"
    columns = [text, crops, f"{content['bytes'] / 1e6:.2f} MB", *shares(content)]
    columns += [with_interval(mean_and_interval(content[key]), 4) for key in ("class_token", "patches")]
    low, middle, high = content["latency"]
    columns += [f"{content['fit']['cpu_seconds']:.0f}", with_interval((middle, low, high), 2)]
    return f"| {' | '.join(columns)} |"


def main(given: Sequence[str] | None = None) -> None:
    """Make, judge, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder with train/ and val/, as crop_photographs.py makes it")
    parser.add_argument("--weights", help="a file of the teacher, in timm's or its own names")
    parser.add_argument("--model", default=MODEL, help="timm's name of the teacher")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops for the models")
    parser.add_argument("--crops", type=int, default=320, help="for the fit")
    parser.add_argument("--output", type=Path, default=Path("runs/quantise_dinov2"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="in this order")
    parser.add_argument("--hours", type=float, default=10.0, help="end before the cell that would exceed them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="of latency")
    parser.add_argument("--table-only", action="store_true", help="write the table of what is finished and run nothing")
    arguments = parser.parse_args(given)
    if not arguments.table_only:
        if not (arguments.data and arguments.weights):
            parser.error("give --data and --weights")
        torch.set_num_threads(arguments.threads)
        try:
            run(Benchmark(arguments), list(dict.fromkeys(arguments.cells)), arguments.hours)
        except UserError as error:
            parser.error(str(error))
    print(write_table(arguments.output))


if __name__ == "__main__":
    main()
