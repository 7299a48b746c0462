"""`files.json`: the files of a finished run with their checksums, so that a damaged one is noticed, and made again where that is cheap."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from compressvit.errors import UserError, switch
from compressvit.files import write_json
from compressvit.model.header import MANIFEST, TENSORS
from compressvit.reading import read_json
from compressvit.runs.owned import entries, is_own

NAME = "files.json"
FORMAT = 1
# Of these some grow, and others are written again by other verbs, or have checksums of their own.
_UNLISTED = {NAME, "run.log", "report.html", "wandb.json", "tensorboard", "merged", "exported", "tools"}
_MODELS = ("teacher", "student")
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
    write_json(folder / NAME, {"format": FORMAT, "sha256": {name: _sha256(folder / name) for name in _names(folder)}})


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
    return not path.is_file() or path.is_symlink() or _sha256(path) != digest


def remove_remade(folder: Path, names: list[str]) -> list[str]:
    """Remove of these files those that a run writes again when it is resumed, from what its checkpoints hold. None are removed where a
    checkpoint is among them: it would have to train again.

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


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found.update(part)
    return found.hexdigest()
