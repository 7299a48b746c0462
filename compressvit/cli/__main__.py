"""`python -m compressvit.cli`."""

from __future__ import annotations

import sys

from compressvit.cli import program

sys.exit(program())
