"""The `finetune` phase: train with the ground truth."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from compressvit.training.cache.spec import Features
from compressvit.training.phases.base import PhaseSpec, Setting, phase

if TYPE_CHECKING:
    from torch import nn

    from compressvit.training.cache.features import FeatureCache
    from compressvit.training.stage import Stage


@phase("finetune")
class Finetune(PhaseSpec):
    """Train on the labels only, also used to train a teacher from scratch."""

    cache: Features | None = Field(
        None,
        description="Keep what the frozen part of the model computes: the features of a frozen backbone (`backbone_lr: 0`), or those "
        "before a classifier that is trained alone (`freeze: {train: head}`), so that later epochs and other runs read them.",
    )

    @model_validator(mode="after")
    def _features_of_one_image(self) -> Finetune:
        if self.cache is not None and (self.mixup or self.cutmix):
            raise ValueError(
                "cache keeps the features of an image, and mixup and cutmix mix the pixels of two; set both to 0, or leave cache out"
            )
        if self.cache is not None and self.compile:
            raise ValueError(
                "cache gives the model its features from outside, and compile=true makes one program of the whole model; "
                "leave one of the two out"
            )
        return self

    def kept(self, setting: Setting) -> dict[str, Any] | None:
        from compressvit.training.cache.features import planned_features

        return None if self.cache is None else planned_features(self.cache, self, setting.student)

    def run(self, model: nn.Module, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
        from compressvit.training.terms import labels_term

        opened: list[FeatureCache] = []
        cache = None if self.cache is None else partial(self._open, self.cache, model, stage, opened)
        report = stage.train(model, self, [labels_term(1.0, self.smoothing, stage.task)], cache=cache)
        for used in opened:
            told = used.told()
            stage.log.say(f"{stage.phase.name}: {told}")
        return model, report

    def _open(
        self, cache: Features, model: nn.Module, stage: Stage, opened: list[FeatureCache], loader: Any
    ) -> FeatureCache:
        from compressvit.data.input import Side
        from compressvit.training.cache.features import open_features

        run = stage.phase.checkpoint.parents[1]
        made = open_features(cache, self, loader, Side(model, stage.input), run)
        stage.log.say(f"{stage.phase.name}: the features of {made.cut.words} are kept in {made.store.folder}")
        opened.append(made)
        return made
