"""How time and memory of a distillation step grow with the size of images, the batch, the depth, and the layer pairs.

    python benchmarks/growth.py --output runs/growth --threads 1

The student is a ViT-S/14 whose blocks share in pairs, its teacher the same ViT; one of the four numbers changes, and the others stay at
224², 2 images, 12 blocks, 3 pairs. A step is that of the training loop (both forward passes, all three losses, backward pass, clipping,
AdamW). Time is CPU time of the process, the median of the rounds; memory is the peak of the bytes of all tensors alive that operators
created, as in step_cost.py, without weights and moments. Beside them the same step with the prediction alone, in turns in the same rounds.
Weights are random. Writes `growth.md` (the table), `growth.json` and `growth.png`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import altair as alt
import timm
import torch
from hidden_relation import MIB
from step_cost import ALONE, Losses, begun, peak, step

from compressvit import Multiplex, compress
from compressvit.charts import drawing
from compressvit.files import write_json, write_text
from compressvit.training.phases.distill import Distill

MODEL, CLASSES = "vit_small_patch14_dinov2", 1000
TIME, MEMORY = "CPU time", "live tensors"


@dataclass(frozen=True)
class Setting:
    """What a step is of."""

    size: int = 224
    batch: int = 2
    depth: int = 12
    pairs: int = 3


@dataclass(frozen=True)
class Measured:
    """Of one setting: medians in seconds, peaks in bytes, with all three losses and with the prediction alone; ratios of rounds."""

    axis: str
    value: int
    seconds: float
    peak: int
    ratios: tuple[float, ...]
    alone_peak: int


AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "size": ("image size", (224, 378, 518)),
    "batch": ("batch", (1, 2, 4, 8)),
    "depth": ("blocks", (6, 12, 24)),
    "pairs": ("layer pairs", (1, 3, 6)),
}


def phase(setting: Setting, losses: Losses, folder: Path) -> Callable[[], None]:
    """A step of a phase, as a call."""
    torch.manual_seed(0)
    made = [timm.create_model(MODEL, img_size=setting.size, depth=setting.depth, num_classes=CLASSES) for _ in range(2)]
    student, teacher = compress(made[0], [Multiplex(share=2)]), made[1]
    last = [setting.depth * (i + 1) // setting.pairs - 1 for i in range(setting.pairs)]
    spec = Distill(losses=losses, layers=tuple((i, i) for i in last), lr=1e-6, clip_grad=5.0)
    trainer = begun(student, teacher, spec, setting.batch, folder)
    images = torch.randn(setting.batch, 3, setting.size, setting.size)
    return partial(step, trainer, images, torch.randint(CLASSES, (setting.batch,)))


def measured(axis: str, setting: Setting, rounds: int) -> Measured:
    """Both steps of a setting, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        calls = [phase(setting, losses, Path(folder)) for losses in (ALONE, {})]
    for call in calls:
        call()
    alone, whole = (peak(call) for call in calls)
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.process_time()
            calls[i]()
            seconds[i].append(time.process_time() - start)
    ratios = tuple(theirs / ours for ours, theirs in zip(*seconds, strict=True))
    return Measured(axis, getattr(setting, axis), statistics.median(seconds[1]), whole, ratios, alone)


def table(rows: Sequence[Measured]) -> str:
    """In Markdown: beside every figure its ratio to the smallest of its axis."""
    lines = [
        "| | CPU seconds of a step | live tensors at the peak | three losses / prediction alone: time | live tensors |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        first = next(other for other in rows if other.axis == row.axis)
        ratios = f"{statistics.median(row.ratios):.2f} ({min(row.ratios):.2f}–{max(row.ratios):.2f})"
        lines.append(
            f"| {AXES[row.axis][0]} {row.value} | {row.seconds:.2f} ({row.seconds / first.seconds:.2f}×) "
            f"| {row.peak / MIB:,.0f} MiB ({row.peak / first.peak:.2f}×) | {ratios} | {row.peak / row.alone_peak:.2f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Measured]) -> alt.HConcatChart:
    """A panel an axis: time and memory as multiples of those of its smallest value, and a dotted line where they would be in proportion."""
    panels = []
    for axis, (title, values) in AXES.items():
        own = [row for row in rows if row.axis == axis]
        points = [
            {"value": row.value, "times": figure, "what": what}
            for row in own
            for what, figure in (
                (TIME, row.seconds / own[0].seconds),
                (MEMORY, row.peak / own[0].peak),
                ("in proportion", row.value / own[0].value),
            )
        ]
        base = alt.Chart(alt.Data(values=points)).encode(
            x=alt.X("value:Q", title=title, axis=alt.Axis(values=list(values)), scale=alt.Scale(zero=False)),
            y=alt.Y("times:Q", title="times that of the smallest", scale=alt.Scale(zero=True)),
            color=alt.Color("what:N", title=None, sort=[TIME, MEMORY, "in proportion"]),
        )
        line = base.mark_line(point=True).transform_filter("datum.what != 'in proportion'")
        panels.append(
            (line + base.mark_line(strokeDash=[2, 3]).transform_filter("datum.what == 'in proportion'")).properties(
                width=150, height=150
            )
        )
    return alt.hconcat(*panels)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/growth"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for axis in arguments.axes:
        for value in AXES[axis][1]:
            rows.append(measured(axis, replace(Setting(), **{axis: value}), arguments.rounds))
            print(f"{AXES[axis][0]} {value}: {rows[-1].seconds:.2f} s, {rows[-1].peak / MIB:,.0f} MiB", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "growth.json", [asdict(row) for row in rows])
    write_text(arguments.output / "growth.md", table(rows))
    drawing.save(picture(rows), arguments.output / "growth.png")
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
