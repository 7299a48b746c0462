"""Random damage to files: of their bytes, of their lines, of the values in them. And the bounds that whoever reads them keeps to."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.hostile import ESC

SECONDS = 10
MEMORY = 2 * 2**30  # bytes, beyond what is in use
ODD = [
    None, True, False, 0, 1, -1, -2, 3, 7, 10**5, 10**7, 10**12, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.5, 0.5, 1e-300, 1e308, 1e400,
    float("nan"), "", "x", "1", "nan", ESC, "\x00", "[/x]", "../../etc/passwd", "hf-hub:x/y", "local-dir:/etc", "caf\udce9", "x" * 5000,
    [], [[]], [0], [1, 2, 3], ["x"], [-1], [None], {}, {"x": 1}, {"": {}}, [[[[[[1]]]]]], {"a": {"b": {"c": {}}}}, [1] * 1000,
]  # fmt: skip


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def with_odd_value(content: Any, chance: random.Random) -> Any:
    """A copy of JSON-like content in which one value is another one, gone, moved, or has a neighbour."""
    content = copy.deepcopy(content)
    path = chance.choice(list(places(content))[1:] or [()])
    if not path:
        return chance.choice(ODD)
    here = content
    for key in path[:-1]:
        here = here[key]
    kind = chance.randrange(10)
    if kind == 0:
        del here[path[-1]]
    elif kind == 1 and isinstance(here, dict):
        here[chance.choice(["x", "", ESC, "depth", "share", "rank"])] = here.pop(path[-1])
    elif kind == 2 and isinstance(here, dict):
        here[chance.choice(["x", "seed", "dtype"])] = chance.choice(ODD)
    elif kind == 3 and isinstance(here, list):
        here.extend(here[-1:] * chance.choice([1, 5]))
    elif kind == 4 and isinstance(here[path[-1]], (int, float)):
        here[path[-1]] = here[path[-1]] * chance.choice([-1, 2, 10, 1000, 0.3]) + chance.choice([0, 1])
    else:
        here[path[-1]] = chance.choice(ODD)
    return content


def with_odd_bytes(whole: bytes, chance: random.Random) -> bytes:
    """Cut, flipped, doubled, emptied, or with something in between."""
    at = chance.randrange(len(whole) + 1)
    kind = chance.randrange(7)
    if kind == 0:
        return whole[:at]
    if kind == 1:
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 5, 50])):
            if damaged:
                damaged[chance.randrange(min(len(damaged), 4000))] = chance.randrange(256)
        return bytes(damaged)
    if kind == 2:
        return whole + whole
    if kind == 3:
        return (
            whole[:at]
            + chance.choice([b"[" * 10**5, b"{" * 100, b"\x00", b"\x1b[31m", b"\xff\xfe", b"- " * 9000, b"9" * 6000])
            + whole[at:]
        )
    if kind == 4:
        return bytes(len(whole))
    lines = whole.splitlines(keepends=True) or [b""]
    i, j = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[i], lines[j] = (lines[j], lines[i]) if kind == 5 else (lines[j], lines[j])
    return b"".join(lines)


def replace_file(file: Path, chance: random.Random) -> None:
    """Put something else in the place of a file."""
    kind = chance.randrange(6)
    file.unlink()
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file)
    elif kind == 3:
        file.symlink_to("/etc/hostname")
    elif kind == 4:
        file.symlink_to("/dev/zero")


def clear(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more than `SECONDS` and `MEMORY`: a TimeoutError or a MemoryError otherwise."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
