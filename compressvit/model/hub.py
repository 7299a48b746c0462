"""Weights by the name of a repository of the Hugging Face Hub, `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`, as timm writes it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.model.local_dir import CONFIG, INDEXES, PREPROCESSOR, TENSORS, in_parts, named_parts
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
    """The folder of the cache that has a repository's files, of one commit."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: {HUB}{name} is no repository of the Hugging Face Hub; it is written {HUB}ORG/NAME")
    repository, _, revision = name.partition("@")
    known = None
    try:
        known = _cached(repository, revision)
        if known is not None and ((known / MANIFEST).is_file() or (known / PREPROCESSOR).is_file()):
            return known
        return _fetched(repository, revision, where)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # what the hub's HTTP client raises has no common base, and the client has changed before
        if known is not None:  # without a connection; a model of timm's has no file on its images
            return known
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{where}: {HUB}{name} is not in the local cache and could not be downloaded ({text[0]}). Supply the model as a folder or file "
            "instead"
        ) from error


def _cached(repository: str, revision: str) -> Path | None:
    """A commit's folder in the cache that describes a model and has its tensors."""
    from huggingface_hub import try_to_load_from_cache

    for file in (MANIFEST, CONFIG):
        path = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(path, str) and _is_whole(Path(path).parent):
            return Path(path).parent
    return None


def _is_whole(folder: Path) -> bool:
    """Whether a commit's folder has the tensors, all of them where they are in several files."""
    if any((folder / tensors).is_file() for tensors in TENSORS):
        return True
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is None:
        return False
    try:
        return bool(in_parts(index))
    except UserError:  # some are not in the cache yet
        return False


def _fetched(repository: str, revision: str, where: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    for _ in range(2):  # again if somebody pushed a commit between two files
        found = HfApi().model_info(repository, revision=revision or None)
        names = [one.rfilename for one in found.siblings or ()]
        described = [file for file in (MANIFEST, CONFIG) if file in names]
        if not described:
            raise UserError(
                f"{where}: {HUB}{repository} has neither {MANIFEST} nor {CONFIG}, which say which model it is of"
            )
        tensors = next((file for file in (*TENSORS, *INDEXES) if file in names), None)
        if tensors is None:
            raise UserError(f"{where}: {HUB}{repository} has no {' or '.join(TENSORS)}")
        wanted = [*described, *([PREPROCESSOR] if PREPROCESSOR in names else []), tensors]
        folders = {Path(hf_hub_download(repository, file, revision=revision or None)).parent for file in wanted}
        if tensors in INDEXES:
            parts = named_parts(Path(hf_hub_download(repository, tensors, revision=revision or None)))
            folders |= {Path(hf_hub_download(repository, file, revision=revision or None)).parent for file in parts}
        if len(folders) == 1:
            break
    return Path(folders.pop())
