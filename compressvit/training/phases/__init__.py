"""The phases of a recipe: one file or folder each, with its options, its plan and its run.

`PHASES` maps a recipe's word to its class. To add one: write a file beside `finetune.py` with a `PhaseSpec` under `@phase("word")`.
Recipes, their schema, `plan`, `apply`, `compare` and the report then include it.
"""

from __future__ import annotations

from compressvit.training.phases.base import PHASES, PhasePlan, PhaseSpec, Setting, phase

__all__ = ["PHASES", "PhasePlan", "PhaseSpec", "Setting", "phase"]
