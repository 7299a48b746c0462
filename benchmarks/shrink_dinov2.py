"""DINOv2 ViT-S/14 made smaller without training: all methods together at 75, 50 and 30 %, each alone and in pairs, and those of others.

Every cell is a student that is fitted to crops of train/ and judged on those of val/: cosine of the class token and of the patch tokens
with the teacher's, recall in the teacher's index, k-NN accuracy (k 20, T 0.07) on labelled sets at a smaller size, parameters, MACs,
CPU seconds and minutes of the fit, and latency in turns with the teacher. A finished cell is a JSON file and is not made again, so the
program can be stopped and started; `--hours` ends it before the first cell that would exceed them. Cells of Torch-Pruning need its package
(`pip install torch-pruning`), and are passed over without it.

    python benchmarks/shrink_dinov2.py --data crops --weights FILE --output runs/shrink_dinov2 --hours 8
    python benchmarks/shrink_dinov2.py --output runs/shrink_dinov2 --table-only
    python benchmarks/shrink_dinov2.py --list
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from resumable import finished, require_same, run
from shrink_cells import CELLS, TABLES, Cell, in_table
from shrink_measures import BATCHES, CPU, Judge, labelled_set, mean_and_interval, of_program, recall
from shrink_peers import PEERS
from torch import nn

from compressvit.data.input import input_config
from compressvit.data.loaders import calibration_batches
from compressvit.errors import UserError
from compressvit.files import write_text
from compressvit.transforms.applying import transform_

MODEL = "vit_small_patch14_dinov2"
KNN = ("fashion_mnist", "digits")
LATENCIES = [f"latency, {size} image{'s' * (size > 1)}" for size in BATCHES]


# ------------------------------------------------------------------------------------------------------------ students


def student_of(
    cell: Cell, teacher: nn.Module, images: Callable[[], Any]
) -> tuple[nn.Module, dict[str, float], str | None]:
    """The student of a cell, what its fit took, and why it is not as small as was asked, if it is not."""
    started, spent = time.perf_counter(), time.process_time()
    note = None
    if cell.peer is not None:
        student = PEERS[cell.peer](teacher, images)
    else:
        try:
            student = made(cell.step, teacher, images, cell.tokens)
        except UserError as error:
            if cell.smallest is None or "cannot be met" not in str(error):
                raise
            note = str(error)
            started, spent = time.perf_counter(), time.process_time()
            student = made(cell.smallest, teacher, images, cell.tokens)
    took = {"minutes": (time.perf_counter() - started) / 60, "cpu_seconds": time.process_time() - spent}
    return student.eval(), took, note


def made(step: Any, teacher: nn.Module, images: Callable[[], Any], tokens: int | None) -> nn.Module:
    """A copy of the teacher with this step."""
    student = copy.deepcopy(teacher)
    transform_(student, [step], images, tokens=tokens)
    return student


class Benchmark:
    """The cells of one teacher on one folder of crops.

    Args:
        arguments: of the program.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.output: Path = arguments.output
        self.teacher, self.data, self.datasets, settings = of_program(arguments)
        sets = [labelled_set(name, arguments.knn_images) for name in arguments.knn]
        self.judge = Judge(self.teacher, self.data, sets, arguments.knn_size, arguments.rounds)
        require_same(self.output, settings | {"knn": [*arguments.knn, arguments.knn_images, arguments.knn_size]})

    def crops_of(self, name: str) -> int:
        """How many crops the student of a cell is fitted to: all there are, if these are fewer."""
        there, wanted = len(self.datasets.train), CELLS[name].crops
        return there if wanted is None else min(wanted, there)

    def run(self, name: str) -> dict[str, Any]:
        """Make and judge the student of a cell."""
        cell, crops = CELLS[name], self.crops_of(name)
        config = input_config(self.teacher, self.data)
        images = partial(calibration_batches, self.datasets, self.data, config, CPU, images=crops, seed=cell.seed)
        student, took, note = student_of(cell, self.teacher, images)
        return {"cell": name, "crops": crops, "note": note, "fit": took, **self.judge.figures(student)}

    def words(self, content: Mapping[str, Any]) -> str:
        """Its cosines."""
        class_token, patches = (mean_and_interval(content[key])[0] for key in ("class_token", "patches"))
        return f"class token {class_token:.4f}, patches {patches:.4f}"

    def write_tables(self) -> None:
        """Of what is finished."""
        write_tables(self.output)


# -------------------------------------------------------------------------------------------------------------- tables


def tables(done: Mapping[str, Mapping[str, Any]]) -> str:
    """The finished cells in Markdown."""
    parts = []
    for name, title in TABLES.items():
        rows = [key for key in in_table(name) if key in done]
        if not rows:
            continue
        sets = list(done[rows[0]]["knn"])
        heads = ["", "crops", "parameters", "MACs", "class token", "patches", "recall@1", "recall@10"]
        heads += [f"k-NN {one.replace('_', '-')}" for one in sets]
        heads += ["CPU s", "minutes", *LATENCIES]
        lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        lines += [_row(key, done[key], sets) for key in rows]
        lines += ["", *_notes([done[key] for key in rows], rows)]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _row(name: str, content: Mapping[str, Any], sets: Sequence[str]) -> str:
    columns = [CELLS[name].text + (" †" if content["note"] else ""), f"{content['crops']:,}", *shares(content)]
    columns += [with_interval(mean_and_interval(content[key]), 4) for key in ("class_token", "patches")]
    columns += [
        "–" if (found := recall(content["recall"], depth)) is None else with_interval(found, 1) for depth in (1, 10)
    ]
    columns += [accuracy(content["knn"][one], content["knn_of_teacher"][one]) for one in sets]
    columns += [f"{content['fit']['cpu_seconds']:.0f}", f"{content['fit']['minutes']:.1f}"]
    columns += ratios(content)
    return f"| {' | '.join(columns)} |"


def shares(content: Mapping[str, Any]) -> list[str]:
    """Of the teacher's parameters and multiply-accumulates."""
    own, whole = content["costs"], content["costs_of_teacher"]
    return [f"{100 * own[unit] / whole[unit]:.1f} %" for unit in ("parameters", "macs")]


def ratios(content: Mapping[str, Any]) -> list[str]:
    """Of latency, by the images in a batch."""
    found = (content["latency"][str(size)]["ratio"] for size in BATCHES)
    return [with_interval((middle, low, high), 2) for low, middle, high in found]


def with_interval(found: Sequence[float], digits: int) -> str:
    """A figure and the ends of its interval."""
    middle, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} ({low}–{high})"


def accuracy(own: Sequence[bool], of_teacher: Sequence[bool]) -> str:
    """In percent, and its difference from the teacher's with an interval over the same images."""
    less, low, high = mean_and_interval([ours - theirs for ours, theirs in zip(own, of_teacher, strict=True)])
    return f"{100 * sum(own) / len(own):.2f} ({100 * less:+.2f}; {100 * low:+.2f} to {100 * high:+.2f})"


def _notes(contents: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> list[str]:
    """What the numbers of a table are, and which students are not as small as was asked."""
    first = contents[0]
    teachers = ", ".join(
        f"{name} {100 * sum(right) / len(right):.2f} %" for name, right in first["knn_of_teacher"].items()
    )
    threads = sorted({content["threads"] for content in contents})
    lines = [
        f"{first['recall']['images']} held-out crops. In brackets 95 % intervals over images; of k-NN accuracy in percent the difference "
        f"from the teacher's ({teachers}) and its interval; of latency, as a part of the teacher's measured in turns on "
        f"{', '.join(map(str, threads))} threads, the 99 % interval of the median. CPU seconds and minutes are those of the fit."
    ]
    for name, content in zip(rows, contents, strict=True):
        if content["note"]:
            lines += ["", f"† {CELLS[name].text}: {content['note']}. It is the smallest that it reaches."]
    return [*lines, ""]


def write_tables(output: Path) -> str:
    """Write `table.md` of what is finished."""
    text = tables(finished(output, CELLS))
    write_text(output / "table.md", text)
    return text


# ------------------------------------------------------------------------------------------------------------- program


def main(given: Sequence[str] | None = None) -> None:
    """Make, judge, and write tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder with train/ and val/, as crop_photographs.py makes it")
    parser.add_argument("--weights", help="a file of the teacher, in timm's or its own names")
    parser.add_argument("--model", default=MODEL, help="timm's name of the teacher")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops for the models")
    parser.add_argument("--output", type=Path, default=Path("runs/shrink_dinov2"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="in this order")
    parser.add_argument("--hours", type=float, default=10.0, help="end before the cell that would exceed them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--knn", nargs="*", default=KNN, help="labelled sets")
    parser.add_argument("--knn-images", type=int, default=2000, help="test images of each at most")
    parser.add_argument("--knn-size", type=int, default=112, help="height and width of their images for the models")
    parser.add_argument("--rounds", type=int, default=30, help="of latency")
    parser.add_argument(
        "--table-only", action="store_true", help="write the tables of what is finished and run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the cells and run nothing")
    arguments = parser.parse_args(given)
    if arguments.list:
        print("\n".join(f"{name:24} {cell.table}: {cell.text}" for name, cell in CELLS.items()))
        return
    if arguments.table_only:
        print(write_tables(arguments.output))
        return
    if not (arguments.data and arguments.weights):
        parser.error("give --data and --weights")
    torch.set_num_threads(arguments.threads)
    try:
        run(Benchmark(arguments), list(dict.fromkeys(arguments.cells)), arguments.hours)
    except UserError as error:
        parser.error(str(error))
    print(write_tables(arguments.output))


if __name__ == "__main__":
    main()
