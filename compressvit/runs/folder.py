"""A run folder contains everything about one `apply`; what is known at the start is written before the first step.

`recipe.yaml` (as given) · `resolved.yaml` (defaults and overrides in) · `environment.json` · `plan.json` · `checkpoints/` ·
`student/` · `metrics.jsonl` · `tensorboard/` · `run.log` · `results.json` · `predictions.json` and `predictions/` · `diagnostics/` ·
`report.html`
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from compressvit import __version__, processes
from compressvit.errors import UserError, option, switch
from compressvit.files import disk_faults, sha256_of, write_json, write_text
from compressvit.model.header import MANIFEST
from compressvit.model.old import RESOLVED, current_recipe, stored_step
from compressvit.notes import Note
from compressvit.reading import MAX_YAML, parse_yaml, read_json, read_text, read_yaml
from compressvit.runs.files import DataPlan, Environment, NoteRow, RecipePlan
from compressvit.runs.owned import LOCK, delete, is_scratch, refuse_foreign, refuse_links

if TYPE_CHECKING:
    from compressvit.charts.findings import Finding
    from compressvit.recipe.recipe import Recipe

GIVEN = "recipe.yaml"


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
        """The teacher, an artifact, if the run trained it."""
        return self.path / "teacher"

    @property
    def diagnostics(self) -> Path:
        """The findings of a run (`compressvit.charts.findings`)."""
        return self.path / "diagnostics"

    def keep(self, finding: Finding) -> None:
        """Write a finding to `diagnostics/`, and its chart also to the run folder itself."""
        finding.write(self.diagnostics, pictures=False)
        finding.picture(self.path / f"{finding.name}.png")

    def checkpoint(self, name: str) -> Path:
        """The checkpoint file of a phase."""
        return self.path / "checkpoints" / f"{name}.pt"

    def transformed(self, name: str) -> Path:
        """The student after data-driven transforms, an artifact, for resuming the run."""
        return self.path / "checkpoints" / stored_step(self.path / "checkpoints", name)

    def refuse_or_clear(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may start here. Nothing is deleted yet; `open` does that.

        Raises:
            UserError: the folder is not empty and neither flag was given; `resume` without a run, or of another recipe;
                `overwrite` of a folder that is not a run.
        """
        if resume and overwrite:
            raise UserError(f"{switch('resume')} and {switch('overwrite')} contradict each other; give one")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{option('output', self.path)} is a file; name a folder")
        occupied = self.path.is_dir() and any(not is_scratch(entry) for entry in self.path.iterdir())
        if resume:
            self._refuse_other_recipe(recipe)
            self._refuse_other_processes()
            refuse_links(self.path.resolve())
            self._refuse_edited_recipe()
        elif occupied and not overwrite:
            raise UserError(
                f"{self.path} is not empty. Give {switch('resume')} to continue the run in it, {switch('overwrite')} to delete it and "
                f"start again, or {option('output')} for another folder"
            )
        elif occupied and not (self.path / RESOLVED).is_file():
            raise UserError(
                f"{switch('overwrite')}: {self.path} is not empty and not a run folder (no {RESOLVED}), so it is not deleted; "
                f"give another {option('output')}"
            )
        elif occupied:
            refuse_foreign(self.path)

    @property
    def blank(self) -> bool:
        """Whether the folder is there and no run has begun in it: one was killed before it had written its first file."""
        return self.path.is_dir() and all(map(is_scratch, self.path.iterdir()))

    def as_begun(self, recipe: Recipe) -> Recipe:
        """The recipe to resume the run with: one from before `group_by: auto` keeps every image by itself (null, as its recipe says), so
        that the same images are held out."""
        with suppress(UserError, OSError):
            before = flat(current_recipe(read_yaml(self.path / RESOLVED)))
            if before.get("data.group_by", "auto") is None and recipe.data.group_by == "auto":
                return recipe.model_copy(update={"data": recipe.data.model_copy(update={"group_by": None})})
        return recipe

    def _refuse_other_recipe(self, recipe: Recipe) -> None:
        if not (self.path / RESOLVED).is_file():
            raise UserError(
                f"{switch('resume')}: there is no run in {self.path} (no {RESOLVED}); start it without {option('resume')}"
            )
        from compressvit.recipe.recipe import parse_recipe  # here, because a report reads run folders without torch

        try:
            text = read_text(self.path / RESOLVED, most=MAX_YAML)
            asked = recipe.to_yaml()
            if text == asked:  # as nearly always: YAML takes long to read
                return
            before = flat(current_recipe(parse_yaml(text, RESOLVED)))
            with suppress(UserError):  # keys that are newer than the run have their defaults
                before = flat(parse_yaml(parse_recipe(text, RESOLVED).to_yaml(), RESOLVED))
        except UserError as error:
            raise UserError(
                f"{switch('resume')}: {self.path / RESOLVED} is damaged, so the run's settings are not known; start a new run with "
                f"another {option('output')}"
            ) from error
        now = flat(parse_yaml(asked, "the recipe"))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        changed = [key for key in changed if not self._changes_nothing(key, before, recipe)]
        if changed:
            lines = [f"  {key}: {_value(before, key)} in the run, {_value(now, key)} now" for key in changed]
            raise UserError(
                f"{switch('resume')}: the recipe is not the one that {self.path} was started with:\n"
                + "\n".join(lines)
                + "\n"
                f"Give the same recipe and overrides, or start a new run with another {option('output')}"
            )

    def environment(self) -> Environment | None:
        """Where the run that began here was started, where that can be read; a resumed run writes it anew where it is missing."""
        try:
            return Environment.model_validate(read_json(self.path / "environment.json"))
        except (UserError, OSError, ValueError):
            return None

    def _refuse_other_processes(self) -> None:
        """`data.batch_size` is of each process, so that another number of them would train with other batches."""
        begun, now = self.environment(), processes.launched()
        before = 1 if begun is None else begun.processes
        if before != now:
            raise UserError(
                f"{switch('resume')}: {self.path} was started with {before} process{'es' * (before > 1)}, and there "
                f"{'are' if now > 1 else 'is'} {now} now; data.batch_size counts for each, so the rest of the run would be another one. "
                f"Start {before}, or start a new run with another {option('output')}"
            )

    def _refuse_edited_recipe(self) -> None:
        """A run goes on with its resolved recipe, so that what somebody changed in `recipe.yaml` would be passed over."""
        begun, file = self.environment(), self.path / GIVEN
        if begun is None or begun.recipe_sha256 is None or sha256_of(file) in (None, begun.recipe_sha256):
            return
        raise UserError(
            f"{switch('resume')}: {file} was changed after the run began, which goes on with {RESOLVED}. For a run of the changed recipe, "
            f"copy it and give another {option('output')}; to go on as begun, delete {GIVEN}, and it is written again"
        )

    def _changes_nothing(self, key: str, before: dict[str, Any], recipe: Recipe) -> bool:
        """Whether a run ends with the same weights if this key has another value than before. That of `data.root` may: the images at the
        new place are compared once they are found (`refuse_other_data`)."""
        from compressvit.data.data_set import find_set  # here, as above

        if key == "data.num_workers":
            return not find_set(recipe.data.name).streams
        if key == "data.root":
            return _same_place(before.get(key), recipe.data.root) or self._fingerprint() is not None
        return key == "data.download"

    def plan(self) -> RecipePlan | None:
        """The plan of the run that began here, where that can be read."""
        try:
            return RecipePlan.model_validate(read_json(self.path / "plan.json"))
        except (UserError, OSError, ValueError):
            return None

    def _fingerprint(self) -> str | None:
        """What identified the data of the run that began here, where that is known."""
        plan = self.plan()
        return plan.data.fingerprint if plan is not None and plan.data is not None else None

    def refuse_other_data(self, recipe: Recipe, data: DataPlan) -> str | None:
        """Check that a run is resumed with the files that it began with, wherever they are now.

        Returns:
            `data.root` before, where the files are at another place now.

        Raises:
            UserError: there are other files, or other labels.
        """
        before = self._fingerprint()
        if before is not None and data.fingerprint is not None and before != data.fingerprint:
            raise UserError(
                f"{switch('resume')}: the data is not what {self.path} was started with: the names or labels of its files have changed, "
                f"and there are {data.train:,} images to train on and {data.validation:,} held out now. Give data.root=FOLDER of the same "
                f"files, or start a new run with another {option('output')}"
            )
        root = self._root()
        return None if root == recipe.data.root or _same_place(root, recipe.data.root) else str(root)

    def has_other_root(self, recipe: Recipe) -> bool:
        """Whether the run was started with another `data.root`."""
        return self._root() != recipe.data.root

    def _root(self) -> str | None:
        root = flat(read_yaml(self.path / RESOLVED)).get("data.root")
        return None if root is None else str(root)

    def clear_scratch(self) -> None:
        """Delete what a killed run had written only in part."""
        with disk_faults(self.path):
            delete(self.path.resolve(), scratch=True)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Create the folder, and lock it against other runs.

        Raises:
            UserError: another run is writing to the folder.
        """
        path = self.path.resolve()
        new = not path.exists()
        with disk_faults(self.path):
            path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK)
        with disk_faults(self.path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"another run is writing into {self.path}; wait for it, or give another {option('output')}"
                ) from None
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no file that is open; an empty lock file that stays does no harm
                (path / LOCK).unlink(missing_ok=True)
            lock.release()
            if new and not any(path.iterdir()):
                path.rmdir()

    def open(
        self,
        recipe: Recipe,
        recipe_text: str,
        plan: RecipePlan,
        command: list[str],
        *,
        resume: bool,
        overwrite: bool,
        moved: Note | None = None,
    ) -> None:
        """Write what is known before the first step; for a resumed run, only what is missing.

        Args:
            moved: the data of a resumed run is at another place: its settings name that, and its plan both.
        """
        with disk_faults(self.path):
            delete(self.path.resolve(), scratch=not overwrite)
        found = environment(command, recipe.packages)
        writes: dict[str, Callable[[Path], None]] = {
            # first: a run that has it can be resumed or overwritten
            RESOLVED: lambda file: write_text(file, recipe.to_yaml()),
            GIVEN: lambda file: write_text(file, recipe_text),
            "environment.json": lambda file: write_json(
                file, {**found.model_dump(mode="json"), "recipe_sha256": sha256_of(self.path / GIVEN)}
            ),
            "plan.json": lambda file: write_json(file, plan.model_dump(mode="json")),
        }
        for name, write in writes.items():
            if not (resume and (self.path / name).exists()):
                write(self.path / name)
        known = self.environment()
        if known is not None and known.recipe_sha256 not in (
            None,
            sha256_of(self.path / GIVEN),
        ):  # it was deleted, and is new
            renewed = known.model_copy(update={"recipe_sha256": sha256_of(self.path / GIVEN)})
            write_json(self.path / "environment.json", renewed.model_dump(mode="json"))
        begun = self.plan()
        if moved is not None and begun is not None and begun.data is not None:
            begun.data.notes.append(NoteRow(**asdict(moved)))
            write_json(self.path / "plan.json", begun.model_dump(mode="json"))
            writes[RESOLVED](self.path / RESOLVED)


def refuse_processes(asked: str) -> None:
    """Raise a `UserError` in one of several processes of a launcher such as torchrun, for what does not divide its work: every process
    would do all of it, and write to the same folder."""
    count = processes.launched()
    if count > 1:
        raise UserError(
            f"a launcher has started {count} processes (WORLD_SIZE={count}), and {asked} works in one; start it without torchrun, srun or "
            "mpirun, or unset WORLD_SIZE. `compressvit apply` works in several"
        )


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders among `paths` and directly in them, each once.

    Raises:
        UserError: a path is neither; the message says what it is instead.
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
    if (path / GIVEN).is_file():
        return (
            f"{path} is a run that stopped before its first step: it has a recipe.yaml and no {RESOLVED}, so there is nothing to "
            "read; start it again with `compressvit apply … --output` and a new folder"
        )
    return f"{path} is not a run folder: it has no {RESOLVED}; {way_out}"


def environment(command: list[str], packages: Sequence[str] = ()) -> Environment:
    """What results may depend on besides the recipe: command, versions (including those of `packages`), machine."""
    import torch  # imported here because a report reads run folders without it

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
        processes=processes.launched(),
        launch=processes.launch(),
        cuda=torch.version.cuda if torch.cuda.is_available() else None,
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        versions=versions,
    )


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to dotted paths, e.g. `steps.0.multiplex.share`; empty ones count as values."""
    if isinstance(content, dict) and content:
        return {
            k: v
            for key, value in content.items()
            for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(content, list) and content:
        return {k: v for i, value in enumerate(content) for k, v in flat(value, f"{prefix}.{i}").items()}
    return {prefix: content}


def _same_place(one: str | None, other: str | None) -> bool:
    """Whether two folders are the same, however they are written."""
    return bool(one and other) and os.path.realpath(str(one)) == os.path.realpath(str(other))


def _value(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"
