"""Runs that are killed (SIGKILL) at random moments and resumed must end as those that nobody killed.

    python tests/helpers/kills.py --kills 200 --seed 1

Every other kill is at a moment, a fraction of the time that the uninterrupted run takes; the others come just before a
change of a file, since most of what can go wrong lies there. A run that is resumed may be killed again. Each is a process
forked from this one, which has imported everything, so that a kill costs little more than the run. Compared is every file
of the folder, byte by byte, but for logs, event files, reports, fields of time, and the command in `environment.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.run_contents import contents, difference  # noqa: E402

# What runs import, some of it late.
_IMPORTED = (
    "compressvit.cli",
    "compressvit.runs.apply",
    "compressvit.runs.sweep",
    "compressvit.runs.export",
    "compressvit.report.write",
    "torch._dynamo",
    "timm.optim",
    "timm.scheduler",
    "torchvision.transforms.v2",
    "altair",
    "vl_convert",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch.utils.tensorboard",
)
_LIMIT = 100  # seconds that no run takes

TEACHER = """\
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}
  finetune: {epochs: 2, log_every: 1}
data: {name: digits, batch_size: 16, limit_train: 48, limit_val: 32}
calibration: {images: 32}
"""
APPLY = ("apply", "recipe.yaml", "--output", "run", "--no-report")
ADAPTED = (
    "student: {head: new}\nsteps: [repadapter: {width: 4}, finetune: {epochs: 2, log_every: 1, keep: best, ema: 0.9}]\n"
)


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        recipe: the text of `recipe.yaml`.
        words: the command, in a folder with that file.
        again: is added to go on, where something was written.
        before: commands that prepare the folder, and that nobody kills.
        watched: what the command writes.
        pictures: whether the folder has a folder of classes, `pictures`.
    """

    recipe: str
    words: tuple[str, ...] = APPLY
    again: tuple[str, ...] = ("--resume",)
    before: tuple[tuple[str, ...], ...] = ()
    watched: str = "run"
    pictures: bool = False


CASES = {
    "multiplex, distill, diagnostics, report": Case(
        f"{TEACHER}diagnostics: [cka: {{}}, gradients: {{}}]\n"
        "steps: [multiplex: {share: 2, mlp_conv: 3}, distill: {epochs: 2, log_every: 1, layers: auto}]\n",
        APPLY[:-1],
    ),
    "multiplex, distill with a cache": Case(
        f"{TEACHER}steps: [multiplex: {{share: 2}}, distill: {{epochs: 4, log_every: 1, mixup: 0.5, cache: {{views: 2}}}}]\n"
    ),
    "freeze, finetune with kept features": Case(
        f"{TEACHER}student: {{head: new}}\n"
        "steps: [freeze: {train: head}, finetune: {epochs: 4, log_every: 1, cache: {views: 2}}]\n"
    ),
    "low_rank, distill": Case(f"{TEACHER}steps: [low_rank: {{rank: 3}}, distill: {{epochs: 2, log_every: 1}}]\n"),
    "lors, merge": Case(f"{TEACHER}steps: [lors: {{rank: 2}}, merge: {{}}]\n"),
    "adapters, finetune, prune in cycles": Case(
        f"{TEACHER}student: {{head: new}}\nsteps: [adapters: {{width: 6}}, finetune: {{epochs: 1, log_every: 1}}, "
        "prune: {epochs: 1, log_every: 1, target: {neurons: 0.25}}]\n"
    ),
    "repadapter, finetune, merge": Case(f"{TEACHER}{ADAPTED.rstrip()[:-1]}, merge: {{}}]\n"),
    "adapters, sparsify": Case(
        f"{TEACHER}student: {{head: new}}\nsteps: [adapters: {{width: 6}}, finetune: {{epochs: 1}}, "
        "sparsify: {density: 0.5, score: snip, epochs: 2, log_every: 1}]\n"
    ),
    "shrink": Case(
        f"{TEACHER}steps: [shrink: {{budget: {{parameters: 0.7}}, multiple: 4}}, finetune: {{epochs: 1, log_every: 1}}]\n"
    ),
    "shrink that keeps": Case(f"{TEACHER}steps: [shrink: {{keep: {{cosine: 0.7}}, multiple: 4}}]\n"),
    "finetune, quantise": Case(f"{TEACHER}steps: [finetune: {{epochs: 1, log_every: 1}}, quantise: {{bits: 5}}]\n"),
    "narrow, distill": Case(
        f"{TEACHER}steps: [narrow: {{neurons: 0.5}}, distill: {{epochs: 1, log_every: 1, losses: {{prediction: {{weight: 1}}}}}}]\n"
    ),
    "files that workers read": Case(
        TEACHER.replace(
            "name: digits, batch_size: 16, limit_train: 48, limit_val: 32",
            "name: folder, root: pictures, batch_size: 4, num_workers: 2, augment: {scale: [0.5, 1.0]}",
        )
        + "steps: [multiplex: {share: 2}, distill: {epochs: 2, log_every: 1}]\n",
        pictures=True,
    ),
    "sweep": Case(
        f"{TEACHER}steps: [low_rank: {{rank: 2}}, finetune: {{epochs: 1, log_every: 1}}]\n",
        ("sweep", "recipe.yaml", "seed=0,1", "--output", "run", "--no-report"),
    ),
    "merge of a run": Case(
        f"{TEACHER}{ADAPTED}", ("merge", "run", "--output", "merged"), ("--overwrite",), (APPLY,), "merged"
    ),
    "export of a run": Case(
        f"{TEACHER}{ADAPTED}",
        ("export", "run", "--to", "safetensors"),
        ("--overwrite",),
        (APPLY,),
        "run/exported",
    ),
    "export to a folder": Case(
        f"{TEACHER}{ADAPTED}", ("export", "run", "--to", "timm"), ("--overwrite",), (APPLY,), "run/exported"
    ),
}


@dataclass
class Ended:
    """How a process ended: its exit code, negative for a signal, what it printed, seconds it took, and changes of files it made."""

    code: int
    text: str
    seconds: float
    changes: int


@dataclass
class Tally:
    """What happened, over all cases."""

    kills: int = 0
    resumed: int = 0
    unharmed: int = 0  # the run ended before its moment came
    faults: list[str] = field(default_factory=list)
    by_case: Counter[str] = field(default_factory=Counter)


def _count_changes(folder: str, last: int, found: list[int]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that counts the changes of files in a folder, and kills this process before number `last`."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            written = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = args[:1] if written else ()
        else:
            paths = args[:2] if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") else ()
        if any(isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(folder) for path in paths):
            found[0] += 1
            if found[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    return watch


def command(words: tuple[str, ...], folder: Path, watched: str, *, after: float = math.inf, change: int = 0) -> Ended:
    """Run `compressvit WORDS` in a folder, in a process of its own, and kill it after so many seconds or before a change of a file."""
    out, counted = folder.parent / "out.txt", folder.parent / "changes.txt"
    counted.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        _be_the_command(words, folder, watched, change, out, counted)
    status, killed = 0, False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - began
        if ended:
            break
        if not killed and passed > min(after, _LIMIT):
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # workers that it left
    changes = int(counted.read_text()) if counted.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), out.read_text(errors="replace"), passed, changes)


def _be_the_command(words: tuple[str, ...], folder: Path, watched: str, change: int, out: Path, counted: Path) -> None:
    """The forked process; never returns."""
    code = 70
    try:
        os.setsid()
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.chdir(folder)
        found = [0]
        sys.addaudithook(_count_changes(os.path.join(os.path.realpath(folder), watched), change, found))
        from compressvit.cli import main

        try:
            code = main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        counted.write_text(str(found[0]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Killer:
    """Kills the command of a case, goes on with it, and compares.

    Args:
        folder: for the runs; what remains there is of runs that did not end as they should.
    """

    def __init__(self, name: str, case: Case, folder: Path, draw: random.Random, tally: Tally):
        self.name, self.case, self.draw, self.tally, self.folder = name, case, draw, tally, folder
        self.start, self.work = folder / "start", folder / "work"  # one name for all, as paths stand in files
        self.start.mkdir(parents=True)
        (self.start / "recipe.yaml").write_text(case.recipe)
        if case.pictures:
            from helpers.images import class_folders  # torch, which whoever only compares need not have

            class_folders(self.start / "pictures")
        for words in case.before:
            ended = command(words, self.start, "run")
            assert ended.code == 0, f"{name}: {words}: {ended.text}"
        found = []
        for _ in range(2):  # the first one also imports what the list above forgets
            shutil.copytree(self.start, self.work)
            ended = command(case.words, self.work, case.watched)
            assert ended.code == 0, f"{name}: {ended.text}"
            found.append(contents(self.work))
            shutil.rmtree(self.work)
        self.seconds, self.changes, self.expected = ended.seconds, ended.changes, found[0]
        if fault := difference(*found):
            raise AssertionError(f"{name}: two runs that nobody killed differ: {fault}")

    def kill(self, number: int) -> None:
        """Kill one run, perhaps more than once, and go on until it is finished."""
        work, story = shutil.copytree(self.start, self.work), []
        while True:
            moment: dict[str, Any] = {}
            if not story or self.draw.random() < 0.25:
                by_time = self.draw.random() < 0.5
                moment = (
                    {"after": self.draw.random() * self.seconds}
                    if by_time
                    else {"change": self.draw.randint(1, self.changes)}
                )
            words = (*self.case.words, *(self.case.again if (work / self.case.watched).exists() else ()))
            ended = command(words, work, self.case.watched, **moment)
            story.append(f"{moment or 'to the end'}: {ended.code}")
            if ended.code == -signal.SIGKILL and moment:
                self.tally.kills += 1
                self.tally.by_case[self.name] += 1
                continue
            self.tally.unharmed += len(story) == 1
            break
        self.tally.resumed += len(story) > 1
        fault = ended.text[-1500:] if ended.code else difference(self.expected, contents(work))
        if fault is None:
            shutil.rmtree(work)
        else:
            kept = work.rename(self.folder / f"fault_{number}")
            self.tally.faults.append(f"{self.name}, {kept}, {'; '.join(story)}: {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="cases whose names contain one of these words")
    parser.add_argument("--keep", type=Path, help="the folder for the runs, of which those with a fault remain")
    args = parser.parse_args()
    for name in _IMPORTED:
        importlib.import_module(name)
    import torch
    import vl_convert

    torch.set_num_threads(1)
    vl_convert.javascript_bundle = lambda: ""  # seconds, for pages that no browser opens
    os.environ["COLUMNS"] = "240"
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kills."))
    draw, tally = random.Random(args.seed), Tally()
    chosen = {name: case for name, case in CASES.items() if not args.only or any(word in name for word in args.only)}
    killers = []
    for index, (name, case) in enumerate(chosen.items()):
        try:
            killers.append(Killer(name, case, folder / str(index), draw, tally))
        except AssertionError as error:  # it fails, or ends differently, without anybody killing it
            tally.faults.append(str(error))
            print(f"FAULT {error}", flush=True)
            continue
        print(f"{name}: {killers[-1].seconds:.1f} s, {killers[-1].changes} changes of files", flush=True)
    number = 0
    while killers and tally.kills < args.kills:
        before = len(tally.faults)
        killers[number % len(killers)].kill(number)
        for fault in tally.faults[before:]:
            print(f"FAULT {fault}", flush=True)
        number += 1
        if number % 20 == 0:
            print(f"kills {tally.kills}, runs {number}, faults {len(tally.faults)}", flush=True)
    print(
        f"kills {tally.kills}, runs {number} ({tally.unharmed} ended before their moment), faults {len(tally.faults)}; "
        f"{', '.join(f'{name}: {count}' for name, count in tally.by_case.items())}"
    )
    if not tally.faults and args.keep is None:
        shutil.rmtree(folder)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
