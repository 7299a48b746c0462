"""What to do: YAML to a recipe and back, every fault with its line, and what its keys mean."""
