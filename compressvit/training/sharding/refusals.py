"""What `sharded` does not go together with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import describe

if TYPE_CHECKING:
    from compressvit.tasks.base import Task
    from compressvit.training.spec import Training

# Optimisers of timm that do to every number what they would do to it alone, so that parts of tensors are enough for them.
BY_NUMBER = {
    *(
        "adabelief",
        "adadelta",
        "adam",
        "adamax",
        "adamc",
        "adamw",
        "adamwlegacy",
        "adan",
        "adanw",
        "adopt",
        "adoptc",
        "adoptw",
    ),
    *(
        "laprop",
        "lapropc",
        "lion",
        "lionc",
        "madgrad",
        "madgradw",
        "momentum",
        "nadam",
        "nadamc",
        "nadamlegacy",
        "nadamw",
    ),
    *("nesterov", "nesterovw", "radabelief", "radam", "radamlegacy", "radamw", "rmsprop", "rmsproptf", "rmsproptfc"),
    *("rmsproptfw", "sgd", "sgdc", "sgdw"),
}


def torch_divides() -> bool:
    """Whether this torch has `fully_shard` with all that is used of it."""
    import torch.distributed.fsdp as fsdp

    return hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms")


def refuse(spec: Training, models: Mapping[str, nn.Module], task: Task) -> None:
    """Raise a `UserError` where `sharded` does not go together with other options of a phase, or with its models by name."""
    cannot = {
        f"needs a newer torch than {torch.__version__}, such as 2.14; install it": not torch_divides(),
        "divides tensors that compile=true expects whole; set one of them to false": spec.compile,
        "cannot scale the loss as precision=fp16 does; set precision=bf16": spec.precision == "fp16",
        f"gives an optimiser parts of tensors, and {spec.optimizer} needs whole ones; take another, such as adamw, lion or sgd": (
            spec.optimizer not in BY_NUMBER
        ),
        "asks the teacher in all processes at once, and a cache only for what it lacks; leave cache out": (
            getattr(spec, "cache", None) is not None
        ),
        "does not go on from moments between the trainings of a phase that removes neurons; leave it out": (
            getattr(spec, "removal_scope", None) is not None
        ),
        f"needs every process to use the same layers, and those of the task {task.name!r} depend on the image; leave it out": (
            task.name == "detection"
        ),
    }
    for whose, model in models.items():
        mixed = len({p.dtype for p in model.parameters() if p.requires_grad}) > 1
        cannot[f"needs one precision of all that is trained, and the {whose} has several; leave it out"] = mixed
    for reason, so in cannot.items():
        if so:
            raise UserError(f"sharded=true {reason}")
    describe(models["student"], "blocks", asker="sharded")
