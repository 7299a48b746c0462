"""Data sets by name, loaded in batches as a model expects them."""
