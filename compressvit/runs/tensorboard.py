"""What TensorBoard shows of a run in addition to its curves, under names that are the same in all runs.

A phase is called by its word, without its place in the recipe: `distill/evaluate/top1`, and `distill_2/…` where a recipe has a second one.
So runs lie in one chart whether one transform comes before the phase, three, or none. What an evaluation before training finds is step 0
of the phase that follows. `metrics.jsonl` keeps the places ('1_distill').
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressvit.recipe.recipe import Recipe
from compressvit.runs.files import Results
from compressvit.runs.folder import flat
from compressvit.tasks.qualities import graded, qualities, ranking
from compressvit.training.spec import Training

_COSTS = ("parameters", "trained_adapter", "bytes", "macs", "latency_ms")


def step_names(recipe: Recipe) -> list[str]:
    """A name for every step: its word, followed by a number from the second of its kind on."""
    names: list[str] = []
    words = [step.name for step in recipe.steps]
    for index, word in enumerate(words):
        earlier = words[:index].count(word)
        names.append(f"{word}_{earlier + 1}" if earlier else word)
    return names


def scalar_tags(recipe: Recipe) -> dict[str, str]:
    """What TensorBoard calls a step that messages and files call by its place, such as '1_distill'."""
    names, tags = step_names(recipe), {}
    for index, step in enumerate(recipe.steps):
        phases = (i for i in range(index, len(names)) if isinstance(recipe.steps[i].spec, Training))
        tags[f"{index}_{step.name}"] = names[next(phases, index)]
    return tags


def tag_of(phase: str, tags: Mapping[str, str]) -> str:
    """What TensorBoard calls a phase, by `scalar_tags`; that of a cycle keeps its number ('prune_cycle2')."""
    step, cycle, number = phase.partition("_cycle")
    return f"{tags.get(step, step)}{cycle}{number}"


def hyper_parameters(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Every value of a recipe by its path, that of a step by its name: `data.batch_size`, `distill.lr`, `multiplex.share`."""
    content = recipe.model_dump(mode="json", exclude={"description", "steps", "diagnostics"})
    for name, step in zip(step_names(recipe), recipe.steps, strict=True):
        content[name] = step.spec.model_dump(mode="json")
    return {key: value for key, value in flat(content).items() if isinstance(value, (bool, int, float, str))}


def show_results(writer: Any, recipe: Recipe, results: Results) -> None:
    """The HParams tab: the recipe beside what came out, as scalars `final/…`.

    Args:
        writer: torch's SummaryWriter of the run. Its own `add_hparams` would make a second run of it.
        results: the content of results.json.
    """
    from torch.utils.tensorboard import summary  # a second, which programs that only want names should not wait for

    first, own = ranking(), graded()
    scores = [key for key in qualities() if key in first or key in own]
    found = {f"final/{key}": results.student.value(key) for key in (*scores, *_COSTS)}
    theirs = (*(key for key in scores if key in first and key in own), "parameters", "latency_ms")
    found |= {f"final/teacher_{key}": results.teacher.value(key) for key in theirs}
    metrics = {tag: float(value) for tag, value in found.items() if value is not None}
    for part in summary.hparams(hyper_parameters(recipe), metrics):
        writer.file_writer.add_summary(part)
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, 0)
