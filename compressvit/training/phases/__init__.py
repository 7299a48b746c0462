"""What a recipe can train: one phase a file or folder. `PHASES` maps a recipe's word to its spec."""

from __future__ import annotations

from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.phases.prune.spec import Prune
from compressvit.training.phases.sparsify import Sparsify
from compressvit.training.spec import Training

PHASES: dict[str, type[Training]] = {"distill": Distill, "finetune": Finetune, "prune": Prune, "sparsify": Sparsify}
