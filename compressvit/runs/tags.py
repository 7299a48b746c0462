"""Names of curves on boards such as TensorBoard, which are the same in all runs, and what they show in addition to curves.

Phases are named by their key, without their position in the recipe: `distill/evaluate/top1`, and `distill_2/…` for a second `distill`
phase. Runs therefore share charts regardless of the number of transforms before a phase. An evaluation before training is step 0 of the
phase. In `metrics.jsonl`, names include the position ('1_distill').
"""

from __future__ import annotations

from collections.abc import Mapping

from compressvit.recipe.recipe import Recipe
from compressvit.runs.files import Results
from compressvit.runs.folder import flat
from compressvit.tasks.qualities import graded, qualities, ranking
from compressvit.training.spec import Training

_COSTS = ("parameters", "trained_adapter", "bytes", "macs", "latency_ms")


def step_names(recipe: Recipe) -> list[str]:
    """A name for every step: its key, followed by a number from the second step of that kind on."""
    names: list[str] = []
    words = [step.name for step in recipe.steps]
    for index, word in enumerate(words):
        earlier = words[:index].count(word)
        names.append(f"{word}_{earlier + 1}" if earlier else word)
    return names


def scalar_tags(recipe: Recipe) -> dict[str, str]:
    """The name of every step on boards, by its name in messages and files, such as '1_distill'."""
    names, tags = step_names(recipe), {}
    for index, step in enumerate(recipe.steps):
        phases = (i for i in range(index, len(names)) if isinstance(recipe.steps[i].spec, Training))
        tags[f"{index}_{step.name}"] = names[next(phases, index)]
    return tags


def tag_of(phase: str, tags: Mapping[str, str]) -> str:
    """The name of a phase on boards, according to `scalar_tags`; cycles keep their number ('prune_cycle2')."""
    step, cycle, number = phase.partition("_cycle")
    return f"{tags.get(step, step)}{cycle}{number}"


def hyper_parameters(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Every value of a recipe by its path, with steps by name: `data.batch_size`, `distill.lr`, `multiplex.share`."""
    content = recipe.model_dump(mode="json", exclude={"description", "steps", "diagnostics"})
    for name, step in zip(step_names(recipe), recipe.steps, strict=True):
        content[name] = step.spec.model_dump(mode="json")
    return {key: value for key, value in flat(content).items() if isinstance(value, (bool, int, float, str))}


def final_figures(results: Results) -> dict[str, float]:
    """The figures at the end of a run, as `final/KEY`, and the teacher's."""
    first, own = ranking(), graded()
    scores = [key for key in qualities() if key in first or key in own]
    found = {f"final/{key}": results.student.value(key) for key in (*scores, *_COSTS)}
    theirs = (*(key for key in scores if key in first and key in own), "parameters", "latency_ms")
    found |= {f"final/teacher_{key}": results.teacher.value(key) for key in theirs}
    return {tag: float(value) for tag, value in found.items() if value is not None}
