"""Formats in which a model is exported for other programs: one file per format."""
