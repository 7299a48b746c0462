"""What the quick verbs do not import, so that they answer at once."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from compressvit.cli.common import short
from compressvit.errors import UserError

PROGRAM = """
import contextlib, io, json, shlex, sys
from compressvit.cli import main
loaded = [("import", sorted(sys.modules))]
for verb in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(shlex.split(verb)) == 0
    loaded.append((verb, sorted(sys.modules)))
print(json.dumps(dict(loaded)))
"""
NEVER = ("altair", "vl_convert", "sklearn", "scipy", "torchdistill", "tensorboard", "wandb")


COMPARE = f"compare {shlex.quote(str(Path(__file__).parents[1] / 'old_runs' / 'quickstart'))}"
# Those of one process, the lightest first: `schema` imports torch, and from then on it is there.
TOGETHER = [("import", "recipes list"), ("schema", "schema data")]


@functools.cache
def loaded(*verbs: str) -> dict[str, list[str]]:
    """The modules that are there after each verb, of one process that runs them all."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *verbs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.wide_unless(lambda verb: verb in TOGETHER[0])  # the others import for some seconds
@pytest.mark.parametrize(
    ("verb", "there", "absent"),
    [
        ("import", "compressvit.cli", ("torch", "timm", "pydantic", "rich", "yaml", *NEVER)),
        ("recipes list", "yaml", ("torch", "timm", "pydantic", *NEVER)),
        ("schema", "compressvit.transforms.multiplex", ("timm", "torchvision", "triton", *NEVER)),
        ("schema data", "compressvit.data.sets.digits", ("timm", "torchvision", "triton", *NEVER)),
        ("validate quickstart", "timm", NEVER),
        pytest.param(COMPARE, "rich", NEVER, id="compare"),
    ],
)
def test_a_quick_verb_imports_no_more_than_it_needs(verb, there, absent):
    verbs = next((verbs for verbs in TOGETHER if verb in verbs), (verb,))
    modules = loaded(*(verb for verb in verbs if verb != "import"))[verb]
    assert there in modules
    found = {module: [name for name in modules if name.partition(".")[0] == module] for module in absent}
    assert {module: names[:3] for module, names in found.items() if names} == {}


@pytest.mark.parametrize("fails", [False, True])
def test_a_short_verb_leaves_the_garbage_collector_as_it_was(fails):
    seen = []

    @short
    def verb(arguments):
        seen.append(gc.isenabled())
        if fails:
            raise UserError("no")
        return 0

    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        verb(argparse.Namespace())
    assert seen == [False]
    assert gc.isenabled()
