"""The teacher–student engine: what a training phase is asked to do, and the loop that does it."""

from __future__ import annotations
