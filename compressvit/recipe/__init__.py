"""Recipes: reading and writing YAML, every error with its line, and what the keys mean."""
