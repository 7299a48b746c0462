"""The numbers of neurons that pruning leaves in each adapter (MiMi, figure 5).

Paper: Mini but Mighty: Finetuning ViTs with Mini Adapters, WACV 2024, https://arxiv.org/abs/2311.03873
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressvit.charts.findings import Finding

History = Sequence[Mapping[str, int]]  # neurons by adapter path after every training, the initial ones first

_TITLES = {
    "neurons": "neurons of the adapter (linear to 1, then logarithmic)",
    "layer": "",
    "cycle": "",
    "even": "if every adapter had lost the same share",
}


def allocation_finding(histories: Mapping[str, tuple[str, History]]) -> Finding:
    """`allocation`: neurons of every adapter after every removal, with one row per adapter, one colour per removal, one panel per history.

    Args:
        histories: scope ('global' or 'local') and widths, by panel name ('1_prune', or the name of a run).
    """
    records = [
        {
            "when": panel,
            "scope": scope,
            "layer": adapter,
            "removals": removals,
            "cycle": f"{removals} removal{'s' * (removals > 1)}" if removals else "start",
            "neurons": widths.get(adapter, 0),
            "even": round(start * sum(widths.values()) / max(1, sum(history[0].values())), 2),
            "left": f"{start:,} → {history[-1][adapter]:,}" if history[-1].get(adapter) else f"{start:,}, gone",
        }
        for panel, (scope, history) in histories.items()
        for removals, widths in enumerate(history)
        for adapter, start in history[0].items()
    ]
    return Finding(
        name="allocation",
        title="Neurons of every adapter",
        caption="Each row is an adapter, each colour a removal; a bar shows the neurons left after it, later ones on top. With global "
        "pruning, neurons stay where they matter most: long last bars are the layers that need adapting most. With local "
        "pruning, every adapter loses the same fraction. The axis is linear to 1, then logarithmic.",
        chart="bars",
        records=records,
        options={
            "x": "neurons",
            "y": "layer",
            "colour": "cycle",
            "over": True,
            "ramp": True,
            "scales": {"neurons": "symlog"},
            "titles": _TITLES,
            **({"facet": "when"} if len(histories) > 1 else {"note": "left"}),
        },
    )
