"""VPT: learnable prompt tokens that a frozen backbone's tokens attend to.

Paper: Visual Prompt Tuning, ECCV 2022, https://arxiv.org/abs/2203.12119

With x the class (and distillation, register) tokens, E the patch tokens and L a block, in a ViT

    deep:     [x_i, _, E_i]   = L_i([x_{i-1}, P_{i-1}, E_{i-1}])    i = 1…depth, fresh P every time: P·ΣM parameters
    shallow:  [x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}])    Z_0 = P, removed after the last block: P·M parameters

In Swin every window attends to P prompts, without relative position or mask. Shallow prompts are copied into every window, and the
attention outputs of the copies are averaged. Patch merging treats a prompt as a 2×2 patch of copies of itself, so P·M of the first stage
are all its parameters. (The paper's code, https://github.com/KMnP/vpt, does the same, but from the second block on it puts prompts of one
image of a batch into windows of another.) Prompts are initialised uniformly in ±sqrt(6 / (3·patch² + M)) with M of the first block, as in
that code, so the function is not preserved at the start.

Deep prompts are added before a block's first norm and removed after its attention, because nothing reads what the MLP would compute from
them. (The paper's code averages those of Swin's last block into the pooled feature; here only image tokens are pooled.) Shallow prompts
lengthen the sequence between blocks: a block's output has them after the prefix tokens or, in Swin, in rows below the grid, the last of
which is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model.backbone import body_of, describe, model_name
from compressvit.model.family import Need
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform
from compressvit.transforms.claims import Claim, adds_tokens, slot
from compressvit.transforms.vpt.prompts import Prompts, remove_prompts
from compressvit.transforms.vpt.ways import WAYS, Joining


class VPTPlan(Plan):
    """A resolved `VPT`: the blocks that have prompts of their own, and the number of prompts."""

    blocks: tuple[str, ...]
    prompts: int
    deep: bool
    dropout: float

    sets_aside = True  # prompts lengthen only the student's sequence, and start at random

    def set_aside(self, model: nn.Module) -> None:
        remove_prompts(model)

    def claims(self, model: nn.Module) -> list[Claim]:
        paths = [info.path for info in describe(model).blocks]
        inside = [adds_tokens(f"{path}.attn") for path in paths] + [slot(path, "vpt") for path in self.blocks]
        if self.deep:
            return inside  # deep prompts are removed after attention
        only_attention = "use vpt.deep=true, whose prompts only attention sees"
        return [*inside, *(adds_tokens(f"{path}.mlp", only_attention) for path in paths)]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        backbone = describe(model)
        joining, kind = Joining(model, backbone, self.prompts, self.dropout), WAYS[backbone.family.prompts or ""]

        def add(path: str) -> str:
            if self.deep:
                kind.deep(joining, path)
                return f"+ {self.prompts} prompts"
            return f"+ {self.prompts} prompts, removed after {kind.shallow(joining)}"

        return record(model, self.blocks, add)

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        height, width = describe(student).family.patch_size(body_of(student) or student)
        prompts = [module for module in student.modules() if isinstance(module, Prompts)]
        bound = math.sqrt(6 / (3 * height * width + prompts[0].tokens.shape[1]))
        for module in prompts:
            module.reset(bound)

    def trains(self, model: nn.Module) -> set[str]:
        return {f"{path}.tokens" for path, module in model.named_modules() if isinstance(module, Prompts)}

    def fold(self, model: nn.Module) -> None:
        raise UserError(
            "vpt cannot be folded: how much a token attends to a prompt depends on the token, so no fixed weight equals it. Ship the "
            "artifact as it is, or adapt with repadapter, lora, ssf or fact, which can be"
        )


@transform("vpt", VPTPlan)
class VPT(Transform):
    """Learnable prompt tokens added to the image's tokens, in every block or before the first; the backbone is frozen (VPT)."""

    freezes = True
    needs: ClassVar[tuple[Need, ...]] = ("prompts",)
    instead: ClassVar[str] = "adapt it with adapters, ssf or lora (targets: [fc1, fc2]), which add no tokens"
    changes_at_start = True

    prompts: int = Field(10, ge=1, description="Number P of prompt tokens; the paper tries 1 to 200 (1 to 50 in Swin).")
    deep: bool = Field(
        True,
        description="true: new prompts in every block (VPT-deep); false: one set that passes through all blocks (VPT-shallow).",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of the prompts' elements in training; the examples of the paper's code use 0.1.",
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (VPT(prompts=3), VPT(prompts=2, dropout=0.1))

    def plan(self, model: nn.Module, reference: Reference | None = None) -> VPTPlan:
        backbone = self.backbone(model)
        word, title = backbone.family.prompts or "", backbone.family.title
        if word not in WAYS:
            raise UserError(
                f"vpt knows how prompts join tokens in {', '.join(WAYS)}, and {model_name(model)} is a {title}, whose "
                f"`Family.prompts` is {word!r}; {self.instead}"
            )
        missing = WAYS[word].missing(model, self.deep)
        if missing is not None:
            raise UserError(
                f"vpt: prompts in {word} need {missing}, and {model_name(model)} is a {title}, which does not have that; {self.instead}"
            )
        blocks = [info.path for info in backbone.blocks]
        return VPTPlan(blocks=tuple(blocks if self.deep else blocks[:1]), **self.model_dump())
