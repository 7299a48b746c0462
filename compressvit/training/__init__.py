"""Losses, the loop, one file a loss term and one file a phase."""
