"""How a program ends: its exit code, and one sentence for a fault, whoever's it is."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from compressvit.errors import UserError
from compressvit.processes import ToldElsewhere, leads, place
from compressvit.text import complain, printable

REFUSED = 2  # something asked for cannot be done
UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h


def answered(program: str, run: Callable[[], int], run_folder: Callable[[], Path | None] = lambda: None) -> int:
    """Call `run` and return its exit code, or that of the fault it ends with.

    Args:
        program: what messages begin with.
        run_folder: where `run` works, if it is known by then: `run.log` there keeps the trace of an unforeseen fault.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code
    except ToldElsewhere:
        return REFUSED
    except UserError as error:
        complain(program, error if leads() else f"process {place()}: {error}")
        return REFUSED
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args and isinstance(stop.args[0], int) else int(signal.SIGINT)
        complain(program, f"stopped by {signal.Signals(number).name}; what was written before is whole")
        return 128 + number
    except BrokenPipeError:  # `| head` closed our output; what Python still holds back goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a fault of ours: a user gets a sentence, whoever mends it the trace
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # or a user's: no name of ours is so long
            complain(program, f"{str(error.filename)[:100]}… is too long for the path of a file or folder")
            return REFUSED
        reason = (str(error).splitlines() or [""])[0][:300]
        complain(
            program,
            f"unforeseen {type(error).__name__}{f': {reason}' if reason else ''}. This is a fault of compressvit, not of yours: what was "
            f"written before is whole. {_kept(error, run_folder())}",
        )
        return UNFORESEEN


def _kept(error: Exception, folder: Path | None) -> str:
    """Where the trace is, in a sentence; it is written to a run's log, or where there is none to a file for temporary ones."""
    trace = printable("".join(traceback.format_exception(error)))
    log = folder / "run.log" if folder is not None else None
    with suppress(OSError):
        if log is not None and log.is_file() and not log.is_symlink():
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {trace}")
            return f"Its trace is at the end of {log}; please report it with that"
        descriptor, name = tempfile.mkstemp(prefix="compressvit-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(trace)
        return f"Its trace is in {name}; please report it with that"
    return f"Its trace could not be written:\n{trace}"
