"""What the page calls an override: the key=value arguments of a command that runs a recipe."""

from __future__ import annotations

import pytest

from compressvit.report.sections import overrides


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("compressvit apply quickstart seed=1 data.root=A --output x=y", ["seed=1", "data.root=A"]),
        ("compressvit shrink FILE IMAGES --to parameters=0.5 macs=0.5", []),
    ],
)
def test_limits_of_shrink_are_no_overrides(command, found):
    assert overrides(command.split()) == found
