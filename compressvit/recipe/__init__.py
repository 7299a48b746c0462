"""Recipes: reading and writing YAML, errors with line numbers, and the documentation of the keys."""
