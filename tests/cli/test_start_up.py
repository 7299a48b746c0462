"""What the quick verbs do not import, so that they answer at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, io, json, sys
from compressvit.cli import main
loaded = [("import", sorted(sys.modules))]
for words in (["recipes", "list"], ["schema"], ["schema", "data"], ["validate", "quickstart"]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    loaded.append((" ".join(words), sorted(sys.modules)))
print(json.dumps(dict(loaded)))
"""
NEVER = ("altair", "vl_convert", "sklearn", "scipy", "torchdistill", "tensorboard")


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules that are there after each verb; one process runs them all, the lightest first."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("verb", "there", "absent"),
    [
        ("import", "compressvit.cli", ("torch", "timm", "pydantic", "rich", "yaml", *NEVER)),
        ("recipes list", "yaml", ("torch", "timm", "pydantic", *NEVER)),
        ("schema", "compressvit.transforms.multiplex", ("timm", "torchvision", "triton", *NEVER)),
        ("schema data", "compressvit.data.sets.digits", ("timm", "torchvision", "triton", *NEVER)),
        ("validate quickstart", "timm", NEVER),
    ],
)
def test_a_quick_verb_imports_no_more_than_it_needs(loaded, verb, there, absent):
    assert there in loaded[verb]
    found = {module: [name for name in loaded[verb] if name.partition(".")[0] == module] for module in absent}
    assert {module: names[:3] for module, names in found.items() if names} == {}
