"""AdaptFormer's ablations on a few-shot task, and its central figure: prompts of VPT against widths of adapters (§4.3 and figure 4).

On a frozen DINOv2 ViT-S/14, by the protocol of `few_shot_adapters.py`: for every cell the rate is chosen on 800 training images and
judged by 200, then every seed learns from all 1,000 and is tested on images that no choice was based on. A cell is another width of the
bottleneck, its scale, its place (beside the MLP, or after it), the blocks that have one, or another number of prompts in every block;
everything else is the paper's (width 64, scale 0.1, parallel, all blocks). Prints the hours that it will take from the first run; a
finished run is not run again. Writes `table.md`, and with `--picture` the curve.

    python benchmarks/few_shot_lists.py fashion_mnist --output few_shot/fashion_mnist --test 2000
    python benchmarks/adaptformer_ablation.py --data few_shot/fashion_mnist --weights FILE --output runs/adaptformer --size 28
    python benchmarks/adaptformer_ablation.py --output runs/adaptformer --table-only --picture curve.png

Frames of clips are varied by `clips_by_time.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from few_shot_runs import FINAL, Task, add_task, task_of

from compressvit.charts import charts, drawing
from compressvit.files import write_text

Cell = dict[str, Any]
WIDTHS, TOKENS = (1, 4, 16, 64, 256), (1, 4, 16, 64)
SCALES = (0.01, 0.05, 0.2, 0.5, 1.0)
BLOCKS = {"first three": "0-2", "first six": "0-5", "last six": "6-11", "last three": "9-11"}
WIDTH, SCALE, FORM, PLACE, PROMPTS, ALONE = "width", "scale", "form", "blocks", "prompts of VPT", "neither"


def adaptformer(**options: Any) -> Cell:
    """The step with the paper's values but for some."""
    return {"adaptformer": {"width": 64, "scale": 0.1, **options}}


# What it varies, what the row says, and the step; by name.
CELLS: dict[str, tuple[str, str, Cell]] = {
    "linear": (ALONE, "classifier alone", {"freeze": {"train": "head"}}),
    **{f"width_{width}": (WIDTH, str(width), adaptformer(width=width)) for width in WIDTHS},
    **{f"vpt_{count}": (PROMPTS, str(count), {"vpt": {"prompts": count}}) for count in TOKENS},
    **{f"scale_{scale:g}": (SCALE, f"{scale:g}", adaptformer(scale=scale)) for scale in SCALES},
    "serial": (FORM, "after the MLP", adaptformer(form="serial")),
    **{f"blocks_{span}": (PLACE, words, adaptformer(blocks=[span])) for words, span in BLOCKS.items()},
}
USUAL = "width_64"  # what cells of other tables are compared with


def results(output: Path, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The students of the finished final runs of a cell."""
    files = [output / f"final/{name}_seed{seed}" / "results.json" for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8"))["student"] for file in files if file.is_file()]


def table(output: Path, seeds: Sequence[int]) -> str:
    """What is finished, in Markdown: a row for every cell, by what it varies."""
    lines = ["| varied | | trained | top-1, mean (each seed) |", "| --- | --- | --- | --- |"]
    for name, (varied, text, _) in CELLS.items():
        found = results(output, name, seeds)
        if found:
            scores = [student["top1"] for student in found]
            each = ", ".join(f"{score:.2f}" for score in scores)
            usual = " (usual)" if name == USUAL else ""
            lines.append(
                f"| {varied} | {text}{usual} | {found[0]['trained_adapter']:,} | {statistics.mean(scores):.2f} ({each}) |"
            )
    return "\n".join([*lines, ""])


def curve(output: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Points of the figure: `method`, `trained` parameters without the classifier, `top1` and the deviation of its seeds."""
    points = []
    for name, (varied, _, _) in CELLS.items():
        found = results(output, name, seeds)
        if found and varied in (WIDTH, PROMPTS):
            scores = [student["top1"] for student in found]
            method = "AdaptFormer" if varied == WIDTH else "VPT"
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            top1 = statistics.mean(scores)
            points.append({"method": method, "trained": found[0]["trained_adapter"], "top1": top1, "deviation": spread})
    return points


def picture(found: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the curve; a bar is a standard deviation of the seeds to either side."""
    titles = {"trained": "trained parameters, without the classifier", "top1": "top-1 (%)", "method": "method"}
    chart = charts.points(
        list(found),
        x="trained",
        y="top1",
        colour="method",
        titles=titles,
        error="deviation",
        joined=True,
        scales={"trained": "log"},
    )
    drawing.save(chart, file)


def train(task: Task, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Choose a rate for every cell, then run its seeds."""
    started, first = time.time(), True
    for name in names:
        chosen = task.choose(name, [CELLS[name][2]])
        for seed in seeds:
            task.cell(
                f"final/{name}_seed{seed}", [*chosen.steps, {"finetune": task.training(chosen.rate)}], seed, FINAL
            )
        if first:
            each = (time.time() - started) / 3600
            print(f"about {each * len(names):.1f} hours in all, as long as the first cell for each", flush=True)
            first = False
        write_text(task.output / "table.md", table(task.output, seeds))


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_task(parser)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the curve, as PNG")
    arguments = parser.parse_args()
    if arguments.table_only and not arguments.output:
        parser.error("give --output")
    if not arguments.table_only:
        train(task_of(parser, arguments), arguments.cells, arguments.seeds)
    print(table(arguments.output, arguments.seeds))
    if arguments.picture:
        picture(curve(arguments.output, arguments.seeds), arguments.picture)


if __name__ == "__main__":
    main()
