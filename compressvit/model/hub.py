"""Weights by the name of a repository of the Hugging Face Hub, `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`, as timm writes it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.model.local_dir import CONFIG, PREPROCESSOR, TENSORS
from compressvit.model.stored import MANIFEST

HUB, LOCAL = "hf-hub:", "local-dir:"  # timm's words
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def weights_path(given: str | Path, where: str) -> Path:
    """The file or folder of weights that a user names by a path, by timm's `local-dir:FOLDER`, or by `hf-hub:ORG/NAME`, of which the files
    that describe a model and its tensors are downloaded where they are not in the Hub's local cache.

    Args:
        where: the key under which it was given.

    Raises:
        UserError: the path is not valid, or the files cannot be had.
    """
    text = str(given)
    if text.startswith(HUB):
        return _downloaded(text.removeprefix(HUB), where)
    return expanded(text.removeprefix(LOCAL), where)


@cache
def _downloaded(name: str, where: str) -> Path:
    """The folder of the cache that has a repository's files."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: {HUB}{name} is no repository of the Hugging Face Hub; it is written {HUB}ORG/NAME")
    repository, _, revision = name.partition("@")
    described = [
        path for file in (MANIFEST, CONFIG, PREPROCESSOR) if (path := _file(repository, revision, file, where))
    ]
    if not any(path.name in (MANIFEST, CONFIG) for path in described):
        raise UserError(f"{where}: {HUB}{name} has neither {MANIFEST} nor {CONFIG}, which say which model it is of")
    for file in TENSORS:
        if path := _file(repository, revision, file, where):
            return path.parent
    raise UserError(f"{where}: {HUB}{name} has no {' or '.join(TENSORS)}; models in several files are not read")


def _file(repository: str, revision: str, name: str, where: str) -> Path | None:
    """A file in the cache, downloaded if it is not there; None if the repository has none of that name."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = try_to_load_from_cache(repository, name, revision=revision or None)
    if isinstance(known, str):
        return Path(known)
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except (
        Exception
    ) as error:  # what the hub's HTTP client raises has no common base, and the client has changed before
        offline = isinstance(error, LocalEntryNotFoundError)  # no connection, and nothing in the cache
        if isinstance(error, EntryNotFoundError) and not offline:
            return None
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{where}: {name} of {HUB}{repository} is not in the local cache and could not be downloaded ({text[0]}). Supply the model as "
            "a folder or file instead"
        ) from error
