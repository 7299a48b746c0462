"""Damaged recipes, artifacts, files of weights, lists and run folders: each is read, or refused in a sentence.

    python tests/helpers/mutants.py --recipes 10000 --folders 2000 --seed 1

For every kind of damage it is counted how often what was damaged was accepted or was our error (a `UserError`, or exit code
2), and as faults are listed: any other exception or exit code, a stack trace, escape sequences of a terminal that were in a
file, more time or memory than `helpers.bounds` allows, and whatever is changed outside of the folder that was given.
A mutant depends on the seed, its subject and its number alone: `--only lists:17` tries one again. Each few hundred are
tried in a process of their own, so that one that crashes or hangs is named, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.bounds import MEMORY, SECONDS, Faults  # noqa: E402
from helpers.mutant_folders import Lists, Runs  # noqa: E402
from helpers.mutant_models import Artifacts, Recipes, Subject, Weights  # noqa: E402
from helpers.mutate import Chance, clear  # noqa: E402
from helpers.outside import surroundings, watching  # noqa: E402

SUBJECTS: dict[str, type[Subject]] = {
    "recipes": Recipes,
    "artifacts": Artifacts,
    "weights": Weights,
    "lists": Lists,
    "runs": Runs,
}
SHARES = {"artifacts": 0.35, "weights": 0.15, "lists": 0.3, "runs": 0.2}  # of --folders
CHUNK = 200
HANGS = 60  # seconds without an answer, after which a process is killed: `bounded` cannot stop what does not return to Python


def tried(subject: Subject, name: str, number: int, seed: int, root: Path, faults: Faults) -> tuple[str, str]:
    """Damage a subject in a folder in `root`, and have it read.

    Args:
        root: a folder that has nothing else to do than to stay as it is but for that folder.

    Returns:
        The kind of damage, and the outcome, as `Faults.attempt` words it.
    """
    chance, folder = Chance(f"{seed}/{name}/{number}"), root / "mutant"
    clear(folder)
    folder.mkdir()
    mutant = subject.mutant(chance, folder)
    before = surroundings(root, folder)
    what = f"{name}:{number} of seed {seed}: {mutant.kind}: {mutant.said}"
    with watching(folder, Path(tempfile.gettempdir())) as outside:
        outcome = faults.attempt(mutant.read, what)
    after = surroundings(root, folder)
    outside += [
        f"{path} is another" for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)
    ]
    if outside:
        faults.append(f"{what}: outside of its folder: {'; '.join(outside[:5])}")
        outcome = "outside"
    clear(folder)
    return mutant.kind, outcome


def _chunk(subject: Subject, name: str, numbers: list[int], seed: int, root: Path, answers: Path) -> None:
    """Try some mutants, and write a line about each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdin.close()
    subject.begin()
    with answers.open("a") as file:
        for number in numbers:
            faults, began = Faults(), time.monotonic()
            kind, outcome = tried(subject, name, number, seed, root, faults)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            row = [number, kind, outcome, time.monotonic() - began, peak, faults]
            file.write(json.dumps(row) + "\n")
            file.flush()


def rows(subject: Subject, name: str, numbers: list[int], seed: int, root: Path) -> Iterator[list[Any]]:
    """A row of each mutant: number, kind, outcome, seconds, the process's largest memory in bytes, faults."""
    fork, answers = multiprocessing.get_context("fork"), root.parent / f"answers.{name}"
    while numbers:
        part = numbers[:CHUNK]
        answers.write_text("")
        process = fork.Process(target=_chunk, args=(subject, name, part, seed, root, answers))
        process.start()
        said, since = 0, time.monotonic()
        while process.is_alive() and time.monotonic() - since < HANGS:
            process.join(0.2)
            if (size := answers.stat().st_size) != said:
                said, since = size, time.monotonic()
        hung = process.is_alive()
        process.kill()
        process.join()
        found = [json.loads(line) for line in answers.read_text().splitlines()]
        yield from found
        if len(found) < len(part):
            end = "hangs" if hung else f"ends its process ({process.exitcode})"
            number = part[len(found)]
            yield [number, "(not known)", end, time.monotonic() - since, 0, [f"{name}:{number} of seed {seed} {end}"]]
        numbers = numbers[len(found) + (len(found) < len(part)) :]


class Table:
    """How many mutants of each kind there were, by outcome."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self.slowest: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)
        self.faults: list[str] = []

    def add(self, name: str, row: list[Any]) -> None:
        _, kind, outcome, seconds, peak, faults = row
        self.counts[name][kind][outcome] += 1
        self.slowest[name] = max(self.slowest[name], seconds)
        self.peaks[name] = max(self.peaks[name], peak)
        self.faults += faults

    def __str__(self) -> str:
        lines = ["| | mutants | accepted | our error | anything else |", "| --- | --- | --- | --- | --- |"]
        everything: Counter[str] = Counter()
        for name, kinds in self.counts.items():
            whole = sum(kinds.values(), Counter())
            everything += whole
            lines += [_line(f"**{name}**", whole), *(_line(kind, kinds[kind]) for kind in sorted(kinds))]
        lines.append(_line("**all**", everything))
        for name in self.counts:
            lines.append(
                f"{name}: at most {self.slowest[name]:.1f} s, and {self.peaks[name] / 2**20:,.0f} MiB in a process"
            )
        return "\n".join(lines)


def _line(words: str, counts: Counter[str]) -> str:
    others = {word: count for word, count in counts.items() if word not in ("accepted", "our error")}
    said = f" ({', '.join(f'{word} {count}' for word, count in others.items())})" if others else ""
    figures = f"{counts.total():,} | {counts['accepted']:,} | {counts['our error']:,} | {sum(others.values()):,}{said}"
    return f"| {words} | {figures} |"


def _prepared(folder: Path) -> Path:
    """A folder for what is tried, with those for home, temporary files and the working directory, which are to stay as they are."""
    import torch
    import vl_convert

    torch.set_num_threads(1)
    vl_convert.javascript_bundle = lambda: ""  # seconds, for pages that no browser opens
    root = folder / "root"
    for name in ("home", "tmp", "work"):
        (root / name).mkdir(parents=True)
    os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "HF_HUB_OFFLINE": "1", "COLUMNS": "240"}
    tempfile.tempdir = None
    os.chdir(root / "work")
    return root


def _try_all(args: argparse.Namespace, counts: dict[str, int], table: Table) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants.") as made:
        root = _prepared(Path(made))
        for name, make in SUBJECTS.items():
            numbers = [int(word.partition(":")[2]) for word in args.only if word.startswith(f"{name}:")]
            if not numbers and (not args.only or name in args.only):
                numbers = list(range(counts[name]))
            if not numbers:
                continue
            (Path(made) / name).mkdir()
            subject = make(Path(made) / name)
            making = multiprocessing.get_context("fork").Process(target=subject.make)
            making.start()
            making.join()
            assert not making.exitcode, "what is damaged cannot be made"
            for done, row in enumerate(rows(subject, name, numbers, args.seed, root), 1):
                table.add(name, row)
                for fault in row[-1]:
                    print(f"FAULT {fault}\n", flush=True)
                if done % CHUNK == 0:
                    print(
                        f"{time.strftime('%H:%M')} {name}: {done} of {len(numbers)}, faults {len(table.faults)}",
                        flush=True,
                    )
        os.chdir("/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=1000, help="so many damaged recipes")
    parser.add_argument(
        "--folders", type=int, default=200, help="so many artifacts, files of weights, lists and runs in all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="of these subjects, or these mutants, as lists:17")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    counts = {"recipes": args.recipes} | {name: round(args.folders * share) for name, share in SHARES.items()}
    table = Table()
    try:
        _try_all(args, counts, table)
    finally:  # also of those until somebody stops it
        bounds = f"bounds: {SECONDS} s of computing, {MEMORY / 2**30:g} GiB more than before"
        print(f"{table}\nfaults {len(table.faults)} ({bounds})", flush=True)
    return 1 if table.faults else 0


if __name__ == "__main__":
    sys.exit(main())
