"""What a recipe can say about the terms of the distillation loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compressvit.spec import Spec


class PredictionTerm(Spec):
    """Cross-entropy of the student against the teacher's soft labels, mean over the batch."""

    weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0, description="Divides both logits; no T² factor.")


class AttentionRelationTerm(Spec):
    """β of MiniViT: relations of queries, keys and values of the paired layers."""

    weight: float = Field(1.0, ge=0)
    heads: int = Field(1, ge=1, description="Relation heads that q, k and v are split into; must divide both widths.")


class HiddenRelationTerm(Spec):
    """γ of MiniViT: relations of the tokens that leave the paired blocks."""

    weight: float = Field(0.1, ge=0)
    form: Literal["cosine_mse", "softmax_ce"] = Field("cosine_mse", description="The released code's, or the paper's.")
    scale: float = Field(49.0, gt=0, description="Factor of cosine_mse; the released code's window area.")


class FeatureTerm(Spec):
    """Distance of the tokens after the final norm; what a backbone without a classifier is distilled by."""

    weight: float = Field(0.0, ge=0)
    form: Literal["cosine", "mse"] = "cosine"
    prefix: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the term that the prefix tokens (class, registers) have together; the others have the rest. Counted "
        "alike, a class token would be one of hundreds. Ignored where there are none.",
    )


class LabelTerm(Spec):
    """Cross-entropy against the ground truth. MiniViT uses none: soft labels alone do better there."""

    weight: float = Field(0.0, ge=0)


class TorchdistillTerm(Spec):
    """Any mid-level loss of torchdistill, by its class name and its own arguments, in which it names its taps."""

    loss: str = Field(description="Name of the class, e.g. SPKDLoss.")
    weight: float = Field(1.0, ge=0)
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="As torchdistill documents them; module paths name the taps."
    )


class Losses(Spec):
    """The terms of the distillation loss. A term of weight 0 is not computed."""

    prediction: PredictionTerm = PredictionTerm()
    attention_relation: AttentionRelationTerm = AttentionRelationTerm()
    hidden_relation: HiddenRelationTerm = HiddenRelationTerm()
    feature: FeatureTerm = FeatureTerm()
    labels: LabelTerm = LabelTerm()
    torchdistill: tuple[TorchdistillTerm, ...] = ()
