"""Tables of `transfer.py` from its cells: methods by tasks, with intervals over images and deviations over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detector_runs import difference_text
from paired_precision import drawn
from transfer_tasks import GROUPS

from compressvit.files import write_json, write_text

CELL = "cell.json"
LINEAR = "linear"
DRAWS = 2000  # resampled sets of images
Rows = Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]


def means(right: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """In percent the mean over seeds and images, and the ends of its 95 % interval over resampled images, the same ones in each seed."""
    each = 100 * np.asarray(right, dtype=float).mean(axis=0)  # (images,)
    low, high = np.quantile(drawn(len(each), DRAWS) @ each / len(each), (0.025, 0.975))
    return float(each.mean()), float(low), float(high)


def by_row(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """The cells of each protocol, task and method, in the order of their seeds."""
    rows: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda one: one["seed"]):
        rows.setdefault((cell["protocol"], cell["task"], cell["method"]), []).append(cell)
    return rows


def row(rows: Rows, key: tuple[str, str, str]) -> dict[str, Any]:
    """The figures of a method on a task: by domain, and less the linear probe with the same seeds and images."""
    cells = rows[key]
    tested = {name: means([cell["right"][name] for cell in cells]) for name in cells[0]["right"]}
    found = {
        "protocol": key[0],
        "task": key[1],
        "method": key[2],
        "seeds": [cell["seed"] for cell in cells],
        "images": cells[0]["images"],
        "trained": cells[0].get("trained_adapter", 0) + cells[0].get("trained_head", 0),
        "trained_head": cells[0].get("trained_head", 0),
        "megabytes": cells[0].get("adapter_bytes", 0) / 1e6,
        "macs": cells[0]["macs"],
        "accuracy": {
            name: {"mean": mean, "interval_over_images": [low, high]} for name, (mean, low, high) in tested.items()
        },
        "mean_over_domains": statistics.mean(mean for mean, _, _ in tested.values()),
        "each_seed": [statistics.mean(_percents(cell)) for cell in cells],
        "minutes": statistics.mean(cell["minutes"] for cell in cells),
    }
    other = {cell["seed"]: cell for cell in rows.get((*key[:2], LINEAR), ())}
    pairs = [(cell, other[cell["seed"]]) for cell in cells if cell["seed"] in other]
    if key[2] != LINEAR and pairs:
        found["difference"] = difference(pairs)
    return found


def difference(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Cells less the linear probes of the same seeds, mean over domains, image by image, in percentage points."""
    draws, centre = [], []
    for name in pairs[0][0]["right"]:
        less = np.mean([np.subtract(ours["right"][name], theirs["right"][name]) for ours, theirs in pairs], axis=0)
        draws.append(drawn(len(less), DRAWS, seed=len(draws)) @ less / len(less))
        centre.append(less.mean())
    low, high = 100 * np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    each = [statistics.mean(_percents(ours)) - statistics.mean(_percents(theirs)) for ours, theirs in pairs]
    return {
        "seeds": [ours["seed"] for ours, _ in pairs],
        "mean": 100 * float(np.mean(centre)),
        "interval_over_images": [float(low), float(high)],
        "deviation_of_seeds": statistics.stdev(each) if len(each) > 1 else None,
    }


def _percents(cell: Mapping[str, Any]) -> list[float]:
    return [100 * statistics.mean(right) for right in cell["right"].values()]


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over VTAB-1k's groups by method, and over the groups; a group with a missing task says how many there are."""
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(one["method"] for one in rows if one["protocol"] == "vtab"):
        scores = {
            one["task"]: one["mean_over_domains"]
            for one in rows
            if one["method"] == method and one["protocol"] == "vtab"
        }
        there = {name: [scores[task] for task in tasks if task in scores] for name, tasks in GROUPS.items()}
        entry: dict[str, Any] = {
            name: {"mean": statistics.mean(each), "tasks": len(each), "of": len(GROUPS[name])}
            for name, each in there.items()
            if each
        }
        if len(entry) == len(GROUPS):
            entry["mean"] = statistics.mean(group["mean"] for group in entry.values())
        found[method] = entry
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: a table for each protocol, and VTAB-1k's groups."""
    lines = []
    for protocol in dict.fromkeys(one["protocol"] for one in rows):
        heads = "method | trained (of it the classifier) | MB a task | MACs | accuracy [95 % over images] | mean over domains ± seeds"
        lines += [
            f"| {protocol}, task | {heads} | less the linear probe [95 % over images] ± seeds | seeds |",
            "| --- " * 9 + "|",
        ]
        lines += [_line(one) for one in rows if one["protocol"] == protocol]
        lines.append("")
    for method, entry in groups(rows).items():
        texts = [
            f"{name} {group['mean']:.2f} ({group['tasks']} of {group['of']} tasks)"
            for name, group in entry.items()
            if name in GROUPS
        ]
        lines.append(
            f"- {method}: " + "; ".join([*texts, *([f"mean of groups {entry['mean']:.2f}"] if "mean" in entry else [])])
        )
    return "\n".join(lines)


def _line(one: Mapping[str, Any]) -> str:
    accuracy = [
        f"{name} {found['mean']:.1f} [{found['interval_over_images'][0]:.1f}, {found['interval_over_images'][1]:.1f}]"
        for name, found in one["accuracy"].items()
    ]
    deviation = f" ± {statistics.stdev(one['each_seed']):.2f}" if len(one["each_seed"]) > 1 else ""
    columns = [
        one["task"],
        one["method"],
        f"{one['trained']:,} ({one['trained_head']:,})",
        f"{one['megabytes']:.3f}",
        f"{one['macs'] / 1e9:.3f} G",
        ", ".join(accuracy),
        f"{one['mean_over_domains']:.2f}{deviation}",
        difference_text(one.get("difference")),
        str(len(one["seeds"])),
    ]
    return f"| {' | '.join(columns)} |"


def write_tables(output: Path) -> str:
    """Write `cells.json` and `table.md` of what is finished; the table."""
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((output / "cells").glob(f"*/{CELL}"))]
    found = by_row(cells)
    rows = [row(found, key) for key in found]
    rows.sort(key=lambda one: (one["protocol"], one["task"].rpartition("_")[0], one["images"], one["task"]))
    write_json(output / "cells.json", rows, indent=1)
    text = table(rows)
    write_text(output / "table.md", text + "\n")
    return text
