"""What a run folder holds by name: only that is deleted, and no link in it is followed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path, PurePosixPath

from compressvit.errors import UserError, option, switch
from compressvit.model.header import MANIFEST, TENSORS
from compressvit.reading import kind_of

LOCK = ".lock"  # while a process writes into the folder
_ARTIFACT = rf"(?:{re.escape(MANIFEST)}|{re.escape(TENSORS)})"
_EXPORTED = (
    r"exported/(student|teacher|merged)(_fp16|_bf16|_int8|_int8-static)?"  # an artifact of the run, in a precision
)
_OF_SAFETENSORS = r"\.tmp[A-Za-z0-9]{6}"  # what safetensors writes to before it has its name
_EVENTS = r"tensorboard/events\.out\.tfevents\..+"
# Files by their path in the folder. A folder is ours where files of ours would lie in it.
_FILES = (
    r"(recipe|resolved)\.yaml",
    r"(environment|plan|results|predictions|distill|wandb|files)\.json",
    r"metrics\.jsonl",
    r"run\.log",
    r"report\.html",
    r"adapter\.safetensors",
    r"(ranks|widths)\.png",
    r"checkpoints/[^/]+\.(pt|json)",
    rf"checkpoints/[^/]+/{_ARTIFACT}",
    rf"(student|teacher)/{_ARTIFACT}",
    rf"merged/(config\.json|merge\.json|{_ARTIFACT})",
    rf"{_EXPORTED}(\.(onnx|onnx\.data|pt2|pt2\.sha256|safetensors|xml|bin)|_predict\.py)",
    rf"{_EXPORTED}_timm/((config|export)\.json|{re.escape(TENSORS)})",
    rf"{_EXPORTED}_peft/(adapter_config\.json|export\.json|adapter_model\.safetensors)",
    _EVENTS,
    r"predictions/\d+\.(png|jpg)",
    r"diagnostics/[^/]+\.(jsonl?|csv|png|svg)",
    r"tools/[^/]+\.(json|csv|png|svg)",
    rf"tools/{_EVENTS}",
    # left by a run that was killed
    re.escape(LOCK),
    r"(?:.+/)?\.[^/]+\.part",
    rf"(?:.+/)?{_OF_SAFETENSORS}",
    r"exported/\.[^/]+\.part/.+",
    rf"(?:.+/)?\.[^/]+(\.old)?\.[0-9a-f]{{8}}/{_ARTIFACT}",
    rf"\.merge\.[^/]+/(config\.json|pytorch_model\.bin|README\.md|{_ARTIFACT})",
)
_FOLDERS = (
    r"student|teacher|merged|exported|tensorboard|predictions|diagnostics|tools|tools/tensorboard|checkpoints|checkpoints/[^/]+",
    rf"{_EXPORTED}_(timm|peft)",
    r"(?:.+/)?\.[^/]+(\.old)?\.[0-9a-f]{8}",
    r"\.merge\.[^/]+",
    r"exported/\.[^/]+\.part(/.+)?",
)
_SCRATCH = rf"\.lock|\..+\.part|\..+\.[0-9a-f]{{8}}|\.merge\..+|{_OF_SAFETENSORS}"
_OWN_FILE = re.compile("|".join(f"(?:{pattern})" for pattern in _FILES))
_OWN_FOLDER = re.compile("|".join(f"(?:{pattern})" for pattern in _FOLDERS))


def entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Everything in a folder, the innermost first, and whether it is a folder; links are entries, and nothing behind them is."""
    for here, folders, files in os.walk(folder, topdown=False):
        yield from ((Path(here, name), False) for name in files)
        for name in folders:
            path = Path(here, name)
            yield path, not path.is_symlink()


def foreign(folder: Path) -> Path | None:
    """The first entry of a run folder that no run writes, a link among them; None where all is a run's own."""
    for path, is_folder in sorted(entries(folder)):
        name = path.relative_to(folder).as_posix()
        own = _OWN_FOLDER if is_folder else _OWN_FILE
        if not own.fullmatch(name) or kind_of(path) not in (None, "a folder"):
            return path
    return None


def is_own(name: str) -> bool:
    """Whether a run writes a file of this name, a path in its folder, and keeps it."""
    parts = PurePosixPath(name).parts
    return _OWN_FILE.fullmatch(name) is not None and not any(part == ".." or is_scratch(Path(part)) for part in parts)


def is_scratch(entry: Path) -> bool:
    """Whether a killed run left it: a lock, an unfinished file, or an unfinished model (`.student.1a2b3c4d`, `.merge.x1y2z3`)."""
    return re.fullmatch(_SCRATCH, entry.name) is not None


def delete(folder: Path, *, scratch: bool = False) -> None:
    """Empty a run folder of what is its own, but for the lock, which the caller holds.

    Args:
        scratch: only of what a killed run left.

    Raises:
        UserError: something else is in it; nothing is deleted then.
    """
    if not scratch:
        refuse_foreign(folder)
    for path, is_folder in list(entries(folder)):
        name = path.relative_to(folder)
        # not in `exported`, whose files are written by a process that need not hold the lock
        inside = name.parts[0] != "exported" and any(is_scratch(Path(part)) for part in name.parts)
        left = inside and (_OWN_FOLDER if is_folder else _OWN_FILE).fullmatch(name.as_posix())
        if name.as_posix() == LOCK or (scratch and not left):
            continue
        with suppress(OSError) if scratch else nullcontext():  # a scratch folder with something else in it stays
            path.rmdir() if is_folder else path.unlink()


def refuse_foreign(folder: Path) -> None:
    """Raise a `UserError` where a run folder that is to be deleted holds something that no run writes."""
    if (other := foreign(folder)) is not None:
        kind = kind_of(other)
        what = f" ({kind})" if kind else ""
        raise UserError(
            f"{switch('overwrite')}: {other}{what} is nothing that a run writes, so {folder} is not deleted; move it elsewhere, or give "
            f"another {option('output')}"
        )


def refuse_links(folder: Path) -> None:
    """Raise a `UserError` where a folder that is to be written into is a link, or holds one, or a named pipe or the like.

    A run folder that somebody else made could otherwise have any file of the user overwritten.
    """
    for path in [folder, *(path for path, _ in entries(folder))]:
        if kind_of(path) not in (None, "a folder"):
            raise UserError(
                f"{path} is {kind_of(path)}, and nothing in a run folder is written through one; put a file or folder of its own in its "
                f"place, or give another {option('output')}"
            )
