"""Python programs in a process of their own, in which compressvit is imported afresh.

The process is forked from one that has imported torch and timm, which takes three seconds; so it begins as
`python -c` and `python -m` do, but at once. A test of what a verb imports must start a real interpreter instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import types
from collections.abc import Iterable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# What a run imports of other packages, as far as it takes long.
_IMPORTED = [
    "torch",
    "timm",
    "timm.optim",
    "timm.scheduler",
    "torch._dynamo",
    "torchvision.transforms.v2",
    "pydantic.functional_validators",
    "pydantic.main",
    "pydantic.types",
    "altair",
    "vl_convert",
    "einops",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch.utils.tensorboard",
    "pytest",
]
_FORKED = multiprocessing.get_context("forkserver")


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def begin() -> None:
    """Start the process from which programs are forked, which imports while tests run."""
    _FORKED.set_forkserver_preload(_IMPORTED)
    forkserver.ensure_running()


def python(*words: object, path: Iterable[Path] = ()) -> Answer:
    """Exit code, output and errors of `python WORDS`, which begin with `-c PROGRAM`, `-m MODULE` or a file.

    The folders of `path` stand on `sys.path` before everything else, as with PYTHONPATH.
    """
    begin()  # of no effect once the server runs
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "out", Path(name) / "err"]
        paths = [*map(str, path), str(ROOT)]
        arguments = ([str(word) for word in words], paths, dict(os.environ), os.getcwd(), *map(str, files))
        process = _FORKED.Process(target=_program, args=arguments)
        process.start()
        process.join(280)  # below the limit of a test
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{words} takes too long")
        assert process.exitcode is not None
        return Answer(process.exitcode, *(file.read_text(encoding="utf-8") for file in files))


def _program(words: list[str], paths: list[str], environment: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    own = [name for name in sys.modules if name.partition(".")[0] == "compressvit"]
    assert not own, f"imported before the program began: {own}"
    sys.path[:0] = paths
    sys.modules["torch"].set_num_threads(1)
    sys.modules["vl_convert"].javascript_bundle = lambda: ""  # seconds, for pages that no browser opens
    multiprocessing.set_start_method(None, force=True)  # not as this one was started, but the system's own
    kind = words[0]
    if kind == "-m":
        sys.argv[1:] = words[2:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = [kind, *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = words
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
