"""What a recipe can say about a training phase."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compressvit.spec import Spec


class Training(Spec):
    """Options that every phase has. Optimisers, schedules, mixup and cutmix are timm's, under timm's names."""

    epochs: int = Field(10, ge=1, description="Passes over the training set.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Stop after this many optimiser steps, whatever `epochs` says; the schedule stays that of `epochs`.",
    )
    optimizer: str = Field("adamw", description="Any name of timm.optim.list_optimizers().")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    lr_reference_batch: int | None = Field(
        None,
        ge=1,
        description="If set, the rate is scaled by batch_size · accumulate / this (linear scaling; MiniViT: 1024).",
    )
    weight_decay: float = Field(
        0.05, ge=0, description="Not applied to 1-D tensors and to what the model's no_weight_decay() names."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="Of Adam and its relatives; ignored by other optimisers."
    )
    momentum: float = Field(0.9, description="Of SGD and its relatives; ignored by Adam and its relatives.")
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine", description="Of the learning rate, per optimiser step."
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Linear warm-up from `warmup_lr`.")
    warmup_lr: float = Field(1e-6, ge=0, description="Learning rate at the first step of the warm-up.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a cosine.")
    decay_epochs: float = Field(
        30.0, gt=0, description="With `schedule: step`, divide the rate by 10 every so many epochs."
    )
    clip_grad: float | None = Field(
        5.0, gt=0, description="Largest L2 norm of the whole gradient; null for no clipping."
    )
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are added up before one optimiser step.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Of autocast; parameters stay in float32.")
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an average of the weights, which is evaluated and becomes the result."
    )
    compile: bool = Field(False, description="torch.compile the model that is trained, and the teacher.")
    mixup: float = Field(0.0, ge=0, description="α of mixup; 0 for none.")
    cutmix: float = Field(0.0, ge=0, description="α of cutmix; 0 for none.")
    smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the ground truth.")
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Stochastic depth of the last block, rising linearly from 0; null keeps the model's.",
    )
    evaluate_every: int = Field(1, ge=1, description="Epochs between two evaluations.")
    keep: Literal["last", "best"] = Field(
        "last",
        description="Which weights the phase ends with: the last, or those of its best evaluation, the start included: it then never "
        "ends below where it began. Best is by top-1, without labels by the agreement or cosine with the teacher; it is chosen on "
        "the evaluation set, so its figure is that much too good.",
    )
    log_every: int = Field(10, ge=1, description="Optimiser steps between two lines of the log.")

    @property
    def needs_labels(self) -> bool:
        """Whether the phase learns from the ground truth."""
        return True

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate after linear scaling for batches of `batch_size` images."""
        return self.lr * (batch_size * self.accumulate / self.lr_reference_batch if self.lr_reference_batch else 1)


class Finetune(Training):
    """Train with the ground truth alone; also how a teacher is trained from scratch."""

    name: ClassVar[str] = "finetune"


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


class Distill(Training):
    """Train the student to behave as its teacher (MiniViT's weight distillation by default)."""

    name: ClassVar[str] = "distill"

    losses: Losses = Losses()
    layers: Literal["matched", "auto"] | tuple[tuple[int, int], ...] = Field(
        "matched",
        description="Pairs [student block, teacher block] for the relation losses, counted from 0 over the whole model. "
        "'matched': the last block of every share group (of every stage, where nothing is shared), with the teacher's block "
        "of the same index; needs teacher and student of the same depths. 'auto': the last block of every share group (every block, "
        "where nothing is shared), with the teacher's block that is most like it when the phase begins, by CKA on the calibration "
        "images, in order and within stage, resolution and window shift; depths may differ.",
    )

    @property
    def needs_labels(self) -> bool:
        return self.losses.labels.weight > 0

    @field_validator("losses")
    @classmethod
    def _something_to_learn(cls, losses: Losses) -> Losses:
        terms = [*(getattr(losses, n) for n in type(losses).model_fields if n != "torchdistill"), *losses.torchdistill]
        if not any(term.weight for term in terms):
            raise ValueError("every loss term has weight 0, so there is nothing to learn; give one a weight")
        return losses


class PruneTarget(Spec):
    """Where pruning ends: one of these."""

    neurons: float | int | None = Field(
        None,
        gt=0,
        description="Neurons of all adapters together: below 1 a share of those at the start (σ), else a number.",
    )
    parameters: float | int | None = Field(
        None,
        gt=0,
        description="Parameters of all adapters together: below 1 a share of those at the start, else a number.",
    )
    macs: float | int | None = Field(
        None,
        gt=0,
        description="Multiply-accumulates of all adapters for one image: below 1 a share of those at the start, else a number.",
    )
    accuracy: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Prune on while the top-1 (%) after a cycle's training is at least this; the last adapters that reached it are kept. "
        "It is chosen on the evaluation set, so its figure is that much too good.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> PruneTarget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "none"
            raise ValueError(f"a target is one of neurons, parameters, macs and accuracy; given: {what}")
        if self.accuracy is not None and self.accuracy <= 1:
            raise ValueError(
                f"accuracy={self.accuracy:g} is in percent; for {self.accuracy:.0%} give {100 * self.accuracy:g}"
            )
        for name in ("neurons", "parameters", "macs"):
            value = getattr(self, name)
            if isinstance(value, float) and value >= 1:
                raise ValueError(
                    f"{name}={value} is neither a share below 1 nor a whole number; give e.g. 0.25, or {int(value)}"
                )
        return self


Score = Literal["magnitude", "sum", "shape", "relative", "down", "gradient", "random"]


class Prune(Training):
    """Train adapters, remove their least important neurons, train again, … (MiMi). `epochs` and the schedule are those of a cycle.

    With `keep: best` a cycle hands on the weights of its best evaluation, and the optimiser's moments of its last step.
    """

    name: ClassVar[str] = "prune"

    target: PruneTarget = Field(description="Where it ends; there is always a training after the last removal.")
    rate: float = Field(0.5, gt=0, lt=1, description="ρ: share of the remaining neurons that a cycle removes.")
    score: Score = Field(
        "magnitude",
        description="Of neuron j of an adapter of width M: magnitude (|D_j|₁ + |U_j|₁) / 2M, the paper's; sum, without / 2M; shape, "
        "/ (M + h'); relative, / the largest of its adapter; down, |D_j|₁ / M alone; gradient, |θ·∂L/∂θ| summed; random.",
    )
    scope: Literal["global", "local"] = Field(
        "global", description="Rank all neurons together, or remove the same share of every adapter."
    )
    gradient_batches: int = Field(10, ge=1, description="Training batches that `score: gradient` looks at.")


class Sparsify(Training):
    """Mask all but the best single weights of adapters, then train those (SparseAdapter, SNIP, GraSP). Nothing shrinks."""

    name: ClassVar[str] = "sparsify"

    keep: float = Field(gt=0, le=1, description="Share of the weights of all adapters together that stay.")
    score: Literal["magnitude", "snip", "grasp", "random"] = Field(
        "magnitude",
        description="|θ| (SparseAdapter), |g⊙θ| (SNIP) or θ⊙Hg (GraSP), with gradient g and Hessian H of the ground truth's loss. Fresh "
        "adapters have no gradient yet: put a finetune step before.",
    )
    gradient_batches: int = Field(10, ge=1, description="Training batches that snip and grasp look at.")


PHASES: dict[str, type[Training]] = {"distill": Distill, "finetune": Finetune, "prune": Prune, "sparsify": Sparsify}
