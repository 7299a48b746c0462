"""Running `compressvit` in this process, and reading what a run left behind."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from compressvit.charts.findings import Finding
from compressvit.cli import main
from compressvit.errors import UserError
from compressvit.model import stored
from helpers.training import VIT

# A run of a second that writes everything a run can write. `recipe` and `finished` of conftest.py are of this one.
RECIPE = f"""\
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {json.dumps(VIT)}
  finetune: {{epochs: 1, log_every: 1}}
data: {{name: digits, batch_size: 8, limit_train: 24, limit_val: 16}}
steps:
  - multiplex: {{share: 2, mlp_conv: 3}}
  - distill: {{epochs: 2, log_every: 1, losses: {{hidden_relation: {{weight: 0.5}}, labels: {{weight: 0.25}}}}}}
"""

EPOCH = 3  # batches of an epoch of it

# Nothing is trained, so a run takes a fraction of a second
QUICK = """\
teacher:
  model: vit_tiny_patch16_224
  weights: random
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}
data: {name: digits, batch_size: 32, limit_train: 64, limit_val: 32}
steps:
  - multiplex: {share: 2}
"""
# The shortest run, for tests of the command line.
TINY = """\
description: A run of a few seconds.
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}
  finetune: {epochs: 1}
data: {name: digits, batch_size: 32, limit_train: 64, limit_val: 32}
steps:
  - multiplex: {share: 2}
  - distill: {epochs: 1}
"""


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `compressvit WORDS`; white space is squeezed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return code, *(" ".join(text.getvalue().split()) for text in (out, err))


def done(*words: object) -> str:
    """The standard output of a command that must succeed."""
    code, out, err = run(*words)
    assert code == 0, err
    return out


def refused(*words: object) -> str:
    """The message of a command that must be refused: exit code 2, told once, no stack trace."""
    code, out, err = run(*words)
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    assert err.startswith("compressvit: ")
    message = err.removeprefix("compressvit: ")
    assert message not in out
    return message


def answered(*words: object) -> None:
    """Run a command that either succeeds or refuses in a sentence, without anything of a terminal that stood in a file.

    Raises:
        UserError: it refuses; what it said.
        AssertionError: it ends otherwise; with the end of the trace where it says that it kept one.
    """
    code, out, err = run(*words)
    if code not in (0, 2) or "Traceback" in out + err or "\x1b[31m" in out + err or "allocate" in err:
        log = re.search(r"trace is (?:in|at the end of) (.+?);", err)
        trace = Path(log.group(1)).read_text(errors="replace")[-1500:] if log else ""
        raise AssertionError(f"exit code {code}: {err}\n{trace}")
    if code:
        raise UserError(err)


@contextlib.contextmanager
def undrawn():
    """Pictures of charts are a pixel, for tests that look at none: drawing one takes a tenth of a second."""

    def pixel(self, *paths):
        for path in paths:
            Image.new("L", (1, 1)).save(path) if path.suffix == ".png" else path.write_text("<svg/>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finding, "picture", pixel)
        yield


def metrics(folder, **wanted):
    """The lines of metrics.jsonl with the given values; there must be some."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]
    assert found, wanted
    return found


def student_bytes(folder) -> bytes:
    return (folder / "student" / stored.TENSORS).read_bytes()
