"""LORS: shared weights with private low-rank terms, and low rank alone."""
