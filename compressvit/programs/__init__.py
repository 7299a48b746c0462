"""Code shared by the programs in `tools/`."""
