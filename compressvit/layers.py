"""Specialisations of timm's attention and blocks, with slots that transforms fill."""

from __future__ import annotations
