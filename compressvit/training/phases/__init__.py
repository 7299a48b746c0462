"""The phases of a recipe: one file or folder each, with its options, its plan and its run.

`PHASES` maps the key in recipes to the class. To add a phase, write a file beside `finetune.py` with a `PhaseSpec` decorated with
`@phase("key")`. Recipes, their schema, `plan`, `apply`, `compare` and the report then include it.
"""

from __future__ import annotations

from compressvit.training.phases.base import PHASES, PhasePlan, PhaseSpec, Setting, phase

__all__ = ["PHASES", "PhasePlan", "PhaseSpec", "Setting", "phase"]
