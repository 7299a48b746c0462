"""The model card of a student: what it is, what it was made from and how, its figures with the commands that give them, and its licence.

Paths of the machine that made it are cut to their last part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compressvit import __version__
from compressvit.model.hub import HUB
from compressvit.model.stored import Manifest, read_manifest
from compressvit.report import sections
from compressvit.report.record import Run, read_run
from compressvit.runs.folder import RESOLVED
from compressvit.tasks.base import Task

_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:|\.{1,2})?[\\/](?:[^\s'\"=,]*[\\/])?([^\s'\"=,\\/]+)")


@dataclass(frozen=True)
class Origin:
    """Where the weights of a teacher come from.

    Attributes:
        text: for a person.
        repository: of the Hugging Face Hub, where they are in one.
        licence: as the Hub writes it, where it is known.
    """

    text: str
    repository: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Card:
    """The parts of a model card.

    Attributes:
        about: metadata, as the Hub reads them.
        body: in Markdown.
    """

    body: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole file."""
        return f"---\n{yaml.safe_dump(self.about, sort_keys=False, allow_unicode=True)}---\n\n{self.body}"


def origin_of(recipe: dict[str, Any]) -> Origin:
    """Where the weights of a recipe's teacher come from, as far as its values say it."""
    teacher = recipe.get("teacher")
    model, weights = (str(teacher.get(key)) for key in ("model", "weights")) if isinstance(teacher, dict) else ("", "")
    if weights.startswith(HUB):
        repository = weights.removeprefix(HUB).partition("@")[0]
        return Origin(f"{model}, weights of {repository}", repository)
    if weights == "pretrained":
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(model, allow_unregistered=False)
        if config is not None:
            return Origin(f"{model}, timm's pretrained weights", config.hf_hub_id, config.license)
    source = {"train": "trained in the run itself", "random": "untrained"}.get(weights, f"weights {short(weights)}")
    return Origin(f"{model}, {source}")


def card(artifact: Path, name: str, task: Task, licence: str, origin: Origin | None = None) -> Card:
    """The card of the artifact in a folder, with the figures of its run where it lies in one.

    Args:
        name: of the repository, ORG/NAME.
        task: what the student's outputs mean.
        licence: of the student.
        origin: of the teacher.
    """
    manifest = read_manifest(artifact)
    run = read_run(artifact.parent) if (artifact.parent / RESOLVED).is_file() else None
    steps = list(dict.fromkeys(step.transform for step in manifest.transforms))
    about = {
        "license": licence,
        "library_name": "compressvit",
        "pipeline_tag": task.pipeline,
        "base_model": None if origin is None else origin.repository,
        "tags": ["compressvit", *steps],
    }
    parts = [f"# {name}", _summary(run, manifest, steps), *([_figures(run)] if run else []), _use(name, manifest)]
    parts += [*([_made(run)] if run else []), _licence(licence, origin)]
    return Card("\n\n".join(parts) + "\n", {key: value for key, value in about.items() if value is not None})


def _summary(run: Run | None, manifest: Manifest, steps: Sequence[str]) -> str:
    """What it is, in a paragraph."""
    made = f" after {', '.join(steps)}" if steps else ""
    text = f"A {manifest.architecture.partition('.')[0]}{made}, made with compressvit {manifest.compressvit or __version__}."
    if run is None:
        return text
    return f"{short(sections.title(run))}\n\n{text} {sections.verdict(run)}"


def _figures(run: Run) -> str:
    """The table of teacher and student, and what its figures are of."""
    lines = ["## Figures", "", "| | teacher | student | student / teacher |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in sections.measures(run)]
    return "\n".join([*lines, "", *(f"- {short(text)}" for text in sections.details(run))]).rstrip()


def _use(name: str, manifest: Manifest) -> str:
    """How it is loaded, and what it takes."""
    size = "×".join(map(str, manifest.input.get("input_size", ())))
    known = [f"{key} {manifest.input[key]}" for key in ("mean", "std", "interpolation") if key in manifest.input]
    return f"""## Use

```python
import compressvit  # pip install compressvit

model = compressvit.load("{HUB}{name}")
```

It takes images of {size} ({", ".join(known)}); `timm.data.resolve_model_data_config(model)` gives this to a transform."""


def _made(run: Run) -> str:
    """The recipe and the commands."""
    commands = [f"# {purpose}\n{short(command)}" for purpose, command in sections.reproduction(run)[:1]]
    commands.append("# measure it again\ncompressvit evaluate RUN")
    recipe = yaml.safe_dump(_shortened(run.recipe), sort_keys=False, allow_unicode=True).rstrip()
    return "\n".join(
        [
            "## How it was made",
            "",
            "```bash",
            *commands,
            "```",
            "",
            "The recipe, with its defaults:",
            "",
            "```yaml",
            recipe,
            "```",
        ]
    )


def _licence(licence: str, origin: Origin | None) -> str:
    """Of the student, and what is known of its teacher's."""
    teacher = "" if origin is None else f" The teacher: {origin.text}"
    known = "" if origin is None else f", {origin.licence}." if origin.licence else ", whose licence is not recorded."
    return f"## Licence\n\n{licence}.{teacher}{known}"


def _shortened(value: Any) -> Any:
    """Values of a recipe whose paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: _shortened(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shortened(one) for one in value]
    return short(value) if isinstance(value, str) else value


def short(text: str) -> str:
    """A text whose paths are cut to their last part."""
    return _PATH.sub(r"…/\1", text)
