"""The section `cache` of a distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressvit.spec import Spec


class Cache(Spec):
    """Where the teacher's answers are kept, so that it is asked once for every image in every view.

    What is kept: the largest logits, and what the loss terms read inside the teacher. Runs with the same teacher, data, augmentation, terms
    and settings read each other's answers.
    """

    folder: str | None = Field(
        None,
        min_length=1,
        description="The folder of the answers, of one teacher. By default teacher_cache/ beside the run folder, in which every teacher, "
        "augmentation and choice of terms has a folder of its own, so that the runs of a sweep share what fits.",
    )
    views: int | None = Field(
        None,
        ge=1,
        description="How many augmentations of every image there are: epoch e shows view e mod views. By default one for every epoch.",
    )
    top: int = Field(
        50,
        ge=1,
        le=65_536,
        description="How many of the largest logits are kept, in 4 bytes each; the other classes share the rest of the probability "
        "evenly.",
    )
    dtype: Literal["bf16", "int8"] = Field(
        "bf16",
        description="What tensors inside the teacher are kept in: bf16 is off by at most 0.4% of a value, int8 by at most 0.4% of the "
        "largest value of its token.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Decides the augmentation of every image in every view, and what mixup and cutmix mix. It is not the run's, so that "
        "runs with other seeds read the same answers.",
    )
    limit_gb: float = Field(
        20.0,
        gt=0,
        description="What the files may take, in 10⁹ bytes; a cache that would take more is refused before training.",
    )
