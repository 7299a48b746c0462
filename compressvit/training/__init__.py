"""Losses, taps' pairs, the loop, and one file a phase."""
