"""The `distill` phase: train a student to behave as its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.config import JsonDict

from compressvit import processes
from compressvit.errors import UserError
from compressvit.training.cache.spec import Cache
from compressvit.training.phases.base import PhasePlan, PhaseSpec, Setting, phase
from compressvit.training.terms.base import OF_TERMS
from compressvit.training.terms.section import LossSection, losses_section

if TYPE_CHECKING:
    from torch import nn

    from compressvit.tasks.base import Task
    from compressvit.training.cache.cache import TeacherCache
    from compressvit.training.pairs import LayerPair, Likeness
    from compressvit.training.stage import Stage
    from compressvit.training.terms import Term


def _show_default(schema: JsonDict) -> None:
    """Add the default losses to the schema, once the keys of the losses are known."""
    schema["default"] = losses_section()().model_dump(mode="json")


@phase("distill")
class Distill(PhaseSpec):
    """Train the student to reproduce its teacher (by default MiniViT's weight distillation)."""

    needs_classifier: ClassVar[bool] = False

    model_config = ConfigDict(defer_build=True)  # completed when the keys of `losses` are known

    losses: LossSection = Field(default_factory=lambda: losses_section()(), json_schema_extra=_show_default)
    layers: Literal["matched", "auto"] | tuple[tuple[int, int], ...] = Field(
        "matched",
        description="Pairs [student block, teacher block] for the relation losses and cka, counted from 0 over the whole model. "
        "'matched': the last block of every share group (of every stage if nothing is shared), with the teacher's block "
        "of the same index; teacher and student must be of one architecture and have the same depths. 'auto': the last block of every "
        "share group (every block if nothing is shared), with the teacher's block that is most similar when the phase begins, by CKA on "
        "the calibration images, in order (within stage and window shift, where both are of one architecture); depths and architectures "
        "may differ.",
    )
    cache: Cache | None = Field(
        None,
        description="Keep the teacher's answers, so that later epochs and other runs read them instead of asking it again.",
    )

    @property
    def needs_labels(self) -> bool:
        return any(term.needs_labels for term in self.losses.terms())

    @field_validator("losses")
    @classmethod
    def _something_to_learn(cls, losses: LossSection) -> LossSection:
        if not losses.terms():
            raise ValueError("every loss term has weight 0, so there is nothing to learn; give one a weight")
        return losses

    def plan(self, setting: Setting) -> PhasePlan:
        from compressvit.training.loss_memory import loss_bytes
        from compressvit.training.pairs import match_layers

        student, teacher = setting.student, setting.teacher
        assert teacher is not None, "only the teacher itself is trained without one"
        plan = super().plan(setting)
        self._refuse_other_classes(student.model, teacher.model)
        pairs, plan.layers_rule = match_layers(student.model, teacher.model, self.layers)
        plan.layers = [(p.student.index, p.teacher.index) for p in pairs]
        terms = self.terms(student.model, pairs, setting.task, teacher.model)
        plan.summary += "".join(f"; {term.name}: {term.note}" for term in terms if term.note)
        plan.loss_bytes = loss_bytes(
            student.model, teacher.model, terms, setting.batch_size, student.input, teacher.input, setting.task
        )
        unknown = [term.name for term in terms if term.name not in plan.loss_bytes]
        if self.cache is not None:
            plan.cache = self._plan_cache(self.cache, setting, terms)
        if unknown:
            plan.summary += f"; the memory of {', '.join(unknown)} is known only when it runs"
        return plan

    def _plan_cache(self, cache: Cache, setting: Setting, terms: Sequence[Term]) -> dict[str, Any]:
        from compressvit.tasks.base import task_of
        from compressvit.training.cache.form import form_of
        from compressvit.training.cache.store import view_bytes

        assert setting.teacher is not None, "as in `plan`"
        task = setting.task or task_of(setting.teacher.model)
        form = form_of(cache, setting.teacher, terms, task, self._temperature)
        return {"views": cache.views or self.epochs, "answer_bytes": view_bytes(1, form.bytes)}

    def preview(self, student: nn.Module, teacher: nn.Module, likeness: Likeness) -> str | None:
        from compressvit.training.pairs import match_layers

        if self.layers != "auto":
            return None
        pairs, how = match_layers(student, teacher, self.layers, likeness)
        return f"layer pairs (student↔teacher): {', '.join(map(str, pairs)) or 'none'}  ({how})"

    def run(self, model: nn.Module, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
        from compressvit.training.pairs import match_layers_once

        assert stage.teacher is not None, "only the teacher itself is trained without one"
        kept = stage.phase.checkpoint.with_suffix(".layers.json")
        teacher, likeness = stage.teacher.model, stage.likeness
        pairs, how = processes.first(  # with what the leader has found, in a file
            lambda: match_layers_once(model, teacher, self.layers, likeness(model), kept)
        )
        model.to(stage.device)
        terms = self.terms(model, pairs, stage.task, stage.teacher.model)
        names = ", ".join(term.name for term in terms)
        stage.log.say(f"{stage.phase.name}: {names}; layer pairs {', '.join(map(str, pairs)) or 'none'} ({how})")
        for term in terms:
            if term.note:
                stage.log.say(f"{stage.phase.name}: {term.name}: {term.note}")
        with _trained_along(model, terms):
            opened: list[TeacherCache] = []
            cache = None if self.cache is None else partial(self._open, self.cache, stage, terms, opened)
            report = stage.train(model, self, terms, taught=True, cache=cache)
        for used in opened:
            told = used.told()
            stage.log.say(f"{stage.phase.name}: {told}")
        return model, report

    def _open(
        self, cache: Cache, stage: Stage, terms: Sequence[Term], opened: list[TeacherCache], loader: Any
    ) -> TeacherCache:
        from compressvit.training.cache.cache import open_cache

        assert stage.teacher is not None, "only the teacher itself is trained without one"
        task = stage.task_of(stage.teacher.model)
        run = stage.phase.checkpoint.parents[1]
        made = open_cache(cache, self, loader, stage.teacher, stage.input, terms, task, self._temperature, run)
        stage.log.say(f"{stage.phase.name}: the teacher's answers are kept in {made.store.folder}")
        opened.append(made)
        return made

    @property
    def _temperature(self) -> float:
        """At which the teacher's predictions are compared."""
        return next((float(getattr(t, "temperature", 1.0)) for t in self.losses.terms() if t.compares_logits), 1.0)

    def terms(
        self,
        student: nn.Module,
        pairs: Sequence[LayerPair],
        task: Task | None = None,
        teacher: nn.Module | None = None,
    ) -> list[Term]:
        """The loss terms for a student; see `compressvit.training.terms.build_terms`."""
        from compressvit.model.backbone import family_of
        from compressvit.training.terms import build_terms
        from compressvit.training.terms.base import FEATURES

        family = family_of(student)
        return build_terms(
            self.losses,
            pairs,
            classes=getattr(student, "num_classes", 0),
            prefix_tokens=getattr(student, "num_prefix_tokens", 0),
            smoothing=self.smoothing,
            task=task,
            features=FEATURES if family is None else family.features,
            teacher=teacher,
            student=student,
        )

    def _refuse_other_classes(self, student: nn.Module, teacher: nn.Module) -> None:
        ours, theirs = (getattr(model, "num_classes", 0) for model in (student, teacher))
        for term in self.losses.terms():
            if term.compares_logits and ours and theirs and ours != theirs:
                raise UserError(
                    f"losses.{term.name} compares classes, but the student has {ours} and the teacher {theirs}; set "
                    f"losses.{term.name}.weight=0, or give both the same classifier"
                )


@contextmanager
def _trained_along(model: nn.Module, terms: Sequence[Term]) -> Iterator[None]:
    """Within, what terms train belongs to the model, so that optimiser, checkpoint and average know of it."""
    from torch import nn

    modules = {term.name: term.module for term in terms if term.module is not None}
    if not modules:
        yield
        return
    model.add_module(OF_TERMS, nn.ModuleDict(modules))
    try:
        yield
    finally:
        del model._modules[OF_TERMS]
