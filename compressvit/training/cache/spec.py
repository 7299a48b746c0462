"""The sections `cache` of a distillation and of a training on labels."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compressvit.spec import Spec


class CacheFiles(Spec):
    """What caches have in common."""

    ways: ClassVar[str] = "fewer views, or dtype=int8"  # to smaller files

    views: int | None = Field(
        None,
        ge=1,
        description="How many augmentations of every image there are: epoch e shows view e mod views. By default one for every epoch.",
    )
    dtype: Literal["bf16", "int8", "fp32"] = Field(
        "bf16",
        description="What tensors inside the model are kept in: bf16 is off by at most 0.4% of a value, int8 by at most 0.4% of the "
        "largest value of its token, fp32 not at all.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Decides the augmentation of every image in every view, and what mixup and cutmix mix. It is not the run's, so that "
        "runs with other seeds read the same files.",
    )
    limit_gb: float = Field(
        20.0,
        gt=0,
        description="What the files may take, in 10⁹ bytes; a cache that would take more is refused before training.",
    )


class Cache(CacheFiles):
    """Where the teacher's answers are kept, so that it is asked once for every image in every view.

    What is kept: the largest logits, and what the loss terms read inside the teacher. Runs with the same teacher, data, augmentation, terms
    and settings read each other's answers.
    """

    ways: ClassVar[str] = "fewer views, a smaller top, or dtype=int8"

    folder: str | None = Field(
        None,
        min_length=1,
        description="The folder of the answers, of one teacher. By default teacher_cache/ beside the run folder, in which every teacher, "
        "augmentation and choice of terms has a folder of its own, so that the runs of a sweep share what fits.",
    )
    top: int = Field(
        50,
        ge=1,
        le=65_536,
        description="How many of the largest logits are kept, in 4 bytes each; the other classes share the rest of the probability "
        "evenly.",
    )


class Features(CacheFiles):
    """Where the features of a frozen backbone are kept, so that they are computed once for every image in every view.

    What is kept: what a detector, segmenter or video model has of its backbone, or what a classifier is given that is trained alone. Runs
    with the same frozen part, data, augmentation and settings read each other's features.
    """

    folder: str | None = Field(
        None,
        min_length=1,
        description="The folder of the features, of one frozen part. By default feature_cache/ beside the run folder, in which every "
        "frozen part and augmentation has a folder of its own, so that the runs of a sweep share what fits.",
    )
