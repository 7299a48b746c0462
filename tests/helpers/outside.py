"""Whether anything is changed outside of a folder: Python tells of what it is about to change, and the disk of what others have."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An event's paths that are changed, each as the places of the path and of the descriptor of its folder among the arguments.
_CHANGES = {
    "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),), "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),),
    "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),),
}  # fmt: skip
_ENDLESS = ("/dev/null", "/dev/tty", "/proc/", "/dev/shm/")  # writing there keeps nothing


def _resolved(path: Any, folder: Any = None) -> str | None:
    """Where a path leads whose last part may be a link that is meant itself; None for what is no path, such as a descriptor."""
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, (str, os.PathLike)):
        return None
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(f"/proc/self/fd/{folder}", path)
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


class Watch:
    """Notes every change that this process makes outside of folders; see `watching`. An audit hook stays for good, so there is one."""

    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()
        self.found: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
            path = _resolved(args[0])
            paths = [path and os.path.realpath(path)]
        elif event in _CHANGES:
            paths = [_resolved(args[at], None if of is None else args[of]) for at, of in _CHANGES[event]]
        else:
            return
        self.found += [f"{event} {path}" for path in paths if path is not None and not self._allowed(path)]

    def _allowed(self, path: str) -> bool:
        return path.startswith(_ENDLESS) or any(path == f or path.startswith(f + os.sep) for f in self.folders)


_watch: list[Watch] = []


@contextmanager
def watching(*folders: Path) -> Iterator[list[str]]:
    """Yields a list to which is added, in words, every change outside of these folders that this process makes."""
    if not _watch:
        _watch.append(Watch())
    watch, bytecode = _watch[0], sys.dont_write_bytecode
    watch.found, watch.folders = [], tuple(os.path.realpath(folder) for folder in folders)
    sys.dont_write_bytecode = True
    try:
        yield watch.found
    finally:
        watch.folders, sys.dont_write_bytecode = (), bytecode


def surroundings(root: Path, without: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of change of everything in a folder, by path, but for what is in the folder `without`."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(folder, name) != str(without)]
        for name in [*folders, *files]:
            at = os.lstat(path := os.path.join(folder, name))
            is_folder = name in folders and not os.path.islink(path)
            found[path] = (at.st_mode, 0 if is_folder else at.st_size, 0 if is_folder else at.st_mtime_ns)
    return found
