"""A run folder holds everything one `apply` did, written before the first step where it can be.

`recipe.yaml` (as given) · `resolved.yaml` (defaults and overrides in) · `environment.json` · `plan.json` · `checkpoints/` ·
`student/` · `metrics.jsonl` · `tensorboard/` · `run.log` · `results.json` · `predictions.json` and `predictions/` · `diagnostics/` ·
`report.html`
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressvit import __version__
from compressvit.errors import UserError
from compressvit.files import disk_faults, write_json, write_text
from compressvit.model.header import MANIFEST
from compressvit.model.old import RESOLVED, current_recipe, stored_step
from compressvit.reading import MAX_YAML, parse_yaml, read_text
from compressvit.runs.files import Environment
from compressvit.runs.owned import delete, refuse_foreign, refuse_links

if TYPE_CHECKING:
    from compressvit.charts.findings import Finding
    from compressvit.recipe.recipe import Recipe


class RunFolder:
    """Paths of a run, and the rules for starting one: nothing is overwritten or resumed silently."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def student(self) -> Path:
        """The compressed model, an artifact."""
        return self.path / "student"

    @property
    def teacher(self) -> Path:
        """The teacher, an artifact, where the run trained it."""
        return self.path / "teacher"

    @property
    def diagnostics(self) -> Path:
        """The findings of a run (`compressvit.charts.findings`)."""
        return self.path / "diagnostics"

    def keep(self, finding: Finding) -> None:
        """Write a finding to `diagnostics/`, and its picture where a person looks first."""
        finding.write(self.diagnostics, pictures=False)
        finding.picture(self.path / f"{finding.name}.png")

    def checkpoint(self, name: str) -> Path:
        """The checkpoint file of a phase."""
        return self.path / "checkpoints" / f"{name}.pt"

    def transformed(self, name: str) -> Path:
        """The student after transforms that learned from images, an artifact, for resuming the run."""
        return self.path / "checkpoints" / stored_step(self.path / "checkpoints", name)

    def refuse_or_clear(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may start here. Nothing is deleted yet; `open` does that.

        Raises:
            UserError: the folder is not empty and neither flag was given; `resume` without a run, or of another recipe;
                `overwrite` of a folder that is not a run.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; name a folder")
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if resume:
            self._refuse_other_recipe(recipe)
            refuse_links(self.path.resolve())
        elif occupied and not overwrite:
            raise UserError(
                f"{self.path} is not empty. Give --resume to continue the run in it, --overwrite to delete it and start again, "
                "or --output for another folder"
            )
        elif occupied and not (self.path / RESOLVED).is_file():
            raise UserError(
                f"--overwrite: {self.path} is not empty and not a run folder (no {RESOLVED}), so it is not deleted; use --output"
            )
        elif occupied:
            refuse_foreign(self.path)

    def _refuse_other_recipe(self, recipe: Recipe) -> None:
        if not (self.path / RESOLVED).is_file():
            raise UserError(f"--resume: there is no run in {self.path} (no {RESOLVED}); start it without --resume")
        from compressvit.recipe.recipe import parse_recipe  # here, because a report reads run folders without torch

        try:
            text = read_text(self.path / RESOLVED, most=MAX_YAML)
            before = flat(current_recipe(parse_yaml(text, RESOLVED)))
            with suppress(UserError):  # keys that are newer than the run have their defaults
                before = flat(parse_yaml(parse_recipe(text, RESOLVED).to_yaml(), RESOLVED))
        except UserError as error:
            raise UserError(
                f"--resume: {self.path / RESOLVED} is damaged, so the run's settings are not known; start a new run with --output"
            ) from error
        now = flat(parse_yaml(recipe.to_yaml(), "the recipe"))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            lines = [f"  {key}: {_value(before, key)} in the run, {_value(now, key)} now" for key in changed]
            raise UserError(
                f"--resume: the recipe is not the one that {self.path} was started with:\n" + "\n".join(lines) + "\n"
                "Give the same recipe and overrides, or start a new run with --output"
            )

    def open(
        self, recipe: Recipe, recipe_text: str, plan: dict[str, Any], command: list[str], *, overwrite: bool
    ) -> None:
        """Make the folder and write what is known before the first step."""
        with disk_faults(self.path):
            if overwrite and self.path.is_dir():
                delete(self.path.resolve())  # a link to a folder stays, and so does its folder
            self.path.resolve().mkdir(parents=True, exist_ok=True)
        write_text(self.path / "recipe.yaml", recipe_text)
        write_text(self.path / RESOLVED, recipe.to_yaml())
        found = environment(command, recipe.packages)
        write_json(self.path / "environment.json", found.model_dump())
        write_json(self.path / "plan.json", plan)


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders among `paths` and directly in them, each once.

    Raises:
        UserError: a path is neither; the sentence says what it is instead.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / RESOLVED).is_file():
            found.append(path)
        elif path.is_dir() and (inside := sorted(file.parent for file in path.glob(f"*/{RESOLVED}"))):
            found += inside
        else:
            raise UserError(_not_a_run(path))
    return list({path.resolve(): path for path in found}.values())


def _not_a_run(path: Path) -> str:
    way_out = "give a folder that `compressvit apply` wrote, or one with such folders in it"
    if not path.exists():
        return f"there is no {path}; {way_out}"
    if not path.is_dir():
        return f"{path} is a file, not a run folder; {way_out}"
    if not any(path.iterdir()):
        return f"{path} is empty: no run has begun in it; {way_out}"
    if (path / MANIFEST).is_file():
        return f"{path} is a model, not a run folder; give the run folder that contains it"
    if (path / "recipe.yaml").is_file():
        return (
            f"{path} is a run that stopped before its first step: it has a recipe.yaml and no {RESOLVED}, so there is nothing to "
            "read; start it again with `compressvit apply … --output` and a new folder"
        )
    return f"{path} is not a run folder: it has no {RESOLVED}; {way_out}"


def environment(command: list[str], packages: Sequence[str] = ()) -> Environment:
    """What a number may depend on apart from the recipe: command, versions (of `packages` too), machine."""
    import torch  # late, because a report reads run folders without it

    names = ("torch", "torchvision", "timm", "torchdistill", "numpy", "scipy", "einops", "safetensors", "pydantic")
    versions: dict[str, str | None] = {}
    for name in (*names, *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return Environment(
        command=command,
        compressvit=__version__,
        python=sys.version.split()[0],
        platform=platform.platform(),
        cpu_count=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        cuda=torch.version.cuda if torch.cuda.is_available() else None,
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        versions=versions,
    )


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted paths, e.g. `steps.0.multiplex.share`; empty ones are values."""
    if isinstance(content, dict) and content:
        return {
            k: v
            for key, value in content.items()
            for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(content, list) and content:
        return {k: v for i, value in enumerate(content) for k, v in flat(value, f"{prefix}.{i}").items()}
    return {prefix: content}


def _value(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"
