"""Take the values of an earlier student of the same structure, e.g. to fine-tune it at another resolution or on other classes.

The step adds no structure. Position embeddings and Swin's relative position tables are resampled as in timm if the token grid or the
window differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.fitting.reference import Reference
from compressvit.model import ties
from compressvit.model.backbone import head_names
from compressvit.model.positions import resample_positions
from compressvit.model.stored import MANIFEST, is_artifact, read_tensors, require_as_written
from compressvit.transforms.base import LedgerEntry, Plan, Transform, transform
from compressvit.transforms.record import compression_of
from compressvit.transforms.stored import read_plans


class LoadWeightsPlan(Plan):
    """A resolved `LoadWeights`."""

    loads_values: ClassVar[bool] = True
    artifact: str
    head: Literal["loaded", "new"] = "loaded"

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return []

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        folder = expanded(self.artifact, "load_weights.artifact")
        made_by, asked = (
            [(plan.transform, plan.structure()) for plan in plans if not plan.loads_values]
            for plans in (read_plans(folder), compression_of(student).plans)
        )
        if made_by != asked:
            # equal names and shapes do not imply the same function, e.g. form=reference and form=identity
            raise UserError(
                f"load_weights: {self.artifact} was made by other transforms than this student: "
                f"{_differences(made_by, asked)}; give the recipe the settings that its compressvit.json lists"
            )
        stored = read_tensors(folder)
        require_as_written(folder, stored)
        tensors = resample_positions(stored, student)
        own = ties.unique_state(student)
        heads = head_names(student)
        if self.head == "new":
            tensors, own = ({n: t for n, t in state.items() if n not in heads} for state in (tensors, own))
        wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]
        wrong += [n for n in tensors if n not in own]
        if wrong and heads and heads.issuperset(wrong):
            raise UserError(
                f"load_weights: the classifier of {self.artifact} is of another size than this student's; to train a new one for "
                "other classes, give load_weights.head=new and student.head=new"
            )
        if wrong:
            raise UserError(
                f"load_weights: {self.artifact} does not have the structure of this student; {len(wrong)} tensors differ, "
                f"first {wrong[0]}. Use the transforms that the artifact was made with (its compressvit.json lists them)"
            )
        student.load_state_dict(tensors, strict=False)

    def fold(self, model: nn.Module) -> None:
        """Nothing to fold: no structure was added."""


def _differences(made_by: list, asked: list) -> str:
    names = [[name for name, _ in side] for side in (made_by, asked)]
    if names[0] != names[1]:
        return f"{', '.join(names[0]) or 'none'} there, {', '.join(names[1]) or 'none'} here"
    return "; ".join(
        f"{name}.{key} is {theirs.get(key)} there, {ours.get(key)} here"
        for (name, theirs), (_, ours) in zip(made_by, asked, strict=True)
        for key in theirs
        if theirs.get(key) != ours.get(key)
    )


@transform("load_weights", LoadWeightsPlan)
class LoadWeights(Transform):
    """Set the student's values from an artifact (a folder with compressvit.json) made by the same transforms."""

    needs = ()
    reads: ClassVar[tuple[str, ...]] = ("artifact",)
    changes_at_start = True

    artifact: str = Field(description="Folder of the artifact, e.g. runs/mini_swin_b/student.")
    head: Literal["loaded", "new"] = Field(
        "loaded",
        description="loaded: the artifact's classifier, too; new: the student keeps its own, to be trained on other classes (with "
        "`student: {head: new}` a fresh one of their number).",
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (LoadWeights(artifact="an artifact that fits"),)

    def plan(self, model: nn.Module, reference: Reference | None = None) -> LoadWeightsPlan:
        return LoadWeightsPlan(artifact=self.artifact, head=self.head)

    @property
    def provisional(self) -> tuple[str, ...]:
        if self.head == "loaded":
            return ()
        return (f"the classifier of {self.artifact} is left out; the student keeps its own, which later phases train",)

    def require_inputs(self) -> None:
        if not is_artifact(expanded(self.artifact, "load_weights.artifact")):
            raise UserError(
                f"load_weights: there is no artifact at {self.artifact} (a folder with {MANIFEST}); run the recipe that makes it "
                "first, or name another with this step's `artifact`"
            )
