"""Ablations of a paper's adapter on a few-shot task, a table for each thing that is varied.

On a frozen DINOv2 ViT-S/14, by the protocol of `few_shot_adapters.py`: for every cell the rate is chosen on 800 training images and
judged by 200, then every seed learns from all 1,000 and is tested on images that no choice was based on. A cell differs in one thing from
the paper's usual adapter, which is in every table.

- AdaptFormer, §4.3 and figure 4: the width of the bottleneck against prompts of VPT in every block (with `--picture` as a curve), the
  scale, the place (beside the MLP or after it) and the blocks that have one. Frames of clips are varied by `clips_by_time.py`.
- RepAdapter, figure 4: before or after attention, MLP or both, with an activation or without, the groups; and the scale.
- MiMi: adapters of half the width pruned to an eighth of their neurons, by the share that a cycle removes (one shot among them), the score
  and the scope, and adapters that have a half or a sixteenth of the width from the start. Every cell is trained for as many epochs, and
  has the rate that is best for the small adapters.

Prints the hours that it will take from the first cell; a finished run is not run again. Writes `table.md`.

    python benchmarks/few_shot_lists.py fashion_mnist --output few_shot/fashion_mnist --test 2000
    python benchmarks/adapter_ablations.py adaptformer --data few_shot/fashion_mnist --weights FILE --output runs/adaptformer --size 28
    python benchmarks/adapter_ablations.py adaptformer --output runs/adaptformer --table-only --picture curve.png
    python benchmarks/adapter_ablations.py repadapter --data few_shot/fashion_mnist --weights FILE --output runs/repadapter --size 28
    python benchmarks/adapter_ablations.py mimi --data few_shot/fashion_mnist --weights FILE --output runs/mimi --size 28 --epochs 36
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from few_shot_runs import FINAL, Task, add_task, task_of

from compressvit.charts import charts, drawing
from compressvit.errors import did_you_mean
from compressvit.files import write_text

Step = dict[str, Any]
Cells = Mapping[str, tuple[str, str, Step]]  # what a cell varies, what its row says, and the step; by name
WIDTHS, TOKENS = (1, 4, 16, 64, 256), (1, 4, 16, 64)
BLOCKS = {"first three": "0-2", "first six": "0-5", "last six": "6-11", "last three": "9-11"}
WIDTH, SCALE, FORM, SPAN, PROMPTS, ALONE = "width", "scale", "form", "blocks", "prompts of VPT", "neither"
POSITION, PLACE, ACT, GROUPS = "position", "place", "act", "groups"
RATE, SCORE, SCOPE, DIRECT = "rate", "score", "scope", "trained at its size"
LEFT = 0.125  # of the neurons of MiMi's adapters
LINEAR: dict[str, tuple[str, str, Step]] = {"linear": (ALONE, "classifier alone", {"freeze": {"train": "head"}})}


def adaptformer(**options: Any) -> Step:
    """The step with the paper's values but for some."""
    return {"adaptformer": {"width": 64, "scale": 0.1, **options}}


def repadapter(**options: Any) -> Step:
    """The step with the paper's values but for some, and a scale of its grid."""
    return {"repadapter": {"width": 8, "groups": 2, "scale": 1.0, "place": "block", "position": "before", **options}}


def mimi(**options: Any) -> Step:
    """Adapters of half of DINOv2 ViT-S/14's width, and how they are pruned: as the paper does but for some options."""
    pruned = {"target": {"neurons": LEFT}, "rate": 0.5, "score": "magnitude", "scope": "global", **options}
    return {"adapters": {"width": 192}, "prune": pruned}


ADAPTFORMER: Cells = {
    **LINEAR,
    **{f"width_{width}": (WIDTH, str(width), adaptformer(width=width)) for width in WIDTHS},
    **{f"vpt_{count}": (PROMPTS, str(count), {"vpt": {"prompts": count}}) for count in TOKENS},
    **{f"scale_{scale:g}": (SCALE, f"{scale:g}", adaptformer(scale=scale)) for scale in (0.01, 0.05, 0.2, 0.5, 1.0)},
    "serial": (FORM, "after the MLP", adaptformer(form="serial")),
    **{f"blocks_{span}": (SPAN, words, adaptformer(blocks=[span])) for words, span in BLOCKS.items()},
}
REPADAPTER: Cells = {
    **LINEAR,
    "groups_2": (GROUPS, "2", repadapter()),
    "groups_1": (GROUPS, "1", repadapter(groups=1)),
    "groups_4": (GROUPS, "4", repadapter(groups=4)),
    "attention": (PLACE, "before attention", repadapter(place="attention")),
    "mlp": (PLACE, "before the MLP", repadapter(place="mlp")),
    "after": (POSITION, "after attention and MLP", repadapter(position="after")),
    "after_attention": (f"{PLACE}, {POSITION}", "after attention", repadapter(place="attention", position="after")),
    "after_mlp": (f"{PLACE}, {POSITION}", "after the MLP", repadapter(place="mlp", position="after")),
    **{act: (ACT, act.upper(), repadapter(act=act)) for act in ("relu", "gelu")},
    **{f"scale_{scale:g}": (SCALE, f"{scale:g}", repadapter(scale=scale)) for scale in (0.1, 0.5, 5.0, 10.0)},
}
MIMI: Cells = {
    "small": (DIRECT, "1/16 of the width", {"adapters": {"width": 24}}),
    "large": (DIRECT, "half of the width", {"adapters": {"width": 192}}),
    "rate_0.5": (RATE, "0.5", mimi()),
    "rate_0.25": (RATE, "0.25", mimi(rate=0.25)),
    "rate_0.75": (RATE, "0.75", mimi(rate=0.75)),
    "one_shot": (RATE, "0.875 (one shot)", mimi(rate=1 - LEFT)),
    "local": (SCOPE, "local", mimi(scope="local")),
    **{
        f"score_{score}": (SCORE, score, mimi(score=score))
        for score in ("sum", "shape", "relative", "down", "gradient", "taylor", "activation", "random")
    },
}
PAPERS: dict[str, Cells] = {"adaptformer": ADAPTFORMER, "repadapter": REPADAPTER, "mimi": MIMI}
USUAL = {"adaptformer": "width_64", "repadapter": "groups_2", "mimi": "rate_0.5"}  # what the other cells differ from


def removals(options: Mapping[str, Any]) -> int:
    """How often neurons are removed until the target is reached."""
    return math.ceil(round(math.log(options["target"]["neurons"]) / math.log(1 - options["rate"]), 9))


def steps_of(step: Step, rate: float, task: Task) -> list[dict[str, Any]]:
    """The steps of a run: the adapters, and their training, with removals in between where they are pruned."""
    if (options := step.get("prune")) is None:
        return [step, {"finetune": task.training(rate)}]
    each = task.epochs // (1 + removals(options))
    if each < 1 or each * (1 + removals(options)) != task.epochs:
        raise SystemExit(f"--epochs {task.epochs} do not divide by {1 + removals(options)} trainings; give e.g. 36")
    return [{"adapters": step["adapters"]}, {"prune": {**task.training(rate, each), **options}}]


def results(output: Path, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The students of the finished final runs of a cell."""
    files = [output / f"final/{name}_seed{seed}" / "results.json" for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8"))["student"] for file in files if file.is_file()]


def table(paper: str, output: Path, seeds: Sequence[int]) -> str:
    """What is finished, in Markdown: a row for every cell, by what it varies."""
    lines = ["| varied | | trained | top-1, mean (each seed) |", "| --- | --- | --- | --- |"]
    for name, (varied, text, _) in PAPERS[paper].items():
        found = results(output, name, seeds)
        if found:
            scores = [student["top1"] for student in found]
            each = ", ".join(f"{score:.2f}" for score in scores)
            usual = " (usual)" if name == USUAL[paper] else ""
            lines.append(
                f"| {varied} | {text}{usual} | {found[0]['trained_adapter']:,} | {statistics.mean(scores):.2f} ({each}) |"
            )
    return "\n".join([*lines, ""])


def curve(output: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Points of AdaptFormer's figure: `method`, `trained` parameters without the classifier, `top1` and the deviation of its seeds."""
    points = []
    for name, (varied, _, _) in ADAPTFORMER.items():
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


def train(task: Task, paper: str, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Choose a rate for every cell, then run its seeds."""
    started, first = time.time(), True
    for name in names:
        step = PAPERS[paper][name][2]
        of = "small" if paper == "mimi" else name
        rate = task.choose(of, [PAPERS[paper][of][2]]).rate
        for seed in seeds:
            task.cell(f"final/{name}_seed{seed}", steps_of(step, rate, task), seed, FINAL)
        if first:
            each = (time.time() - started) / 3600
            print(f"about {each * len(names):.1f} hours in all, as long as the first cell for each", flush=True)
            first = False
        write_text(task.output / "table.md", table(paper, task.output, seeds))


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=PAPERS)
    add_task(parser)
    names = "; ".join(f"{paper}: {', '.join(cells)}" for paper, cells in PAPERS.items())
    parser.add_argument("--cells", nargs="+", metavar="CELL", help=f"all, or some of {names}")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the curve, as PNG")
    arguments = parser.parse_args()
    cells = PAPERS[arguments.paper]
    if unknown := [name for name in arguments.cells or () if name not in cells]:
        parser.error(f"{arguments.paper} has no cell {unknown[0]}; {did_you_mean(unknown[0], cells)}")
    if arguments.picture and arguments.paper != "adaptformer":
        parser.error("--picture draws widths of AdaptFormer against prompts of VPT; leave it out")
    if arguments.table_only and not arguments.output:
        parser.error("give --output")
    if not arguments.table_only:
        train(task_of(parser, arguments), arguments.paper, arguments.cells or list(cells), arguments.seeds)
    print(table(arguments.paper, arguments.output, arguments.seeds))
    if arguments.picture:
        picture(curve(arguments.output, arguments.seeds), arguments.picture)


if __name__ == "__main__":
    main()
