"""`files.json`: the files of a finished run with their checksums, so that a damaged one is noticed, and made again where that is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from compressvit.errors import UserError, switch
from compressvit.files import sha256_of, write_json
from compressvit.model.header import MANIFEST, TENSORS
from compressvit.reading import read_json
from compressvit.runs.owned import entries, is_own

NAME = "files.json"
FORMAT = 1
# Of these some grow, and others are written again by other verbs, or have checksums of their own.
_UNLISTED = {NAME, "run.log", "report.html", "wandb.json", "tensorboard", "merged", "exported", "tools"}
_MODELS = ("teacher", "student")
_CHECKED = (*_MODELS, "checkpoints")
_REMADE = (
    "recipe.yaml",
    "environment.json",
    "plan.json",
    "results.json",
    "predictions",
    "predictions.json",
    "adapter.safetensors",
)


def write_list(folder: Path) -> None:
    """Write the list of the files that are in a run folder."""
    write_json(folder / NAME, {"format": FORMAT, "sha256": {name: sha256_of(folder / name) for name in _names(folder)}})


def is_listed(folder: Path) -> bool:
    """Whether there is a list; runs of earlier versions have none."""
    return (folder / NAME).is_file()


def without_list(folder: Path) -> str | None:
    """What to tell where there is a list that cannot be read."""
    if not is_listed(folder) or _listed(folder) is not None:
        return None
    return (
        f"{folder / NAME} cannot be read, so damage to other files is not noticed; remove it, and {switch('resume')} writes it from the "
        "files as they are"
    )


def other_files(folder: Path) -> list[str]:
    """The names of files that are missing, or are not what the run wrote; none where there is no list, or none that can be read."""
    listed = _listed(folder) or {}
    return [name for name, digest in sorted(listed.items()) if _differs(folder, name, digest)]


def other_than_written(folder: Path, names: Sequence[str] | None = None, told: Sequence[str] = ()) -> str | None:
    """What to tell where files that are shown are not what the run wrote, or None. Models and checkpoints have checksums of their own.

    Args:
        folder: the run folder.
        names: the files that are shown; None: all but models and checkpoints.
        told: what is told already; a file that it names is not told again.
    """
    listed = _listed(folder) or {}
    shown = [name for name in sorted(listed) if name.partition("/")[0] not in _CHECKED] if names is None else names
    here = [name for name in shown if name in listed and (folder / name).is_file()]
    others = [name for name in here if not any(name in text for text in told) and _differs(folder, name, listed[name])]
    if not others:
        return None
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    differ = "differs" if len(others) == 1 else "differ"
    return f"{', '.join(others[:3])}{more} {differ} from what the run wrote, by the checksums in {NAME}"


def _listed(folder: Path) -> dict[str, str] | None:
    """Checksums by the name of a file, None where there is no list of files of a run."""
    try:
        listed = read_json(folder / NAME)["sha256"]
        sound = all(isinstance(digest, str) and is_own(name) for name, digest in listed.items())
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return None
    return listed if sound else None


def _differs(folder: Path, name: str, digest: str) -> bool:
    path = folder / name
    return not path.is_file() or path.is_symlink() or sha256_of(path) != digest


def remove_remade(folder: Path, names: list[str]) -> list[str]:
    """Remove of these files those that a run writes again when it is resumed, from what its checkpoints hold, and then the list too: the
    run's end writes another one. None are removed where a checkpoint is among them: it would have to train again.

    Returns:
        What is removed, or was not there.
    """
    if any(name.startswith("checkpoints/") for name in names):
        return []
    remade = [name for name in names if name.partition("/")[0] in (*_MODELS, *_REMADE)]
    models = [whole for whole in _MODELS if any(name.startswith(f"{whole}/") for name in remade)]
    for name in remade:
        (folder / name).unlink(missing_ok=True)
    remove_models(folder, models)
    if remade:
        (folder / NAME).unlink(missing_ok=True)
    return remade


def remove_models(folder: Path, models: list[str]) -> None:
    """Remove models of a run by the names of their folders: an artifact is written to a folder of its own, or in place of another one."""
    for whole in models:
        for file in (MANIFEST, TENSORS):
            (folder / whole / file).unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or somebody keeps something in it
            (folder / whole).rmdir()


def _names(folder: Path) -> list[str]:
    found = [path.relative_to(folder) for path, is_folder in entries(folder) if not is_folder]
    return sorted(name.as_posix() for name in found if name.parts[0] not in _UNLISTED and is_own(name.as_posix()))
