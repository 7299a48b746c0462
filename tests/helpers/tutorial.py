"""Runs the code of a tutorial, block by block, in the folder in which it is started: `python tutorial.py PAGE.md`.

- `python`: in one namespace; a block whose first line is `# NAME.py` is written to that file instead.
- `yaml`, `toml`: written to the file that the first line names.
- `bash`: line by line; `compressvit` in this process, `python` and `pytest` in another, `pip` not at all. `export NAME=VALUE` leaves a
  variable that is set already: so a test gives a tutorial something smaller, or a user something real.
- `text`: what is printed, or not to be run.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:py|yaml|toml))\n")


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Line, language and code of every block."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start()) + 2, match[1], match[2]


def promised(page: Path) -> list[str]:
    """The files and folders that a tutorial says one has at its end: what begins an item of its first list."""
    first = page.read_text(encoding="utf-8").partition("\n## ")[0]
    return re.findall(r"^- `([^`]+)`", first, re.MULTILINE)


def run(page: Path) -> int:
    """Run every block; the number of those that were run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, os.getcwd())  # for the files that it writes
    count = 0
    for line, language, code in blocks(page):
        print(f"== {page.name}:{line}, after {time.process_time():.0f} s", flush=True)
        if language == "text":
            continue
        named = NAMED.match(code)
        if named:
            Path(named[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        elif language == "bash":
            for command in code.replace("\\\n", " ").splitlines():
                shell(command)
        else:
            raise ValueError(f"{page.name}:{line}: a block of {language or 'no language'} without the name of a file")
        count += 1
    return count


def shell(command: str) -> None:
    """One line of a shell: variables are filled in, patterns of file names too."""
    words = shlex.split(command, comments=True)
    if not words or words[0] == "pip":
        return
    if words[0] == "export":
        for name, _, value in (word.partition("=") for word in words[1:]):
            os.environ.setdefault(name, value)
        return
    filled = [word for raw in shlex.split(os.path.expandvars(command), comments=True) for word in _files(raw)]
    if words[0] == "compressvit":
        from compressvit.cli import main

        assert main(filled[1:]) == 0, command
    elif words[0] in ("python", "pytest"):
        program = [sys.executable, *(filled[1:] if words[0] == "python" else ["-m", *filled])]
        subprocess.run(program, check=True)
    else:
        raise ValueError(f"a tutorial does not run {words[0]}")


def _files(word: str) -> list[str]:
    return (sorted(glob.glob(word)) or [word]) if "*" in word else [word]


if __name__ == "__main__":
    print(f"{run(Path(sys.argv[1]))} blocks")
