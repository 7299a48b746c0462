"""Compacter: PHM adapters with rank-1 factors and one set of {A_k} for the whole model.

Paper: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, NeurIPS 2021, https://arxiv.org/abs/2106.04647

`H = Σ_{k≤n} A_k ⊗ (s_k t_kᵀ)`, with A (n, n, n) shared by all projections, s (n, out/n), t (n, in/n), and biases: n³ parameters once,
and 3·(M + h') per adapter.
"""

from __future__ import annotations

from torch import nn

from compressvit.model import ties
from compressvit.transforms.base import LedgerEntry, transform
from compressvit.transforms.phm import PHM, PHMPlan


class CompacterPlan(PHMPlan):
    """Resolved Compacter adapters."""

    rank = 1
    rule_std = 1e-4  # as in the released code for a shared rule

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        ledger = super().apply(model)
        ties.tie(model, [[f"{path}.adapter.{side}.rule" for path in self.widths for side in ("down", "up")]])
        owned = ties.count_at_paths(model, [entry.path for entry in ledger])
        return [
            LedgerEntry(
                e.path, f"{e.change}, A of all adapters {'owned' if i == 0 else 'shared'}", e.before, owned[e.path]
            )
            for i, e in enumerate(ledger)
        ]


@transform("compacter", CompacterPlan)
class Compacter(PHM):
    """PHM adapters with rank-1 factors and one shared set of small matrices (Compacter)."""
