"""Where the neurons of adapters stay while pruning takes the others away (MiMi, figure 5).

Paper: Mini but Mighty: Finetuning ViTs with Mini Adapters, WACV 2024, https://arxiv.org/abs/2311.03873
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressvit.diagnostics.findings import Finding

History = Sequence[Mapping[str, int]]  # neurons by adapter's path after every training, the start first

_TITLES = {
    "neurons": "neurons left",
    "adapter": "adapter, in the order of the model",
    "removals": "removals",
    "run": "run",
}


def allocation_finding(histories: Mapping[str, tuple[str, History]]) -> Finding:
    """`allocation`: neurons of every adapter after every removal, a line a removal, a panel for each history.

    Args:
        histories: by the panel's name ('1_prune', or a run's): the scope ('global' or 'local') and the widths.
    """
    records = []
    for panel, (scope, history) in histories.items():
        total = sum(history[0].values())
        for removals, widths in enumerate(history):
            share = sum(widths.values()) / max(1, total)
            for adapter, start in history[0].items():
                neurons = widths.get(adapter, 0)
                # what the same number of neurons would be if every adapter had lost the same share
                records.append(
                    {
                        "when": panel,
                        "scope": scope,
                        "adapter": adapter,
                        "removals": removals,
                        "neurons": neurons,
                        "even": round(start * share, 2),
                    }
                )
    return Finding(
        name="allocation",
        title="Neurons of every adapter after every removal",
        caption="A line a removal, from the start (dark) to the end (light). Where pruning is global, neurons go where they are missed "
        "least, so the line bends: adapters that keep many are where the task differs most from what the backbone knows. Where it is "
        "local, every adapter loses the same share, and the line keeps its form.",
        chart="lines",
        records=records,
        options={
            "x": "adapter",
            "y": "neurons",
            "colour": "removals",
            "ramp": True,
            "titles": _TITLES,
            "scales": {"neurons": "symlog"},  # adapters may be empty
            **({"facet": "when"} if len(histories) > 1 else {}),
        },
    )


def final_allocation_finding(histories: Mapping[str, tuple[str, History]]) -> Finding:
    """`allocation_final`: neurons that are left in the end, a bar an adapter, runs side by side."""
    records = [
        {"run": run, "scope": scope, "adapter": adapter, "start": start, "neurons": history[-1].get(adapter, 0)}
        for run, (scope, history) in histories.items()
        for adapter, start in history[0].items()
    ]
    return Finding(
        name="allocation_final",
        title="Neurons of every adapter in the end",
        caption="A bar an adapter, a colour a run. Runs of one size that differ in form put their neurons into other layers; global "
        "pruning (MiMi) may empty an adapter, local pruning leaves the same share of each.",
        chart="bars",
        records=records,
        options={"x": "neurons", "y": "adapter", "colour": "run", "titles": {**_TITLES, "neurons": "neurons left"}},
    )
