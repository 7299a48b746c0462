"""Detectors: a backbone of timm, what stands on it, and what detectors are matched and trained by."""
