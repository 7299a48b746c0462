"""Options of training that all phases share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from compressvit.spec import Spec

# Defaults of a phase whose student was fitted to its teacher on calibration images: what the closed form found is easily lost.
AFTER_A_FIT: dict[str, Any] = {"lr": 1e-5, "keep": "best"}


class Training(Spec):
    """Options that all phases share. Optimisers, schedules, mixup and cutmix are those of timm, under timm's names."""

    epochs: int = Field(10, ge=1, description="Passes over the training set.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Stop after this many optimiser steps, even before `epochs` are done; the schedule is still that of `epochs`.",
    )
    optimizer: str = Field("adamw", description="Any name of timm.optim.list_optimizers().")
    lr: float = Field(
        1e-3,
        gt=0,
        description="Peak learning rate. In a recipe, `distill` and `finetune` of a student that was fitted to calibration images have "
        "1e-5 by default, because a good start is easily lost.",
    )
    backbone_lr: float = Field(
        1.0,
        ge=0,
        description="Of a detector or segmenter: the learning rate of its backbone, as a factor of `lr`; 0 freezes it.",
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Factor of `lr` from each layer to the one before it, counted from the classifier by timm's `group_matcher` "
        "(BEiT's and MAE's fine-tuning: 0.65 to 0.75); what several layers share has that of the first.",
    )
    frozen: tuple[str, ...] = Field(
        (),
        description="Paths of modules, or patterns of them, that the phase does not train and keeps in eval mode, e.g. [backbone.layer1].",
    )
    lr_reference_batch: int | None = Field(
        None,
        ge=1,
        description="If set, `lr` is scaled by batch_size · accumulate / this (linear scaling; MiniViT: 1024).",
    )
    weight_decay: float = Field(
        0.05, ge=0, description="Not applied to 1-D tensors or to the names in the model's no_weight_decay()."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="For Adam and its variants; ignored by other optimisers."
    )
    momentum: float = Field(0.9, description="For SGD and its variants; ignored by Adam and its variants.")
    schedule: Literal["cosine", "poly", "step", "constant"] = Field(
        "cosine", description="Schedule of the learning rate, per optimiser step."
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Linear warm-up from `warmup_lr`.")
    warmup_lr: float = Field(1e-6, ge=0, description="Learning rate at the first step of the warm-up.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a cosine or poly schedule.")
    power: float = Field(
        0.9,
        gt=0,
        description="With `schedule: poly`, of what is left of the phase: the learning rate falls with it to `min_lr`.",
    )
    decay_epochs: float = Field(
        30.0, gt=0, description="With `schedule: step`, multiply the learning rate by `gamma` every this many epochs."
    )
    milestones: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="With `schedule: step`, multiply it by `gamma` after these many epochs instead, e.g. [8, 11] of 12 epochs.",
    )
    gamma: float = Field(0.1, gt=0, lt=1, description="Factor of a step of the learning rate.")
    clip_grad: float | None = Field(
        5.0, gt=0, description="Maximum L2 norm of the whole gradient; null for no clipping."
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="How many optimiser steps with a loss or gradient that is not finite the phase leaves out before it stops with the "
        "weights from before the next one. With more than 0 every step waits for the device.",
    )
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are accumulated for one optimiser step.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of autocast; parameters stay in float32."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights, which is evaluated and becomes the result. It rises with the number of "
        "updates t, min(ema, (1 + t) / (10 + t)), so that the first steps do not dominate the average of a short phase.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only the input of every block of the trained model for the backward pass, and compute the rest again there: the "
        "same weights in less memory, for the time of another forward pass. Blocks that a loss or a diagnostic looks into keep all.",
    )
    sharded: bool = Field(
        False,
        description="In several processes, divide student, average, teacher and optimiser state among them (torch's FSDP2): each has whole "
        "tensors of a block only while it computes. For models that do not fit otherwise: the same weights, for more communication.",
    )
    compile: bool = Field(False, description="Use torch.compile on the trained model and the teacher.")
    mixup: float = Field(0.0, ge=0, description="α of mixup; 0 for none.")
    cutmix: float = Field(0.0, ge=0, description="α of cutmix; 0 for none.")
    smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing.")
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Stochastic depth rate of the last block, rising linearly from 0; null keeps the model's.",
    )
    evaluate_every: int = Field(1, ge=1, description="Epochs between two evaluations.")
    keep: Literal["last", "best"] = Field(
        "last",
        description="Which weights the phase keeps: the last, or those of its best evaluation, including the one before training, so it "
        "never ends worse than it started: in a recipe the default of `distill` and `finetune` for a student that was fitted to "
        "calibration images. Best means highest top-1, or without labels agreement or cosine with the teacher. The figure "
        "is optimistic, because it was chosen on the evaluation set.",
    )
    log_every: int = Field(10, ge=1, description="Optimiser steps between two log lines.")

    @model_validator(mode="after")
    def _milestones_of_a_step_schedule(self) -> Training:
        given = self.milestones
        if given is None:
            return self
        if self.schedule != "step":
            raise ValueError(
                f"milestones are for schedule: step, and this is schedule: {self.schedule}; change one of them"
            )
        if any(a >= b for a, b in pairwise((0.0, *given))) or given[-1] >= self.epochs:
            raise ValueError(
                f"milestones={list(given)} must rise, after epoch 0 and before the {self.epochs} epochs end"
            )
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether the phase learns from the ground truth."""
        return True

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate after linear scaling for batches of `batch_size` images."""
        return self.lr * (batch_size * self.accumulate / self.lr_reference_batch if self.lr_reference_batch else 1)
