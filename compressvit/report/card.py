"""The model card of a student: what it is, what it was made from and how, its figures with the commands that give them, and its licence.

Paths of the machine that made it are cut to their last part.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
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

# Keys of a recipe whose values are paths, or words.
_PATHS = ("root", "weights", "backbone", "adapter", "artifact", "classes", "outside", "frozen")
_ABSOLUTE = re.compile(r"(?<![\w.:/…])(?:file://|~\w*|[A-Za-z]:)?[\\/](?:[^\s'\"=,]*[\\/])?([^\s'\"=,\\/]+)")
_SETS = re.compile(r"[\w.-]+=")


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
    """Where the weights of a recipe's teacher come from, as far as its values say it. Of an adapter, and of the backbone of a detector,
    no licence is known."""
    teacher = recipe.get("teacher")
    if not isinstance(teacher, dict):
        return Origin("not recorded")
    found = _of_weights(str(teacher.get("model")), str(teacher.get("weights")))
    text, licence = found.text, found.licence
    for key, words in (("backbone", "on the backbone"), ("adapter", "with the adapter")):
        if teacher.get(key):
            text, licence = f"{text}, {words} {cut(str(teacher[key]))}", None
    if teacher.get("finetune") and teacher.get("weights") not in ("train", "random"):
        text += ", trained further in the run"
    return Origin(text, found.repository, licence)


def _of_weights(model: str, weights: str) -> Origin:
    if weights.startswith(HUB):
        repository = weights.removeprefix(HUB).partition("@")[0]
        return Origin(f"{model}, weights of {repository}", repository)
    if weights == "pretrained":
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(model, allow_unregistered=False)
        if config is not None:
            return Origin(f"{model}, timm's pretrained weights", config.hf_hub_id, config.license)
    source = {"train": "trained in the run itself", "random": "untrained"}.get(weights, f"weights {cut(weights)}")
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
    cuts = Cuts(run.recipe if run else {})
    parts = [
        f"# {name}",
        _summary(run, manifest, steps, cuts),
        *([_figures(run, cuts)] if run else []),
        _use(name, manifest),
    ]
    parts += [*([_made(run, cuts)] if run else []), _licence(licence, origin)]
    return Card("\n\n".join(parts) + "\n", {key: value for key, value in about.items() if value is not None})


def _summary(run: Run | None, manifest: Manifest, steps: Sequence[str], cuts: Cuts) -> str:
    """What it is, in a paragraph."""
    made = f" after {', '.join(steps)}" if steps else ""
    text = f"A {manifest.architecture.partition('.')[0]}{made}, made with compressvit {manifest.compressvit or __version__}."
    if run is None:
        return text
    return f"{cuts.text(sections.title(run))}\n\n{text} {sections.verdict(run)}"


def _figures(run: Run, cuts: Cuts) -> str:
    """The table of teacher and student, and what its figures are of."""
    lines = ["## Figures", "", "| | teacher | student | student / teacher |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in sections.measures(run)]
    return "\n".join([*lines, "", *(f"- {cuts.text(text)}" for text in sections.details(run))]).rstrip()


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


def _made(run: Run, cuts: Cuts) -> str:
    """The recipe and the commands."""
    commands = [] if run.environment is None else [f"# how it was made\n{cuts.command(run.environment.command)}"]
    commands.append("# measure it again\ncompressvit evaluate RUN")
    recipe = yaml.safe_dump(cuts.values(run.recipe), sort_keys=False, allow_unicode=True).rstrip()
    return "\n".join(
        [
            *("## How it was made", "", "```bash", *commands, "```", ""),
            *("The recipe, with its defaults:", "", "```yaml", recipe, "```"),
        ]
    )


def _licence(licence: str, origin: Origin | None) -> str:
    """Of the student, and what is known of its teacher's."""
    teacher = "" if origin is None else f" The teacher: {origin.text}"
    known = "" if origin is None else f", {origin.licence}." if origin.licence else ", whose licence is not recorded."
    return f"## Licence\n\n{licence}.{teacher}{known}"


class Cuts:
    """Cuts the paths of a machine out of what a run recorded: those that its recipe names, and whatever looks like one.

    Args:
        recipe: of the run.
    """

    def __init__(self, recipe: dict[str, Any]):
        self._named = {value: cut(value) for value in _paths_in(recipe) if cut(value) != value}

    def text(self, text: str) -> str:
        """A text without them."""
        for path in sorted(self._named, key=len, reverse=True):
            text = text.replace(path, self._named[path])
        return _ABSOLUTE.sub(r"…/\1", text)

    def command(self, words: Sequence[str]) -> str:
        """A command: of every word, or of what it sets, the last part of a path."""
        found = []
        for word in words:
            key, sign, value = word.partition("=") if _SETS.match(word) else ("", "", word)
            found.append(f"{key}{sign}{cut(value)}")
        return shlex.join(found)

    def values(self, value: Any, key: str = "") -> Any:
        """The values of a recipe."""
        if isinstance(value, dict):
            return {name: self.values(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [self.values(one, key) for one in value]
        if not isinstance(value, str):
            return value
        return cut(value) if key in _PATHS else self.text(value)


def _paths_in(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _paths_in(one, name)
    elif isinstance(value, list):
        for one in value:
            yield from _paths_in(one, key)
    elif isinstance(value, str) and key in _PATHS:
        yield value


def cut(path: str) -> str:
    """A path without the folders that it is in; a name of the Hub as it is."""
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return path if path.startswith(HUB) or name == path else f"…/{name}"
