"""`compressvit push`: a student to a repository of the Hugging Face Hub, with a model card made from its run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from compressvit.artifacts import artifact
from compressvit.errors import UserError, is_command_line, option, switch
from compressvit.model.header import MANIFEST, TENSORS
from compressvit.model.hub import HUB
from compressvit.report.card import Card, card, origin_of
from compressvit.report.record import read_run
from compressvit.runs.evaluate import artifact_in
from compressvit.runs.folder import RESOLVED
from compressvit.runs.own_data import own_recipe_data
from compressvit.runs.tables import megabytes
from compressvit.tasks.base import task_of

CARD = "README.md"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def push(
    path: str | Path,
    repository: str,
    *,
    licence: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish the student of a run, or an artifact, in one commit: its two files and a model card.

    Args:
        path: a run folder, or an artifact.
        repository: ORG/NAME; created if it is not there.
        licence: as the Hub writes it, e.g. 'apache-2.0'; by default that of the teacher, where timm or the Hub records it.
        private: of a repository that is created.
        overwrite: also where the repository has a model or a card; its earlier commits keep them.
        dry_run: publish nothing, and give the card.

    Returns:
        The repository, its address, the commit, the licence, and the bytes of every file; the text of the card.

    Raises:
        UserError: there is no artifact or it is damaged, the licence is not known, the repository has a model, or the Hub refuses or cannot
            be reached.
    """
    name = repository.removeprefix(HUB)
    if not _NAME.fullmatch(name):
        raise UserError(f"REPOSITORY {repository} is no name of the Hugging Face Hub, which is ORG/NAME")
    folder = artifact_in(Path(path).resolve())
    made = _card(folder, name, licence)
    files: dict[str, bytes | Path] = {CARD: made.text.encode(), **{file: folder / file for file in (MANIFEST, TENSORS)}}
    sizes = {file: len(data) if isinstance(data, bytes) else data.stat().st_size for file, data in files.items()}
    told = {
        "artifact": str(folder),
        "repository": name,
        "licence": made.about["license"],
        "bytes": sizes,
        "card": made.text,
    }
    if dry_run:
        return {**told, "url": None, "commit": None}
    try:
        return {**told, **_published(name, files, private=private, overwrite=overwrite)}
    except _UnreachableError as error:
        words = ["compressvit", "push", str(path), repository, *(["--licence", licence] if licence else [])]
        words += ["--private"] * private + ["--overwrite"] * overwrite
        again = shlex.join(words) if is_command_line() else f"compressvit.push({str(path)!r}, {repository!r}, …)"
        listed = ", ".join(f"{file} ({megabytes(size)})" for file, size in sizes.items())
        raise UserError(
            f"{name}: the Hugging Face Hub cannot be reached ({error}), so nothing was published of {listed}. {folder} stays as it is, and "
            f"the card is made of its run again ({switch('dry_run')} shows it). Once there is a connection: {again}"
        ) from error


def _card(folder: Path, name: str, licence: str | None) -> Card:
    """The card of an artifact that loads; raises a `UserError` where no licence is known."""
    model = artifact.load(folder)  # what is damaged is not published
    data = own_recipe_data(folder)
    origin, unasked = None, ""
    if (folder.parent / RESOLVED).is_file():
        origin = origin_of(read_run(folder.parent).recipe)
        licence = licence or origin.licence
        if not licence and origin.repository:
            licence, unasked = _licence_on_hub(origin.repository)
    if not licence:
        whose = "the run it comes from" if origin is None else f"the teacher ({origin.text}{unasked})"
        raise UserError(
            f"no licence is recorded of {whose}, and a student is published under one that its teacher's allows; give it as "
            f"{option('licence')} apache-2.0, mit, … (the Hub's words)"
        )
    return card(folder, name, task_of(model, None if data is None else data.usual_task), licence, origin)


def _licence_on_hub(repository: str) -> tuple[str | None, str]:
    """What the card of a repository says, None where it says nothing; and, where the Hub could not be asked, that as a clause."""
    from huggingface_hub import HfApi

    try:
        about = HfApi().model_info(repository).card_data
    except (
        Exception
    ) as error:  # what the hub's HTTP client raises has no common base, and the client has changed before
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, f"; the Hub could not be asked: {reason}"
    return (about.get("license") if about is not None else None), ""


class _UnreachableError(Exception):
    """The Hub gave no answer."""


def _is_of_connection(error: Exception) -> bool:
    """Whether the HTTP client had no answer: what it raises then has no common base, but no response, and none of our files, either."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    answered = getattr(error, "response", None) is not None or getattr(error, "filename", None) is not None
    return not answered and not kinds.isdisjoint(("OSError", "TransportError"))


def _published(name: str, files: dict[str, bytes | Path], *, private: bool, overwrite: bool) -> dict[str, str]:
    """Make the repository if it is not there, and commit the files."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(
                f"{name} is there already and public; make it private on the Hub first, or give another name"
            )
        there = [file for file in (*files, "config.json", "pytorch_model.bin") if api.file_exists(name, file)]
        if there and not overwrite:
            raise UserError(
                f"{name} has {' and '.join(there)} already; give {switch('overwrite')} to put a new commit on top (the earlier ones stay), "
                "or another name"
            )
        operations = [CommitOperationAdd(file, data) for file, data in files.items()]
        commit = api.create_commit(name, operations, commit_message="Student and card by compressvit push")
    except UserError:
        raise
    except (
        Exception
    ) as error:  # what the hub's HTTP client raises has no common base, and the client has changed before
        text = str(error).strip().splitlines() or [type(error).__name__]
        if _is_of_connection(error):
            raise _UnreachableError(text[0].rstrip(".")) from error
        login = (
            " Log in first: hf auth login, or set HF_TOKEN." if any(code in text[0] for code in ("401", "403")) else ""
        )
        raise UserError(f"{name} could not be published: {text[0]}.{login} Nothing of it is lost; try again") from error
    return {"url": str(commit.repo_url), "commit": commit.oid}
