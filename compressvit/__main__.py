"""`python -m compressvit`."""

from __future__ import annotations

import sys

from compressvit.cli import program

sys.exit(program())
