"""A run that is killed (SIGKILL, so that nothing of its own runs any more) and resumed ends as one that nobody killed."""

from __future__ import annotations

import json
import re
import signal

import pytest
from helpers import runs as here
from helpers.process import python
from helpers.runs import TINY, student_bytes

RECIPE = TINY.replace("finetune: {epochs: 1}", "finetune: {epochs: 2}").replace(
    "distill: {epochs: 1}", "distill: {epochs: 2}"
)
ADAPTED = TINY.partition("steps:")[0] + "steps:\n  - repadapter: {width: 4}\n  - finetune: {epochs: 1}\n"
# A program: `compressvit WORDS`, killed before the given call of a function.
KILLED_BEFORE = """\
import importlib, os, signal, sys
from compressvit.cli import main
module, name, number, *words = sys.argv[1:]
module = importlib.import_module(module)
original, left = getattr(module, name), int(number)

def counted(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(module, name, counted)
sys.exit(main(words))
"""
# The same, killed before a change of a file in a folder: each number is another one. It prints how many there are.
KILLED_AT = """\
import os, signal, sys
from compressvit.cli import main
folder, number, *words = sys.argv[1:]
changes = 0

def watch(event, args):
    global changes
    if event == "open":
        written = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = args[:1] if written else ()
    else:
        paths = args[:2] if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") else ()
    if any(isinstance(path, (str, os.PathLike)) and str(path).startswith(folder) for path in paths):
        changes += 1
        if changes == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
code = main(words)
print("changes", changes)
sys.exit(code)
"""


def done(*words: object) -> str:
    answer = python("-m", "compressvit", *words)
    assert answer.code == 0, answer.err
    return answer.out


def killed_before(module: str, name: str, number: int, *words: object) -> None:
    answer = python("-c", KILLED_BEFORE, module, name, number, *words)
    assert answer.code == -signal.SIGKILL, answer


def rows(folder) -> list[dict]:
    """The rows of metrics.jsonl without what differs between any two runs."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def names(folder) -> set[str]:
    """The files of a run folder."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {re.sub(r"tfevents.*", "tfevents", name) for name in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe, and the folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    done("apply", recipe, "--output", folder / "run", "--no-report")
    return recipe, folder / "run"


# The evaluations: after each epoch of the teacher, before the distillation, after each of its epochs, of the student, of the teacher.
@pytest.mark.wide
@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_the_evaluation_during_which_a_run_was_killed_is_made_again(whole, tmp_path, number):
    recipe, uninterrupted = whole
    words = ("apply", recipe, "--output", tmp_path / "run", "--no-report")
    killed_before("compressvit.runs.evaluate", "evaluate", number, *words)
    kinds = [(row["phase"], row["kind"]) for row in rows(tmp_path / "run")]
    assert kinds[-1][1] == "epoch"  # its checkpoint is written, its evaluation is not
    done(*words, "--resume")
    assert rows(tmp_path / "run") == rows(uninterrupted)
    assert student_bytes(tmp_path / "run") == student_bytes(uninterrupted)
    assert names(tmp_path / "run") == names(uninterrupted)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run whose student merges."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "recipe.yaml").write_text(ADAPTED)
    here.done("apply", folder / "recipe.yaml", "--output", folder / "run", "--no-report")
    return folder / "run"


# Killed before the model is written, before it is compared, and when it lies in its folder and is timed.
@pytest.mark.wide_unless(lambda name: name == "write_json")
@pytest.mark.parametrize("name", ["save_for_timm", "write_json", "_measured"])
def test_a_merge_that_was_killed_is_made_again(adapted, tmp_path, name):
    target = tmp_path / "merged"
    killed_before("compressvit.runs.merge", name, 1, "merge", adapted, "--output", target)
    here.done("merge", adapted, "--output", target)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]  # nothing is left over
    assert names(target) == {"config.json", "merge.json", "model.safetensors"}
    assert "holds an earlier merge" in here.refused("merge", adapted, "--output", target)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(8))
def test_a_run_killed_at_any_change_of_a_file_is_resumed_or_begun_again(whole, tmp_path, share):
    recipe, uninterrupted = whole
    counted = python(
        "-c", KILLED_AT, tmp_path / "count", 0, "apply", recipe, "--output", tmp_path / "count", "--no-report"
    )
    count = int(counted.out.split()[-1])
    for number in range(1 + share * count // 32, count, count // 4):
        folder = tmp_path / str(number)
        words = ("apply", recipe, "--output", folder, "--no-report")
        killed = python("-c", KILLED_AT, folder, number, *words)
        assert killed.code == -signal.SIGKILL, killed
        done(*words, *(["--resume"] if (folder / "resolved.yaml").is_file() else []))
        assert student_bytes(folder) == student_bytes(uninterrupted)
        assert names(folder) == names(uninterrupted)
        assert {str(row) for row in rows(folder)} == {str(row) for row in rows(uninterrupted)}
