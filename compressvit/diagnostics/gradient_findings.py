"""Findings from rows of gradient norms (`gradients.jsonl`): over training, by kind of parameter, and for shared tensors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from compressvit.charts.findings import Finding, stretches

Rows = Sequence[Mapping[str, Any]]

_POINTS = 150  # points per line; more rows are averaged
_TITLES = {
    "step": "optimiser step",
    "norm": "ℓ2 norm of the gradient, before clipping",
    "layer": "layer",
    "group": "parameters",
    "own": "mean ℓ2 norm of the gradient",
    "when": "",
}


def gradient_findings(rows: Rows) -> list[Finding]:
    """`gradients` (one line per layer), `gradients_groups` (one line per kind of parameter) and, with sharing, `gradients_shared`.

    Args:
        rows: as written by `GradientWatch`, from one or several phases, each of which becomes a panel. A field `run` is added to the
            panels' names.
    """
    found = [_over_training(rows), _by_group(rows)] if rows else []
    return found + ([_shared(rows)] if any(row["shared"] for row in rows) else [])


def _over_training(rows: Rows) -> Finding:
    records = _over_steps(rows, "layer", _layer_norms)
    return Finding(
        name="gradients",
        title="Gradient norm per layer over training",
        caption="One line per layer, from the first (dark) to the last (light). Lines that lie close together and run smoothly mean that "
        "all layers learn at the same pace; spikes, or a wide spread, mean that some change strongly while others hardly change. "
        "A shared tensor counts with the gradient of the block's own use, so layers are comparable whether they share or not.",
        chart="lines",
        records=records,
        options=_line_options(records, "layer", ramp=True),
    )


def _by_group(rows: Rows) -> Finding:
    records = _over_steps(rows, "group", _group_norms)
    return Finding(
        name="gradients_groups",
        title="Gradient norm per kind of parameter over training",
        caption="One line per kind of parameter, over all layers; 'transforms' are what compression or adaptation added. A kind whose "
        "line stays far below the others hardly learns.",
        chart="lines",
        records=records,
        options=_line_options(records, "group", ramp=False),
    )


def _shared(rows: Rows) -> Finding:
    records = []
    for panel, some in _panels(rows):
        for layer in dict.fromkeys(layer for row in some for layer in row["shared"]):
            here = [row["shared"][layer] for row in some if layer in row["shared"]]
            means = {kind: statistics.fmean(row[kind] for row in here) for kind in ("own", "sum")}
            records.append({**panel, "layer": layer, **means})
    return Finding(
        name="gradients_shared",
        title="Gradients of shared tensors: each block's own use, and the sum",
        caption="Coloured: the norm of the gradient of a block's shared tensors from this block's use alone, mean over training. Grey: "
        "the norm of the sum over all blocks that share them, which the optimiser sees. Grey much longer than the bars of its blocks "
        "means that their gradients agree; hardly longer, or shorter, that they conflict.",
        chart="bars",
        records=records,
        options={
            "x": "own",
            "y": "layer",
            "behind": "sum",
            "titles": _TITLES,
            **({"facet": "when"} if _several(records) else {}),
        },
    )


def layers_finding(rows: Rows) -> Finding:
    """`gradients_layers`: the interquartile range of every layer's norms over training, with phases or runs in one chart."""
    records = []
    for panel, some in _panels(rows):
        for layer, norms in _by_layer(some).items():
            low, middle, high = statistics.quantiles(norms, n=4, method="inclusive") if len(norms) > 1 else norms * 3
            records.append({**panel, "layer": layer, "norm": middle, "low": low, "high": high})
    return Finding(
        name="gradients_layers",
        title="Gradient norm by layer",
        caption="The median over training, with the interquartile range as a band. A flat line means that all layers have gradients of "
        "similar size; a slope or a jump, that depth decides how much a layer learns; a wide band, that its gradient varies.",
        chart="lines",
        records=records,
        options={
            "x": "layer",
            "y": "norm",
            "colour": "when",
            "low": "low",
            "high": "high",
            "titles": _TITLES,
            "scales": {"norm": "log", "low": "log"} if all(r["low"] > 0 for r in records) else {},
        },
    )


def gradient_summary(rows: Rows) -> list[dict[str, Any]]:
    """Table rows, one per layer: first, median and last norm; for shared tensors also the mean norms of the own use and of the sum."""
    found = []
    for panel, some in _panels(rows):
        for layer, norms in _by_layer(some).items():
            shared = [row["shared"][layer] for row in some if layer in row["shared"]]
            means = {k: statistics.fmean(s[k] for s in shared) if shared else None for k in ("own", "sum")}
            found.append(
                {
                    "run": panel["when"],
                    "layer": layer,
                    "steps": len(norms),
                    "first": norms[0],
                    "median": statistics.median(norms),
                    "last": norms[-1],
                    "shared, own use": means["own"],
                    "shared, sum": means["sum"],
                }
            )
    return found


def _by_layer(rows: Rows) -> dict[str, list[float]]:
    layers: dict[str, list[float]] = {}
    for row in rows:
        for layer, norm in _layer_norms(row).items():
            layers.setdefault(layer, []).append(norm)
    return layers


def _layer_norms(row: Mapping[str, Any]) -> dict[str, float]:
    return {layer: math.hypot(*groups.values()) for layer, groups in row["norms"].items()}


def _group_norms(row: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for groups in row["norms"].values():
        for group, norm in groups.items():
            found[group] = math.hypot(found.get(group, 0.0), norm)
    return found


def _panels(rows: Rows) -> Iterator[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """The rows of every phase (of every run), with the fields that name the phase."""
    panels: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row.get("run"), row["phase"]), []).append(row)
    for (run, phase), some in panels.items():
        fields = {"phase": phase, "when": phase} if run is None else {"run": run, "phase": phase, "when": run}
        if sum(r == run for r, _ in panels) > 1 and run is not None:
            fields["when"] = f"{run}, {phase}"
        yield fields, some


def _over_steps(rows: Rows, field: str, norms: Callable[[Mapping[str, Any]], dict[str, float]]) -> list[dict[str, Any]]:
    """Mean norms: one record per name from `norms` (stored as `field`) and interval of rows, labelled with the interval's last step."""
    records = []
    for panel, some in _panels(rows):
        for stretch in stretches(some, _POINTS):
            found = [norms(row) for row in stretch]
            for name in dict.fromkeys(name for one in found for name in one):
                mean = statistics.fmean(one[name] for one in found if name in one)
                records.append({**panel, "step": stretch[-1]["step"], field: name, "norm": mean})
    return records


def _line_options(records: Sequence[Mapping[str, Any]], colour: str, *, ramp: bool) -> dict[str, Any]:
    positive = all(record["norm"] > 0 for record in records)
    return {
        "x": "step",
        "y": "norm",
        "colour": colour,
        "titles": _TITLES,
        "ramp": ramp,
        "points": False,
        "scales": {"norm": "log"} if positive else {},
        **({"facet": "when"} if _several(records) else {}),
    }


def _several(records: Sequence[Mapping[str, Any]]) -> bool:
    return len({record["when"] for record in records}) > 1
