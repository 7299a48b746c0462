"""Comparing every file of two folders, but for what differs between any two runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Names, in files of JSON, of what differs between any two runs: times, and what is made of them.
_TIMES = ("time", "seconds", "latency", "slower")
_FOUND = "state"  # of the runs of a sweep, before it went on
_UNLIKE = ("run.log", "report.html", "compare.csv", "compare.md")  # the tables of a sweep have latencies


def contents(folder: Path) -> dict[str, Any]:
    """What is compared of every file and folder in a folder, by its path; an event file, of which there may be several, is one name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "a folder"
        elif "tfevents" in name:
            found[f"{Path(name).parent.as_posix()}/events"] = "events"
        elif path.name in _UNLIKE:
            found[name] = "a file"
        elif path.name == "files.json":  # checksums, also of files with times in them
            found[name] = sorted(json.loads(path.read_text())["sha256"])
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".svg":  # Vega numbers the gradients that a process has drawn
            found[name] = re.sub(r"gradient_\d+", "gradient", path.read_text())
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(content: Any) -> Any:
    if isinstance(content, Mapping):
        kept = {key: _timeless(value) for key, value in content.items() if not key.startswith((*_TIMES, _FOUND))}
        if isinstance(
            kept.get("command"), list
        ):  # a run that was killed before it recorded that is recorded as resumed
            kept["command"] = [word for word in kept["command"] if word != "--resume"]
        return kept
    if isinstance(content, str) and "as measured here" in content:
        return "what was measured"
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two contents differ first; None if they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            here = f"{where} {key}".strip()
            if key not in other:
                return f"{here} is missing"
            if key not in one:
                return f"{here} is there too much"
            if (fault := difference(one[key], other[key], here)) is not None:
                return fault
        return None
    if one == other:
        return None
    if isinstance(one, bytes) and isinstance(other, bytes):
        return f"{where} differs ({len(one)} bytes, {len(other)})"
    if isinstance(one, list) and isinstance(other, list):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        return f"{where}[{at}] differs ({len(one)} entries, {len(other)}): {one[at : at + 1]} {other[at : at + 1]}"[
            :500
        ]
    return f"{where} is {other!r}, not {one!r}"[:500]
