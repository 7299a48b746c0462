"""The `prune` phase: train, remove neurons of adapters, train again (MiMi)."""
