"""Training in shards: `sharded` of training phases."""
