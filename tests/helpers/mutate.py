"""Random damage to files: of their bytes, of their lines, of the values in them."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from helpers.hostile import BOMBS, ESC

ODD = [
    None, True, False, 0, 1, -1, -2, 3, 7, 10**5, 10**7, 10**12, 2**63, 2**64, -(2**63), 10**30, 10**80, 0.0, -0.0, -0.5, 0.5, 1e-300,
    1e308, 1e400, -1e400, float("nan"), "", " ", "x", "1", "1e3", "nan", "null", "on", "2020-13-45", "1:30", "~", "*a", "&a", "<<", "#",
    ESC, "\x00", "\u202e", "\u200b", "\ufeff", "é", "e\u0301", "猫", "🙂", "a\nb\tc", "[/x]", "{x}", "%s", "$HOME", ".", "..", "/",
    "../../etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~nobody/x", "~nemo/x", "hf-hub:x/y", "local-dir:/etc",
    "http://127.0.0.1:1/x", "caf\udce9", "x" * 5000, "x " * 5000, "[" * 3000, "(" * 90, "9" * 400,
    [], [[]], [0], [1, 2, 3], ["x"], [-1], [None], [0.5, "x", None, {}], {}, {"x": 1}, {"": {}}, {"x": None}, [[[[[[1]]]]]],
    {"a": {"b": {"c": {}}}}, [1] * 1000, ["x"] * 1000, {str(i): i for i in range(1000)},
]  # fmt: skip
_DEEP: list[Any] = []
for _ in range(80):
    _DEEP = [_DEEP]
ODD.append(_DEEP)
ODD_KEYS = [
    "x",
    "",
    " ",
    ESC,
    "<<",
    "é",
    "__class__",
    "seed",
    "dtype",
    "depth",
    "share",
    "rank",
    "name",
    "weights",
    "x" * 3000,
]

# What is put between two lines of YAML, or before a value.
_YAML_LINES = [
    "---", "...", "%YAML 9.9", "? [a, b]\n: c", "? {a: b}\n: c", "<<: *a", "<<: {seed: 1}", "<<: [1, 2]", "\tx: 1", "x: [", "x: 'a",
    "x: |\n  a", "x: !!python/object/apply:os.system [true]", "x: !!binary x", "x: !!set {a, b}", "x: !!omap [a: 1]", "x: *unknown",
    "seed: 1", "1: 2", "null: 1", "true: 1", "2020-01-01: 1", "1.5: 1", "- x", "\ufeffx: 1",
]  # fmt: skip
_YAML_VALUES = [
    "&a ", "*a ", "!!str ", "!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!seq ", "!!map ", "!x ", "0x", "0o", "0b", "1_",
    "-", "+", ".", "[", "{", "'", '"', "| ", "> ", "@", "`", "%", "? ", ".inf #", ".nan #", "2020-13-45 #", "1:61:61 #", "190:20:30 #",
    "1e999 #", "00123 #", "=", "<< ",
]  # fmt: skip


class Chance(random.Random):
    """Draws damage, and remembers what it was.

    Attributes:
        did: the kind of damage that was drawn last, in words.
    """

    did = ""

    def kind(self, *kinds: str) -> str:
        """One of several kinds of damage."""
        self.did = self.choice(kinds)
        return self.did


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def _inner(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


def with_odd_value(content: Any, chance: Chance) -> Any:
    """A copy of JSON-like content in which one value is another one, gone, moved, or has a neighbour."""
    content = copy.deepcopy(content)
    paths = list(places(content))[1:]
    path = chance.choice(paths or [()])
    odd = copy.deepcopy(chance.choice(ODD))  # no content shares values, which YAML would write as aliases
    if not path:
        chance.did = "all is an odd value"
        return odd
    here, last = _inner(content, path[:-1]), path[-1]
    before = here[last]
    kind = chance.kind(
        "a value is gone", "a key is renamed", "a key too many", "a list repeats", "a number is scaled", "a value from elsewhere",
        "another type", "a letter is another", "values change places", "deep in lists", *["an odd value"] * 4,
    )  # fmt: skip
    if kind == "a value is gone":
        del here[last]
    elif kind == "a key is renamed" and isinstance(here, dict):
        here[chance.choice(ODD_KEYS)] = here.pop(last)
    elif kind == "a key too many" and isinstance(here, dict):
        here[chance.choice(ODD_KEYS)] = odd
    elif kind == "a list repeats" and isinstance(here, list):
        here.extend([copy.deepcopy(here[-1]) for _ in range(chance.choice([1, 5, 2000]))])
    elif kind == "a number is scaled" and isinstance(before, (int, float)):
        here[last] = before * chance.choice([-1, 2, 10, 1000, 0.3]) + chance.choice([0, 1])
    elif kind == "a value from elsewhere":
        here[last] = copy.deepcopy(_inner(content, chance.choice(paths)))
    elif kind == "another type":
        here[last] = chance.choice([str(before), [before], {"x": before}, [before, copy.deepcopy(before)]])
    elif kind == "a letter is another" and isinstance(before, str):
        at = chance.randrange(len(before) + 1)
        other = chance.choice(["", "x", "\x00", ESC, "é", "/", ".", " ", "0", "[", "x" * 3000])
        here[last] = before[:at] + other + before[at + 1 :]
    elif kind == "values change places":
        other = chance.choice(paths)
        if other[: len(path)] != path and path[: len(other)] != other:  # neither is in the other
            here[last], _inner(content, other[:-1])[other[-1]] = _inner(content, other), before
    elif kind == "deep in lists":
        for _ in range(chance.choice([1, 5, 90])):
            here[last] = [here[last]]
    else:
        chance.did = "an odd value"
        here[last] = odd
    return content


_BETWEEN = [
    b"[" * 10**5, b"{" * 100, b"\x00", b"\x1b[31m", b"\xff\xfe", b"- " * 9000, b"9" * 6000, b"\xed\xa0\x80", b"\r", b"x" * 10**6,
]  # fmt: skip


def with_odd_bytes(whole: bytes, chance: Chance) -> bytes:
    """Cut, flipped, doubled, emptied, in another encoding, or with something in between."""
    at = chance.randrange(len(whole) + 1)
    kind = chance.kind(
        "bytes cut off", "bits flipped", "bytes twice", "bytes put in", "all bytes zero", "lines change places", "a line twice",
        "another encoding", "other line ends",
    )  # fmt: skip
    if kind == "bytes cut off":
        return whole[: chance.choice([0, at, max(0, len(whole) - 1)])]
    if kind == "bits flipped":
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 5, 50])):
            if damaged:
                damaged[chance.randrange(min(len(damaged), chance.choice([16, 4000, len(damaged)])))] = (
                    chance.randrange(256)
                )
        return bytes(damaged)
    if kind == "bytes twice":
        return whole + whole
    if kind == "bytes put in":
        return whole[:at] + chance.choice(_BETWEEN) + whole[at:]
    if kind == "all bytes zero":
        return bytes(len(whole))
    if kind == "another encoding":
        text = whole.decode("latin-1")
        return text.encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "utf-8"]))
    if kind == "other line ends":
        return chance.choice(
            [b"\xef\xbb\xbf" + whole, whole.replace(b"\n", b"\r\n"), whole.replace(b"\n", b"\r"), b"\n" * 10**5 + whole]
        )
    lines = whole.splitlines(keepends=True) or [b""]
    i, j = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[i], lines[j] = (lines[j], lines[i]) if kind == "lines change places" else (lines[j], lines[j])
    return b"".join(lines)


def with_odd_yaml(text: str, chance: Chance) -> bytes:
    """YAML with an anchor, an alias, a tag, a merge key or the like in it, or what grows beyond all bounds when it is read."""
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    kind = chance.kind("a YAML bomb", *["a line of YAML put in"] * 2, *["anchors and aliases"], *["a YAML token"] * 4)
    if kind == "a YAML bomb":
        bombs = [bomb for bomb in BOMBS.values() if len(bomb) < 2 * 10**6]
        return "\n".join([*lines[:at], chance.choice(bombs), *lines[at:]]).encode()
    if kind == "a line of YAML put in":
        indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
        lines.insert(at, "\n".join(indent + line for line in chance.choice(_YAML_LINES).splitlines()))
    else:
        for _ in range(chance.choice([1, 1, 2])):  # two: an anchor and its alias
            at = chance.randrange(len(lines))
            head, colon, tail = lines[at].partition(": ")
            lines[at] = (
                head + colon + chance.choice(_YAML_VALUES[:2] if kind == "anchors and aliases" else _YAML_VALUES) + tail
            )
    return "\n".join(lines).encode()


def with_odd_header(whole: bytes, chance: Chance) -> bytes:
    """A safetensors file of another header, whose length is that of the header, or is not."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind = chance.kind(
        "a header's length lies", "a tensor on another", "another dtype", "another shape", "a tensor renamed", "odd metadata",
        *["a header's value"] * 2,
    )  # fmt: skip
    if kind == "a header's length lies":
        lie = chance.choice([0, 1, length - 1, length + 1, len(whole), 2**31, 2**63, 2**64 - 1])
        return lie.to_bytes(8, "little") + whole[8:]
    if kind == "a tensor on another":
        one, other = chance.choice(names), chance.choice(names)
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == "another dtype":
        header[chance.choice(names)]["dtype"] = chance.choice(["F16", "F64", "I64", "BOOL", "C64", "F4", "x", ""])
    elif kind == "another shape":
        header[chance.choice(names)]["shape"] = chance.choice(
            [[], [0], [2**40, 2**40], [1] * 100, [-1], [2**64], [10**9]]
        )
    elif kind == "a tensor renamed":
        header[chance.choice(["x", "", ESC, "head.weight", "__metadata__"])] = header.pop(chance.choice(names))
    elif kind == "odd metadata":
        header["__metadata__"] = copy.deepcopy(chance.choice(ODD))
    else:
        header = with_odd_value(header, chance)
        chance.did = kind
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def damage_json(file: Path, chance: Chance) -> None:
    """Damage a file of JSON: a value, or its bytes."""
    if chance.random() < 0.8:
        file.write_text(json.dumps(with_odd_value(json.loads(file.read_text()), chance)))
    else:
        file.write_bytes(with_odd_bytes(file.read_bytes(), chance))


def damage_yaml(text: str, chance: Chance) -> bytes:
    """Damaged YAML: another value, another token, or other bytes."""
    kind = chance.random()
    if kind < 0.6:
        content = with_odd_value(yaml.safe_load(text), chance)
        return yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogateescape")
    return with_odd_yaml(text, chance) if kind < 0.8 else with_odd_bytes(text.encode(), chance)


def damage_checkpoint(file: Path, chance: Chance) -> None:
    """Damage a torch file so that its checksums are right."""
    content = torch.load(file, weights_only=True)
    keys = list(content)
    kind, key = (
        chance.kind(
            "a key of a checkpoint is gone",
            "a value deep in a checkpoint",
            "a tensor of a checkpoint",
            "a value of a checkpoint",
        ),
        chance.choice(keys),
    )
    if kind == "a key of a checkpoint is gone":
        del content[key]
    elif kind == "a value deep in a checkpoint" and isinstance(content[key], dict) and content[key]:
        inner = chance.choice(list(content[key]))
        content[key][inner] = copy.deepcopy(chance.choice(ODD))
    elif kind == "a tensor of a checkpoint" and isinstance(content.get("model"), dict):
        name = chance.choice(list(content["model"]))
        value = content["model"][name]
        content["model"][name] = chance.choice(
            [value * float("nan"), value[:0], value.half(), value[None], value.to(torch.int64)]
        )
    else:
        content[key] = copy.deepcopy(chance.choice(ODD))
    torch.save(content, file)


def damage_file(file: Path, chance: Chance, elsewhere: Path = Path("/etc/hostname")) -> None:
    """Damage a file as its type allows, or any file: its bytes, or put something else in its place."""
    kind = chance.randrange(10)
    if kind == 9:
        replace_file(file, chance, elsewhere)
    elif kind == 8:
        file.write_bytes(with_odd_bytes(file.read_bytes(), chance))
    elif file.suffix == ".json":
        damage_json(file, chance)
    elif file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        at = chance.randrange(len(lines))
        lines[at] = json.dumps(with_odd_value(json.loads(lines[at]), chance))
        file.write_text("\n".join(lines))
    elif file.suffix == ".yaml":
        file.write_bytes(damage_yaml(file.read_text(), chance))
    elif file.suffix == ".safetensors":
        file.write_bytes(with_odd_header(file.read_bytes(), chance))
    elif file.suffix == ".pt":
        damage_checkpoint(file, chance)
    else:
        file.write_bytes(with_odd_bytes(file.read_bytes(), chance))


def replace_file(file: Path, chance: Chance, elsewhere: Path = Path("/etc/hostname")) -> None:
    """Put something else in the place of a file, or nothing; a link leads to the file `elsewhere`."""
    whole = file.read_bytes()
    file.unlink()
    kind = chance.kind(
        "a pipe", "a folder", "a link to itself", "a link out", "a link to a device", "an empty file", "a hole of 50 GB", "a socket",
        "a folder around it", "no file",
    )  # fmt: skip
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a link to itself":
        file.symlink_to(file)
    elif kind == "a link out":
        file.symlink_to(elsewhere)
    elif kind == "a link to a device":
        file.symlink_to("/dev/zero")
    elif kind == "an empty file":
        file.touch()
    elif kind == "a hole of 50 GB":
        file.write_bytes(whole)
        os.truncate(file, 50 * 2**30)
    elif kind == "a socket":
        descriptor = os.open(file.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{descriptor}/{file.name}")  # a socket's path is at most 108 bytes
        os.close(descriptor)
    elif kind == "a folder around it":
        file.mkdir()
        (file / file.name).write_bytes(whole)


def shown(file: Path) -> str:
    """The beginning of a damaged file, for a message; empty for what is no file of usual size."""
    small = file.is_file() and not file.is_symlink() and file.stat().st_size < 10**6
    return repr(file.read_bytes()[:2500]) if small else ""


def clear(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
