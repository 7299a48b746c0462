"""Atomic writes: to a scratch file first, then a rename, so that a full disk or a crash loses no earlier data.

torch is imported only in the functions for checkpoints, because the report writes files without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from compressvit.errors import UserError, did_you_mean, switch
from compressvit.text import printable_in


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a failed write into a `UserError` with one message.

    torch and safetensors wrap the system's error in a RuntimeError or SafetensorError, so the texts of those are checked, too.
    """
    try:
        yield
    except Exception as error:  # what is not of the disk goes on as it is
        if _is_full(error):
            raise UserError(
                f"{path} could not be written: no space left on the disk. What was written before is whole; "
                f"free some space and go on with {switch('resume')}"
            ) from error
        if isinstance(error, OSError):
            raise UserError(f"{path} could not be written: {error.strerror or error}") from error
        raise


_LOOKED_AT = 10_000  # names of a folder, for one that is like another
_FULL_TEXTS = (
    "No space left",
    "os error 28",
    "PytorchStreamWriter failed",
    "file write failed",
    "iostream error",
    "unexpected pos",
)


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, means that the disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def expanded(path: str | Path, where: str) -> Path:
    """A path given by a user, with `~` expanded.

    Args:
        where: the key under which the path was given.

    Raises:
        UserError: the user named after `~` has no home folder, or the path is not a valid file name.
    """
    try:
        found = Path(path).expanduser()
        found.exists()
    except RuntimeError as error:
        raise UserError(f"{where}: {path} begins with the home folder of somebody who has none here") from error
    except OSError as error:
        raise UserError(f"{where}: {path} is no path: {error.strerror or error}") from error
    return found


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a file's bytes, as hexadecimal digits; None where there is no file."""
    if not path.is_file():
        return None
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found.update(part)
    return found.hexdigest()


def near(path: Path) -> str:
    """A clause for the end of a message that there is no file at `path`: the name beside it that is most like its own; or nothing."""
    with suppress(OSError):
        names = [entry.name for entry in islice(os.scandir(path.parent), _LOOKED_AT)]
        if found := did_you_mean(path.name, names, list_at_most=0):
            return f"; {found}"
    return ""


def write_atomically(path: Path, write: Callable[[Path], Any], *, keep: Path | None = None) -> None:
    """Call `write(scratch)` and rename the scratch file to `path`; if this fails, the old file is unchanged.

    File and folder are on the disk before this returns, so that a machine that loses its power has the old file or the new one.

    Args:
        keep: the old file gets this name.
    """
    scratch = path.with_name(f".{path.name}.part")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.unlink(
            missing_ok=True
        )  # of a run that was killed, or a link that somebody left to have another file overwritten
        try:
            scratch.touch(exist_ok=False)  # fails on whatever else appears there; `write` then finds a file of ours
            write(scratch)
            sync(scratch)
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(scratch, path)
            sync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)


def put(written: Path, path: Path) -> None:
    """Rename a file, or a folder of files, to `path`, with what is in it on the disk before and the name after it."""
    if written.is_dir():
        for file in written.iterdir():
            sync(file)
    sync(written)
    os.replace(written, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; where a system or file system cannot, it does not wait."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def usual_mode(path: Path) -> None:
    """Give a file the mode of any other new one: safetensors makes its own for their owner alone."""
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any, *, indent: int = 2) -> None:
    """Write JSON, whole or not at all. It is valid for every reader: numbers that are not finite become null, and bytes of file names
    that are not UTF-8 are spelled out, as `printable` does it."""
    text = json.dumps(_finite_in(printable_in(content)), indent=indent, allow_nan=False)
    write_text(path, text + "\n")


def _finite_in(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite_in(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite_in(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def torch_fault(error: Exception) -> str:
    """Why torch could not read a file of plain tensors, in one line, with the class where one was refused, and without torch's advice to
    read the file with its checks switched off, which would run code from it."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+(?: [\w.]+)?) (?:was not an allowed|whose module)", text):
        return f"it holds code besides tensors: {found.group(1).replace(' ', '.')}"
    if "weights_only" in text.lower() or "weights only" in text.lower():
        detail = re.search(r"WeightsUnpickler error: (.+)", text)
        reason = detail.group(1).strip() if detail else "it is no pickle of plain tensors"
        return f"it holds something besides tensors and plain values ({reason[:200]})"
    return (text.splitlines() or [type(error).__name__])[0][:300]


def save_checkpoint(path: Path, content: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write tensors and plain values with torch, atomically; arguments as of `write_atomically`."""
    import torch

    write_atomically(path, lambda scratch: torch.save(content, scratch), keep=keep)


def damaged_record(path: Path) -> str | None:
    """The first record of a torch file with a wrong CRC-32 (which torch does not check); None if there is none.

    Also None for a file without checksums (`torch.serialization.set_crc32_options(False)`) or one that is not a zip archive of torch.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = [info for info in archive.infolist() if info.file_size]
            wrong = [info.filename for info in records if not _sound(archive, info)]
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, ValueError):
        return None  # the code that reads it next reports the problem
    return wrong[0] if wrong and len(wrong) < len(records) else None


def _sound(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as record:
            while record.read(1 << 24):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file written by `save_checkpoint`; it loads only tensors and plain values, never code.

    Raises:
        UserError: the file is truncated, damaged or not such a file.
    """
    import torch

    if wrong := damaged_record(path):
        raise UserError(f"{path} is damaged (the checksum of {wrong} differs); remove it to begin its phase again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch reports truncated archives as RuntimeError, EOFError, UnpicklingError or BadZipFile
        raise UserError(
            f"{path} is not a readable checkpoint ({torch_fault(error)}); remove it to begin its phase again"
        ) from error


def require_keys(content: Any, keys: Sequence[str], path: Path) -> None:
    """Check that a loaded checkpoint has the keys that are about to be read.

    Raises:
        UserError: one of `keys` is missing.
    """
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(
            f"{path} has no {missing[0]!r}: it was written by another version of compressvit, or is no checkpoint; "
            "remove it to begin its phase again"
        )
