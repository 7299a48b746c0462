"""Registries, which map words of recipes to classes: one for each kind of extension.

Within compressvit, a file registers its definitions when it is imported. All files of the registry's subpackage are imported when the
registry is first read, so adding a method means adding a file. Another package provides an entry point

    [project.entry-points."compressvit.transforms"]
    ia3 = "compressvit_ia3"

whose name is the word and whose module registers it. A recipe contains only the word, never the name of a module, so recipes are plain
data and only installed code is loaded.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger("compressvit")


class Registry(Mapping[str, T]):
    """A mapping from words to entries: compressvit's own in alphabetical order, then those of other packages.

    Args:
        kind: what messages call an entry, e.g. 'transform'.
        room: the subpackage whose files register entries, e.g. 'compressvit.transforms'. Its last part also names the group of entry
            points, 'compressvit.transforms'.
    """

    def __init__(self, kind: str, room: str):
        self.kind, self.room = kind, room
        self.group = f"compressvit.{room.rpartition('.')[2]}"
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        self._packages: dict[str, str] = {}  # by word, for words from entry points
        self._faults: dict[str, str] = {}
        self._found = False

    def add(self, name: str, entry: T, module: str) -> None:
        """Register an entry that `module` defines.

        Raises:
            TypeError: the word is taken.
        """
        if name in self._entries:
            raise TypeError(f"two {self.kind}s are called {name!r}: {self._modules[name]} and {module}")
        self._entries[name] = entry
        self._modules[name] = module

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._find()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._find()
        return iter(sorted(self._entries, key=lambda name: (not self._is_own(name), name)))

    def __len__(self) -> int:
        self._find()
        return len(self._entries)

    def is_own(self, name: str) -> bool:
        """Whether compressvit itself defines an entry."""
        self._find()
        return self._is_own(name)

    def package_of(self, name: str) -> str | None:
        """The installed distribution that provides an entry; None for compressvit's own entries and those registered by a program."""
        self._find()
        return self._packages.get(name)

    def fault(self, name: str) -> str | None:
        """Why an installed package failed to provide the word of its entry point; None if it did not fail."""
        self._find()
        return self._faults.get(name)

    def class_called(self, name: str) -> T | None:
        """Compressvit's own entry with this class name, e.g. `LoRA`, whose word is 'lora'."""
        own = (entry for word, entry in self.items() if self._is_own(word))
        return next((entry for entry in own if getattr(entry, "__name__", None) == name), None)

    def _is_own(self, name: str) -> bool:
        return self._modules[name].partition(".")[0] == "compressvit"

    def _find(self) -> None:
        if self._found:
            return
        self._found = True  # set before the imports below, whose modules may read the registry
        try:
            room = importlib.import_module(self.room)
            for info in pkgutil.walk_packages(room.__path__, f"{self.room}."):
                importlib.import_module(info.name)
        except BaseException:
            self._found = False
            raise
        for point in entry_points(group=self.group):
            self._load(point)

    def _load(self, point: EntryPoint) -> None:
        package = point.dist.name if point.dist is not None else point.value
        fault = self._why_not(point)
        if fault is None:
            self._packages[point.name] = package
            return
        text = f"the {self.kind} {point.name!r} of the package {package} cannot be used: {fault}"
        self._faults[point.name] = text
        log.warning("%s", text)

    def _why_not(self, point: EntryPoint) -> str | None:
        """Load an entry point; returns the reason if this fails."""
        name = point.name
        if name in self._packages:
            return f"the package {self._packages[name]} has a {self.kind} of that name too; uninstall one of the two"
        if name in self._entries and self._is_own(name):
            return f"compressvit has a {self.kind} of that name"
        fault = _failure(point.load)
        if fault is None and name not in self._entries:
            return f"{point.value} registers no {self.kind} of that name"
        return fault


def _failure(load: Callable[[], object]) -> str | None:
    try:
        load()
    # third-party code: no exception, nor an exit, may break recipes that do not use it
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None
