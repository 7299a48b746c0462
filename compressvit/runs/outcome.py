"""What a run ends with: scores of its models, and the student beside its teacher in `results.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import save_adapter
from compressvit.data.input import class_mismatch, input_config, renormalise
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import Datasets
from compressvit.files import disk_faults, write_text
from compressvit.log import RunLog, log
from compressvit.model import cost, stored
from compressvit.recipe.recipe import Recipe
from compressvit.runs import tensorboard
from compressvit.runs.folder import RunFolder
from compressvit.runs.predictions import Predictions
from compressvit.runs.tables import results_table
from compressvit.training.evaluate import Watch, evaluate
from compressvit.transforms.record import compression_of, only_adapted, trained_names, trained_parameters


@dataclass(frozen=True)
class Scorer:
    """Evaluates models on a recipe's held-out images, each as the model itself wants them."""

    recipe: Recipe
    datasets: Datasets
    device: torch.device

    def score(self, model: nn.Module, teacher: nn.Module | None, watch: Watch | None = None) -> dict[str, Any]:
        """`evaluate` of a model, beside `teacher` where one is given; both are moved to the device."""
        config = input_config(model, self.recipe.data)
        model.to(self.device)
        if teacher is not None:
            teacher.to(self.device).eval()
            theirs = input_config(teacher, self.recipe.data)
        return evaluate(
            model,
            eval_loader(self.datasets, self.recipe.data, config, self.device),
            self.device,
            teacher=teacher,
            teacher_input=(lambda images: renormalise(images, config, theirs))
            if teacher is not None
            else (lambda images: images),
            labelled=self.datasets.labeled,
            watch=watch,
        )

    def in_training(self, model: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
        """Without labels, or classes to tell apart, only the teacher says how good a student is."""
        enough = self.datasets.labeled and getattr(model, "num_classes", 0)
        return self.score(model, None if enough else self.comparable(teacher))

    def comparable(self, teacher: nn.Module | None) -> nn.Module | None:
        """The teacher, unless the student has another task than it."""
        return None if self.recipe.student.head == "new" else teacher


def score_words(result: dict[str, Any]) -> str:
    """The scores that were measured, in a few words."""
    names = {"top1": "top-1 {:.2f}%", "agreement": "agreement with the teacher {:.2f}%", "cosine": "cosine {:.4f}"}
    names |= {"cosine_patches": "of the patch tokens {:.4f}"}
    return ", ".join(text.format(result[k]) for k, text in names.items() if result.get(k) is not None)


def finish(
    scorer: Scorer,
    folder: RunFolder,
    voice: RunLog,
    *,
    teacher: nn.Module,
    student: nn.Module,
    teacher_cost: dict[str, Any],
    phases: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write the student, read it back, compare, measure, and print the table.

    Args:
        scorer: of the recipe's data.
        folder, voice: of the run.
        teacher, student: as the steps left them.
        teacher_cost: the teacher's part of the plan.
        phases: what each phase began with and which weights it kept.

    Returns:
        The content of `results.json`.
    """
    recipe, datasets = scorer.recipe, scorer.datasets
    config, theirs = (input_config(model, recipe.data) for model in (student, teacher))
    sizes = [(c.channels, c.height, c.width) for c in (theirs, config)]
    with disk_faults(folder.student):
        artifact.save(student, folder.student, input_config=config.as_dict())
    difference = artifact.read_back_difference(folder.student, student, sizes[1])
    predictions = Predictions(config, getattr(student, "num_classes", 0), datasets.class_names, datasets.labeled)
    comparable = scorer.comparable(teacher)
    scores = scorer.score(student, comparable, predictions.add)
    theirs_only = {key: scores.pop(f"teacher_{key}", None) for key in ("top1", "top5", "loss")}
    if comparable and theirs != config:  # it was compared on the student's images, but its own accuracy is on its own
        own = scorer.score(teacher, None)
        theirs_only = {key: own[key] for key in theirs_only}
    results: dict[str, Any] = {
        "teacher": {**teacher_cost, "images": scores["images"], **theirs_only},
        "student": {**cost.cost(student, sizes[1]).as_dict(), **scores, **trained_parameters(student)},
        "phases": phases,
        "ledger": [asdict(entry) for entry in compression_of(student).ledger],
        "read_back_difference": difference,
        "broken_images": datasets.broken.count,
    }
    results["student"]["bytes"] = (folder.student / stored.TENSORS).stat().st_size
    if only_adapted(student) and trained_names(student):
        with disk_faults(folder.path):
            file = save_adapter(student, folder.path / "adapter.safetensors")
        results["student"]["adapter_bytes"] = file.stat().st_size
    times = cost.latency([teacher, student], sizes, device=scorer.device)
    results["teacher"]["latency_ms"], results["student"]["latency_ms"] = times
    write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
    voice.board(lambda writer: tensorboard.show_results(writer, recipe, results))
    predictions.write(folder.path)
    voice.show(results_table(results, f"{recipe.teacher.model} → {folder.student}"))
    mismatch = class_mismatch(datasets.num_classes, getattr(teacher, "num_classes", 0))
    if comparable and mismatch:
        log.warning("warning: %s", mismatch)
    voice.say(
        f"latency: batch 1 on {scorer.device}, {torch.get_num_threads()} threads, median of up to 30 in turns. "
        f"The student was read back from disk: largest difference of its outputs {difference:.1e}"
    )
    if datasets.broken.count:
        voice.say(f"{datasets.broken.count} broken image files were skipped; run.log names them")
    voice.say(f"run folder: {folder.path}")
    return results
